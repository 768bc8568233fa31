"""Modules for inference whose weights stay packed: linear layers, and embeddings of int8 rows."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import FistaPrunerError
from ..models.low_rank import plus_product
from ..runtime.numerics import pass_dtype
from . import kernel
from .format import FLOATS, PackedOperator, pack_operator

ON_GPU = (
    "packed operators are unpacked on the CPU for every product on {device}: on a GPU, load with packed=False, or 2:4 "
    "operators with fistapruner.to_semi_structured"
)
"""Warning of a packed operator whose input is on a GPU."""

TILE_BYTES = 2**26
"""Dense bytes unpacked at a time for many tokens; operators of most models are one tile."""


def product(x: Tensor, operator: PackedOperator, bias: Tensor | None, level: int) -> Tensor:
    """Multiply (…, columns) with a packed operator and add the bias (rows,): (…, rows).

    The compiled kernel, if there is one, multiplies up to ``kernel.MAX_BATCH`` tokens on a CPU, with matrix units
    up to ``kernel.MAX_MANY``. With more tokens, on other devices and in other dtypes, a tile of rows at a time is
    unpacked and multiplied by torch. On a CPU, fp16 tokens are multiplied as fp32; so are many bf16 tokens where it has
    no units for bf16, since torch's fp32 product is several times as fast there.
    """
    columns = operator.shape[1]
    if level >= 0 and x.is_cpu and x.dtype in FLOATS and x.shape[-1:] == (columns,):
        tokens = x.numel() // columns
        many = (
            kernel.TILE < tokens <= kernel.MAX_MANY and x.dtype is torch.bfloat16 and kernel.takes_many(operator, level)
        )
        if many or 0 < tokens <= kernel.MAX_BATCH:
            given = (x.float() if x.dtype is torch.float16 else x).contiguous()
            out = kernel.multiply(operator, given, bias, level, many=many)
            return out if out.dtype is x.dtype else out.to(x.dtype)
    if x.is_cpu and x.dtype in (torch.float16, torch.bfloat16):
        return _unpacked_product(x.to(pass_dtype(x.dtype, x.device)), operator, bias, level).to(x.dtype)
    return _unpacked_product(x, operator, bias, level)


def _unpacked_product(x: Tensor, operator: PackedOperator, bias: Tensor | None, level: int) -> Tensor:
    bias = None if bias is None else bias.to(x.device, x.dtype)
    if not x.is_cpu:
        warnings.warn(ON_GPU.format(device=x.device), stacklevel=4)
    if level < 0 or x.dtype not in kernel.TYPES or not x.is_cpu:
        return functional.linear(x, operator.to_dense().to(x.device, x.dtype), bias)
    (rows, columns), size, parts = operator.shape, x.element_size(), []
    tile = max(TILE_BYTES // max(columns * size, 1) // 64 * 64, 64)
    for first in range(0, rows, tile):
        last = min(first + tile, rows)
        weight = kernel.scratch((last - first) * columns * size).view(x.dtype).view(last - first, columns)
        kernel.unpack(operator, first, last, weight, level)
        parts.append(functional.linear(x, weight, None if bias is None else bias[first:last]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


@torch.library.custom_op("fistapruner::linear", mutates_args=())
def linear(
    x: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    start: Tensor | None,
    values: Tensor,
    scales: Tensor | None,
    sums: Tensor | None,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    level: int,
) -> Tensor:
    """Compute :func:`product` as an operator of torch, which ``torch.compile`` does not look into."""
    return product(x, PackedOperator((rows, columns), dtype, mask, start, values, scales, sums), bias, level)


@linear.register_fake
def _(x: Tensor, bias: Tensor | None, *operator: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], operator[5]))


def _keep_operator(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.operator = inputs[2:10]


def _input_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    mask, start, values, scales, sums, rows, columns, dtype = ctx.operator
    weight = PackedOperator((rows, columns), dtype, mask, start, values, scales, sums).to_dense()
    return gradient @ weight.to(gradient.device, gradient.dtype), *(None,) * 10


linear.register_autograd(_input_gradient, setup_context=_keep_operator)


class _Packed(nn.Module):
    """A module with a packed weight.

    In its state dict the weight is dense, so that a saved model is an ordinary checkpoint. Loading a state dict packs
    the weight again, in the operator's layout, dtype and kind of values.
    """

    operator: PackedOperator
    twin = ""

    @property
    def weight(self) -> Tensor:
        """The dense weight, unpacked at every access, for code that reads its dtype or values."""
        return self.operator.to_dense()

    def pack_again(self, weight: Tensor) -> None:
        """Take another dense weight, as ``weight`` returns it."""
        held = self.operator
        self.operator = pack_operator(weight, int8=held.scales is not None, dense=held.mask is None)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        tied = destination.get(self.twin)
        destination[prefix + "weight"] = self.weight if tied is None else tied
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rest = {key: value for key, value in state_dict.items() if key != prefix + "weight"}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        new = state_dict.get(prefix + "weight")
        if new is None:
            missing_keys += [prefix + "weight"] if strict else []
        elif new.shape != (held := self.weight).shape:
            shapes = f"the new weight is {list(new.shape)}, the packed one is {list(held.shape)}"
            error_msgs.append(f"{prefix}weight: {shapes}")
        elif not torch.equal(new := new.detach().to("cpu", held.dtype), held):  # int8 values are not rounded again
            try:
                self.pack_again(new)
            except FistaPrunerError as error:
                error_msgs.append(f"{prefix}weight: {error}")


class SparseLinear(_Packed):
    """``nn.Linear`` for inference with a packed weight, and a low-rank part beside it where there is one.

    ``product`` multiplies. The low-rank part is two products by torch in fp32, which are added. Gradients flow to
    the input only. The state dict has the dense sum of both parts; another weight replaces both.

    Args:
        operator: the packed weight.
        bias: (rows,) or None.
        level: kernel level by name, ``"torch"`` for none; None takes the fastest one, or that of
            ``FISTAPRUNER_KERNEL``.
        transposed: the dense weight is (in_features, out_features), as that of GPT-2's ``Conv1D``.
        low_rank: A (rank, in_features) and B (out_features, rank) of the low-rank part; None where there is none.
        twin: name in the model's state dict of the tensor to which the dense weight is tied there.
    """

    def __init__(
        self,
        operator: PackedOperator,
        bias: Tensor | None = None,
        level: str | None = None,
        *,
        transposed: bool = False,
        low_rank: tuple[Tensor, Tensor] | None = None,
        twin: str = "",
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = operator.shape
        self.operator, self.transposed, self.twin = operator, transposed, twin
        for name, factor in zip(("low_rank_a", "low_rank_b"), low_rank or (None, None), strict=True):
            self.register_buffer(name, factor, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.level = kernel.best_level() if level is None else kernel.level_index(level)

    @classmethod
    def from_dense(cls, linear: nn.Linear) -> SparseLinear:
        """Pack the bf16 weight of an ``nn.Linear``, on the CPU."""
        return cls(pack_operator(linear.weight), None if linear.bias is None else linear.bias.cpu())

    @property
    def weight(self) -> Tensor:
        """The dense weight, unpacked at every access, for code that reads its dtype or values."""
        dense = self.operator.to_dense()
        if (low_rank := self._low_rank()) is not None:
            a, b = (factor.cpu() for factor in low_rank)
            dense = plus_product(dense, a, b, transposed=False).to(dense.dtype)
        return dense.T.contiguous() if self.transposed else dense

    def pack_again(self, weight: Tensor) -> None:
        """Take another dense weight, as ``weight`` returns it."""
        self.low_rank_a = self.low_rank_b = None
        super().pack_again(weight.T.contiguous() if self.transposed else weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in_features) to (…, out_features)."""
        cast, held = _autocast(x), self.operator
        if (x.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            parts = (held.mask, held.start, held.values, held.scales, held.sums, *held.shape, held.dtype)
            out: Tensor = linear(cast, self.bias, *parts, self.level)
        else:  # the same without torch's dispatcher
            out = product(cast, held, self._buffers["bias"], self.level)
        if (low_rank := self._low_rank()) is None:
            return out
        wide = torch.promote_types(x.dtype, torch.float32)  # one bf16 token takes torch three times as long
        a, b = (factor.to(x.device, wide) for factor in low_rank)
        return (out + functional.linear(functional.linear(x.to(wide), a), b)).to(out.dtype)

    def _low_rank(self) -> tuple[Tensor, Tensor] | None:
        """Return A and B of the low-rank part; None where there is none."""
        a, b = self._buffers["low_rank_a"], self._buffers["low_rank_b"]
        return None if a is None or b is None else (a, b)

    def extra_repr(self) -> str:
        """Describe shape, density and kernel."""
        rows, columns = self.operator.shape
        density = self.operator.stored / max(rows * columns, 1)
        level = kernel.LEVELS[self.level] if self.level >= 0 else "torch"
        part = "" if (low_rank := self._low_rank()) is None else f", low_rank={low_rank[0].shape[0]}"
        values = self.operator.values.dtype
        return f"in_features={columns}, out_features={rows}{part}, {density=:.3f}, {values=!s}, kernel={level}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore with a kernel level that this machine has."""
        super().__setstate__(state)
        self.level = min(self.level, kernel.best_level())


class Int8Embedding(_Packed):
    """``nn.Embedding`` for inference with int8 rows, which a tied output head shares.

    Args:
        operator: a dense operator with int8 values, on the CPU.
        dtype: of what is looked up; it follows the model's ``to``, as the device does.
    """

    def __init__(self, operator: PackedOperator, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = operator.shape
        self.operator = operator
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up the rows of token ids (…): (…, embedding_dim)."""
        return self.operator.rows(ids.cpu()).to(self.get_buffer("like"))


class DenseLinear(nn.Linear):
    """``nn.Linear`` that multiplies a few bf16 vectors with the compiled kernel.

    There the kernel uses the memory bandwidth better than torch does.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map (…, in_features) to (…, out_features)."""
        if torch.compiler.is_compiling():
            return super().forward(input)
        x, weight, level = _autocast(input), self.weight, kernel.best_level()
        rows = x.numel() // self.in_features if self.in_features else 0
        if (
            not 0 < rows <= kernel.TILE
            or level < kernel.DENSE_LEVEL
            or not x.dtype == weight.dtype == torch.bfloat16
            or not (x.is_cpu and weight.is_cpu and weight.is_contiguous())
            or x.shape[-1:] != (self.in_features,)
            or torch.is_grad_enabled()
        ):
            return super().forward(x)
        operator = PackedOperator((self.out_features, self.in_features), weight.dtype, None, None, weight)
        return kernel.multiply(operator, x.contiguous(), self.bias, level)


def _autocast(x: Tensor) -> Tensor:
    """Cast as ``torch.autocast`` does for torch's products, which the kernel is not."""
    kind = "cpu" if x.is_cpu else x.device.type
    available = kind == "cpu" or torch.amp.is_autocast_available(kind)
    if available and torch.is_autocast_enabled(kind) and x.dtype in FLOATS:
        return x.to(torch.get_autocast_dtype(kind))
    return x

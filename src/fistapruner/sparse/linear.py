"""Linear layers for inference, with packed or dense weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import FistaPrunerError
from ..models.files.low_rank import plus_product
from ..runtime.numerics import pass_dtype
from . import kernel
from .packed import FLOATS, PackedOperator, pack_operator

ON_GPU = (
    "packed operators are unpacked on the CPU for every product on {device}: on a GPU, load with packed=False, or 2:4 "
    "operators with fistapruner.to_semi_structured"
)
"""Warning of a packed operator whose input is on a GPU."""

TILE_BYTES = 2**26
"""Dense bytes unpacked at a time for many tokens; operators of most models are one tile."""


class SparseLinear(nn.Module):
    """``nn.Linear`` for inference with a packed weight, and a low-rank part beside it where there is one.

    The compiled kernel, if there is one, multiplies up to ``kernel.MAX_BATCH`` tokens on a CPU, with matrix units
    up to ``kernel.MAX_MANY``. With more tokens, on other devices and in other dtypes, a tile of rows at a time is
    unpacked and multiplied by torch. On a CPU, fp16 tokens are multiplied as fp32; so are many bf16 tokens where it has
    no units for bf16, since torch's fp32 product is several times as fast there. The low-rank part is two products by
    torch in fp32, which are added.

    The state dict holds the dense ``weight``, the sum of both parts, so that a saved model is an ordinary checkpoint.
    Loading a state dict packs the weight again, in the operator's dtype, or in int8 if the operator is int8; another
    weight than that which is held replaces both parts.

    Args:
        operator: the packed weight.
        bias: (rows,) or None.
        level: kernel level by name, ``"torch"`` for none; None takes the fastest one, or that of
            ``FISTAPRUNER_KERNEL``.
        transposed: the dense weight is (in_features, out_features), as that of GPT-2's ``Conv1D``.
        low_rank: A (rank, in_features) and B (out_features, rank) of the low-rank part; None where there is none.
    """

    def __init__(
        self,
        operator: PackedOperator,
        bias: Tensor | None = None,
        level: str | None = None,
        *,
        transposed: bool = False,
        low_rank: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(operator, PackedOperator):
            raise FistaPrunerError(
                f"operator is of the class {type(operator).__name__}, and a PackedOperator is expected: "
                "SparseLinear.from_dense packs an nn.Linear"
            )
        self.out_features, self.in_features = operator.shape
        self.operator = operator
        self.transposed = transposed
        for name, factor in zip(("low_rank_a", "low_rank_b"), low_rank or (None, None), strict=True):
            self.register_buffer(name, factor, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach())
        if level is None:
            self.level = kernel.best_level()
        else:
            self.level = -1 if level == "torch" else kernel.level_index(level)
        self._handle: kernel.Handle | None = None

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

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in_features) to (…, out_features)."""
        out = self._sparse_product(x)
        if (low_rank := self._low_rank()) is None:
            return out
        wide = torch.promote_types(x.dtype, torch.float32)  # one bf16 token takes torch three times as long
        a, b = (factor.to(x.device, wide) for factor in low_rank)
        return (out + functional.linear(functional.linear(x.to(wide), a), b)).to(out.dtype)

    def _low_rank(self) -> tuple[Tensor, Tensor] | None:
        """Return A and B of the low-rank part; None where there is none."""
        a, b = self._buffers["low_rank_a"], self._buffers["low_rank_b"]
        return None if a is None or b is None else (a, b)

    def _sparse_product(self, x: Tensor) -> Tensor:
        """Multiply with the packed weight and add the bias."""
        x = _autocast(x)
        if (
            self.level >= 0
            and x.is_cpu
            and (x.dtype in kernel.TYPES or x.dtype is torch.float16)
            and x.shape[-1:] == (self.in_features,)
            and not (x.requires_grad and torch.is_grad_enabled())
        ):
            rows = x.numel() // self.in_features if self.in_features else 0
            handle = self._kernel()
            many = kernel.TILE < rows <= kernel.MAX_MANY and x.dtype is torch.bfloat16 and handle.takes_many(self.level)
            if many or 0 < rows <= kernel.MAX_BATCH:
                out = handle.multiply(_for_kernel(x), self.level, many=many)
                return out if out.dtype is x.dtype else out.to(x.dtype)
        if x.is_cpu and x.dtype in (torch.float16, torch.bfloat16):
            wide = pass_dtype(x.dtype, x.device)
            return self._dense_product(x.to(wide)).to(x.dtype)
        return self._dense_product(x)

    def extra_repr(self) -> str:
        """Describe shape, density and kernel."""
        rows, columns = self.operator.shape
        density = self.operator.stored / max(rows * columns, 1)
        level = kernel.LEVELS[self.level] if self.level >= 0 else "torch"
        shape = f"in_features={columns}, out_features={rows}"
        if (low_rank := self._low_rank()) is not None:
            shape += f", low_rank={low_rank[0].shape[0]}"
        return f"{shape}, density={density:.3f}, values={self.operator.values.dtype}, kernel={level}"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out memory addresses; a copy makes its own."""
        return {**self.__dict__, "_handle": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore with a kernel level that this machine has."""
        super().__setstate__(state)
        self.level = min(self.level, kernel.best_level())

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
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
        weight = state_dict.get(prefix + "weight")
        if weight is None:
            missing_keys += [prefix + "weight"] if strict else []
            return
        try:
            self._repack(weight)
        except FistaPrunerError as error:
            error_msgs.append(f"{prefix}weight: {error}")

    def _repack(self, weight: Tensor) -> None:
        held = self.weight
        if weight.shape != held.shape:
            raise FistaPrunerError(f"the new weight is {list(weight.shape)}, the packed one is {list(held.shape)}")
        weight = weight.detach().to("cpu", held.dtype)
        if torch.equal(weight, held):
            return  # int8 values stay as they are: they are not rounded again
        self.low_rank_a = self.low_rank_b = None
        weight = weight.T.contiguous() if self.transposed else weight
        self.operator = pack_operator(weight, int8=self.operator.scales is not None)
        self._handle = None

    def _kernel(self) -> kernel.Handle:
        """Return the kernel's handle of the weight and of the bias as it is now."""
        bias = self._buffers["bias"]
        if self._handle is None:
            self._handle = kernel.Handle(self.operator, bias)
        else:
            self._handle.take_bias(bias)
        return self._handle

    def _dense_product(self, x: Tensor) -> Tensor:
        bias = self._buffers["bias"]
        bias = None if bias is None else bias.to(x.device, x.dtype)
        if x.device.type != "cpu":
            warnings.warn(ON_GPU.format(device=x.device), stacklevel=3)
        if self.level < 0 or x.dtype not in kernel.TYPES or x.device.type != "cpu":
            return functional.linear(x, self.operator.to_dense().to(x.device, x.dtype), bias)
        handle, parts = self._kernel(), []
        tile = max(TILE_BYTES // max(self.in_features * x.element_size(), 1) // 64 * 64, 64)
        differentiable = x.requires_grad and torch.is_grad_enabled()  # the backward pass needs the weight again
        for first in range(0, self.out_features, tile):
            last = min(first + tile, self.out_features)
            shape = last - first, self.in_features
            nbytes = shape[0] * shape[1] * x.element_size()
            memory = x.new_empty(nbytes, dtype=torch.uint8) if differentiable else kernel.scratch(nbytes)
            weight = memory.view(x.dtype).view(shape)
            handle.unpack(first, last, weight, self.level)
            parts.append(functional.linear(x, weight, None if bias is None else bias[first:last]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class DenseLinear(nn.Linear):
    """``nn.Linear`` that multiplies a few bf16 vectors with the compiled kernel.

    There the kernel uses the memory bandwidth better than torch does.
    """

    _handle: kernel.Handle | None = None
    _seen: tuple[Tensor, int] | None = None

    @classmethod
    def like(cls, linear: nn.Linear) -> DenseLinear:
        """Make a layer that shares the parameters of ``linear``."""
        other = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        other.weight, other.bias = linear.weight, linear.bias
        return other.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in_features) to (…, out_features)."""
        x = _autocast(x)
        weight, bias, level = self.weight, self.bias, kernel.best_level()
        rows = x.numel() // self.in_features if self.in_features else 0
        if (
            not 0 < rows <= kernel.TILE
            or level < kernel.DENSE_LEVEL
            or not x.dtype == weight.dtype == torch.bfloat16
            or not x.device.type == weight.device.type == "cpu"
            or not weight.is_contiguous()
            or x.shape[-1:] != (self.in_features,)
            or torch.is_grad_enabled()
        ):
            return super().forward(x)
        seen = self._seen
        if self._handle is None or seen is None or seen[0] is not weight or seen[1] != weight.data_ptr():
            self._handle, self._seen = kernel.Handle(weight.detach(), bias), (weight, weight.data_ptr())
        else:
            self._handle.take_bias(bias)
        return self._handle.multiply(_for_kernel(x), level)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out memory addresses; a copy makes its own."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_handle", "_seen")}


def _autocast(x: Tensor) -> Tensor:
    """Cast as ``torch.autocast`` does for torch's products, which the kernel is not."""
    kind = "cpu" if x.is_cpu else x.device.type
    available = kind == "cpu" or torch.amp.is_autocast_available(kind)
    if available and torch.is_autocast_enabled(kind) and x.dtype in FLOATS:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def _for_kernel(x: Tensor) -> Tensor:
    """Return vectors as the kernel reads them: contiguous, fp16 as fp32."""
    return (x.float() if x.dtype is torch.float16 else x).contiguous()

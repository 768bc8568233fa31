"""A linear layer whose weight stays packed."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import kernel
from .packed import PackedOperator, pack_operator

TILE_BYTES = 2**26
"""Dense bytes unpacked at a time for many tokens; operators of most models are one tile."""


class SparseLinear(nn.Module):
    """``nn.Linear`` for inference with a packed weight.

    Up to :data:`kernel.MAX_BATCH` tokens on a CPU go through the compiled kernel, where there is one, and up to
    :data:`kernel.MAX_MANY` where it has matrix units for them. More tokens, other devices and other dtypes unpack a tile of rows at a time
    and use torch's dense product, which is always right.

    Args:
        operator: the packed weight.
        bias: (rows,) or None.
        level: kernel level by name, ``"torch"`` for none; None takes the best one (or what ``FISTAPRUNER_KERNEL`` says).
    """

    def __init__(self, operator: PackedOperator, bias: Tensor | None = None, level: str | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = operator.shape
        self.operator = operator
        self.register_buffer("bias", None if bias is None else bias.detach())
        if level is None:
            self.level = kernel.best_level()
        else:
            self.level = -1 if level == "torch" else kernel.level_index(level)
        self._handle: kernel.Handle | None = None
        self._bias_seen: Tensor | None = None

    @classmethod
    def from_dense(cls, linear: nn.Linear, *, int8: bool = False, group: int = 0, level: str | None = None) -> SparseLinear:
        """Pack the weight of an ``nn.Linear``; ``int8`` and ``group`` as in :meth:`PackedOperator.quantised`."""
        operator = pack_operator(linear.weight)
        return cls(operator.quantised(group) if int8 else operator, linear.bias, level)

    @property
    def weight(self) -> Tensor:
        """The dense weight, unpacked anew at every access: for code that looks at it, such as a dtype check."""
        return self.operator.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) to (…, out_features)."""
        if self.level >= 0 and x.device.type == "cpu" and x.dtype in kernel.TYPES and not (x.requires_grad and torch.is_grad_enabled()):
            rows = x.numel() // self.in_features if self.in_features else 0
            handle = self._kernel()
            many = kernel.TILE < rows <= kernel.MAX_MANY and x.dtype is torch.bfloat16 and handle.takes_many(self.level)
            if many or 0 < rows <= kernel.MAX_BATCH:
                flat = x.detach().reshape(rows, self.in_features).contiguous()
                out = handle.multiply_many(flat, self.level) if many else handle.multiply(flat, self.level)
                return out.view(*x.shape[:-1], self.out_features)
        return self._dense_product(x)

    def extra_repr(self) -> str:
        """Shape, density and kernel."""
        rows, columns = self.operator.shape
        density = self.operator.stored / max(rows * columns, 1)
        level = kernel.LEVELS[self.level] if self.level >= 0 else "torch"
        return f"in_features={columns}, out_features={rows}, density={density:.3f}, values={self.operator.values.dtype}, kernel={level}"

    def _kernel(self) -> kernel.Handle:
        bias = cast("Tensor | None", self.bias)
        if self._handle is None or self._bias_seen is not bias:
            self._handle, self._bias_seen = kernel.Handle(self.operator, bias), bias
        return self._handle

    def _dense_product(self, x: Tensor) -> Tensor:
        bias = cast("Tensor | None", self.bias)
        bias = None if bias is None else bias.to(x.dtype)
        if self.level < 0 or x.dtype not in kernel.TYPES or x.device.type != "cpu":
            return functional.linear(x, self.operator.to_dense().to(x.device, x.dtype), bias)
        handle, parts = self._kernel(), []
        tile = max(TILE_BYTES // max(self.in_features * x.element_size(), 1) // 64 * 64, 64)
        differentiable = x.requires_grad and torch.is_grad_enabled()  # the backward pass needs the weight again
        for first in range(0, self.out_features, tile):
            last = min(first + tile, self.out_features)
            shape = last - first, self.in_features
            nbytes = shape[0] * shape[1] * x.element_size()
            memory = torch.empty(nbytes, dtype=torch.uint8) if differentiable else kernel.scratch(nbytes)
            weight = memory.view(x.dtype).view(shape)
            handle.unpack(first, last, weight, self.level)
            parts.append(functional.linear(x, weight, None if bias is None else bias[first:last]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

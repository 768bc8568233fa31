"""Hold an operator in memory as one bit per weight and its kept values, row by row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..runtime.numerics import dtype_name

PADDING = 64
"""Bytes after the values that vector loads may read."""

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class PackedOperator:
    """A (rows x columns) operator without its zeros.

    Args:
        shape: rows (outputs) and columns (inputs) of the dense weight.
        dtype: dtype of the dense weight.
        mask: (rows, 8 * words) uint8; bit ``c % 8`` of byte ``c // 8`` is set if column ``c`` is stored. Rows are
            padded with zero bits to whole 64-bit words.
        start: (rows + 1) int64, where each row's values begin.
        values: the stored values in row order, followed by :data:`PADDING` bytes; bf16, or int8.
        scales: for int8, (rows,) fp32: value times scale is the weight.
        sums: for int8, (rows,) int32: sum of each row's values.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    mask: Tensor
    start: Tensor
    values: Tensor
    scales: Tensor | None = None
    sums: Tensor | None = None

    @property
    def stored(self) -> int:
        """Number of stored values."""
        return int(self.start[-1])

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        held = (self.mask, self.start, self.values, self.scales, self.sums)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def kept(self) -> Tensor:
        """Return the (rows, columns) boolean mask of the stored weights."""
        bits = np.unpackbits(self.mask.numpy(), axis=1, bitorder="little", count=self.shape[1])
        return torch.from_numpy(bits).bool()

    def to_dense(self) -> Tensor:
        """Unpack the dense weight; float values are bit-equal to what was packed, except that -0.0 is 0."""
        kept = self.kept()
        values = self.values[: self.stored]
        if self.scales is not None:
            counts = self.start[1:] - self.start[:-1]
            values = (values.float() * self.scales.repeat_interleave(counts)).to(self.dtype)
        dense = values.new_zeros(self.shape)
        dense.masked_scatter_(
            kept, values
        )  # assigning a single value would convert it through float and change a NaN's bits
        return dense


def pack_operator(weight: Tensor, *, int8: bool = False) -> PackedOperator:
    """Pack a dense weight without its zeros.

    Args:
        weight: (rows, columns) bf16; fp16 or fp32 only where its values become int8.
        int8: round to symmetric int8: the largest magnitude of each row becomes 127.

    Raises:
        FistaPrunerError: not a matrix of such a dtype, or a value that is to become int8 is not finite.
    """
    if weight.ndim != 2 or weight.dtype not in FLOATS:
        found = f"a {weight.dtype} tensor of shape {list(weight.shape)}"
        raise FistaPrunerError(f"{found} is no operator: expected a matrix of bf16, fp16 or fp32")
    if weight.dtype != torch.bfloat16 and not int8:
        raise FistaPrunerError(
            f"the weight is {dtype_name(weight.dtype)}, and packed values are bf16: convert it first"
        )
    weight = weight.detach().cpu()
    kept = weight != 0
    mask, scales, sums, values = mask_bytes(kept), None, None, weight[kept]
    if int8:
        dense = weight.float()
        if not bool(torch.isfinite(dense).all()):
            raise FistaPrunerError("values that are not finite cannot become int8")
        scales = dense.abs().amax(-1) / 127.0 if dense.shape[1] else dense.new_zeros(dense.shape[0])
        # A scale that underflows would divide by zero; such a row is zero in fp32 anyway.
        levels = (dense / torch.where(scales > 0, scales, 1.0)[:, None]).round().clamp(-127, 127).to(torch.int8)
        sums, values = levels.sum(-1, dtype=torch.int32), levels[kept]
    shape = (weight.shape[0], weight.shape[1])
    return PackedOperator(shape, weight.dtype, mask, row_starts(mask), padded_values(values), scales, sums)


def mask_bytes(kept: Tensor) -> Tensor:
    """Pack (rows, columns) booleans, or zeros and ones, into bits, rows padded to whole 64-bit words."""
    rows, columns = kept.shape
    bits = np.packbits(kept.numpy(), axis=1, bitorder="little")
    padded = np.zeros((rows, -(-columns // 64) * 8), dtype=np.uint8)
    padded[:, : bits.shape[1]] = bits
    return torch.from_numpy(padded)


def row_starts(mask: Tensor) -> Tensor:
    """Compute the (rows + 1) offsets of the rows' values from the mask."""
    start = mask.new_zeros(mask.shape[0] + 1, dtype=torch.int64)
    if mask.numel():
        counts = np.bitwise_count(mask.numpy().view(np.uint64)).sum(axis=1, dtype=np.int64)
        torch.cumsum(torch.from_numpy(counts), 0, out=start[1:])
    return start


def padded_values(values: Tensor) -> Tensor:
    """Copy values into contiguous memory, followed by :data:`PADDING` zero bytes."""
    out = values.new_zeros(values.numel() + PADDING // values.element_size())
    out[: values.numel()] = values.flatten()
    return out

"""Hold an operator in memory as one bit per weight and its kept values, row by row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core import NM
from ..errors import FistaPrunerError

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
        values: the stored values in row order, followed by :data:`PADDING` bytes; the dense dtype, or int8.
        scales: for int8, (rows, groups) fp32: value times scale is the weight.
        sums: for int8, (rows, groups) int32: sum of each group's values.
        group: for int8, columns that share a scale; 0 is the whole row.
        pattern: the n:m pattern if every group of m stores exactly n values (some may be zeros), else None.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    mask: Tensor
    start: Tensor
    values: Tensor
    scales: Tensor | None = None
    sums: Tensor | None = None
    group: int = 0
    pattern: NM | None = None

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
            values = (values.float() * self._value_scales(kept)).to(self.dtype)
        dense = values.new_zeros(self.shape)
        dense.masked_scatter_(
            kept, values
        )  # assigning a single value would convert it through float and change a NaN's bits
        return dense

    def quantised(self, group: int = 0) -> PackedOperator:
        """Round the values to symmetric int8: the largest magnitude of each row (or group) becomes 127.

        Args:
            group: columns that share a scale, a multiple of 64; 0 takes the whole row.

        Raises:
            FistaPrunerError: the group is no multiple of 64, or a value is not finite.
        """
        if group < 0 or group % 64:
            raise FistaPrunerError(f"group {group} is not a multiple of 64 columns (or 0 for a whole row)")
        if self.scales is not None:
            raise FistaPrunerError("the values are int8 already")
        kept, dense = self.kept(), self.to_dense().float()
        if not bool(torch.isfinite(dense).all()):
            raise FistaPrunerError("values that are not finite cannot become int8")
        rows, columns = self.shape
        padded = _in_groups(dense, group)
        scales = padded.abs().amax(-1) / 127.0
        # A scale that underflows would divide by zero; such a group is zero in fp32 anyway.
        levels = (padded / torch.where(scales > 0, scales, 1.0)[..., None]).round().clamp(-127, 127).to(torch.int8)
        levels = levels.view(rows, -1)[:, :columns]
        return PackedOperator(
            self.shape,
            self.dtype,
            self.mask,
            self.start,
            padded_values(levels[kept]),
            scales.contiguous(),
            group_sums(levels, group),
            group,
            self.pattern,
        )

    def _value_scales(self, kept: Tensor) -> Tensor:
        assert self.scales is not None
        width = _group_width(self.group, self.shape[1])
        return self.scales.repeat_interleave(width, dim=1)[:, : self.shape[1]][kept]


def pack_operator(weight: Tensor, pattern: NM | None = None) -> PackedOperator:
    """Pack a dense weight without its zeros.

    Args:
        weight: (rows, columns) fp32, bf16 or fp16.
        pattern: store exactly n values of every m columns; None stores what is not zero.

    Raises:
        FistaPrunerError: not a matrix of such a dtype, or it does not have the pattern.
    """
    if weight.ndim != 2 or weight.dtype not in FLOATS:
        found = f"a {weight.dtype} tensor of shape {list(weight.shape)}"
        raise FistaPrunerError(f"{found} is no operator: expected a matrix of bf16, fp16 or fp32")
    weight = weight.detach().cpu()
    rows, columns = weight.shape
    kept = weight != 0
    if pattern is not None:
        kept = fill_groups(kept, pattern)
    values = torch.where(weight != 0, weight, weight.new_zeros(()))[kept]  # -0.0 that fills a group becomes 0
    mask = mask_bytes(kept)
    return PackedOperator((rows, columns), weight.dtype, mask, row_starts(mask), padded_values(values), pattern=pattern)


def fill_groups(kept: Tensor, pattern: NM) -> Tensor:
    """Add the first zeros of each group of m until it keeps exactly n.

    Raises:
        FistaPrunerError: some group keeps more than n, or the columns are no multiple of m.
    """
    rows, columns = kept.shape
    if columns % pattern.m:
        raise FistaPrunerError(f"{columns} columns are not a multiple of {pattern.m}, so the operator is not {pattern}")
    groups = kept.view(rows, -1, pattern.m)
    missing = pattern.n - groups.sum(-1, keepdim=True)
    if bool((missing < 0).any()):
        raise FistaPrunerError(f"the operator is not {pattern}: a group keeps more than {pattern.n}")
    free = ~groups
    return (groups | (free & (free.cumsum(-1) <= missing))).view(rows, columns)


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


def group_sums(levels: Tensor, group: int) -> Tensor:
    """Sum dense int8 levels (rows, columns) over groups of columns: (rows, groups) int32.

    Args:
        levels: with zeros.
        group: columns of a group; 0 takes the whole row.
    """
    return _in_groups(levels, group).sum(-1, dtype=torch.int32).contiguous()


def _in_groups(values: Tensor, group: int) -> Tensor:
    """View (rows, columns) values as (rows, groups, width), the last group padded with zeros."""
    rows, columns = values.shape
    width = _group_width(group, columns)
    groups = -(-columns // width)
    return torch.nn.functional.pad(values, (0, groups * width - columns)).view(rows, groups, width)


def _group_width(group: int, columns: int) -> int:
    """Return the columns of a group, at most those of the matrix: a file may claim any number."""
    return max(min(group or columns, columns), 1)

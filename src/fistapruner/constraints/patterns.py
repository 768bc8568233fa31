"""Sparsity patterns: what they are called, how many weights they keep, and the exact projection onto them.

Two patterns exist. :class:`Unstructured` zeroes a fraction of all the weights of an operator; :class:`NM` keeps at most
``n`` weights of every ``m`` consecutive inputs (2:4 is what sparse tensor cores read). Both are exact: a projection
returns a mask with precisely the promised number of zeros, ties broken by position, the same on every call.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..runtime.numerics import row_blocks


@dataclass(frozen=True)
class Unstructured:
    """Zero ``round(fraction * numel)`` weights of an operator, wherever they are.

    Args:
        fraction: share of weights that become zero, in [0, 1).
    """

    fraction: float

    def __post_init__(self) -> None:
        if not (isinstance(self.fraction, (int, float)) and 0.0 <= self.fraction < 1.0):
            raise FistaPrunerError(f"sparsity {self.fraction!r} is out of range: a share of zeros in [0, 1), such as 0.5 or 50%")

    @classmethod
    def of_counts(cls, zeros: int, weights: int) -> Unstructured:
        """The pattern with exactly ``zeros`` zeros of ``weights``, all of them included: a share that rounds to it."""
        return cls(min(zeros / weights, math.nextafter(1.0, 0.0)))

    def __str__(self) -> str:
        """A percentage where four decimals of it say everything, else the share in full: it always parses back to itself."""
        percent = f"{100 * self.fraction:.4f}".rstrip("0").rstrip(".")
        return f"{percent}%" if float(percent) / 100.0 == self.fraction else repr(float(self.fraction))

    def zeros(self, rows: int, columns: int) -> int:
        """The exact number of zeros in a ``rows x columns`` operator."""
        return min(round(self.fraction * rows * columns), rows * columns)


@dataclass(frozen=True)
class NM:
    """Keep the ``n`` best of every ``m`` consecutive inputs of a row: ``NM(2, 4)`` is 2:4.

    Args:
        n: weights kept in every group, 1 <= n < m.
        m: group length along the inputs.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not (isinstance(self.n, int) and isinstance(self.m, int) and 1 <= self.n < self.m):
            raise FistaPrunerError(f"pattern {self.n}:{self.m} is not n:m with 1 <= n < m, such as 2:4 or 4:8")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def fraction(self) -> float:
        """Share of zeros, ``1 - n/m``."""
        return 1.0 - self.n / self.m

    def zeros(self, rows: int, columns: int) -> int:
        """The exact number of zeros in a ``rows x columns`` operator."""
        return rows * columns // self.m * (self.m - self.n)


Sparsity = Unstructured | NM


def parse_sparsity(value: str | float | Sparsity) -> Sparsity:
    """Read a sparsity as users write it: ``0.5``, ``"50%"``, ``"2:4"``.

    Args:
        value: a share of zeros, a percentage, an ``n:m`` pattern (n kept of every m inputs), or a pattern object.

    Raises:
        FistaPrunerError: the value is none of these, or out of range.
    """
    if isinstance(value, (Unstructured, NM)):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if math.isfinite(value) and value >= 1:
            raise FistaPrunerError(f"sparsity {value!r} is out of range: a share of zeros in [0, 1), or write '{value:g}%'")
        return Unstructured(float(value))
    text = str(value).strip()
    if match := re.fullmatch(r"(\d+)\s*:\s*(\d+)", text):
        return NM(int(match[1]), int(match[2]))
    try:
        if text.endswith("%"):
            return Unstructured(float(text[:-1]) / 100.0)
        number = float(text)
    except ValueError:
        raise FistaPrunerError(
            f"sparsity {value!r} is not understood: write a share (0.5), a percentage (50%) or a pattern (2:4)"
        ) from None
    return parse_sparsity(number)


def check_divides(sparsity: Sparsity, columns: int, name: str = "operator") -> None:
    """Refuse an n:m pattern whose group length does not divide the operator's inputs.

    Raises:
        FistaPrunerError: names the operator, its inputs and the pattern.
    """
    if isinstance(sparsity, NM) and columns % sparsity.m:
        raise FistaPrunerError(f"pattern {sparsity} does not fit {name}: its {columns} inputs are not a multiple of {sparsity.m}")


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """Mask of exactly ``count`` largest entries of ``scores`` (any shape), ties broken by position.

    NaN scores count as the smallest.
    """
    flat = scores.flatten()
    total = flat.numel()
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= total:
        return torch.ones_like(scores, dtype=torch.bool)
    # The count-th largest value, then every entry above it, then as many ties as are still missing, first come first kept.
    if flat.device.type != "cpu":  # no answer from the device is waited for
        flat = torch.nan_to_num(flat, nan=-math.inf)
        threshold = torch.topk(flat, count, sorted=False).values.min()
        mask = flat > threshold
        tied = flat == threshold
        mask |= tied & (tied.cumsum(0) <= count - mask.sum())
        return mask.view_as(scores)
    if bool(flat.sum().isnan()):
        flat = torch.nan_to_num(flat, nan=-math.inf)
    threshold = _kth_largest(flat, count)
    mask = flat > threshold
    missing = count - int(torch.count_nonzero(mask))
    for block in row_blocks(total):
        if missing:
            ties = (flat[block] == threshold).nonzero()[:missing, 0]
            mask[block][ties] = True
            missing -= len(ties)
    return mask.view_as(scores)


def _kth_largest(flat: Tensor, count: int) -> Tensor:
    """The ``count``-th largest of a 1-D tensor on the CPU, 0-dim.

    Selection is slow for millions of values and copies them. A sorted sample brackets the answer closely, and only the
    values inside the bracket are searched; where the bracket misses (many ties, a periodic pattern) bisection finds it.
    """
    total = flat.numel()
    if total < 1 << 17 or flat.dtype == torch.float64:
        return torch.topk(flat, count, sorted=False).values.min()
    sample = flat[:: total // 8192 | 1].sort(descending=True).values
    place, margin = count * len(sample) // total, len(sample) // 50
    high = sample[max(place - margin, 0)]
    low = sample[min(place + margin, len(sample) - 1)]
    above, inside = 0, []
    for rows in row_blocks(total):
        block = flat[rows]
        above += int(torch.count_nonzero(block > high))
        inside.append(block[(block > low) & (block <= high)])
    near = torch.cat(inside)
    if above < count <= above + len(near):
        return torch.kthvalue(near, len(near) - (count - above) + 1).values
    return _bisect(flat, count)


def _bisect(flat: Tensor, count: int) -> Tensor:
    """The same by bisection over all fp32 numbers, which are as many integers in the same order: no copy, 32 passes."""

    def number(key: int) -> float:
        return float(struct.unpack("<f", struct.pack("<i", key if key >= 0 else key ^ 0x7FFFFFFF))[0])

    low, high = -0x7F800001, 0x7F800000  # of minus and plus infinity
    while low < high:  # the smallest number that fewer than count values exceed
        middle = (low + high) // 2
        if sum(int(torch.count_nonzero(flat[rows].float() > number(middle))) for rows in row_blocks(len(flat))) < count:
            high = middle
        else:
            low = middle + 1
    return torch.tensor(number(low), dtype=flat.dtype)


def keep_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Mask of the ``n`` largest of every ``m`` consecutive entries of each row of ``scores`` (rows x columns)."""
    mask = torch.zeros_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)
    for rows in row_blocks(len(scores)):
        groups = torch.nan_to_num(scores[rows], nan=-math.inf).reshape(-1, m)
        order = torch.sort(groups, dim=-1, descending=True, stable=True).indices
        mask[rows].view(-1, m).scatter_(-1, order[:, :n], True)
    return mask


def project_mask(scores: Tensor, sparsity: Sparsity, scope: str = "operator") -> Tensor:
    """Exact mask of the weights to keep, best scores first.

    Args:
        scores: (rows, columns) importance of each weight, larger is kept.
        sparsity: the pattern.
        scope: for unstructured sparsity, where scores compete: the whole ``"operator"`` (magnitude, FISTAPruner, ALPS)
            or each ``"row"`` (Wanda). Per row, the zeros that do not divide evenly go to the first rows, so that the
            operator's total is the same exact number in both scopes.

    Returns:
        (rows, columns) boolean mask with exactly ``sparsity.zeros(rows, columns)`` False entries.
    """
    rows, columns = scores.shape
    if isinstance(sparsity, NM):
        check_divides(sparsity, columns)
        return keep_n_of_m(scores, sparsity.n, sparsity.m)
    zeros = sparsity.zeros(rows, columns)
    if scope == "operator":
        return keep_largest(scores, rows * columns - zeros)
    if scope != "row":
        raise FistaPrunerError(f"scope {scope!r} is not known: 'operator' or 'row'")
    mask = torch.zeros_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)
    base, extra = divmod(zeros, rows)
    for block in row_blocks(rows):
        order = torch.sort(torch.nan_to_num(scores[block], nan=-math.inf), dim=1, stable=True).indices
        few = min(max(extra - block.start, 0), len(order))  # rows of this block with one zero more
        mask[block].scatter_(1, order[:, base:], True)
        mask[block][:few].scatter_(1, order[:few, base : base + 1], False)
    return mask


def of_rows(sparsity: Sparsity, rows: int, columns: int, start: int, stop: int) -> Sparsity:
    """The pattern of rows ``start`` to ``stop`` alone of a ``rows x columns`` operator whose scores compete in each row.

    Projecting the block with scope ``"row"`` onto it gives these rows of the whole operator's mask.
    """
    if isinstance(sparsity, NM):
        return sparsity
    base, extra = divmod(sparsity.zeros(rows, columns), rows)
    zeros = base * (stop - start) + max(min(stop, extra) - start, 0)
    return Unstructured.of_counts(zeros, (stop - start) * columns)


def satisfies(weight: Tensor, sparsity: Sparsity) -> bool:
    """Whether ``weight`` (rows x columns) really has the pattern: at least the promised zeros, n:m in every group."""
    rows, columns = weight.shape
    if isinstance(sparsity, NM):
        if columns % sparsity.m:
            return False
        kept = (weight.reshape(rows, -1, sparsity.m) != 0).sum(-1)
        return bool((kept <= sparsity.n).all())
    return weight.numel() - int(torch.count_nonzero(weight)) >= sparsity.zeros(rows, columns)

"""Select the largest scores exactly, or fast inside iterations, where a projection need not be exact."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from .linalg import row_blocks

SAMPLE = 1 << 13
"""Values from which the threshold of an operator is estimated."""

BLOCK = 1 << 17
"""Values compared at once on a CPU: they stay in its cache."""


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """Select exactly the ``count`` largest entries of ``scores``: a boolean mask of the same shape.

    The first of tied scores are kept; NaN counts as the smallest.
    """
    flat = scores.flatten()
    total = flat.numel()
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= total:
        return torch.ones_like(scores, dtype=torch.bool)
    # Every entry above the count-th largest value, then the first ties with it, as many as are missing.
    if flat.device.type != "cpu":  # without waiting for the device
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
    """Find the ``count``-th largest of a 1-D tensor on the CPU, 0-dim.

    Selection is slow for millions of values and copies them. A sorted sample brackets the result closely, and only the
    values inside the bracket are searched, unless it lies outside (many ties, a periodic pattern).
    """
    total = flat.numel()
    if total >= 1 << 17:
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
    return torch.topk(flat, count, sorted=False).values.min()


def keep_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Select the ``n`` largest of every ``m`` consecutive scores of each row (rows, columns)."""
    mask = torch.zeros_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)
    # A single group of each row is chosen often and takes little memory: many launches cost a GPU more than that.
    single = scores.shape[1] == m and (scores.device.type != "cpu" or scores.numel() <= 1 << 15)
    for rows in [slice(None)] if single else row_blocks(len(scores)):
        groups = torch.nan_to_num(scores[rows], nan=-math.inf).reshape(-1, m)
        order = torch.sort(groups, dim=-1, descending=True, stable=True).indices
        mask[rows].view(-1, m).scatter_(-1, order[:, :n], True)
    return mask


def spread_stride(total: int, sample: int, period: int) -> int:
    """Return a stride that takes about ``sample`` of ``total`` values, from all places of a period.

    They are fewer than twice as many.

    A stride that shares a factor with the period, such as the columns of an operator, would take some places only.
    """
    stride = max(1, total // sample)
    while math.gcd(stride, period) > 1:
        stride += 1
    return stride


class Threshold(Protocol):
    """What iterations call in place of a projection."""

    def __call__(self, values: Tensor, out: Tensor, *, correct: bool) -> None:
        """Write the kept ``values`` (rows, columns, contiguous) to ``out`` of the same shape, zero elsewhere.

        Args:
            values: columns in strided order (:meth:`~fistapruner.core.constraints.Constraint.threshold`).
            out: the same shape.
            correct: spend more time now on an exact number of kept values in the next calls.
        """


class SampledThreshold:
    """Keep about the right share of an operator's values, with a quantile of a fixed sample as threshold.

    Selecting the k-th largest of all values takes longer than the product of an iteration; of eight thousand values the
    time does not matter. With ``correct``, the bias of the sample is measured on all values and the quantile corrected.

    Args:
        zeros: values that become zero.
        rows, columns: shape of the operator.
    """

    def __init__(self, zeros: int, rows: int, columns: int) -> None:
        self.total = rows * columns
        self.wanted = self.total - zeros
        self.stride = spread_stride(self.total, SAMPLE, columns)
        self.size = (self.total + self.stride - 1) // self.stride
        self.rank: Tensor | None = None

    def __call__(self, values: Tensor, out: Tensor, *, correct: bool) -> None:
        """Write ``values`` (rows, columns, contiguous) to ``out``, zero where they are below the threshold.

        Args:
            values: (rows, columns).
            out: the same shape.
            correct: count all kept values and correct the quantile for the next call.
        """
        sample = values.view(-1)[:: self.stride].abs()
        if self.rank is None:
            zeros = self.size * (self.total - self.wanted) / self.total
            self.rank = torch.full((), zeros, dtype=torch.float32, device=values.device)
        place = self.rank.round().long().clamp(0, self.size - 1)
        # Selection is faster than sorting, but needs the rank on the host, which would stall a GPU; so would indexing.
        bound = (
            sample.kthvalue(int(place) + 1).values if values.device.type == "cpu" else sample.sort().values.take(place)
        )
        hard_threshold(values, bound, out)
        if correct:
            kept = torch.count_nonzero(out != 0)  # of booleans: several times faster
            self.rank = self.rank + (kept - self.wanted) * (self.size / self.total)


class GroupThreshold:
    """Keep the n largest of every m values; of tied values it may keep none, or half of each.

    The m members of group g are ``values[:, i * groups + g]``, i.e. slices, which a comparison network (Batcher's
    odd-even merge sort) sorts without gathering.

    Args:
        n: values kept of every group.
        m: group length.
    """

    def __init__(self, n: int, m: int) -> None:
        self.n, self.m = n, m
        self.network = _odd_even_merge_sort(m)

    def __call__(self, values: Tensor, out: Tensor, *, correct: bool) -> None:
        """Write the n largest ``values`` (rows, columns) of each group to ``out``, zero elsewhere."""
        # On a CPU, in blocks of rows that stay in the cache between comparisons.
        block = max(1, BLOCK // values.shape[1]) if values.device.type == "cpu" else len(values)
        for part, kept in zip(values.split(block), out.split(block), strict=True):
            self._keep(part, kept)

    def _keep(self, values: Tensor, out: Tensor) -> None:
        n, m = self.n, self.m
        size = values.abs()
        slices = list(size.view(len(size), m, -1).unbind(1))
        for low, high in self.network:
            slices[low], slices[high] = (
                torch.maximum(slices[low], slices[high]),
                torch.minimum(slices[low], slices[high]),
            )
        bound = (slices[n - 1] + slices[n]) * 0.5
        shape = (len(values), m, -1)
        # sign(|z| - bound) is 1 above and -1 below: (sign + 1) / 2 is the mask, without a boolean tensor.
        keep = size.view(shape).sub_(bound[:, None]).sign_().add_(1.0).mul_(0.5)
        torch.mul(values.view(shape), keep, out=out.view(shape))


def hard_threshold(values: Tensor, bound: Tensor, out: Tensor) -> None:
    """Write ``values`` to ``out``, zero where their magnitude does not exceed ``bound`` (0-dim tensor).

    On a CPU the host reads the bound and one vectorised pass suffices; on a GPU reading it would stall the queue.
    """
    if values.device.type == "cpu":
        torch.ops.aten.hardshrink.out(values, float(bound), out=out)
    else:
        torch.where(values.abs() > bound, values, torch.zeros((), dtype=values.dtype, device=values.device), out=out)


def _odd_even_merge_sort(m: int) -> list[tuple[int, int]]:
    """List the comparators (i, j), i < j, of Batcher's network: max goes to i, min to j."""
    comparators = []
    p = 1
    while p < m:
        k = p
        while k >= 1:
            for j in range(k % p, m - k, 2 * k):
                comparators += [
                    (i + j, i + j + k) for i in range(min(k, m - j - k)) if (i + j) // (2 * p) == (i + j + k) // (2 * p)
                ]
            k //= 2
        p *= 2
    return comparators

"""Exact selection of the largest scores, overall or in groups; the first of ties, NaN smallest."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .linalg import row_blocks


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

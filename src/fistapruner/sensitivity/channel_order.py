"""Permute input channels, so that an n:m pattern keeps more of the important weights.

An n:m pattern keeps n of every m neighbouring weights of a row, however important the others are. Where the order of an
operator's input channels is free (:mod:`fistapruner.models.coupling`), channels can be ordered so that the important
weights of a row are spread over the groups. The dense model's outputs do not change.

The order is found as in RIA (Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large
Language Models", ICLR): channels are dealt to groups by importance, then one member of every group at a time is
reassigned by a linear sum assignment. Channel permutation for n:m sparsity goes back to Pool & Yu 2021 (NeurIPS).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..core import NM, Constraint
from ..core.thresholds import spread_stride
from ..runtime.devices import available_cores

ROWS = 2048
"""Output rows that the search for an order samples, at most."""

EXCHANGING_GROUPS = 1024
"""Groups that exchange members in one assignment, at most: its cost is cubic in their number."""


def kept_share(scores: Tensor, pattern: Constraint) -> float:
    """Compute the share of the sum of ``scores`` (rows, channels) that a pattern with an n:m in it keeps."""
    assert pattern.nm is not None
    n, m = pattern.nm
    groups = scores.masked_fill(~pattern.project(scores), 0.0).view(len(scores), -1, m)
    kept = groups.topk(n, dim=2).values.sum(dtype=torch.float64)  # sorted: the order inside a group changes no bit
    return float(kept / scores.sum(dtype=torch.float64).clamp_min(1e-300))


def raised_shares(scores: Tensor, reordered: Tensor, pattern: Constraint) -> tuple[float, float] | None:
    """Compute what a pattern keeps of the scores before and after; None where an order does not raise it.

    Args:
        scores: (rows, channels) of an operator, in its own order of rows: they may share inputs.
        reordered: the scores in the new order, or of the rotated channels.
        pattern: of the operator; the order was searched for the n:m in it.
    """
    before, after = kept_share(scores, pattern), kept_share(reordered, pattern)
    return (before, after) if after > before else None


def sample_rows(values: Tensor, rows: int = ROWS) -> Tensor:
    """Select at most ``rows`` rows.

    Rows of operators that share inputs, such as the query heads of a group, take turns: the sample has all of them.
    """
    return values[:: spread_stride(len(values) + rows - 1, rows, len(values))]


def channel_order(scores: Tensor, pattern: NM, *, rows: int = ROWS, groups: int = EXCHANGING_GROUPS) -> Tensor:
    """Find an order of the input channels in which a pattern keeps a large share of the scores.

    Args:
        scores: (rows, channels) non-negative importance of every weight.
        pattern: n:m; m divides the number of channels.
        rows: output rows that the search samples, at most.
        groups: groups that exchange members in one assignment, at most.

    Returns:
        (channels,) int64: new channel i is old channel ``order[i]``. The identity where no better order was found.
    """
    identity = torch.arange(scores.shape[1], device=scores.device)
    if scores.shape[1] == pattern.m:
        return identity
    few = sample_rows(scores, rows)
    # Deal by importance, strongest channels first: of G groups, group g gets ranks g, G + g, 2 G + g, ...
    members = few.sum(0).argsort(descending=True, stable=True).view(pattern.m, -1).T.contiguous()
    count = -(-len(members) // groups)
    with ThreadPoolExecutor(min(count, available_cores())) as pool:
        for place in range(pattern.m):
            # Groups of a chunk lie far apart, so that it holds channels of every rank.
            chunks = [members[first::count] for first in range(count)]
            chosen = [pool.submit(_assign, _gains(few, chunk, place, pattern)) for chunk in chunks]
            for chunk, assigned in zip(chunks, chosen, strict=True):
                chunk[:, place] = chunk[assigned.result(), place]
    order = members.reshape(-1)
    return order if kept_share(scores[:, order], pattern) > kept_share(scores, pattern) else identity


def _gains(scores: Tensor, members: Tensor, place: int, pattern: NM) -> Tensor:
    """Compute what each group keeps with each candidate for ``place``: (groups, candidates).

    It is twice that, up to constants that are the same for every assignment.

    Args:
        scores: (rows, channels).
        members: (groups, m) channels of each group; those at ``place`` are the candidates.
        place: in every group.
        pattern: of the groups.
    """
    others = torch.cat([members[:, :place], members[:, place + 1 :]], 1)
    fixed = scores[:, others.reshape(-1)].view(len(scores), len(others), -1)
    # With the other members fixed, a candidate x adds max(x, b) - b to a row, b being the n-th largest of them.
    bound = fixed.topk(pattern.n, dim=2).values[:, :, -1].T.contiguous()
    candidates = scores[:, members[:, place]].T.contiguous()
    # 2 max(x, b) = x + b + |x - b|, and the sums of x and of b are the same for every assignment.
    return torch.cdist(bound, candidates, p=1.0).cpu()


def _assign(gains: Tensor) -> Tensor:
    """Assign a candidate to every group, so that the groups keep most: (groups,); other threads go on."""
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(gains.numpy(), maximize=True)[1])

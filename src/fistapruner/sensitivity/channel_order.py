"""Channel permutation: which input channels share a group of an n:m pattern.

An n:m pattern keeps n of every m neighbouring weights of a row, however important the others are. Where the order of an
operator's input channels is free (:mod:`fistapruner.models.coupling`), channels can be dealt out so that important weights
of a row meet in one group as seldom as possible. The model computes what it did.

The order is found as in RIA (Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language
Models", ICLR): channels are dealt to groups by importance, then one member of every group at a time is reassigned by the best
matching of members to groups (a linear sum assignment). Channel permutation for n:m sparsity goes back to Pool & Yu 2021
(NeurIPS).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..constraints import NM

ROWS = 2048
"""Output rows that are looked at while the order is searched, at most."""

GROUPS = 1024
"""Groups that exchange members at once, at most: an assignment costs their number to the third."""


def kept_share(scores: Tensor, pattern: NM) -> float:
    """Share of the sum of ``scores`` (rows, channels) that the n largest of every group hold."""
    groups = scores.view(len(scores), -1, pattern.m)
    kept = groups.topk(pattern.n, dim=2).values.sum(dtype=torch.float64)
    return float(kept / scores.sum(dtype=torch.float64).clamp_min(1e-300))


def channel_order(scores: Tensor, pattern: NM) -> Tensor:
    """The order of the input channels in which a pattern keeps much of what matters; the same for the same scores.

    Args:
        scores: (rows, channels) non-negative importance of every weight.
        pattern: n:m, with m dividing the channels.

    Returns:
        (channels,) int64: new channel i is old channel ``order[i]``. The identity where no better order was found.
    """
    identity = torch.arange(scores.shape[1], device=scores.device)
    if scores.shape[1] == pattern.m:
        return identity
    few = scores[:: -(-len(scores) // ROWS)]
    # Dealt by importance, strongest channels first: group g gets ranks g, groups + g, 2 groups + g, ...
    members = few.sum(0).argsort(descending=True, stable=True).view(pattern.m, -1).T.contiguous()
    chunks = -(-len(members) // GROUPS)
    for place in range(pattern.m):
        for first in range(chunks):  # groups of a chunk lie far apart, so that it holds channels of every rank
            chunk = members[first::chunks]
            members[first::chunks, place] = chunk[_assignment(few, chunk, place, pattern), place]
    order = members.reshape(-1)
    return order if kept_share(scores[:, order], pattern) > kept_share(scores, pattern) else identity


def _assignment(scores: Tensor, members: Tensor, place: int, pattern: NM) -> Tensor:
    """For each group (groups, m), whose member at ``place`` to take so that all groups together keep most."""
    from scipy.optimize import linear_sum_assignment

    others = torch.cat([members[:, :place], members[:, place + 1 :]], 1)
    fixed = scores[:, others.reshape(-1)].view(len(scores), len(others), -1)
    # With the other members fixed, a candidate x adds max(x, b) - b to a row, b being the n-th largest of them.
    bound = fixed.topk(pattern.n, dim=2).values[:, :, -1].T.contiguous()
    candidates = scores[:, members[:, place]].T.contiguous()
    # 2 max(x, b) = x + b + |x - b|, and the sums of x and of b are the same for every assignment.
    gains = torch.cdist(bound, candidates, p=1.0)
    _, chosen = linear_sum_assignment(gains.cpu().numpy(), maximize=True)
    return torch.from_numpy(chosen).to(members.device)

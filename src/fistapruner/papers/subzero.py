"""SubZero: forward passes only, in random subspaces (Yu et al., arXiv 2410.08989, algorithm 1).

MeZO (:mod:`fistapruner.papers.mezo`) with another direction. For a matrix (m, n) it is

    z = U Z V^T sqrt(m n) / r,

with Z (r, r) standard normal, and frames U (m, r) and V (n, r) with orthonormal columns, which are drawn anew every
``REFRESH`` steps. The mean of ``|z|^2`` is the number of entries, so MeZO's learning rates carry over. Rank 8 and 2,000
steps are the defaults of the published program. Vectors are drawn as in MeZO.

Differences from the published code (zhengpeng-yu/SubZero):

1. Frames have their own seeds, so a run can be continued in the midst of a subspace.
2. z is masked where a weight is pruned, and then no longer of low rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..runtime.numerics import seeded
from .mezo import Draw, standard_normal

RANK = 8
"""r; at most min(m, n) of a matrix is used."""

REFRESH = 2000
"""Steps after which new frames are drawn."""


def subspace_normal(seed: int) -> Draw:
    """Return SubZero's directions."""
    normal = standard_normal(seed)
    known: dict[str, tuple[int, Tensor, Tensor]] = {}

    def frames(step: int, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        period = (step - 1) // REFRESH
        if name not in known or known[name][0] != period:
            rows, columns = len(weight), weight[0].numel()
            rank, generator = min(RANK, rows, columns), seeded(seed, "frames", period, name)
            # On the CPU, so that only rounding differs between devices.
            drawn = [torch.linalg.qr(torch.randn(size, rank, generator=generator)).Q for size in (rows, columns)]
            known[name] = (period, drawn[0].to(weight.device), drawn[1].to(weight.device))
        return known[name][1:]

    def draw(step: int, name: str, weight: Tensor, start: int, stop: int) -> Tensor:
        if weight.ndim < 2:
            return normal(step, name, weight, start, stop)
        left, right = frames(step, name, weight)
        rank = left.shape[1]
        middle = torch.randn(rank, rank, generator=seeded(seed, "subspace", step, name)).to(weight.device)
        drawn = (left[start:stop] @ middle @ right.T).mul_(math.sqrt(weight.numel()) / rank)
        return drawn.view(stop - start, *weight.shape[1:])

    return draw

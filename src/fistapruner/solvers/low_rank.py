"""Sparse plus low rank: prune an operator beside a low-rank part, a LoRA adapter of the result.

The operator becomes ``S + B A``, S sparse and ``L = B A`` of rank r. Both parts meet in the layer problem:

* S, given L, solves the layer problem whose dense weights are ``W - L``: ``S + L - W = S - (W - L)``.
* L, given S, is a reduced-rank regression (Izenman 1975). f is smallest without a bound on the rank at ``T = C - S``,
  and elsewhere larger by ``tr((L - T) H (L - T)^T)``. With ``H = F F^T`` and U the first r left singular vectors of
  ``T F``, the best L of rank r is ``U (U^T T)``.

Solved only in turn, as OATS (Zhang & Papyan 2024, arXiv 2409.13652) and HASSLE-free (Makni et al. 2025, arXiv
2502.00899) do, each part soon makes up for the other's errors and both stop moving. So the first L comes from a
splitting that moves both at once. With L eliminated, the error of S is

    g(S) = min over U of tr((I - U U^T) (S - C) H (S - C)^T),    L = -U U^T (S - C).

H acts on rows and U on columns, so the proximal map of g is in closed form. With ``Y = (V - C) H (H + rho I)^-1`` and U
the first r left singular vectors of ``(V - C) (H (H + rho I)^-1)^(1/2)``, it takes V to ``V - (I - U U^T) Y``. This is
a term of :mod:`fistapruner.solvers.splitting`; one subspace iteration in each step keeps U up to date. 3BASiL (Makni et
al. 2025, arXiv 2603.01376) also moves both parts at once, by ADMM with three blocks; there L is solved given S, which
takes more steps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core import Constraint, LayerProblem
from ..core.linalg import damped_cholesky, dead_inputs
from .base import Method, Solution, solve
from .proximal import Metric, Proximal, Thresholds
from .splitting import LeastSquares, Resolvent, geometric, natural_order, split

RHO, LEVELS, STEPS = (0.05, 0.5), 11, 6
"""First and last penalty of the splitting, in units of the scaled Gram's diagonal; values of it; steps at each."""

STEP = "low_rank"
"""Name of the last step in the record of an operator that has a low-rank part."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """The low-rank part ``B A`` of an operator.

    Args:
        b: (m, r) fp32.
        a: (r, n) fp32.
    """

    b: Tensor
    a: Tensor

    def product(self) -> Tensor:
        """Compute ``B A``: (m, n) fp32."""
        return self.b @ self.a

    def balanced(self) -> LowRank:
        """Scale columns of B and rows of A to the same norm, for narrow dtypes and for training; B A stays."""
        b, a = self.b.norm(dim=0), self.a.norm(dim=1)
        used = (b > 0) & (a > 0)
        scale = torch.where(used, a / b.where(used, torch.ones_like(b)), torch.ones_like(a)).sqrt()
        return LowRank(self.b * scale, self.a / scale[:, None])


def solve_low_rank(
    problem: LayerProblem, constraint: Constraint, steps: Sequence[Method], rank: int
) -> tuple[Solution, LowRank | None]:
    """Prune an operator to a sparse plus a low-rank part.

    The sparse part alone, as without a low-rank part, and its best low-rank part come first. Then the splitting finds a
    low-rank part, the sparse part is solved beside it, and the best low-rank part beside that. A part that does not
    lower the error is not taken, so the error never rises.

    Args:
        problem: the layer problem.
        constraint: of the sparse part.
        steps: the method chain that solves the sparse part.
        rank: r; at most the smaller side of the operator. With 0, or a constraint without zeros, there is no low-rank
            part.

    Returns:
        The sparse part, whose recorded errors are those of the sum, and the low-rank part.
    """
    if problem.cache is None:
        problem = replace(problem, cache={})
    sparse = solve(problem, constraint, list(steps))
    if not rank or not constraint.zeros(*problem.shape):
        return sparse, None
    begin = time.perf_counter()
    part = _LowRankPart(problem, constraint, rank)
    candidates = [(sparse, part.beside(sparse.weight))]
    both = part.splitting()
    beside = solve(replace(problem, weight=problem.weight - both.product()), constraint, list(steps))
    candidates += [(beside, both), (beside, part.beside(beside.weight))]
    errors = [problem.relative_error(solution.weight + low.product()) for solution, low in candidates]
    first = sparse.stats[0]["relative_error"]
    best = min(range(len(errors)), key=errors.__getitem__)
    (solution, low), error = candidates[best], errors[best]
    if error >= first:
        return sparse, None
    record = {"method": STEP, "seconds": time.perf_counter() - begin, "rank": rank, "relative_error": error}
    stats = {**sparse.stats[0], "relative_error": error}
    stats["steps"] = [*sparse.stats[0]["steps"], {**record, "path": [first, *errors]}]
    return replace(solution, stats=(stats,), warnings=(*sparse.warnings, *part.warnings)), low


class _LowRankPart:
    """Solve the low-rank part of an operator on the regularised Gram, in the metric of the default solver."""

    def __init__(self, problem: LayerProblem, constraint: Constraint, rank: int) -> None:
        self._problem, self._constraint, self._rank = problem, constraint, rank
        self._metric = Metric.of(problem, Proximal())
        self._factor, _, raised = damped_cholesky(self._metric.gram, 0.0, problem.name)
        self.warnings = (*self._metric.warnings, *raised)
        # Inputs that are always zero would take some of the rank.
        self._centre = self._metric.centre.masked_fill(dead_inputs(problem.gram), 0.0)

    def beside(self, sparse: Tensor) -> LowRank:
        """Compute the best low-rank part beside a sparse part (m, n)."""
        wanted = self._centre - sparse.masked_fill(dead_inputs(self._problem.gram), 0.0)
        if wanted.shape[0] <= wanted.shape[1]:
            left = torch.linalg.eigh(wanted @ self._metric.gram @ wanted.T).eigenvectors[:, -self._rank :]
        else:
            scaled = wanted @ self._factor
            right = torch.linalg.eigh(scaled.T @ scaled).eigenvectors[:, -self._rank :]
            left = torch.linalg.qr(scaled @ right).Q
        return LowRank(left.contiguous(), left.T @ wanted)

    def splitting(self) -> LowRank:
        """Find the low-rank part by the splitting that moves both parts at once."""
        metric, length = self._metric, self._constraint.group_length
        target = metric.inside(self._centre, length)
        project = Thresholds(self._constraint, target.shape, LEVELS * STEPS, STEPS)
        term = WithLowRank(target, metric.resolvent(self._problem, length), self._rank)
        z = natural_order(split(term, target, geometric(*RHO, LEVELS, STEPS), project).z, length)
        return self.beside(z * self._constraint.project(z.abs()) / metric.scale)


class WithLowRank(LeastSquares):
    """The least-squares term of S beside the best low-rank part, ``g`` above.

    Args:
        centre: (m, n) C.
        resolvent: of H.
        rank: of the low-rank part.
    """

    def __init__(self, centre: Tensor, resolvent: Resolvent, rank: int) -> None:
        super().__init__(centre, resolvent, fast=True)
        drawn = torch.Generator().manual_seed(0)
        self._basis = torch.randn(len(centre), rank, generator=drawn, dtype=torch.float32, device="cpu").to(centre)

    def penalise(self, rho: float) -> None:
        """Compute ``H (H + rho I)^-1`` (n, n)."""
        self._matrix = self.resolvent(rho).neg_()
        self._matrix.diagonal().add_(1.0)
        self._product.use(self._matrix)

    def advance(self, z: Tensor, kept: Tensor) -> None:
        """Replace Z by ``D - (I - U U^T) (X - C) H (H + rho I)^-1``, X = 2 D - Z, which is ``Z + A - D``."""
        away = torch.sub(kept, z).add_(kept).sub_(self.centre)
        turned = away @ (self._matrix @ (away.T @ self._basis))
        self._basis = torch.linalg.qr(turned).Q
        away.addmm_(self._basis, self._basis.T @ away, alpha=-1.0)  # in fp32: most of it cancels
        torch.sub(kept, self._product(away, self._moved), out=z)

"""Sparse plus low rank: a sparse part by any method and a low-rank part in closed form, in turn.

Every operator becomes ``V = S + B A``, with S sparse, B (m x r) and A (r x n). Both parts lower the same error f of
:mod:`fistapruner.problem`:

* S, given ``L = B A``, solves the layer problem whose dense weights are ``W - L``: ``S + L - W = S - (W - L)``.
* L, given S, is a reduced-rank regression (Izenman 1975). With ``M = W - S``, f is smallest without a bound on the rank
  at ``T = M + a R H^-1``, and elsewhere larger by ``tr((L - T) H (L - T)^T)``. With ``H = C C^T`` and U the first r
  left singular vectors of ``T C``, the best L of rank r is ``U (U^T T)``.

OATS (Zhang & Papyan 2024, arXiv 2409.13652) and HASSLE-free (Makni et al. 2025, arXiv 2502.00899) alternate like this.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..constraints import Constraint
from ..errors import FistaPrunerError
from ..problem import LayerProblem
from .base import Method, Solution, Stats
from .chain import solve
from .conditioning import damped_cholesky, dead_inputs, regularised_gram
from .proximal import Proximal

ALTERNATIONS = 3
"""How often both parts are solved."""

STEP = "low_rank"
"""Name of the last step in the record of an operator that has a low-rank part."""


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class SparsePlusLowRank:
    """Both parts of the operators of a layer problem.

    Args:
        sparse: the sparse part; the errors in its ``stats`` are those of the sum.
        low_rank: the low-rank part of each operator; None where it has none.
    """

    sparse: Solution
    low_rank: tuple[LowRank | None, ...]

    def weight(self, problem: LayerProblem) -> Tensor:
        """Compute the sum of both parts: (m, n) fp32."""
        return self.sparse.weight + _products(problem, self.low_rank)


def solve_low_rank(
    problem: LayerProblem,
    sparsity: Sequence[Constraint],
    steps: Sequence[Method],
    rank: int,
    solver: Callable[[LayerProblem, Sequence[Constraint], Sequence[Method]], Solution] = solve,
    *,
    alternations: int = ALTERNATIONS,
) -> SparsePlusLowRank:
    """Prune the operators of a layer problem to a sparse plus a low-rank part.

    It begins with the sparse part alone, as without a low-rank part. A part that does not lower the error of its
    operator is not taken, so the error never rises. Operators without zeros get no low-rank part.

    Args:
        problem: the layer problem.
        sparsity: the constraint of each operator's sparse part.
        steps: the method chain that solves the sparse part.
        rank: r; at most the smaller side of every operator. 0 returns the sparse part alone.
        solver: solves the sparse parts.
        alternations: how often both parts are solved.

    Raises:
        FistaPrunerError: the rank is negative or larger than an operator has, or what the solver refuses.
    """
    n = problem.shape[1]
    pruned = [pattern.zeros(rows, n) > 0 for pattern, rows in zip(sparsity, problem.rows, strict=True)]
    for name, rows, has in zip(problem.names, problem.rows, pruned, strict=True):
        if has:
            check_rank(rank, rows, n, name)
    sparse = solver(problem, sparsity, steps)
    low_rank: tuple[LowRank | None, ...] = tuple(None for _ in pruned)
    if not rank or not any(pruned):
        return SparsePlusLowRank(sparse, low_rank)
    begin = time.perf_counter()
    step = _LowRankStep(problem, next((step for step in steps if isinstance(step, Proximal)), Proximal()))
    weight, mask, errors = sparse.weight, sparse.mask, problem.errors(sparse.weight)
    paths: list[list[float]] = [[error] for error in problem.relative_errors(sparse.weight)]
    for alternation in range(alternations):
        if alternation:
            residual = replace(problem, weight=problem.weight - _products(problem, low_rank))
            found = solver(residual, sparsity, steps)
            errors, better = _lowest(errors, residual.errors(found.weight))
            if not any(better):
                break
            taken = torch.repeat_interleave(torch.tensor(better), torch.tensor(problem.rows)).to(mask.device)[:, None]
            weight, mask = torch.where(taken, found.weight, weight), torch.where(taken, found.mask, mask)
        candidates = tuple(
            step.best(part, index, rank) if has else None
            for index, (part, has) in enumerate(zip(weight.split(problem.rows), pruned, strict=True))
        )
        errors, better = _lowest(errors, problem.errors(weight + _products(problem, candidates)))
        low_rank = tuple(new if take else old for new, old, take in zip(candidates, low_rank, better, strict=True))
        for path, error in zip(paths, problem.relative_errors(weight + _products(problem, low_rank)), strict=True):
            path.append(error)
    record = {"method": STEP, "seconds": time.perf_counter() - begin, "rank": rank}
    stats = tuple(
        _with_step(stats, {**record, "relative_error": path[-1], "path": path}) if has else stats
        for stats, path, has in zip(sparse.stats, paths, pruned, strict=True)
    )
    return SparsePlusLowRank(Solution(weight, mask, stats, (*sparse.warnings, *step.warnings)), low_rank)


def check_rank(rank: int, rows: int, columns: int, name: str) -> None:
    """Refuse a rank that a (rows, columns) operator has not.

    Raises:
        FistaPrunerError: names the operator and its largest rank.
    """
    most = min(rows, columns)
    if not 0 <= rank <= most:
        raise FistaPrunerError(
            f"{name} is {rows} x {columns}: its low-rank part has a rank from 0 to {most}, not {rank}"
        )


class _LowRankStep:
    """Solve the low-rank part given the sparse one, on the shrunk Gram.

    Args:
        problem: the layer problem.
        settings: how the Gram is shrunk.
    """

    def __init__(self, problem: LayerProblem, settings: Proximal) -> None:
        self._parts = problem.operators()
        self._gram = regularised_gram(problem.gram, problem.tokens, settings.damping, settings.shrinkage)
        self._factor, _, self.warnings = damped_cholesky(self._gram, 0.0, problem.label)
        self._dead = dead_inputs(problem.gram)
        gradient = problem.drift_gradient
        shift = None if gradient is None else torch.cholesky_solve(gradient.T, self._factor).T
        self._shifts = [None] * len(problem.rows) if shift is None else list(shift.split(problem.rows))

    def best(self, sparse: Tensor, index: int, rank: int) -> LowRank:
        """Compute the best low-rank part of operator ``index`` beside its sparse part (m, n)."""
        wanted = self._parts[index].weight - sparse
        if (shift := self._shifts[index]) is not None:
            wanted = wanted + shift
        wanted = wanted.masked_fill(self._dead, 0.0)  # inputs that are always zero would take some of the rank
        if wanted.shape[0] <= wanted.shape[1]:
            left = torch.linalg.eigh(wanted @ self._gram @ wanted.T).eigenvectors[:, -rank:]
        else:
            scaled = wanted @ self._factor
            right = torch.linalg.eigh(scaled.T @ scaled).eigenvectors[:, -rank:]
            left = torch.linalg.qr(scaled @ right).Q
        return LowRank(left.contiguous(), left.T @ wanted)


def _products(problem: LayerProblem, low_rank: Sequence[LowRank | None]) -> Tensor:
    """Stack the low-rank parts of all operators: (m, n)."""
    total = torch.zeros_like(problem.weight)
    for place, part in zip(total.split(problem.rows), low_rank, strict=True):
        if part is not None:
            place.copy_(part.product())
    return total


def _lowest(before: Sequence[float], after: Sequence[float]) -> tuple[list[float], list[bool]]:
    """Return the lower error of each operator, and whether it is the one after."""
    pairs = list(zip(before, after, strict=True))
    return [min(pair) for pair in pairs], [new < old for old, new in pairs]


def _with_step(stats: Stats, record: Stats) -> Stats:
    """Add a step to an operator's record; its error is the operator's."""
    return {**stats, "relative_error": record["relative_error"], "steps": [*stats["steps"], record]}

"""Sparse plus low rank: both parts by one splitting, then each in turn beside the other.

Every operator becomes ``V = S + B A``, with S sparse, B (m x r) and A (r x n). Both parts lower the same error f of
:mod:`fistapruner.problem`:

* S, given ``L = B A``, solves the layer problem whose dense weights are ``W - L``: ``S + L - W = S - (W - L)``.
* L, given S, is a reduced-rank regression (Izenman 1975). With ``M = W - S``, f is smallest without a bound on the rank
  at ``T = M + a R H^-1``, and elsewhere larger by ``tr((L - T) H (L - T)^T)``. With ``H = C C^T`` and U the first r
  left singular vectors of ``T C``, the best L of rank r is ``U (U^T T)``.

Solved only in turn, as OATS (Zhang & Papyan 2024, arXiv 2409.13652) and HASSLE-free (Makni et al. 2025, arXiv
2502.00899) do, each part soon makes up for the other's errors and both stop moving. So the first L comes from a
splitting that moves both at once. With L eliminated, the error of S is

    g(S) = min over U of tr((I - U U^T) (S - T) H (S - T)^T),    T = W + a R H^-1,   L = -U U^T (S - T).

H acts on rows and U on columns, so the proximal map of g is in closed form. With ``Y = (V - T) H (H + rho I)^-1`` and U
the first r left singular vectors of ``(V - T) (H (H + rho I)^-1)^(1/2)``, it takes V to ``V - (I - U U^T) Y``. The
splitting alternates it with projections onto the constraint, as :mod:`fistapruner.solvers.proximal` does and in the
same coordinates; one subspace iteration in each step keeps U up to date. 3BASiL (Makni et al. 2025, arXiv 2603.01376)
also moves both parts at once, by ADMM with three blocks; there L is solved given S, which takes more steps.
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
from ..runtime.numerics import fast_products
from .base import Method, Solution, Stats
from .chain import solve
from .conditioning import damped_cholesky, dead_inputs, shared_gram
from .proximal import Proximal, natural_order, strided_order

ALTERNATIONS = 2
"""How often both parts are solved in turn: first S alone, then S beside the low-rank part of the splitting."""

RHO = (0.05, 0.5)
"""First and last penalty of the splitting, in units of the scaled Gram's diagonal."""

LEVELS = 11
"""Values of the penalty, from first to last."""

STEPS = 6
"""Steps of the splitting at each value of the penalty."""

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


Parts = tuple[LowRank | None, ...]
"""The low-rank part of each operator of a problem; None where it has none."""


@dataclass(frozen=True)
class SparsePlusLowRank:
    """Both parts of the operators of a layer problem.

    Args:
        sparse: the sparse part; the errors in its ``stats`` are those of the sum.
        low_rank: the low-rank part of each operator; None where it has none.
    """

    sparse: Solution
    low_rank: Parts

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

    The sparse part alone, as without a low-rank part, and its best low-rank part come first. Then the splitting finds a
    low-rank part, the sparse part is solved beside it, and the best low-rank part beside that. A part that does not
    lower the error of its operator is not taken, so the error never rises. Operators without zeros get no low-rank
    part.

    Args:
        problem: the layer problem.
        sparsity: the constraint of each operator's sparse part.
        steps: the method chain that solves the sparse part.
        rank: r; at most the smaller side of every operator. 0 returns the sparse part alone.
        solver: solves the sparse parts.
        alternations: how often both parts are solved in turn; 1 leaves out the splitting.

    Raises:
        FistaPrunerError: the rank is negative or larger than an operator has, or what the solver refuses.
    """
    n = problem.shape[1]
    pruned = [pattern.zeros(rows, n) > 0 for pattern, rows in zip(sparsity, problem.rows, strict=True)]
    for name, rows, has in zip(problem.names, problem.rows, pruned, strict=True):
        if has:
            check_rank(rank, rows, n, name)
    if not rank or not any(pruned):
        return SparsePlusLowRank(solver(problem, sparsity, steps), (None,) * len(pruned))
    with shared_gram(problem.gram):
        return _solve_both(problem, sparsity, steps, rank, pruned, solver, alternations)


def _solve_both(
    problem: LayerProblem,
    sparsity: Sequence[Constraint],
    steps: Sequence[Method],
    rank: int,
    pruned: Sequence[bool],
    solver: Callable[[LayerProblem, Sequence[Constraint], Sequence[Method]], Solution],
    alternations: int,
) -> SparsePlusLowRank:
    """Solve both parts of the ``pruned`` operators as :func:`solve_low_rank` says."""
    sparse = solver(problem, sparsity, steps)
    low_rank: Parts = (None,) * len(pruned)
    begin = time.perf_counter()
    step = _LowRankStep(problem, next((step for step in steps if isinstance(step, Proximal)), Proximal()))
    weight, mask, errors = sparse.weight, sparse.mask, problem.errors(sparse.weight)
    paths: list[list[float]] = [[error] for error in problem.relative_errors(sparse.weight)]
    for alternation in range(alternations):
        if alternation:
            beside = step.split(sparsity, rank, pruned) if alternation == 1 else low_rank
            residual = replace(problem, weight=problem.weight - _products(problem, beside))
            found = solver(residual, sparsity, steps)
            errors, better = _lowest(errors, residual.errors(found.weight))
            if not any(better):
                break
            taken = torch.repeat_interleave(torch.tensor(better), torch.tensor(problem.rows)).to(mask.device)[:, None]
            weight, mask = torch.where(taken, found.weight, weight), torch.where(taken, found.mask, mask)
            low_rank = _taken(beside, low_rank, better)
        candidates = step.best(weight, rank, pruned)
        errors, better = _lowest(errors, problem.errors(weight + _products(problem, candidates)))
        low_rank = _taken(candidates, low_rank, better)
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
    """Solve low-rank parts on the shrunk Gram.

    Args:
        problem: the layer problem.
        settings: how the Gram is shrunk, and the metric of the splitting.
    """

    def __init__(self, problem: LayerProblem, settings: Proximal) -> None:
        self._problem, self._settings = problem, settings
        self._gram, self._scale, _ = settings.metric(problem)
        self._factor, _, self.warnings = damped_cholesky(self._gram, 0.0, problem.label)
        self._dead = dead_inputs(problem.gram)
        gradient = problem.drift_gradient
        self._shift = None if gradient is None else torch.cholesky_solve(gradient.T, self._factor).T

    def best(self, sparse: Tensor, rank: int, pruned: Sequence[bool]) -> Parts:
        """Compute the best low-rank part of every pruned operator beside the sparse parts (m, n)."""
        parts = self._wanted(sparse).split(self._problem.rows)
        return tuple(self._regress(part, rank) if has else None for part, has in zip(parts, pruned, strict=True))

    def split(self, sparsity: Sequence[Constraint], rank: int, pruned: Sequence[bool]) -> Parts:
        """Find the low-rank part of every pruned operator by the splitting that moves both parts at once."""
        problem, settings = self._problem, self._settings
        sparse = torch.zeros_like(problem.weight)
        wanted, places = self._wanted(sparse).split(problem.rows), sparse.split(problem.rows)
        # Operators with the same group length iterate together.
        lengths = [pattern.group_length if has else 0 for pattern, has in zip(sparsity, pruned, strict=True)]
        for length in sorted(set(lengths) - {0}):
            chosen = [i for i, its in enumerate(lengths) if its == length]
            target = torch.cat([wanted[i] for i in chosen]).mul_(self._scale)
            patterns, rows = [sparsity[i] for i in chosen], [problem.rows[i] for i in chosen]
            resolvent = settings.resolvent(problem, self._gram, self._scale, length)
            found = _split(target, resolvent, rows, patterns, rank, fast=settings.fast)
            for i, part in zip(chosen, found.split(rows), strict=True):
                torch.mul(part, sparsity[i].project(part.abs()), out=places[i]).div_(self._scale)
        return self.best(sparse, rank, pruned)

    def _wanted(self, sparse: Tensor) -> Tensor:
        """Compute what the low-rank parts would be beside the sparse ones without a bound on the rank: (m, n)."""
        wanted = self._problem.weight - sparse
        if self._shift is not None:
            wanted += self._shift
        return wanted.masked_fill_(self._dead, 0.0)  # inputs that are always zero would take some of the rank

    def _regress(self, wanted: Tensor, rank: int) -> LowRank:
        """Compute the matrix of a rank that is nearest to ``wanted`` (m, n) of an operator, in outputs."""
        if wanted.shape[0] <= wanted.shape[1]:
            left = torch.linalg.eigh(wanted @ self._gram @ wanted.T).eigenvectors[:, -rank:]
        else:
            scaled = wanted @ self._factor
            right = torch.linalg.eigh(scaled.T @ scaled).eigenvectors[:, -rank:]
            left = torch.linalg.qr(scaled @ right).Q
        return LowRank(left.contiguous(), left.T @ wanted)


def _split(
    target: Tensor,
    resolvent: Callable[[float], Tensor],
    rows: Sequence[int],
    sparsity: Sequence[Constraint],
    rank: int,
    *,
    fast: bool,
) -> Tensor:
    """Run the splitting for operators of one group length, in scaled coordinates.

    Args:
        target: (m, n) what both parts together should be, T.
        resolvent: ``rho -> rho (H + rho I)^-1`` (n, n), in the order of :func:`strided_order`.
        rows: outputs of each operator.
        sparsity: constraint of each operator.
        rank: of every low-rank part.
        fast: use low-precision matrix units.

    Returns:
        The last Z (m, n); its projection is the sparse part.
    """
    n, length = target.shape[1], sparsity[0].group_length
    target = target[:, strided_order(n, length, target.device)]
    growth = (RHO[1] / RHO[0]) ** (1 / (LEVELS - 1))
    z, kept, x = target.clone(), torch.empty_like(target), torch.empty_like(target)
    hard = [pattern.threshold(size, n) for pattern, size in zip(sparsity, rows, strict=True)]
    parts = list(zip(hard, *(whole.split(tuple(rows)) for whole in (z, kept, x)), strict=True))
    bases = [torch.randn(size, rank, generator=torch.Generator().manual_seed(0)).to(target) for size in rows]
    for level in range(LEVELS):
        matrix = resolvent(RHO[0] * growth**level).neg_()
        matrix.diagonal().add_(1.0)  # H (H + rho I)^-1
        for step in range(STEPS):
            for threshold, whole, sparse, _ in parts:
                threshold(whole, sparse, correct=step == 0 and level % 3 == 0)
            if level and step == 0:
                # The dual Z - D is in units of rho; as rho grew, it shrinks.
                torch.lerp(kept, z, 1.0 / growth, out=z)
            torch.sub(kept, z, out=x).add_(kept).sub_(target)
            for i, (_, _, _, away) in enumerate(parts):
                with fast_products(fast):
                    turned = away @ (matrix @ (away.T @ bases[i]))
                bases[i] = torch.linalg.qr(turned).Q
                away.addmm_(bases[i], bases[i].T @ away, alpha=-1.0)  # in fp32: most of it cancels
            with fast_products(fast):
                torch.mm(x, matrix, out=z)
            torch.sub(kept, z, out=z)
    return natural_order(z, length)


def _products(problem: LayerProblem, low_rank: Sequence[LowRank | None]) -> Tensor:
    """Stack the low-rank parts of all operators: (m, n)."""
    total = torch.zeros_like(problem.weight)
    for place, part in zip(total.split(problem.rows), low_rank, strict=True):
        if part is not None:
            place.copy_(part.product())
    return total


def _taken(new: Parts, old: Parts, better: Sequence[bool]) -> Parts:
    """Take the new low-rank part of an operator where it is better."""
    return tuple(a if take else b for a, b, take in zip(new, old, better, strict=True))


def _lowest(before: Sequence[float], after: Sequence[float]) -> tuple[list[float], list[bool]]:
    """Return the lower error of each operator, and whether it is the one after."""
    pairs = list(zip(before, after, strict=True))
    return [min(pair) for pair in pairs], [new < old for old, new in pairs]


def _with_step(stats: Stats, record: Stats) -> Stats:
    """Add a step to an operator's record; its error is the operator's."""
    return {**stats, "relative_error": record["relative_error"], "steps": [*stats["steps"], record]}

"""Proximal splitting with hard thresholds in the metric of optimal brain surgeon: the default solver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from ..constraints import Constraint
from ..problem import LayerProblem
from ..runtime.numerics import fast_products, has_bf16_units
from .base import SUPPORT_CHANGE, Method, Positive, Solution, Stats, Trace, project_operators
from .conditioning import damped_cholesky, inverse_from_cholesky, invert_lower, once, regularised_gram
from .refit import refit_cg

WATCHED = 4
"""Changes of the support are counted on every 4th row."""


class Proximal(Method):
    """Douglas-Rachford splitting of ``f(V)/2`` and the constraint with a growing penalty, then a refit.

    Coordinates are scaled by ``s_j^2 = 1 / [(H + mu diag H)^-1]_jj`` (less the mu), the error of removing input j after
    all others have compensated, so that hard thresholding ranks weights as optimal brain surgeon does, not by magnitude
    or input norm alone. In these coordinates an iteration is two proximal maps and one product,

        D = P(Z);   A = prox_{f / rho}(2 D - Z);   Z = Z + A - D,

    with P the projection onto the constraint. Written around the dense weights it becomes, with
    ``M = rho (H + rho I)^-1 - I/2`` and ``W' = W + 2 a R (H + rho I)^-1``,

        Z = (Z + W') / 2 + (2 D - Z - W) M,

    one product and four passes over the weights. The product runs on low-precision matrix units. Thresholds inside the
    iterations may be inexact (:meth:`~fistapruner.constraints.base.Constraint.threshold`); the last projection is
    exact. rho grows geometrically: a small rho lets the support change, a large one fixes it. Then conjugate gradients
    refit the weights, from a residual in fp32. If a start is given, an operator whose error would not fall keeps its
    start.
    """

    name: ClassVar[str] = "proximal"
    auto_keeps_paper_settings: ClassVar[bool] = False
    dense_target: ClassVar[float] = 0.5
    trace: ClassVar[Trace | None] = SUPPORT_CHANGE

    rho: tuple[Positive, Positive] = Field(
        (0.15, 1.0), description="First and last penalty, in units of the scaled Gram's diagonal."
    )
    levels: int = Field(11, ge=2, description="Number of values of rho, from first to last.")
    steps: int = Field(3, ge=1, description="Iterations at each value.")
    damping: float = Field(
        0.001,
        ge=0.0,
        description="Ridge towards the dense weights, as a share of the mean of the Gram's diagonal, for "
        "numerical stability.",
    )
    shrinkage: float = Field(
        3.0,
        ge=0.0,
        description="Additional ridge for the sampling error of the Gram: this times inputs / tokens (the "
        "order of the error of a covariance of n variables from p samples) times the geometric "
        "mean of the diagonal (which does not depend on a few massive inputs); the factor is at "
        "most 0.3. 0 gives a lower error on the calibration tokens and a higher one on other text "
        "(docs/quality.md). Has no effect if the number of tokens is unknown.",
    )
    metric_damping: float = Field(
        0.1, gt=0.0, description="mu, damping of the metric, as a share of each diagonal element of H."
    )
    refit: int = Field(4, ge=0, description="Conjugate gradient steps at the end, in two halves.")
    fast: bool = Field(True, description="Use low-precision matrix units inside the iterations.")

    @field_validator("rho")
    @classmethod
    def _growing(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError(f"{list(value)} falls, expected the first penalty and a last one that is not below it")
        return value

    def solve(self, problem: LayerProblem, sparsity: Sequence[Constraint], start: Solution | None = None) -> Solution:
        gram, scale, warnings = self.metric(problem)
        mask = torch.empty_like(problem.weight, dtype=torch.bool)
        weight = torch.empty_like(problem.weight)
        # Operators with the same group length iterate together.
        layouts = sorted({pattern.group_length for pattern in sparsity})
        starts = problem.starts
        paths: list[list[Stats]] = [[] for _ in sparsity]
        for length in layouts:
            chosen = [i for i, pattern in enumerate(sparsity) if pattern.group_length == length]
            rows = torch.cat([torch.arange(starts[i], starts[i] + problem.rows[i]) for i in chosen])
            whole = len(chosen) == len(sparsity)
            dense = (problem.weight if whole else problem.weight[rows]) * scale
            drift_gradient = problem.drift_gradient
            if drift_gradient is not None:
                drift_gradient = (drift_gradient if whole else drift_gradient[rows]) / scale
            sizes, patterns = [problem.rows[i] for i in chosen], [sparsity[i] for i in chosen]
            resolvent = self.resolvent(problem, gram, scale, length)
            found, changes = self._split(dense, drift_gradient, resolvent, sizes, patterns, length)
            for i, path in zip(chosen, changes, strict=True):
                paths[i] = path
            kept = project_operators(found.abs(), sizes, patterns)
            found = found * kept / scale
            if whole:
                mask, weight = kept, found
            else:
                mask[rows], weight[rows] = kept, found
        half = self.refit // 2
        for count in (self.refit - half, half):
            if count:
                weight = refit_cg(problem, gram, weight, mask, count, fast=self.fast)
        products = self.levels * self.steps + self.refit
        record: Stats = {"iterations": self.levels * self.steps, "products": products, "rho": list(self.rho)}
        solution = Solution(weight, mask, tuple({**record, "path": path} for path in paths), tuple(warnings))
        return solution if start is None else keep_better(problem, solution, start)

    def metric(self, problem: LayerProblem) -> tuple[Tensor, Tensor, list[str]]:
        """Compute the regularised Gram (n, n), the scale of its inputs (n,), and warnings."""

        def compute() -> tuple[Tensor, Tensor, list[str]]:
            gram = regularised_gram(problem.gram, problem.tokens, self.damping, self.shrinkage)
            return gram, *obs_scale(gram, self.metric_damping, problem.label)

        # Not kept with a warning, which names the operator.
        return once(problem.gram, ("metric", self._of_metric(problem)), compute, lambda found: not found[2])

    def resolvent(self, problem: LayerProblem, gram: Tensor, scale: Tensor, length: int) -> Callable[[float], Tensor]:
        """Make the :func:`resolvents` of the scaled Gram, in the order of :func:`strided_order`.

        Args:
            problem: the layer problem.
            gram: (n, n) of :meth:`metric`.
            scale: (n,) of :meth:`metric`.
            length: group length of the constraint.
        """

        def compute() -> Callable[[float], Tensor]:
            scaled = gram / scale / scale[:, None]
            if length > 1:
                order = strided_order(len(gram), length, gram.device)
                scaled = scaled[order][:, order]
            return resolvents(scaled, self.fast)

        return once(problem.gram, ("resolvents", self._of_metric(problem), self.fast, length), compute)

    def _of_metric(self, problem: LayerProblem) -> tuple[object, ...]:
        """What the metric depends on beside the Gram."""
        return problem.tokens, self.damping, self.shrinkage, self.metric_damping

    def _split(
        self,
        dense: Tensor,
        drift_gradient: Tensor | None,
        resolvent: Callable[[float], Tensor],
        rows: Sequence[int],
        sparsity: Sequence[Constraint],
        length: int,
    ) -> tuple[Tensor, list[list[Stats]]]:
        """Iterate operators of one group length in scaled coordinates.

        Returns:
            The last Z (m, n), and for each operator the share of its support that changed at every level after the
            first, with the level's rho; counted on some of its rows.
        """
        n = dense.shape[1]
        if length > 1:
            order = strided_order(n, length, dense.device)
            dense = dense[:, order]
            drift_gradient = None if drift_gradient is None else drift_gradient[:, order]
        threshold = [pattern.threshold(size, n) for pattern, size in zip(sparsity, rows, strict=True)]
        growth = (self.rho[1] / self.rho[0]) ** (1 / (self.levels - 1))
        z = dense.clone()
        sparse, shifted = torch.empty_like(z), torch.empty_like(z)
        # With the factors stored in bf16 no product converts them, which saves most time on large Grams.
        half = self.fast and has_bf16_units(z.device)
        factor, product = (torch.empty_like(z, dtype=torch.bfloat16) for _ in range(2)) if half else (z, z)
        drift_gradient = drift_gradient.bfloat16() if half and drift_gradient is not None else drift_gradient
        centre = dense if drift_gradient is None else torch.empty_like(z)
        parts = list(zip(threshold, z.split(tuple(rows)), sparse.split(tuple(rows)), strict=True))
        supports = [torch.empty_like(kept[::WATCHED], dtype=torch.bool) for _, _, kept in parts]
        rhos = [self.rho[0] * growth**level for level in range(self.levels)]
        changes: list[list[Tensor]] = [
            [] for _ in rows
        ]  # read at the end, so that a GPU's queue does not wait for the host
        with fast_products(self.fast):
            for level, rho in enumerate(rhos):
                matrix = resolvent(rho)  # rho (H + rho I)^-1
                if drift_gradient is not None and half:
                    shifted.copy_(torch.mm(drift_gradient, matrix.bfloat16(), out=product))
                    torch.add(dense, shifted, alpha=2.0 / rho, out=centre)
                elif drift_gradient is not None:
                    torch.addmm(dense, drift_gradient, matrix, alpha=2.0 / rho, out=centre)
                matrix.neg_().diagonal().add_(0.5)
                matrix = matrix.bfloat16() if half else matrix
                for step in range(self.steps):
                    for hard, whole, kept in parts:
                        hard(whole, kept, correct=step == 0 and level % 3 == 0)
                    if step == self.steps - 1:
                        for (_, _, kept), before, shares in zip(parts, supports, changes, strict=True):
                            now = kept[::WATCHED] != 0
                            if level:  # half of the differences are new entries, half are dropped ones
                                shares.append(
                                    torch.count_nonzero(now ^ before) / (2 * torch.count_nonzero(now)).clamp_min(1)
                                )
                            before.copy_(now)
                    if level and step == 0:
                        # The dual U = Z - D is in units of rho; as rho grew, it shrinks.
                        torch.lerp(sparse, z, 1.0 / growth, out=z)
                    torch.add(z, dense, out=shifted).add_(sparse, alpha=-2.0)
                    z.lerp_(centre, 0.5)
                    if half:
                        # Through a free buffer: adding bf16 to fp32 would allocate memory for the conversion.
                        z.add_(shifted.copy_(torch.mm(factor.copy_(shifted), matrix, out=product)))
                    else:
                        z.addmm_(shifted, matrix)
        path = [
            [
                {"rho": rho, "support_change": share}
                for rho, share in zip(rhos[1:], torch.stack(shares).tolist(), strict=True)
            ]
            for shares in changes
        ]
        return natural_order(z, length), path


def strided_order(n: int, length: int, device: torch.device) -> Tensor:
    """Order n inputs by their place in their group, so that comparisons run over contiguous slices."""
    return torch.arange(n, device=device).view(-1, length).T.reshape(-1)


def natural_order(z: Tensor, length: int) -> Tensor:
    """Order the columns of z (m, n), which are in :func:`strided_order`, as the inputs are."""
    return z.view(len(z), length, -1).transpose(1, 2).reshape(z.shape) if length > 1 else z


def keep_better(problem: LayerProblem, solution: Solution, start: Solution) -> Solution:
    """Take ``solution``, but ``start`` for operators where that has the lower error."""
    before, after = problem.errors(start.weight), problem.errors(solution.weight)
    better = torch.tensor([a <= b for a, b in zip(after, before, strict=True)], device=solution.weight.device)
    rows = torch.tensor(problem.rows, device=solution.weight.device)
    chosen = torch.repeat_interleave(better, rows, output_size=problem.shape[0])[:, None]
    weight, mask = torch.where(chosen, solution.weight, start.weight), torch.where(chosen, solution.mask, start.mask)
    kept = (not found for found in better.tolist())
    stats = tuple({**record, "start_kept": each} for record, each in zip(solution.stats, kept, strict=True))
    return replace(solution, weight=weight, mask=mask, stats=stats)


def obs_scale(gram: Tensor, damping: float, label: str) -> tuple[Tensor, list[str]]:
    """Scale inputs by the square root of their Schur complements in the Gram: (n,).

    The geometric mean of the scales is that of the diagonal's square roots.

    Args:
        gram: (n, n) positive definite.
        damping: added to the unit diagonal of the Jacobi-scaled Gram, so that near-collinear inputs keep some weight.
        label: names of the operators, for a warning.
    """
    norm = gram.diagonal().sqrt()
    factor, used, warnings = damped_cholesky(gram / norm / norm[:, None], damping, label)
    if gram.device.type == "cpu":
        inverse = torch.cholesky_inverse(factor).diagonal()
    else:
        invert_lower(factor)
        inverse = factor.square_().sum(0)
    schur = inverse.reciprocal() - used
    left = schur.clamp(1e-3, 1.0).sqrt()
    return norm * left / left.log().mean().exp(), warnings


def resolvents(gram: Tensor, fast: bool) -> Callable[[float], Tensor]:
    """Make the function ``rho -> rho (H + rho I)^-1`` (n, n).

    On a CPU it uses one eigendecomposition, which costs as much as about ten Cholesky factorisations. On a GPU it
    factors the matrix for each rho, since an eigendecomposition does not run on matrix units there, and inverts it in
    the factor's memory. All eigenvalues of the result are in (0, 1], so that low-precision products are accurate
    enough.
    """
    if gram.device.type != "cpu":

        def factored(rho: float) -> Tensor:
            shifted = gram.clone()
            shifted.diagonal().add_(rho)
            factor = torch.linalg.cholesky_ex(shifted)[0]
            del shifted
            return inverse_from_cholesky(factor).mul_(rho)

        return factored
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0.0)

    half = fast and has_bf16_units(gram.device)

    def resolvent(rho: float) -> Tensor:
        root = vectors * (rho / (values + rho)).sqrt()
        root = root.bfloat16() if half else root
        product: Tensor = root @ root.T
        return product.float()

    return resolvent

"""Proximal splitting with hard thresholds, in the metric of optimal brain surgeon: the default solver."""

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
from .conditioning import alive_gram, damped_cholesky
from .refit import refit_cg

WATCHED = 4
"""One row of so many is watched for what an iteration changes."""


class Proximal(Method):
    """Douglas-Rachford splitting of ``f(V)/2`` and the exact pattern, its penalty growing, then a refit on the support.

    Coordinates are scaled by ``s_j^2 = 1 / [(H + mu diag H)^-1]_jj`` (less the mu), the error that removing input j leaves
    once all others make up for it, so that hard thresholding ranks weights as optimal brain surgeon does, not by
    magnitude or by input norm alone. In these coordinates one iteration is two proximal maps and one product,

        D = P(Z);   A = prox_{f / rho}(2 D - Z);   Z = Z + A - D,

    with P the projection onto the pattern. Written around the dense weights it becomes, with ``M = rho (H + rho I)^-1 - I/2``
    and ``W' = W + 2 a R (H + rho I)^-1``,

        Z = (Z + W') / 2 + (2 D - Z - W) M,

    one product and four passes over the weights. The product runs on the low-precision matrix units. Thresholds inside the
    iterations come from a sample (the whole operator) or a comparison network (n:m); the last one is exact. rho grows
    geometrically: small values let the support wander, large ones freeze it. Weights are then refitted by conjugate
    gradients, the residual computed in fp32. With a start given, an operator whose error would not fall keeps its start.

    Args:
        rho: first and last penalty, in units of the scaled Gram's diagonal.
        levels: values of rho between them.
        steps: iterations at each.
        damping: ridge towards the dense weights, as a share of the mean of the Gram's diagonal, for the numerics.
        shrinkage: more of it for what the calibration tokens leave uncertain: inputs / tokens, the order by which a covariance
            of n variables seen p times is wrong, times this, times the geometric mean of the diagonal (which a few massive
            inputs do not decide). At most 0.3 of it. 0 gives a lower error on the calibration tokens and a higher one on other
            text (docs/quality.md). Does nothing where the problem does not say how many tokens there were.
        metric_damping: mu.
        refit: conjugate gradient steps at the end, in two halves.
        fast: low-precision matrix units inside the iterations.
    """

    name: ClassVar[str] = "proximal"
    summary: ClassVar[str] = "proximal splitting with hard thresholds in the OBS metric, then refit (default)"
    reference: ClassVar[str] = "this project; splitting: Lions & Mercier 1979; growing penalty: ALPS, arXiv 2406.07831"
    auto_keeps_paper_settings: ClassVar[bool] = False
    target: ClassVar[float] = 0.5
    trace: ClassVar[Trace | None] = SUPPORT_CHANGE

    rho: tuple[Positive, Positive] = (0.15, 1.0)
    levels: int = Field(11, ge=2)
    steps: int = Field(3, ge=1)
    damping: float = Field(0.001, ge=0.0)
    shrinkage: float = Field(3.0, ge=0.0)
    metric_damping: float = Field(0.1, gt=0.0)
    refit: int = Field(4, ge=0)
    fast: bool = True

    @field_validator("rho")
    @classmethod
    def _growing(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError(f"{list(value)} falls, expected the first penalty and a last one that is not below it")
        return value

    def solve(self, problem: LayerProblem, sparsity: Sequence[Constraint], start: Solution | None = None) -> Solution:
        gram = alive_gram(problem.gram)
        uncertain = 0.0 if problem.tokens is None else min(0.3, self.shrinkage * len(gram) / problem.tokens)
        mean = gram.diagonal().mean()
        gram.diagonal().add_(mean * (self.damping + uncertain * (gram.diagonal() / mean).log().mean().exp()))
        scale, warnings = obs_scale(gram, self.metric_damping, problem.label)
        mask = torch.empty_like(problem.weight, dtype=torch.bool)
        weight = torch.empty_like(problem.weight)
        # Operators of one layout (unstructured, or one group length) iterate together.
        layouts = sorted({pattern.group_length for pattern in sparsity})
        starts = [sum(problem.rows[:i]) for i in range(len(problem.rows))]
        paths: list[list[Stats]] = [[] for _ in sparsity]
        for length in layouts:
            chosen = [i for i, pattern in enumerate(sparsity) if pattern.group_length == length]
            rows = torch.cat([torch.arange(starts[i], starts[i] + problem.rows[i]) for i in chosen]).to(weight.device)
            whole = len(chosen) == len(sparsity)
            dense = (problem.weight if whole else problem.weight[rows]) * scale
            drift_gradient = problem.drift_gradient
            if drift_gradient is not None:
                drift_gradient = (drift_gradient if whole else drift_gradient[rows]) / scale
            sizes, patterns = [problem.rows[i] for i in chosen], [sparsity[i] for i in chosen]
            found, changes = self._split(dense, drift_gradient, gram / scale / scale[:, None], sizes, patterns, length)
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

    def _split(
        self, dense: Tensor, drift_gradient: Tensor | None, gram: Tensor, rows: Sequence[int], sparsity: Sequence[Constraint], length: int
    ) -> tuple[Tensor, list[list[Stats]]]:
        """The last Z of operators of one layout, in scaled coordinates (m, n).

        And for each operator, what share of its support every level after the first changed, with the level's rho; from some of its
        rows.
        """
        n = gram.shape[0]
        if length > 1:  # members of a group n/m columns apart: comparisons then run over contiguous slices
            order = torch.arange(n, device=gram.device).view(-1, length).T.reshape(-1)
            dense, gram = dense[:, order], gram[order][:, order]
            drift_gradient = None if drift_gradient is None else drift_gradient[:, order]
        threshold = [pattern.threshold(size, n) for pattern, size in zip(sparsity, rows, strict=True)]
        resolvent = resolvents(gram, self.fast)
        growth = (self.rho[1] / self.rho[0]) ** (1 / (self.levels - 1))
        z = dense.clone()
        sparse, shifted = torch.empty_like(z), torch.empty_like(z)
        # With the factors held in bf16 nothing is converted inside a product, which large Grams feel most.
        half = self.fast and has_bf16_units(z.device)
        factor, product = (torch.empty_like(z, dtype=torch.bfloat16) for _ in range(2)) if half else (z, z)
        drift_gradient = drift_gradient.bfloat16() if half and drift_gradient is not None else drift_gradient
        centre = dense if drift_gradient is None else torch.empty_like(z)
        parts = list(zip(threshold, z.split(tuple(rows)), sparse.split(tuple(rows)), strict=True))
        supports = [torch.empty_like(kept[::WATCHED], dtype=torch.bool) for _, _, kept in parts]
        rhos = [self.rho[0] * growth**level for level in range(self.levels)]
        changes: list[list[Tensor]] = [[] for _ in rows]  # read at the end: a GPU's queue is not to wait for the host
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
                            if level:  # half of the differences are entries that came, half those that went
                                shares.append(torch.count_nonzero(now ^ before) / (2 * torch.count_nonzero(now)).clamp_min(1))
                            before.copy_(now)
                    if level and step == 0:
                        # The dual U = Z - D is in units of rho: rho grew, so it shrinks.
                        torch.lerp(sparse, z, 1.0 / growth, out=z)
                    torch.add(z, dense, out=shifted).add_(sparse, alpha=-2.0)
                    z.lerp_(centre, 0.5)
                    if half:
                        # Through a buffer that is free: adding bf16 to fp32 would take fresh memory for the conversion.
                        z.add_(shifted.copy_(torch.mm(factor.copy_(shifted), matrix, out=product)))
                    else:
                        z.addmm_(shifted, matrix)
        if length > 1:
            z = z.view(len(z), length, -1).transpose(1, 2).reshape(z.shape)
        path = [
            [{"rho": rho, "support_change": share} for rho, share in zip(rhos[1:], torch.stack(shares).tolist(), strict=True)]
            for shares in changes
        ]
        return z, path


def keep_better(problem: LayerProblem, solution: Solution, start: Solution) -> Solution:
    """``solution``, but the operators of ``start`` where those have the lower error."""
    before, after = problem.errors(start.weight), problem.errors(solution.weight)
    better = torch.tensor([a <= b for a, b in zip(after, before, strict=True)], device=solution.weight.device)
    rows = torch.tensor(problem.rows, device=solution.weight.device)
    chosen = torch.repeat_interleave(better, rows, output_size=problem.shape[0])[:, None]
    weight, mask = torch.where(chosen, solution.weight, start.weight), torch.where(chosen, solution.mask, start.mask)
    return replace(solution, weight=weight, mask=mask)


def obs_scale(gram: Tensor, damping: float, label: str) -> tuple[Tensor, list[str]]:
    """(n,) scale of each input: the square root of its Schur complement in the Gram, geometric mean as in its diagonal.

    Args:
        gram: (n, n) positive definite.
        damping: added to the unit diagonal of the Jacobi-scaled Gram, so that near-collinear inputs keep a weight.
        label: operators, for a warning.
    """
    norm = gram.diagonal().sqrt()
    factor, used, warnings = damped_cholesky(gram / norm / norm[:, None], damping, label)
    schur = torch.cholesky_inverse(factor).diagonal().reciprocal() - used
    left = schur.clamp(1e-3, 1.0).sqrt()
    return norm * left / left.log().mean().exp(), warnings


def resolvents(gram: Tensor, fast: bool) -> Callable[[float], Tensor]:
    """``rho -> rho (H + rho I)^-1`` (n, n): one eigendecomposition on a CPU, a Cholesky factorisation for each rho on a GPU.

    An eigendecomposition costs as much as about ten factorisations on a CPU and far more on a GPU, where it does not run on
    matrix units. All eigenvalues of the result are in (0, 1], so that low-precision products may form it.
    """
    if gram.device.type != "cpu":
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return lambda rho: torch.cholesky_inverse(torch.linalg.cholesky_ex(gram + rho * identity)[0]) * rho
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0.0)

    half = fast and has_bf16_units(gram.device)

    def resolvent(rho: float) -> Tensor:
        root = vectors * (rho / (values + rho)).sqrt()
        root = root.bfloat16() if half else root
        product: Tensor = root @ root.T
        return product.float()

    return resolvent

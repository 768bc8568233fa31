"""Proximal splitting with hard thresholds in the metric of optimal brain surgeon: the default solver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core import Constraint, LayerProblem, Ridge
from ..core.linalg import damped_cholesky
from .base import Method, Solution, Stats, setting
from .refit import refit_cg
from .splitting import LeastSquares, Resolvent, geometric, natural_order, resolvents, scaled, split, strided_order

WATCHED = 4
"""Changes of the support are counted on every 4th row."""

METRIC_DAMPING = 0.1
"""mu, added to the unit diagonal of the scaled Gram, so that near-collinear inputs keep some weight in the metric."""

REFIT = 2, 2
"""Conjugate gradient steps at the end: each number of them starts from a residual in fp32."""


@dataclass(frozen=True)
class Proximal(Method):
    """Split with a growing penalty in the metric of optimal brain surgeon, then refit.

    Coordinates are scaled by ``s_j^2 = 1 / [(H + mu diag H)^-1]_jj`` (less the mu), the error of removing input j after
    all others have compensated, so that hard thresholding ranks weights as optimal brain surgeon does, not by magnitude
    or input norm alone. The product of an iteration runs on low-precision matrix units, and thresholds inside the
    iterations may be inexact; the last projection is exact. rho grows geometrically: a small rho lets the support
    change, a large one fixes it. Then conjugate gradients refit the weights. If a start is given, it stays where the
    error would not fall.

    Args:
        rho: first and last penalty, in units of the scaled Gram's diagonal.
        levels: values of rho, geometric from first to last; ``steps``: iterations at each.
        damping: ridge for numerical stability, as a share of the mean of the Gram's diagonal.
        shrinkage: additional ridge for the sampling error of the Gram: this times inputs / tokens, at most 0.3, times
            the geometric mean of the diagonal. 0 gives a lower error on the calibration tokens and a higher one on
            other text. Has no effect if the number of tokens is unknown.
    """

    name: ClassVar[str] = "proximal"

    rho: tuple[float, float] = 0.15, 1.0
    levels: int = setting(
        11,
        "Values of the penalty, each for three steps. 5 solve in a third of the time; without the dense model beside "
        "the pruned one they lose nothing (recipe fast).",
        least=2,
    )
    steps: int = 3
    damping: float = 0.001
    shrinkage: float = 3.0

    def solve(self, problem: LayerProblem, constraint: Constraint, start: Solution | None = None) -> Solution:
        metric = Metric.of(problem, self)
        centre, gram = metric.centre, metric.gram
        length = constraint.group_length
        dense = metric.inside(centre, length)
        project = Thresholds(constraint, dense.shape, self.levels * self.steps, self.steps)
        schedule = geometric(*self.rho, self.levels, self.steps)
        term = LeastSquares(dense, metric.resolvent(problem, length), fast=True)
        found = natural_order(split(term, dense, schedule, project).z, length)
        mask = constraint.project(found.abs())
        weight = found.mul_(mask).div_(metric.scale)
        for steps in REFIT:
            weight = refit_cg(centre, gram, weight, mask, steps, fast=True)
        growth = (self.rho[1] / self.rho[0]) ** (1.0 / (self.levels - 1))
        path = [
            {"rho": self.rho[0] * growth**level, "support_change": share}
            for level, share in enumerate(project.changes(), 1)
        ]
        record: Stats = {"iterations": self.levels * self.steps, "rho": list(self.rho), "path": path}
        if start is not None:
            record["start_kept"] = kept = problem.error(weight) >= problem.error(start.weight)
            weight, mask = (start.weight, start.mask) if kept else (weight, mask)
        return Solution(weight, mask, (record,), metric.warnings)


@dataclass(frozen=True)
class Metric:
    """The regularised problem and the coordinates in which hard thresholds rank weights.

    Args:
        centre: (m, n) least-squares weights C.
        gram: (n, n) regularised Gram.
        scale: (n,) by which inputs' weights are multiplied.
        key: of what depends on the Gram and these settings alone.
        warnings: of the ridges.
    """

    centre: Tensor
    gram: Tensor
    scale: Tensor
    key: tuple[object, ...]
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, problem: LayerProblem, settings: Proximal) -> Metric:
        """Regularise a problem and compute the metric."""
        ridge = Ridge(mean=settings.damping, sampling=settings.shrinkage)
        centre, gram, warnings = problem.regularised(ridge)
        scale, raised = problem.cached((ridge, "scale"), lambda: obs_scale(gram, problem.name))
        return cls(centre, gram, scale, (ridge, "resolvents"), (*warnings, *raised))

    def inside(self, weight: Tensor, length: int) -> Tensor:
        """Scale weights (m, n), and order their columns for groups of a length."""
        weight = weight * self.scale
        return weight if length == 1 else weight[:, strided_order(weight.shape[1], length, weight.device)]

    def resolvent(self, problem: LayerProblem, length: int) -> Resolvent:
        """Make the resolvents of the scaled Gram, in the order for groups of a length."""

        def compute() -> Resolvent:
            gram = scaled(self.gram, self.scale)
            if length > 1:
                order = strided_order(len(gram), length, gram.device)
                gram = gram[order][:, order]
            return resolvents(gram)

        return problem.cached((*self.key, length), compute)


class Thresholds:
    """Project by a fast threshold, corrected at every third level, and watch how the support changes."""

    def __init__(self, constraint: Constraint, shape: torch.Size, iterations: int, steps: int) -> None:
        self.threshold = constraint.threshold(*shape)
        self.steps, self.iterations, self.calls = steps, iterations, 0
        self.support: Tensor | None = None
        self.shares: list[Tensor] = []  # read at the end, so that a GPU's queue does not wait for the host

    def __call__(self, z: Tensor, kept: Tensor) -> None:
        if self.calls == self.iterations:
            return  # the last projection is exact, and the caller's
        self.threshold(z, kept, correct=self.calls % (3 * self.steps) == 0)
        self.calls += 1
        if self.calls % self.steps == 0:
            now = kept[::WATCHED] != 0
            if self.support is not None:  # half of the differences are new entries, half are dropped ones
                count = (2 * torch.count_nonzero(now)).clamp_min(1)
                self.shares.append(torch.count_nonzero(now ^ self.support) / count)
            self.support = now

    def changes(self) -> list[float]:
        """Return the share of the support that changed at every level after the first."""
        return torch.stack(self.shares).tolist() if self.shares else []


def obs_scale(gram: Tensor, name: str) -> tuple[Tensor, tuple[str, ...]]:
    """Scale inputs by the square root of their Schur complements in the Gram: (n,), and warnings.

    The geometric mean of the scales is that of the diagonal's square roots.

    Args:
        gram: (n, n) positive definite.
        name: of the operator, for a warning.
    """
    norm = gram.diagonal().sqrt()
    factor, used, warnings = damped_cholesky(scaled(gram, norm), METRIC_DAMPING, name)
    schur = torch.cholesky_inverse(factor).diagonal().reciprocal() - used
    left = schur.clamp(1e-3, 1.0).sqrt()
    return norm * left / left.log().mean().exp(), tuple(warnings)

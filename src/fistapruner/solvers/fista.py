"""FISTAPruner (arXiv 2408.03728): l1-regularised least squares, rounding, an adaptive lambda."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core import Constraint, LayerProblem
from ..core.linalg import Product, largest_eigenvalue
from .base import Method, Solution, Stats, setting
from .scores import Magnitude, Wanda
from .sparsegpt import SparseGPT

CHECKED = 5
"""Steps after which FISTA looks whether it has come to a rest, which takes as long as a fifth of a step."""


FIRST = 1e-5
"""First lambda."""

BISECTED = {"published": (0.0, 1e6, 1e-6), "relative": (1e-7, 1.0, 0.01)}
"""Interval of lambda, and the width at which its bisection ends; of ``relative`` the width is a share of its low end.

The paper's numbers are for sums over tokens; ours are in units of ``max |B|``, above which the solution is zero.
"""


@dataclass(frozen=True)
class Fista(Method):
    """FISTAPruner: ``min_V f(V)/2 + lambda ||V||_1`` by FISTA, rounded, with an adaptive lambda.

    Each round runs FISTA from the best rounded weights so far, projects by magnitude onto the constraint, and keeps the
    result if ``E_total = sqrt f(rounded)`` fell. With ``E_fista = sqrt f(V)`` and ``E_round = E_total - E_fista``, a
    bisection raises lambda if ``E_round / E_total > xi`` (the solution is too dense to be rounded well), else lowers
    it. The warm start is the first candidate, so that the result is never worse than the warm start.

    Args:
        iterations: K, FISTA steps of a round; ``tolerance``: of ``||V_k - V_{k-1}||_F``, below which they stop.
        xi: share of rounding error above which lambda is raised.
        patience: T, rounds without improvement after which it stops.
        warm_start, penalty: see their descriptions.

    The numbers are the paper's.
    """

    # As published (the recipe paper) with penalty "published". With "relative", the default, it differs:
    # (1) lambda is in units of max |B|, with B = W H + G, and its logarithm is bisected: it then does not depend on the
    #     scale of weights and activations or on the number of tokens.
    # (2) The warm start SparseGPT begins at the least-squares weights C and not at W.
    # (3) Products inside FISTA run on low-precision matrix units, from a gradient in fp32.

    name: ClassVar[str] = "fista"

    iterations: int = 20
    tolerance: float = 1e-6
    xi: float = 0.3
    patience: int = 3
    warm_start: str = setting(
        "sparsegpt",
        "First weights if the chain has no step before: those of sparsegpt, wanda or magnitude, dense (W), or auto, "
        "the paper's choice by the model's family: SparseGPT for OPT, Wanda for LLaMA and every other.",
        choices=("auto", "sparsegpt", "wanda", "magnitude", "dense"),
    )
    penalty: str = setting(
        "relative",
        "relative measures lambda in units of max |B|, above which the solution is zero, and bisects its logarithm. "
        "published takes the paper's numbers literally, on sums over tokens (start 1e-5, interval [0, 1e6], width "
        "1e-6), the published warm start, and full precision.",
        choices=("relative", "published"),
    )

    def solve(self, problem: LayerProblem, constraint: Constraint, start: Solution | None = None) -> Solution:
        begun = "the step before" if start is not None else self.warm_start
        start = start or self._warm_start(problem, constraint)
        published = self.penalty == "published"
        lipschitz = float(problem.cached("largest eigenvalue", lambda: largest_eigenvalue(problem.gram)))
        step = Product(problem.gram / -lipschitz, fast=not published)
        unit = 1.0 / (problem.tokens or 1) if published else _largest_penalty(problem)

        weight, mask = start.weight, start.mask
        gradient = problem.gradient(weight)
        best = math.sqrt(float(problem.row_errors(weight, gradient).sum()))
        first = weight, gradient
        if begun == "dense":
            first = problem.weight, problem.gradient(problem.weight)
        value, (low, high, width), idle = FIRST, BISECTED[self.penalty], 0
        rounds: list[Stats] = []
        while idle < self.patience:
            penalty = value * unit
            relaxed, steps = fista(*first, step, penalty, lipschitz, self.iterations, self.tolerance)
            support = constraint.project(relaxed.abs())
            rounded = relaxed * support
            slope = problem.gradient(rounded)
            total = math.sqrt(float(problem.row_errors(rounded, slope).sum()))  # E_total
            smooth = math.sqrt(problem.error(relaxed))  # E_fista
            rounds.append({"lambda": penalty, "e_total": total, "e_fista": smooth, "steps": steps})
            improved = total < best
            if improved:
                weight, mask, gradient, best = rounded, support, slope, total
            idle = 0 if improved else idle + 1
            first = weight, gradient
            if total > 0 and (total - smooth) / total > self.xi:  # E_round / E_total
                low = value
            else:
                high = value
            if high - low <= (width if published else width * low):
                break
            value = (low + high) / 2 if published else math.sqrt(low * high)
        record: Stats = {"warm_start": begun, "lipschitz": lipschitz, "e_total": best, "rounds": rounds}
        record["iterations"] = sum(each["steps"] for each in rounds)
        return Solution(weight, mask, (record,), start.warnings)

    def _warm_start(self, problem: LayerProblem, constraint: Constraint) -> Solution:
        if self.warm_start == "sparsegpt":
            return SparseGPT().solve(problem.without_drift() if self.penalty == "published" else problem, constraint)
        return (Wanda() if self.warm_start in ("wanda", "auto") else Magnitude()).solve(problem, constraint)


def _largest_penalty(problem: LayerProblem) -> float:
    """Compute ``max |B|``, B = W H + G: with a larger lambda the solution of the l1 problem is zero."""
    linear = problem.weight @ problem.gram
    if problem.drift is not None:
        linear += problem.drift
    return max(float(linear.abs().max()), torch.finfo(linear.dtype).tiny)


def fista(
    start: Tensor, gradient: Tensor, step: Product, penalty: float, lipschitz: float, iterations: int, tolerance: float
) -> tuple[Tensor, int]:
    """Run FISTA (Beck & Teboulle 2009) on ``f(V)/2 + penalty ||V||_1``.

    For k = 1, 2, ...; with y_1 = V_0 and t_1 = 1:

        z       = y_k - (y_k H - B) / L
        V_k     = sign(z) max(|z| - penalty / L, 0)
        t_{k+1} = (1 + sqrt(1 + 4 t_k^2)) / 2
        y_{k+1} = V_k + (t_k - 1) / t_{k+1} (V_k - V_{k-1})

    The gradient ``y H - B`` is taken as ``V_0 H - B``, which is given in fp32, plus ``(y - V_0) H``, which is small, so
    that its product may be of low precision.

    Args:
        start: (m, n) first iterate V_0.
        gradient: (m, n) ``V_0 H - B``.
        step: multiplies by ``-H / L`` (n, n).
        penalty: l1 weight.
        lipschitz: L, at least the largest eigenvalue of H.
        iterations: largest number of steps.
        tolerance: it stops once ``||V_k - V_{k-1}||_F`` is below it.

    Returns:
        The last iterate (m, n) and the number of steps.
    """
    base = torch.sub(start, gradient, alpha=1.0 / lipschitz)
    before, current = start.clone(), torch.empty_like(start)
    z, moved = base.clone(), torch.empty_like(start)
    momentum, k = 1.0, 0
    for k in range(1, iterations + 1):
        torch.ops.aten.softshrink.out(z, penalty / lipschitz, out=current)
        if k == iterations or (k % CHECKED == 0 and float(torch.dist(current, before)) < tolerance):
            break
        advance = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        point = torch.lerp(before, current, 1 + (momentum - 1) / advance, out=before)
        torch.sub(point, start, out=moved)
        torch.add(base, moved, out=z)
        step.add(z, moved)
        momentum = advance
        before, current = current, before
    return current, k

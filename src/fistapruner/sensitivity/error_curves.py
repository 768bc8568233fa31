"""Split a budget of zeros so that the predicted effect on the model's predictions is least.

For every operator the errors of its output rows are estimated at a few sparsities from its own Gram in the dense model, and
weighed with the rows' sensitivity (:mod:`.sensitivity`): that is a curve from zeros to predicted nats. Curves of all
operators add up, so the best split takes zeros where the next one costs least. Between the measured sparsities the logarithm
of a curve is interpolated; a curve's slope is made non-decreasing, so that taking the cheapest step first is optimal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..constraints import Unstructured
from ..problem import LayerProblem
from ..runtime.numerics import fast_products
from ..solvers.conditioning import alive_gram
from ..solvers.refit import refit_with_residual

REACH = 0.15
"""An operator's sparsity is at most this far from the asked one: curves are extrapolations of one operator pruned alone."""

POINTS = 4
"""Sparsities at which errors are estimated."""

REFIT_STEPS = 2
"""Conjugate gradient steps behind each estimate: with 4, sparsities of SmolLM2's operators at 50 % differ by 0.6 points on average."""

ROWS = 4
"""Errors are estimated on every 4th output row: it moves sparsities of SmolLM2's operators at 50 % by 0.3 points on average."""

STEPS = 240
"""Equal steps of an operator's range that are given out one by one."""

SAMPLE = 1 << 15
"""Scores from which an operator's threshold is estimated; a curve needs no exact one."""


def sparsity_grid(fraction: float) -> list[float]:
    """The sparsities, between the bounds of an operator's own one, at which errors are estimated."""
    low, high = bounds(fraction)
    return [low + (high - low) * point / (POINTS - 1) for point in range(POINTS)]


def bounds(fraction: float) -> tuple[float, float]:
    """Lowest and highest sparsity of an operator when ``fraction`` is asked for."""
    return max(fraction - REACH, fraction / 4), min(fraction + REACH, 1 - (1 - fraction) / 4)


def row_error_curves(problem: LayerProblem, grid: Sequence[float]) -> list[Tensor]:
    """Estimated errors of some of each operator's rows (:func:`looked_at`) at each sparsity: (len(grid), those rows) each.

    The mask keeps the largest weights in units of their input's standard deviation (Wanda's score, over the operator), and a
    few conjugate gradient steps refit what is kept: an upper bound on what a good solver reaches, of the same shape.
    """
    problem = _thinned(problem)
    gram = alive_gram(problem.gram)
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    scale = gram.diagonal().sqrt()
    scores = (problem.weight * scale).abs().split(problem.rows)
    curves: list[list[Tensor]] = [[] for _ in problem.rows]
    for fraction in grid:
        mask = torch.cat([part > _threshold(part, fraction) for part in scores])
        with fast_products():  # a curve needs no last digits
            weight, residual = refit_with_residual(problem, gram, problem.weight, mask, REFIT_STEPS, fast=True)
        errors = torch.linalg.vecdot(residual, problem.weight - weight)
        for curve, part in zip(curves, errors.split(problem.rows), strict=True):
            curve.append(part.float().cpu())
    return [torch.stack(curve) for curve in curves]


def looked_at(rows: int) -> slice:
    """The rows of an operator whose errors are estimated: every fourth, more of them where there are few."""
    return slice(None, None, max(1, min(ROWS, rows // 64)))


def predicted_cost(errors: Tensor, sensitivity: Tensor) -> Tensor:
    """(points,) nats a token that pruning an operator costs.

    Args:
        errors: (points, some rows) of :func:`row_error_curves`.
        sensitivity: (rows,) mean squared gradients of all its outputs.
    """
    sampled = sensitivity[looked_at(len(sensitivity))]
    share = sampled.sum() / sensitivity.sum()
    if not bool(share > 0):  # none of the sampled rows reaches a prediction, or by less than fp32 can tell
        share = torch.tensor(len(sampled) / len(sensitivity))
    return torch.mv(errors, sampled) / (2 * share)


def _thinned(problem: LayerProblem) -> LayerProblem:
    """The problem of the rows that are looked at."""

    def thinned(tensor: Tensor) -> list[Tensor]:
        return [part[looked_at(len(part))] for part in tensor.split(problem.rows)]

    assert problem.energy is not None
    weights = thinned(problem.weight)
    # The energy is passed on: left out, it would be computed anew, which takes a product.
    return replace(problem, weight=torch.cat(weights), energy=torch.cat(thinned(problem.energy)), rows=tuple(map(len, weights)))


def _threshold(scores: Tensor, fraction: float) -> Tensor:
    """The score below which about ``fraction`` of them lie, from an evenly spaced sample."""
    sample = scores.flatten()[:: max(1, scores.numel() // SAMPLE)]
    return sample.kthvalue(max(1, round(fraction * len(sample)))).values


def split_budget(curves: Mapping[str, Tensor], sizes: Mapping[str, int], fraction: float) -> dict[str, Unstructured]:
    """Give out zeros where they cost least.

    Args:
        curves: (points,) predicted cost of each operator at the sparsities of :func:`sparsity_grid`.
        sizes: weights of each operator.
        fraction: the sparsity of all operators together.

    Returns:
        A sparsity for each operator; their zeros sum to exactly what ``fraction`` gives in every operator.
    """
    budget = sum(Unstructured(fraction).zeros(1, size) for size in sizes.values())
    low, high = bounds(fraction)
    grid = torch.tensor(sparsity_grid(fraction), dtype=torch.float64)
    fine = torch.linspace(low, high, STEPS + 1, dtype=torch.float64)
    zeros: dict[str, int] = {}
    offers: list[tuple[float, str, int]] = []
    for name, curve in curves.items():
        steps = [round(float(point) * sizes[name]) for point in fine]
        zeros[name] = steps[0]
        logs = interpolate(grid, curve.double().clamp_min(1e-30).log(), fine)
        slopes = (logs.exp().diff() / sizes[name]).cummax(0).values
        offers += [(float(slope), name, after - before) for slope, before, after in zip(slopes, steps, steps[1:], strict=False)]
    left = budget - sum(zeros.values())
    for _, name, size in sorted(offers, key=lambda offer: offer[0]):  # stable: an operator's steps stay in order
        taken = min(size, left)
        zeros[name] += taken
        left -= taken
        if left == 0:
            break
    return {name: Unstructured.of_counts(count, sizes[name]) for name, count in zeros.items()}


def interpolate(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """Piecewise linear through (x, y), x ascending."""
    right = torch.searchsorted(x, at).clamp(1, len(x) - 1)
    left = right - 1
    share = (at - x[left]) / (x[right] - x[left])
    return y[left] + share * (y[right] - y[left])

"""Allocate sparsity to operators so that the predicted KL divergence from the dense model is least.

For every operator the errors of its output rows are estimated at a few sparsities, from its Gram in the dense model,
and weighted with the rows' Fisher sensitivity (:mod:`.fisher`). This gives a curve from zeros to nats for every
operator. The predicted cost of the model is the sum of the curves, so zeros are taken greedily where the next one
costs least. Between the grid's sparsities the logarithm of a curve is interpolated; slopes are made non-decreasing,
so that the greedy choice is optimal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..core import Constraint, LayerProblem, Ridge, Unstructured
from ..core.linalg import dead_inputs, fast_products
from ..core.thresholds import spread_stride
from ..solvers.refit import refit_cg

REACH = 0.15
"""Largest distance of an operator's sparsity from the asked one: curves ignore other operators."""

POINTS = 4
"""Number of sparsities at which errors are estimated."""

REFIT_STEPS = 2
"""Conjugate gradient steps of each estimate.

Measured: with 4 steps, sparsities of SmolLM2's operators at 50 % change by 0.6 points on average.
"""

ROWS = 4
"""Errors are estimated on every 4th output row.

Measured: it changes sparsities of SmolLM2's operators at 50 % by 0.3 points on average.
"""

STEPS = 240
"""Equal steps into which an operator's range of sparsities is divided."""

SAMPLE = 1 << 15
"""Number of scores from which an operator's threshold is estimated; a curve needs no exact threshold."""


def sparsity_grid(fraction: float) -> list[float]:
    """Return the sparsities at which errors are estimated, evenly spaced between :func:`bounds`."""
    low, high = bounds(fraction)
    return [low + (high - low) * point / (POINTS - 1) for point in range(POINTS)]


def bounds(fraction: float) -> tuple[float, float]:
    """Return the lowest and the highest sparsity of an operator when ``fraction`` is asked for."""
    return max(fraction - REACH, fraction / 4), min(fraction + REACH, 1 - (1 - fraction) / 4)


def patterns_measured(pattern: Constraint) -> list[Constraint]:
    """Return the patterns at which errors are estimated: all that are possible, or a grid of shares."""
    return list(pattern.neighbours(REACH)) or [Unstructured(share) for share in sparsity_grid(pattern.fraction)]


def row_error_curves(problem: LayerProblem, rows: Sequence[int], patterns: Sequence[Constraint]) -> list[Tensor]:
    """Estimate the errors of sampled rows (:func:`sampled_rows`) of each operator at each pattern.

    The mask keeps the largest scores ``|W_ij| sqrt(G_jj)`` of an operator (Wanda's score), and a few conjugate
    gradient steps refit the kept weights. This is an upper bound on the error of a good solver, with a similar shape.

    Args:
        problem: of the operators, stacked, without drift.
        rows: of each operator.
        patterns: at which errors are estimated.

    Returns:
        (len(patterns), sampled rows) for each operator.
    """
    parts = [part[sampled_rows(len(part))] for part in problem.weight.split(tuple(rows))]
    sizes, gram = [len(part) for part in parts], problem.regularised(Ridge(mean=0.01)).gram
    dense = torch.cat(parts).masked_fill(dead_inputs(problem.gram), 0.0)  # without effect, so they are pruned first
    scores = (dense * gram.diagonal().sqrt()).abs().split(sizes)
    curves: list[list[Tensor]] = [[] for _ in sizes]
    for pattern in patterns:
        mask = torch.cat([_kept(part, pattern) for part in scores])
        weight = refit_cg(dense, gram, dense, mask, REFIT_STEPS, fast=True)
        with fast_products():  # a curve needs no exact products
            errors = torch.linalg.vecdot((dense - weight) @ gram, dense - weight)
        for curve, part in zip(curves, errors.split(sizes), strict=True):
            curve.append(part.float().cpu())
    return [torch.stack(curve) for curve in curves]


def sampled_rows(rows: int) -> slice:
    """Return the rows of an operator whose errors are estimated: every 4th, more where there are few."""
    return slice(None, None, max(1, min(ROWS, rows // 64)))


def predicted_cost(errors: Tensor, sensitivity: Tensor) -> Tensor:
    """Predict the cost of pruning an operator, in nats a token.

    Args:
        errors: (points, sampled rows) of :func:`row_error_curves`.
        sensitivity: (rows,) mean squared gradients of all its outputs.

    Returns:
        (points,).
    """
    sampled = sensitivity[sampled_rows(len(sensitivity))]
    share = sampled.sum() / sensitivity.sum()
    if not bool(share > 0):  # no sampled row affects a prediction, or the sum underflows fp32
        share = torch.tensor(len(sampled) / len(sensitivity))
    return torch.mv(errors, sampled) / (2 * share)


def _kept(scores: Tensor, pattern: Constraint) -> Tensor:
    """Choose the weights with the largest scores; of a share only about as many."""
    if not pattern.supports_allocation:
        return pattern.project(scores)
    if pattern.fraction == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    return scores > _threshold(scores, pattern.fraction)


def _threshold(scores: Tensor, fraction: float) -> Tensor:
    """Estimate the ``fraction`` quantile of scores from an evenly spaced sample of all columns."""
    sample = scores.flatten()[:: spread_stride(scores.numel(), SAMPLE, scores.shape[1])]
    return sample.kthvalue(max(1, round(fraction * len(sample)))).values


def choose_patterns(
    curves: Mapping[str, Tensor], sizes: Mapping[str, int], patterns: Sequence[Constraint], fraction: float
) -> dict[str, Constraint]:
    """Choose a pattern for each operator, with at least the share ``fraction`` of zeros in all.

    Zeros are taken where they cost least, along the lower convex hull of each operator's curve. One step changes a
    whole operator, so up to one step too many is taken.

    Args:
        curves: (len(patterns),) predicted cost of each operator.
        sizes: weights of each operator.
        patterns: from the densest to the sparsest.
        fraction: zeros of all operators together, as a share; at most that of the sparsest pattern.
    """
    shares = [each.fraction for each in patterns]
    chosen = {name: 0 for name in sizes}
    offers: list[tuple[float, str, int]] = []
    for name, curve in curves.items():
        costs, at = curve.double().tolist(), 0
        while at < len(shares) - 1:
            slope, to = min(
                ((costs[to] - costs[at]) / (shares[to] - shares[at]) / sizes[name], to)
                for to in range(at + 1, len(shares))
            )
            offers.append((slope, name, to))
            at = to
    # Whole zeros: sums of shares such as 0.4, which are rounded, would leave a trace that takes one more step.
    left = math.ceil(fraction * sum(sizes.values()) * (1 - 1e-12))
    for _, name, to in sorted(offers, key=lambda offer: offer[0]):  # stable: an operator's steps stay in order
        if left <= 0:
            break
        left -= patterns[to].zeros(1, sizes[name]) - patterns[chosen[name]].zeros(1, sizes[name])
        chosen[name] = to
    return {name: patterns[to] for name, to in chosen.items()}


def split_budget(curves: Mapping[str, Tensor], sizes: Mapping[str, int], fraction: float) -> dict[str, Unstructured]:
    """Allocate zeros to operators where they cost least.

    Args:
        curves: (points,) predicted cost of each operator at the sparsities of :func:`sparsity_grid`.
        sizes: weights of each operator.
        fraction: the sparsity of all operators together.

    Returns:
        A sparsity for each operator; their zeros sum to exactly what ``fraction`` gives in every operator.
    """
    budget = ZerosBudget(sizes, fraction)
    return budget.sparsities(budget.cheapest(budget.slopes(curves)))


class ZerosBudget:
    """Zeros to distribute over operators, in equal steps of each operator's range of sparsities.

    Args:
        sizes: weights of each operator.
        fraction: the sparsity of all operators together.
    """

    def __init__(self, sizes: Mapping[str, int], fraction: float) -> None:
        self._sizes, self._fraction = dict(sizes), fraction
        low, high = bounds(fraction)
        self._fine = torch.linspace(low, high, STEPS + 1, dtype=torch.float64)
        zeros = torch.tensor([[round(float(point) * size) for point in self._fine] for size in sizes.values()])
        self._fewest, self._steps = zeros[:, :1], zeros.diff(dim=1)
        self._uniform = torch.tensor([Unstructured(fraction).zeros(1, size) for size in sizes.values()])

    def slopes(self, curves: Mapping[str, Tensor]) -> Tensor:
        """Compute the cost of one more zero in every step, (operators, steps), non-decreasing along the steps.

        It is divided by the number of steps in a sparsity of 1, a constant that no comparison of slopes depends on.

        Args:
            curves: as for :func:`split_budget`.
        """
        grid = torch.tensor(sparsity_grid(self._fraction), dtype=torch.float64)
        rows = []
        for name, size in self._sizes.items():
            logs = interpolate(grid, curves[name].double().clamp_min(1e-30).log(), self._fine)
            rows.append((logs.exp().diff() / size).cummax(0).values)
        return torch.stack(rows)

    def cheapest(self, slopes: Tensor) -> Tensor:
        """Distribute the zeros so that the sum of the costs is least; return the (operators,) zeros."""
        order = slopes.flatten().argsort(stable=True)  # an operator's steps stay in order
        offered = self._steps.flatten()[order]
        left = int(self._uniform.sum() - self._fewest.sum()) - (offered.cumsum(0) - offered)
        taken = torch.empty_like(offered)
        taken[order] = left.clamp_min(0).minimum(offered)
        return self._fewest[:, 0] + taken.view_as(self._steps).sum(1)

    def uniform(self) -> Tensor:
        """Return the (operators,) zeros of the same sparsity in every operator."""
        return self._uniform

    def rise(self, slopes: Tensor, zeros: Tensor) -> Tensor:
        """Compute the summed cost of zeros over that of the lowest sparsities.

        Args:
            slopes: (..., operators, steps).
            zeros: (operators,).

        Returns:
            (...,).
        """
        before = self._fewest + self._steps.cumsum(1) - self._steps
        taken = (zeros[:, None] - before).clamp_min(0).minimum(self._steps)
        return (slopes * taken).sum((-2, -1)) / float(self._fine[1] - self._fine[0])

    def sparsities(self, zeros: Tensor) -> dict[str, Unstructured]:
        """Return the sparsity of each operator with the (operators,) zeros."""
        return {
            name: Unstructured.of_counts(count, size)
            for (name, size), count in zip(self._sizes.items(), zeros.tolist(), strict=True)
        }


def interpolate(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """Interpolate linearly between the points (x, y), x ascending."""
    right = torch.searchsorted(x, at).clamp(1, len(x) - 1)
    left = right - 1
    share = (at - x[left]) / (x[right] - x[left])
    return y[left] + share * (y[right] - y[left])

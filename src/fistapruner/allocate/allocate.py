"""Distribute zeros over operators where they cost least.

The predicted cost of the model is the sum of its operators' curves (:mod:`.curves`), so zeros are taken greedily where
the next one costs least. Between the grid's sparsities the logarithm of a curve is interpolated; slopes are made
non-decreasing, so that the greedy choice is optimal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..core import Constraint, Unstructured
from .curves import bounds, sparsity_grid

STEPS = 240
"""Equal steps into which an operator's range of sparsities is divided."""


def split_budget(curves: Mapping[str, Tensor], sizes: Mapping[str, int], fraction: float) -> dict[str, Unstructured]:
    """Allocate zeros to operators where they cost least.

    Args:
        curves: (points,) predicted cost of each operator at the sparsities of :func:`~.curves.sparsity_grid`.
        sizes: weights of each operator.
        fraction: the sparsity of all operators together.

    Returns:
        A sparsity for each operator; their zeros sum to exactly what ``fraction`` gives in every operator.
    """
    budget = ZerosBudget(sizes, fraction)
    return budget.sparsities(budget.cheapest(budget.slopes(curves)))


class ZerosBudget:
    """Zeros to distribute over operators, in equal steps of each operator's range of sparsities.

    Arguments are as for :func:`split_budget`; ``uniform`` (operators,) are the zeros of the same sparsity everywhere.
    """

    def __init__(self, sizes: Mapping[str, int], fraction: float) -> None:
        self._sizes, self._fraction = dict(sizes), fraction
        low, high = bounds(fraction)
        self._fine = torch.linspace(low, high, STEPS + 1, dtype=torch.float64)
        zeros = torch.tensor([[round(float(point) * size) for point in self._fine] for size in sizes.values()])
        self._fewest, self._steps = zeros[:, :1], zeros.diff(dim=1)
        self.uniform = torch.tensor([Unstructured(fraction).zeros(1, size) for size in sizes.values()])

    def slopes(self, curves: Mapping[str, Tensor]) -> Tensor:
        """Compute the cost of one more zero in every step, (operators, steps), non-decreasing along the steps.

        It is divided by the number of steps in a sparsity of 1, a constant that no comparison of slopes depends on.
        """
        grid = torch.tensor(sparsity_grid(self._fraction), dtype=torch.float64)
        rows = []
        for name, size in self._sizes.items():
            logs = _interpolate(grid, curves[name].double().clamp_min(1e-30).log(), self._fine)
            rows.append((logs.exp().diff() / size).cummax(0).values)
        return torch.stack(rows)

    def cheapest(self, slopes: Tensor) -> Tensor:
        """Distribute the zeros so that the sum of the costs is least; return the (operators,) zeros."""
        order = slopes.flatten().argsort(stable=True)  # an operator's steps stay in order
        offered = self._steps.flatten()[order]
        left = int(self.uniform.sum() - self._fewest.sum()) - (offered.cumsum(0) - offered)
        taken = torch.empty_like(offered)
        taken[order] = left.clamp_min(0).minimum(offered)
        return self._fewest[:, 0] + taken.view_as(self._steps).sum(1)

    def rise(self, slopes: Tensor, zeros: Tensor) -> Tensor:
        """Compute the summed cost (...,) of (operators,) zeros over that of the lowest sparsities.

        ``slopes``: (..., operators, steps).
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


def _interpolate(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """Interpolate linearly between the points (x, y), x ascending."""
    right = torch.searchsorted(x, at).clamp(1, len(x) - 1)
    left = right - 1
    share = (at - x[left]) / (x[right] - x[left])
    return y[left] + share * (y[right] - y[left])


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

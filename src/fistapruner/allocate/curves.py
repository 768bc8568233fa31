"""Estimate what zeros cost: the error of every operator at a few patterns, and from it a loss in nats.

For every operator the errors of its output rows are estimated from its Gram in the dense model, and weighted with the
rows' Fisher sensitivity (:mod:`.fisher`). The predicted loss of the model is the sum over its operators.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core import Constraint, LayerProblem, Ridge, Unstructured
from ..core.linalg import dead_inputs, fast_products
from ..core.selection import spread_stride
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

SAMPLE = 1 << 15
"""Number of scores from which an operator's threshold is estimated; a curve needs no exact threshold."""


def bounds(fraction: float) -> tuple[float, float]:
    """Return the lowest and the highest sparsity of an operator when ``fraction`` is asked for."""
    return max(fraction - REACH, fraction / 4), min(fraction + REACH, 1 - (1 - fraction) / 4)


def sparsity_grid(fraction: float) -> list[float]:
    """Return the sparsities at which errors are estimated, evenly spaced between :func:`bounds`."""
    low, high = bounds(fraction)
    return [low + (high - low) * point / (POINTS - 1) for point in range(POINTS)]


def patterns_measured(pattern: Constraint) -> list[Constraint]:
    """Return the patterns at which errors are estimated: all that are possible, or a grid of shares."""
    return list(pattern.neighbours(REACH)) or [Unstructured(share) for share in sparsity_grid(pattern.fraction)]


def sampled_rows(rows: int) -> slice:
    """Return the rows of an operator whose errors are estimated: every 4th, more where there are few."""
    return slice(None, None, max(1, min(ROWS, rows // 64)))


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
    """Choose the weights with the largest scores; of a share only about as many.

    The threshold of a share is a quantile of an evenly spaced sample of all columns.
    """
    if not pattern.supports_allocation:
        return pattern.project(scores)
    if pattern.fraction == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    sample = scores.flatten()[:: spread_stride(scores.numel(), SAMPLE, scores.shape[1])]
    return scores > sample.kthvalue(max(1, round(pattern.fraction * len(sample)))).values

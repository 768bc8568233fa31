"""What is measured on the dense model before anything is pruned: every operator's sparsity, the metric of block matching."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..models.layout import Layout
from ..models.skeleton import Skeleton
from ..problem import ProblemSums
from ..recipe import Recipe
from ..sparsity import NM, Sparsity
from .error import row_error_curves, sparsity_grid, split_budget
from .owl import outlier_share, owl_allocation
from .sensitivity import gather_grams, measure_sensitivity

WINDOWS = 8
"""Calibration windows that are looked at: second moments over some thousand tokens are enough to rank operators."""

WIDE = 4096
"""Hidden size above which block matching gets the diagonal of its metric only: the whole one would fill the disk."""


def check_allocation(recipe: Recipe) -> None:
    """Refuse a measured allocation of an n:m pattern, whose sparsity is the same everywhere by its nature.

    Raises:
        FistaPrunerError: names the allocation and the pattern.
    """
    if recipe.allocation in ("owl", "error") and isinstance(recipe.pattern, NM):
        raise FistaPrunerError(
            f"allocation {recipe.allocation!r} cannot be used with {recipe.pattern}: an n:m pattern has the same sparsity in every "
            f"operator; take --allocation uniform, or an unstructured sparsity such as {100 * recipe.pattern.fraction:g}%"
        )


@dataclass(frozen=True)
class Decision:
    """What was measured on the dense model before the first decoder layer is pruned.

    Args:
        sparsity: of every operator, or None where the recipe says it without measuring.
        metrics: how block matching weighs the output errors of each decoder layer, or None without block matching:
            (width, width) second moments of the loss's gradient, or their (width,) diagonals where the model is wide.
    """

    sparsity: dict[str, Sparsity] | None
    metrics: list[Tensor] | None


def measured_by(recipe: Recipe) -> str | None:
    """``owl`` or ``error`` where the allocation has to look at the model, else None."""
    if recipe.allocation == "auto":
        return None if isinstance(recipe.pattern, NM) else "error"
    return recipe.allocation if recipe.allocation in ("owl", "error") else None


def needs_measuring(recipe: Recipe) -> bool:
    """Whether :func:`decide` has to look at the model."""
    return measured_by(recipe) is not None or recipe.match > 0


def decide(recipe: Recipe, layout: Layout, skeleton: Skeleton, tokens: Tensor, tick: Callable[[int], None] = lambda done: None) -> Decision:
    """Measure what ``allocation: owl``, ``allocation: error`` and block matching need.

    Args:
        recipe: its ``allocation``, ``sparsity``, ``match`` and ``seed``.
        layout: the operators to prune.
        skeleton: the dense model.
        tokens: (samples, seqlen) calibration tokens; the first few windows are used.
        tick: told of progress in layer passes.

    Raises:
        FistaPrunerError: a measured allocation of an n:m pattern.
    """
    check_allocation(recipe)
    if not needs_measuring(recipe):
        return Decision(None, None)
    allocation = measured_by(recipe)
    tokens = tokens[:WINDOWS]
    fraction = recipe.pattern.fraction
    sizes = {name: operator.rows * operator.columns for name, operator in layout.operators()}
    grid = sparsity_grid(fraction)
    errors: dict[str, Tensor] = {}
    outliers: dict[int, list[tuple[Tensor, Tensor]]] = {}
    shares: dict[int, float] = {}

    def look(index: int, number: int, sums: ProblemSums) -> None:
        group = layout.layers[index][number]
        if allocation == "error":
            names = [layout.full_name(index, operator) for operator in group]
            problem = sums.problem(names, [operator.rows for operator in group], 0.0)
            errors.update(zip(names, row_error_curves(problem, grid), strict=True))
        else:
            outliers.setdefault(index, []).append((sums.weight, (sums.gram.diagonal() / sums.tokens).sqrt()))
            if number == len(layout.layers[index]) - 1:
                shares[index] = outlier_share(outliers.pop(index))

    sparsity: dict[str, Sparsity] | None = None
    metrics: list[Tensor] | None = None
    grams = look if allocation else None
    if recipe.match or allocation == "error":
        sensitivity = measure_sensitivity(skeleton, layout, tokens, seed=recipe.seed, grams=grams, tick=tick)
        if allocation == "error":
            costs = {name: torch.mv(errors[name], sensitivity.rows[name]) / 2 for name in sizes}
            sparsity = dict(split_budget(costs, sizes, fraction))
        if recipe.match:
            metrics = [metric if len(metric) <= WIDE else metric.diagonal().contiguous() for metric in sensitivity.outputs]
    elif grams is not None:
        gather_grams(skeleton, layout, tokens, grams, tick)
    if allocation == "owl":
        members = {
            index: {name: sizes[name] for group in layout.layers[index] for name in (layout.full_name(index, op) for op in group)}
            for index in shares
        }
        sparsity = dict(owl_allocation(shares, members, fraction))
    return Decision(sparsity, metrics)

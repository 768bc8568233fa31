"""What is measured on the dense model before anything is pruned: every operator's sparsity, the importance of its rows, the
metric of block matching."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..models.layout import Layout
from ..models.skeleton import Skeleton
from ..pipeline.hidden import Store, scratch_factory
from ..problem import ProblemSums
from ..recipe import Recipe
from ..sparsity import NM, Sparsity
from .error import row_error_curves, sparsity_grid, split_budget
from .owl import outlier_share, owl_allocation
from .sensitivity import gather_grams, measure_sensitivity, row_importance

WINDOWS = 8
"""Calibration windows that are looked at, at most: second moments over some thousand tokens are enough to rank operators."""

SHARE = 4
"""One calibration window of so many is looked at, so that measuring costs a fixed share of the passes that a run makes anyway."""


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
        importance: (m,) weight of every output row of each operator, or None where rows count alike.
    """

    sparsity: dict[str, Sparsity] | None
    metrics: list[Tensor] | None
    importance: dict[str, Tensor] | None = None


def measured_by(recipe: Recipe) -> str | None:
    """``owl`` or ``error`` where the allocation has to look at the model, else None."""
    if recipe.allocation == "auto":
        return "error" if _own(recipe) and not isinstance(recipe.pattern, NM) else None
    return recipe.allocation if recipe.allocation in ("owl", "error") else None


def weighs_rows(recipe: Recipe) -> bool:
    """Whether the importance of output rows is asked for and makes a difference."""
    asked = _own(recipe) if recipe.weighting == "auto" else recipe.weighting == "fisher"
    return asked and not isinstance(recipe.pattern, NM) and not all(step.rows_apart(recipe.pattern) for step in recipe.steps)


def windows_looked_at(samples: int) -> int:
    """How many of the calibration windows are looked at: at least two where there are two."""
    return min(WINDOWS, samples, max(2, samples // SHARE))


def _own(recipe: Recipe) -> bool:
    return not all(step.published for step in recipe.steps)


def needs_measuring(recipe: Recipe) -> bool:
    """Whether :func:`decide` has to look at the model."""
    return measured_by(recipe) is not None or recipe.match > 0 or weighs_rows(recipe)


def decide(
    recipe: Recipe,
    layout: Layout,
    skeleton: Skeleton,
    tokens: Tensor,
    *,
    batch_size: int = 4,
    store: Store | None = None,
    tick: Callable[[int], None] = lambda done: None,
) -> Decision:
    """Measure what ``allocation: owl``, ``allocation: error``, ``weighting: fisher`` and block matching need.

    Args:
        recipe: its ``allocation``, ``sparsity``, ``weighting``, ``match`` and ``seed``.
        layout: the operators to prune.
        skeleton: the dense model.
        tokens: (samples, seqlen) calibration tokens; the first few windows are used.
        batch_size: windows in one pass.
        store: where hidden states between the decoder layers are kept; None keeps them in memory.
        tick: told of progress in layer passes.

    Raises:
        FistaPrunerError: a measured allocation of an n:m pattern.
    """
    check_allocation(recipe)
    if not needs_measuring(recipe):
        return Decision(None, None)
    allocation = measured_by(recipe)
    tokens = tokens[: windows_looked_at(len(tokens))]
    store = store or scratch_factory(None, skeleton.dtype)
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
    importance: dict[str, Tensor] | None = None
    grams = look if allocation else None
    if recipe.match or allocation == "error" or weighs_rows(recipe):
        sensitivity = measure_sensitivity(
            skeleton,
            layout,
            tokens,
            seed=recipe.seed,
            batch_size=batch_size,
            grams=grams,
            outputs=recipe.match > 0,
            store=store,
            tick=tick,
        )
        if allocation == "error":
            costs = {name: torch.mv(errors[name], sensitivity.rows[name]) / 2 for name in sizes}
            sparsity = dict(split_budget(costs, sizes, fraction))
        if weighs_rows(recipe):
            importance = {name: row_importance(rows) for name, rows in sensitivity.rows.items()}
        if recipe.match:
            metrics = sensitivity.outputs
    elif grams is not None:
        gather_grams(skeleton, layout, tokens, grams, batch_size=batch_size, store=store, tick=tick)
    if allocation == "owl":
        members = {
            index: {name: sizes[name] for group in layout.layers[index] for name in (layout.full_name(index, op) for op in group)}
            for index in shares
        }
        sparsity = dict(owl_allocation(shares, members, fraction))
    return Decision(sparsity, metrics, importance)

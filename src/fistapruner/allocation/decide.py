"""Decide every operator's sparsity before anything is pruned, from a few calibration windows through the dense model."""

from __future__ import annotations

from collections.abc import Callable

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


def measured_allocation(
    recipe: Recipe, layout: Layout, skeleton: Skeleton, tokens: Tensor, tick: Callable[[int], None] = lambda done: None
) -> dict[str, Sparsity]:
    """Sparsity of every operator as ``allocation: owl`` or ``error`` decides it; the total is exactly the recipe's.

    Args:
        recipe: its ``allocation``, ``sparsity`` and ``seed``.
        layout: the operators to prune.
        skeleton: the dense model.
        tokens: (samples, seqlen) calibration tokens; the first few windows are used.
        tick: told of progress in layer passes.

    Raises:
        FistaPrunerError: an n:m pattern.
    """
    check_allocation(recipe)
    fraction = recipe.pattern.fraction
    tokens = tokens[:WINDOWS]
    sizes = {name: operator.rows * operator.columns for name, operator in layout.operators()}
    if recipe.allocation == "owl":
        shares: dict[int, float] = {}
        seen: dict[int, list[tuple[Tensor, Tensor]]] = {}

        def norms(index: int, number: int, sums: ProblemSums) -> None:
            seen.setdefault(index, []).append((sums.weight, (sums.gram.diagonal() / sums.tokens).sqrt()))
            if number == len(layout.layers[index]) - 1:
                shares[index] = outlier_share(seen.pop(index))

        gather_grams(skeleton, layout, tokens, norms, tick)
        members = {
            index: {name: sizes[name] for group in layout.layers[index] for name in (layout.full_name(index, op) for op in group)}
            for index in shares
        }
        return dict(owl_allocation(shares, members, fraction))

    grid = sparsity_grid(fraction)
    errors: dict[str, Tensor] = {}

    def curves(index: int, number: int, sums: ProblemSums) -> None:
        group = layout.layers[index][number]
        names = [layout.full_name(index, operator) for operator in group]
        problem = sums.problem(names, [operator.rows for operator in group], 0.0)
        errors.update(zip(names, row_error_curves(problem, grid), strict=True))

    sensitivity = measure_sensitivity(skeleton, layout, tokens, seed=recipe.seed, grams=curves, tick=tick)
    costs = {name: torch.mv(errors[name], sensitivity.rows[name]) / 2 for name in sizes}
    return dict(split_budget(costs, sizes, fraction))

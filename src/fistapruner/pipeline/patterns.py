"""Decide the sparsity pattern of every operator, and whether it can have one."""

from __future__ import annotations

from collections.abc import Mapping

from ..core import Constraint, parse_sparsity
from ..errors import FistaPrunerError
from ..models.layout import Layout
from ..settings.patterns import matches
from ..settings.settings import Recipe
from ..solvers.low_rank import check_rank

MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Model types of whose ``out_proj`` PEFT refuses a LoRA (its ``_check_lora_target_modules_mamba``)."""


def allocate(recipe: Recipe, layout: Layout, model_type: str = "") -> dict[str, Constraint]:
    """Decide the pattern of every operator, as the recipe says it.

    Args:
        recipe: settings.
        layout: the operators.
        model_type: as the model's config has it, by which PEFT refuses some low-rank parts.

    Raises:
        FistaPrunerError: a pattern that matches nothing, or does not divide an operator's inputs; or an operator that
            cannot have the low-rank part.
    """
    chosen = patterns_of(recipe, layout)
    for name, operator in layout.operators():
        chosen[name].check(operator.columns, name)
    if recipe.low_rank:
        _check_low_rank(recipe.low_rank, layout, chosen, model_type)
    return chosen


def patterns_of(recipe: Recipe, layout: Layout) -> dict[str, Constraint]:
    """Read the pattern of every operator, by full name.

    Raises:
        FistaPrunerError: a pattern of names that matches no operator of ``layout``.
    """
    operators = layout.operators()
    chosen: dict[str, Constraint] = dict.fromkeys((name for name, _ in operators), recipe.pattern)
    if isinstance(recipe.allocation, Mapping):
        for pattern, sparsity in recipe.allocation.items():
            names = [name for name in chosen if matches(name, pattern)]
            if not names:
                if any(matches(name, pattern) for name in layout.left_out):
                    raise FistaPrunerError(
                        f"allocation: {pattern!r} matches only operators that targets and ignore leave out"
                    )
                raise FistaPrunerError(
                    f"allocation: {pattern!r} matches no operator; the first one is called {operators[0][0]!r}"
                )
            chosen.update((name, parse_sparsity(sparsity)) for name in names)
    return chosen


def _check_low_rank(rank: int, layout: Layout, sparsity: Mapping[str, Constraint], model_type: str) -> None:
    """Refuse operators that cannot have a low-rank part.

    Raises:
        FistaPrunerError: names the first of them.
    """
    for name, operator in layout.operators():
        if not sparsity[name].zeros(operator.rows, operator.columns):
            continue
        if operator.experts:
            raise FistaPrunerError(
                f"low_rank {rank}: {name} is part of an expert, which PEFT's LoRA does not reach: leave experts "
                "dense with --ignore re:experts, or prune without --low-rank"
            )
        if model_type in MAMBA and name.endswith(".out_proj"):
            raise FistaPrunerError(
                f"low_rank {rank}: {name} is of a {model_type} model, and PEFT refuses a LoRA of its out_proj: leave "
                "these dense with --ignore re:out_proj, or prune without --low-rank"
            )
        check_rank(rank, operator.rows, operator.columns, name)
    if not any(sparsity[name].fraction for name, _ in layout.operators()):
        raise FistaPrunerError(
            f"low_rank {rank} with sparsity 0%: operators without zeros have no low-rank part; give a --sparsity"
        )

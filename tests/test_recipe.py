"""What a recipe settles before a run begins."""

from __future__ import annotations

from typing import Any

import pytest

from fistapruner import Recipe

PARALLEL = {"execution": {"executor": "process"}}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("pruned", 0.5, "correct")),
        ({"method": "proximal+swap"}, ("pruned", 0.5, "correct")),
        ({"method": "sparsegpt"}, ("pruned", 0.0, "none")),
        ({"method": "wanda+refit"}, ("pruned", 0.0, "none")),
        ({"method": "alps"}, ("pruned", 0.0, "none")),
        ({"method": "sparsegpt+fista+refit"}, ("dense", 1.0, "none")),
        ({"method": "fista", "propagate": "pruned"}, ("pruned", 1.0, "none")),
        ({"propagate": "dense"}, ("dense", 1.0, "correct")),
        ({"propagate": "dense", "target": "pruned"}, ("dense", 0.0, "correct")),
        ({"residual": "none", "target": "dense"}, ("pruned", 1.0, "none")),
        (PARALLEL, ("dense", 1.0, "correct")),
        ({"method": "alps", **PARALLEL}, ("dense", 1.0, "none")),
        ({"propagate": "pruned", **PARALLEL}, ("pruned", 0.5, "correct")),
    ],
)
def test_auto_is_what_the_method_was_published_with_or_ours_measured_best(settings: dict[str, Any], expected: tuple[Any, ...]) -> None:
    recipe = Recipe.build(settings).settled()
    assert (recipe.propagate, recipe.dense_share, recipe.residual) == expected
    assert recipe.settled(apart=True) == recipe  # what is settled stays
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_a_part_of_the_layers_is_fed_by_the_dense_model() -> None:
    assert Recipe().settled(apart=True).propagate == "dense"


def test_who_goes_on_with_a_run_keeps_what_it_settled() -> None:
    earlier = Recipe().settled().model_dump(mode="json")
    assert Recipe.build(PARALLEL).settled(earlier=earlier).propagate == "pruned"
    assert Recipe.build({"target": "dense", **PARALLEL}).settled(earlier=earlier).dense_share == 1.0

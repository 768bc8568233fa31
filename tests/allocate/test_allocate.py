"""Where zeros go: exact totals, bounds, least cost; which recipes measure what, and what they refuse."""

import itertools
import math
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from fistapruner import Recipe
from fistapruner.allocate.allocate import choose_patterns, split_budget
from fistapruner.allocate.curves import (
    POINTS,
    bounds,
    patterns_measured,
    predicted_cost,
    row_error_curves,
    sampled_rows,
    sparsity_grid,
)
from fistapruner.allocate.measure import (
    check_allocation,
    differentiates,
    measured_by,
    needs_measuring,
    permutes,
    weighs_rows,
)
from fistapruner.core import NM, Constraint, LayerProblem, Unstructured, parse_sparsity
from fistapruner.errors import FistaPrunerError
from fistapruner.measure.inspection import inspect_checkpoint

SIZES = st.lists(st.integers(40, 5000), min_size=1, max_size=6)
FRACTIONS = st.floats(0.05, 0.9)


@settings(deadline=None, max_examples=40)
@given(SIZES, FRACTIONS, st.integers(0, 1000))
def test_the_total_is_exact_and_every_operator_within_its_bounds(counts: list[int], fraction: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = {f"op{number}": count for number, count in enumerate(counts)}
    curves = {
        name: torch.rand(POINTS, generator=generator).cumsum(0) * 10 ** (4 * torch.rand(1, generator=generator))
        for name in sizes
    }
    split = split_budget(curves, sizes, fraction)
    assert sum(pattern.zeros(1, sizes[name]) for name, pattern in split.items()) == sum(
        Unstructured(fraction).zeros(1, size) for size in sizes.values()
    )
    low, high = bounds(fraction)
    for name, pattern in split.items():
        assert low - 1 / sizes[name] <= pattern.fraction <= high + 1 / sizes[name]
        assert parse_sparsity(str(pattern)) == pattern


def test_the_split_is_the_cheapest_one() -> None:
    sizes = {"a": 1000, "b": 1000, "c": 1000}
    grid = torch.tensor(sparsity_grid(0.5))
    curves = {"a": (4 * grid).exp(), "b": 3 * (5 * grid).exp(), "c": 0.3 * (6 * grid).exp()}

    def cost(fractions: tuple[float, ...]) -> float:
        return sum(
            float(torch.exp(torch.log(curves[name][0]) + k * (f - float(grid[0]))))
            for name, k, f in zip("abc", (4, 5, 6), fractions, strict=True)
        )

    split = split_budget(curves, sizes, 0.5)
    found = cost(tuple(split[name].fraction for name in "abc"))
    low, high = bounds(0.5)
    choices = torch.linspace(low, high, 61).tolist()
    best = min(cost((a, b, 1.5 - a - b)) for a, b in itertools.product(choices, choices) if low <= 1.5 - a - b <= high)
    assert found <= best * 1.002


def test_curves_give_zeros_to_dead_inputs_first() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(300, 32, generator=generator), torch.randn(64, 32, generator=generator)
    inputs[:, ::2] = 0
    (curve,) = row_error_curves(
        LayerProblem.from_activations(weight, inputs), [64], [Unstructured(0.4), Unstructured(0.6)]
    )
    assert float(curve[0].abs().max()) <= 1e-4 * float(curve[1].mean())


def test_some_rows_stand_for_all() -> None:
    """Curves are of every fourth row of each operator; the cost of all rows is predicted from them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(480, 24, generator=generator) * (0.5 + torch.rand(480, 1, generator=generator))
    inputs = torch.randn(400, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    problem = LayerProblem.from_activations(weight, inputs)
    sensitivity = 0.1 + torch.rand(480, generator=generator)
    curves = row_error_curves(problem, [320, 160], patterns_measured(Unstructured(0.5)))
    assert [curve.shape[1] for curve in curves] == [80, 80]
    for curve, rows in zip(curves, (slice(0, 320), slice(320, 480)), strict=True):
        own = sensitivity[rows]
        estimate = predicted_cost(curve, own)
        exact = predicted_cost(torch.ones(POINTS, len(own[sampled_rows(len(own))])), own)
        assert exact.tolist() == pytest.approx([float(own.sum()) / 2] * POINTS)
        assert bool((estimate.diff() > 0).all())
    assert predicted_cost(torch.ones(POINTS, 80), torch.zeros(320)).tolist() == [0.0] * POINTS


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 50), min_size=2, max_size=4),
    st.sampled_from([NM(2, 4), NM(4, 8)]),
    st.sampled_from([0.1, 0.46, 0.5, 0.6]),
    st.integers(0, 999),
)
def test_chosen_patterns_cost_least(counts: list[int], pattern: NM, total: float, seed: int) -> None:
    """No choice with as many zeros costs less, where curves are convex; one operator more is changed at most."""
    patterns = patterns_measured(pattern)
    generator = torch.Generator().manual_seed(seed)
    sizes = {str(number): 8 * count for number, count in enumerate(counts)}
    shares = torch.tensor([each.fraction for each in patterns], dtype=torch.float64)
    curves = {
        name: size * shares.pow(1 + 4 * float(torch.rand(1, generator=generator))) * torch.rand(1, generator=generator)
        for name, size in sizes.items()
    }
    chosen = choose_patterns(curves, sizes, patterns, total)
    zeros = {name: chosen[name].fraction * size for name, size in sizes.items()}
    asked = total * sum(sizes.values())
    assert asked - 1e-9 <= sum(zeros.values()) < asked + 0.5 * max(sizes.values())

    def cost(choice: Iterable[Constraint]) -> float:
        return sum(float(curves[name][patterns.index(each)]) for name, each in zip(sizes, choice, strict=True))

    rivals = (
        cost(choice)
        for choice in itertools.product(patterns, repeat=len(sizes))
        if sum(each.fraction * size for each, size in zip(choice, sizes.values(), strict=True))
        >= sum(zeros.values()) - 1e-9
    )
    assert cost(chosen.values()) <= min(rivals) * (1 + 1e-9)


@pytest.mark.parametrize(("other", "chosen"), [(7.0, ["2:4", "0%"]), (2.0, ["0%", "2:4"])])
def test_a_cheap_second_step_comes_with_the_dear_first_one(other: float, chosen: list[str]) -> None:
    """Of an operator that loses 10, then 1, and of one that loses as much in either step: the least sum."""
    curves = {"a": torch.tensor([0.0, 10.0, 11.0, 60.0]), "b": torch.tensor([0.0, other, 2 * other, 60.0])}
    found = choose_patterns(curves, dict.fromkeys("ab", 400), patterns_measured(NM(2, 4)), 0.25)
    assert [str(found[name]) for name in "ab"] == chosen


@pytest.mark.parametrize(
    ("method", "sparsity", "measured", "reorders"),
    [
        ("proximal", "50%", "error", False),
        ("proximal", "2:4", None, True),
        ("sparsegpt+proximal", "50%", "error", False),
        ("sparsegpt+refit", "50%", None, False),
        ("sparsegpt+refit", "2:4", None, False),
    ],
)
def test_auto_measures_for_our_own_method_where_the_pattern_leaves_a_choice(
    method: str, sparsity: str, measured: str | None, reorders: bool
) -> None:
    recipe = Recipe.build({"method": method, "allocation": "auto", "sparsity": sparsity})
    check_allocation(recipe)
    assert measured_by(recipe) == measured
    assert permutes(recipe) == reorders
    assert differentiates(recipe) == (measured is not None)
    assert needs_measuring(recipe) == (measured is not None or reorders)


@pytest.mark.parametrize(
    ("settings", "weighs"),
    [
        ({"sparsity": "2:4"}, False),
        ({"sparsity": "2:4", "allocation": {"down_proj": "50%"}}, True),
        ({"sparsity": "2:4", "allocation": {"down_proj": "1:4"}}, False),
        ({"sparsity": "2:4", "allocation": {"down_proj": "0%"}}, False),
        ({"sparsity": "2:4", "allocation": {"down_proj": "50%"}, "method": "wanda"}, False),
        ({"sparsity": "50%", "allocation": {"down_proj": "2:4"}}, True),
        ({"structure": "25%", "weighting": "auto"}, False),
        ({"structure": "25%", "weighting": "auto", "allocation": {"down_proj": "0%"}}, False),
        ({"structure": "25%", "weighting": "auto", "allocation": {"down_proj": "50%"}}, True),
    ],
)
def test_rows_are_weighted_where_those_of_some_operator_compete(settings: dict[str, object], weighs: bool) -> None:
    assert weighs_rows(Recipe.build({"weighting": "fisher", **settings})) == weighs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"allocation": "owl", "sparsity": "2:4"}, "allocation 'owl' cannot be used with 2:4"),
        ({"allocation": "error", "structure": "25%"}, "allocation 'error' cannot be used with 0%"),
        ({"allocation": "owl", "structure": "experts=1", "sparsity": "50%"}, "where experts are removed"),
        ({"weighting": "fisher", "structure": "experts=1", "sparsity": "50%"}, "where experts are removed"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(FistaPrunerError, match=message):
        check_allocation(Recipe.build(settings))
    check_allocation(Recipe.build({"allocation": "error", "sparsity": "2:4"}))


@pytest.mark.parametrize("allocation", ["error", "owl"])
def test_at_a_sparsity_that_keeps_nothing_of_small_operators_the_total_is_still_exact(
    tmp_path: Path, allocation: str
) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 1}
    report = tiny.prune(tmp_path, "llama", sizes, sparsity="99.9%", allocation=allocation)
    sizes = [math.prod(operator.shape) for operator in report.operators]
    assert report.totals.operator_zeros == sum(round(0.999 * size) for size in sizes)


def test_operators_of_a_run_take_n_of_m_patterns_of_their_own(tmp_path: Path) -> None:
    report = tiny.prune(tmp_path, sparsity="2:4", method="wanda", allocation="error")
    patterns = {entry.sparsity for entry in report.operators}
    assert patterns <= {"0%", "3:4", "2:4", "1:4"}
    assert len(patterns) > 1
    assert 0 <= report.totals.operator_zeros / report.totals.operator_weights - 0.5 < 0.05
    assert inspect_checkpoint(tmp_path / "run" / "model").violations == []


@pytest.mark.parametrize("pattern", [NM(3, 5), NM(7, 10), NM(2, 5), NM(2, 4)], ids=str)
def test_alike_operators_get_the_pattern_that_is_asked(pattern: NM) -> None:
    """Its zeros are enough: shares that are not whole in binary, such as 0.4, take no further step."""
    patterns = patterns_measured(pattern)
    curve = torch.tensor([each.fraction**2 for each in patterns])
    names = "abcd"
    chosen = choose_patterns(dict.fromkeys(names, curve), dict.fromkeys(names, 57600), patterns, pattern.fraction)
    assert chosen == dict.fromkeys(names, pattern)

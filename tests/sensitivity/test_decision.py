"""Splitting a budget of zeros: exact totals, bounds, optimality; OWL's mapping."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from fistapruner.sensitivity.decision import (
    _allocate,
    check_allocation,
    chooses_widths,
    differentiates,
    flags_without_measuring,
    measured_by,
    needs_measuring,
    permutes,
    weighs_rows,
)
from fistapruner.sensitivity.error_curves import (
    POINTS,
    _threshold,
    bounds,
    choose_patterns,
    patterns_measured,
    predicted_cost,
    row_error_curves,
    sampled_rows,
    sparsity_grid,
    split_budget,
)
from fistapruner.sensitivity.owl import OWL_REACH, outlier_share, owl_allocation
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from fistapruner import Recipe, prune
from fistapruner.core import NM, Constraint, LayerProblem, Unstructured, parse_sparsity
from fistapruner.errors import FistaPrunerError
from fistapruner.evaluation.inspection import inspect_checkpoint

SIZES = st.lists(st.integers(40, 5000), min_size=1, max_size=6)
FRACTIONS = st.floats(0.05, 0.9)


def budget(sizes: dict[str, int], fraction: float) -> int:
    return sum(Unstructured(fraction).zeros(1, size) for size in sizes.values())


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
    assert sum(pattern.zeros(1, sizes[name]) for name, pattern in split.items()) == budget(sizes, fraction)
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


def test_equal_curves_share_equally() -> None:
    curve = torch.logspace(0, 2, POINTS)
    split = split_budget({"a": curve, "b": curve}, {"a": 3000, "b": 3000}, 0.6)
    assert split["a"].fraction == pytest.approx(0.6, abs=0.003)
    assert split["b"].fraction == pytest.approx(0.6, abs=0.003)


@pytest.mark.parametrize("rows", [2048, 1536])
def test_thresholds_of_curves_see_all_columns(rows: int) -> None:
    """A sample with a stride that divides the columns would see some of them only."""
    columns = 4096
    spread = torch.randn(columns, generator=torch.Generator().manual_seed(0)).exp()
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) * spread
    dropped = (scores <= _threshold(scores, 0.5)).float().mean()
    assert float(dropped) == pytest.approx(0.5, abs=0.01)


def test_curves_give_zeros_to_dead_inputs_first() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(300, 32, generator=generator), torch.randn(64, 32, generator=generator)
    inputs[:, ::2] = 0
    (curve,) = row_error_curves(
        LayerProblem.from_activations(weight, inputs), [64], [Unstructured(0.4), Unstructured(0.6)]
    )
    assert float(curve[0].abs().max()) <= 1e-4 * float(curve[1].mean())


def test_error_curves_rise_with_sparsity() -> None:
    torch.manual_seed(0)
    problem = LayerProblem.from_activations(torch.randn(24, 32), torch.randn(200, 32) @ torch.randn(32, 32))
    (curve,) = row_error_curves(problem, [24], patterns_measured(Unstructured(0.5)))
    assert curve.shape == (POINTS, 24)
    assert bool((curve.sum(1).diff() > 0).all())


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


@settings(deadline=None, max_examples=40)
@given(SIZES, FRACTIONS, st.integers(0, 1000))
def test_owl_keeps_more_where_outliers_are_and_its_total_is_exact(
    counts: list[int], fraction: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shares = {layer: float(torch.rand(1, generator=generator)) for layer in range(len(counts))}
    members = {layer: {f"{layer}.a": count, f"{layer}.b": 2 * count} for layer, count in enumerate(counts)}
    sizes = {name: size for group in members.values() for name, size in group.items()}
    split = owl_allocation(shares, members, fraction)
    assert sum(pattern.zeros(1, sizes[name]) for name, pattern in split.items()) == budget(sizes, fraction)
    assert max(abs(pattern.fraction - fraction) for pattern in split.values()) <= 2 * OWL_REACH + 0.03
    order = sorted(shares, key=lambda layer: shares[layer])
    slack = 1 / min(counts)
    for less, more in itertools.pairwise(order):
        assert split[f"{more}.a"].fraction <= split[f"{less}.a"].fraction + slack


def test_outliers_are_counted_against_the_mean_of_the_layer() -> None:
    weight = torch.ones(2, 10)
    weight[0, 0] = 100.0
    assert outlier_share([(weight, torch.ones(10))]) == 1 / 20
    # Beside an operator with large scores everywhere it is an outlier no more.
    assert outlier_share([(weight, torch.ones(10)), (torch.full((2, 10), 50.0), torch.ones(10))]) == 0.0


def test_owl_of_a_fixed_pattern_is_refused() -> None:
    with pytest.raises(FistaPrunerError, match="allocation 'owl' cannot be used with 2:4"):
        check_allocation(Recipe.build({"allocation": "owl", "sparsity": "2:4"}))
    check_allocation(Recipe.build({"allocation": "error", "sparsity": "2:4"}))


@pytest.mark.parametrize(
    ("sparsity", "allocation", "said"),
    [
        ("50%", "error:46%", "is for n:m patterns.*take --sparsity 46% --allocation error"),
        ("2:4", "error:80%", "more zeros than the patterns beside 2:4 can give: at most 75% is possible"),
        ("2:4", "error:many", "followed by the share of zeros of all operators together: error:46%"),
    ],
)
def test_totals_that_cannot_be_met_are_refused(sparsity: str, allocation: str, said: str) -> None:
    with pytest.raises(FistaPrunerError, match=said):
        check_allocation(Recipe.build({"allocation": allocation, "sparsity": sparsity}))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (NM(2, 4), ["0%", "3:4", "2:4", "1:4"]),
        (NM(1, 4), ["0%", "3:4", "2:4", "1:4"]),
        (NM(4, 8), ["0%", "7:8", "6:8", "5:8", "4:8", "3:8"]),
        (NM(1, 2), ["0%", "1:2"]),
    ],
)
def test_patterns_that_an_operator_may_have_instead(pattern: NM, names: list[str]) -> None:
    assert [str(each) for each in patterns_measured(pattern)] == names


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


@pytest.mark.parametrize("total", [0.46, 0.54])
def test_what_no_token_reaches_has_the_pattern_that_is_asked_and_the_total_holds(total: float) -> None:
    """So that the others make up for it, to within one step of one operator."""
    recipe = Recipe.build({"sparsity": "2:4", "allocation": f"error:{total}"})
    patterns = patterns_measured(NM(2, 4))
    known = {f"op{number}": 40 for number in range(20)}
    generator = torch.Generator().manual_seed(0)
    curves = {name: torch.rand(4, generator=generator).cumsum(0).cumsum(0) for name in known}
    sizes = {**known, "expert": 800}
    found, _ = _allocate(recipe, None, {"": curves}, known, sizes, patterns)
    assert found["expert"] == NM(2, 4)
    zeros = sum(found[name].fraction * size for name, size in sizes.items())
    assert total * 1600 <= zeros < total * 1600 + 0.5 * 40


def test_an_operator_that_costs_nothing_gives_its_zeros_first() -> None:
    patterns = patterns_measured(NM(2, 4))
    dear, cheap = torch.tensor([0.0, 5.0, 20.0, 60.0]), torch.tensor([0.0, 1e-3, 2e-3, 4e-3])
    chosen = choose_patterns({"a": dear, "b": cheap, "c": cheap}, dict.fromkeys("abc", 400), patterns, 0.5)
    assert [str(chosen[name]) for name in "abc"] == ["0%", "1:4", "1:4"]


@pytest.mark.parametrize("pattern", [NM(3, 5), NM(7, 10), NM(2, 5), NM(2, 4)], ids=str)
def test_alike_operators_get_the_pattern_that_is_asked(pattern: NM) -> None:
    """Its zeros are enough: shares that are not whole in binary, such as 0.4, take no further step."""
    patterns = patterns_measured(pattern)
    curve = torch.tensor([each.fraction**2 for each in patterns])
    names = "abcd"
    chosen = choose_patterns(dict.fromkeys(names, curve), dict.fromkeys(names, 57600), patterns, pattern.fraction)
    assert chosen == dict.fromkeys(names, pattern)


@pytest.mark.parametrize(("other", "chosen"), [(7.0, ["2:4", "0%"]), (2.0, ["0%", "2:4"])])
def test_a_cheap_second_step_comes_with_the_dear_first_one(other: float, chosen: list[str]) -> None:
    """Of an operator that loses 10, then 1, and of one that loses as much in either step: the least sum."""
    curves = {"a": torch.tensor([0.0, 10.0, 11.0, 60.0]), "b": torch.tensor([0.0, other, 2 * other, 60.0])}
    found = choose_patterns(curves, dict.fromkeys("ab", 400), patterns_measured(NM(2, 4)), 0.25)
    assert [str(found[name]) for name in "ab"] == chosen


@given(st.integers(1, 10**9).flatmap(lambda size: st.tuples(st.integers(0, size - 1), st.just(size))))
def test_a_sparsity_is_written_so_that_it_reads_back_to_the_same_zeros(pair: tuple[int, int]) -> None:
    zeros, size = pair
    pattern = Unstructured(zeros / size)
    assert parse_sparsity(str(pattern)) == pattern
    assert pattern.zeros(1, size) == zeros


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


@pytest.mark.parametrize("method", ["proximal", "wanda"])
@pytest.mark.parametrize("sparsity", ["50%", "2:4", "0%"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"allocation": "owl", "weighting": "fisher"},
        {"reconstruct": 8, "permutation": "channels"},
        {"structure": {"remove": "25%", "widths": "free"}},
    ],
)
def test_flags_without_measuring_are_those_of_which_each_measures(method: str, sparsity: str, more: Any) -> None:
    def measures(settings: dict[str, Any]) -> bool:
        recipe = Recipe.build(settings).resolved()
        return needs_measuring(recipe) or chooses_widths(recipe)

    settings = {"method": method, "sparsity": sparsity, **more}
    words = flags_without_measuring(Recipe.build(settings).resolved()).split()
    flags = {flag[2:]: value for flag, value in zip(words[::2], words[1::2], strict=True)}
    assert bool(flags) == measures(settings)

    def applied(some: Iterable[str]) -> dict[str, Any]:
        structure = {"structure": {**more["structure"], "widths": flags["widths"]}} if "widths" in some else {}
        return {**settings, **{flag: flags[flag] for flag in some if flag != "widths"}, **structure}

    assert not measures(applied(flags))
    for left in flags:
        assert measures(applied([flag for flag in flags if flag != left]))


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


@pytest.mark.parametrize("allocation", ["error", "owl"])
def test_at_a_sparsity_that_keeps_nothing_of_small_operators_the_total_is_still_exact(
    tmp_path: Path, allocation: str
) -> None:
    model = tiny.save("llama", tmp_path / "model", hidden_size=8, intermediate_size=12, num_attention_heads=2)
    settings = {"source": "python", "samples": 3, "seqlen": 16}
    report = prune(str(model), tmp_path / "run", sparsity="99.9%", allocation=allocation, calibration=settings)
    sizes = [math.prod(operator.shape) for operator in report.operators]
    assert report.totals.operator_zeros == sum(round(0.999 * size) for size in sizes)


@pytest.mark.parametrize(
    ("method", "allocation", "total"),
    [("proximal", "error", 0.5), ("wanda", "error", 0.5), ("wanda", "error:0.4", 0.4)],
)
def test_operators_of_a_run_take_patterns_of_their_own(
    tmp_path: Path, method: str, allocation: str, total: float
) -> None:
    source = tiny.save("llama", tmp_path / "model")
    calibration = {"source": "self", "samples": 4, "seqlen": 16}
    report = prune(
        str(source), tmp_path / "run", sparsity="2:4", method=method, allocation=allocation, calibration=calibration
    )
    patterns = {entry.sparsity for entry in report.operators}
    assert patterns <= {"0%", "3:4", "2:4", "1:4"}
    assert len(patterns) > 1
    assert report.totals.operator_zeros is not None
    assert report.totals.operator_weights is not None
    assert 0 <= report.totals.operator_zeros / report.totals.operator_weights - total < 0.05
    assert inspect_checkpoint(tmp_path / "run" / "model").violations == []

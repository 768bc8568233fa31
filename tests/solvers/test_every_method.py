"""Properties that every solver, every refinement and every constraint must have."""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fistapruner import FistaPrunerError
from fistapruner.core import NM, Constraint, LayerProblem, Unstructured
from fistapruner.core.constraints import stack
from fistapruner.solvers import METHODS, Solution, parse_method, setting, solve
from fistapruner.solvers.scores import Magnitude
from layer_problems import (
    CHAINS,
    DRIFTS,
    REFINEMENTS,
    SOLVERS,
    activations,
    error,
    every_constraint,
    linear,
    make_problem,
)

over_every_chain = pytest.mark.parametrize("chain", CHAINS)


def relative(solution: Solution) -> list[float]:
    return [stats["relative_error"] for stats in solution.stats]


def check_pattern(solution: Solution, rows: tuple[int, ...], constraints: list[Constraint]) -> None:
    assert bool(torch.isfinite(solution.weight).all())
    assert not bool(solution.weight[~solution.mask].any())
    for mask, weight, constraint in zip(
        solution.mask.split(rows), solution.weight.split(rows), constraints, strict=True
    ):
        assert int((~mask).sum()) == constraint.zeros(*mask.shape)
        assert constraint.satisfies(weight)


@over_every_chain
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_exact_pattern_for_any_shape(chain: str, data: st.DataObject) -> None:
    m = data.draw(st.sampled_from([2, 4, 5, 8]), label="group")
    n = m * data.draw(st.integers(1, 6), label="groups")
    rows = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3), label="rows"))
    pattern = st.one_of(st.floats(0.0, 0.95).map(Unstructured), st.integers(1, m - 1).map(lambda kept: NM(kept, m)))
    patterns = [data.draw(pattern) for _ in rows]
    problem = make_problem(
        sum(rows), n, tokens=data.draw(st.sampled_from([3, 60])), drift=data.draw(st.sampled_from([0.0, 0.1]))
    )
    check_pattern(solve(problem, stack(patterns, rows), chain), rows, patterns)


@over_every_chain
@pytest.mark.parametrize("constraint", every_constraint(), ids=str)
def test_every_method_takes_every_constraint(chain: str, constraint: Constraint) -> None:
    problem = make_problem(11, 8 * constraint.group_length, drift=0.1, target=0.5)
    check_pattern(solve(problem, constraint, chain), (11,), [constraint])


@over_every_chain
@pytest.mark.parametrize("patterns", [("50%", "0%", "70%"), ("2:4", "50%", "4:8")])
def test_stacked_is_one_by_one_with_the_same_bits_every_time(chain: str, patterns: tuple[str, ...]) -> None:
    problem = make_problem(48, drift=0.05, target=0.5)
    stacked = stack(patterns, (16, 8, 24))
    together, again = solve(problem, stacked, chain), solve(problem, stacked, chain)
    assert torch.equal(together.weight, again.weight)
    for number, (name, rows, constraint) in enumerate(stacked.parts()):
        alone = solve(problem.slice(rows, name), constraint, chain)
        assert torch.equal(together.weight[rows], alone.weight)
        assert torch.equal(together.mask[rows], alone.mask)
        assert relative(together)[number] == relative(alone)[0] == problem.slice(rows).relative_error(alone.weight)
        if not constraint.fraction:
            assert torch.equal(alone.weight, problem.weight[rows])


def test_a_stack_of_other_rows_is_named() -> None:
    with pytest.raises(FistaPrunerError, match=r"fc1: 16 rows.* \(8, 9\)"):
        solve(make_problem(16), stack("2:4", (8, 9)))


@pytest.mark.parametrize("sparsity", ["50%", "70%", "2:4"])
@pytest.mark.parametrize(("drift", "target"), [*DRIFTS, (0.1, 0.0)])
@pytest.mark.parametrize("name", ["fista", "proximal", *REFINEMENTS])
def test_never_worse_than_the_step_before(name: str, sparsity: str, drift: float, target: float) -> None:
    problem = make_problem(24, drift=drift, target=target)
    for before in ("sparsegpt", "magnitude"):
        (stats,) = solve(problem, sparsity, f"{before}+{name}").stats
        first, last = (step["relative_error"] for step in stats["steps"])
        assert last <= first * (1 + 1e-6)
        assert stats["steps"][-1].get("start_kept", first == last) == (first == last)


@pytest.mark.parametrize("chain", [chain for chain in CHAINS if chain != "magnitude"])
@pytest.mark.parametrize("sparsity", ["60%", "2:4"])
def test_beats_magnitude(chain: str, sparsity: str) -> None:
    problem = make_problem(48, 64)
    assert relative(solve(problem, sparsity, chain)) < relative(solve(problem, sparsity, "magnitude"))


@over_every_chain
@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
def test_the_scale_of_activations_and_the_order_of_rows_change_nothing(chain: str, sparsity: str) -> None:
    problem = make_problem(32)
    scaled = replace(problem, gram=problem.gram * 2.0**-12, energy=None)  # a power of four: roots stay exact, too
    one, two = solve(problem, sparsity, chain), solve(scaled, sparsity, chain)
    assert relative(one) == pytest.approx(relative(two), rel=2e-3)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    permuted = solve(problem.slice(order), sparsity, chain)
    assert relative(one) == pytest.approx(relative(permuted), rel=1e-3)
    assert float((one.mask[order] == permuted.mask).float().mean()) > 0.99


@over_every_chain
@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
def test_gradients_layout_and_type_of_the_tensors_change_nothing(chain: str, sparsity: str) -> None:
    problem = make_problem(20)
    weight, gram = problem.weight.half().float(), problem.gram.bfloat16().float()
    expected = solve(replace(problem, weight=weight, gram=gram), sparsity, chain).weight
    for other, other_gram in (
        (weight.clone().requires_grad_(), gram),
        (weight.T.contiguous().T, gram.T.contiguous().T),
        (weight.double(), gram.double()),
        (weight.half(), gram.bfloat16()),
    ):
        before = other.clone()
        assert torch.equal(solve(replace(problem, weight=other, gram=other_gram), sparsity, chain).weight, expected)
        assert torch.equal(other, before)
    with torch.inference_mode():
        assert torch.equal(solve(replace(problem, weight=weight, gram=gram), sparsity, chain).weight, expected)


NEAR = [*itertools.product(("proximal", "sparsegpt+swap", "wanda+swap"), ((0.0, 1.0), (0.3, 0.5), (0.3, 1.0)))]


@pytest.mark.parametrize(("chain", "drift"), [("alps", (0.0, 1.0)), *NEAR])
def test_near_the_best_of_all_masks_on_tiny_problems(chain: str, drift: tuple[float, float]) -> None:
    """Brute force over every 2:4 mask of a row of eight inputs, each with its least-squares weights."""
    ratios: list[float] = []
    for seed in range(6):
        problem = make_problem(6, 8, seed=seed, drift=drift[0], target=drift[1])
        problem = replace(problem, tokens=None)  # judged on this very Gram
        found = error(problem, solve(problem, "2:4", f"{chain}+refit").weight)
        ratios += (found / _best_errors(problem)).tolist()
    assert min(ratios) > 1 - 1e-3  # nothing beats the optimum
    assert sum(ratio < 1 + 1e-3 for ratio in ratios) >= len(ratios) / 2
    assert sorted(ratios)[len(ratios) // 2] < 1.05


def _best_errors(problem: LayerProblem) -> Tensor:
    gram, right = problem.gram.double(), linear(problem)
    pairs = list(itertools.combinations(range(4), 2))
    errors = []
    for left, last in itertools.product(pairs, pairs):
        kept = [*left, *(4 + i for i in last)]
        weight = torch.zeros_like(right)
        weight[:, kept] = torch.linalg.solve(gram[kept][:, kept], right[:, kept].T).T
        errors.append(error(problem, weight))
    return torch.stack(errors).amin(0)


def spoil(inputs: Tensor, how: str) -> Tensor:
    if how == "dead":
        inputs[:, 5:9] = 0
    elif how == "collinear":
        inputs[:, 1], inputs[:, 20] = inputs[:, 0], -3 * inputs[:, 7]
    elif how == "massive":
        inputs[:, 4] *= 3e3
    return {"few tokens": inputs[:5], "tiny": inputs * 1e-8, "all dead": inputs * 0}.get(how, inputs)


@pytest.mark.parametrize("how", ["dead", "all dead", "collinear", "few tokens", "massive", "tiny"])
@pytest.mark.parametrize("chain", [*CHAINS, "proximal+swap"])
@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
def test_hard_grams(chain: str, how: str, sparsity: str) -> None:
    inputs = spoil(activations(40, 300), how)
    weight = torch.randn(13, 40, generator=torch.Generator().manual_seed(0))
    solution = solve(LayerProblem.from_activations(weight, inputs, name="fc1"), sparsity, chain)
    assert bool(torch.isfinite(solution.weight).all())
    assert int((~solution.mask).sum()) == 13 * 20
    assert relative(solution)[0] <= 1.0
    assert all("fc1" in warning for warning in solution.warnings)


@over_every_chain
def test_weights_of_dead_inputs_go_first_and_those_that_stay_are_dense(chain: str) -> None:
    """They change no output, so the error is that of a problem without them."""
    inputs = activations(48, 400)
    inputs[:, ::4] = 0
    alive = torch.arange(48) % 4 > 0
    weight = torch.randn(13, 48, generator=torch.Generator().manual_seed(0))
    solution = solve(LayerProblem.from_activations(weight, inputs), "50%", chain)
    fewer = solve(LayerProblem.from_activations(weight, inputs), "10%", chain)
    if chain != "magnitude":
        assert not bool(solution.mask[:, ~alive].any())
        without = solve(LayerProblem.from_activations(weight[:, alive], inputs[:, alive]), 1 / 3, chain)
        assert relative(solution) == pytest.approx(relative(without), rel=0.1)
    stays = fewer.mask & ~alive
    assert bool(stays.any())
    assert torch.equal(fewer.weight[stays], weight[stays])
    if "proximal" in chain:
        assert weight[stays].abs().mean() > 3 * weight[~fewer.mask & ~alive].abs().mean()


@over_every_chain
@pytest.mark.parametrize("shape", [(1, 8), (1, 1), (3, 130), (129, 7), (70, 131)])
def test_awkward_shapes(chain: str, shape: tuple[int, int]) -> None:
    check_pattern(solve(make_problem(*shape), 0.5, chain), shape[:1], [Unstructured(0.5)])


@pytest.mark.parametrize("sparsity", ["0.5%", "1%"])
def test_alps_ends_where_few_weights_become_zero(sparsity: str) -> None:
    (stats,) = solve(make_problem(64, 64), sparsity, "alps").stats
    assert stats["steps"][0]["iterations"] <= 60


@dataclass(frozen=True)
class Warns(Magnitude):
    """A newcomer: one class, which a chain takes as it is."""

    name = "warns"
    takes_start = True

    said: float = setting(1.0, "What it says.", above=0.0)

    def solve(self, problem: LayerProblem, constraint: Constraint, start: Solution | None = None) -> Solution:
        found = super().solve(problem, constraint, start)
        return replace(found, weight=found.weight * self.said, warnings=(f"fc1: {self.said:g}",))


def test_a_newcomer_takes_its_place_in_a_chain() -> None:
    problem = make_problem(8, 16)
    found = solve(problem, "2:4", [Warns(), "refit", Warns(said=2)])
    assert found.warnings == ("fc1: 1", "fc1: 2")
    assert torch.equal(found.weight, 2 * solve(problem, "2:4", "magnitude").weight)
    with pytest.raises(FistaPrunerError, match=r"fc1: Warns.*1e\+300.* NaN or infinite"):
        solve(problem, "2:4", Warns(said=1e300))
    with pytest.raises(FistaPrunerError, match="fc1: the weights contain NaN"):
        solve(replace(problem, weight=problem.weight / 0, energy=torch.ones(8)), "2:4", Warns())


WRONG: list[tuple[Any, str]] = [
    ({"fista": {"penalty": "mine"}}, "method fista: penalty 'mine'.*relative or published"),
    ({"fista": {"warm_start": 3}}, "method fista: warm_start 3: auto or sparsegpt"),
    ({"fista": {"penaltty": 1}}, "method fista: .*'penaltty'.*penalty"),
    ({"alps": {"iterations": 1}}, "method alps: unknown setting 'iterations': it has none"),
    (7, "method 7 is"),
    ([], r"method \[\] is"),
    ("wnada", "method 'wnada'.*wanda"),
    ([{"wanda": {}, "refit": {}}], "method .*'refit'.* is not a name"),
    *((name, f"'{name}'.* wanda\\+{name}") for name in REFINEMENTS),
    *((f"wanda+refit+{name}", rf"'{name}'.*'wanda\+refit'") for name in SOLVERS if name not in ("fista", "proximal")),
]


@pytest.mark.parametrize(("method", "message"), WRONG, ids=[str(method) for method, _ in WRONG])
def test_wrong_methods_and_settings_are_named(method: Any, message: str) -> None:
    with pytest.raises(FistaPrunerError, match=message):
        parse_method(method)


@over_every_chain
def test_settings_are_read_back(chain: str) -> None:
    for step in parse_method(chain):
        again = parse_method(
            [{step.name: step.settings()}] if not step.refines else ["wanda", {step.name: step.settings()}]
        )
        assert again[-1] == step
        assert step.settings().keys() == METHODS[step.name].descriptions().keys()

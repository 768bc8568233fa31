"""Properties that every solver and every refinement must have."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fistapruner.pruning.partition import cut, part_of, solve_in_parts
from fistapruner.solvers.conditioning import shared_gram
from fistapruner.solvers.magnitude import Magnitude
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layer_problems import make_problem
from torch import Tensor

from fistapruner import FistaPrunerError, LayerProblem
from fistapruner.core import NM, Unstructured, parse_sparsity
from fistapruner.solvers import METHODS, parse_method, solve
from fistapruner.solvers.base import Method, Solution

SOLVERS = [name for name, method in METHODS.items() if not method.refines]
REFINEMENTS = [name for name, method in METHODS.items() if method.refines]
CHAINS = SOLVERS + [f"wanda+{name}" for name in REFINEMENTS]
USES_DATA = [chain for chain in CHAINS if chain != "magnitude"]
RESELECTS = [chain for chain in CHAINS if chain not in ("magnitude", "wanda")]


@pytest.mark.parametrize("chain", CHAINS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_exact_pattern_for_any_shape(chain: str, data: st.DataObject) -> None:
    m = data.draw(st.sampled_from([2, 4, 5, 8]), label="group")
    n = m * data.draw(st.integers(1, 6), label="groups")
    rows = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3), label="rows"))
    pattern = st.one_of(st.floats(0.0, 0.95).map(Unstructured), st.integers(1, m - 1).map(lambda kept: NM(kept, m)))
    patterns = [data.draw(pattern) for _ in rows]
    problem = make_problem(
        rows, n, tokens=data.draw(st.sampled_from([3, 60])), drift=data.draw(st.sampled_from([0.0, 0.1]))
    )
    solution = solve(problem, patterns, chain)
    assert bool(torch.isfinite(solution.weight).all())
    parts = zip(solution.weight.split(rows), solution.mask.split(rows), patterns, strict=True)
    for weight, mask, wanted in parts:
        assert int((~mask).sum()) == wanted.zeros(*weight.shape)
        assert wanted.satisfies(weight)
        assert not bool((weight[~mask] != 0).any())


@pytest.mark.parametrize("chain", CHAINS)
def test_dense_weights_at_sparsity_zero(chain: str) -> None:
    problem = make_problem()
    assert torch.equal(solve(problem, 0.0, chain).weight, problem.weight)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("other", ["2:4", "50%"])
def test_dense_weights_at_sparsity_zero_beside_other_operators(chain: str, other: str) -> None:
    """As solved alone; the other operators have the bits that the method gives them."""
    problem = make_problem((16, 8, 24), drift=0.05, target=0.5)
    parsed = [parse_sparsity(pattern) for pattern in (other, 0.0, other)]
    found = solve(problem, parsed, chain)
    alone = solve(problem.operators()[1], 0.0, chain)
    assert torch.equal(found.weight[16:24], problem.weight[16:24])
    assert bool(found.mask[16:24].all())
    assert [step.keys() for step in found.stats[1]["steps"]] == [step.keys() for step in alone.stats[0]["steps"]]
    for step in found.stats[1]["steps"]:
        assert step["relative_error"] == pytest.approx(alone.stats[0]["relative_error"], rel=1e-4)
    raw = None
    for step in parse_method(chain):
        raw = step.solve(problem, parsed, raw)
    assert raw is not None
    for rows in (slice(0, 16), slice(24, 48)):
        assert torch.equal(found.weight[rows], raw.weight[rows])
        assert torch.equal(found.mask[rows], raw.mask[rows])
    assert [record["relative_error"] for record in found.stats] == problem.relative_errors(found.weight)


@pytest.mark.parametrize("sparsity", ["50%", "70%", "2:4"])
@pytest.mark.parametrize(("drift", "target"), [(0.0, 1.0), (0.1, 1.0), (0.1, 0.5), (0.1, 0.0)])
@pytest.mark.parametrize("name", ["fista", "proximal", *REFINEMENTS])
def test_never_worse_than_the_step_before(name: str, sparsity: str, drift: float, target: float) -> None:
    problem = make_problem((24, 8), drift=drift, target=target)
    for before in ("sparsegpt", "magnitude"):
        errors = problem.errors(solve(problem, sparsity, before).weight)
        after = problem.errors(solve(problem, sparsity, f"{before}+{name}").weight)
        assert all(a <= b * (1 + 1e-6) for a, b in zip(after, errors, strict=True))


@pytest.mark.parametrize("chain", USES_DATA)
def test_beats_magnitude(chain: str) -> None:
    problem = make_problem((48,), 64)
    assert (
        solve(problem, 0.6, chain).stats[0]["relative_error"]
        < solve(problem, 0.6, "magnitude").stats[0]["relative_error"]
    )


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
def test_scaling_the_activations_changes_nothing(chain: str, sparsity: str) -> None:
    problem = make_problem((12, 20))
    factor = 2.0**-12  # a power of four: square roots stay exact too
    scaled = LayerProblem(
        weight=problem.weight, gram=problem.gram * factor, names=problem.names, rows=problem.rows, tokens=problem.tokens
    )
    one, two = solve(problem, sparsity, chain), solve(scaled, sparsity, chain)
    assert [r["relative_error"] for r in one.stats] == pytest.approx([r["relative_error"] for r in two.stats], rel=2e-3)


@pytest.mark.parametrize("chain", RESELECTS)
def test_permuting_rows_permutes_the_result(chain: str) -> None:
    problem = make_problem((24,))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    shuffled = LayerProblem(weight=problem.weight[order], gram=problem.gram, tokens=problem.tokens)
    one, two = solve(problem, "2:4", chain), solve(shuffled, "2:4", chain)
    assert one.stats[0]["relative_error"] == pytest.approx(two.stats[0]["relative_error"], rel=1e-3)
    assert float((one.mask[order] == two.mask).float().mean()) > 0.99


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("patterns", [("50%", "70%", "50%"), ("2:4", "50%", "4:8")])
def test_stacked_equals_one_by_one(chain: str, patterns: tuple[str, ...]) -> None:
    problem = make_problem((16, 8, 24), drift=0.05, target=0.5)
    parsed = [parse_sparsity(p) for p in patterns]
    # bf16 products round differently for different shapes: compare the algorithm, not that.
    steps = [{"proximal": {"fast": False}}] if chain == "proximal" else chain
    together = [record["relative_error"] for record in solve(problem, parsed, steps).stats]
    alone = [
        solve(part, pattern, steps).stats[0]["relative_error"]
        for part, pattern in zip(problem.operators(), parsed, strict=True)
    ]
    assert together == pytest.approx(alone, rel=2e-3)


@pytest.mark.parametrize("chain", CHAINS)
def test_same_bits_every_time(chain: str) -> None:
    problem = make_problem((16, 8))
    assert torch.equal(solve(problem, 0.5, chain).weight, solve(problem, 0.5, chain).weight)


@pytest.mark.parametrize(
    ("chain", "drift", "target"),
    [
        *((chain, 0.0, 1.0) for chain in ("proximal", "alps", "sparsegpt+swap", "wanda+swap")),
        *((chain, 0.3, share) for chain in ("proximal", "sparsegpt+swap", "wanda+swap") for share in (0.5, 1.0)),
    ],
)
def test_near_the_best_of_all_masks_on_tiny_problems(chain: str, drift: float, target: float) -> None:
    """Brute force over every 2:4 mask of a row of eight inputs, each with its least-squares weights."""
    ratios = []
    for seed in range(6):
        problem = replace(
            make_problem((6,), 8, seed=seed, drift=drift, target=target), tokens=None
        )  # judged on this very Gram
        solution = solve(problem, "2:4", f"{chain}+refit")
        errors = problem.row_errors(solution.weight)
        ratios += (errors / torch.tensor([_best_error(problem, row) for row in range(6)])).tolist()
    assert min(ratios) > 1 - 1e-3  # nothing beats the optimum
    assert sum(ratio < 1 + 1e-3 for ratio in ratios) >= len(ratios) / 2
    assert sorted(ratios)[len(ratios) // 2] < 1.05


def _best_error(problem: LayerProblem, row: int) -> float:
    gram, linear, weight = problem.gram.double(), problem.linear[row].double(), problem.weight[row].double()
    pulled = linear - weight @ gram  # by the drift
    constant = 0.0 if problem.drift_energy is None else problem.target**2 * float(problem.drift_energy[row])
    pairs = list(itertools.combinations(range(4), 2))
    best = float("inf")
    for left, right in itertools.product(pairs, pairs):
        kept = [*left, *(4 + i for i in right)]
        solved = torch.linalg.solve(gram[kept][:, kept], linear[kept])
        candidate = torch.zeros(8, dtype=torch.float64)
        candidate[kept] = solved
        change = candidate - weight
        best = min(best, float(change @ gram @ change - 2 * change @ pulled))
    return best + constant


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
def test_gradients_layout_and_type_of_the_tensors_change_nothing(chain: str, sparsity: str) -> None:
    problem = make_problem((8, 12))
    weight, gram = problem.weight.half().float(), problem.gram.bfloat16().float()
    expected = solve(replace(problem, weight=weight, gram=gram), sparsity, chain)
    ways = [
        (weight.clone().requires_grad_(), gram),
        (weight.T.contiguous().T, gram.T.contiguous().T),
        (weight.double(), gram.double()),
        (weight.half(), gram.bfloat16()),
    ]
    for other, other_gram in ways:
        found = solve(replace(problem, weight=other, gram=other_gram), sparsity, chain)
        assert torch.equal(found.weight, expected.weight)
        assert not found.weight.requires_grad


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("rows", [(4,), (1, 40)])
def test_a_sparsity_that_keeps_nothing_of_a_small_operator_gives_zeros(chain: str, rows: tuple[int, ...]) -> None:
    problem = make_problem(rows, 8)
    solution = solve(problem, "99.9%", chain)
    assert not bool(solution.weight.split(rows)[0].any())
    assert int((~solution.mask).sum()) == sum(round(0.999 * 8 * count) for count in rows)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        *(
            ({name: {"rho": value}}, f"method {name}: rho")
            for name in ("alps", "admm")
            for value in (math.nan, math.inf, 0, -1)
        ),
        *(({"proximal": {"rho": [0.1, value]}}, r"method proximal: rho\.1") for value in (math.nan, math.inf, 0, -1)),
        ({"proximal": {"rho": [1, 0.1]}}, r"method proximal: rho: \[1\.0, 0\.1\] falls"),
        *(
            ({"fista": {"penalty_interval": [value, 1]}}, r"penalty_interval\.0")
            for value in (math.nan, math.inf, 0, -1)
        ),
        ({"fista": {"penalty_interval": [1, 1e-7]}}, r"penalty_interval \[1\.0, 1e-07\] is empty"),
        (
            {"fista": {"penalty_interval": [1e-3, 1]}},
            r"penalty_start 1e-05 is outside penalty_interval \[0\.001, 1\.0\]",
        ),
        ({"sparsegpt": {"damping": math.inf}}, "method sparsegpt: damping"),
        ({"fista": {"tolerance": math.inf}}, "method fista: tolerance"),
    ],
)
def test_settings_without_a_meaning_are_refused(method: dict[str, object], message: str) -> None:
    with pytest.raises(FistaPrunerError, match=message):
        parse_method([method])


@pytest.mark.parametrize(
    "method", [{"alps": {"rho": 1e300}}, {"proximal": {"rho": [0.15, 1e300]}}, {"alps": {"damping": 1e300}}]
)
def test_settings_beyond_fp32_end_in_a_sentence(method: dict[str, object]) -> None:
    with pytest.raises(FistaPrunerError, match=r"operator0: .*1e\+300.* ended in NaN or infinite weights"):
        solve(make_problem(), "50%", [method])


@pytest.mark.parametrize("catalogued", [False, True])
def test_what_a_method_returns_is_checked(catalogued: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(rows=(8,), n=16)

    class Mine(Magnitude):
        name = "mine"

    def returning(change: Callable[[Solution], object]) -> Mine:
        class Changed(Mine):
            def solve(self, *given: Any) -> Any:
                return change(super().solve(*given))

        if catalogued:
            monkeypatch.setitem(METHODS, "mine", Changed)
        return Changed()

    def dense(found: Solution) -> Solution:
        return Solution(torch.ones_like(found.weight), torch.ones_like(found.mask))

    assert torch.equal(solve(problem, "2:4", Mine()).weight, solve(problem, "2:4", "magnitude").weight)
    changes: list[tuple[Callable[[Solution], object], str]] = [
        (dense, "method 'mine' returned 0 zeros in the mask of operator0 that are not the 64 of 2:4"),
        (lambda found: replace(found, mask=torch.ones_like(found.mask)), "returned 0 zeros in the mask of operator0"),
        (
            lambda found: replace(found, mask=found.mask.index_fill(0, torch.tensor([7]), True)),
            "returned 56 zeros in the",
        ),
        (lambda found: replace(found, weight=problem.weight.clone()), "weights of .* not zero where mask is False"),
        (lambda found: replace(found, weight=found.weight.roll(1, 1)), "weights of .* not zero where mask is False"),
        (lambda found: found.weight, "^method 'mine' returned Tensor, and a Solution is expected$"),
    ]
    for change, message in changes:
        with pytest.raises(FistaPrunerError, match=message):
            solve(problem, "2:4", [returning(change), "refit"])
    assert solve(problem, "0%", returning(dense)).weight.equal(problem.weight)

    class Nameless(Method):
        def solve(self, *given: Any) -> Any:
            raise AssertionError

    with pytest.raises(FistaPrunerError, match="the class Nameless of a method has no name"):
        solve(problem, "2:4", Nameless())


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("weight", Tensor.double, "float64 (8, 16) on cpu, and float32 (8, 16) on cpu"),
        ("weight", Tensor.bfloat16, "bfloat16 (8, 16) on cpu, and float32 (8, 16) on cpu"),
        ("weight", lambda found: found.to("meta"), "float32 (8, 16) on meta, and float32 (8, 16) on cpu"),
        ("weight", lambda found: None, "NoneType, and float32 (8, 16) on cpu"),
        ("mask", Tensor.float, "float32 (8, 16) on cpu, and bool (8, 16) on cpu"),
        ("mask", lambda found: found[:1], "bool (1, 16) on cpu, and bool (8, 16) on cpu"),
        ("mask", lambda found: found.to("meta"), "bool (8, 16) on meta, and bool (8, 16) on cpu"),
        ("mask", Tensor.numpy, "ndarray, and bool (8, 16) on cpu"),
        ("stats", lambda found: None, "NoneType, and a tuple of 1 dict or of none"),
        ("stats", lambda found: ({}, {}), "tuple (dict, dict), and a tuple of 1 dict or of none"),
        ("warnings", lambda found: None, "NoneType, and a tuple of str"),
        ("warnings", lambda found: "one", "str, and a tuple of str"),
    ],
)
@pytest.mark.parametrize("sparsity", ["2:4", "50%"])
def test_parts_of_a_solution_of_another_kind_are_refused(
    part: str, change: Callable[[Any], object], message: str, sparsity: str
) -> None:
    """Also with a dead input, whose weights are treated apart."""

    class Mine(Magnitude):
        name = "mine"

        def solve(self, *given: Any) -> Solution:
            found = super().solve(*given)
            return replace(found, **{part: change(getattr(found, part))})

    problem = make_problem(rows=(8,), n=16)
    gram = problem.gram.clone()
    gram[3] = gram[:, 3] = 0
    for each in (problem, replace(problem, gram=gram, energy=None)):
        with pytest.raises(FistaPrunerError) as refused:
            solve(each, sparsity, Mine())
        assert str(refused.value) == f"method 'mine' returned as {part} {message} is expected"


def test_warnings_of_all_steps_are_kept_and_nan_of_default_settings_is_named() -> None:
    class Warns(Magnitude):
        name = "warns"
        takes_start = True
        said: str = ""

        def solve(self, *given: Any) -> Solution:
            found = super().solve(*given)
            return replace(found, warnings=(self.said,), weight=found.weight if self.said else found.weight / 0)

    problem = make_problem(rows=(8,), n=16)
    assert solve(problem, "2:4", [Warns(said="one"), "refit", Warns(said="two")]).warnings == ("one", "two")
    with pytest.raises(FistaPrunerError, match=r"^operator0: warns with its defaults ended in NaN or infinite weights"):
        solve(problem, "2:4", Warns())


@pytest.mark.parametrize("tensor", ["weight", "gram"])
def test_a_method_that_changes_the_problem_is_refused(tensor: str) -> None:
    """Its error would be computed from what it has left there."""

    class Careless(Magnitude):
        name = "careless"

        def solve(self, problem: LayerProblem, *given: Any) -> Solution:
            mask = super().solve(problem, *given).mask
            getattr(problem, tensor).mul_(mask[:16])
            return Solution(problem.weight * mask, mask)

    message = f"^method 'careless' has changed the {tensor} of operator0 in place: change a clone of it$"
    with pytest.raises(FistaPrunerError, match=message):
        solve(make_problem(rows=(16,), n=16), "2:4", Careless())


def test_tensors_of_inference_mode_are_pruned() -> None:
    """Torch does not count their changes."""
    with torch.inference_mode():
        problem = make_problem()
    assert solve(problem, "50%", "wanda").mask.any()


def test_what_is_no_problem_is_refused() -> None:
    with pytest.raises(FistaPrunerError, match="problem is a Tensor, expected a LayerProblem"):
        solve(torch.ones(2, 2), "50%")  # type: ignore[arg-type]


@pytest.mark.parametrize("patterns", [["2:4"], ["2:4"] * 3, []], ids=len)
def test_one_pattern_for_every_operator_is_asked_for(patterns: list[str]) -> None:
    with pytest.raises(FistaPrunerError, match=rf": {len(patterns)} sparsities for 2 operators"):
        solve(make_problem((8, 8)), patterns)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (7, "^method 7 is not a name, names joined by"),
        ([], "^method is empty: name one of proximal, "),
        ("wnada", "^method 'wnada' is not known: one of proximal, "),
        ([{"wanda": {}, "refit": {}}], "^method step .* is not one name with its settings"),
    ],
)
def test_what_is_no_method_is_refused(method: Any, message: str) -> None:
    with pytest.raises(FistaPrunerError, match=message):
        parse_method(method)


@pytest.mark.parametrize("name", REFINEMENTS)
def test_a_refinement_needs_something_before_it(name: str) -> None:
    with pytest.raises(FistaPrunerError, match=name):
        parse_method(name)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in ("fista", "proximal")])
def test_a_solver_that_takes_no_start_is_refused_after_another_step(name: str) -> None:
    """Its result would be the same without the earlier steps, whose work would be lost."""
    with pytest.raises(
        FistaPrunerError, match=f"^method '{name}' does not start from another solution: leave out 'wanda' before it"
    ):
        parse_method(f"wanda+{name}")
    with pytest.raises(FistaPrunerError, match=r"leave out 'wanda\+refit' before it"):
        parse_method(f"wanda+refit+{name}+swap")


@pytest.mark.parametrize("name", ["sparsegpt", "alps", "admm", "fista", "proximal"])
def test_operators_of_a_group_share_what_depends_on_the_gram(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also inside a block of the caller; the bits are those of each operator alone."""
    problem = make_problem(rows=(16, 8, 8))
    parts = [part_of(problem, part) for part in cut(problem.rows, 32, [parse_sparsity("50%")] * 3, parse_method(name))]
    alone = torch.cat([solve(part, "50%", name).weight for part in parts])
    counted = []
    for function in ("eigh", "cholesky_ex", "qr"):
        plain = getattr(torch.linalg, function)

        def counting(*given: object, _plain: Callable[..., object] = plain, **named: object) -> object:
            counted.append(_plain)
            return _plain(*given, **named)

        monkeypatch.setattr(torch.linalg, function, counting)
    solve(parts[0], "50%", name)
    once = len(counted)
    counted.clear()
    with shared_gram(problem.gram):
        found = solve_in_parts(problem, [parse_sparsity("50%")] * 3, parse_method(name))
    assert len(counted) == once > 0
    assert torch.equal(found.weight, alone)


@pytest.mark.parametrize("sparsity", ["0.5%", "1%"])
def test_alps_ends_where_few_weights_become_zero(sparsity: str) -> None:
    for problem in (make_problem(rows=(64,), n=64), LayerProblem(torch.ones(70, 16), torch.ones(16, 16))):
        (stats,) = solve(problem, sparsity, "alps").stats
        assert stats["steps"][0]["iterations"] <= 60

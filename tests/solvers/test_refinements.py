"""Refit and swap against least squares in fp64."""

from dataclasses import replace

import pytest
import torch

from fistapruner.core import LayerProblem, parse_sparsity
from fistapruner.solvers import Solution, solve
from fistapruner.solvers.proximal import Proximal
from fistapruner.solvers.refit import Refit, refit_exact
from fistapruner.solvers.swap import CANDIDATES, Swap
from layer_problems import DRIFTS, error, least_squares, make_problem

over_both = pytest.mark.parametrize("solver", ["cg", "exact"])


@over_both
@pytest.mark.parametrize(("drift", "target"), DRIFTS)
@pytest.mark.parametrize("sparsity", ["30%", "50%", "90%", "2:4"])
def test_a_refit_is_least_squares_on_the_support(solver: str, sparsity: str, drift: float, target: float) -> None:
    problem = make_problem(17, 32, drift=drift, target=target)
    found = solve(problem, sparsity, ["wanda", Refit(solver=solver, iterations=60, shrinkage=0)])
    best = float(error(problem, least_squares(problem, found.mask)).sum())
    assert float(error(problem, found.weight).sum()) == pytest.approx(best, rel=1e-4)
    assert torch.equal(found.mask, solve(problem, sparsity, "wanda").mask)


@over_both
@pytest.mark.parametrize(("drift", "target"), DRIFTS)
def test_damping_is_a_ridge_towards_the_dense_weights(solver: str, drift: float, target: float) -> None:
    problem = make_problem(16, 24, drift=drift, target=target)
    settings = {"solver": solver, "damping": 0.3, "shrinkage": 0.0, "iterations": 200}
    found = solve(problem, 0.5, ["wanda", Refit(**settings)])
    expected = least_squares(problem, found.mask, ridge=0.3)
    rows = error(problem, expected) < 0.99 * error(problem, solve(problem, 0.5, "wanda").weight)
    assert int(rows.sum()) > 8  # others keep their start where the ridge makes them no better
    torch.testing.assert_close(found.weight[rows].double(), expected[rows], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("chain", ["proximal", "wanda+refit"])
def test_few_tokens_are_not_fitted_as_if_they_were_many(chain: str) -> None:
    """On fresh tokens the ridge for the sampling error lowers the error; on those that were fitted it raises it."""
    generator = torch.Generator().manual_seed(0)
    weight, mixing = (torch.randn(64, 64, generator=generator) for _ in range(2))
    few, fresh = (
        LayerProblem.from_activations(
            weight, torch.randn(count, 64, generator=generator) @ (mixing / 16 + torch.eye(64))
        )
        for count in (100, 20000)
    )
    *before, last = chain.split("+")
    plain, ridged = (
        solve(few, "50%", [*before, {"refit": Refit, "proximal": Proximal}[last](shrinkage=share)]).weight
        for share in (0.0, 3.0)
    )
    assert fresh.error(ridged) < 0.9 * fresh.error(plain)
    assert few.error(ridged) > few.error(plain)
    assert torch.equal(solve(replace(few, tokens=None), "50%", chain).weight, plain)


def test_small_batches_equal_one_batch() -> None:
    problem = make_problem(20, 24)
    mask = parse_sparsity("50%").project(problem.weight.abs())
    one, many = (refit_exact(problem.weight, problem.gram, mask, "fc1", budget)[0] for budget in (1 << 26, 600))
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-4)


def duplicated(rows: int, n: int) -> LayerProblem:
    """Every input is there twice."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(300, n // 2, generator=generator).repeat(1, 2)
    return LayerProblem.from_activations(torch.randn(rows, n, generator=generator), inputs, name="fc1")


@pytest.mark.parametrize("step", [Refit(solver="exact", shrinkage=0.0), Swap(damping=0.0), Swap(damping=1e-7)])
def test_singular_supports_are_damped_with_a_warning(step: dict[str, dict[str, object]]) -> None:
    """So are those that are singular but for rounding, where a Cholesky factor exists by chance."""
    problem = duplicated(16, 32)
    found = solve(problem, "30%", ["wanda", step])
    assert any("fc1" in warning and "damping raised" in warning for warning in found.warnings)
    assert found.stats[0]["relative_error"] < 0.5 * solve(problem, "30%", "wanda").stats[0]["relative_error"]


@pytest.mark.parametrize("iterations", [40, 200])
def test_a_refit_on_a_nearly_singular_gram_is_as_good_as_it_says(iterations: int) -> None:
    """Half of the inputs are near duplicates: curvature along their differences is lost in rounding errors."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1000, 64, generator=generator)
    inputs = torch.cat([inputs, inputs + 1e-4 * torch.randn(1000, 64, generator=generator)], 1)
    problem = LayerProblem(torch.randn(64, 128, generator=generator), inputs.T @ inputs / len(inputs))
    before, after = (solve(problem, "2:4", chain) for chain in (["wanda"], ["wanda", Refit(iterations=iterations)]))
    true = [float(((s.weight - problem.weight).double() @ inputs.double().T).square().sum()) for s in (before, after)]
    energy = float((problem.weight.double() @ inputs.double().T).square().sum())
    assert after.stats[0]["relative_error"] == pytest.approx(true[1] / energy, rel=1e-3)
    assert true[1] < 0.6 * true[0]


@pytest.mark.parametrize(
    "method", [Refit(damping=10.0), Refit(solver="exact", damping=10.0), Swap(swaps=4, damping=10.0)], ids=str
)
def test_rows_that_a_large_ridge_would_make_worse_stay_as_they_are(method: Refit | Swap) -> None:
    problem, constraint = make_problem(16, 24), parse_sparsity("50%")
    start: Solution = solve(problem, constraint, ["wanda", Refit(solver="exact", shrinkage=0.0)])
    found = method.solve(problem, constraint, start)
    before, after = problem.row_errors(start.weight), problem.row_errors(found.weight)
    assert bool((after <= before).all())
    same = after == before
    assert int(same.sum()) > 8
    assert torch.equal(found.weight[same], start.weight[same])
    assert torch.equal(found.mask[same], start.mask[same])


@pytest.mark.parametrize("swaps", [1, 4])
@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
@pytest.mark.parametrize(("drift", "target"), DRIFTS)
def test_swaps_exchange_the_best_pairs(sparsity: str, swaps: int, drift: float, target: float) -> None:
    """Against least squares in fp64 of every row with every exchange, of which there are fewer than candidates."""
    problem, constraint = make_problem(8, 12, drift=drift, target=target), parse_sparsity(sparsity)
    solution = solve(problem, constraint, ["magnitude", Swap(swaps=swaps, damping=0.0)])
    swapped = 0
    for row, start in enumerate(solve(problem, constraint, "magnitude").mask):
        kept = start
        operator = problem.slice(slice(row, row + 1))
        for _ in range(swaps):
            pairs = [(o, i) for o in range(12) for i in range(12) if kept[o] and not kept[i]]
            trials = [kept, *(kept ^ (torch.arange(12) == o) ^ (torch.arange(12) == i) for o, i in pairs)]
            trials = [trial for trial in trials if constraint.nm is None or bool((trial.view(-1, 4).sum(1) == 2).all())]
            errors = [float(error(operator, least_squares(operator, trial[None]))) for trial in trials]
            best = min(range(len(trials)), key=errors.__getitem__)
            if errors[best] >= errors[0] * (1 - 1e-6):
                break
            kept, swapped = trials[best], swapped + 1
        assert torch.equal(solution.mask[row], kept)
    assert solution.stats[0]["steps"][-1]["swaps"] == swapped > 0
    assert CANDIDATES >= 12


def test_swap_beats_refit_on_a_bad_mask() -> None:
    problem = make_problem(16, 48)
    refit, swap = (solve(problem, 0.5, f"magnitude+{name}").stats[0]["relative_error"] for name in ("refit", "swap"))
    assert swap < 0.8 * refit

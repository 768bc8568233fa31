"""Refit and swap against least squares in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layer_problems import make_problem

from fistapruner import LayerProblem
from fistapruner.solvers import solve
from fistapruner.solvers.refit import refit_exact
from fistapruner.solvers.swap import _sweep, _sweep_support


def least_squares(problem: LayerProblem, mask: torch.Tensor) -> torch.Tensor:
    """Row by row normal equations on the support, fp64."""
    gram, linear = problem.gram.double(), problem.linear.double()
    weight = torch.zeros_like(linear)
    for row, kept in enumerate(mask):
        index = kept.nonzero()[:, 0]
        weight[row, index] = torch.linalg.solve(gram[index][:, index], linear[row, index])
    return weight


@pytest.mark.parametrize(("drift", "target"), [(0.0, 1.0), (0.1, 1.0), (0.1, 0.5)])
@pytest.mark.parametrize("sparsity", ["30%", "50%", "90%", "2:4"])
def test_exact_and_cg_reach_the_optimum(sparsity: str, drift: float, target: float) -> None:
    problem = make_problem((12, 5), 32, drift=drift, target=target)
    exact = solve(problem, sparsity, ["wanda", {"refit": {"solver": "exact", "shrinkage": 0}}])
    best = problem.row_errors(least_squares(problem, exact.mask).float()).sum()
    assert float(problem.row_errors(exact.weight).sum()) == pytest.approx(float(best), rel=1e-4)
    cg = solve(problem, sparsity, ["wanda", {"refit": {"iterations": 60, "shrinkage": 0}}])
    assert float(problem.row_errors(cg.weight).sum()) == pytest.approx(float(best), rel=1e-4)


@pytest.mark.parametrize("solver", ["cg", "exact"])
def test_few_tokens_are_not_fitted_as_if_they_were_many(solver: str) -> None:
    """On fresh tokens the ridge lowers the error; on those that were fitted it raises it."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(32, 32, generator=generator) * torch.linspace(1.0, 0.1, 32)
    weight = torch.randn(8, 32, generator=generator)
    few, fresh = (
        LayerProblem.from_activations(weight, torch.randn(tokens, 32, generator=generator) @ mixing.T)
        for tokens in (24, 4096)
    )
    plain, ridged = (
        solve(few, "50%", ["wanda", {"refit": {"solver": solver, "shrinkage": shrinkage}}]).weight
        for shrinkage in (0.0, 3.0)
    )
    assert float(fresh.row_errors(ridged).sum()) < 0.9 * float(fresh.row_errors(plain).sum())
    assert float(few.row_errors(ridged).sum()) > float(few.row_errors(plain).sum())


def test_small_batches_equal_one_batch() -> None:
    problem = make_problem((20,), 24)
    mask = solve(problem, 0.5, "wanda").mask
    one, _, _ = refit_exact(problem, problem.gram, mask, 1e-3)
    many, _, _ = refit_exact(problem, problem.gram, mask, 1e-3, budget=600)
    assert torch.allclose(one, many, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", ["cg", "exact"])
@pytest.mark.parametrize(("drift", "target"), [(0.0, 1.0), (0.1, 0.5)])
def test_damping_is_a_ridge_towards_the_dense_weights(solver: str, drift: float, target: float) -> None:
    problem = make_problem((16,), 24, drift=drift, target=target)
    settings = {"solver": solver, "damping": 0.3, "shrinkage": 0.0, "iterations": 200}
    found = solve(problem, 0.5, ["wanda", {"refit": settings}])
    ridge = 0.3 * problem.gram.diagonal().mean() * torch.eye(24)
    expected = least_squares(replace(problem, gram=problem.gram + ridge), found.mask)
    rows = problem.row_errors(expected.float()) < 0.99 * problem.row_errors(solve(problem, 0.5, "wanda").weight)
    assert int(rows.sum()) > 8  # others keep their start where the ridge makes them no better
    assert torch.allclose(found.weight[rows].double(), expected[rows], rtol=1e-3, atol=1e-3)


def test_supports_that_are_singular_but_for_rounding_are_damped() -> None:
    """One input is there twice, so a Cholesky factor exists by chance; the largest damping of any batch is told."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(300, 15, generator=generator)
        inputs = torch.cat([inputs, inputs[:, :1]], 1)
        problem = LayerProblem.from_activations(torch.randn(2, 16, generator=generator), inputs, name="fc1")
        mask = torch.ones(2, 16, dtype=torch.bool)
        mask[1, 8:] = False  # the second row's batch has every input once
        _, damping, (warning,) = refit_exact(problem, problem.gram, mask, 0.0, budget=1)
        assert damping > 0
        assert "fc1: a kept block of the Gram is singular" in warning


@pytest.mark.parametrize("step", [{"refit": {"solver": "cg"}}, {"refit": {"solver": "exact"}}, {"swap": {"swaps": 4}}])
def test_rows_that_a_large_ridge_would_make_worse_stay_as_they_are(step: dict[str, dict[str, object]]) -> None:
    problem = make_problem((16,), 24)
    start = solve(problem, 0.5, ["wanda", {"refit": {"solver": "exact", "shrinkage": 0.0}}])
    ((name, settings),) = step.items()
    solution = solve(
        problem, 0.5, ["wanda", {"refit": {"solver": "exact", "shrinkage": 0.0}}, {name: {**settings, "damping": 10.0}}]
    )
    before, after = problem.row_errors(start.weight), problem.row_errors(solution.weight)
    assert bool((after <= before).all())
    same = after == before
    assert int(same.sum()) > 8
    assert torch.equal(solution.weight[same], start.weight[same])
    assert torch.equal(solution.mask[same], start.mask[same])


@pytest.mark.parametrize("swaps", [1, 4])
@pytest.mark.parametrize("candidates", [1, 2, 12])
def test_swaps_are_the_best_pairs_of_the_best_candidates(candidates: int, swaps: int) -> None:
    """Against least squares in fp64 of every row with one weight dropped, with one added, and with both."""
    problem = make_problem((24,), 12, drift=0.1, target=0.5)
    start = solve(problem, 0.5, "magnitude").mask
    settings = {"swaps": swaps, "candidates": candidates, "damping": 0.0}
    solution = solve(problem, 0.5, ["magnitude", {"swap": settings}])
    swapped = 0
    for row, kept in enumerate(start):
        operator = problem.slice(row, row + 1)

        def error(*changed: int, operator: LayerProblem = operator, kept: torch.Tensor = kept) -> float:
            mask = kept.clone()
            mask[list(changed)] ^= True
            return float(operator.row_errors(least_squares(operator, mask[None]).float()))

        for _ in range(swaps):
            cheapest = sorted(range(12), key=error)
            drop, add = ([i for i in cheapest if kept[i] == side][:candidates] for side in (True, False))
            best = min(((out, into) for out in drop for into in add), key=lambda pair: error(*pair))
            if error(*best) >= error():
                break
            kept[list(best)] ^= True
            swapped += 1
        assert torch.equal(solution.mask[row], kept)
    assert solution.stats[0]["steps"][-1]["swaps"] == swapped > 0


def test_two_sweeps_make_the_table_of_the_exchanged_support() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 12, generator=generator)
    problem = LayerProblem.from_activations(torch.randn(6, 12, generator=generator), inputs)
    mask = solve(problem, 0.5, "magnitude").mask

    def swept(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight, _, _ = refit_exact(problem, problem.gram, mask, 0.0)
        return _sweep_support(problem, problem.gram, mask, weight, 0.0)[:2]

    table, border = swept(mask)
    out, into, moving = mask.int().argmax(1), (~mask).int().argmax(1), torch.arange(6) != 2
    _sweep(table, border, out, moving, removing=True)
    _sweep(table, border, into, moving, removing=False)
    rows = moving.nonzero()[:, 0]
    mask[rows, out[rows]], mask[rows, into[rows]] = False, True
    for found, expected in zip((table, border), swept(mask), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
@pytest.mark.parametrize(("drift", "target"), [(0.0, 1.0), (0.1, 0.5)])
def test_swap_ends_where_no_single_exchange_helps(sparsity: str, drift: float, target: float) -> None:
    problem = make_problem((3,), 12, drift=drift, target=target)
    method = ["wanda", {"swap": {"swaps": 200, "candidates": 12, "damping": 0.0}}]
    mask = solve(problem, sparsity, method).mask
    errors = problem.row_errors(least_squares(problem, mask).float())
    for row in range(3):
        for out in mask[row].nonzero()[:, 0].tolist():
            for into in (~mask[row]).nonzero()[:, 0].tolist():
                if sparsity == "2:4" and out // 4 != into // 4:
                    continue
                trial = mask.clone()
                trial[row, out], trial[row, into] = False, True
                error = problem.row_errors(least_squares(problem, trial).float())[row]
                assert float(error) >= float(errors[row]) * (1 - 1e-3)


def test_swap_beats_refit_on_a_bad_mask() -> None:
    problem = make_problem((16,), 48)
    refit = solve(problem, 0.5, "magnitude+refit").stats[0]["relative_error"]
    assert solve(problem, 0.5, "magnitude+swap").stats[0]["relative_error"] < 0.8 * refit


@pytest.mark.parametrize("iterations", [40, 200])
def test_a_refit_on_a_nearly_singular_gram_is_as_good_as_it_says(iterations: int) -> None:
    """Half of the inputs are near duplicates: curvature along their differences is lost in rounding errors."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1000, 64, generator=generator)
    inputs = torch.cat([inputs, inputs + 1e-4 * torch.randn(1000, 64, generator=generator)], 1)
    problem = LayerProblem(torch.randn(64, 128, generator=generator), inputs.T @ inputs / len(inputs))

    def error(chain: list[object]) -> tuple[float, float]:
        solution = solve(problem, "2:4", chain)
        outputs, dense = (inputs.double() @ weight.double().T for weight in (solution.weight, problem.weight))
        return solution.stats[0]["relative_error"], float((outputs - dense).square().sum() / dense.square().sum())

    said, true = error(["wanda", {"refit": {"iterations": iterations}}])
    assert true == pytest.approx(said, rel=1e-3)
    assert true < 0.6 * error(["wanda"])[1]


@pytest.mark.parametrize("damping", [0.0, 1e-7])
def test_swap_damps_singular_supports_with_a_warning(damping: float) -> None:
    """Duplicated inputs, of which many supports have both."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(300, 16, generator=generator).repeat(1, 2)
    problem = LayerProblem.from_activations(torch.randn(16, 32, generator=generator), inputs, name="fc1")
    before = solve(problem, "2:4", "wanda").stats[0]["relative_error"]
    solution = solve(problem, "2:4", ["wanda", {"swap": {"damping": damping}}])
    assert any("fc1" in warning and "damping raised" in warning for warning in solution.warnings)
    assert solution.stats[0]["relative_error"] < 0.5 * before

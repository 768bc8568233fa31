"""FISTA against an independent LASSO solver, and the outer loop's records."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from layer_problems import make_problem
from scipy.optimize import minimize

from fistapruner import LayerProblem
from fistapruner.core.linalg import largest_eigenvalue
from fistapruner.solvers import solve
from fistapruner.solvers.fista import certificate, fista


def lasso(problem: LayerProblem, row: int, penalty: float) -> torch.Tensor:
    """One row by L-BFGS-B on its positive and negative parts: an independent algorithm and library."""
    gram, linear = problem.gram.double().numpy(), problem.linear[row].double().numpy()
    n = len(linear)

    def value(parts):  # type: ignore[no-untyped-def]
        v = parts[:n] - parts[n:]
        gradient = gram @ v - linear
        return 0.5 * v @ gram @ v - linear @ v + penalty * parts.sum(), [*(gradient + penalty), *(penalty - gradient)]

    found = minimize(
        value,
        [0.0] * (2 * n),
        jac=True,
        bounds=[(0, None)] * (2 * n),
        method="L-BFGS-B",
        options={"maxiter": 20000, "maxfun": 50000, "ftol": 1e-15, "gtol": 1e-10},
    )
    return torch.tensor(found.x[:n] - found.x[n:])


@pytest.mark.parametrize(("drift", "target"), [(0.0, 1.0), (0.1, 1.0), (0.1, 0.5)])
@pytest.mark.parametrize("share", [0.3, 0.03, 0.003])
def test_converged_fista_is_the_lasso_solution(share: float, drift: float, target: float) -> None:
    problem = make_problem((3,), 12, drift=drift, target=target)
    bound = largest_eigenvalue(problem.gram)
    penalty = torch.full((3, 1), share * float(problem.linear.abs().max()))
    weight, steps = fista(problem, torch.zeros_like(problem.weight), penalty, bound, 2000)
    assert steps == [2000]
    (record,) = certificate(problem, weight, penalty, bound)
    assert record["gap"] < 1e-4
    assert record["residual"] < 1e-5
    for row in range(3):
        oracle = lasso(problem, row, float(penalty[row]))
        ours = weight[row].double()
        assert _objective(problem, row, ours, penalty) <= _objective(problem, row, oracle, penalty) + 1e-5 * abs(
            record["objective"]
        )


def _objective(problem: LayerProblem, row: int, weight: torch.Tensor, penalty: torch.Tensor) -> float:
    gram, linear = problem.gram.double(), problem.linear[row].double()
    return float(0.5 * weight @ gram @ weight - linear @ weight + float(penalty[row]) * weight.abs().sum())


@pytest.mark.parametrize(("drift", "target"), [(0.0, 1.0), (0.1, 0.5)])
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_the_steps_are_those_of_beck_and_teboulle(steps: int, drift: float, target: float) -> None:
    """Their FISTA with constant step size, in fp64: x_k = p_L(y_k), then t_{k+1} and y_{k+1}."""
    problem = make_problem((6,), 16, drift=drift, target=target)
    bound = largest_eigenvalue(problem.gram)
    share = 0.01 * float(problem.linear.abs().max())
    gram, linear, length = problem.gram.double(), problem.linear.double(), float(bound)
    x = y = start = problem.weight.double() + 1
    t = 1.0
    for _ in range(steps):
        before, z = x, y - (y @ gram - linear) / length
        x = z.sign() * (z.abs() - share / length).clamp_min(0)
        following = (1 + math.sqrt(1 + 4 * t * t)) / 2
        y = x + (t - 1) / following * (x - before)
        t = following
    weight, taken = fista(problem, start.float(), torch.full((6, 1), share), bound, steps)
    assert taken == [steps]
    torch.testing.assert_close(weight.double(), x, rtol=1e-4, atol=1e-5 * float(x.abs().max()))


def test_the_gap_bounds_the_distance_to_the_optimum() -> None:
    problem = make_problem((3,), 12)
    bound = largest_eigenvalue(problem.gram)
    penalty = torch.full((3, 1), 0.05 * float(problem.linear.abs().max()))
    best, _ = fista(problem, problem.weight, penalty, bound, 2000)
    (optimum,) = certificate(problem, best, penalty, bound)
    for iterations in (1, 5, 25, 200):
        weight, _ = fista(problem, problem.weight, penalty, bound, iterations)
        (record,) = certificate(problem, weight, penalty, bound)
        assert (
            record["objective"] - optimum["objective"]
            <= record["gap"] * record["objective"] + 1e-6 * record["objective"]
        )


def test_above_the_largest_linear_term_the_solution_is_zero() -> None:
    problem = make_problem((4,), 16)
    bound = largest_eigenvalue(problem.gram)
    penalty = torch.full((4, 1), 1.01 * float(problem.linear.abs().max()))
    weight, _ = fista(problem, problem.weight, penalty, bound, 5000)
    assert not bool(weight.any())


def test_an_operator_rests_once_it_is_within_the_tolerance() -> None:
    problem = make_problem((4, 4), 8)
    bound = largest_eigenvalue(problem.gram)
    penalty = torch.cat([torch.full((4, 1), 2 * float(problem.linear.abs().max())), torch.zeros(4, 1)])
    start = torch.cat([torch.zeros(4, 8), problem.weight[4:] + 1])
    _, steps = fista(problem, start, penalty, bound, 40, tolerance=1e-6)
    assert steps[0] == 1
    assert steps[1] > 5


@pytest.mark.parametrize("penalty", ["relative", "published"])
@pytest.mark.parametrize("warm", ["sparsegpt", "wanda", "magnitude", "dense"])
def test_records_of_the_outer_loop(penalty: str, warm: str) -> None:
    problem = make_problem((24, 16))
    solution = solve(problem, 0.5, [{"fista": {"penalty": penalty, "warm_start": warm}}])
    for operator, stats in enumerate(solution.stats):
        record = stats["steps"][0]
        assert record["lipschitz"] >= float(torch.linalg.eigvalsh(problem.gram)[-1]) * (1 - 1e-5)
        assert record["iterations"] == sum(item["steps"] for item in record["rounds"])
        for item in record["rounds"]:
            assert item["e_round"] == pytest.approx(item["e_total"] - item["e_fista"])
            assert 0 <= item["gap"] <= 1
        assert record["e_total"] == pytest.approx(math.sqrt(problem.errors(solution.weight)[operator]), rel=1e-4)
        assert record["e_total"] <= min(item["e_total"] for item in record["rounds"]) * (1 + 1e-9)
    if penalty == "published":
        first = solution.stats[0]["steps"][0]["rounds"][0]
        assert first["lambda"] == pytest.approx(1e-5 / problem.tokens)


@pytest.mark.parametrize("penalty", ["relative", "published"])
def test_lambda_rises_exactly_where_rounding_costs_more_than_its_share(penalty: str) -> None:
    """The paper's xi: 0.3 of the error of the rounded weights."""
    seen = set()
    for seed in range(3):
        solution = solve(make_problem((24, 16), seed=seed), 0.5, [{"fista": {"penalty": penalty}}])
        for stats in solution.stats:
            rounds = stats["steps"][0]["rounds"]
            for record, later in itertools.pairwise(rounds):
                rises = record["e_round"] / record["e_total"] > 0.3
                assert (later["lambda"] > record["lambda"]) == rises
                seen.add(rises)
    assert seen == {True, False}


def test_three_rounds_without_improvement_end_the_search() -> None:
    solution = solve(make_problem(), 0.5, [{"fista": {"patience": 3}}])
    record = solution.stats[0]["steps"][0]
    best, idle = float("inf"), 0
    for item in record["rounds"]:
        idle = 0 if item["e_total"] < best else idle + 1
        best = min(best, item["e_total"])
        assert idle <= 3


def test_faithful_defaults() -> None:
    from fistapruner.solvers.fista import Fista

    method = Fista()
    assert (method.iterations, method.tolerance, method.xi, method.patience, method.warm_start) == (
        20,
        1e-6,
        0.3,
        3,
        "sparsegpt",
    )

"""FISTAPruner against the paper's iteration and outer loop in fp64, and against the optimum of its l1 problem."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fistapruner.core import Constraint, LayerProblem, parse_sparsity
from fistapruner.core.linalg import Product, largest_eigenvalue
from fistapruner.solvers import Solution, solve
from fistapruner.solvers.fista import Fista, fista
from fistapruner.solvers.scores import Magnitude, Wanda
from fistapruner.solvers.sparsegpt import SparseGPT
from layer_problems import DRIFTS, error, linear, make_problem


def run(problem: LayerProblem, start: Tensor, penalty: float, steps: int, tolerance: float = 0.0) -> tuple[Tensor, int]:
    """The package's FISTA in full precision."""
    bound = float(largest_eigenvalue(problem.gram))
    product = Product(problem.gram / -bound, fast=False)
    return fista(start, problem.gradient(start), product, penalty, bound, steps, tolerance)


def certificate(problem: LayerProblem, weight: Tensor, penalty: float) -> tuple[float, float]:
    """Objective of the l1 problem and an upper bound of its distance to the optimum, from the dual problem.

    The residual ``T - V X*``, scaled into the feasible set, is a dual point. With ``c_T = ||T||^2 / p`` and, for each
    row, ``s`` at most ``penalty / max |B - V H|``, its value is ``s (c_T - <V, B>) - s^2 f(V) / 2``.
    """
    weight, right, rows = weight.double(), linear(problem), error(problem, weight)
    target = error(problem, torch.zeros_like(weight))  # of V = 0, where the residual is T
    primal = rows / 2 + penalty * weight.abs().sum(1)
    inner = target - (weight * right).sum(1)
    most = (penalty / (weight @ problem.gram.double() - right).abs().amax(1)).clamp_max(1.0)
    scale = torch.minimum(most, (inner / rows).clamp_min(0))
    dual = scale * inner - scale.square() * rows / 2
    return float(primal.sum()), float((primal - dual).sum())


@pytest.mark.parametrize(("drift", "target"), DRIFTS)
@pytest.mark.parametrize("share", [0.3, 0.03, 0.003])
def test_converged_it_is_the_solution_of_the_l1_problem(share: float, drift: float, target: float) -> None:
    problem = make_problem(3, 12, drift=drift, target=target)
    penalty = share * float(linear(problem).abs().max())
    best, gap = certificate(problem, run(problem, torch.zeros(3, 12), penalty, 2000)[0], penalty)
    assert gap < 1e-4 * best
    for steps in (1, 5, 25, 200):
        objective, gap = certificate(problem, run(problem, problem.weight, penalty, steps)[0], penalty)
        assert -1e-5 * best <= objective - best <= gap + 1e-5 * best


def test_it_rests_once_it_is_within_the_tolerance() -> None:
    """At zero, where the penalty is above the largest linear term."""
    problem = make_problem(4, 8)
    weight, steps = run(problem, torch.zeros(4, 8), 2 * float(linear(problem).abs().max()), 40, tolerance=1e-6)
    assert steps == 5  # it looks at every fifth step
    assert not bool(weight.any())
    assert run(problem, problem.weight + 1, 0.0, 40, tolerance=1e-9)[1] == 40


def beck_teboulle(problem: LayerProblem, start: Tensor, penalty: float, steps: int) -> Tensor:
    """FISTA with constant step size, in fp64: x_k = p_L(y_k), then t_{k+1} and y_{k+1}."""
    gram, right, bound = problem.gram.double(), linear(problem), float(largest_eigenvalue(problem.gram))
    x = y = start.double()
    t = 1.0
    for _ in range(steps):
        before, z = x, y - (y @ gram - right) / bound
        x = z.sign() * (z.abs() - penalty / bound).clamp_min(0)
        following = (1 + math.sqrt(1 + 4 * t * t)) / 2
        y = x + (t - 1) / following * (x - before)
        t = following
    return x


@pytest.mark.parametrize(("drift", "target"), DRIFTS)
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_the_steps_are_those_of_beck_and_teboulle(steps: int, drift: float, target: float) -> None:
    problem = make_problem(6, 16, drift=drift, target=target)
    penalty = 0.01 * float(linear(problem).abs().max())
    expected = beck_teboulle(problem, problem.weight + 1, penalty, steps)
    weight, taken = run(problem, problem.weight + 1, penalty, steps)
    assert taken == steps
    torch.testing.assert_close(weight.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def paper(problem: LayerProblem, constraint: Constraint, start: Tensor, tokens: int) -> tuple[Tensor, list[Any]]:
    """The outer loop with the paper's numbers, in fp64, on sums over tokens: lambda / tokens for means."""
    value, low, high, idle, rounds = 1e-5, 0.0, 1e6, 0, []
    weight = start.double()
    best = math.sqrt(tokens * float(error(problem, weight).sum()))
    while idle < 3:
        relaxed = beck_teboulle(problem, weight, value / tokens, 20)
        rounded = relaxed * constraint.project(relaxed.abs())
        total, smooth = (math.sqrt(tokens * float(error(problem, each).sum())) for each in (rounded, relaxed))
        rounds.append({"lambda": value / tokens, "e_total": total / tokens**0.5, "e_fista": smooth / tokens**0.5})
        idle = 0 if total < best else idle + 1
        if total < best:
            weight, best = rounded, total
        if (total - smooth) / total > 0.3:
            low = value
        else:
            high = value
        if high - low <= 1e-6:
            break
        value = (low + high) / 2
    return weight, rounds


@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
@pytest.mark.parametrize(("drift", "target"), DRIFTS)
@pytest.mark.parametrize("warm", ["sparsegpt", "wanda"])
def test_the_published_loop_is_that_of_the_paper(sparsity: str, drift: float, target: float, warm: str) -> None:
    """Its warm start reproduces the outputs on the drifted inputs, as the published programs do."""
    problem, constraint = make_problem(24, 32, drift=drift, target=target), parse_sparsity(sparsity)
    first = (SparseGPT() if warm == "sparsegpt" else Wanda()).solve(problem.without_drift(), constraint)
    weight, rounds = paper(problem, constraint, first.weight, 400)
    solution = solve(problem, constraint, [{"fista": {"penalty": "published", "warm_start": warm}}])
    found = solution.stats[0]["steps"][0]["rounds"]
    assert [{key: each[key] for key in rounds[0]} for each in found] == [
        pytest.approx(each, rel=1e-4) for each in rounds
    ]
    assert torch.equal(solution.mask, weight != 0)
    torch.testing.assert_close(solution.weight.double(), weight, rtol=1e-3, atol=1e-4 * float(weight.abs().max()))


@pytest.mark.parametrize("penalty", ["relative", "published"])
@pytest.mark.parametrize("warm", ["sparsegpt", "wanda", "magnitude", "dense"])
def test_records_of_the_outer_loop(penalty: str, warm: str) -> None:
    """The search goes up exactly where rounding costs more than xi, and ends after three rounds without a gain."""
    problem = make_problem(24, drift=0.1)
    solution = solve(problem, "50%", [{"fista": {"penalty": penalty, "warm_start": warm}}])
    record = solution.stats[0]["steps"][0]
    rounds = record["rounds"]
    assert record["lipschitz"] >= float(torch.linalg.eigvalsh(problem.gram.double())[-1]) * (1 - 1e-5)
    assert record["iterations"] == sum(item["steps"] for item in rounds)
    assert record["e_total"] == pytest.approx(math.sqrt(problem.error(solution.weight)), rel=1e-4)
    assert record["e_total"] <= min(item["e_total"] for item in rounds) * (1 + 1e-9)
    for item, later in itertools.pairwise(rounds):
        assert (later["lambda"] > item["lambda"]) == (1 - item["e_fista"] / item["e_total"] > 0.3)
    best = list(itertools.accumulate((item["e_total"] for item in rounds), min))
    assert all(before > after for before, after in zip(best, best[3:-1], strict=False))
    unit = 1 / 400 if penalty == "published" else float(linear(problem).abs().max())
    assert rounds[0]["lambda"] == pytest.approx(1e-5 * unit)


def test_it_begins_from_its_warm_start() -> None:
    problem, constraint = make_problem(24, drift=0.1), parse_sparsity("2:4")
    starts: dict[tuple[str, str], Solution] = {
        ("sparsegpt", "relative"): SparseGPT().solve(problem, constraint),
        ("sparsegpt", "published"): SparseGPT().solve(problem.without_drift(), constraint),
        ("magnitude", "relative"): Magnitude().solve(problem, constraint),
        ("auto", "relative"): Wanda().solve(problem, constraint),
    }
    for (warm, penalty), start in starts.items():
        method = Fista(warm_start=warm, penalty=penalty)
        found, given = method.solve(problem, constraint), method.solve(problem, constraint, start)
        assert torch.equal(found.weight, given.weight)
        assert (found.stats[0]["warm_start"], given.stats[0]["warm_start"]) == (warm, "the step before")

"""SO-EBM: its gradient against quadrature, its decisions against another solver, the workload file, whole runs."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

import tiny
from fistapruner import FistaPrunerError, Recipe, prune
from fistapruner.allocate.allocate import ZerosBudget, split_budget
from fistapruner.allocate.curves import bounds, sparsity_grid
from fistapruner.allocate.fisher import DensePasses, measure_sensitivity, row_importance
from fistapruner.allocate.measure import check_allocation, decide
from fistapruner.models.operators import discover
from fistapruner.papers.so_ebm import Costs, Workload, decisions, energy_loss, learn
from fistapruner.passes.store import scratch_factory
from fistapruner.text.windows import window_tasks

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import power_scheduling as power
import workload_allocation

SIZES = {f"op{number}": 900 + 100 * number for number in range(6)}


def test_gradient_equals_quadrature_in_one_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    """∇E(a*) - 𝔼_q ∇E + λ (𝔼_p ∇E - 𝔼_q ∇E) is the gradient of E(a*) + log Z + λ KL(p || q), all on a fine grid."""
    grid, penalty = torch.linspace(0.0, 9.0, 90001, dtype=torch.float64), 0.3
    monkeypatch.setattr("fistapruner.papers.so_ebm.PENALTY", penalty)
    outcome = torch.tensor(1.3, dtype=torch.float64)
    parameters = torch.tensor([1.0, 0.3], dtype=torch.float64, requires_grad=True)
    width = float(grid[1] - grid[0])

    energy = power.hourly_energy(grid, *parameters)
    log_q = -energy - (torch.logsumexp(-energy, 0) + math.log(width))
    cost = power.hourly_cost(grid, outcome)
    log_p = -cost - (torch.logsumexp(-cost, 0) + math.log(width))
    best = power.hourly_energy(outcome, *parameters)
    divergence = (log_p.exp() * (log_p - log_q)).sum() * width
    log_z = torch.logsumexp(-energy, 0) + math.log(width)
    (exact,) = torch.autograd.grad(best + log_z + penalty * divergence, parameters)

    energy, best = power.hourly_energy(grid, *parameters), power.hourly_energy(outcome, *parameters)
    (found,) = torch.autograd.grad(energy_loss(best[None], energy[None], cost[None]), parameters)
    assert torch.allclose(found, exact, rtol=1e-9)


def made_curves(tasks: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Exponential curves; tasks differ in which operators they need."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.tensor(sparsity_grid(0.5), dtype=torch.float64)
    curves = []
    for _ in range(tasks):
        level = (0.5 * torch.randn(len(SIZES), generator=generator, dtype=torch.float64)).exp() / 20
        rate = 3 + 4 * torch.rand(len(SIZES), generator=generator, dtype=torch.float64)
        curves.append({name: level[i] * (rate[i] * (grid - 0.5)).exp() for i, name in enumerate(SIZES)})
    return curves


def costs_of(curves: Sequence[Mapping[str, Tensor]]) -> Costs:
    mix = torch.full((len(curves),), 1 / len(curves), dtype=torch.float64)
    _, losses = decisions(ZerosBudget(SIZES, 0.5), curves, mix)
    return Costs(losses / float(losses[0] @ mix), mix)


def test_the_known_mix_is_the_allocation_of_the_weighted_curves() -> None:
    chat, code = made_curves(2)
    curves = {"chat": chat, "code": code}
    split, facts = Workload(mix={"chat": 0.5, "code": 0.5}).allocate(curves, SIZES, 0.5)
    expected = split_budget({name: 0.5 * (chat[name] + code[name]) for name in SIZES}, SIZES, 0.5)
    for name, pattern in split.items():
        assert pattern.fraction == pytest.approx(expected[name].fraction, abs=0.01)
    assert sum(p.zeros(1, SIZES[name]) for name, p in split.items()) == sum(size // 2 for size in SIZES.values())
    assert all(task["predicted"] < 1.05 * task["uniform"] for task in facts.tasks.values())
    assert Workload(mix={"chat": 1.0, "code": 0.0}).allocate(curves, SIZES, 0.5)[0] == split_budget(chat, SIZES, 0.5)


@pytest.mark.parametrize("seed", range(3))
def test_the_best_decision_is_nearly_the_best_allocation(seed: int) -> None:
    """Against another solver in the sparsities of all operators (SLSQP), for tolerances forecast with a spread."""
    curves, (low, high) = made_curves(2, seed), bounds(0.5)
    mix = torch.full((2,), 0.5, dtype=torch.float64)
    zeros, losses = decisions(ZerosBudget(SIZES, 0.5), curves, mix)
    assert bool((zeros.sum(1) == zeros[0].sum()).all())
    unit = float(losses[0] @ mix)
    mean, spread = torch.tensor([[0.95, 1.05]], dtype=torch.float64), torch.full((1, 2), 0.1, dtype=torch.float64)
    sizes = np.array(list(SIZES.values()), dtype=float)
    level = torch.stack([torch.stack(list(task.values())) for task in curves])
    rate = (level[..., -1] / level[..., 0]).log() / (high - low)

    def cost(shares: np.ndarray) -> float:
        own = (level[..., 0] * (rate * (torch.from_numpy(shares) - low)).exp()).sum(1)
        return float(Costs(own[None] / unit, mix).expected(mean, spread))

    constraint = {"type": "eq", "fun": lambda shares: sizes @ (shares - 0.5) / sizes.sum()}
    best = minimize(
        cost, np.full(6, 0.5), method="SLSQP", bounds=[(low, high)] * 6, constraints=constraint, options={"ftol": 1e-10}
    )
    assert best.success
    assert float(Costs(losses / unit, mix).expected(mean, spread).min()) == pytest.approx(best.fun, rel=0.01)


def test_expected_cost_is_the_mean_of_costs() -> None:
    costs = costs_of(made_curves(2))
    mean, spread = torch.tensor([[0.9, 1.1]], dtype=torch.float64), torch.tensor([[0.2, 0.1]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = mean + spread * torch.randn(200_000, 2, generator=generator, dtype=torch.float64)
    few = Costs(costs.losses[:40:8], costs.mix)
    known = few.known(drawn)
    assert torch.all((known.mean(0) - few.expected(mean, spread)[0]).abs() < 4 * known.std(0) / 200_000**0.5)
    by_hand = [20 * max(float(d - b), 0) + 0.5 * float(d) ** 2 for d, b in zip(few.losses[2], drawn[7], strict=True)]
    assert float(known[7, 2]) == pytest.approx(sum(by_hand) / 2)


def test_fifty_deployments_teach_what_features_tell() -> None:
    """Of the regret of the mix alone it leaves less than two thirds; a feature that never varies changes nothing."""
    regrets = [workload_allocation.regrets("gaussian", seed) for seed in range(2)]
    assert sum(draw["so-ebm"] for draw in regrets) < 2 / 3 * sum(draw["mix"] for draw in regrets)
    costs, features, tolerances = workload_allocation.draw_workload("gaussian", 0)
    constant = torch.cat([features[:50], torch.ones(50, 1, dtype=torch.float64)], 1)
    other = torch.cat([features[50:], torch.full((len(features) - 50, 1), 9.0, dtype=torch.float64)], 1)
    plain, more = learn(features[:50], tolerances[:50], costs)[1], learn(constant, tolerances[:50], costs)[1]
    torch.testing.assert_close(more(other), plain(features[50:]))


def test_schedules_are_optimal_and_keep_the_limit() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(3, power.HOURS, generator=generator, dtype=torch.float64).cumsum(1) * 0.3
    spread = 0.05 + 0.2 * torch.rand(3, power.HOURS, generator=generator, dtype=torch.float64)
    found = power.decide(mean, spread)
    assert float(found.diff(dim=1).abs().max()) <= power.RAMP + 1e-9
    assert float(found.diff(dim=1).abs().max()) > power.RAMP - 0.01  # the limit binds here
    ramps = np.diff(np.eye(power.HOURS), axis=0)
    limits = {"type": "ineq", "fun": lambda x: np.concatenate([power.RAMP - ramps @ x, power.RAMP + ramps @ x])}
    for day in range(3):

        def cost(x: np.ndarray, day: int = day) -> float:
            return float(power.hourly_energy(torch.from_numpy(x), mean[day], spread[day]).sum())

        other = minimize(cost, found[day].numpy(), method="SLSQP", constraints=limits, options={"maxiter": 200})
        assert cost(found[day].numpy()) == pytest.approx(other.fun, abs=2e-3)


# The workload file, and whole runs.

MIX = {"chat": 0.7, "code": 0.3}
TASKS = {"chat": "python", "code": "python"}


def history(count: int = 60, **changes: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"features": [number / count, 1.0], "tolerance": {"chat": 0.1 + number % 7 / 50, "code": 0.2 + number % 5 / 40}}
        for number in range(count)
    ]
    rows[3] |= changes
    return rows


def recipe(folder: Path, said: Any, tasks: dict[str, str] = TASKS, **settings: Any) -> Recipe:
    (folder / "workload.yaml").write_text(said if isinstance(said, str) else json.dumps(said))
    calibration = {"source": tasks or "self", "samples": 8, "seqlen": 16}
    return Recipe.build({"allocation": f"workload:{folder}/workload.yaml", "calibration": calibration, **settings})


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"mix": {"chat": 0.7, "mail": 0.3}}, "mix has the tasks chat, mail, and the calibration has chat, code"),
        ({"mix": {"chat": 0.7, "code": 0.2}}, "the weights in mix sum to 0.9: they must sum to 1"),
        ({"mix": MIX, "method": "two-stage"}, "unknown setting 'method'"),
        ({"mix": MIX, "features": [0.5, 1.0], "history": history(49)}, "2 features and 49 deployments"),
        (
            {"mix": MIX, "features": [0.5, 1.0], "history": history(features=[1.0])},
            "deployment 4 of history is to have 2 features and a tolerance for each of chat, code",
        ),
        (
            {"mix": MIX, "features": [0.5, 1.0], "history": history(tolerance={"chat": 1.0, "code": 0})},
            "history.3.tolerance.code: Input should be greater than 0",
        ),
    ],
)
def test_a_bad_workload_is_refused_before_anything_is_loaded(tmp_path: Path, said: Any, message: str) -> None:
    with pytest.raises(FistaPrunerError, match=message) as caught:
        prune(tmp_path / "no-model", tmp_path / "run", recipe=recipe(tmp_path, said, method="wanda"))
    assert "\n" not in str(caught.value)


def test_a_workload_needs_tasks_and_zeros_that_can_move(tmp_path: Path) -> None:
    with pytest.raises(FistaPrunerError, match="the calibration has one text: give --calibration NAME=SOURCE"):
        check_allocation(recipe(tmp_path, {"mix": MIX}, tasks={}))
    with pytest.raises(FistaPrunerError, match="cannot be used with 2:4"):
        check_allocation(recipe(tmp_path, {"mix": MIX}, sparsity="2:4"))
    with pytest.raises(FistaPrunerError, match="workload: names no file: write workload:FILE"):
        Recipe.build({"allocation": "workload:"})
    resolved = Recipe.build({"allocation": "workload:w.yaml"}).resolved()
    assert resolved.workload == Path.cwd() / "w.yaml"


def texts(folder: Path) -> dict[str, str]:
    words = {"chat": "hello how are you today my friend ", "code": "def f(x): return x + 1\n"}
    for name, text in words.items():
        (folder / f"{name}.txt").write_text(text * 200)
    return {name: str(folder / f"{name}.txt") for name in words}


def test_a_run_for_a_workload(tmp_path: Path) -> None:
    """Exact zeros, tasks in report, card and page; repeated with the same bytes."""
    model, said = tiny.save("llama", tmp_path / "dense"), {"mix": MIX, "features": [0.5, 1.0], "history": history()}
    asked = recipe(tmp_path, said, texts(tmp_path), method="wanda", weighting="fisher")
    report = prune(model, tmp_path / "run", recipe=asked)
    assert report.totals.operator_zeros == report.totals.operator_weights // 2
    assert report.workload.deployments == 60
    assert set(report.workload.tasks) == {"chat", "code"}
    sentence = "allocated for a workload by SO-EBM from 60 earlier deployments"
    for file in ("model/README.md", "report.html"):
        assert sentence in (tmp_path / "run" / file).read_text()
    sparsities = json.loads((tmp_path / "run" / "run.json").read_text())["decision"]["sparsity"]
    assert len(set(sparsities.values())) > 1
    assert prune(model, tmp_path / "again", recipe=asked).workload == report.workload
    assert tiny.weights(tmp_path / "run") == tiny.weights(tmp_path / "again")


def test_a_begun_run_keeps_its_decision_and_refuses_another_workload(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "dense")
    asked = recipe(tmp_path, {"mix": MIX}, texts(tmp_path), method="wanda", propagate="dense", dense_target="dense")
    tiny.begin(model, tmp_path / "run", recipe=asked)
    before = json.loads((tmp_path / "run" / "run.json").read_text())["decision"]["sparsity"]
    (tmp_path / "workload.yaml").write_text("mix: {chat: 0.1, code: 0.9}")
    with pytest.raises(FistaPrunerError, match=r"holds a run for another content of .*workload.yaml"):
        prune(model, tmp_path / "run", recipe=asked)
    (tmp_path / "workload.yaml").unlink()  # what was decided stands in the run
    prune(model, tmp_path / "run", recipe=asked)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["decision"]["sparsity"] == before


def test_importance_and_metrics_of_a_workload_are_the_weighted_means_of_its_tasks(tmp_path: Path) -> None:
    """Each task measured alone, on the first of its windows."""
    model = tiny.opened(tiny.save("llama", tmp_path / "dense"))
    layout, mix = discover(model), {"chat": 0.2, "code": 0.8}
    asked = recipe(tmp_path, {"mix": mix}, reconstruct=2)
    tokens = tiny.tokens(8, 16, seed=3)
    passes = DensePasses(scratch_factory(None, model.dtype))
    alone = {}
    for place, task in enumerate(mix):
        windows = tokens[window_tasks(asked.calibration) == place][:2]
        alone[task] = measure_sensitivity(model, layout, windows, passes, seed=asked.seed)
    found = decide(asked, layout, model, tokens, {}, passes)
    for index, metric in enumerate(found.metrics):
        torch.testing.assert_close(metric, sum(weight * alone[task].outputs[index] for task, weight in mix.items()))
    for name, rows in found.importance.items():
        mean = sum(weight * alone[task].rows[name] for task, weight in mix.items())
        torch.testing.assert_close(rows, row_importance(mean))

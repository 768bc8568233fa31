"""Allocation for a workload: the file and its refusals, the rules, and whole runs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fistapruner.sensitivity.decision import decide
from fistapruner.sensitivity.error_curves import POINTS, ZerosBudget, bounds, sparsity_grid, split_budget
from fistapruner.sensitivity.fisher import DensePasses, measure_sensitivity, row_importance
from fistapruner.sensitivity.workload import MIN_DEPLOYMENTS, History, Workload, WorkloadFile, read_workload
from fistapruner.sensitivity.workload_rules import (
    DAMAGE,
    EXCESS,
    Candidates,
    Costs,
    allocate_workload,
    choose_rule,
    compare_rules,
    decide_by_rules,
    find_candidates,
)
from scipy.optimize import minimize
from torch import Tensor

import tiny
from fistapruner import Recipe, prune
from fistapruner.activations.store import scratch_factory
from fistapruner.calibration.windows import window_tasks
from fistapruner.errors import FistaPrunerError
from fistapruner.models.discovery import discover
from fistapruner.models.files.checkpoint import Checkpoint
from fistapruner.models.layerwise import LayerwiseModel
from fistapruner.pipeline.compare import compare
from fistapruner.reporting.workload_text import workload_sentence

MIX = "mix: {chat: 0.7, code: 0.3}\n"
TASKS = {"chat": "python", "code": "python"}


def deployments(count: int = 60, **changes: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"features": [number / count, 1.0], "tolerance": {"chat": 0.1 + number % 7 / 50, "code": 0.2 + number % 5 / 40}}
        for number in range(count)
    ]
    rows[3] |= changes
    return rows


def written(folder: Path, text: str, history: list[dict[str, Any]] | None = None) -> Path:
    """A workload file, and its history."""
    file = folder / "workload.yaml"
    file.write_text(text)
    if history is not None:
        (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    return file


def recipe(file: Path, tasks: dict[str, str] | None = None, **settings: Any) -> Recipe:
    calibration = {"tasks": TASKS if tasks is None else tasks, "samples": 8, "seqlen": 16}
    return Recipe.build({"allocation": f"workload:{file}", "calibration": calibration, **settings})


UNCERTAIN = MIX + "history: history.jsonl\nfeatures: [0.5, 1.0]\n"


def test_a_workload_is_read(tmp_path: Path) -> None:
    workload = read_workload(recipe(written(tmp_path, UNCERTAIN, deployments())))
    assert workload is not None
    assert workload.tasks == ("chat", "code")
    assert workload.mix.tolist() == [0.7, 0.3]
    assert workload.history is not None
    assert workload.history.features.shape == (60, 2)
    assert workload.history.tolerances[0].tolist() == [0.1, 0.2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mix: {chat: 0.7, mail: 0.3}", "mix names the task 'mail', and the calibration has chat, code"),
        ("mix: {chat: 1}", "mix has no weight for the task 'code'"),
        ("mix: {chat: 0.7, code: 0.2}", "the weights in mix sum to 0.9: they must sum to 1"),
        ("mix: {chat: 1.5, code: -0.5}", "the weight of 'code' in mix is -0.5"),
        ("mix: {chat: .nan, code: 1}", "mix.chat: Input should be a finite number"),
        ("mix: {chat: much, code: 1}", "workload.yaml: mix.chat"),
        ("mix: {}", "workload.yaml: mix"),
        ("{", "is not valid YAML"),
        ("mixture: 3", "mixture"),
        (MIX + "method: oracle", "method"),
        (MIX + "method: two-stage", "method needs a history"),
        (MIX + "features: [1]", "features needs a history"),
        (MIX + "history: history.jsonl", "a history needs the features of the deployment at hand"),
        (UNCERTAIN.replace("history.jsonl", "gone.jsonl"), "cannot read .*gone.jsonl"),
        (UNCERTAIN.replace("1.0]", ".inf]"), "features.1: Input should be a finite number"),
        (UNCERTAIN + "experimental: true", "experimental"),
    ],
)
def test_a_bad_workload_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = written(tmp_path, text, deployments())
    with pytest.raises(FistaPrunerError, match=message) as caught:
        read_workload(recipe(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("history", "message"),
    [
        (deployments(features=[1.0]), "line 4 has 1 features, and .*workload.yaml has 2"),
        (deployments(features="x"), "line 4: 'features' is to be a list of finite numbers"),
        (deployments(features=[1.0, 10**400]), "line 4: 'features' is to be a list of finite numbers"),
        (deployments(features=[1.0, True]), "line 4: 'features' is to be a list of finite numbers"),
        (deployments(tolerance={"chat": 1.0}), "line 4: 'tolerance' is to have one number for each of the tasks chat"),
        (deployments(tolerance={"chat": 1.0, "code": 0}), "line 4: the tolerance of 'code' is 0"),
        (deployments(tolerance={"chat": 1.0, "code": float("nan")}), "line 4: the tolerance of 'code' is nan"),
        (deployments(MIN_DEPLOYMENTS - 1), "has 49 deployments, and at least 50 are needed"),
    ],
)
def test_a_bad_history_is_refused(tmp_path: Path, history: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(FistaPrunerError, match=message):
        read_workload(recipe(written(tmp_path, UNCERTAIN, history)))


def test_a_workload_is_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    """No model is there, and the message is about the workload all the same."""
    file = written(tmp_path, "mix: {chat: 0.7, mail: 0.3}")
    with pytest.raises(FistaPrunerError, match="mix names the task 'mail'"):
        prune(tmp_path / "no-model", tmp_path / "run", recipe=recipe(file, method="wanda"))


def test_a_comparison_checks_workloads_first(tmp_path: Path) -> None:
    bad = f"wanda@allocation=workload:{written(tmp_path, 'mix: {chat: 0.7, mail: 0.3}')}"
    settings = {"calibration": {"tasks": TASKS}}
    with pytest.raises(FistaPrunerError, match="mix names the task 'mail'"):
        compare(tmp_path / "no-model", ["wanda", bad], ["50%"], tmp_path / "out", settings=settings)


def test_the_setting_names_a_file() -> None:
    assert Recipe.build({"allocation": "workload: a b.yaml"}).workload == Path("a b.yaml")
    assert Recipe.build({"allocation": "error"}).workload is None
    assert Recipe.build({"allocation": {"down_proj": "40%"}}).workload is None
    resolved = Recipe.build({"allocation": "workload:w.yaml"}).resolved()
    assert resolved.workload == Path.cwd() / "w.yaml"
    assert Recipe.from_yaml(resolved.to_yaml()) == resolved
    with pytest.raises(FistaPrunerError, match="workload: names no file: write workload:FILE"):
        Recipe.build({"allocation": "workload:"})


def test_one_text_is_no_workload(tmp_path: Path) -> None:
    with pytest.raises(FistaPrunerError, match="at least two tasks"):
        read_workload(recipe(written(tmp_path, MIX), tasks={"chat": "python"}))


def test_a_fixed_pattern_takes_no_workload(tmp_path: Path) -> None:
    from fistapruner.sensitivity.decision import check_allocation

    file = written(tmp_path, MIX)
    with pytest.raises(FistaPrunerError, match="cannot be used with 2:4"):
        check_allocation(recipe(file, sparsity="2:4"))
    assert check_allocation(recipe(file)) == read_workload(recipe(file))


# Rules, on synthetic curves of a few operators.

SIZES = {f"op{number}": 900 + 100 * number for number in range(6)}


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


def made_history(losses: Tensor, count: int = 80, noise: float = 0.15, seed: int = 0) -> History:
    """Tolerances about the losses at uniform sparsity; a feature tells a part of them."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    turn = torch.tensor([[1.0, -1.0, 0.5], [0.0, 0.5, 1.0]], dtype=torch.float64)[:, : len(losses)]
    signal = 1 + 0.3 * torch.tanh(features @ turn)
    drawn = torch.randn(count, len(losses), generator=generator, dtype=torch.float64)
    return History(features, (losses * (signal + noise * drawn)).clamp_min(1e-3))


def workload(tasks: int, history: History | None, **settings: Any) -> Workload:
    names = ("chat", "code", "mail")[:tasks]
    said = {"mix": dict.fromkeys(names, 1 / tasks), **settings}
    return Workload(Path("workload.yaml"), WorkloadFile.model_validate(said), history, "")


def test_the_known_mix_is_the_allocation_of_the_weighted_curves() -> None:
    curves = made_curves(2)
    split, facts = allocate_workload(workload(2, None), dict(zip(("chat", "code"), curves, strict=True)), SIZES, 0.5)
    assert facts.rule == "mix"
    assert not facts.rules
    mean = {name: 0.5 * (curves[0][name] + curves[1][name]) for name in SIZES}
    expected = split_budget(mean, SIZES, 0.5)
    for name, pattern in split.items():
        assert pattern.fraction == pytest.approx(expected[name].fraction, abs=0.01)
    assert sum(p.zeros(1, SIZES[name]) for name, p in split.items()) == sum(size // 2 for size in SIZES.values())
    for task in facts.tasks.values():
        assert task.predicted < 1.05 * task.uniform


def test_a_task_with_all_weight_is_allocated_for_alone() -> None:
    curves = made_curves(2)
    alone = workload(2, None, mix={"chat": 1.0, "code": 0.0})
    split, _ = allocate_workload(alone, dict(zip(("chat", "code"), curves, strict=True)), SIZES, 0.5)
    assert split == split_budget(curves[0], SIZES, 0.5)


def test_equal_tasks_are_one() -> None:
    (curves,) = made_curves(1)
    split, _ = allocate_workload(workload(2, None), {"chat": curves, "code": curves}, SIZES, 0.5)
    assert split == split_budget(curves, SIZES, 0.5)


def loss_at(curves: Mapping[str, Tensor], shares: Sequence[float]) -> float:
    """The loss of a task whose curves are exponential, at the sparsity of each operator."""
    low, high = bounds(0.5)
    pairs = zip(shares, curves.values(), strict=True)
    return sum(float(curve[0] * (curve[-1] / curve[0]) ** ((share - low) / (high - low))) for share, curve in pairs)


def test_predicted_losses_are_the_sums_of_the_curves() -> None:
    """At uniform sparsity, and for any other zeros: the curves are exponential, so interpolation is exact."""
    curves, budget = made_curves(2), ZerosBudget(SIZES, 0.5)
    found = find_candidates(budget, curves, torch.tensor([0.5, 0.5], dtype=torch.float64))
    for row in (0, 1, 100):
        shares = (found.zeros[row] / torch.tensor(list(SIZES.values()))).tolist()
        for number, task in enumerate(curves):
            assert float(found.losses[row, number]) == pytest.approx(loss_at(task, shares), rel=0.01)


def candidates_of(tasks: int, seed: int = 0) -> tuple[ZerosBudget, Candidates, Costs]:
    budget, mix = ZerosBudget(SIZES, 0.5), torch.full((tasks,), 1 / tasks, dtype=torch.float64)
    found = find_candidates(budget, made_curves(tasks, seed), mix)
    return budget, found, Costs(found.losses / float(found.losses[0] @ mix), mix)


@pytest.mark.parametrize("tasks", [2, 3])
def test_candidates_have_the_whole_budget_and_none_is_dominated(tasks: int) -> None:
    budget, found, _ = candidates_of(tasks)
    assert bool((found.zeros.sum(1) == budget.uniform().sum()).all())
    low, high = bounds(0.5)
    shares = found.zeros / torch.tensor(list(SIZES.values()))
    assert float(shares.min()) >= low - 0.001
    assert float(shares.max()) <= high + 0.001
    inner = found.losses[2 + tasks :]
    for one, other in itertools.permutations(range(0, len(inner), 25), 2):
        assert not bool((inner[one] < inner[other] - 1e-9).all())


@pytest.mark.parametrize("seed", range(4))
def test_the_best_candidate_is_nearly_the_best_allocation(seed: int) -> None:
    """Against another solver in the sparsities of all operators (SLSQP), for known tolerances forecast with spread."""
    curves = made_curves(2, seed)
    _, found, costs = candidates_of(2, seed)
    unit = float(found.losses[0] @ costs.mix)
    mean = torch.tensor([[0.95, 1.05]], dtype=torch.float64)
    spread = torch.full_like(mean, 0.1)
    expected = costs.expected(mean, spread)
    names, (low, high) = list(SIZES), bounds(0.5)
    sizes = np.array(list(SIZES.values()), dtype=float)
    level = torch.stack([torch.stack([task[name] for name in names]) for task in curves])
    rate = (level[..., -1] / level[..., 0]).log() / (high - low)

    def cost(shares: np.ndarray) -> float:
        losses = (level[..., 0] * (rate * (torch.from_numpy(shares) - low)).exp()).sum(1)
        return float(Costs(losses[None] / unit, costs.mix).expected(mean, spread))

    constraint = {"type": "eq", "fun": lambda shares: sizes @ (shares - 0.5) / sizes.sum()}
    best = minimize(
        cost, np.full(6, 0.5), method="SLSQP", bounds=[(low, high)] * 6, constraints=constraint, options={"ftol": 1e-10}
    )
    assert best.success
    assert float(expected.min()) == pytest.approx(best.fun, rel=0.01)


def test_expected_cost_is_the_mean_of_costs() -> None:
    _, _, costs = candidates_of(2)
    mean, spread = torch.tensor([[0.9, 1.1]], dtype=torch.float64), torch.tensor([[0.2, 0.1]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = mean + spread * torch.randn(200_000, 2, generator=generator, dtype=torch.float64)
    few = Costs(costs.losses[:40:8], costs.mix)
    known = few.known(drawn)
    assert torch.all((known.mean(0) - few.expected(mean, spread)[0]).abs() < 4 * known.std(0) / 200_000**0.5)
    by_hand = sum(
        0.5 * (EXCESS * max(float(d) - float(b), 0) + 0.5 * DAMAGE * float(d) ** 2)
        for d, b in zip(few.losses[2], drawn[7], strict=True)
    )
    assert float(known[7, 2]) == pytest.approx(by_hand)


def test_without_uncertainty_the_forecast_decides_as_hindsight() -> None:
    _, _, costs = candidates_of(2)
    mean = torch.tensor([[0.9, 1.1], [1.2, 0.8]], dtype=torch.float64)
    assert torch.equal(costs.expected(mean, torch.full_like(mean, 1e-6)).argmin(1), costs.known(mean).argmin(1))


def test_where_no_tolerance_is_exceeded_all_rules_decide_alike() -> None:
    """The hinge is what makes uncertainty matter."""
    _, found, costs = candidates_of(2)
    history = made_history(torch.full((2,), 50.0, dtype=torch.float64), noise=0.01)
    decided = decide_by_rules(history, history.features[:5], costs, experimental=True)
    assert all(torch.equal(chosen, decided["mean"]) for rule, chosen in decided.items() if rule != "mix")
    assert len(found.zeros) > 200


def test_neighbours_are_the_deployments_with_the_nearest_features() -> None:
    """Whatever the unit of a feature is, such as of one that tells nothing: half of the deployments have it."""
    _, _, costs = candidates_of(2)
    features = torch.zeros(60, 2, dtype=torch.float64)
    features[20:, 0] = 1
    features[::2, 1] = 1
    near, far = costs.losses[0] * torch.tensor([0.8, 1.3]), costs.losses[0] * torch.tensor([1.3, 0.8])
    tolerances = torch.cat([near.expand(20, 2), far.expand(40, 2)])
    best = costs.known(torch.stack([near, far])).argmin(1)
    assert best[0] != best[1]
    for unit in (1e-3, 1.0, 1e3):
        scaled = features * torch.tensor([1.0, unit], dtype=torch.float64)
        decided = decide_by_rules(History(scaled, tolerances), scaled[[0, 1, 20, 21]], costs)
        assert torch.equal(decided["neighbours"], best[[0, 0, 1, 1]])


def test_regret_is_never_negative_and_features_help() -> None:
    _, _, costs = candidates_of(3)
    rows = compare_rules(made_history(costs.losses[0]), costs, experimental=True)
    by_rule = {row.rule: row for row in rows}
    order = ("uniform", "mix", "mean", "sample-average", "neighbours", "two-stage", "so-ebm")
    assert tuple(by_rule) == order
    assert all(row.regret >= 0 and row.behind >= (0 if row.rule != "uniform" else -1) for row in rows)
    assert by_rule["two-stage"].regret < by_rule["sample-average"].regret
    assert by_rule["sample-average"].regret < by_rule["uniform"].regret
    chosen = by_rule[choose_rule(rows)]
    assert chosen.behind <= chosen.behind_error
    simpler = order[1 : order.index(chosen.rule)]
    assert all(by_rule[rule].behind > by_rule[rule].behind_error for rule in simpler)


def test_rules_are_compared_on_deployments_that_they_have_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each deployment is decided for once, with what all those of the other parts teach."""
    costs = candidates_of(2)[2]
    history = made_history(costs.losses[0])
    decided: list[int] = []

    def decide(learn: History, features: Tensor, *_: Any, **__: Any) -> dict[str, Tensor]:
        held, seen = (
            [history.features.tolist().index(row) for row in rows.tolist()] for rows in (features, learn.features)
        )
        assert sorted(held + seen) == list(range(80))
        assert torch.equal(learn.tolerances, history.tolerances[seen])
        decided.extend(held)
        return {"mix": torch.ones(len(features), dtype=torch.int64)}

    monkeypatch.setattr("fistapruner.sensitivity.workload_rules.decide_by_rules", decide)
    compare_rules(history, costs)
    assert sorted(decided) == list(range(80))


def test_learnt_decisions_are_nearly_optimal_for_a_known_distribution() -> None:
    """Expected cost within 5 % of the best possible, for one feature and Gaussian tolerances."""
    _, _, costs = candidates_of(2)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 1, generator=generator, dtype=torch.float64)
    mean = costs.losses[0] * (1 + 0.2 * torch.tanh(features) * torch.tensor([1.0, -1.0]))
    spread = torch.full_like(mean, 0.1)
    drawn = mean + spread * torch.randn(300, 2, generator=generator, dtype=torch.float64)
    decided = decide_by_rules(History(features, drawn), features, costs, experimental=True)
    truth = costs.expected(mean, spread)
    best = float(truth.min(1).values.mean())
    above = {rule: float(truth.gather(1, chosen[:, None]).mean()) / best - 1 for rule, chosen in decided.items()}
    assert above["two-stage"] < 0.05
    assert above["so-ebm"] < 0.05
    assert above["mix"] > 0.05


def test_so_ebm_is_never_worse_than_two_stage_where_it_stopped() -> None:
    """On the deployments that choose its state; the state before it is the first candidate."""
    from fistapruner.sensitivity.forecast import Forecast, fit_forecast
    from fistapruner.sensitivity.workload_rules import fit_so_ebm

    _, _, costs = candidates_of(2)
    history = made_history(costs.losses[0])
    rows = torch.arange(80)
    learn, held = history[rows[:60]], history[rows[60:]]
    forecast = Forecast(learn.features, learn.tolerances)
    fit_forecast(forecast, learn.features, learn.tolerances, (held.features, held.tolerances), epochs=40)

    def cost(one: Forecast) -> float:
        with torch.no_grad():
            decided = costs.expected(*one(held.features)).argmin(1, keepdim=True)
        return float(costs.known(held.tolerances).gather(1, decided).mean())

    assert cost(fit_so_ebm(forecast, learn, held, costs)) <= cost(forecast)


def test_the_named_method_decides_and_the_result_repeats() -> None:
    _, found, _ = candidates_of(2)
    history = made_history(found.losses[0])
    curves = dict(zip(("chat", "code"), made_curves(2), strict=True))
    named = workload(2, history, features=(1.5, -0.5), method="neighbours")
    split, facts = allocate_workload(named, curves, SIZES, 0.5)
    assert facts.rule == "neighbours"
    assert facts.deployments == 80
    assert [row.rule for row in facts.rules][-1] == "two-stage"  # the experimental one was not asked for
    assert allocate_workload(named, curves, SIZES, 0.5) == (split, facts)
    by_rule = {row.rule: row.cost for row in facts.rules}
    assert facts.costs["uniform"] == pytest.approx(by_rule["uniform"])  # these two look at no deployment
    assert facts.costs["mix"] == pytest.approx(by_rule["mix"])
    simplest = workload(2, history, features=(1.5, -0.5), method="mix")
    assert allocate_workload(simplest, curves, SIZES, 0.5)[1].costs["chosen"] == facts.costs["mix"]
    assert all(curve.shape == (POINTS,) for task in curves.values() for curve in task.values())


def test_what_is_said_of_the_chosen_allocation_is_that_of_the_returned_one() -> None:
    """The losses of the tasks, and the mean cost over the history; in a larger unit of loss the choice is the same."""
    losses = find_candidates(ZerosBudget(SIZES, 0.5), made_curves(2), torch.full((2,), 0.5).double()).losses[0]
    history, found = made_history(losses), []
    for unit in (1, 8):
        curves = [{name: unit * curve for name, curve in task.items()} for task in made_curves(2)]
        scaled = History(history.features, unit * history.tolerances)
        asked = workload(2, scaled, features=(1.5, -0.5), method="neighbours")
        split, facts = allocate_workload(asked, dict(zip(("chat", "code"), curves, strict=True)), SIZES, 0.5)
        shares = [pattern.zeros(1, SIZES[name]) / SIZES[name] for name, pattern in split.items()]
        predicted = torch.tensor([loss_at(task, shares) for task in curves], dtype=torch.float64)
        assert [task.predicted for task in facts.tasks.values()] == pytest.approx(predicted.tolist(), rel=0.01)
        mean = sum(task.uniform for task in facts.tasks.values()) / 2
        costs = Costs(predicted[None] / mean, asked.mix).known(scaled.tolerances / mean)
        assert facts.costs["chosen"] == pytest.approx(float(costs.mean()), rel=0.02)
        assert facts.costs["chosen"] != facts.costs["mix"]
        found.append((split, facts.costs))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1])


def test_a_feature_that_never_varied_does_not_count() -> None:
    """A deployment with another value of it is decided for as if it had the known one, and that is said."""
    costs = candidates_of(2)[2]
    history = made_history(costs.losses[0])
    constant = torch.full((80, 1), 0.1, dtype=torch.float64)
    widened = History(torch.cat([history.features, constant], 1), history.tolerances)
    row = torch.tensor([1.5, -0.5, 0.1], dtype=torch.float64)
    one, other = (
        decide_by_rules(widened, (row + torch.tensor([0.0, 0.0, more])).expand(1, 3), costs, experimental=True)
        for more in (0.0, 5.0)
    )
    assert one == other
    assert one["neighbours"] == decide_by_rules(history, row[None, :2], costs)["neighbours"]
    curves = dict(zip(("chat", "code"), made_curves(2), strict=True))
    for value, unknown in ((0.1, []), (5.1, [3])):
        asked = workload(2, widened, features=(1.5, -0.5, value), method="neighbours")
        facts = allocate_workload(asked, curves, SIZES, 0.5)[1]
        assert facts.unknown_features == unknown
        assert ("Feature 3 has one value in the whole history" in workload_sentence(facts)) == bool(unknown)


# Whole runs.


def texts(folder: Path) -> dict[str, str]:
    words = {"chat": "hello how are you today my friend ", "code": "def f(x): return x + 1\n"}
    for name, text in words.items():
        (folder / f"{name}.txt").write_text(text * 200)
    return {name: str(folder / f"{name}.txt") for name in words}


def test_a_run_for_a_workload(tmp_path: Path) -> None:
    """Exact zeros, the rule and its regret in report and card; resumed and repeated with the same bytes."""
    model = tiny.save("llama", tmp_path / "dense")
    file = written(tmp_path, UNCERTAIN + "method: so-ebm\n", deployments())
    asked = recipe(file, texts(tmp_path), method="wanda", weighting="fisher")
    report = prune(model, tmp_path / "run", recipe=asked)
    assert report.totals.operator_zeros == report.totals.operator_weights // 2
    facts = report.workload
    assert facts is not None
    assert facts.rule == "so-ebm"
    assert set(facts.tasks) == {"chat", "code"}
    stored = json.loads((tmp_path / "run" / "report.json").read_text())["workload"]
    assert stored["rule"] == facts.rule
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"by the rule {facts.rule}" in card
    assert "| so-ebm (experimental) |" in card
    assert str(tmp_path) not in card.split("Recipe:")[0]
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"by the rule {facts.rule}" in page
    sparsities = json.loads((tmp_path / "run" / "run.json").read_text())["decision"]["sparsity"]
    assert len(set(sparsities.values())) > 1

    again = prune(model, tmp_path / "again", recipe=asked)
    assert again.workload == facts
    for one in sorted((tmp_path / "run" / "model").glob("*.safetensors")):
        assert one.read_bytes() == (tmp_path / "again" / "model" / one.name).read_bytes()


def test_a_begun_run_keeps_its_decision_and_refuses_another_workload(tmp_path: Path) -> None:
    model, file = tiny.save("llama", tmp_path / "dense"), written(tmp_path, MIX)
    asked = recipe(file, texts(tmp_path), method="wanda", propagate="dense", dense_target="dense")
    tiny.begin(model, tmp_path / "run", recipe=asked)
    before = json.loads((tmp_path / "run" / "run.json").read_text())["decision"]["sparsity"]
    file.write_text("mix: {chat: 0.1, code: 0.9}\n")
    with pytest.raises(FistaPrunerError, match=r"holds a run for another content of .*workload.yaml"):
        prune(model, tmp_path / "run", recipe=asked)
    file.unlink()  # what was decided stands in the run
    prune(model, tmp_path / "run", recipe=asked)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["decision"]["sparsity"] == before


def test_importance_and_metrics_of_a_workload_are_the_weighted_means_of_its_tasks(tmp_path: Path) -> None:
    """Each task measured alone, on the first of its windows."""
    model = LayerwiseModel(Checkpoint.open(tiny.save("llama", tmp_path / "dense")), torch.device("cpu"))
    layout, mix = discover(model), {"chat": 0.2, "code": 0.8}
    asked = recipe(written(tmp_path, "mix: {chat: 0.2, code: 0.8}\n"), reconstruct=2)
    tokens = torch.randint(3, tiny.VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(3))
    passes = DensePasses(scratch_factory(None, model.dtype))
    alone = {}
    for place, task in enumerate(mix):
        windows = tokens[window_tasks(asked.calibration) == place][:2]
        alone[task] = measure_sensitivity(model, layout, windows, passes, seed=asked.seed)
    found = decide(asked, layout, model, tokens, {})
    assert found.metrics is not None
    assert found.importance is not None
    for index, metric in enumerate(found.metrics):
        expected = sum(weight * alone[task].outputs[index] for task, weight in mix.items())
        torch.testing.assert_close(metric, expected)
    for name, rows in found.importance.items():
        mean = sum(weight * alone[task].rows[name] for task, weight in mix.items())
        torch.testing.assert_close(rows, row_importance(mean))


def test_more_weight_for_a_task_means_less_predicted_loss_in_it(tmp_path: Path) -> None:
    model, sources = tiny.save("llama", tmp_path / "dense"), texts(tmp_path)
    losses = []
    for weight in (0.0, 1.0):
        file = written(tmp_path, f"mix: {{chat: {weight}, code: {1 - weight}}}\n")
        report = prune(model, tmp_path / f"run{weight}", recipe=recipe(file, sources, method="magnitude"))
        assert report.workload is not None
        losses.append([report.workload.tasks[name].predicted for name in ("chat", "code")])
    assert losses[1][0] < losses[0][0]
    assert losses[0][1] < losses[1][1]

"""The plan before a run: what it predicts, what it changes to fit, when it refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

import tiny
from fistapruner import Recipe
from fistapruner.cli import main
from fistapruner.constraints import parse_sparsity
from fistapruner.errors import FistaPrunerError
from fistapruner.models.discovery import Layout, discover
from fistapruner.models.files.checkpoint import Checkpoint
from fistapruner.models.layerwise import LayerwiseModel
from fistapruner.pipeline.plan import allocate
from fistapruner.pipeline.prune import prune
from fistapruner.planning import plan as plan_module
from fistapruner.planning import probe
from fistapruner.planning import sizes as sizes_module
from fistapruner.planning.footprint import peak_bytes, solve_bytes
from fistapruner.planning.plan import DEVICE_RESERVE, Plan, make_plan
from fistapruner.planning.sizes import Choice, Sizes
from fistapruner.problem import LayerProblem
from fistapruner.pruning import partition as parts_module
from fistapruner.pruning.context import LayerContext, LayerEvents
from fistapruner.runtime.formatting import size
from fistapruner.solvers import parse_method, solve

Model = tuple[LayerwiseModel, Layout, torch.Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tiny.save("llama", tmp_path_factory.mktemp("plan") / "model")
    skeleton = LayerwiseModel(Checkpoint.open(folder), torch.device("cpu"))
    return skeleton, discover(skeleton), torch.zeros(64, 32, dtype=torch.long)


def sizes(model: Model, **settings: Any) -> Sizes:
    recipe = Recipe.build({"method": "wanda", "propagate": "dense", **settings}).resolved()
    return Sizes.measure(model[0], model[1], recipe, allocate(recipe, model[1]), model[2])


def test_bytes_of_a_computation_are_counted_while_they_live() -> None:
    def work() -> None:
        first = torch.zeros(1000)
        del first
        second = torch.zeros(500)
        third = second.view(5, 100) + 1
        del second, third

    assert peak_bytes(work) == 4000


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps", "fista"])
@pytest.mark.parametrize("rows", [(512,), (100, 60)])
def test_small_solve_predicts_a_large_one(method: str, rows: Sequence[int]) -> None:
    """From a problem of 256 inputs to one of 512: never much too little, never far too much."""
    n = 512
    sparsity, steps = [parse_sparsity("50%")] * len(rows), parse_method(method)
    activations = torch.randn(2 * n, n)
    weight = torch.randn(sum(rows), n)
    problem = LayerProblem(weight, activations.T @ activations / n, names=tuple(map(str, rows)), rows=tuple(rows))
    measured = 4 * (weight.numel() + n * n) + peak_bytes(lambda: solve(problem, sparsity, steps))
    assert 0.9 * measured < solve_bytes(rows, n, sparsity, steps) < 1.7 * measured


def test_choices_only_save_memory(model: Model) -> None:
    measured = sizes(model)
    peaks = [
        max(measured.stages(choice).values())
        for choice in (Choice(16), Choice(16, on_disk=True), Choice(1, on_disk=True), Choice(1, on_disk=True, by_operator=True))
    ]
    assert peaks == sorted(peaks, reverse=True)


def test_more_calibration_tokens_need_no_more_memory_on_disk(model: Model) -> None:
    few = sizes(model)
    measured, more = (replace(few, samples=count * few.samples) for count in (100, 10_000))
    assert measured.stages(Choice(16, on_disk=True)) == more.stages(Choice(16, on_disk=True))
    assert max(more.stages(Choice(16)).values()) > max(measured.stages(Choice(16)).values())
    assert more.disk(Choice(16, on_disk=True), 1) > measured.disk(Choice(16, on_disk=True), 1)


def test_hidden_states_go_to_disk_before_batches_shrink(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits between the peaks of the choices pick the first choice that fits."""
    monkeypatch.setattr(psutil.Process, "memory_info", lambda _: type("Memory", (), {"rss": 0}))
    monkeypatch.setattr(sizes_module, "RETAINED", 0)
    measured = sizes(model)
    limits = {choice: max(measured.stages(choice).values()) for choice in (Choice(16), Choice(16, on_disk=True), Choice(8, on_disk=True))}
    for choice, limit in limits.items():
        recipe = Recipe.build({"method": "wanda", "propagate": "dense", "execution": {"memory_limit": limit}}).resolved()
        made = make_plan(*model[:2], recipe, allocate(recipe, model[1]), model[2], 16, tmp_path)
        assert made.choice == choice
    recipe = Recipe.build({"method": "wanda", "propagate": "dense", "execution": {"memory_limit": limits[Choice(16)]}}).resolved()
    two = make_plan(*model[:2], recipe, allocate(recipe, model[1]), model[2], 16, tmp_path, workers=2)
    assert two.choice.on_disk


@pytest.mark.parametrize("targets", [r"re:layers\.1\.", r"re:layers\.[01]\.mlp"])
def test_layers_without_operators_are_no_hindrance(model: Model, tmp_path: Path, targets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes are of a layer that has operators; time is estimated too, and the dense model is measured."""
    monkeypatch.setattr(probe, "WORTH_A_PROBE", 0)
    recipe = Recipe.build({"method": "proximal", "targets": [targets]}).resolved()
    layout = model[1].select(recipe)
    made = make_plan(model[0], layout, recipe, allocate(recipe, layout), model[2], 16, tmp_path)
    assert {row.quantity for row in made.rows} == {"peak memory", "disk", "pruning, one worker"}
    report = prune(
        str(model[0].checkpoint.folder),
        tmp_path / "run",
        method="proximal",
        targets=[targets],
        calibration={"source": "python", "samples": 4, "seqlen": 24},
    )
    assert all(layer.operators == [] for layer in report.layers if not layout.layers[layer.index])


def test_impossible_limit_is_refused(model: Model, tmp_path: Path) -> None:
    recipe = Recipe.build({"method": "wanda", "propagate": "dense", "execution": {"memory_limit": "1MiB"}}).resolved()
    with pytest.raises(FistaPrunerError, match=r"--memory-limit 1\.00 MiB is not enough: .* needs .* MiB"):
        make_plan(*model[:2], recipe, allocate(recipe, model[1]), model[2], 16, tmp_path)


AMPLE = 2**50


def plan_on_gpu(
    model: Model, out: Path, measured: Sizes, host: int, free: int, workers: int = 1, devices: Sequence[str] = (), **settings: Any
) -> Plan:
    """The plan of a model whose layers run on a GPU with so many bytes free, of which ``measured`` are the sizes."""
    settings = {"method": "wanda", "propagate": "dense", "execution": {"memory_limit": host}, **settings}
    recipe = Recipe.build(settings).resolved()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plan_module.Sizes, "measure", lambda *_: measured)
        patched.setattr(plan_module, "free_device_memory", lambda _: free)
        patched.setattr(plan_module, "worker_devices", lambda *_: [torch.device(name) for name in devices])
        return make_plan(*model[:2], recipe, allocate(recipe, model[1]), model[2], 16, out, workers)


def peak(stages: dict[str, int]) -> int:
    return max(stages.values())


def test_on_a_gpu_hidden_states_take_main_memory(model: Model, tmp_path: Path) -> None:
    """They wait there however much the GPU has free; where they do not fit they go to disk, and batches stay."""
    measured = replace(sizes(model), cuda=True, samples=6400)
    inside, on_disk = Choice(16), Choice(16, on_disk=True)
    states = 3 * 6400 * measured.window
    assert peak(measured.host_stages(inside)) - peak(measured.host_stages(on_disk)) > 0.9 * states
    assert peak(measured.stages(inside)) == peak(measured.stages(on_disk)) < states
    for host, choice in ((peak(measured.host_stages(inside)), inside), (peak(measured.host_stages(inside)) - 1, on_disk)):
        assert plan_on_gpu(model, tmp_path, measured, host, AMPLE).choice == choice
    with pytest.raises(
        FistaPrunerError, match=r"^--memory-limit 1\.00 MiB is not enough: .* needs .* MiB, even with hidden states on disk"
    ):
        plan_on_gpu(model, tmp_path, measured, 2**20, AMPLE)


def test_a_small_gpu_gets_smaller_batches(model: Model, tmp_path: Path) -> None:
    """And groups in parts where not even one window's pass would be what is too large; hidden states stay in main memory."""
    measured = replace(sizes(model), cuda=True, samples=6400, forward=2**24)
    free = peak(measured.stages(Choice(8))) + DEVICE_RESERVE
    made = plan_on_gpu(model, tmp_path, measured, AMPLE, free)
    assert made.choice == Choice(8)
    assert made.says[0] == f"to fit the {size(free - DEVICE_RESERVE)} that are free on cpu: 8 windows at a time instead of 16"
    groups = tuple(group._replace(stacked=2**31, alone=2**27) for group in measured.groups)
    wide = replace(measured, groups=groups)
    apart = Choice(16, by_operator=True)
    assert plan_on_gpu(model, tmp_path, wide, AMPLE, peak(wide.stages(apart)) + DEVICE_RESERVE).choice == apart
    with pytest.raises(FistaPrunerError, match=r"^the 1\.00 MiB that are free on cpu is not enough: .* one window at a time; free some"):
        plan_on_gpu(model, tmp_path, wide, AMPLE, DEVICE_RESERVE + 2**20)
    with pytest.raises(FistaPrunerError, match="one window at a time"):
        plan_on_gpu(model, tmp_path, wide, AMPLE, 0)


def test_both_budgets_bind(model: Model, tmp_path: Path) -> None:
    measured = replace(sizes(model), cuda=True, samples=6400, forward=2**24)
    host, free = peak(measured.host_stages(Choice(4, on_disk=True))), peak(measured.stages(Choice(4))) + DEVICE_RESERVE
    made = plan_on_gpu(model, tmp_path, measured, host, free)
    assert made.choice == Choice(4, on_disk=True)
    assert "--memory-limit" in made.says[0]
    assert "free on cpu: hidden states go to disk, 4 windows at a time instead of 16" in made.says[0]
    assert [row.quantity for row in made.rows] == ["peak GPU memory", "peak memory", "disk"]
    assert [row.planned for row in made.rows[:2]] == [peak(measured.stages(made.choice)), peak(measured.host_stages(made.choice))]
    assert set(made.stages) > {"the embeddings", "the embeddings (main memory)", "pruning a layer (main memory)"}
    assert " of GPU memory at its peak" in made.says[-1]
    assert " of main memory at its peak" in made.says[-1]


def test_workers_share_a_gpu(model: Model, tmp_path: Path) -> None:
    """Layers side by side take what is free together, parts of groups beside the process that holds the layer."""
    measured = replace(sizes(model), cuda=True, forward=2**24)
    need = peak(measured.stages(Choice(8, on_disk=True)))
    devices = ["cuda:0", "cuda:1", "cuda:0"]
    made = plan_on_gpu(model, tmp_path, measured, AMPLE, 2 * (need + DEVICE_RESERVE), 3, devices)
    assert made.choice == Choice(8, on_disk=True)
    groups = tuple(group._replace(stacked=2**32, alone=2**31) for group in measured.groups)
    parts = replace(measured, groups=groups)
    need = peak(parts.stages(Choice(16, by_operator=True), 2))
    assert 2 * 2**31 < need < 3 * 2**31
    free = need + 3 * DEVICE_RESERVE
    assert plan_on_gpu(model, tmp_path, parts, AMPLE, free, 3, devices, propagate="pruned").choice == Choice(16, by_operator=True)
    with pytest.raises(FistaPrunerError, match=r"free on cpu is not enough: solving .* needs 4\.33 GiB, even"):
        plan_on_gpu(model, tmp_path, parts, AMPLE, free - 1, 3, devices, propagate="pruned")


def test_a_gpu_without_room_for_one_window_is_named(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    recipe = Recipe.build({"method": "wanda", "propagate": "dense"}).resolved()
    monkeypatch.setattr(plan_module, "free_device_memory", lambda _: 2**29)
    for name, what in (("measure_time", "16 windows at a time"), ("Sizes", "one window")):
        monkeypatch.setattr(plan_module, name, SimpleNamespace(measure=out_of_memory) if name == "Sizes" else out_of_memory)
        with pytest.raises(FistaPrunerError, match=f"^the 512 MiB that are free on cpu are not enough for {what} through one"):
            make_plan(*model[:2], recipe, allocate(recipe, model[1]), model[2], 16, tmp_path)


def test_operators_solved_one_by_one(model: Model, tmp_path: Path) -> None:
    """The choice is recorded and carried out; for a method that treats rows alone it changes nothing."""
    folder = str(model[0].checkpoint.folder)
    settings: dict[str, Any] = {
        "method": "wanda",
        "calibration": {"source": "python", "samples": 4, "seqlen": 24},
        "execution": {"threads": 1},
    }
    prune(folder, tmp_path / "stacked", **settings)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fistapruner.planning.plan.Choice", lambda size, **_: Choice(size, on_disk=True, by_operator=True))
        report = prune(folder, tmp_path / "alone", **settings)
    facts = json.loads((tmp_path / "alone" / "run.json").read_text())
    assert facts["decision"]["numerics"]["by_operator"]
    assert facts["decision"]["on_disk"]
    stacked, alone = ((tmp_path / out / "model" / "model.safetensors").read_bytes() for out in ("stacked", "alone"))
    assert stacked == alone
    rows = {row.quantity: row for row in report.plan}
    assert all(row.planned and row.actual for row in rows.values())
    assert rows["peak memory"].planned == pytest.approx(rows["peak memory"].actual, rel=0.5)


def test_plan_on_the_command_line(model: Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a time estimate, which tiny models are otherwise not worth."""
    monkeypatch.setattr(probe, "WORTH_A_PROBE", 0)
    command = ["plan", str(model[0].checkpoint.folder), "--samples", "4", "--seqlen", "32", "--method", "sparsegpt", "--json"]
    assert main(command) == 0
    said = json.loads(capsys.readouterr().out)
    assert {row["quantity"] for row in said["rows"]} == {"peak memory", "disk", "pruning, one worker"}
    assert all(row["planned"] > 0 for row in said["rows"])


def test_block_matching_is_in_the_estimated_time(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps are scaled from a few; the rest of the estimate, here 0, from a pass."""
    skeleton, layout, tokens = model
    monkeypatch.setattr(probe, "WORTH_A_PROBE", 0)
    monkeypatch.setattr(probe, "_seconds", lambda *_: 0.0)
    asked = []

    def layer(context: LayerContext, *_: Any, **__: Any) -> Any:
        asked.append(context.recipe.reconstruct)
        return SimpleNamespace(entry=SimpleNamespace(seconds={"reconstruct": 7.0 if context.recipe.reconstruct else 0.0}, passed_after=0.0))

    monkeypatch.setattr(probe, "prune_layer", layer)
    estimates = []
    for steps in (0, 2, 1000):
        recipe = Recipe.build({"reconstruct": steps, "sparsity": "2:4"}).resolved()
        estimates.append(probe.measure_time(skeleton, layout, recipe, allocate(recipe, layout), tokens, 16))
    assert asked == [0, 2, probe.MATCHING_STEPS]
    # 64 windows, 8 held out, 16 of them in the probe, 2 held out; looks: one at the start and up to eight.
    assert estimates == pytest.approx(
        [0.0, 7.0 * len(skeleton) * (6 + 3 * 8) / (6 + 3 * 2), 7.0 * len(skeleton) * (3000 + 9 * 8) / (12 + 5 * 2)]
    )


def test_the_estimated_dense_pass_is_of_its_windows(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton, layout, tokens = model
    monkeypatch.setattr(probe, "WORTH_A_PROBE", 0)
    monkeypatch.setattr(probe, "_seconds", lambda *_: 0.0)
    monkeypatch.setattr(probe, "dense_windows", lambda *_: len(tokens) // 4)
    entry = SimpleNamespace(seconds={"capture": 5.0, "gram": 3.0, "io": 0.5}, passed_after=2.5)
    monkeypatch.setattr(probe, "prune_layer", lambda *_, **__: SimpleNamespace(entry=entry))
    recipe = Recipe.build({"sparsity": "2:4"}).resolved()
    estimate = probe.measure_time(skeleton, layout, recipe, allocate(recipe, layout), tokens, 16)
    # 8 s of passes of 16 of 64 windows, 2 of them the dense pass, which is of a quarter of the windows.
    assert estimate == pytest.approx((0.5 + (6.0 + 2.0 / 4) * 4) * len(skeleton))


@pytest.mark.parametrize(("by_operator", "solved", "count"), [(False, [((64, 16), 2)], 1), (True, [((10, 16), 1), ((12, 16), 1)], 4 + 2)])
def test_time_is_of_parts_where_the_run_solves_parts(
    model: Model, monkeypatch: pytest.MonkeyPatch, by_operator: bool, solved: list[Any], count: int
) -> None:
    """A part of each operator is timed and counts as often as the operator has parts: four of 10 rows, two of 12."""
    skeleton, layout, tokens = model
    monkeypatch.setattr(probe, "WORTH_A_PROBE", 0)
    monkeypatch.setattr(parts_module, "ROWS", 12)
    recipe = Recipe.build({"method": "wanda"}).resolved()
    sparsity = allocate(recipe, layout)
    problem = LayerProblem(torch.randn(64, 16), torch.eye(16), names=tuple(sparsity)[:2], rows=(40, 24))
    timed: list[Any] = []

    def seconds(problem: LayerProblem, patterns: list[Any], _: Recipe) -> float:
        timed.append((problem.shape, len(patterns)))
        return 1.0

    def layer(*_: Any, events: LayerEvents) -> Any:
        events.problem(0, problem)
        return SimpleNamespace(entry=SimpleNamespace(seconds={}, passed_after=0.0))

    monkeypatch.setattr(probe, "_seconds", seconds)
    monkeypatch.setattr(probe, "prune_layer", layer)
    assert probe.measure_time(skeleton, layout, recipe, sparsity, tokens, 16, by_operator) == pytest.approx(count * len(skeleton))
    assert timed == solved

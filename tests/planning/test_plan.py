"""The plan before a run: what it predicts, what it changes to fit, when it refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import tiny
from fistapruner import Recipe
from fistapruner.cli import main
from fistapruner.core import LayerProblem, parse_sparsity
from fistapruner.errors import FistaPrunerError
from fistapruner.models.discovery import discover
from fistapruner.models.files.checkpoint import Checkpoint
from fistapruner.models.layerwise import LayerwiseModel
from fistapruner.models.layout import Layout
from fistapruner.models.source import UNTRUSTED
from fistapruner.pipeline.plan import local_workers, plan_model
from fistapruner.planning import budget as budget_module
from fistapruner.planning import plan as plan_module
from fistapruner.planning.budget import DEVICE_RESERVE, Resources, room_for
from fistapruner.planning.footprint import peak_bytes, solve_bytes
from fistapruner.planning.measured_sizes import measure_sizes
from fistapruner.planning.phases import PHASES
from fistapruner.planning.plan import Fitted, fit, make_plan, written
from fistapruner.planning.sizes import GENERATING, UNCOUNTED, Choice, Sizes
from fistapruner.planning.time_probe import Scale, extrapolate, frequent_shapes, measure_time, time_solve
from fistapruner.pruning.inputs import change_widths
from fistapruner.pruning.inputs import choose_patterns as allocate
from fistapruner.pruning.run import prune
from fistapruner.runs.layer_records import LayerEntry
from fistapruner.runtime.formatting import size
from fistapruner.settings.execution_settings import Execution
from fistapruner.settings.loading import merge_settings
from fistapruner.solvers import parse_method, solve

Model = tuple[LayerwiseModel, Layout, torch.Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tiny.save("llama", tmp_path_factory.mktemp("plan") / "model")
    skeleton = LayerwiseModel(Checkpoint.open(folder), torch.device("cpu"))
    return skeleton, discover(skeleton), torch.zeros(64, 32, dtype=torch.long)


def sizes(model: Model, **settings: Any) -> Sizes:
    fixed = {"method": "wanda", "propagate": "dense", "calibration": {"source": "python", "samples": 64}}
    recipe = Recipe.build({**fixed, **settings}).resolved()
    return measure_sizes(model[0], model[1], recipe, allocate(recipe, model[1]), model[2])


def test_bytes_of_a_computation_are_counted_while_they_live() -> None:
    def work() -> None:
        first = torch.zeros(1000)
        del first
        second = torch.zeros(500)
        third = second.view(5, 100) + 1
        del second, third

    assert peak_bytes(work) == 4000


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps", "fista"])
@pytest.mark.parametrize("rows", [512, 160])
def test_small_solve_predicts_a_large_one(method: str, rows: int) -> None:
    """From a problem of 256 inputs to one of 512: never much too little, never far too much."""
    n = 512
    sparsity, steps = parse_sparsity("50%"), parse_method(method)
    activations = torch.randn(2 * n, n)
    weight = torch.randn(rows, n)
    problem = LayerProblem(weight, activations.T @ activations / n)
    measured = 4 * (weight.numel() + n * n) + peak_bytes(lambda: solve(problem, sparsity, steps))
    assert 0.9 * measured < solve_bytes(rows, n, sparsity, steps) < 1.7 * measured


def test_a_small_solve_is_made_once_for_the_same_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(method: str, rows: int = 8, **keywords: Any) -> int:
        return solve_bytes(rows, 20, parse_sparsity("50%"), parse_method(method), **keywords)

    asked: list[dict[str, Any]] = [{"method": "sparsegpt"}, {"method": "wanda"}, {"method": "wanda", "rows": 4}]
    asked += [{"method": "wanda", "drift": True}, {"method": "wanda", "rank": 2}]
    first = [measured(**each) for each in asked]
    with monkeypatch.context() as patched:
        patched.setattr("fistapruner.planning.footprint.solve_low_rank", None)
        assert [measured(**each) for each in asked] == first
        with pytest.raises(TypeError, match="not callable"):
            measured("sparsegpt", rank=2)
    assert len(set(first)) > 3


def test_choices_only_save_memory(model: Model) -> None:
    measured = sizes(model)
    peaks = [
        max(measured.stages(choice).values())
        for choice in (
            Choice(16),
            Choice(16, on_disk=True),
            Choice(1, on_disk=True),
            Choice(1, on_disk=True),
        )
    ]
    assert peaks == sorted(peaks, reverse=True)


def test_more_calibration_tokens_need_no_more_memory_on_disk(model: Model) -> None:
    few = sizes(model)
    measured, more = (replace(few, samples=count * few.samples) for count in (100, 10_000))
    assert measured.stages(Choice(16, on_disk=True)) == more.stages(Choice(16, on_disk=True))
    assert max(more.stages(Choice(16)).values()) > max(measured.stages(Choice(16)).values())
    assert more.disk(Choice(16, on_disk=True), 1) > measured.disk(Choice(16, on_disk=True), 1)


def test_the_disk_of_workers_files_is_planned(model: Model, tmp_path: Path) -> None:
    """Of one worker, too, and of those of a Ray cluster."""
    folder, calibration = model[0].checkpoint.folder, {"samples": 64, "seqlen": 32}

    def disk(executor: str, workers: int | None = None) -> float:
        execution = {"executor": executor, "workers": workers, "threads": 1}
        settings = {"method": "wanda", "propagate": "dense", "calibration": calibration, "execution": execution}
        rows = {row.quantity: row.planned for row in plan_model(folder, Recipe.build(settings), tmp_path).rows}
        return rows["disk"] or 0.0

    serial, process, ray, three = (disk(*how) for how in (("serial", None), ("process", 1), ("ray", 1), ("ray", 3)))
    states = 64 * 32 * model[0].width * model[0].dtype.itemsize
    assert process == ray >= serial + 2 * states
    assert three >= ray + 2 * states


def test_hidden_states_go_to_disk_before_batches_shrink(model: Model) -> None:
    """Limits between the peaks of the choices pick the first choice that fits."""
    measured = replace(sizes(model), base=0)
    recipe = Recipe.build({"method": "wanda", "propagate": "dense"}).resolved()
    choices = (Choice(16), Choice(16, on_disk=True), Choice(8, on_disk=True))
    limits = {choice: peak(measured.stages(choice)) for choice in choices}
    for choice, limit in limits.items():
        assert fit(measured, recipe, on_cpu(limit), 16).choice == choice
    for workers in (1, 2):  # they read and write files
        apart = recipe.model_copy(update={"execution": Execution(executor="process", workers=workers)})
        assert fit(measured, apart, on_cpu(limits[Choice(16)]), 16, workers).choice.on_disk


def test_the_files_beside_the_weights_are_planned(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    disk = []
    for _ in range(2):
        opened = LayerwiseModel(Checkpoint.open(folder), torch.device("cpu"))
        disk.append(sizes((opened, discover(opened), torch.zeros(2, 16, dtype=torch.long))).disk(Choice(2), 1))
        with (folder / "tokenizer.json").open("a") as file:
            file.write(" " * 10**6)
    assert disk[1] - disk[0] == 10**6


def test_what_is_measured_for_block_reconstruction_is_counted(model: Model) -> None:
    """The weights of the errors of every layer's output: in memory while they are measured, then in a file."""
    plain = replace(sizes(model, reconstruct=2, propagate="pruned"), base=0)
    layer = 4 * model[0].width ** 2
    assert plain.metric == layer
    without = replace(plain, metric=0)
    assert plain.disk(Choice(4), 1) - without.disk(Choice(4), 1) == len(model[0]) * layer
    more = [each.stages(Choice(4))["measuring the dense model"] for each in (plain, without)]
    assert more[0] - more[1] == pytest.approx((1 + UNCOUNTED) * len(model[0]) * layer, abs=1)


def mixture(folder: Path, **changes: Any) -> Model:
    """A mixture whose first layer is dense, with few weights and a wide operator."""
    saved = tiny.save("deepseek_v3", folder, intermediate_size=512, n_routed_experts=64, **changes)
    opened = LayerwiseModel(Checkpoint.open(saved), torch.device("cpu"))
    return opened, discover(opened), torch.zeros(64, 32, dtype=torch.long)


def test_a_plan_is_of_the_layers_that_need_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fistapruner.planning.measured_sizes.resident_memory", lambda: 0)
    opened, layout, tokens = mixture(tmp_path)
    assert layout.weights(0) < layout.weights(1)
    whole = sizes((opened, layout, tokens), method="sparsegpt")
    assert len(whole.others) == 1
    for index in (0, 1):
        names = {name for name, _ in layout.operators() if f".{index}." in name.removeprefix(layout.layers_name)[:4]}
        alone = sizes((opened, layout.only(names), tokens), method="sparsegpt")
        for choice in (Choice(16), Choice(1, on_disk=True)):
            assert not alone.others
            assert all(whole.stages(choice)[name] >= nbytes for name, nbytes in alone.stages(choice).items())
    stages = whole.stages(Choice(1, on_disk=True))
    assert max(stages, key=lambda name: stages[name]) == "solving down_proj"
    assert stages["solving down_proj"] > 4 * 4 * 512**2


def test_time_is_that_of_layers_of_each_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, layout, tokens = mixture(tmp_path, num_hidden_layers=4)
    recipe = Recipe.build({"method": "wanda", "calibration": {"source": "python", "samples": 64}}).resolved()
    sparsity, timed = allocate(recipe, layout), []

    def seconds_of(entry: LayerEntry, solving: float, scale: Scale) -> float:
        timed.append((entry.index, scale.layers, scale.pruned))
        return 1.0

    monkeypatch.setattr("fistapruner.planning.time_probe.extrapolate", seconds_of)
    assert measure_time(opened, layout, recipe, sparsity, tokens, 4, least=0) == 2.0
    assert timed == [(1, 3.0, 3.0), (0, 1.0, 1.0)]
    others = {**sparsity, **{name: parse_sparsity("30%") for name in sparsity if ".2." in name.partition("mlp")[0]}}
    assert frequent_shapes(layout, others) == {1: 2, 0: 1, 2: 1}


def test_the_method_is_timed_once_for_experts_of_one_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, layout, tokens = mixture(tmp_path)
    recipe = Recipe.build({"method": "wanda", "calibration": {"source": "python", "samples": 64}}).resolved()
    timed, solving = Mock(return_value=1.0), []

    def seconds_of(entry: LayerEntry, seconds: float, scale: Scale) -> float:
        solving.append(seconds)
        return seconds

    monkeypatch.setattr("fistapruner.planning.time_probe.time_solve", timed)
    monkeypatch.setattr("fistapruner.planning.time_probe.extrapolate", seconds_of)
    measure_time(opened, layout, recipe, allocate(recipe, layout), tokens, 4, least=0)
    assert sorted(solving) == sorted(sum(map(len, groups)) for groups in layout.layers)
    experts = sum(len(group) for groups in layout.layers for group in groups if group[0].experts)
    assert experts == 3 * 64
    assert 2 <= timed.call_count - (sum(solving) - experts) <= 4  # with tokens and without


def test_a_plan_counts_the_calibration_tokens_and_makes_none(model: Model, tmp_path: Path) -> None:
    """Far more than memory holds are refused in one line, and so are numbers that no run can have."""
    few, many = (sizes(model, calibration={"source": "python", "samples": count}).base for count in (1, 2**26))
    assert many - few == pytest.approx(8 * 32 * 2**26, rel=0.01)
    folder, calibration = model[0].checkpoint.folder, {"source": "python", "samples": 2**31 - 1}
    with pytest.raises(FistaPrunerError, match=r"are free is not enough: .* needs "):
        plan_model(folder, Recipe.build({"method": "wanda", "calibration": calibration}), tmp_path)
    wrong: list[dict[str, Any]] = [
        {"calibration": {"samples": 2**31}},
        {"reconstruct": 10**30},
        {"execution": {"threads": 10**30}},
        {"execution": {"workers": 10**30, "executor": "process"}},
        {"execution": {"batch_size": 10**30}},
    ]
    for settings in wrong:
        with pytest.raises(FistaPrunerError, match="should be less than"):
            Recipe.build(settings)


def test_the_process_that_starts_workers_is_in_the_budget(model: Model) -> None:
    measured = replace(sizes(model), base=2**30)
    recipe = Recipe.build({"method": "wanda", "propagate": "dense", "execution": {"executor": "process"}}).resolved()
    need = 3 * peak(measured.stages(Choice(1, on_disk=True)))
    fit(measured, recipe, on_cpu(need + 2**30), 1, workers=3)
    with pytest.raises(
        FistaPrunerError,
        match=r"in each of 3 workers beside the 1\.00 GiB of the process that starts the workers, even with hidden "
        r"states on disk and one window at a time; give more, take fewer --workers, shorten --seqlen",
    ):
        fit(measured, recipe, on_cpu(need + 2**30 - 1), 1, workers=3)


def test_a_refusal_says_how_to_do_without_measurements_of_the_dense_model(model: Model) -> None:
    least = Choice(1, on_disk=True)
    settings = {"method": "proximal", "calibration": {"samples": 4, "seqlen": 32}}
    without = {**settings, "allocation": "uniform", "weighting": "none"}
    measured, unmeasured = (sizes(model, **asked) for asked in (settings, without))
    measured = replace(measured, logits=2**27)  # of a large vocabulary
    limit = peak(unmeasured.stages(least))
    fit(unmeasured, Recipe.build(without).resolved(), on_cpu(limit), 1)
    advice = "or choose a lighter --method, or measure nothing with --allocation uniform --weighting none --permu"
    with pytest.raises(FistaPrunerError, match=f"measuring the dense model needs .* {advice}"):
        fit(measured, Recipe.build(settings).resolved(), on_cpu(limit), 1)


@pytest.mark.parametrize(("propagate", "most"), [("dense", 3), ("pruned", 1)])
def test_workers_that_do_not_start_are_not_planned(model: Model, tmp_path: Path, propagate: str, most: int) -> None:
    """There are three layers, which wait for each other with propagate=pruned."""

    def rows(workers: int, **limit: Any) -> list[float | None]:
        execution = {"executor": "process", "workers": workers, "threads": 1, **limit}
        settings = {"method": "wanda", "propagate": propagate, "execution": execution}
        settings["calibration"] = {"samples": 4, "seqlen": 32}
        return [row.planned for row in plan_model(model[0].checkpoint.folder, Recipe.build(settings), tmp_path).rows]

    assert rows(64) == pytest.approx(rows(most), rel=0.01)
    with pytest.raises(FistaPrunerError, match="take fewer --workers" if most > 1 else "is not enough"):
        rows(64, memory_limit=2**20)


def test_given_windows_are_named_in_a_refusal(model: Model) -> None:
    execution = {"batch_size": 4, "memory_limit": 2**20}
    recipe = Recipe.build({"method": "wanda", "propagate": "dense", "execution": execution}).resolved()
    for measured, resources in (
        (sizes(model), on_cpu(2**20)),
        (replace(sizes(model), cuda=True), Resources(AMPLE, GPU, {GPU: 0}, (GPU,))),
    ):
        with pytest.raises(
            FistaPrunerError,
            match=r"even with .*4 windows at a time \(--batch-size\); .*, lower --batch-size, shorten --seqlen",
        ):
            fit(measured, recipe, resources, 4)


def test_workers_of_ray_on_this_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fistapruner.pipeline.plan.available_cores", lambda: 8)
    given = {"executor": "ray", "device": "cpu", "threads": 2}
    for settings, workers in (
        ({}, 4),
        ({"address": "auto", "workers": 3}, 3),
        ({"workers": 9}, 4),
        ({"address": "10.0.0.5:6379", "workers": 3}, 1),
        ({"executor": "serial"}, 1),
    ):
        assert local_workers(Execution(**{**given, **settings})) == workers


def test_text_that_the_model_generates_needs_all_of_it(model: Model) -> None:
    """In one process, whatever the number of workers, with keys, values and logits; other text is the way out."""
    plain, measured = (replace(sizes(model, calibration={"source": source}), base=0) for source in ("python", "self"))
    whole = model[0].checkpoint.nbytes
    assert measured.text > whole
    assert set(measured.stages(Choice(16))) - set(plain.stages(Choice(16))) == {GENERATING}
    deep = replace(measured, text=2**30)
    need = deep.stages(Choice(16))[GENERATING]
    assert need > 2**30
    parallel = Recipe.build({"method": "wanda", "propagate": "dense", "execution": {"executor": "process"}}).resolved()
    assert fit(deep, parallel, on_cpu(need), 16, workers=4).choice.batch_size == 16
    with pytest.raises(
        FistaPrunerError,
        match=r"is not enough: generating text with the whole model needs 1\.08 GiB; give more, or take text instead, "
        r"such as --calibration c4, python or a file$",
    ):
        fit(deep, parallel, on_cpu(need - 1), 16, workers=4)
    on_gpu = replace(deep, cuda=True)
    assert on_gpu.stages(Choice(16))[GENERATING] == need
    assert on_gpu.host_stages(Choice(16))[GENERATING] >= whole


@pytest.mark.parametrize("targets", [r"re:layers\.1\.", r"re:layers\.[01]\.mlp"])
def test_layers_without_operators_are_no_hindrance(model: Model, tmp_path: Path, targets: str) -> None:
    """The sizes are of a layer that has operators; time is estimated too, and the dense model is measured."""
    recipe = Recipe.build({"method": "proximal", "targets": [targets]}).resolved()
    layout = model[1].select(recipe)
    made = make_plan(model[0], layout, recipe, allocate(recipe, layout), model[2], 16, tmp_path)
    assert {row.quantity for row in made.rows} == {"peak memory", "disk"}
    seconds = measure_time(model[0], layout, recipe, allocate(recipe, layout), model[2], 16, least=0)
    assert seconds is not None
    assert seconds > 0
    report = prune(
        str(model[0].checkpoint.folder),
        tmp_path / "run",
        method="proximal",
        targets=[targets],
        calibration={"source": "python", "samples": 4, "seqlen": 24},
    )
    assert all(layer.operators == [] for layer in report.layers if not layout.layers[layer.index])


def test_the_last_of_several_names_that_match_sets_the_sparsity(model: Model) -> None:
    """A plain name is the last dotted parts of a full one; ``re:`` is found anywhere; others get ``--sparsity``."""
    names = {"re:mlp": "40%", "mlp.down_proj": "30%", "re:down|q_proj$": "20%"}
    chosen = allocate(Recipe.build({"sparsity": "60%", "allocation": names}), model[1])
    found = {name.removeprefix("model.layers.0."): str(pattern) for name, pattern in chosen.items() if ".0." in name}
    assert found["mlp.down_proj"] == found["self_attn.q_proj"] == "20%"
    assert found["mlp.up_proj"] == "40%"
    assert found["self_attn.o_proj"] == "60%"
    with pytest.raises(FistaPrunerError, match="'proj' matches no operator"):
        allocate(Recipe.build({"allocation": {"proj": "40%"}}), model[1])
    recipe = Recipe.build({"allocation": {"q_proj": "70%"}, "ignore": ["q_proj"]})
    with pytest.raises(FistaPrunerError, match="'q_proj' matches only operators that targets and ignore leave out"):
        allocate(recipe, model[1].select(recipe))


def test_impossible_limit_is_refused(model: Model, tmp_path: Path) -> None:
    recipe = Recipe.build({"method": "wanda", "propagate": "dense", "execution": {"memory_limit": "1MiB"}}).resolved()
    with pytest.raises(FistaPrunerError, match=r"--memory-limit 1\.00 MiB is not enough: .* needs .* [MG]iB"):
        make_plan(*model[:2], recipe, allocate(recipe, model[1]), model[2], 16, tmp_path)


AMPLE = 2**50
CPU = torch.device("cpu")
GPU = torch.device("cuda:0")


def on_cpu(limit: int) -> Resources:
    return Resources(limit, CPU, {}, (CPU,))


def fit_on_gpu(measured: Sizes, host: int, free: int, devices: Sequence[str] = ("cuda:0",), **settings: Any) -> Fitted:
    """The choice for a model whose layers run on GPUs with so many bytes free, of which ``measured`` are the sizes."""
    execution = {"memory_limit": host, "executor": "process" if len(devices) > 1 else "serial"}
    settings = merge_settings({"method": "wanda", "propagate": "dense", "execution": execution}, settings)
    places = tuple(torch.device(name) for name in devices)
    resources = Resources(host, GPU, dict.fromkeys(places, free), places)
    return fit(measured, Recipe.build(settings).resolved(), resources, 16, len(places))


def peak(stages: dict[str, int]) -> int:
    return max(stages.values())


def test_hidden_states_stay_on_a_gpu_with_room_for_them(model: Model) -> None:
    """And for full batches beside them; parts are no reason to leave, layers in parallel share files."""
    measured = replace(sizes(model), cuda=True, samples=6400)
    resident = Choice(16, on_device=True)
    states = 3 * 6400 * measured.window
    assert peak(measured.stages(resident)) - peak(measured.stages(Choice(16))) > 0.9 * states
    copied = peak(measured.host_stages(Choice(16, on_disk=True))) - peak(measured.host_stages(resident))
    assert 0 < copied < 0.05 * states  # page-locked buffers of a few batches
    enough = peak(measured.stages(resident)) + DEVICE_RESERVE
    made = fit_on_gpu(measured, AMPLE, enough)
    assert made.choice == resident
    assert made.changed is None
    without = fit_on_gpu(measured, AMPLE, enough - 1)
    assert without.choice == Choice(16)
    assert without.changed is None
    for devices, executor in ((["cuda:0", "cuda:1"], "process"), (["cuda:0"], "process"), (["cuda:0"], "ray")):
        made = fit_on_gpu(measured, AMPLE, AMPLE, devices, execution={"executor": executor})
        assert made.choice == Choice(16, on_disk=True)
        assert written(made, disk=2**20, seconds=None).says[-1] == "hidden states between decoder layers: in files"
        in_turn = fit_on_gpu(measured, AMPLE, AMPLE, devices, propagate="pruned", execution={"executor": executor})
        assert in_turn.choice.on_device


def test_beside_a_gpu_hidden_states_take_main_memory(model: Model) -> None:
    """Where they do not fit on the GPU they wait there, where they do not fit there they go to disk; batches stay."""
    measured = replace(sizes(model), cuda=True, samples=6400)
    free = peak(measured.stages(Choice(16))) + DEVICE_RESERVE
    inside, on_disk = Choice(16), Choice(16, on_disk=True)
    states = 3 * 6400 * measured.window
    assert peak(measured.host_stages(inside)) - peak(measured.host_stages(on_disk)) > 0.9 * states
    assert peak(measured.stages(inside)) == peak(measured.stages(on_disk)) < states
    for host, choice in (
        (peak(measured.host_stages(inside)), inside),
        (peak(measured.host_stages(inside)) - 1, on_disk),
    ):
        assert fit_on_gpu(measured, host, free).choice == choice
    with pytest.raises(
        FistaPrunerError,
        match=r"^--memory-limit 1\.00 MiB is not enough: .* needs .* [MG]iB, even with hidden states on disk",
    ):
        fit_on_gpu(measured, 2**20, AMPLE)


def test_a_small_gpu_gets_smaller_batches(model: Model) -> None:
    """Hidden states stay in main memory."""
    measured = replace(sizes(model), cuda=True, samples=6400, forward=2**24)
    free = peak(measured.stages(Choice(8))) + DEVICE_RESERVE
    made = fit_on_gpu(measured, AMPLE, free)
    assert made.choice == Choice(8)
    assert (
        made.changed
        == f"to fit the {size(free - DEVICE_RESERVE)} that are free on cuda:0: 8 windows at a time instead of 16"
    )
    groups = tuple(group._replace(solving=2**31) for group in measured.groups)
    wide = replace(measured, groups=groups)
    with pytest.raises(
        FistaPrunerError,
        match=r"^the 1\.00 MiB that are free on cuda:0 is not enough: .* one window at a time; free some",
    ):
        fit_on_gpu(wide, AMPLE, DEVICE_RESERVE + 2**20)
    with pytest.raises(FistaPrunerError, match="one window at a time"):
        fit_on_gpu(wide, AMPLE, 0)


def test_both_budgets_bind(model: Model) -> None:
    measured = replace(sizes(model), cuda=True, samples=6400, forward=2**24)
    host, free = peak(measured.host_stages(Choice(4, on_disk=True))), peak(measured.stages(Choice(4))) + DEVICE_RESERVE
    made = fit_on_gpu(measured, host, free)
    assert made.choice == Choice(4, on_disk=True)
    assert "--memory-limit" in made.changed
    assert "free on cuda:0: hidden states go to disk, 4 windows at a time instead of 16" in made.changed
    assert [budget.quantity for budget in made.budgets] == ["peak GPU memory", "peak memory"]
    assert [budget.peak(made.choice) for budget in made.budgets] == [
        peak(measured.stages(made.choice)),
        peak(measured.host_stages(made.choice)),
    ]
    plan = written(made, disk=2**20, seconds=None)
    assert set(plan.stages) > {"the embeddings", "the embeddings (main memory)", "pruning a layer (main memory)"}
    assert " of GPU memory at its peak" in plan.says[-2]
    assert " of main memory at its peak" in plan.says[-2]
    assert plan.says[-1] == "hidden states between decoder layers: in files"
    assert written(made, disk=2**20, seconds=7260.0).says[-2].endswith(" of disk, about 2 h 01 min of pruning")
    assert written(made, disk=2**20, seconds=0.84).says[-2].endswith(" of disk, about 840 ms of pruning")


def test_workers_share_a_gpu(model: Model) -> None:
    """Layers side by side take what is free together; layers that wait for each other need one worker."""
    measured = replace(sizes(model), cuda=True, forward=2**24)
    need = peak(measured.stages(Choice(8, on_disk=True)))
    devices = ["cuda:0", "cuda:1", "cuda:0"]
    made = fit_on_gpu(measured, AMPLE, 2 * (need + DEVICE_RESERVE), devices)
    assert made.choice == Choice(8, on_disk=True)
    alone = fit_on_gpu(measured, AMPLE, peak(measured.stages(Choice(16))) + DEVICE_RESERVE, devices, propagate="pruned")
    assert (alone.choice, alone.workers) == (Choice(16), 1)


def test_a_gpu_without_room_for_one_window_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_module, "free_device_memory", lambda _: 2**29)
    with (
        pytest.raises(
            FistaPrunerError, match=r"^the 512 MiB that are free on cuda:0 are not enough for one window through"
        ),
        room_for(GPU, "one window"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_plan_on_the_command_line(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a time estimate: a tiny model takes seconds."""
    command = [
        "plan",
        str(model[0].checkpoint.folder),
        "--samples",
        "4",
        "--seqlen",
        "32",
        "--method",
        "sparsegpt",
        "--json",
    ]
    assert main(command) == 0
    said = json.loads(capsys.readouterr().out)
    assert {row["quantity"] for row in said["rows"]} == {"peak memory", "disk"}
    assert all(row["planned"] > 0 for row in said["rows"])


@pytest.mark.parametrize(("steps", "timed", "factor"), [(2, 2, 30 / 12), (1000, 4, 3072 / 22)])
def test_block_reconstruction_is_in_the_estimated_time(steps: int, timed: int, factor: float) -> None:
    """64 windows, 8 of them held out, 16 in the timed batch, 2 held out; one validation first and up to eight later."""
    scale = Scale(windows=64, batch=16, dense=None, layers=3, pruned=2, steps=steps, timed_steps=timed)
    assert extrapolate(LayerEntry(index=0, seconds={"reconstruct": 7.0}), 0.0, scale) == pytest.approx(7.0 * 2 * factor)


def test_the_estimated_dense_pass_is_of_its_windows() -> None:
    entry = LayerEntry(index=0, seconds={"capture": 5.0, "gram": 3.0, "io": 0.5}, passed_after=2.5)
    scale = Scale(windows=64, batch=16, dense=16, layers=3, pruned=3)
    # 8 s of passes of 16 of 64 windows, 2 of them the dense pass, which is of a quarter of the windows.
    assert extrapolate(entry, 0.0, scale) == pytest.approx((0.5 + (6.0 + 2.0 / 4) * 4) * 3)


def test_time_is_that_of_the_first_rows_and_of_more() -> None:
    """A solve of 225 of 3,600 rows takes 2 s, one of 450 rows 3 s: 225 rows more take 1 s each time."""
    shapes: list[Any] = []

    def timer(problem: LayerProblem, pattern: Any, _: Recipe) -> float:
        shapes.append(problem.shape)
        return 1 + len(problem.weight) / 225

    problem = LayerProblem(torch.randn(3600, 16), torch.eye(16))
    recipe = Recipe.build({"method": "wanda"}).resolved()
    assert time_solve(problem, parse_sparsity("50%"), recipe, timer=timer) == pytest.approx(1 + 3600 / 225)
    assert shapes == [(225, 16), (450, 16)]


def test_plan_counts_low_rank_parts_and_says_so(model: Model, tmp_path: Path) -> None:
    plain, more = sizes(model, sparsity="2:4"), sizes(model, sparsity="2:4", low_rank=4)
    weights = sum(4 * (operator.rows + operator.columns) for _, operator in model[1].operators())
    bytes_each = model[0].checkpoint.dtype.itemsize
    choice = Choice(4)
    assert more.disk(choice, 1) - plain.disk(choice, 1) == 2 * weights * bytes_each  # in the journal and the adapter
    recipe = Recipe.build({"method": "wanda", "propagate": "dense", "sparsity": "2:4", "low_rank": 4}).resolved()
    plan = make_plan(model[0], model[1], recipe, allocate(recipe, model[1]), model[2], 4, tmp_path)
    share = weights / sum(operator.rows * operator.columns for _, operator in model[1].operators())
    assert any(f"additional weights, {100 * share:.1f} % of the operators'" in said for said in plan.says)


@pytest.mark.parametrize("structure", ["experts=25%", "mlp=25%", "mlp=25%,experts=25%"])
def test_cutting_experts_alone_is_planned(tmp_path: Path, structure: str) -> None:
    """The layer, the hidden states and the experts that stay are in memory; the journal has the experts on disk."""
    folder = tiny.save("mixtral", tmp_path / "model", hidden_size=64, intermediate_size=256)
    settings: dict[str, Any] = {"structure": structure, "calibration": {"source": "python", "seqlen": 16}}
    opened = LayerwiseModel(Checkpoint.open(folder), torch.device("cpu"))
    recipe = Recipe.build(settings).resolved()
    layout, widths = change_widths(opened, discover(opened), recipe, UNTRUSTED)
    tokens = torch.zeros(128, 16, dtype=torch.long)
    found = measure_sizes(opened, layout, recipe, allocate(recipe, layout), tokens, widths)
    experts, states = 3 * 3 * 64 * 256 * 4, 2 * 128 * 16 * 64 * 4
    choice = Choice(2)
    assert found.stages(choice)["cutting experts"] - found.base > found.layer + states + experts
    on_gpu = replace(found, cuda=True)
    assert max(on_gpu.host_stages(choice).values()) - found.base > found.layer + states + experts
    assert on_gpu.stages(choice)["cutting experts"] > found.layer
    stays = found.disk(choice, 1)
    count, width = 4 - ("experts" in structure), 192 if "mlp" in structure else 256
    router = 64 * count if "experts" in structure else 0
    assert found.pruned == 2 * 4 * (count * 3 * 64 * width + router)  # at most: experts that keep their place stay
    settings["calibration"]["samples"] = 2
    disk = next(row for row in prune(folder, tmp_path / "run", **settings).plan if row.quantity == "disk")
    assert disk.planned == stays
    assert disk.actual is not None
    assert disk.actual <= disk.planned * 1.05
    assert disk.actual > disk.planned * 0.7


@pytest.mark.parametrize(
    ("architecture", "structure"), [("llama", "25%"), ("mixtral", "mlp=25%"), ("llama", "heads=1")]
)
def test_the_proof_that_channels_can_go_fits_into_the_planned_memory(
    tmp_path: Path, architecture: str, structure: str
) -> None:
    """It holds the whole layer, and beside it the smaller one."""
    changes = {"hidden_size": 128, "intermediate_size": 512}
    opened = LayerwiseModel(
        Checkpoint.open(tiny.save(architecture, tmp_path / "model", **changes)), torch.device("cpu")
    )
    settings = {"structure": structure, "calibration": {"source": "python", "seqlen": 16, "samples": 2}}
    recipe, layout, made = Recipe.build(settings).resolved(), discover(opened), []
    peak = peak_bytes(lambda: made.append(change_widths(opened, layout, recipe, UNTRUSTED)))
    ((layout, widths),) = made
    tokens = torch.zeros(2, 16, dtype=torch.long)
    found = measure_sizes(opened, layout, recipe, allocate(recipe, layout), tokens, widths)
    planned = found.stages(Choice(2))["proving the smaller layer"] - found.base
    assert peak < planned < 1.5 * peak


def test_the_plan_names_all_phases_with_their_times(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "measure_time", partial(measure_time, least=0))
    recipe = Recipe.build({"sparsity": "50%", "calibration": {"source": "self", "samples": 2, "seqlen": 16}})
    plan = plan_model(model[0].checkpoint.folder, recipe, tmp_path)
    phases = {row.quantity: row.planned for row in plan.rows if row.unit == "seconds"}
    assert list(phases) == ["pruning, one worker", *PHASES]
    assert all(seconds and seconds > 0 for seconds in phases.values())
    said = next(said for said in plan.says if " in all: " in said)
    assert all(phase in said for phase in PHASES)
    told = recipe.changed({"calibration": {"source": "python"}, "method": "wanda", "allocation": "uniform"})
    rows = plan_model(model[0].checkpoint.folder, told, tmp_path).rows
    assert [row.quantity for row in rows if row.unit == "seconds"] == [
        "pruning, one worker",
        "evaluation",
        "sample prompts",
    ]


@pytest.mark.parametrize("structure", ["mlp=16,heads=1", "heads=1"])
def test_what_is_removed_is_counted_alike_after_a_layer_was_timed(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, structure: Any
) -> None:
    recipe = Recipe.build({"structure": structure, "calibration": {"source": "python", "samples": 2, "seqlen": 16}})
    folder = model[0].checkpoint.folder
    short = plan_model(folder, recipe, tmp_path).says[0]
    monkeypatch.setattr(plan_module, "measure_time", partial(measure_time, least=0))
    timed = plan_model(folder, recipe, tmp_path).says
    assert any("about" in said for said in timed)
    assert timed[0] == short
    again = LayerwiseModel(model[0].checkpoint, torch.device("cpu"))
    before = {name: tensor.shape for name, tensor in again.model.state_dict(keep_vars=True).items()}
    layout, widths = change_widths(again, discover(again), recipe.resolved(), UNTRUSTED)
    assert measure_time(again, layout, recipe.resolved(), allocate(recipe, layout), model[2], 2, least=0, widths=widths)
    assert {name: tensor.shape for name, tensor in again.model.state_dict(keep_vars=True).items()} == before


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"sparsity": "50%"}, True), ({"sparsity": "50%", "method": "wanda"}, False)],
)
def test_measuring_the_dense_model_is_planned_where_it_is_done(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: dict[str, Any], told: bool
) -> None:
    monkeypatch.setattr("fistapruner.planning.plan.measure_time", lambda *args, **keywords: 60.0)
    asked = {**settings, "calibration": {"source": "python", "samples": 2, "seqlen": 16}}
    plan = plan_model(model[0].checkpoint.folder, Recipe.build(asked), tmp_path)
    assert any(said.endswith("about 1 min 00 s of pruning") for said in plan.says)
    assert ("measuring the dense model" in [row.quantity for row in plan.rows]) == told


def test_the_learning_of_bypass_comes_on_top_of_the_planned_time(model: Model, tmp_path: Path) -> None:
    def says(method: str) -> list[str]:
        structure = {"remove": "heads=1", "method": method}
        asked = {"structure": structure, "calibration": {"source": "python", "samples": 2, "seqlen": 16}}
        plan = plan_model(model[0].checkpoint.folder, Recipe.build(asked), tmp_path)
        return [said for said in plan.says if "comes on top" in said]

    assert not says("obs")
    (said,) = says("bypass")
    assert "1,000 steps of 2 x 128 tokens" in said  # 8 sequences of 16, the length of the windows

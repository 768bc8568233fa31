"""The plan before a recovery: what it predicts, what it changes to fit, when it refuses, and that no bit changes."""

from __future__ import annotations

import json
import math
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import fistapruner as fp
import tiny
from fistapruner.activations.store import HiddenStates, scratch_factory
from fistapruner.calibration.training_text import TrainingText, training_text
from fistapruner.cli import main
from fistapruner.errors import FistaPrunerError
from fistapruner.evaluation.inspection import inspect_checkpoint
from fistapruner.models.discovery import discover
from fistapruner.models.files.checkpoint import Checkpoint
from fistapruner.models.layerwise import LayerwiseModel
from fistapruner.models.source import UNTRUSTED
from fistapruner.pipeline.compare import compare
from fistapruner.pipeline.compare_jobs import check_recoveries, plan_jobs
from fistapruner.pipeline.contenders import parse_contenders
from fistapruner.pipeline.plan import plan_model
from fistapruner.pipeline.plan_training import plan_alignment_of
from fistapruner.pipeline.prepare_training import share_of
from fistapruner.pipeline.recover_inputs import check_trained
from fistapruner.planning.budget import Resources
from fistapruner.planning.footprint import peak_bytes
from fistapruner.planning.sizes import GENERATING, UNCOUNTED
from fistapruner.planning.training_plan import FormPlan, fit, plan_training
from fistapruner.planning.training_probe import measure_form, measure_model
from fistapruner.planning.training_sizes import CUTTING, TrainingSizes
from fistapruner.planning.training_task import Task, TrainingChoice
from fistapruner.recipes.align_settings import AlignRecipe
from fistapruner.recipes.recover_settings import RecoverRecipe
from fistapruner.recipes.settings import Recipe
from fistapruner.runs.prune_directory import PruneDirectory
from fistapruner.runs.records import Report
from fistapruner.runs.snapshots import Snapshots
from fistapruner.runs.training_directory import RecoverDirectory
from fistapruner.runtime.formatting import size
from fistapruner.runtime.ranks import Ranks
from fistapruner.tuning.losses import TokenLoss
from fistapruner.tuning.objective import Objective
from fistapruner.tuning.steppers import FirstOrder, ForwardOnly
from fistapruner.tuning.trained import Trained

CPU = torch.device("cpu")
AMPLE = 2**50
SMALLEST = TrainingChoice(1, resident=False, states_on_disk=True, hidden_on_disk=True)
WIDE = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 320}


def task_for(
    folder: Path, layers: int = 2, *, architecture: str = "llama", out: Path | None = None, **settings: Any
) -> Task:
    """A task on a tiny model, half of whose weights count as zeros."""
    place = folder / f"{architecture}-{layers}"
    if not place.exists():
        tiny.save(architecture, place, num_hidden_layers=layers)
    model = LayerwiseModel(Checkpoint.open(place), CPU)
    layout = discover(model)
    data = {"source": "python", "tokens": 1024, "seqlen": 32}
    recipe = RecoverRecipe.build(
        {"parameters": "lora", "loss": "kl", "rank": 2, "windows_per_step": 4, "data": data, **settings}
    )
    survivors = {name: operator.rows * operator.columns // 2 for name, operator in layout.operators()}
    dense = None if recipe.loss == "ce" else LayerwiseModel(Checkpoint.open(place), CPU)
    return Task.of_recovery(model, layout, dense, recipe, survivors, 32, out or folder)


def sizes(task: Task) -> TrainingSizes:
    """What is measured for a task, without the memory of this process."""
    return TrainingSizes(task, replace(measure_model(task), base=0), measure_form(task))


def planned(needs: TrainingSizes, limit: int = AMPLE, free: int = AMPLE) -> FormPlan:
    return fit(needs, Resources(limit, CPU, {}, (CPU,)), free)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan")


@pytest.fixture(scope="module")
def needs(folder: Path) -> TrainingSizes:
    return sizes(task_for(folder, 6))


def test_each_way_to_save_memory_saves_it(needs: TrainingSizes) -> None:
    peaks = [
        needs.peak(choice)
        for choice in (
            TrainingChoice(4, keep_graphs=True),
            TrainingChoice(4),
            TrainingChoice(4, hidden_on_disk=True),
            TrainingChoice(4, resident=False, hidden_on_disk=True),
            TrainingChoice(4, resident=False, states_on_disk=True, hidden_on_disk=True),
            SMALLEST,
        )
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) > 3


def test_beside_a_gpu_the_next_layer_is_in_main_memory(needs: TrainingSizes) -> None:
    """Where layers are loaded one by one; in the dtype of the file, and PyTorch rounds page-locked buffers up."""
    on_gpu = replace(needs, model=replace(needs.model, cuda=True))
    stays, streams = (on_gpu.host_stages(TrainingChoice(4, resident=resident))["a step"] for resident in (True, False))
    assert 2 * needs.model.layer <= streams - stays < 3 * needs.model.layer
    halved = LayerwiseModel(needs.task.model.checkpoint, CPU, torch.bfloat16)
    assert halved.ahead_bytes == needs.model.ahead == 2 * needs.model.layer
    assert measure_model(replace(needs.task, model=halved)).ahead == needs.model.ahead


def test_a_limit_takes_the_first_choice_that_fits(needs: TrainingSizes) -> None:
    """The first is everything in memory with the graphs of all layers; layers stay before all windows pass at once."""
    assert planned(needs).choice == TrainingChoice(4, keep_graphs=True)
    for choice in (TrainingChoice(4), TrainingChoice(4, hidden_on_disk=True)):
        found = planned(needs, needs.peak(choice))
        assert found.choice == choice
        assert found.fits
    less = planned(needs, needs.peak(TrainingChoice(4, hidden_on_disk=True)) - 1).choice
    assert less.resident == (less.batch_size < 4)
    streaming = planned(needs, needs.peak(TrainingChoice(1, resident=False, hidden_on_disk=True)))
    assert not streaming.choice.resident
    assert not streaming.choice.states_on_disk
    assert "one decoder layer in memory at a time" in streaming.says[0]
    assert planned(needs, needs.peak(SMALLEST)).choice.states_on_disk


def test_several_processes_divide_trained_tensors_before_anything_is_read_again(tmp_path: Path) -> None:
    """Of six layers each of three keeps two, and each of four or five no fewer."""
    tiny.save("llama", tmp_path / "llama-6", **{**WIDE, "num_hidden_layers": 6})
    alone = sizes(task_for(tmp_path, 6, parameters="full", windows_per_step=8))
    three = replace(alone, task=replace(alone.task, ranks=3))
    whole, divided = (TrainingChoice(three.task.batch_size, shards=shards) for shards in (1, 3))
    stage, layer = "the gradient of a layer", alone.form.trained_layer
    saved = three.stages(whole)[stage] - three.stages(divided)[stage]
    assert saved == pytest.approx((1 + UNCOUNTED) * (alone.state * 2 / 3 - 3 * layer), abs=1)  # 3: what is received
    limit = three.peak(divided)
    assert planned(three, limit).choice == divided
    assert planned(three, limit).says[0].endswith("trained tensors divided among 3 processes")
    found = planned(alone, limit).choice
    assert found.shards == 1
    assert found.hidden_on_disk or not found.resident or found.batch_size < alone.task.batch_size
    peaks = [
        replace(alone, task=replace(alone.task, ranks=size)).peak(TrainingChoice(1, shards=size))
        for size in (2, 3, 4, 5, 6)
    ]
    assert peaks[0] > peaks[1] > peaks[4]
    assert peaks[1] >= peaks[2] == peaks[3]


def test_given_windows_a_pass_are_kept(folder: Path) -> None:
    needs = sizes(task_for(folder, 6, execution={"batch_size": 4}))
    assert planned(needs, needs.peak(TrainingChoice(4, False, True, True))).choice.batch_size == 4
    refused = planned(needs, needs.peak(SMALLEST))
    assert not refused.fits
    assert "and 4 windows at a time (--batch-size); give more, lower --batch-size, or shorten" in str(refused.refusal)


@pytest.mark.parametrize("parameters", ["lora", "full"])
def test_memory_does_not_grow_with_depth_when_layers_are_read(folder: Path, parameters: str) -> None:
    shallow, deep = (sizes(task_for(folder, layers, parameters=parameters)) for layers in (2, 6))
    assert shallow.stages(SMALLEST) == deep.stages(SMALLEST)
    assert max(shallow.stages(TrainingChoice(1)).values()) < max(deep.stages(TrainingChoice(1)).values())
    assert sum(shallow.disk(SMALLEST).values()) < sum(deep.disk(SMALLEST).values())


def test_memory_grows_with_the_text(folder: Path) -> None:
    """Nine bytes a token, and as many again while it is cut."""
    task = task_for(folder)
    longer = replace(task, windows=10**6)
    more = longer.text_bytes - task.text_bytes
    assert more == 9 * 32 * (10**6 - task.windows)
    short, long = (replace(measure_model(each), ends=0) for each in (task, longer))
    assert long.base - short.base == pytest.approx(more, rel=0.1)
    assert long.uncut - short.uncut == more
    cut = [TrainingSizes(task, each, measure_form(task)).stages(SMALLEST)[CUTTING] for each in (short, long)]
    assert cut[1] - cut[0] > 1.9 * more
    execution = task.recipe.execution.model_copy(update={"memory_limit": long.base})
    limited = replace(longer, recipe=task.recipe.model_copy(update={"execution": execution}))
    with pytest.raises(FistaPrunerError, match=rf"{CUTTING} needs .*; take fewer --tokens$"):
        plan_training(limited, long)


def test_a_text_file_is_planned_no_longer_than_it_is(folder: Path, tmp_path: Path) -> None:
    """Whatever the tokens that are asked; the bound holds where each character is a token."""
    text = tmp_path / "text.txt"
    text.write_text("".join(Random(0).choices("abcdefghij ", k=8000)))
    asked: list[Task] = [
        task_for(folder, data={"source": str(text), "tokens": tokens, "seqlen": 32}) for tokens in (320, 10**6, 10**9)
    ]
    assert asked[0].windows == 10
    assert asked[1].windows == asked[2].windows < 600
    assert asked[1].text_bytes == asked[2].text_bytes
    recipe = asked[2].recipe
    assert isinstance(recipe, RecoverRecipe)
    cut = training_text(recipe.data, tiny.tokenizer(), 32)
    assert 100 < len(cut.windows("trained")) <= asked[2].windows
    assert task_for(folder, data={"source": "python", "tokens": 10**9, "seqlen": 32}).windows == -(-(10**9) // 32)


def test_forms_are_ordered_by_what_they_train(folder: Path) -> None:
    forms = {name: sizes(task_for(folder, parameters=name)) for name in ("full", "lora", "hira", "spp", "norms")}
    states = [forms[name].state for name in ("full", "lora", "spp", "norms")]
    assert states == sorted(states, reverse=True)
    assert forms["lora"].state == forms["hira"].state
    assert forms["norms"].form.chain < forms["lora"].form.chain
    moments = sizes(task_for(folder, parameters="full")).state
    without = sizes(task_for(folder, parameters="full", optimizer="mezo")).state
    assert without == moments / 2  # the values and the best ones
    one_check = sizes(task_for(folder, parameters="full", validation_checks=1)).state
    assert one_check == moments * 3 / 4


def stepped(task: Task) -> tuple[Trained, dict[str, int]]:
    """The trained tensors after a step of AdamW and a check that keeps them, and the survivors of all operators."""
    trained, survivors = Trained(task.model, task.layout, task.recipe), {}
    for index in range(len(task.model)):
        with task.model.layer(index) as layer:
            for operator in (each for group in task.layout.layers[index] for each in group):
                full_name = task.layout.full_name(index, operator)
                survivors[full_name] = int((operator.weight(layer) != 0).sum())
            ones = {key: torch.ones_like(value) for key, value in trained.values(index, layer).items()}
            trained.step(index, layer, trained.chain(index, layer, ones), 1.0)
    trained.keep()
    return trained, survivors


def test_trained_numbers_are_those_of_the_training(folder: Path, needs: TrainingSizes) -> None:
    """Counted from the shapes, and held after a step and a check: values, two moments, and the best values."""
    mixtures = (("gpt_oss", "lora"), ("qwen3_moe", "full"))
    for architecture, name in (*(("llama", name) for name in ("full", "lora", "spp", "norms")), *mixtures):
        task = task_for(folder, architecture=architecture, parameters=name)
        trained, survivors = stepped(task)
        form = measure_form(replace(task, survivors=survivors))
        held = {key: tensor.nbytes for key, tensor in trained.tensors().items() if key != "steps"}
        assert form.trained == sum(nbytes for key, nbytes in held.items() if key.startswith("trained/"))
        assert replace(needs, task=task, form=form).state == sum(held.values())


def test_the_disk_holds_the_snapshots_and_the_one_that_replaces_the_oldest(
    folder: Path, needs: TrainingSizes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_for(folder, parameters="full")
    trained, survivors = stepped(task)
    planned = replace(needs, task=task, form=measure_form(replace(task, survivors=survivors))).disk(TrainingChoice(4))
    most: list[int] = []
    tidy = Snapshots.tidy

    def measured(states: Snapshots, step: int) -> None:
        most.append(sum(file.stat().st_size for file in states.folder.glob("*.safetensors")))
        tidy(states, step)

    monkeypatch.setattr(Snapshots, "tidy", measured)
    for step in range(1, 5):
        Snapshots(tmp_path).write("run", step, {}, trained.tensors())
    assert max(most) == pytest.approx(planned["snapshots"], rel=0.05)  # but for names in the files


def test_writing_holds_a_tensor_of_all_experts_and_its_matrices(folder: Path) -> None:
    task = task_for(folder, architecture="gpt_oss", parameters="lora")
    whole = max(entry.nbytes for file in task.model.checkpoint.files.values() for entry in file.entries.values())
    assert whole == 4 * 4 * 96 * 32  # all experts' gate_up_proj
    needs = sizes(task)
    assert needs.stages(SMALLEST)["writing the checkpoint"] >= 2 * whole + needs.form.effective


def test_predictions_go_in_rounds_where_the_disk_is_small(needs: TrainingSizes) -> None:
    parts = needs.disk(TrainingChoice(4))
    whole = sum(parts.values())
    assert planned(needs, free=2 * whole).choice.teacher_windows is None
    short = (whole - parts["the dense model's predictions"] // 4) / 0.95
    found = planned(needs, free=round(short))
    assert found.fits
    assert needs.task.held_out + 4 <= (found.choice.teacher_windows or 0) < needs.used_windows()
    assert sum(needs.disk(found.choice).values()) <= short
    assert found.says[0].endswith("the dense model's predictions in rounds")
    refused = planned(needs, free=parts["the checkpoint"])
    assert not refused.fits
    assert "of disk" in str(refused.refusal)


def test_a_refusal_for_want_of_disk_names_the_teacher_that_would_fit(needs: TrainingSizes) -> None:
    """Hidden states of a wide model do not fit even in rounds; its most likely tokens do."""
    wide = replace(needs, model=replace(needs.model, stored=10**8))
    top = replace(needs, model=replace(needs.model, stored=32 * (6 * 128 + 4)))
    least = sum(top.disk(TrainingChoice(4)).values())
    assert least < 10**8
    refused = planned(wide, free=math.ceil(least / 0.95) + 1)
    assert not refused.fits
    assert str(refused.refusal).endswith(f" free; --teacher top128 would fit, with {size(least)}")
    assert "--teacher" not in str(planned(wide, free=top.disk(TrainingChoice(4))["the checkpoint"]).refusal)
    already = replace(wide, task=replace(wide.task, top=128))
    assert "--teacher" not in str(planned(already, free=2 * least).refusal)


def test_a_refusal_names_the_stage_and_what_would_fit(folder: Path) -> None:
    task = task_for(folder, 2, parameters="full", loss="ce")
    measured = replace(measure_model(task), base=0, head=0)  # of so small a model the head is the largest part
    full = TrainingSizes(task, measured, measure_form(task))
    norms = replace(task, recipe=task.recipe.model_copy(update={"parameters": "norms"}))
    least = TrainingSizes(norms, measured, measure_form(norms)).peak(SMALLEST)
    assert least < full.peak(SMALLEST)
    execution = task.recipe.execution.model_copy(update={"memory_limit": least})
    limited = replace(task, recipe=task.recipe.model_copy(update={"execution": execution}))
    stage = max(full.stages(SMALLEST), key=lambda name: full.stages(SMALLEST)[name])
    with pytest.raises(
        FistaPrunerError, match=rf"^--memory-limit .* is not enough: {stage} needs .* --parameters norms"
    ):
        plan_training(limited, measured)
    biases = limited.recipe.model_copy(update={"also": ("biases",)})  # a Llama has none
    with pytest.raises(FistaPrunerError, match=r"is not enough: (?!.* --parameters norms)"):
        plan_training(replace(limited, recipe=biases), measured)
    tiny_limit = execution.model_copy(update={"memory_limit": 1})
    with pytest.raises(FistaPrunerError, match=r"--memory-limit 1 B is not enough: .* needs") as caught:
        plan_training(replace(task, recipe=task.recipe.model_copy(update={"execution": tiny_limit})), measured)
    assert "would fit" not in str(caught.value)
    assert "'fistapruner prune --reconstruct STEPS' trains one decoder layer at a time" in str(caught.value)


def test_memory_does_not_grow_with_held_out_pairs_and_time_does(needs: TrainingSizes) -> None:
    many, more = (replace(needs, task=replace(needs.task, held_out=count)) for count in (1000, 100_000))
    choice = TrainingChoice(4)
    assert many.stages(choice) == more.stages(choice)
    assert more.seconds(choice) > 10 * many.seconds(choice)


def test_time_in_all_counts_what_references_and_test_pairs_take(needs: TrainingSizes) -> None:
    """Of training it is no part, as in the report's comparison with what was measured."""
    choice = TrainingChoice(4)
    aligned = replace(needs, task=replace(needs.task, answers=(1000, 50, 50)))
    assert needs.seconds_in_all(choice) == needs.seconds(choice) == aligned.seconds(choice)
    model, at_once = needs.model, max(needs.task.held_out, needs.task.step_windows)
    walks = math.ceil(1000 / at_once) + 2 * math.ceil(50 / at_once)
    passes = model.layers * (1100 * model.forward_seconds + walks * model.load_seconds) + 1100 * model.head_seconds / 2
    assert aligned.seconds_in_all(choice) - needs.seconds(choice) == pytest.approx(passes)


def test_a_check_takes_half_of_the_time_that_the_head_takes_with_gradients(
    needs: TrainingSizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing else takes time."""

    def only(sizes: Any, **seconds: float) -> Any:
        return replace(sizes, **{name: 0.0 for name in vars(sizes) if name.endswith("_seconds")} | seconds)

    monkeypatch.setattr("fistapruner.planning.training_sizes.DISK_RATE", math.inf)
    found = replace(needs, model=only(needs.model, head_seconds=3.0), form=only(needs.form))
    task = needs.task
    checks = 1 + task.recipe.validation_checks
    passes = task.steps * task.step_windows + checks * task.held_out / 2
    assert 1 < checks <= 1 + task.steps
    assert found.seconds(TrainingChoice(4)) == pytest.approx(3.0 * passes)


@pytest.mark.parametrize("optimizer", ["adamw", "mezo"])
def test_hidden_states_that_are_counted_are_those_of_a_step(folder: Path, optimizer: str) -> None:
    """Of AdamW the inputs of all layers, the output and its gradient; without gradients those of two variants."""
    task = task_for(folder, 6, optimizer=optimizer)
    live: set[HiddenStates] = set()
    counts: list[int] = []

    class Counted(HiddenStates):
        def close(self, *, keep: bool = False) -> None:
            super().close(keep=keep)
            live.discard(self)

    def store(name: str, shape: tuple[int, int, int]) -> HiddenStates:
        live.add(made := Counted(shape, torch.float32))
        counts.append(sum(states.samples for states in live))
        return made

    windows = task.step_windows
    tokens = torch.arange(windows * 32).remainder(tiny.VOCABULARY).view(windows, 32)
    nothing = torch.zeros(windows, dtype=torch.int64)
    text = TrainingText(tokens, torch.ones_like(tokens).bool(), nothing.bool(), nothing, ("text",), {})
    objective = Objective(task.model, text, TokenLoss(0.0), None, 2, store)
    if optimizer == "mezo":
        objective.losses(range(windows), lambda index, layer: [{}, {}])
    else:
        objective.gradient(range(windows), lambda index, layer: {}, lambda index, layer, gradients: None)
    stores = sizes(task)._stores(TrainingChoice(2))
    assert not live
    assert max(counts) == max(count for stage, count in stores.items() if stage != "held out")


def peak_of_steps(task: Task, choice: TrainingChoice, scratch: Path) -> int:
    """The bytes of all tensors that live at once while real steps are taken and losses checked."""
    numbers = list(range(task.step_windows))
    tokens = torch.arange(len(numbers) * 32).remainder(tiny.VOCABULARY).view(len(numbers), 32)
    nothing = torch.zeros(len(numbers), dtype=torch.int64)
    text = TrainingText(tokens, torch.ones_like(tokens).bool(), nothing.bool(), nothing, ("text",), {})

    def work() -> None:
        with task.model.resident(layers=choice.resident):
            trained = Trained(task.model, task.layout, task.recipe, scratch if choice.states_on_disk else None)
            store = scratch_factory(scratch if choice.hidden_on_disk else None, torch.float32)
            kept = choice.keep_graphs
            objective = Objective(task.model, text, TokenLoss(0.0), None, choice.batch_size, store, keep_graphs=kept)
            stepper = (ForwardOnly if task.recipe.zeroth_order else FirstOrder)(trained, objective)
            stepper.step(1, numbers, 1.0)
            stepper.losses(numbers)
            trained.keep()
            for number in (2, 3):  # the best values are others than the present ones
                stepper.step(number, numbers, 1.0)

    return peak_bytes(work)


@pytest.mark.parametrize(
    ("settings", "choice"),
    [
        ({}, TrainingChoice(4, keep_graphs=True)),
        ({}, SMALLEST),
        ({"parameters": "full"}, TrainingChoice(4, keep_graphs=True)),
        ({"parameters": "full"}, TrainingChoice(2, resident=False, hidden_on_disk=True)),
        ({"parameters": "full", "optimizer": "mezo"}, TrainingChoice(2)),
    ],
)
def test_steps_take_the_memory_that_is_planned(
    tmp_path: Path, settings: dict[str, Any], choice: TrainingChoice
) -> None:
    """Against the largest of their stages."""
    tiny.save("llama", tmp_path / "llama-4", **WIDE)
    task = replace(task_for(tmp_path, 4, loss="ce", **settings), survivors={})  # no weight of this model is zero
    elsewhere = ("the embeddings", CUTTING, "writing a snapshot", "writing the checkpoint")
    stages = {name: size for name, size in sizes(task).stages(choice).items() if name not in elsewhere}
    assert 0.7 < peak_of_steps(task, choice, tmp_path) / max(stages.values()) < 1.05


def test_steps_take_no_more_memory_in_a_deeper_model_when_layers_are_read(tmp_path: Path) -> None:
    peaks = []
    for layers in (2, 4):
        tiny.save("llama", tmp_path / f"llama-{layers}", **{**WIDE, "num_hidden_layers": layers})
        task = replace(task_for(tmp_path, layers, loss="ce", parameters="full"), survivors={})
        peaks.append(peak_of_steps(task, SMALLEST, tmp_path))
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)


@pytest.mark.parametrize(("writing", "more"), [(1.0, 7), (1000.0, 3)])
def test_time_counts_snapshots_between_checks(
    needs: TrainingSizes, monkeypatch: pytest.MonkeyPatch, writing: float, more: int
) -> None:
    """Eight steps of 4000 s and one check: a snapshot after every step, or every 10,000 s where each takes 1000 s."""
    recipe = needs.task.recipe.model_copy(update={"validation_checks": 1})
    slow = replace(needs, task=replace(needs.task, recipe=recipe), model=replace(needs.model, head_seconds=1000.0))
    monkeypatch.setattr("fistapruner.planning.training_sizes.DISK_RATE", 2 * slow.state / writing)
    choice = TrainingChoice(4)
    found = slow.seconds(choice)
    monkeypatch.setattr("fistapruner.planning.training_sizes.snapshot_interval", lambda seconds: math.inf)
    assert found - slow.seconds(choice) == pytest.approx(more * writing)


def test_a_refusal_for_want_of_disk_gives_no_advice_on_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Mock(free=1000))
    with pytest.raises(FistaPrunerError, match=r"1000 B free; take fewer --tokens, or another --out$"):
        plan_training(task_for(folder))


def test_a_share_of_the_free_memory_is_no_limit_that_was_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of several processes plans with its share; a limit that is given is that of one process."""
    monkeypatch.setattr("fistapruner.pipeline.prepare_training.free_memory", lambda: 2 * 10**7)
    monkeypatch.setattr("fistapruner.pipeline.prepare_training.resident_memory", lambda: 50)
    two = share_of(task_for(folder), Ranks(0, 2, local_size=2))
    assert two.memory == 9 * 10**6 + 45  # a tenth is left free, as by one process; what a process has is not free
    monkeypatch.setattr("fistapruner.pipeline.prepare_training.resident_memory", lambda: 0)
    shared = share_of(task_for(folder), Ranks(0, 2, local_size=10**7))
    assert shared.memory == 1
    with pytest.raises(FistaPrunerError, match=r"^the .*B that are each process's share of what is free is not enough"):
        plan_training(shared)
    limited = share_of(task_for(folder, execution={"memory_limit": 1}), Ranks(0, 2, local_size=10**7))
    with pytest.raises(FistaPrunerError, match=r"^--memory-limit 1 B is not enough"):
        plan_training(limited)


def test_several_processes_plan_what_they_share_and_what_each_has(folder: Path, needs: TrainingSizes) -> None:
    """Fifteen windows for eight processes: one at a time, the first process has two, and the folder holds them all."""
    task = replace(needs.task, steps=100, step_windows=15, windows=1500)
    one, eight = (replace(needs, task=share_of(task, Ranks(0, size, size))) for size in (1, 8))
    assert eight.task.batch_size == 1
    choice = TrainingChoice(1, states_on_disk=True, hidden_on_disk=True)
    whole, parts = one.disk(choice), eight.disk(choice)
    # They divide the trained tensors, and each writes one layer beside those that it replaces.
    assert parts["trained tensors"] == whole["trained tensors"] + 7 * needs.form.trained_layer
    assert parts["hidden states"] == 8 * 2 * whole["hidden states"] // 15
    shared = whole.keys() - {"trained tensors", "hidden states"}
    assert {name: parts[name] for name in shared} == {name: whole[name] for name in shared}
    divided = eight.disk(TrainingChoice(1, shards=8))  # the first reads the best of all at the end
    assert divided["trained tensors"] == needs.form.trained + 8 * needs.form.trained_layer
    stage, two = "the gradient of a layer", replace(one, task=replace(task, step_windows=2))
    assert eight.stages(TrainingChoice(1))[stage] == two.stages(TrainingChoice(1))[stage]
    # The predictions of a step are there for all processes at once.
    least = TrainingChoice(1, teacher_windows=task.held_out + 15)
    room = sum(eight.disk(least).values())
    assert planned(eight, free=math.ceil(room / 0.95)).choice.teacher_windows == least.teacher_windows
    assert not planned(eight, free=math.floor((room - 1) / 0.95)).fits
    # The first reads the best into files beside those of the others, more than a state without moments has.
    single = replace(task, recipe=task.recipe.model_copy(update={"optimizer": "mezo", "validation_checks": 1}))
    one, eight = (replace(needs, task=share_of(single, Ranks(0, size, size))) for size in (1, 8))
    assert one.disk(choice)["trained tensors"] == needs.form.trained + needs.form.trained_layer
    assert eight.disk(choice)["trained tensors"] == 2 * needs.form.trained + 8 * needs.form.trained_layer


def test_text_that_the_dense_model_generates_is_a_stage(folder: Path) -> None:
    """What the sentence says is the peak, and what does not fit is refused with the option of the verb."""
    task = task_for(folder, 2, data={"source": "self", "tokens": 1024, "seqlen": 32})
    measured = replace(measure_model(replace(task, generator=task.dense)), base=0)
    assert measured.text > measured.text_weights == task.model.checkpoint.nbytes
    needs = TrainingSizes(task, replace(measured, text=2**40), measure_form(task))
    found = planned(needs)
    assert found.stages[GENERATING] == needs.peak(found.choice) > 2**40
    assert f"of memory at its peak ({GENERATING})" in found.says[0]
    assert found.says[0].endswith("first the dense model generates text, which this time does not count")
    refused = planned(needs, needs.peak(found.choice) - 1)
    assert not refused.fits
    assert refused.worst == GENERATING
    assert str(refused.refusal).endswith("or take text instead, such as --data c4, python or a file")
    # Of several processes one generates while the others wait, so that this stage does not share the memory.
    others = max(each for stage, each in needs.stages(found.choice).items() if stage != GENERATING)
    shared = replace(needs, task=replace(task, memory=others))
    assert planned(shared, needs.peak(found.choice)).choice == found.choice
    refused = planned(shared, needs.peak(found.choice) - 1)
    assert refused.worst == GENERATING
    assert "process's share" not in str(refused.refusal)
    refused = planned(replace(needs, task=replace(task, memory=1)))
    assert not refused.fits
    assert refused.worst != GENERATING
    assert "process's share" in str(refused.refusal)


@pytest.mark.parametrize("settings", [{"optimizer": "mezo"}, {"optimizer": "subzero"}, {"loss": "ce"}])
def test_other_optimizers_and_losses_are_planned(folder: Path, settings: dict[str, Any]) -> None:
    needs = sizes(task_for(folder, **settings))
    found = planned(needs)
    assert found.fits
    assert not found.choice.keep_graphs or "optimizer" not in settings
    assert ("the dense model's predictions" in found.stages) == ("loss" not in settings)
    assert all(row.planned and row.planned > 0 for row in found.rows)


# Runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruning run of a tiny Llama, and a text beside it."""
    place = tmp_path_factory.mktemp("runs")
    text = place / "text.jsonl"
    lines = (f"{number} is followed by {number + 1}, as everybody knows." for number in range(60))
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    calibration = {"source": str(text), "samples": 2, "seqlen": 16}
    dense = tiny.save("llama", place / "dense", num_hidden_layers=2)
    fp.prune(dense, place / "run", method="wanda", sparsity="2:4", calibration=calibration)
    return place / "run"


def recover(run: Path, out: Path, **settings: Any) -> Report:
    data = {"seqlen": 16, "tokens": 300}
    fixed = {"steps": 4, "windows_per_step": 2, "validation_checks": 2, "rank": 4, "evaluate": None}
    return fp.recover(run, out, **{"data": data, **fixed, **settings})


def test_a_recovery_is_planned_on_the_disk_that_pruning_leaves(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"parameters": "full", "data": {"source": "python", "seqlen": 16, "tokens": 300}}
    recipe = Recipe.build({"method": "wanda", "sparsity": "2:4", "recover": training})
    source = UNTRUSTED.find(run.parent / "dense")
    task = check_trained(recipe, source, PruneDirectory(tmp_path))
    assert task is not None
    assert task.before == pytest.approx(sum(path.stat().st_size for path in run.rglob("*[0-9l].safetensors")), rel=0.05)
    found = plan_training(task)
    needed = math.ceil(sum(found.needs.disk(found.choice).values()) / 0.95) + task.before
    for free, fits in ((needed, True), (needed - task.before, False)):
        monkeypatch.setattr(shutil, "disk_usage", Mock(return_value=Mock(free=free)))
        with nullcontext() if fits else pytest.raises(FistaPrunerError, match=r" free, .* of it for the pruning; "):
            assert plan_training(task).choice == found.choice
    (tmp_path / "layers").mkdir()
    (tmp_path / "layers" / "0000.safetensors").write_bytes(b"0" * 1000)  # of a run that was interrupted
    part = check_trained(recipe, source, PruneDirectory(tmp_path))
    assert part is not None
    assert part.before == task.before - 1000
    again = check_trained(recipe, source, PruneDirectory(run))  # which has pruned
    assert again is not None
    assert again.before == 0


def test_a_recovery_that_cannot_fit_is_refused_before_pruning(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"parameters": "full", "data": {"source": "python", "seqlen": 16, "tokens": 300}}
    calibration = {"source": "python", "samples": 2, "seqlen": 16}
    settings: dict[str, Any] = {"method": "wanda", "sparsity": "2:4", "calibration": calibration, "recover": training}
    plan = plan_model(run.parent / "dense", Recipe.build(settings), tmp_path)
    assert "'fistapruner plan RUN --recover'" in plan.says[-1]
    little = Mock(return_value=Resources(2**20, CPU, {}, (CPU,)))  # for the recovery; the pruning fits
    monkeypatch.setattr("fistapruner.planning.training_plan.Resources", Mock(of_this_machine=little))
    with pytest.raises(FistaPrunerError, match=r"^recover: .*the 1\.00 MiB that are free is not enough: "):
        fp.prune(run.parent / "dense", tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    short = tmp_path / "short.txt"
    short.write_text("one")
    with pytest.raises(FistaPrunerError, match=r"short\.txt"):  # which shows before the plan
        fp.prune(run.parent / "dense", tmp_path / "out", evaluate=short, **settings)
    planned = Mock(side_effect=FistaPrunerError("fewer --tokens"))
    monkeypatch.setattr("fistapruner.pipeline.recover_inputs.plan_training", planned)
    methods = "wanda,magnitude"
    with pytest.raises(FistaPrunerError, match=r"^recover: fewer --tokens \(these are flags of .fistapruner recover"):
        compare(run.parent / "dense", methods, ["2:4"], tmp_path / "compared", settings=settings, windows=1)
    assert not (tmp_path / "compared").exists()
    planned.reset_mock(side_effect=True)
    opened = Mock(wraps=check_trained)
    monkeypatch.setattr("fistapruner.pipeline.compare_jobs.check_trained", opened)
    jobs = plan_jobs(parse_contenders(methods), ["2:4", "50%", "60%", "0%"], (0, 1), settings)
    check_recoveries(jobs, UNTRUSTED.find(run.parent / "dense"), tmp_path / "compared", tiny.Said())
    assert planned.call_count == 2  # with other numbers of zeros, of which 0% has none
    assert opened.call_count == 3 + 2  # once for methods and seeds; 0% is refused for each method


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("parameters", ["lora", "full"])
def test_how_memory_is_used_changes_no_bit(run: Path, tmp_path: Path, parameters: str) -> None:
    """The plan is said and stands beside the measurement; other choices give the same bytes and leave no files."""
    told = tiny.Said()
    report = recover(run, tmp_path / "first", parameters=parameters, listener=told)
    assert any(sentence.startswith(f"plan: {parameters}, ") for sentence in told.sentences)
    rows = {row.quantity: row for row in report.plan}
    assert list(rows) == ["peak memory", "disk", "one step", "training"]
    assert all(row.planned is not None and row.actual is not None for row in rows.values())
    first = RecoverDirectory(tmp_path / "first")
    record = first.record()
    assert record is not None
    assert record.decision.keep_graphs
    for number, other in enumerate(
        (
            {"keep_graphs": False},
            {"keep_graphs": False, "resident": False, "hidden_on_disk": True},
            {"keep_graphs": False, "resident": False, "hidden_on_disk": True, "states_on_disk": True},
        )
    ):
        begun = RecoverDirectory(tmp_path / str(number))
        shutil.copytree(first.folder, begun.folder)
        shutil.rmtree(begun.model)
        shutil.rmtree(begun.states.folder)
        begun.steps_file.unlink()
        begun.report_file.unlink()
        begun.write_record(record.model_copy(update={"decision": record.decision.model_copy(update=other)}))
        recover(run, begun.folder, parameters=parameters)
        assert weights(begun.folder) == weights(first.folder)
        assert not any(path.exists() for path in (begun.hidden, begun.trained, begun.teacher))


def test_plan_of_a_run_and_of_a_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(run), "--out", str(run.parent), "--recover", "--rank", "4", "--seqlen", "16"]  # it is ./run
    assert main([*command, "--parameters", "full"]) == 0
    out = capsys.readouterr().out
    lines = [line.split()[0] for line in out.splitlines() if line.strip()]
    assert lines[:6] == ["form", "lora", "full", "spp", "hira", "norms"]
    assert "plan: full, " in out
    copy = shutil.copytree(run / "model", tmp_path / "model")
    (copy / "fistapruner.json").unlink()
    command = ["plan", str(copy), "--recover", "--json", "--tokens", "4k", "--seqlen", "32"]
    assert main([*command, "--dense", str(run.parent / "dense")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [form["parameters"] for form in found["forms"]] == ["lora", "full", "spp", "hira", "norms"]
    assert found["chosen"]["parameters"] == "lora"
    assert found["chosen"]["disk"]["the dense model's predictions"] > 0
    assert not list(tmp_path.glob("run*"))


def test_plan_of_an_alignment(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(f'{{"prompt": "{n} is", "chosen": " a", "rejected": " b"}}\n' for n in range(60)), "utf-8")
    command = ["plan", str(run), "--align", "--data", str(pairs), "--loss", "harmonic", "--steps", "5", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert [form["parameters"] for form in found["forms"]] == ["lora", "full", "spp", "hira", "norms"]
    assert found["chosen"]["parameters"] == "lora"
    assert any("(5 steps of " in sentence for sentence in found["says"])
    assert main([*command, "--memory-limit", "1MiB"]) == 2
    assert re.search("and one pair at a time; .* or lower --max-length, for --parameters", capsys.readouterr().out)
    for loss, whole in (("dpo", 1), ("harmonic", 2)):
        recipe = AlignRecipe.build({"loss": loss, "data": {"pairs": str(pairs)}})
        task = plan_alignment_of(run, recipe, tmp_path)[0].needs.task
        assert (len(task.answers), task.answers.count(120)) == (3, whole)
        assert dict(task.survivors) == {
            operator.name.removesuffix(".weight"): operator.weights - operator.zeros
            for operator in inspect_checkpoint(run / "model").pruned
        }
        few = AlignRecipe.build({"loss": loss, "data": {"pairs": str(pairs)}, "steps": 2, "pairs_per_step": 3})
        answers = plan_alignment_of(run, few, tmp_path)[0].needs.task.answers
        assert answers.count(12 + task.held_out + task.test) == whole  # of the pairs that the steps take
        assert task.text_bytes == 9 * 120 * task.seqlen  # of all pairs, those of the test too
    assert not list(tmp_path.glob("run*"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--recover", "--sparsity", "50%"], "--sparsity: a setting of pruning"),
        (["--recover", "--quality", "best"], "--quality: a setting of pruning"),
        (["--windows-per-step", "2"], "--windows-per-step: a setting of recovery"),
        (["--pairs-per-step", "2"], "--pairs-per-step: a setting of alignment"),
        (["--recover", "--beta", "0.2"], "--beta: a setting of alignment"),
        (["--align", "--tokens", "4k"], "--tokens: a setting of recovery"),
        (["--align", "--samples", "4"], "--samples: a setting of pruning, and --align plans a run that trains"),
        (["--dense", "smollm2"], "--dense: the dense model of a run that trains, planned with --recover or --align"),
        (["--align"], "say what to train on with --data: a .jsonl file of preference pairs"),
        (["--align", "--teacher", "hidden"], "teacher hidden: it is a setting of the anchor, and there is none"),
        (["--align", "--data", "a.jsonl", "--data", "b.jsonl"], "alignment takes one file of pairs"),
        (["--align", "--loss", "kl", "--data", "a.jsonl"], "loss"),
        (["--recover", "--seqlen", "16", "--memory-limit", "1MiB"], "--memory-limit 1.00 MiB is not enough: "),
    ],
)
def test_plan_refuses_in_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], flags: list[str], expected: str
) -> None:
    assert main(["plan", str(run), *flags]) == 2
    message = capsys.readouterr().err.strip()
    assert expected in message
    assert "\n" not in message

"""The memory of a GPU: planned as it is used, and a run that goes on with less where it runs out."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fistapruner
import tiny
from fistapruner.allocate.fisher import DensePasses, measure_sensitivity
from fistapruner.errors import FistaPrunerError
from fistapruner.models.checkpoint import Checkpoint
from fistapruner.models.layers import LayerwiseModel
from fistapruner.models.operators import discover
from fistapruner.passes.store import scratch_factory
from fistapruner.planning import DEVICE_RESERVE, solve_bytes
from fistapruner.pruning.run import plan_pruning
from fistapruner.runs.layer_records import LayerEntry
from fistapruner.runs.listener import Listener
from fistapruner.runs.records import Report
from fistapruner.runtime import transfers
from fistapruner.settings.loading import load_recipe_settings, merge_settings
from fistapruner.settings.settings import Recipe
from standin.gpu import StandIn

CUDA = torch.device("cuda:0")
WIDE = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


BASE: dict[str, Any] = {
    "calibration": {"source": "python", "samples": 8, "seqlen": 64},
    "execution": {"device": "cuda:0", "threads": 1},
    "dtype": "bfloat16",
}


def prune(folder: Path, out: Path, **settings: Any) -> Report:
    return fistapruner.prune(str(folder), out, **merge_settings(BASE, settings))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One decoder layer, wide enough that its matrices are most of the memory."""
    folder = tmp_path_factory.mktemp("gpu-memory") / "wide"
    return tiny.save("llama", folder, dtype=torch.bfloat16, num_hidden_layers=1, **WIDE)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three decoder layers."""
    folder = tmp_path_factory.mktemp("gpu-memory") / "deep"
    return tiny.save("llama", folder, dtype=torch.bfloat16)


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "best": {**load_recipe_settings("best"), "reconstruct": 4},
    "drift from outputs": {"method": "sparsegpt", "dense_target": "dense", "residual": "correct"},
    "dense, together": {"method": "sparsegpt", "propagate": "dense", "error_correction": False},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_plan_counts_what_the_device_holds(gpu: StandIn, wide: Path, tmp_path: Path, name: str) -> None:
    report = prune(wide, tmp_path / "run", **SETTINGS[name])
    planned = max(plan_pruning(wide, Recipe.build(report.recipe)).device_memory.values())
    assert report.totals.peak_device_memory is not None
    assert report.totals.peak_device_memory <= planned < 2.5 * report.totals.peak_device_memory


class Shrinking(Listener):
    """Leaves less memory on the GPUs after a decoder layer, and may stop the run after another."""

    def __init__(self, gpu: StandIn, memory: int, after: int = 0, stop: int | None = None) -> None:
        self.gpu, self.memory, self.after, self.stop = gpu, memory, after, stop

    def layer(self, entry: LayerEntry) -> None:
        if entry.index == self.after:
            self.gpu.memory = self.memory
        if entry.index == self.stop:
            raise KeyboardInterrupt


def test_a_run_goes_on_with_smaller_batches_where_memory_runs_out(gpu: StandIn, deep: Path, tmp_path: Path) -> None:
    """First hidden states leave the GPU. It says so, layers that are done stay, a resumed run does not try again."""
    whole = prune(deep, tmp_path / "whole", method="sparsegpt")
    less = int(0.7 * gpu.peak[CUDA])
    with pytest.raises(KeyboardInterrupt):
        prune(deep, tmp_path / "run", method="sparsegpt", listener=Shrinking(gpu, less, stop=1))
    assert gpu.refused > 0
    gpu.refused = 0
    report = fistapruner.resume(tmp_path / "run")
    assert gpu.refused == 0
    assert [layer.batch_size for layer in report.layers] == [None, 4, 4]
    first, second = report.layers[1].warnings
    assert first == "layer 1: the memory of cuda:0 ran out with 8 windows at a time; hidden states go to main memory"
    assert "cuda:0 ran out with 8 windows at a time; it goes on with 4" in second
    for layer, expected in zip(report.layers, whole.layers, strict=True):
        errors, others = ([operator.relative_error for operator in one.operators] for one in (layer, expected))
        assert errors == pytest.approx(others, rel=0.2)


def test_an_evaluation_takes_no_more_windows_than_fit(
    gpu: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It halves its batch where memory runs out. It begins with those of the run, where that has fewer."""
    shallow = tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16, num_hidden_layers=1)
    text = tmp_path / "text.txt"
    text.write_text("it was the best of times, it was the worst of times. " * 200)
    settings: dict[str, Any] = {"method": "magnitude", "evaluate": str(text), "evaluate_windows": 32}
    evaluation: dict[str, Any] = {"seqlen": 64, "windows": 32, "device": "cuda:0"}
    fistapruner.evaluate(shallow, str(text), **evaluation)
    memory, less = gpu.memory, gpu.peak[CUDA] // 2
    report = prune(shallow, tmp_path / "run", listener=Shrinking(gpu, less), **settings)
    assert gpu.refused > 0
    assert "evaluation: the memory of cuda:0 ran out; it goes on with 16 windows at a time" in caplog.text
    gpu.memory, gpu.refused = memory, 0
    (found,), expected = report.evaluations, fistapruner.evaluate(tmp_path / "run" / "model", str(text), **evaluation)
    assert found.perplexity is not None
    assert expected.perplexity is not None
    assert found.perplexity.nll == pytest.approx(expected.perplexity.nll, rel=1e-3)
    fewer = merge_settings(settings, {"execution": {"batch_size": 8}})
    prune(shallow, tmp_path / "fewer", listener=Shrinking(gpu, less), **fewer)
    assert gpu.refused == 0
    gpu.memory = 10_000
    with pytest.raises(FistaPrunerError, match=r"the memory of cuda:0 ran out, even with one window of 64 tokens"):
        fistapruner.evaluate(shallow, str(text), seqlen=64, windows=4, device="cuda:0")


def test_dense_hidden_states_are_written_once(gpu: StandIn, deep: Path, tmp_path: Path) -> None:
    """With the dense model's hidden states, too, which another process may be reading."""
    prune(deep, tmp_path / "whole", method="sparsegpt", propagate="dense")
    less = int(0.7 * gpu.peak[CUDA])
    report = prune(deep, tmp_path / "run", method="sparsegpt", propagate="dense", listener=Shrinking(gpu, less))
    assert report.layers[2].batch_size in (1, 2, 4)


def test_too_little_memory_is_one_line(gpu: StandIn, deep: Path, tmp_path: Path) -> None:
    with pytest.raises(FistaPrunerError, match=r"^layer 1: the memory of cuda:0 ran out, even with one window"):
        prune(deep, tmp_path / "run", method="sparsegpt", listener=Shrinking(gpu, 10_000))


def test_freed_memory_is_given_back_before_the_plan(gpu: StandIn, deep: Path, tmp_path: Path) -> None:
    tiny.begin(deep, tmp_path / "run", **BASE, method="magnitude")
    assert gpu.emptied >= 1


STATES: dict[str, Any] = {
    "method": "sparsegpt",
    "dense_target": "dense",
    "residual": "correct",
    "calibration": {"samples": 16},
    "execution": {"batch_size": 2},
}
"""A run that stores hidden states, what the dense model has in their place, and residual drift."""


def copied(gpu: StandIn) -> set[tuple[str, str]]:
    """Copies of hidden states between main memory and a device: their direction and their place.

    What ``sent`` copies is small: token ids and the like.
    """
    lines, first = inspect.getsourcelines(transfers.sent)
    small = {f"runtime/transfers.py:{first + line}" for line in range(len(lines))}
    places = {(what, place) for what, place in gpu.moved if place.startswith(("passes/", "runtime/transfers"))}
    return {(what, place) for what, place in places if place not in small}


def decided(run: Path) -> bool:
    """Whether a run keeps hidden states on the device."""
    return bool(json.loads((run / "run.json").read_text())["decision"]["on_device"])


def test_hidden_states_stay_on_the_device_where_they_fit(gpu: StandIn, deep: Path, tmp_path: Path) -> None:
    """No pass copies them. Where they do not fit, the bits are the same."""
    says = tiny.Said()
    gpu.moved.clear()
    prune(deep, tmp_path / "there", listener=says, **STATES)
    assert decided(tmp_path / "there")
    assert not copied(gpu)
    assert says.sentences.count("hidden states between decoder layers: in the GPU's memory") == 1
    gpu.memory, says = DEVICE_RESERVE + 900_000, tiny.Said()
    prune(deep, tmp_path / "here", listener=says, **STATES)
    assert not decided(tmp_path / "here")
    assert says.sentences.count("hidden states between decoder layers: in main memory") == 1
    assert {what for what, _ in copied(gpu)} == {"to device", "to host"}
    there, here = (tiny.weights(tmp_path / name) for name in ("there", "here"))
    assert there == here


def test_what_is_measured_on_the_dense_model_is_kept_in_main_memory(gpu: StandIn, deep: Path) -> None:
    model = LayerwiseModel(Checkpoint.open(deep), CUDA)
    passes = DensePasses(scratch_factory(None, model.dtype))
    found = measure_sensitivity(model, discover(model), torch.arange(16).view(2, 8), passes)
    assert {tensor.device.type for tensor in (*found.rows.values(), *found.outputs)} == {"cpu"}


def test_buffers_are_on_the_device_and_results_in_main_memory(gpu: StandIn, deep: Path) -> None:
    model = LayerwiseModel(Checkpoint.open(deep), CUDA)
    assert {buffer.device for buffer in model.model.buffers() if not buffer.is_meta} == {CUDA}
    source = model.source(f"{model.layers_name}.0.mlp.up_proj.weight")
    assert model.result(source, torch.ones(2, 2, device=CUDA)).device == torch.device("cpu")


def test_the_small_solves_of_the_plan_are_on_the_device(gpu: StandIn) -> None:
    """Some steps are computed differently there."""
    recipe = Recipe.build({"method": "magnitude"})
    assert solve_bytes(8, 16, recipe.pattern, recipe.steps, CUDA) > 0
    assert gpu.peak[CUDA] > 0

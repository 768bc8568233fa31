"""The memory of a GPU: planned as it is used, and a run that goes on with less where it runs out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fistapruner
import tiny
from fistapruner.errors import FistaPrunerError
from fistapruner.planning import DEVICE_RESERVE
from fistapruner.pruning.run import plan_pruning
from fistapruner.runs.log import Listener
from fistapruner.runs.records import LayerEntry, Report
from fistapruner.settings.parse import load_recipe_settings, merge_settings
from fistapruner.settings.prune import Recipe
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


@pytest.mark.parametrize("name", tiny.quick_first(SETTINGS, ("default", "best")))
def test_the_plan_counts_what_the_device_holds(gpu: StandIn, wide: Path, tmp_path: Path, name: str) -> None:
    report = prune(wide, tmp_path / "run", **SETTINGS[name])
    planned = max(plan_pruning(wide, Recipe.build(report.recipe)).device_memory.values())
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
    """Hidden states leave the GPU, too. It says so, and layers that are done stay."""
    whole = prune(deep, tmp_path / "whole", method="sparsegpt")
    less = int(0.7 * gpu.peak[CUDA])
    with pytest.raises(KeyboardInterrupt):
        prune(deep, tmp_path / "run", method="sparsegpt", listener=Shrinking(gpu, less, stop=1))
    assert gpu.refused > 0
    report = fistapruner.resume(tmp_path / "run")
    assert [bool(layer.warnings) for layer in report.layers] == [False, True, False]
    said = "the memory of cuda:0 ran out; it goes on with 4 windows at a time instead of 8"
    assert any(said in warning for warning in report.layers[1].warnings)
    for layer, expected in zip(report.layers, whole.layers, strict=True):
        errors, others = ([operator.relative_error for operator in one.operators] for one in (layer, expected))
        assert errors == pytest.approx(others, rel=0.2)


class Measuring(tiny.Said):
    """Leaves next to no memory on the GPUs while sensitivity is measured."""

    def __init__(self, gpu: StandIn) -> None:
        super().__init__()
        self.gpu = gpu

    def say(self, sentence: str) -> None:
        super().say(sentence)
        if sentence.startswith("measuring sensitivity"):
            self.gpu.memory = 16_000


def test_a_measurement_without_memory_is_one_line(gpu: StandIn, deep: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": "magnitude", "allocation": "error"}
    with pytest.raises(FistaPrunerError, match="memory of cuda:0 is not enough to measure the dense model: "):
        prune(deep, tmp_path / "run", listener=Measuring(gpu), **settings)


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
    assert found.perplexity.nll == pytest.approx(expected.perplexity.nll, rel=1e-3)
    fewer = merge_settings(settings, {"execution": {"batch_size": 8}})
    prune(shallow, tmp_path / "fewer", listener=Shrinking(gpu, less), **fewer)
    assert gpu.refused == 0
    gpu.memory = 10_000
    with pytest.raises(FistaPrunerError, match=r"the memory of cuda:0 ran out, even with one window of 64 tokens"):
        fistapruner.evaluate(shallow, str(text), seqlen=64, windows=4, device="cuda:0")


def test_too_little_memory_is_one_line(gpu: StandIn, deep: Path, tmp_path: Path) -> None:
    with pytest.raises(FistaPrunerError, match=r"^layer 1: the memory of cuda:0 ran out, even with one window"):
        prune(deep, tmp_path / "run", method="sparsegpt", listener=Shrinking(gpu, 16_000))


STATES: dict[str, Any] = {
    "method": "sparsegpt",
    "dense_target": "dense",
    "residual": "correct",
    "calibration": {"samples": 16},
    "execution": {"batch_size": 2},
}
"""A run that stores hidden states, what the dense model has in their place, and residual drift."""


def decided(run: Path) -> bool:
    """Whether a run keeps hidden states on the device."""
    return bool(json.loads((run / "run.json").read_text())["decision"]["on_device"])


def test_hidden_states_stay_on_the_device_where_they_fit(gpu: StandIn, tmp_path: Path) -> None:
    """No pass copies them. Where they do not fit, the bits are the same."""
    deep = tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16, num_hidden_layers=2)
    says = tiny.Said()
    gpu.moved.clear()
    prune(deep, tmp_path / "there", listener=says, **STATES)
    assert decided(tmp_path / "there")
    assert not [place for _, place in gpu.moved if place.startswith("passes/store")]
    assert says.sentences.count("hidden states between decoder layers: in the GPU's memory") == 1
    gpu.memory, says = DEVICE_RESERVE + 900_000, tiny.Said()
    prune(deep, tmp_path / "here", listener=says, **STATES)
    assert not decided(tmp_path / "here")
    assert says.sentences.count("hidden states between decoder layers: in main memory") == 1
    assert {what for what, place in gpu.moved if place.startswith("passes/store")} == {"to device", "to host"}
    there, here = (tiny.weights(tmp_path / name) for name in ("there", "here"))
    assert there == here

"""Whole runs on stand-in GPUs: methods, structure, recovery, alignment, executors, evaluation. They are slow tests."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fistapruner
import tiny
from fistapruner.measure.inspection import inspect_checkpoint
from fistapruner.runs.records import Report
from fistapruner.settings.parse import load_recipe_settings, merge_settings
from standin.gpu import StandIn
from standin.hardware import GPUS
from standin.hardware import LAST as GPU

pytestmark = [pytest.mark.usefixtures("few_operators"), pytest.mark.slow]

BEST = {**load_recipe_settings("best"), "reconstruct": 4}
QUARTER = {"remove": "mlp=25%,heads=1", "multiple": 4}
ZEROS = {"method": "magnitude", "sparsity": "2:4", "permutation": "channels"}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ("llama", {"method": name}) for name in ("admm", "wanda+refit")},
    "alps+swap": ("llama", {"method": "alps+swap"}),
    "fista": ("llama", {"method": "fista"}),
    "owl": ("llama", {"method": "wanda", "allocation": "owl"}),
    "best": ("llama", BEST),
    "best, 2:4": ("llama", {**BEST, "sparsity": "2:4"}),
    "low rank": ("llama", {"method": "magnitude", "low_rank": 2, "reconstruct": 1}),
    "own text": ("llama", {"method": "magnitude", "calibration": {"source": "self", "samples": 2}}),
    **{name: (name, {"method": "sparsegpt"}) for name in ("opt", "gpt2", "gemma3")},
    "obs": ("llama", {"structure": {**QUARTER, "method": "obs"}, **ZEROS}),
    "goa": ("llama", {"structure": {**QUARTER, "method": "goa"}, "weighting": "fisher"}),
    "bypass": ("llama", {"structure": {"remove": "mlp=25%", "multiple": 4, "method": "bypass", "steps": 2}, **ZEROS}),
    "experts": ("qwen3_moe", ZEROS),
    "fewer experts": ("qwen3_moe", {"structure": "experts=25%"}),
    **{
        f"narrower experts, {name}": (
            name,
            {"structure": {"remove": "mlp=25%,experts=25%", "multiple": 4}, "method": method, "sparsity": "2:4"},
        )
        for name, method in (("qwen2_moe", "magnitude"), ("gpt_oss", "proximal"))
    },
}
"""By name: architecture and settings."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("gpu") / "model", dtype=torch.bfloat16, num_hidden_layers=2)


@pytest.fixture(scope="module")
def pruned(model: Path) -> Path:
    """A run with 2:4 zeros, made on the CPU, for recovery and alignment."""
    prune(model, model.with_name("pruned"), "cpu", method="wanda", sparsity="2:4")
    return model.with_name("pruned")


def prune(model: Path, out: Path, device: str = GPU, **settings: Any) -> Report:
    calibration, execution = {"source": "python", "samples": 4, "seqlen": 16}, {"device": device, "threads": 1}
    base = {"calibration": calibration, "execution": execution, "dtype": "bfloat16"}
    return fistapruner.prune(model, out, **merge_settings(base, settings))


def errors(report: Report) -> list[float]:
    """Relative errors of all operators."""
    return [operator.relative_error or 0.0 for operator in report.operators]


def clean(gpu: StandIn) -> bool:
    """Nothing was decided in no fixed order, nothing is left on the device but rotary frequencies."""
    gc.collect()
    return not gpu.unordered and sum(gpu.live.values()) < 100


@pytest.mark.parametrize("name", RUNS)
def test_every_kind_of_run(gpu: StandIn, tmp_path: Path, name: str) -> None:
    """The evaluation of the result is that of a CPU."""
    architecture, settings = RUNS[name]
    folder = tiny.save(architecture, tmp_path / "model", dtype=torch.bfloat16, num_hidden_layers=1)
    report = prune(folder, tmp_path / "run", **settings)
    assert {layer.device for layer in report.layers} == {GPU}
    assert bool(report.layers[0].removals) == ("structure" in settings)
    assert not inspect_checkpoint(tmp_path / "run").violations
    assert clean(gpu)
    assert gpu.peak[torch.device(GPU)] > 0
    there, here = (
        fistapruner.evaluate(tmp_path / "run" / "model", "python", windows=2, seqlen=16, device=device).perplexity
        for device in (GPU, "cpu")
    )
    assert there.nll == pytest.approx(here.nll, rel=0.02)


@pytest.mark.parametrize("settings", [{"method": "sparsegpt"}, {"method": "proximal"}, {"structure": QUARTER}], ids=str)
def test_the_result_is_the_cpus_but_for_rounding(
    gpu: StandIn, model: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """In fp32: in bf16, rounding changes some of the few labels that sensitivity is measured with."""
    there = prune(model, tmp_path / "there", dtype="float32", **settings)
    assert {layer.device for layer in there.layers} == {GPU}
    assert clean(gpu)
    here = prune(model, tmp_path / "here", "cpu", dtype="float32", **settings)
    assert [operator.shape for operator in there.operators] == [operator.shape for operator in here.operators]
    if settings.get("method") == "proximal":  # fast products round differently on a CPU with bf16 units
        assert sum(errors(there)) == pytest.approx(sum(errors(here)), rel=0.02)
        return
    # A weight at its threshold may fall to the other side, and later operators then see other inputs.
    assert errors(there) == pytest.approx(errors(here), rel=0.05)
    assert errors(there)[:3] == pytest.approx(errors(here)[:3], rel=1e-3)


def test_workers_on_two_gpus_write_the_same_bytes(gpu: StandIn, model: Path, tmp_path: Path) -> None:
    """A stopped run goes on to them, too."""
    settings: dict[str, Any] = {"method": "sparsegpt", "propagate": "dense", "execution": {"executor": "process"}}
    both = prune(model, tmp_path / "process", "auto", **settings)
    assert {layer.device for layer in both.layers} == {f"cuda:{index}" for index in range(GPUS)}
    serial = merge_settings(settings, {"execution": {"executor": "serial"}})
    with pytest.raises(KeyboardInterrupt):
        prune(model, tmp_path / "serial", listener=tiny.Stops(), **serial)
    assert {layer.device for layer in fistapruner.resume(tmp_path / "serial").layers} == {GPU}
    assert tiny.weights(tmp_path / "process") == tiny.weights(tmp_path / "serial")


BASE: dict[str, Any] = {"evaluate": None, "rank": 2, "dtype": "float32"}
TRAINED = ({"parameters": "lora"}, {"parameters": "full"}, {"parameters": "spp"})
TRAINED += ({"optimizer": "mezo"}, {"optimizer": "subzero"}, {"align": "dpo"})


@pytest.mark.parametrize("settings", TRAINED, ids=lambda settings: next(iter(settings.values())))
def test_training(gpu: StandIn, pruned: Path, tmp_path: Path, settings: dict[str, str]) -> None:
    """Every zero stays; the loss is that of the CPU but for rounding."""
    pairs = tmp_path / "pairs.jsonl"
    lines = ({"prompt": f"After {n} comes", "chosen": f" no {n}!", "rejected": f" {n + 1}."} for n in range(6))
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = []
    for device in (GPU, "cpu"):
        out, asked = tmp_path / device[:3], {**BASE, "execution": {"device": device, "threads": 1}}
        if "align" in settings:
            report = fistapruner.align(pruned, out, steps=1, pairs_per_step=2, data={"pairs": str(pairs)}, **asked)
        else:
            data = {"source": "python", "seqlen": 16, "tokens": 400}
            report = fistapruner.recover(pruned, out, steps=3, windows_per_step=2, data=data, **asked, **settings)
        curves.append([loss for _, loss in report.recovery.curve])
        assert clean(gpu)
    assert curves[0] == pytest.approx(curves[1], rel=0.01)
    assert not inspect_checkpoint(tmp_path / GPU[:3]).violations

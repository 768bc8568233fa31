"""Whole runs on stand-in GPUs: every method, every executor, evaluation, and a packed model."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fistapruner
import tiny
from fistapruner.measure.inspection import inspect_checkpoint
from fistapruner.runs.records import Report
from fistapruner.settings.parse import load_recipe_settings, merge_settings
from standin.gpu import StandIn
from standin.hardware import GPUS
from standin.hardware import LAST as GPU

pytestmark = pytest.mark.usefixtures("few_operators")

METHODS: dict[str, Any] = {
    **{name: name for name in ("admm", "wanda+refit", "alps+swap", "fista")},
}
"""Method chains.

Those that other runs below have, compared with the CPU or not, are not among them.
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("gpu") / "model", dtype=torch.bfloat16, num_hidden_layers=2)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One decoder layer, for tests of what a layer does."""
    return tiny.save("llama", tmp_path_factory.mktemp("gpu") / "shallow", dtype=torch.bfloat16, num_hidden_layers=1)


@pytest.fixture(scope="module")
def pruned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with 2:4 zeros, made on the CPU, for recovery and alignment."""
    out = tmp_path_factory.mktemp("gpu") / "pruned"
    prune(model, out, "cpu", method="wanda", sparsity="2:4")
    return out


def prune(model: Path, out: Path, device: str = GPU, **settings: Any) -> Report:
    base = {
        "calibration": {"source": "python", "samples": 4, "seqlen": 16},
        "execution": {"device": device, "threads": 1},
        "dtype": "bfloat16",
    }
    return fistapruner.prune(str(model), out, **merge_settings(base, settings))


def errors(report: Report) -> list[float]:
    """Relative errors of all operators."""
    return [operator.relative_error or 0.0 for operator in report.operators]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_every_method(gpu: StandIn, shallow: Path, tmp_path: Path, method: str) -> None:
    """Nothing is decided in no fixed order; nothing is left on the device."""
    report = prune(shallow, tmp_path / "run", method=METHODS[method])
    assert {layer.device for layer in report.layers} == {GPU}
    assert not gpu.unordered
    assert sum(gpu.live.values()) < 100  # rotary frequencies, in modules that wait for the garbage collector
    assert gpu.peak[torch.device(GPU)] > 0


@pytest.mark.parametrize("method", ["sparsegpt", "proximal"])
def test_the_result_is_the_cpus_but_for_rounding(gpu: StandIn, model: Path, tmp_path: Path, method: Any) -> None:
    """In fp32: in bf16, rounding changes some of the few labels that sensitivity is measured with."""
    there = prune(model, tmp_path / "there", method=method, dtype="float32")
    assert {layer.device for layer in there.layers} == {GPU}
    assert not gpu.unordered
    gc.collect()
    assert sum(gpu.live.values()) < 100
    here = prune(model, tmp_path / "here", "cpu", method=method, dtype="float32")
    if method == "proximal":  # fast products round differently on a CPU with bf16 units, so other weights are kept
        assert sum(errors(there)) == pytest.approx(sum(errors(here)), rel=0.02)
        return
    assert errors(there) == pytest.approx(errors(here), rel=0.05)
    # A weight at its threshold may fall to the other side, and later operators then see other inputs.
    assert errors(there)[:3] == pytest.approx(errors(here)[:3], rel=1e-3)


@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
def test_best_quality(gpu: StandIn, model: Path, tmp_path: Path, sparsity: str) -> None:
    """Allocation by error, row weights, channel order, block reconstruction."""
    settings = merge_settings(load_recipe_settings("best"), {"sparsity": sparsity, "reconstruct": 4})
    report = prune(model, tmp_path / "run", **settings)
    assert len(report.layers) == 2
    assert not inspect_checkpoint(tmp_path / "run" / "model").violations
    assert not gpu.unordered
    gc.collect()
    assert sum(gpu.live.values()) < 100


@pytest.mark.parametrize("architecture", ["opt", "gpt2", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_other_architectures(gpu: StandIn, tmp_path: Path, architecture: str) -> None:
    changes = {"opt": {"num_hidden_layers": 1}, "gpt2": {"n_layer": 1}}
    folder = tiny.save(architecture, tmp_path / "model", dtype=torch.bfloat16, **changes.get(architecture, {}))
    report = prune(folder, tmp_path / "run", method="sparsegpt")
    assert {layer.device for layer in report.layers} == {GPU}


def test_owl_measures_outliers(gpu: StandIn, model: Path, tmp_path: Path) -> None:
    prune(model, tmp_path / "run", method="wanda", allocation="owl")
    assert not gpu.unordered
    gc.collect()
    assert sum(gpu.live.values()) < 100


def test_workers_on_two_gpus_write_the_same_bytes(gpu: StandIn, model: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": "sparsegpt", "propagate": "dense", "execution": {"executor": "process"}}
    both = prune(model, tmp_path / "process", "auto", **settings)
    assert {layer.device for layer in both.layers} == {f"cuda:{index}" for index in range(GPUS)}
    prune(model, tmp_path / "serial", **merge_settings(settings, {"execution": {"executor": "serial"}}))
    written = [weights(tmp_path / name) for name in ("process", "serial")]
    assert all(torch.equal(written[0][name], written[1][name]) for name in written[0])


def test_a_run_is_evaluated_and_resumed(gpu: StandIn, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    tiny.begin(
        str(model),
        out,
        method="wanda",
        calibration={"source": "python", "samples": 4, "seqlen": 16},
        execution={"device": GPU, "threads": 1},
    )
    report = fistapruner.resume(out)
    assert {layer.device for layer in report.layers} == {GPU}
    found = fistapruner.evaluate(out / "model", "python", windows=2, seqlen=16, against=model, device=GPU)
    here = fistapruner.evaluate(out / "model", "python", windows=2, seqlen=16, against=model, device="cpu")
    assert found.device == GPU
    assert found.perplexity is not None
    assert here.perplexity is not None
    assert found.perplexity.nll == pytest.approx(here.perplexity.nll, rel=0.02)


def test_calibration_text_of_the_model_itself(gpu: StandIn, shallow: Path, tmp_path: Path) -> None:
    """Of each token its number comes back, not its logits; sums of a single text are those of the CPU."""
    for samples, most in ((2, 2 * 16 * 2 * 16), (1, 2**20)):
        gpu.moved.clear()
        prune(shallow, tmp_path / f"{samples}", method="magnitude", calibration={"source": "self", "samples": samples})
        back = [count for key, count in gpu.moved.items() if key[0] == "to host" and "text/generate" in key[1]]
        assert sum(back) <= most
    assert not gpu.unordered


def test_channels_are_removed(gpu: StandIn, model: Path, tmp_path: Path) -> None:
    """The smaller layers are those of the CPU."""
    there, here = (
        prune(model, tmp_path / device[:3], device, structure={"remove": "mlp=25%", "multiple": 4}, dtype="float32")
        for device in (GPU, "cpu")
    )
    assert [operator.shape for operator in there.operators] == [operator.shape for operator in here.operators]
    assert errors(there) == pytest.approx(errors(here), rel=0.05)
    assert not gpu.unordered
    gc.collect()
    assert sum(gpu.live.values()) < 100


def test_channels_that_goa_chooses(gpu: StandIn, model: Path, tmp_path: Path) -> None:
    structure = {"remove": "mlp=25%,heads=1", "multiple": 4, "method": "goa"}
    report = prune(model, tmp_path / "run", structure=structure, weighting="fisher")
    found = {(removal.method, removal.after) for layer in report.layers for removal in layer.removals}
    assert found == {("goa", 36), ("goa", 1)}
    assert not gpu.unordered


RECOVERIES = [
    pytest.param(settings, id=next(iter(settings.values())), marks=[pytest.mark.slow] if slow else [])
    for settings, slow in (
        ({"parameters": "lora"}, False),
        ({"parameters": "full"}, False),
        ({"parameters": "spp"}, True),
        ({"optimizer": "mezo"}, False),
        ({"optimizer": "subzero"}, True),
    )
]


@pytest.mark.parametrize("settings", RECOVERIES)
def test_recovery(gpu: StandIn, pruned: Path, tmp_path: Path, settings: dict[str, str]) -> None:
    """Nothing is summed in no fixed order; every zero stays; the loss is that of the CPU but for rounding."""
    base: dict[str, Any] = {
        "evaluate": None,
        "steps": 3,
        "windows_per_step": 2,
        "rank": 2,
        "data": {"source": "python", "seqlen": 16, "tokens": 400},
        "dtype": "float32",
    }
    reports = {}
    for device in (GPU, "cpu"):
        out, execution = tmp_path / device[:3], {"device": device, "threads": 1}
        reports[device] = fistapruner.recover(pruned, out, execution=execution, **base, **settings)
    assert not gpu.unordered
    gc.collect()
    assert sum(gpu.live.values()) < 100
    before, after = weights(pruned), weights(tmp_path / GPU[:3])
    zeros = [name for name, tensor in before.items() if "_proj" in name]
    assert all(bool((after[name][before[name] == 0] == 0).all()) for name in zeros)
    there, here = (reports[device].recovery for device in (GPU, "cpu"))
    assert there is not None
    assert here is not None
    assert [loss for _, loss in there.curve] == pytest.approx([loss for _, loss in here.curve], rel=0.01)


def test_alignment(gpu: StandIn, pruned: Path, tmp_path: Path) -> None:
    """Nothing is summed in no fixed order; the loss is that of the CPU but for rounding."""
    pairs = tmp_path / "pairs.jsonl"
    lines = (
        {"prompt": f"After {number} comes", "chosen": f" no {number}!", "rejected": f" {number + 1}."}
        for number in range(6)
    )
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    base: dict[str, Any] = {"evaluate": None, "steps": 1, "pairs_per_step": 2, "rank": 2}
    reports = []
    for device in (GPU, "cpu"):
        settings = {**base, "data": {"pairs": str(pairs)}, "execution": {"device": device, "threads": 1}}
        reports.append(fistapruner.align(pruned, tmp_path / device[:3], dtype="float32", **settings))
    assert not gpu.unordered
    gc.collect()
    assert sum(gpu.live.values()) < 100
    there, here = ([loss for _, loss in report.recovery.curve] for report in reports if report.recovery)
    assert there == pytest.approx(here, rel=0.01)


def test_experts_are_removed(gpu: StandIn, tmp_path: Path) -> None:
    report = prune(tiny.save("qwen3_moe", tmp_path / "model"), tmp_path / "run", structure="experts=25%")
    assert [removal.after for layer in report.layers for removal in layer.removals] == [3, 3]


@pytest.mark.parametrize(("architecture", "method"), [("qwen2_moe", "magnitude"), ("gpt_oss", "proximal")])
def test_experts_lose_channels(gpu: StandIn, tmp_path: Path, architecture: str, method: str) -> None:
    structure = {"remove": "mlp=25%,experts=25%", "multiple": 4}
    folder = tiny.save(architecture, tmp_path / "model", num_hidden_layers=1)
    report = prune(folder, tmp_path / "run", structure=structure, method=method, sparsity="2:4")
    width = 36 if architecture == "gpt_oss" else 12
    assert {report.widths["experts"][1], report.widths["expert channels"][1]} == {3, width}
    assert not inspect_checkpoint(tmp_path / "run").violations


def test_experts_are_pruned(gpu: StandIn, tmp_path: Path) -> None:
    """In an order of channels that an n:m pattern asks for."""
    folder = tiny.save("qwen3_moe", tmp_path / "model", num_hidden_layers=1)
    prune(folder, tmp_path / "run", method="magnitude", sparsity="2:4", permutation="channels")
    assert not inspect_checkpoint(tmp_path / "run" / "model").violations


def test_zeros_and_low_rank_parts(gpu: StandIn, shallow: Path, tmp_path: Path) -> None:
    """The evaluation of the sum is that of a CPU."""
    prune(shallow, tmp_path / "run", method="magnitude", low_rank=2, reconstruct=1)
    found, here = (
        fistapruner.evaluate(tmp_path / "run" / "model", "python", windows=2, seqlen=16, device=device)
        for device in (GPU, "cpu")
    )
    assert found.perplexity is not None
    assert here.perplexity is not None
    assert found.perplexity.nll == pytest.approx(here.perplexity.nll, rel=0.02)


@pytest.mark.parametrize("method", ["obs", "bypass"])
def test_what_is_measured_on_the_dense_model_decides(
    gpu: StandIn, model: Path, shallow: Path, tmp_path: Path, method: str
) -> None:
    """Of the channels that stay, an n:m pattern takes the order that suits it."""
    structure: dict[str, Any] = {"remove": "mlp=25%", "multiple": 4, "method": "bypass", "steps": 2}
    if method == "obs":
        structure = {"remove": "mlp=25%,heads=1", "multiple": 4, "method": "obs"}
    zeros = {"method": "magnitude", "sparsity": "2:4", "permutation": "channels"}
    calibration = {"source": "python", "samples": 2, "seqlen": 16}
    report = prune(shallow, tmp_path / "run", structure=structure, calibration=calibration, **zeros)
    assert all(layer.removals for layer in report.layers)
    assert not gpu.unordered

"""Block reconstruction: masks stay, the layer comes closer, the same bits every time, nothing is kept that does not
help."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from fistapruner.measure.inspection import inspect_checkpoint
from fistapruner.models.checkpoint import Checkpoint
from fistapruner.models.layers import LayerwiseModel
from fistapruner.models.operators import discover
from fistapruner.passes.store import HiddenStates
from fistapruner.passes.stream import Calls
from fistapruner.pruning.run import prune
from fistapruner.runs.log import Listener
from fistapruner.training.reconstruct import BlockLoss, reconstruct_layer
from tiny import tensors

SETTINGS: dict[str, Any] = {
    "method": "wanda",
    "sparsity": "50%",
    "calibration": {"source": "python", "samples": 9, "seqlen": 24},
}
WAYS = {
    "dense": {"propagate": "dense", "dense_target": "dense"},
    "pruned": {"propagate": "pruned", "dense_target": "pruned"},
    "mixed": {"propagate": "pruned", "dense_target": 0.5},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_masks_stay_and_held_out_loss_falls(tmp_path: Path, architecture: str, way: str) -> None:
    source = tiny.save(architecture, tmp_path / "model")
    settings = {**SETTINGS, **WAYS[way], "sparsity": "2:4"}
    plain = prune(str(source), tmp_path / "plain", **settings)
    matched = prune(str(source), tmp_path / "matched", **settings, reconstruct=12)
    records = [layer.model_extra["reconstruct"] for layer in matched.layers if layer.model_extra]
    assert len(records) == 3
    assert all(record["held_out_after"] <= record["held_out_before"] for record in records)
    assert any(record["kept_step"] for record in records)
    assert matched.totals.operator_zeros == plain.totals.operator_zeros
    before, after = tensors(tmp_path / "plain" / "model"), tensors(tmp_path / "matched" / "model")
    assert not inspect_checkpoint(tmp_path / "matched" / "model").violations
    for layer in plain.layers:
        for name in (f"{layer.name}.{operator.name}.weight" for operator in layer.operators):
            found = name if name in after else name.removeprefix("transformer.")
            if way == "dense" or layer.index == 0:  # the other layers see what reconstruction has changed
                assert torch.equal(before[found] == 0, after[found] == 0), found
            assert int((before[found] == 0).sum()) == int((after[found] == 0).sum())
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert any("norm" in name or "ln" in name for name in changed)
    assert not any("emb" in name or "wte" in name or "wpe" in name for name in changed)


def test_routers_are_left_alone(tmp_path: Path) -> None:
    """Their bias is a vector, but which experts a token takes must not change."""
    source = tiny.save("gpt_oss", tmp_path / "model")
    prune(str(source), tmp_path / "run", **SETTINGS, **WAYS["dense"], reconstruct=12)
    before, after = tensors(source), tensors(tmp_path / "run" / "model")
    changed = {name for name, tensor in after.items() if name in before and not torch.equal(before[name], tensor)}
    assert any("norm" in name for name in changed)
    assert not any("router" in name for name in changed)


class StopsInTheThird(Listener):
    """Interrupts after the operators of the third layer, before it is matched."""

    def operators(self, index: int, names: str, error: float | None) -> None:
        if index == 2 and "down_proj" in names and error is not None:
            raise KeyboardInterrupt


@pytest.mark.parametrize("way", WAYS)
def test_an_interrupted_run_ends_in_the_same_bits(tmp_path: Path, way: str) -> None:
    source = tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16)
    settings = {**SETTINGS, **WAYS[way], "reconstruct": 6, "allocation": "error"}
    prune(str(source), tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        prune(str(source), tmp_path / "parts", **settings, listener=StopsInTheThird())
    prune(str(source), tmp_path / "parts", **settings)
    whole, parts = tensors(tmp_path / "whole" / "model"), tensors(tmp_path / "parts" / "model")
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name


def reconstructed(
    folder: Path, steps: int, rate: float
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Match the first layer of a model without half of its operators' weights; also its tensors before and after."""
    model = LayerwiseModel(Checkpoint.open(folder), torch.device("cpu"))
    layout = discover(model)
    tokens = torch.randint(3, tiny.VOCABULARY, (9, 24), generator=torch.Generator().manual_seed(0))
    inputs, wanted = (HiddenStates((9, 24, model.width), model.dtype) for _ in range(2))
    with model.embeddings_and_head(head=False):
        calls = Calls.of(model, 9, 24, 9)
        inputs.write(0, model.embed(tokens)[0])
    with model.layer(0) as layer, torch.no_grad():
        wanted.write(0, model.run(0, inputs.read(0, 9), calls.by_size[9][0]))
        for group in layout.layers[0]:
            for operator in group:
                weight = operator.weight(layer)
                weight[weight.abs() < weight.abs().median()] = 0
        before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
        result = reconstruct_layer(model, 0, layout.layers[0], inputs, wanted, calls, {}, None, steps, rate=rate)
        return *result, before, {name: parameter.clone() for name, parameter in layer.named_parameters()}


def test_steps_that_do_harm_are_not_kept(tmp_path: Path) -> None:
    found = reconstructed(tiny.save("llama", tmp_path), steps=16, rate=30.0)
    weights, record, before, after = found
    assert record["kept_step"] == 0
    assert record["steps"] < 16
    assert not weights
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_steps_that_were_too_large_become_smaller(tmp_path: Path) -> None:
    found = reconstructed(tiny.save("llama", tmp_path), steps=64, rate=0.3)
    weights, record, before, after = found
    assert record["held_out_after"] < record["held_out_before"]
    assert weights.keys() == {f"model.layers.0.{name}" for name in before}
    for name, tensor in after.items():
        assert torch.equal(tensor, weights[f"model.layers.0.{name}"])
        assert torch.equal(tensor == 0, before[name] == 0)


@pytest.mark.parametrize("kind", ["full", "diagonal", "none"])
def test_the_loss_is_the_mean_of_weighted_errors_in_the_metric(tmp_path: Path, kind: str) -> None:
    """sum_t w_t d_t^T M d_t / (T limit), with w_t = min(1, limit / energy of what the layer adds to token t)."""
    model = LayerwiseModel(Checkpoint.open(tiny.save("llama", tmp_path)), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    width, tokens = model.width, 24
    states = torch.randn(3, 2, tokens, width, generator=generator)
    states[1, :, 3] += 30.0  # a massive activation
    source, wanted = (HiddenStates((2, tokens, width), torch.float32) for _ in range(2))
    source.write(0, states[0])
    wanted.write(0, states[1])
    rows = torch.randn(6, width, generator=generator) * torch.logspace(-1, 1, width)
    measured = rows.T @ rows
    metric = {"full": measured, "diagonal": measured.diagonal(), "none": None}[kind]
    m = torch.eye(width, dtype=torch.float64)
    if metric is not None:
        m = measured.double() if kind == "full" else measured.diagonal().double().diag()
        m = 0.9 * m + 0.1 * m.trace() / width * torch.eye(width, dtype=torch.float64)

    def energies(differences: Tensor) -> list[float]:
        return [float(d @ m @ d) for d in differences.double()]

    loss = BlockLoss(source, wanted, metric, model.device)
    limit = sorted(energies(states[1, 0] - states[0, 0]))[(tokens - 1) // 2]  # the lower median of the first window
    for window in range(2):
        added, errors = energies(states[1, window] - states[0, window]), energies(states[2, window] - states[1, window])
        weights = [min(1.0, limit / energy) for energy in added]
        assert min(weights) < 0.1
        assert max(weights) == 1.0
        expected = sum(w * e for w, e in zip(weights, errors, strict=True)) / (tokens * limit)
        assert float(loss(states[2, window : window + 1], window)) == pytest.approx(expected, rel=1e-4)

"""Widths that differ between layers: the allocation, and every verb on the result."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fistapruner as fp
import tiny
from fistapruner import FistaPrunerError
from fistapruner.activations.store import scratch_factory
from fistapruner.activations.stream import NOTHING, Watched
from fistapruner.allocate.fisher import DensePasses
from fistapruner.cli import main
from fistapruner.evaluation.inspection import inspect_checkpoint
from fistapruner.models.discovery import discover
from fistapruner.models.files.checkpoint import Checkpoint
from fistapruner.models.layerwise import LayerwiseModel
from fistapruner.models.source import UNTRUSTED
from fistapruner.pipeline.new_widths import say_widths
from fistapruner.recipes.structure_settings import Structure
from fistapruner.sparse.variants import Variant, load_variant
from fistapruner.structured import widths as free_widths
from fistapruner.structured.proof import config_entries, plan_widths
from fistapruner.structured.widths import RUN, allocate, narrower_losses

SMALL = {"source": "python", "samples": 4, "seqlen": 32}
LAYERS = 5

LOAD_WITHOUT = """
import sys
sys.modules["fistapruner"] = None  # importing it fails
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""


def save(folder: Path, architecture: str = "llama", little: tuple[int, ...] = (2,), **changes: Any) -> Path:
    """A model whose layers ``little`` add little: they can lose most."""
    model = tiny.build(architecture, **{"num_hidden_layers": LAYERS, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            ends = name.endswith(("down_proj.weight", "o_proj.weight", "mlp.c_proj.weight"))
            if ends and any(f".{index}." in name for index in little):
                parameter.mul_(1e-3)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def settings(remove: str = "mlp=25%", method: str = "obs", **more: Any) -> dict[str, Any]:
    structure = {"remove": remove, "method": method, "widths": "free"}
    if "mlp" in remove:
        structure["multiple"] = 4
    if method == "bypass":
        structure["steps"] = 10
    return {"structure": structure, "calibration": SMALL, **more}


@pytest.mark.parametrize(
    ("architecture", "layers", "name"),
    [("llama", "model.layers", "mlp.down_proj.weight"), ("gpt2", "transformer.h", "mlp.c_proj.weight")],
)
def test_losses_of_narrower_layers_are_those_of_the_whole_model(
    tmp_path: Path, architecture: str, layers: str, name: str
) -> None:
    folder = save(tmp_path / "dense", architecture)
    tokens = torch.randint(3, tiny.VOCABULARY, (RUN + 1, 12), generator=torch.Generator().manual_seed(3))
    model = LayerwiseModel(Checkpoint.open(folder), torch.device("cpu"))
    changed: dict[int, Tensor] = {}

    @contextmanager
    def visit(index: int, layer: nn.Module) -> Iterator[Watched]:
        yield NOTHING
        changed[index] = layer.get_parameter(name).detach().clone()
        changed[index][: 4 + index] = 0

    passes = DensePasses(scratch_factory(None, model.dtype), batch_size=2)
    found = narrower_losses(model, tokens, passes, visit, lambda index: {"MLP channels": {name: changed[index]}})
    assert sorted(found) == [(index, "MLP channels") for index in range(LAYERS)]
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        dense = torch.log_softmax(whole(input_ids=tokens[:RUN]).logits.double(), -1)
        for (index, _), loss in found.items():
            parameter = whole.get_parameter(f"{layers}.{index}.{name}")
            before = parameter.clone()
            parameter.copy_(changed[index])
            own = torch.log_softmax(whole(input_ids=tokens[:RUN]).logits.double(), -1)
            parameter.copy_(before)
            assert loss == pytest.approx(float((dense.exp() * (dense - own)).sum(-1).mean()), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_curves_say_at_equal_widths_the_loss_that_was_measured(
    tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves: dict[tuple[str, str], Tensor] = {}
    losses: dict[tuple[int, str], float] = {}
    slots: list[Any] = []

    def error_curves(*args: Any) -> dict[tuple[str, str], Tensor]:
        slots.extend(args[2])
        curves.update(made := own(*args))
        return made

    def measure(*args: Any) -> dict[tuple[int, str], float]:
        losses.update(measured := narrower_losses(*args))
        return measured

    own = free_widths.error_curves
    monkeypatch.setattr(free_widths, "error_curves", error_curves)
    monkeypatch.setattr(free_widths, "narrower_losses", measure)
    fp.prune(save(tmp_path / "dense", architecture, little=()), tmp_path / "run", **settings())
    assert len(losses) == LAYERS
    for (_, curve), slot in zip(curves.items(), slots, strict=True):
        said = float(curve[: slot.unit.before - slot.unit.after].sum())
        assert said == pytest.approx(losses[slot.index, slot.unit.kind])


def test_the_allocation_is_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    for total in (3, 5, 8):
        slopes = [torch.rand(4, generator=generator).sort().values.tolist() for _ in range(3)]
        lowest = [1, 0, 0]
        taken = allocate(slopes, lowest, total)
        assert sum(taken) == total
        assert all(low <= count <= 4 for low, count in zip(lowest, taken, strict=True))
        choices = [counts for counts in itertools.product(range(1, 5), range(5), range(5)) if sum(counts) == total]
        costs = [sum(sum(s[:n]) for s, n in zip(slopes, counts, strict=True)) for counts in choices]
        found = sum(sum(s[:n]) for s, n in zip(slopes, taken, strict=True))
        assert found == pytest.approx(min(costs))
    assert allocate([[3.0, 1.0], [2.0, 2.5]], [0, 0], 2) == [0, 2]  # the second step of the first is not had alone
    with pytest.raises(FistaPrunerError, match="layers can lose 2 steps of channels, and 3 are asked for"):
        allocate([[1.0], [1.0]], [0, 0], 3)


@pytest.mark.parametrize(
    ("architecture", "remove", "method"),
    [("llama", "mlp=25%,heads=1", "obs"), ("gpt2", "mlp=25%", "energy"), ("llama", "mlp=25%", "bypass")],
)
def test_the_result_is_the_dense_model_with_zeroed_channels(
    tmp_path: Path, architecture: str, remove: str, method: str
) -> None:
    changes = {"num_key_value_heads": 4} if architecture == "llama" else {}
    folder = save(tmp_path / "model", architecture, **changes)
    report = fp.prune(str(folder), tmp_path / "run", **settings(remove, method))
    out = tmp_path / "run" / "model"
    removals = [removal for layer in report.layers for removal in layer.removals]
    for unit, (before, _) in report.widths.items():
        gone = [removal.before - removal.after for removal in removals if removal.unit == unit]
        assert sum(gone) == LAYERS * before // 4  # as many as with equal widths
        assert len(set(gone)) > 1 or method == "bypass"
    small, dense = (AutoModelForCausalLM.from_pretrained(place).eval() for place in (out, folder))
    for layer in report.layers:
        for removal in layer.removals:
            before, after = (model.get_submodule(layer.name) for model in (dense, small))
            turned = architecture == "gpt2"
            wide, narrow = (
                (weight.T if turned else weight)
                for weight in (
                    part.get_parameter(f"{removal.producers[-1]}.weight").detach() for part in (before, after)
                )
            )
            keep = (wide[None] == narrow[:, None]).all(2).float().argmax(1)
            target = before.get_parameter(f"{removal.consumer}.weight").detach()
            whole = target.T if turned else target
            whole.zero_()
            new = after.get_parameter(f"{removal.consumer}.weight").detach()
            whole[:, keep] = new.T if turned else new
            if before.get_submodule(removal.consumer).bias is not None:
                before.get_submodule(removal.consumer).bias.data.copy_(after.get_submodule(removal.consumer).bias)
    tokens = torch.randint(3, tiny.VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(small(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-4)
    for cache in ("dynamic", "static"):
        made = [
            model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0, cache_implementation=cache)
            for model in (small, dense)
        ]
        assert torch.equal(*made)
    # It can be trained, saved and loaded again.
    assert not small.is_quantized
    small(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    small.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(tokens).logits, small(tokens).logits)
    half = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert not inspect_checkpoint(tmp_path / "run").violations


def test_heads_of_a_fused_projection_are_cut_where_the_forward_pass_follows(tmp_path: Path) -> None:
    """GPT-NeoX has query, key and value of a head in one block; its config cannot say another number of heads."""
    folder = tiny.save("gpt_neox", tmp_path / "model")
    report = fp.prune(str(folder), tmp_path / "run", **settings("heads=1"))
    assert sum(removal.before - removal.after for layer in report.layers for removal in layer.removals) == 3
    small, dense = (AutoModelForCausalLM.from_pretrained(at).eval() for at in (tmp_path / "run" / "model", folder))
    for layer in report.layers:
        before, after = (model.get_submodule(f"{layer.name}.attention") for model in (dense, small))
        size = before.head_size
        wide, narrow = (part.query_key_value.weight.detach().view(-1, 3 * size * 32) for part in (before, after))
        heads = (wide[None] == narrow[:, None]).all(2).float().argmax(1)
        columns = (heads[:, None] * size + torch.arange(size)).flatten()
        before.dense.weight.detach().zero_()
        before.dense.weight.detach()[:, columns] = after.dense.weight.detach()
        before.dense.bias.detach().copy_(after.dense.bias.detach())
    tokens = torch.randint(3, tiny.VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(small(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-4)
    made = [model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0) for model in (small, dense)]
    assert torch.equal(*made)


@pytest.mark.parametrize("architecture", ["gpt2", "falcon", "bloom", "phi3", "opt"])
def test_heads_whose_number_the_forward_pass_notes_are_refused(tmp_path: Path, architecture: str) -> None:
    folder = tiny.save(architecture, tmp_path / "model")
    with pytest.raises(FistaPrunerError, match=r"key/value groups .*not removed|they are not removed"):
        fp.prune(str(folder), tmp_path / "run", **settings("heads=1"))


def test_without_this_package_it_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    fp.prune(str(folder), tmp_path / "run", **settings())
    program = [sys.executable, "-c", LOAD_WITHOUT, str(tmp_path / "run" / "model")]
    loud = {**os.environ, "TRANSFORMERS_VERBOSITY": "warning"}
    run = subprocess.run(program, capture_output=True, text=True, check=False, env=loud)
    assert run.returncode != 0
    assert "mismatch" in run.stderr.lower()
    assert "down_proj.weight" in run.stdout + run.stderr


def test_a_layer_that_adds_little_loses_most(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    report = fp.prune(str(folder), tmp_path / "run", **settings())
    widths = [layer.removals[0].after if layer.removals else 48 for layer in report.layers]
    assert widths[2] == min(widths) < max(widths)
    assert widths[2] == 28  # 1.5 times what equal widths lose, rounded up to a multiple
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["intermediate_size"] == 48
    assert config["quantization_config"] == {
        "quant_method": "fistapruner",
        "version": 2,
        "widths": {str(index): {"intermediate_size": width} for index, width in enumerate(widths) if width < 48},
    }


def test_the_first_and_last_layers_lose_half_at_most(tmp_path: Path) -> None:
    """Where they are cheap, too; a cheap layer between them loses 1.5 times what equal widths lose."""
    folder = save(tmp_path / "model", little=(0, 1, 3, 6, 7), num_hidden_layers=8, intermediate_size=40)
    report = fp.prune(str(folder), tmp_path / "run", **settings("mlp=40%"))
    gone = [sum(removal.before - removal.after for removal in layer.removals) for layer in report.layers]
    assert [gone[index] for index in (0, 1, 3, 6, 7)] == [20, 20, 24, 20, 20]
    assert sum(gone) == 8 * 16


def test_a_layer_whose_output_predictions_do_not_need_loses_most(tmp_path: Path) -> None:
    """Its output is larger than those of the others; the norm that follows it leaves almost nothing of it."""
    model = tiny.build("gemma2", num_hidden_layers=LAYERS)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(3)
        model.model.layers[2].post_feedforward_layernorm.weight.fill_(1e-3 - 1)  # it scales by 1 + weight
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    report = fp.prune(str(tmp_path / "model"), tmp_path / "run", **settings())
    widths = [layer.removals[0].after if layer.removals else 48 for layer in report.layers]
    assert widths[2] == 28 < min(widths[:2] + widths[3:])


def test_every_verb_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 100)
    out = tmp_path / "run"
    report = fp.prune(str(folder), out, sparsity="50%", method="wanda", evaluate=str(text), **settings())
    assert report.status == "finished"
    capsys.readouterr()
    assert main(["inspect", str(out), "--quiet"]) == 0
    assert "MLP channels: 48 -> 28 in" in capsys.readouterr().out
    assert_said_who_loads_it(out)
    model = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    tokens = torch.arange(3, 19)[None]
    logits = model(tokens).logits
    fp.pack(out / "model", tmp_path / "packed", values="bf16")
    unpacked = fp.unpack(tmp_path / "packed", tmp_path / "unpacked")
    for loaded in (
        fp.load(tmp_path / "packed", packed=False),
        fp.load(tmp_path / "packed"),
        fp.load(out / "model"),
        load_variant(Variant("smaller", out / "model")),
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed"),
        AutoModelForCausalLM.from_pretrained(unpacked),
    ):
        torch.testing.assert_close(loaded(tokens).logits.float(), logits, rtol=0.05, atol=0.05)
        loaded.save_pretrained(tmp_path / "saved")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
        torch.testing.assert_close(again(tokens).logits.float(), logits, rtol=0.05, atol=0.05)
    data = {"source": str(text), "tokens": 512, "seqlen": 16}
    recovered = fp.recover(out, tmp_path / "recovered", data=data, execution={"device": "cpu"})
    assert recovered.status == "finished"
    assert_said_who_loads_it(tmp_path / "recovered")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "recovered" / "model")
    assert trained.model.layers[2].mlp.up_proj.weight.shape == (28, 32)


def assert_said_who_loads_it(run: Path) -> None:
    card, page = ((run / name).read_text() for name in ("model/README.md", "report.html"))
    said = "transformers loads the model after 'import fistapruner', and llama.cpp, if it is a Llama, the file"
    for text in (card, page):
        assert said in unescape(text)
        assert "loads it as it loads the dense one" not in text
    assert "```python\nimport fistapruner " in card


@pytest.mark.parametrize("method", ["obs", "bypass"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path, method: str) -> None:
    folder = save(tmp_path / "model")
    fp.prune(str(folder), tmp_path / "whole", **settings(method=method, sparsity="2:4"))
    with pytest.raises(KeyboardInterrupt):
        fp.prune(str(folder), tmp_path / "parts", listener=tiny.Stops(), **settings(method=method, sparsity="2:4"))
    fp.resume(tmp_path / "parts")
    for name in ("model.safetensors", "config.json"):
        files = [(tmp_path / run / "model" / name).read_bytes() for run in ("whole", "parts")]
        assert files[0] == files[1]


@pytest.mark.parametrize(
    ("widths", "said"),
    [
        ({"2": {"intermediate_size": 20}}, "tensor 'model.layers.2.mlp.gate_proj.weight' is"),
        ({"9": {"intermediate_size": 28}}, "widths of decoder layer 9 of 5"),
        ({}, "the config asks for"),
        ({"2": 28}, "are expected"),
        ([1], "are expected"),
    ],
)
def test_widths_that_do_not_fit_are_refused(tmp_path: Path, widths: Any, said: str) -> None:
    folder = save(tmp_path / "model")
    fp.prune(str(folder), tmp_path / "run", **settings())
    file = tmp_path / "run" / "model" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["widths"] = widths
    file.write_text(json.dumps(config))
    with pytest.raises(FistaPrunerError, match=said):
        LayerwiseModel(UNTRUSTED.at(tmp_path / "run" / "model").checkpoint(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("first", "second", "left"),
    [("mlp=25%", "heads=1", "heads"), ("heads=1", "mlp=25%", "mlp"), ("mlp=25%,heads=1", None, None)],
)
def test_of_free_widths_only_the_other_kind_goes(
    tmp_path: Path, first: str, second: str | None, left: str | None
) -> None:
    """More of the same, and equal widths, are refused in a sentence that is true."""
    folder = tiny.save("llama", tmp_path / "model", num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)
    fp.prune(str(folder), tmp_path / "free", **settings(first))
    model = LayerwiseModel(UNTRUSTED.at(tmp_path / "free" / "model").checkpoint(), torch.device("cpu"))
    layout = discover(model)
    advice = "from the dense model" + (f", or only {left} with --widths free$" if left else "$")
    for remove, widths in [
        (first, "free"),
        ("mlp=24,heads=1", "free"),
        ("mlp=24", "uniform"),
        ("heads=1", "uniform"),
        ("experts=1", "uniform"),
    ]:
        with pytest.raises(FistaPrunerError, match=f"{remove} with --widths {widths} cannot be removed .*{advice}"):
            plan_widths(model, layout, Structure(remove=remove, widths=widths, multiple=4))
    if second is not None:
        found = plan_widths(model, layout, Structure(remove=second, widths="free", multiple=4))
        assert all(len(units) == 1 for units in found.units)


@pytest.mark.parametrize(
    ("architecture", "entry"),
    [("llama", "intermediate_size"), ("opt", "ffn_dim"), ("gpt2", "n_inner"), ("bloom", "intermediate_size")],
)
def test_widths_are_named_as_the_config_has_them(tmp_path: Path, architecture: str, entry: str) -> None:
    """GPT-2's entry is None for four times the hidden size; BLOOM has none."""
    model = LayerwiseModel(UNTRUSTED.at(tiny.save(architecture, tmp_path / "model")).checkpoint(), torch.device("cpu"))
    found = plan_widths(model, discover(model), Structure(remove="mlp=25%", widths="free", multiple=4))
    (unit,) = found.units[0]
    assert config_entries(model, [unit]) == {unit.kind: (entry,)}


@pytest.mark.parametrize(
    ("architecture", "remove", "said"),
    [
        ("qwen3_moe", "experts=1", "3 of 4 experts stay in every mixture, 15712 of the layers' 18848 "),
        ("qwen3_moe", "heads=1,experts=1", "1 of 2 key/value groups and 3 of 4 experts stay in every decoder layer, "),
        (
            "deepseek_v3",
            "mlp=25%",
            "36 of 48 MLP channels, 12 of 16 shared expert channels and 12 of 16 expert channels stay in every decoder "
            "layer that has them, 14112 of the layers' 17184 parameters (17.9% fewer; 12.1% of the whole model's)",
        ),
        (
            "llama",
            "mlp=25%,heads=1",
            "1 of 2 key/value groups and 36 to 48 of 48 MLP channels stay in every decoder layer, ",
        ),
    ],
)
def test_what_stays_is_said(tmp_path: Path, architecture: str, remove: str, said: str) -> None:
    """Of free widths also where a layer loses nothing of a kind."""
    folder, free = tiny.save(architecture, tmp_path / "model", num_hidden_layers=2), architecture == "llama"
    model = LayerwiseModel(UNTRUSTED.at(folder).checkpoint(), torch.device("cpu"))
    asked: dict[str, Any] = {"multiple": 4} if "mlp" in remove else {}
    found = plan_widths(model, discover(model), Structure(remove=remove, widths="free" if free else "uniform", **asked))
    first, *rest = found.units
    told = say_widths(model, replace(found, units=(first[1:], *rest)) if free else found)
    assert told.startswith(f"structure: {said}")


def test_experts_have_no_widths_of_their_own(tmp_path: Path) -> None:
    folder = tiny.save("qwen3_moe", tmp_path / "model")
    with pytest.raises(FistaPrunerError, match="widths free are of channels and heads"):
        fp.prune(str(folder), tmp_path / "run", **settings("experts=25%,heads=1"))

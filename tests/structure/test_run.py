"""A run that removes structure: the result is an ordinary smaller model, whose errors are those of the definition."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import fistapruner as fp
import tiny
from fistapruner.cli import main
from fistapruner.core import NM
from fistapruner.measure.inspection import inspect_checkpoint
from fistapruner.models.checkpoint import Checkpoint
from fistapruner.pruning.run import plan_pruning
from fistapruner.runs.prune_directory import PruneDirectory
from fistapruner.runs.records import Report
from fistapruner.settings.settings import Recipe
from fistapruner.settings.structure_settings import Structure
from speeds import in_this_process

SMALL = {"source": "python", "samples": 4, "seqlen": 32}
LESS: dict[str, Any] = {"structure": {"remove": "mlp=25%", "multiple": 4}, "calibration": SMALL}
MLP = {
    "opt": ("fc1", "fc2"),
    "phi": ("mlp.fc1", "mlp.fc2"),
    "gpt_neox": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "gpt2": ("mlp.c_fc", "mlp.c_proj"),
    "falcon": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "phi3": ("mlp.gate_up_proj", "mlp.down_proj"),
}
"""The operators that write and read the MLP's channels, where they are not up_proj (and gate_proj) and down_proj."""

LOAD = """
import sys, json
sys.modules["fistapruner"] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokens = torch.tensor([json.loads(sys.argv[2])])
logits = model(tokens).logits[0, -1].tolist()
print(json.dumps([logits, model.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)[0].tolist()]))
"""


def oriented(weight: Tensor, architecture: str) -> Tensor:
    """(outputs, inputs) of a stored weight: GPT-2 stores the transpose."""
    return weight.T if architecture == "gpt2" else weight


def kept_rows(dense: Tensor, small: Tensor) -> Tensor:
    """Places of the rows of ``small`` in ``dense``, bit for bit."""
    same = (dense[None] == small[:, None]).all(2)
    assert (same.sum(1) >= 1).all()
    return same.float().argmax(1)


@pytest.mark.parametrize("architecture", sorted(set(tiny.ARCHITECTURES) - {"bloom"}))
def test_the_result_computes_what_the_dense_model_with_zeroed_channels_does(tmp_path: Path, architecture: str) -> None:
    folder = tiny.save(architecture, tmp_path / "model")
    report = fp.prune(str(folder), tmp_path / "run", **LESS)
    out = tmp_path / "run" / "model"
    small = AutoModelForCausalLM.from_pretrained(out).eval()
    dense = AutoModelForCausalLM.from_pretrained(folder).eval()
    producer, consumer = MLP.get(architecture, ("mlp.up_proj", "mlp.down_proj"))
    changed = set()
    for layer in report.layers:
        (removal,) = layer.removals
        before, after = dense.get_submodule(layer.name), small.get_submodule(layer.name)
        write = [oriented(model.get_parameter(f"{producer}.weight"), architecture) for model in (before, after)]
        keep = kept_rows(*write)
        if architecture == "phi3":  # gate and up are one tensor
            assert torch.equal(keep[: len(keep) // 2] + 48, keep[len(keep) // 2 :])
            keep, write = keep[: len(keep) // 2], [weight[: len(weight) // 2] for weight in write]
        assert [len(weight) for weight in write] == list(report.widths["MLP channels"])
        assert removal.consumer == consumer
        with torch.no_grad():
            whole = oriented(before.get_parameter(f"{consumer}.weight"), architecture)
            whole.zero_()
            whole[:, keep] = oriented(after.get_parameter(f"{consumer}.weight"), architecture)
            if before.get_submodule(consumer).bias is not None:
                before.get_submodule(consumer).bias.copy_(after.get_submodule(consumer).bias)
        changed |= {
            f"{layer.name}.{name}.{kind}" for name in (*removal.producers, consumer) for kind in ("weight", "bias")
        }
    tokens = torch.randint(3, tiny.VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(small(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-4)
    with_cache = small.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(with_cache, dense.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0))
    for name, tensor in dense.state_dict().items():
        if name not in changed:
            assert torch.equal(small.state_dict()[name], tensor), name
    # It is an ordinary model: it can be trained and saved.
    small(tokens, labels=tokens).loss.backward()
    small.save_pretrained(tmp_path / "again")
    assert Checkpoint.open(tmp_path / "again").nbytes == Checkpoint.open(out).nbytes


def test_the_result_loads_without_this_package(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model", shard="20KB")
    report = fp.prune(str(folder), tmp_path / "run", **LESS)
    out = tmp_path / "run" / "model"
    tokens = [5, 6, 7, 8]
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(out), json.dumps(tokens)], capture_output=True, text=True, check=True
    )
    logits, generated = json.loads(run.stdout.splitlines()[-1])
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    torch.testing.assert_close(torch.tensor(logits), model(torch.tensor([tokens])).logits[0, -1])
    assert len(generated) == 9
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert report.totals.model_weights == parameters < (report.model.parameters or 0)
    assert sum(entry.nbytes for file in Checkpoint.open(out).files.values() for entry in file.entries.values()) == (
        4 * parameters
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "proximal", "residual": "none"},
        {"propagate": "pruned", "dense_target": 1.0, "residual": "none"},
        {"propagate": "dense", "dense_target": 1.0, "residual": "none"},
        {"method": "wanda"},
    ],
    ids=["half the dense target", "dense target", "dense inputs", "pruned target"],
)
def test_errors_are_those_of_the_definition(tmp_path: Path, settings: dict[str, Any]) -> None:
    """With two whole models in memory: inputs of the operator in the smaller one, outputs of the dense one."""
    folder = tiny.save("llama", tmp_path / "model")
    report = fp.prune(str(folder), tmp_path / "run", **LESS, **settings)
    recipe = fp.Recipe.build(report.recipe)
    tokens = PruneDirectory(tmp_path / "run").tokens()
    dense = AutoModelForCausalLM.from_pretrained(folder).eval()
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    for layer in report.layers:
        (removal,) = layer.removals
        keep = kept_rows(
            dense.get_parameter(f"{layer.name}.mlp.up_proj.weight"),
            small.get_parameter(f"{layer.name}.mlp.up_proj.weight"),
        )
        new = small.get_parameter(f"{layer.name}.mlp.down_proj.weight").detach().double()
        mixed = AutoModelForCausalLM.from_pretrained(folder).eval()  # the layer itself is whole, those before are not
        if recipe.propagate == "pruned":
            for index in range(layer.index):
                mixed.model.layers[index] = small.model.layers[index]
        seen = tiny.inputs_of(mixed, f"{layer.name}.mlp.down_proj", tokens)
        true = tiny.inputs_of(dense, f"{layer.name}.mlp.down_proj", tokens)
        weight = dense.get_parameter(f"{layer.name}.mlp.down_proj.weight").detach().double()
        share = recipe.dense_share
        wanted = (share * true + (1 - share) * seen) @ weight.T
        energy = float(((true if share else seen) @ weight.T).square().sum())
        dropped = float((seen[:, keep] @ weight[:, keep].T - wanted).square().sum()) / energy
        fitted = float((seen[:, keep] @ new.T - wanted).square().sum()) / energy
        assert removal.dropped_error == pytest.approx(dropped, rel=1e-3)
        assert removal.relative_error == pytest.approx(fitted, rel=1e-3)
        assert fitted < dropped


@pytest.mark.parametrize(
    ("architecture", "amount"),
    [("llama", "heads=1"), *((name, "mlp=25%,heads=1") for name in ("llama", "qwen2", "qwen3", "gemma3"))],
)
def test_key_value_groups_are_removed(tmp_path: Path, architecture: str, amount: str) -> None:
    """The result computes what the dense model with the group's columns zero does, also when it generates."""
    folder = tiny.save(architecture, tmp_path / "model")
    report = fp.prune(
        str(folder),
        tmp_path / "run",
        calibration=SMALL,
        structure={"remove": amount, **({"multiple": 4} if "%" in amount else {})},
    )
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    dense = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert report.widths["key/value groups"] == (2, 1)
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (2, 1)
    assert len(report.layers[0].removals) == 1 + amount.startswith("mlp")
    with torch.no_grad():
        for before, after in zip(dense.model.layers, small.model.layers, strict=True):
            keep = kept_rows(before.self_attn.q_proj.weight, after.self_attn.q_proj.weight)
            assert len(keep) == len(before.self_attn.q_proj.weight) // 2
            assert torch.equal(keep, torch.arange(len(keep)) + keep[0])  # a whole group
            before.self_attn.o_proj.weight.zero_()
            before.self_attn.o_proj.weight[:, keep] = after.self_attn.o_proj.weight
            channels = kept_rows(before.mlp.up_proj.weight, after.mlp.up_proj.weight)
            before.mlp.down_proj.weight.zero_()
            before.mlp.down_proj.weight[:, channels] = after.mlp.down_proj.weight
    tokens = torch.randint(3, tiny.VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(small(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-4)
    with_cache = small.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(with_cache, dense.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0))
    assert not inspect_checkpoint(tmp_path / "run").violations


def test_removed_heads_and_channels_aim_at_the_dense_outputs(tmp_path: Path) -> None:
    """MLP channels are chosen, and both refitted, on the layer without its heads; with zeros on top, too."""
    folder = tiny.save("llama", tmp_path / "model")
    for sparsity in ("0%", "2:4"):
        settings = {"sparsity": sparsity, "propagate": "dense", "dense_target": 1.0, "residual": "none"}
        structure = {"remove": "mlp=25%,heads=1", "multiple": 4}
        report = fp.prune(str(folder), tmp_path / sparsity, calibration=SMALL, structure=structure, **settings)
        tokens = PruneDirectory(tmp_path / sparsity).tokens()
        dense = AutoModelForCausalLM.from_pretrained(folder).eval()
        small = AutoModelForCausalLM.from_pretrained(tmp_path / sparsity / "model").eval()
        for layer in report.layers:
            mixed = AutoModelForCausalLM.from_pretrained(folder).eval()
            mixed.model.layers[layer.index] = small.model.layers[layer.index]
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                full = f"{layer.name}.{name}"
                weight, new = (model.get_parameter(f"{full}.weight").detach().double() for model in (dense, small))
                wanted = tiny.inputs_of(dense, full, tokens) @ weight.T
                error = (tiny.inputs_of(mixed, full, tokens) @ new.T - wanted).square().sum() / wanted.square().sum()
                entry = next(operator for operator in layer.operators if operator.name == name)
                assert entry.relative_error == pytest.approx(float(error), rel=1e-3), (sparsity, full)


@pytest.mark.parametrize(("sparsity", "reconstruct"), [("0%", 0), ("2:4", 0), ("0%", 6)])
def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path, sparsity: str, reconstruct: int) -> None:
    for architecture in ("llama", "gpt2", "phi3"):
        place = tmp_path / architecture
        folder = tiny.save(architecture, place / "model", dtype=torch.bfloat16)
        remove = "mlp=25%,heads=1" if architecture == "llama" else "mlp=25%"
        less = {"structure": {"remove": remove, "multiple": 4}, "calibration": SMALL}
        settings = {**less, "sparsity": sparsity, "propagate": "pruned", "reconstruct": reconstruct}
        fp.prune(str(folder), place / "whole", **settings)
        with pytest.raises(KeyboardInterrupt):
            fp.prune(str(folder), place / "parts", listener=tiny.Stops(2), **settings)
        report = fp.resume(place / "parts")
        assert report.status == "finished"
        assert tiny.weights(place / "whole") == tiny.weights(place / "parts")
        configs = [json.loads((place / run / "model" / "config.json").read_text()) for run in ("whole", "parts")]
        assert configs[0] == configs[1]


def test_structure_and_sparsity_in_one_run(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16)
    for run, settings in {
        "nm": {"sparsity": "2:4"},
        "share": {"sparsity": "50%"},
        "attention": {"sparsity": "50%", "allocation": {"re:.": "0%", "re:self_attn": "50%"}},
        "sequential": {"sparsity": "2:4", "method": "wanda+refit", "error_correction": False},
        "dense": {"sparsity": "50%", "propagate": "dense", "method": "sparsegpt"},
    }.items():
        report = fp.prune(str(folder), tmp_path / run, **LESS, **settings)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / run / "model").eval()
        zeros = sum(int((module.weight == 0).sum()) for layer in model.model.layers for module in linear(layer))
        assert zeros == report.totals.operator_zeros
        names = {operator.name for operator in report.layers[0].operators}
        assert len(names) == (5 if run == "attention" else 7)
        for layer in model.model.layers:
            assert layer.mlp.down_proj.weight.shape[1] == layer.mlp.up_proj.weight.shape[0] == 36
            for module in linear(layer):
                weight = module.weight
                if settings["sparsity"] == "2:4":
                    assert NM(2, 4).satisfies(weight)
        if run == "share":  # over the smaller shapes, exactly
            weights = sum(module.weight.numel() for layer in model.model.layers for module in linear(layer))
            assert abs(zeros - weights / 2) <= len(model.model.layers) * 7
        assert not inspect_checkpoint(tmp_path / run).violations
        assert torch.isfinite(model(torch.arange(3, 19)[None]).logits).all()


def linear(layer: Any) -> list[Any]:
    return [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]


@pytest.mark.parametrize("architecture", ["opt", "gpt2"])
@pytest.mark.parametrize("sparsity", ["0%", "50%"])
def test_a_refit_fits_the_bias_too_and_zeros_aim_at_what_it_leaves(
    tmp_path: Path, architecture: str, sparsity: str
) -> None:
    """The errors in the report are those of the outputs with the new bias against those with the old one."""
    folder = tiny.save(architecture, tmp_path / "model")
    settings = {"propagate": "pruned", "dense_target": 1.0, "residual": "none", "sparsity": sparsity}
    report = fp.prune(str(folder), tmp_path / "run", **LESS, **settings)
    tokens = PruneDirectory(tmp_path / "run").tokens()
    dense, small = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (folder, tmp_path / "run" / "model"))
    for layer in report.layers:
        (removal,) = layer.removals
        name = f"{layer.name}.{removal.consumer}"
        wanted, found = (
            tiny.inputs_of(model, name, tokens)
            @ oriented(model.get_parameter(f"{name}.weight").detach().double(), architecture).T
            for model in (dense, small)
        )
        change = (small.get_submodule(name).bias - dense.get_submodule(name).bias).detach().double()
        entry = next(operator for operator in layer.operators if operator.name == removal.consumer)
        error = float((found + change - wanted).square().sum() / wanted.square().sum())
        assert entry.relative_error == pytest.approx(error, rel=1e-3)
        if sparsity == "0%":
            assert removal.relative_error == entry.relative_error
            mean = (wanted - found).mean(0)
            torch.testing.assert_close(change, mean, rtol=1e-3, atol=1e-4)
            assert removal.relative_error < removal.dropped_error


@pytest.mark.parametrize(
    ("architecture", "remove", "name"),
    [
        ("opt", "mlp=50%", "fc1"),
        ("gpt2", "mlp=75%", "mlp.c_fc"),
        ("gpt_neox", "mlp=50%", "mlp.dense_h_to_4h"),
    ],
)
def test_operators_that_lose_most_of_their_outputs_aim_at_the_dense_ones_that_stay(
    tmp_path: Path, architecture: str, remove: str, name: str
) -> None:
    """Alone in its group, with no more outputs than inputs afterwards."""
    folder = tiny.save(architecture, tmp_path / "model")
    settings = {"propagate": "pruned", "dense_target": 1.0, "residual": "none", "sparsity": "50%"}
    structure = {"remove": remove, "multiple": 4}
    report = fp.prune(str(folder), tmp_path / "run", structure=structure, calibration=SMALL, **settings)
    tokens = PruneDirectory(tmp_path / "run").tokens()
    dense, small = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (folder, tmp_path / "run" / "model"))
    for layer in report.layers:
        weight, new = (
            oriented(model.get_parameter(f"{layer.name}.{name}.weight").detach().double(), architecture)
            for model in (dense, small)
        )
        assert len(new) <= len(weight.T)
        nearest = torch.nn.functional.normalize(new) @ torch.nn.functional.normalize(weight).T
        wanted = tiny.inputs_of(dense, f"{layer.name}.{name}", tokens) @ weight[nearest.argmax(1)].T
        found = tiny.inputs_of(small, f"{layer.name}.{name}", tokens) @ new.T
        entry = next(operator for operator in layer.operators if operator.name == name)
        assert entry.relative_error == pytest.approx(
            float((found - wanted).square().sum() / wanted.square().sum()), rel=1e-3
        )


@pytest.mark.parametrize("architecture", ["opt", "gpt2", "llama"])
def test_flap_adds_to_the_bias_where_there_is_one(tmp_path: Path, architecture: str) -> None:
    """The error in the report is that of the outputs with the new bias; a bias is not invented."""
    folder = tiny.save(architecture, tmp_path / "model")
    structure = {**LESS["structure"], "method": "flap"}
    report = fp.prune(str(folder), tmp_path / "run", calibration=SMALL, structure=structure)
    tokens = PruneDirectory(tmp_path / "run").tokens()
    dense = AutoModelForCausalLM.from_pretrained(folder).eval()
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    producer, consumer = MLP.get(architecture, ("mlp.up_proj", "mlp.down_proj"))
    layer = report.layers[0]
    (removal,) = layer.removals
    assert removal.compensate == ("none" if architecture == "llama" else "bias")
    assert report.method == ("flap" if architecture == "llama" else "flap+bias")
    name = f"{layer.name}.{consumer}"
    write = [oriented(model.get_parameter(f"{layer.name}.{producer}.weight"), architecture) for model in (dense, small)]
    keep, inputs = kept_rows(*write), tiny.inputs_of(dense, name, tokens)
    gone = [channel for channel in range(removal.before) if channel not in keep.tolist()]
    weight, new = (oriented(model.get_parameter(f"{name}.weight").detach(), architecture) for model in (dense, small))
    assert torch.equal(new, weight[:, keep])
    shift = torch.zeros(len(new))
    if architecture == "llama":
        assert small.get_submodule(name).bias is None
    else:
        shift = (small.get_submodule(name).bias - dense.get_submodule(name).bias).detach()
        torch.testing.assert_close(
            shift.double(), weight[:, gone].double() @ inputs.mean(0)[gone], rtol=1e-3, atol=1e-4
        )
    wanted = inputs @ weight.T.double()
    error = float((inputs[:, keep] @ new.T.double() + shift - wanted).square().sum() / wanted.square().sum())
    assert removal.relative_error == pytest.approx(error, rel=1e-3)
    assert not inspect_checkpoint(tmp_path / "run").violations


def test_the_rooms_speak_of_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    out = tmp_path / "run"
    flags = ["--structure", "mlp=25%", "--structure-multiple", "4", "--calibration", "python"]
    small = [*flags, "--samples", "4", "--seqlen", "32"]
    assert main(["prune", str(folder), "--out", str(out), *small, "--plan"]) == 0
    said = capsys.readouterr().out
    assert "structure: 36 of 48 MLP channels stay in every decoder layer" in said
    assert "removing structure" in said
    assert main(["prune", str(folder), "--out", str(out), *small, "--evaluate", "none"]) == 0
    said = capsys.readouterr().out
    assert "36 of 48 MLP channels" in said
    assert "operator weights are zero" not in said
    report = Report.model_validate_json((out / "report.json").read_text())
    assert report.recipe["sparsity"] == "0%"
    per_channel, layers = 3 * 32, 3
    dense_weights = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(folder).parameters())
    assert report.totals.model_weights == dense_weights - 12 * per_channel * layers
    matrices = sum(module.weight.numel() for module in linear(AutoModelForCausalLM.from_pretrained(folder)))
    assert report.totals.dense_flops_per_token == 2 * matrices  # the tied head is one of them
    assert report.totals.flops_per_token == 2 * (matrices - 12 * per_channel * layers)
    assert [(row.before, row.after) for layer in report.layers for row in layer.removals] == [(48, 36)] * 3
    card = (out / "model" / "README.md").read_text()
    assert "Every decoder layer keeps 36 of 48 MLP channels" in card
    assert "zeros" not in card.split("## How it was made")[0]
    page = (out / "report.html").read_text()
    assert "error on fresh windows" in page
    assert "FLOP a token" in page
    assert main(["inspect", str(out), "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "MLP channels: 48 -> 36 in 3 decoder layers" in said
    assert f"pruned by structure mlp=25% with obs+refit, {report.totals.model_weights:,} parameters" in said


def test_a_model_with_other_widths_than_its_record_is_found_out(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    fp.prune(str(folder), tmp_path / "run", **LESS)
    record = tmp_path / "run" / "model" / "fistapruner.json"
    content = json.loads(record.read_text())
    content["widths"][1]["after"] = 20
    record.write_text(json.dumps(content))
    found = inspect_checkpoint(tmp_path / "run")
    assert any(
        "model.layers.1: model.layers.1.mlp" in fault and "20 MLP channels" in fault for fault in found.violations
    )


@pytest.mark.parametrize(
    ("architecture", "remove", "sparsity"),
    [("llama", "mlp=36", "0%"), ("llama", "mlp=36", "50%"), ("mixtral", "experts=1", "0%")],
)
def test_the_smaller_model_is_timed_beside_the_dense_one(
    tmp_path: Path, architecture: str, remove: str, sparsity: str
) -> None:
    folder = tiny.save(architecture, tmp_path / "model")
    out = tmp_path / "run"
    fp.prune(str(folder), out, sparsity=sparsity, method="wanda", structure=remove, calibration=SMALL)
    found = fp.bench_run(out, prompt=4, tokens=3, runs=1, measure=in_this_process)
    names = [speed.variant for speed in found]
    assert names == ["dense float32", "dense bfloat16", "smaller float32", "smaller bfloat16"]
    card, page = (out / "model" / "README.md").read_text(), (out / "report.html").read_text()
    for text in (card, page.replace("<wbr>", "")):
        assert "Decoding, smaller float32, tokens/s" in text


@pytest.mark.parametrize(("architecture", "method"), [("llama", "obs"), ("gpt2", "obs"), ("opt", "flap")])
def test_what_is_only_selected_keeps_every_bit_where_passes_have_fewer(
    tmp_path: Path, architecture: str, method: str
) -> None:
    folder = tiny.save(architecture, tmp_path / "model", num_hidden_layers=1)
    structure = {"remove": "mlp=24", "method": method}
    report = fp.prune(folder, tmp_path / "run", structure=structure, dtype="bfloat16", calibration=SMALL)
    dense, small = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "run" / "model"))
    (layer,) = report.layers
    (removal,) = layer.removals
    *_, first = removal.producers
    write = [oriented(model.get_parameter(f"{layer.name}.{first}.weight"), architecture) for model in (dense, small)]
    keep = kept_rows(*write)
    fitted = [f"{removal.consumer}.weight"] if method == "obs" else []
    for name, after in small.get_submodule(layer.name).named_parameters():
        before = dense.get_parameter(f"{layer.name}.{name}")
        if after.shape != before.shape and name not in fitted:
            (dim,) = (dim for dim, size in enumerate(after.shape) if size == len(keep))
            assert torch.equal(after, before.index_select(dim, keep)), name


def test_a_recipe_without_its_structure_has_the_usual_sparsity_and_none_at_all_is_said(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model", num_hidden_layers=1)
    settings: dict[str, Any] = {"method": "magnitude", "calibration": SMALL}
    for recipe in ({"structure": "25%"}, Recipe(structure="25%")):
        told, out = tiny.Said(), tmp_path / type(recipe).__name__
        report = fp.prune(folder, out, recipe=recipe, structure="none", listener=told, **settings)
        assert report.recipe["sparsity"] == "50%"
        assert report.totals.operator_zeros == report.totals.operator_weights // 2
        assert not [line for line in told.sentences if "no weight" in line]
    told = tiny.Said()
    fp.prune(folder, tmp_path / "dense", sparsity="0%", listener=told, **settings)
    assert [line for line in told.sentences if line == "sparsity 0% and no structure: no weight becomes zero"]


def test_zeros_that_removing_channels_does_not_keep_are_said_before_and_in_the_report(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model", num_hidden_layers=2)
    settings: dict[str, Any] = {"calibration": {"source": "python", "samples": 2, "seqlen": 16}}
    fp.prune(folder, tmp_path / "zeros", method="magnitude", sparsity="2:4", **settings)
    pruned, told = tmp_path / "zeros" / "model", tiny.Said()
    report = fp.prune(pruned, tmp_path / "small", structure="mlp=16", listener=told, **settings)
    (warning,) = (line for line in report.warnings if "has zeros already" in line)
    assert "give a --sparsity too" in warning
    said = told.sentences.index(warning)
    assert said < next(number for number, line in enumerate(told.sentences) if line.startswith("calibration"))

    def warnings(model: Path, **more: Any) -> list[str]:
        asked = {"structure": "mlp=16", **settings, **more}
        return [line for line in plan_pruning(model, Recipe.build(asked)).says if "has zeros already" in line]

    assert warnings(pruned) == [warning]
    assert not warnings(pruned, sparsity="2:4")
    assert not warnings(folder)


@pytest.mark.parametrize(
    ("architecture", "structure", "layer", "same"),
    [("llama", "mlp=32", "mtp.layers.0.", "mlp.down_proj.weight"), ("mixtral", "experts=1", "model.layers.2.", "gate")],
)
def test_layers_that_the_model_does_not_read_go_with_their_widths(
    tmp_path: Path, architecture: str, structure: str, layer: str, same: str
) -> None:
    """Beside them another layer, with a matrix of the same name and another shape, stays; so do single tensors."""
    folder = tiny.save(architecture, tmp_path / "model", num_hidden_layers=2, num_nextn_predict_layers=1)
    file = folder / "model.safetensors"
    stored = load_file(file)
    inside = next(name.removeprefix("model.layers.0.") for name in stored if same in name)
    stale = {f"{layer}{inside}": stored[f"model.layers.0.{inside}"].clone(), f"{layer}norm.weight": torch.ones(32)}
    other = {f"vision.layers.0.{inside}": torch.ones(3, 5), "mtp.fc.weight": torch.ones(32, 64)}
    save_file(stored | stale | other, file, {"format": "pt"})
    told = tiny.Said()
    report = fp.prune(folder, tmp_path / "run", structure=structure, calibration=SMALL, listener=told)
    (warning,) = (line for line in report.warnings if "does not read" in line)
    assert all(name in warning for name in stale)
    assert warning in told.sentences
    assert warning in plan_pruning(folder, Recipe.build({"structure": structure, "calibration": SMALL})).says
    written = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert not set(stale) & set(written)
    assert set(other) <= set(written)
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    read = [tensor for name, tensor in written.items() if name not in other]
    assert report.totals.model_weights == sum(tensor.numel() for tensor in read)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--structure", "25%"], "25% leaves 0 of the 48 MLP channels, in multiples of 64"),
        (["--structure", "many"], "structure.remove: a share such as 25%"),
        (["--structure", "layers=1"], "unknown setting 'structure.remove.layers'"),
        (["--structure-method", "goa"], "method is goa, but nothing is removed: give --structure"),
        (["--structure", "experts=25%", "--structure-method", "goa"], "method is goa, but only experts are removed"),
        (["--structure", "25%", "--structure-steps", "60"], "steps is 60, but that is for --structure-method bypass"),
        (["--structure", "mlp=24", "--allocation", "error"], "it distributes zeros"),
        (["--structure", "mlp=30", "--sparsity", "2:4"], "model.layers.0.mlp.down_proj"),
        (["--structure", "mlp=32", "--sparsity", "16:32", "--allocation", "error"], "its 48 inputs are not a multiple"),
    ],
)
def test_bad_input_is_refused_before_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    arguments = ["--calibration", "python", "--samples", "2", "--seqlen", "16", *flags]
    assert main(["prune", str(folder), "--out", str(tmp_path / "run"), *arguments]) != 0
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "calibration.safetensors").exists()


def test_amounts_are_read_as_users_write_them() -> None:
    for written, text in (
        (0.25, "25%"),
        ("12.5%", "12.5%"),
        ("mlp=20%", "mlp=20%"),
        ({"mlp": 1024}, "mlp=1024"),
        ({"mlp": 0.2, "heads": 1}, "mlp=20%,heads=1"),
        ("experts=25%, heads=2", "heads=2,experts=25%"),
    ):
        settings = Structure.model_validate({"remove": written})
        assert settings.model_dump()["remove"] == str(settings.remove) == text
        assert Structure.model_validate(settings.model_dump()) == settings
    for nothing in (None, "", "none", {}):
        assert Structure.model_validate({"remove": nothing}) == Structure()
        assert str(Recipe.build({"structure": {"remove": nothing}}).sparsity) == "50%"
    assert str(Recipe.build({"structure": "25%"}).sparsity) == "0%"
    for wrong in ("100%", "0%", "-5%", "much", "mlp=0", "heads=0", "heads=20%", "25%,heads=1", True, 3):
        with pytest.raises(ValueError, match="is expected"):
            Structure.model_validate({"remove": wrong})


@pytest.mark.parametrize(
    ("remove", "method", "chosen"),
    [
        ("12.5%", "auto", "energy"),
        ("mlp=20%", "auto", "energy"),
        ("20.1%", "auto", "obs"),
        ("mlp=64", "auto", "obs"),
        ("mlp=10%,heads=1", "auto", "obs"),
        ("12.5%", "flap", "flap"),
        (None, "auto", "obs"),
    ],
)
def test_few_channels_are_chosen_by_energy(remove: str | None, method: str, chosen: str) -> None:
    recipe = Recipe.build({"structure": {"remove": remove, "method": method}}).resolved()
    assert recipe.structure.method == chosen
    assert recipe.resolved() == recipe == Recipe.build(recipe.model_dump(mode="json"))

"""A run that removes structure: the result is an ordinary smaller model, whose errors are those of the definition."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import TOKENS, assert_alike
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import fistapruner as fp
import tiny
from fistapruner.measure.inspection import inspect_checkpoint
from fistapruner.models.checkpoint import Checkpoint
from fistapruner.pruning.run import plan_pruning
from fistapruner.runs.directory import PruneDirectory
from fistapruner.runs.records import LayerEntry, load_run
from fistapruner.settings.prune import Recipe
from fistapruner.settings.structure import Structure

LESS: dict[str, Any] = {"structure": {"remove": "mlp=25%", "multiple": 4}}
TWO = {"num_hidden_layers": 2}

LOAD = """
import sys, json
sys.modules["fistapruner"] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
print(json.dumps(model(torch.tensor([[5, 6, 7, 8]])).logits[0, -1].tolist()))
"""


def oriented(weight: Tensor, architecture: str) -> Tensor:
    """(outputs, inputs) of a stored weight: GPT-2 stores the transpose."""
    return weight.T if architecture == "gpt2" else weight


def kept_rows(dense: Tensor, small: Tensor) -> Tensor:
    """Places of the rows of ``small`` in ``dense``, bit for bit."""
    same = (dense[None] == small[:, None]).all(2)
    assert (same.sum(1) >= 1).all()
    return same.float().argmax(1)


SOME = ("gpt2", "gpt_neox", "llama", "opt", "phi3")
"""Separate, fused and transposed operators, with and without biases; the others are slow tests."""


@pytest.mark.parametrize("architecture", tiny.quick_first(sorted(set(tiny.ARCHITECTURES) - {"bloom"}), SOME))
def test_the_result_computes_what_the_dense_model_with_zeroed_channels_does(tmp_path: Path, architecture: str) -> None:
    """What is only selected keeps every bit where passes have fewer; of OPT the operators that read, too."""
    flap, out = architecture == "opt", tmp_path / "run" / "model"
    structure = {**LESS["structure"], "method": "flap" if flap else "auto"}
    report = tiny.prune(tmp_path, architecture, TWO, structure=structure, dtype="bfloat16")
    small, dense = tiny.loaded(out), tiny.loaded(tmp_path / "model")
    assert report.totals.model_weights == small.num_parameters() < (report.model.parameters or 0)
    (*_, producer), consumer = tiny.MLP[architecture]
    inside = set()
    for layer in report.layers:
        (removal,) = layer.removals
        before, after = dense.get_submodule(layer.name), small.get_submodule(layer.name)
        rows = kept_rows(
            *(oriented(model.get_parameter(f"{producer}.weight"), architecture) for model in (before, after))
        )
        keep = rows
        if architecture == "phi3":  # gate and up are one tensor
            keep = rows[: len(rows) // 2]
            assert torch.equal(keep + 48, rows[len(keep) :])
        assert (removal.before, len(keep)) == report.widths["MLP channels"]
        assert removal.consumer == consumer
        fitted = {f"{consumer}.bias", *([] if flap else [f"{consumer}.weight"])}
        for name, tensor in after.named_parameters():
            whole = before.get_parameter(name)
            inside.add(f"{layer.name}.{name}")
            for dim in (dim for dim in range(tensor.ndim) if tensor.shape[dim] != whole.shape[dim]):
                whole = whole.index_select(dim, rows if len(rows) == tensor.shape[dim] else keep)
            assert name in fitted or torch.equal(tensor, whole), name
        with torch.no_grad():
            whole = oriented(before.get_parameter(f"{consumer}.weight"), architecture)
            whole.zero_()
            whole[:, keep] = oriented(after.get_parameter(f"{consumer}.weight"), architecture)
            if before.get_submodule(consumer).bias is not None:
                before.get_submodule(consumer).bias.copy_(after.get_submodule(consumer).bias)
    for name, tensor in dense.state_dict().items():
        assert name in inside or torch.equal(small.state_dict()[name], tensor), name
    assert_alike(small, dense)
    # It is an ordinary model: it can be trained and saved, and its config asks for no code but that of transformers.
    small(TOKENS, labels=TOKENS).loss.backward()
    small.save_pretrained(tmp_path / "again")
    assert Checkpoint.open(tmp_path / "again").nbytes == Checkpoint.open(out).nbytes == 4 * small.num_parameters()
    assert not {"auto_map", "quantization_config"} & json.loads((out / "config.json").read_text()).keys()


def test_the_result_loads_without_this_package(tmp_path: Path) -> None:
    tiny.prune(tmp_path, "llama", {"num_hidden_layers": 1}, **LESS)
    out = tmp_path / "run" / "model"
    run = subprocess.run([sys.executable, "-c", LOAD, str(out)], capture_output=True, text=True, check=True)
    model = tiny.loaded(out)
    expected = model(torch.tensor([[5, 6, 7, 8]])).logits[0, -1]
    torch.testing.assert_close(torch.tensor(json.loads(run.stdout.splitlines()[-1])), expected)


def definition(folder: Path, run: Path, layer: LayerEntry, name: str, *, rows: bool = False) -> tuple[Tensor, float]:
    """The outputs of an operator that stays, and their relative error by its definition, with whole models in memory.

    Its inputs are those in the smaller model, the outputs wanted those of the dense one; of a producer (``rows``) those
    of the rows that stay. An error of biases counts.
    """
    recipe = Recipe.build(load_run(run).recipe)
    tokens = PruneDirectory(run).tokens()
    dense, before, after = (tiny.loaded(folder) for _ in range(3))
    small = tiny.loaded(run / "model")
    transposed = small.config.model_type
    layers, _, _ = layer.name.rpartition(".")
    for index in range(layer.index if recipe.propagate == "pruned" else 0):
        for model in (before, after):
            model.get_submodule(layers)[index] = small.get_submodule(layers)[index]
    after.get_submodule(layers)[layer.index] = small.get_submodule(layer.name)
    full, share = f"{layer.name}.{name}", recipe.dense_share
    true, seen, own = (tiny.inputs_of(model, full, tokens) for model in (dense, before, after))
    weight, new = (
        oriented(model.get_parameter(f"{full}.weight").detach().double(), transposed) for model in (dense, small)
    )
    if rows:
        nearest = torch.nn.functional.normalize(new) @ torch.nn.functional.normalize(weight).T
        weight, change = weight[nearest.argmax(1)], torch.zeros(len(new)).double()
    else:
        biases = [model.get_submodule(full).bias for model in (small, dense)]
        change = torch.zeros(len(new)) if biases[0] is None else (biases[0] - biases[1]).detach().double()
    wanted, energy = (share * true + (1 - share) * seen) @ weight.T, (true if share else seen) @ weight.T
    outputs = own @ new.T + change
    return outputs, float((outputs - wanted).square().sum() / energy.square().sum())


ALONE: dict[str, Any] = {"propagate": "pruned", "dense_target": 1.0, "residual": "none"}


@pytest.mark.parametrize(
    ("architecture", "remove", "settings"),
    [
        ("llama", "mlp=25%", {"method": "proximal", "residual": "none"}),  # half the dense target
        ("llama", "mlp=25%", {"method": "wanda"}),  # the pruned target
        ("llama", "mlp=25%,heads=1", {**ALONE, "propagate": "dense", "sparsity": "0%"}),
        ("llama", "mlp=25%,heads=1", {**ALONE, "propagate": "dense", "sparsity": "2:4"}),
        ("opt", "mlp=25%", ALONE),
        ("gpt2", "mlp=25%", {**ALONE, "sparsity": "50%"}),
        *((each, "mlp=25%", {**ALONE, "structure": {"method": "flap"}}) for each in ("opt", "gpt2", "llama")),
    ],
)
def test_errors_are_those_of_the_definition(
    tmp_path: Path, architecture: str, remove: str, settings: dict[str, Any]
) -> None:
    """Heads go before channels, which are refitted without them; a bias is refitted, too; zeros come last.

    FLAP adds to the bias, where there is one.
    """
    folder, run = tmp_path / "model", tmp_path / "run"
    structure = {"remove": remove, "multiple": 4, **settings.get("structure", {})}
    report = tiny.prune(tmp_path, architecture, TWO, **{**settings, "structure": structure})
    assert not inspect_checkpoint(run).violations
    for layer in report.layers:
        assert len(layer.removals) == 1 + remove.count(",")
        for removal in layer.removals:
            if removal.method == "flap":
                assert removal.compensate == ("none" if architecture == "llama" else "bias")
            (entry,) = (operator for operator in layer.operators if operator.name == removal.consumer)
            _, error = definition(folder, run, layer, removal.consumer)
            assert entry.relative_error == pytest.approx(error, rel=1e-3)
            if settings.get("sparsity", "0%") == "0%":
                assert entry.relative_error == removal.relative_error <= removal.dropped_error


@pytest.mark.parametrize(
    ("architecture", "remove", "name"), [("opt", "mlp=50%", "fc1"), ("gpt2", "mlp=75%", "mlp.c_fc")]
)
def test_operators_that_lose_most_of_their_outputs_aim_at_the_dense_ones_that_stay(
    tmp_path: Path, architecture: str, remove: str, name: str
) -> None:
    """Alone in its group, with no more outputs than inputs afterwards."""
    structure = {"remove": remove, "multiple": 4}
    report = tiny.prune(tmp_path, architecture, TWO, structure=structure, **ALONE, sparsity="50%")
    for layer in report.layers:
        (entry,) = (operator for operator in layer.operators if operator.name == name)
        outputs, error = definition(tmp_path / "model", tmp_path / "run", layer, name, rows=True)
        assert outputs.shape[1] <= 32
        assert entry.relative_error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize(
    ("architecture", "amount"),
    [
        *(("llama", "heads=1"), ("qwen3", "mlp=25%,heads=1")),
        *(pytest.param(name, "mlp=25%,heads=1", marks=pytest.mark.slow) for name in ("llama", "qwen2", "gemma3")),
    ],
)
def test_key_value_groups_are_removed(tmp_path: Path, architecture: str, amount: str) -> None:
    """The result computes what the dense model with the group's columns zero does, also when it generates."""
    structure = {"remove": amount, **({"multiple": 4} if "%" in amount else {})}
    report = tiny.prune(tmp_path, architecture, TWO, structure=structure)
    small, dense = tiny.loaded(tmp_path / "run" / "model"), tiny.loaded(tmp_path / "model")
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
    assert_alike(small, dense)
    assert not inspect_checkpoint(tmp_path / "run").violations


@pytest.mark.parametrize("allocation", ["uniform", {"re:.": "0%", "re:self_attn": "50%"}], ids=str)
def test_structure_and_sparsity_in_one_run(tmp_path: Path, allocation: Any) -> None:
    """The share is exact over the smaller shapes."""
    report = tiny.prune(
        tmp_path, "llama", {**TWO, "dtype": torch.bfloat16}, **LESS, sparsity="50%", allocation=allocation
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    pruned = [module.weight for layer in model.model.layers for module in linear(layer)]
    zeros = sum(int((weight == 0).sum()) for weight in pruned)
    assert zeros == report.totals.operator_zeros
    if allocation == "uniform":
        assert abs(zeros - sum(weight.numel() for weight in pruned) / 2) <= len(pruned)
    assert len(report.layers[0].operators) == (7 if allocation == "uniform" else 5)
    assert {layer.mlp.down_proj.weight.shape[1] for layer in model.model.layers} == {36}
    assert not inspect_checkpoint(tmp_path / "run").violations


def linear(layer: Any) -> list[Any]:
    return [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]


def test_a_run_speaks_of_shapes(tmp_path: Path, cli: tiny.Cli) -> None:
    folder, out = tiny.save("llama", tmp_path / "model"), tmp_path / "run"
    flags = ["--structure", "mlp=25%", "--set", "structure.multiple=4", "--calibration", "python"]
    asked = ["prune", folder, "--out", out, *flags, "--samples", "4", "--seqlen", "32"]
    assert "36 of 48 MLP channels" in cli(*asked, "--plan").out
    said = cli(*asked, "--evaluate", "none").out
    assert "36 of 48 MLP channels" in said
    assert "operator weights are zero" not in said
    assert load_run(out).recipe["sparsity"] == "0%"
    assert "MLP channels: 48 -> 36 in 3 decoder layers" in cli("inspect", out, "--quiet").out


def test_a_model_with_other_widths_than_its_record_is_found_out(tmp_path: Path) -> None:
    tiny.prune(tmp_path, **LESS)
    record = tmp_path / "run" / "model" / "fistapruner.json"
    content = json.loads(record.read_text())
    content["widths"][1]["after"] = 20
    record.write_text(json.dumps(content))
    found = inspect_checkpoint(tmp_path / "run")
    assert any(
        "model.layers.1: model.layers.1.mlp" in fault and "20 MLP channels" in fault for fault in found.violations
    )


def test_a_run_that_prunes_nothing_says_so(tmp_path: Path) -> None:
    told = tiny.Said()
    tiny.prune(tmp_path, "llama", TWO, method="magnitude", sparsity="0%", listener=told)
    assert any("no weight becomes zero" in line for line in told.sentences)


def test_zeros_that_removing_channels_does_not_keep_are_said_before_and_in_the_report(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model", num_hidden_layers=2)
    settings: dict[str, Any] = {"calibration": {"source": "python", "samples": 2, "seqlen": 16}}
    fp.prune(folder, tmp_path / "zeros", method="magnitude", sparsity="2:4", **settings)
    pruned, told = tmp_path / "zeros" / "model", tiny.Said()
    report = fp.prune(pruned, tmp_path / "small", structure="mlp=16", listener=told, **settings)
    (warning,) = (line for line in report.warnings if "has zeros already" in line)
    said = told.sentences.index(warning)
    assert said < next(number for number, line in enumerate(told.sentences) if line.startswith("calibration"))
    for model, sparsity in ((pruned, "2:4"), (folder, "0%")):
        asked = Recipe.build({"structure": "mlp=16", "sparsity": sparsity, **settings})
        assert not [line for line in plan_pruning(model, asked).says if "has zeros already" in line]


def test_layers_that_the_model_does_not_read_go_with_their_widths(tmp_path: Path) -> None:
    """Beside them another layer, with a matrix of the same name and another shape, stays; so do single tensors."""
    folder = tiny.save("llama", tmp_path / "model", num_hidden_layers=2, num_nextn_predict_layers=1)
    structure, down, told = "mlp=32", "layers.0.mlp.down_proj.weight", tiny.Said()
    other = {f"vision.{down}": torch.ones(3, 5), "mtp.fc.weight": torch.ones(32, 64)}
    with tiny.edited(folder) as stored:
        stale = {f"mtp.{down}": stored[f"model.{down}"].clone(), "mtp.layers.0.norm.weight": torch.ones(32)}
        stored.update(stale | other)
    report = fp.prune(folder, tmp_path / "run", structure=structure, calibration=tiny.SMALL, listener=told)
    (warning,) = (line for line in report.warnings if "does not read" in line)
    assert all(name in warning for name in stale)
    assert warning in told.sentences
    assert warning in plan_pruning(folder, Recipe.build({"structure": structure, "calibration": tiny.SMALL})).says
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
        (["--structure", "mlp=30", "--sparsity", "2:4"], "model.layers.0.mlp.down_proj"),
        (["--structure", "mlp=32", "--sparsity", "16:32", "--set", "allocation=error"], "48 inputs are not a multiple"),
    ],
)
def test_bad_input_is_refused_before_work(tmp_path: Path, cli: tiny.Cli, flags: list[str], said: str) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    arguments = ["--calibration", "python", "--samples", "2", "--seqlen", "16", *flags]
    assert said in cli("prune", folder, "--out", tmp_path / "run", *arguments, status=2).err
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
        assert str(settings.remove) == text
        assert Structure.model_validate(settings.model_dump()) == settings
    for nothing in (None, "none", {}):
        assert Structure.model_validate({"remove": nothing}) == Structure()
        assert str(Recipe.build({"structure": {"remove": nothing}}).sparsity) == "50%"
    assert str(Recipe.build({"structure": "25%"}).sparsity) == "0%"
    for wrong in ("100%", "0%", "-5%", "much", "mlp=0", "heads=0", "heads=20%", "25%,heads=1", True, 3):
        with pytest.raises(ValueError, match=r"is expected|should be|not permitted"):
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
    ],
)
def test_few_channels_are_chosen_by_energy(remove: str, method: str, chosen: str) -> None:
    recipe = Recipe.build({"structure": {"remove": remove, "method": method}}).resolved()
    assert recipe.structure.method == chosen
    assert recipe.resolved() == recipe == Recipe.build(recipe.model_dump(mode="json"))

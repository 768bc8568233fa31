"""fistapruner inspect: exact patterns are found, true claims hold, false ones are caught."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fistapruner as fp
import tiny
from fistapruner import FistaPrunerError
from fistapruner.measure.inspection import exact_pattern, inspect_checkpoint
from fistapruner.models.checkpoint import Checkpoint
from fistapruner.models.layers import LayerwiseModel
from packed.pruned import save_pruned


def pruned(folder: Path, sparsity: str | None = None, architecture: str = "llama") -> Path:
    """Save a model whose operators are pruned by magnitude, with the record that a pruning run leaves."""
    save_pruned(folder, architecture, sparsity=sparsity or "0%", num_hidden_layers=2)
    claims = {
        name.removesuffix(".weight"): {
            "sparsity": sparsity,
            "zeros": int((weight == 0).sum()),
            "shape": list(weight.T.shape if architecture == "gpt2" else weight.shape),
        }
        for name, weight in load_file(folder / "model.safetensors").items()
        if weight.ndim == 2 and re.search(r"\.\d+\.", name)
    }
    if sparsity is not None:
        (folder / "fistapruner.json").write_text(json.dumps({"version": "1", "operators": claims}))
    return folder


@pytest.mark.parametrize(
    ("sparsity", "pattern", "shown"),
    [
        ("2:4", "2:4", "2:4"),
        ("1:4", "1:4", "1:4"),
        ("4:8", "4:8", "4:8"),
        ("50%", None, "50%"),
        ("0.416015625", None, "41.6016%"),
    ],
)
def test_true_claims_hold(tmp_path: Path, sparsity: str, pattern: str | None, shown: str, cli: tiny.Cli) -> None:
    folder = pruned(tmp_path / "model", sparsity)
    found = inspect_checkpoint(folder)
    assert len(found.operators) == 14
    assert {operator.pattern for operator in found.operators} == {pattern}
    assert found.violations == []
    assert found.weights == sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    printed = cli("inspect", folder).out
    assert [line.split()[-2:] for line in printed.splitlines() if line.startswith("model.")] == [[shown, "holds"]] * 14
    assert "every claim holds" in printed
    assert inspect_checkpoint(tmp_path).folder == folder  # a run directory


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("record", [False, True])
def test_masks_and_a_tied_head_are_no_parameters(tmp_path: Path, architecture: str, record: bool) -> None:
    """Old checkpoints store causal masks of GPT-2, and some a tied head beside its embedding."""
    folder = tiny.save(architecture, tmp_path / "model", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    zeros = sum(int((parameter == 0).sum()) for parameter in model.parameters())  # may be mapped from the file
    file = folder / "model.safetensors"
    stored = {name: tensor.clone() for name, tensor in load_file(file).items()}
    embedding = next(tensor for name, tensor in stored.items() if name.endswith(("embed_tokens.weight", "wte.weight")))
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8).tril()} if architecture == "gpt2" else {}
    save_file({**stored, **mask, "lm_head.weight": embedding.clone()}, file, {"format": "pt"})
    if record:
        name = next(name for name in stored if "mlp" in name and name.endswith("weight"))
        claims = {name: {"sparsity": "0%", "zeros": 0, "shape": list(stored[name].shape)}}
        (folder / "fistapruner.json").write_text(json.dumps({"version": "1", "operators": claims}))
    found, opened = inspect_checkpoint(folder), LayerwiseModel(Checkpoint.open(folder), torch.device("cpu"))
    assert found.weights == opened.parameter_count() == model.num_parameters()
    assert found.zeros == zeros
    save_file({**stored, "lm_head.weight": embedding + 1.0}, file, {"format": "pt"})  # so it is a parameter of its own
    assert inspect_checkpoint(folder).weights == model.num_parameters() + embedding.numel()


def test_a_single_weight_too_many_is_caught(tmp_path: Path, cli: tiny.Cli) -> None:
    for sparsity in ("2:4", "50%"):
        folder = pruned(tmp_path / sparsity.replace(":", ""), sparsity)
        tensors = load_file(folder / "model.safetensors")
        weight = tensors["model.layers.1.mlp.up_proj.weight"]
        weight[tuple((weight == 0).nonzero()[7])] = 1e-6
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        result = json.loads(cli("inspect", folder, "--json", status=1).out)
        assert not result["ok"]
        assert len(result["violations"]) == 1
        assert "model.layers.1.mlp.up_proj.weight" in result["violations"][0]
        assert "violated: model.layers.1.mlp.up_proj.weight" in cli("inspect", folder, "--quiet", status=1).out


def test_pattern_of_a_checkpoint_that_claims_nothing(tmp_path: Path, cli: tiny.Cli) -> None:
    folder = pruned(tmp_path / "dense")
    printed = cli("inspect", folder).out
    assert "pruned operators: 0 of 14" in printed
    assert f"no zeros were checked: {folder} has no fistapruner.json that claims any; copy that of" in printed
    cli("inspect", folder, "--pattern", "2:4", status=1)
    cli("inspect", folder, "--pattern", "0:4", status=2)
    half = pruned(tmp_path / "pruned", "2:4")
    (half / "fistapruner.json").unlink()
    for pattern in ("2:4", "50%", "3:4", "4:8", "1:4", "51%"):
        cli("inspect", half, "--pattern", pattern, status=int(pattern in ("1:4", "51%")))


def test_transposed_operators_are_read_along_their_inputs(tmp_path: Path) -> None:
    folder = pruned(tmp_path / "gpt2", "2:4", "gpt2")
    found = inspect_checkpoint(folder)
    assert found.violations == []
    assert {operator.pattern for operator in found.pruned} == {"2:4"}
    for _ in range(2):  # the second time without a record, which tells the shapes
        asked = inspect_checkpoint(folder, "2:4")
        assert asked.violations == []
        assert {operator.claim for operator in asked.operators} == {"2:4"}
        assert {operator.pattern for operator in inspect_checkpoint(folder).pruned} == {"2:4"}
        (folder / "fistapruner.json").unlink(missing_ok=True)
    tensors = load_file(folder / "model.safetensors")
    weight = tensors["transformer.h.1.attn.c_proj.weight"]  # square: only the model's code tells its inputs
    weight.copy_(weight.T.clone())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert [fault.split(":")[0] for fault in inspect_checkpoint(folder, "2:4").violations] == [
        "transformer.h.1.attn.c_proj.weight"
    ]


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss", "granitemoe"])
def test_a_pattern_is_asked_of_every_expert(tmp_path: Path, architecture: str, original: bool) -> None:
    """Also where one tensor holds the matrices of all experts, in either order of its dimensions."""
    run, folder = tmp_path / "run", tmp_path / "run" / "model"
    tiny.save(architecture, tmp_path / "dense", original=original)
    settings: dict[str, Any] = {"source": "python", "samples": 2, "seqlen": 16}
    report = fp.prune(tmp_path / "dense", run, method="magnitude", sparsity="2:4", calibration=settings)
    names = {f"{layer.name}.{operator.name}" for layer in report.layers for operator in layer.operators}
    claims = json.loads((folder / "fistapruner.json").read_text())["operators"]
    for _ in range(2):  # with its record, and without
        found = inspect_checkpoint(folder, "2:4")
        assert found.violations == []
        claimed = {operator.name for operator in found.operators if operator.claim is not None}
        assert claimed == claims.keys()
        assert len(claimed) == len(names)
        (folder / "fistapruner.json").unlink(missing_ok=True)
    assert {operator.pattern for operator in inspect_checkpoint(folder).pruned} == {"2:4"}
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in reversed(claims) if "expert" in name or "linear" in name)
    stored, _, number = name.rstrip("]").partition("[")
    weight = tensors[stored][int(number)] if number else tensors[stored]
    weight[weight == 0] = 1.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert [fault.split(": ")[0] for fault in inspect_checkpoint(folder, "2:4").violations] == [name]


def test_a_pattern_is_not_asked_of_the_routers_of_a_packed_model(tmp_path: Path) -> None:
    tiny.save("qwen3_moe", tmp_path / "dense", original=True, dtype=torch.bfloat16)
    settings: dict[str, Any] = {"source": "python", "samples": 2, "seqlen": 16}
    fp.prune(tmp_path / "dense", tmp_path / "run", method="magnitude", sparsity="2:4", calibration=settings)
    fp.pack(tmp_path / "run" / "model", tmp_path / "packed")
    asked, dense = (inspect_checkpoint(tmp_path / name, "2:4") for name in ("packed", "run"))
    assert asked.violations == []
    claims = [{operator.name: operator.claim for operator in found.operators} for found in (asked, dense)]
    assert claims[0] == claims[1]
    assert any(name.endswith("mlp.gate.weight") and claim is None for name, claim in claims[0].items())
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    del config["quantization_config"]  # for transformers alone
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    assert inspect_checkpoint(tmp_path / "packed", "2:4") == asked


def test_a_pattern_is_not_asked_of_a_model_that_cannot_be_built(tmp_path: Path) -> None:
    folder = tiny.save("gpt_oss", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    with pytest.raises(FistaPrunerError, match=r"config\.json does not tell which tensors are to be 2:4"):
        inspect_checkpoint(folder, "2:4")
    assert not inspect_checkpoint(folder).violations


def test_claims_about_absent_operators_and_damaged_weights(tmp_path: Path) -> None:
    folder = pruned(tmp_path / "model", "2:4")
    record = json.loads((folder / "fistapruner.json").read_text())
    record["operators"]["model.layers.9.mlp.up_proj"] = {"sparsity": "2:4"}
    record["operators"]["model.layers.0.mlp.up_proj"] = {"sparsity": "nonsense"}
    (folder / "fistapruner.json").write_text(json.dumps(record))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = torch.nan
    tensors["model.embed_tokens.weight"][5, 3] = torch.inf  # no matrix of a decoder layer
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    violations = "\n".join(inspect_checkpoint(folder).violations)
    assert "model.layers.9.mlp.up_proj: 2:4 is claimed, but the checkpoint has no such operator" in violations
    assert "its claim cannot be read" in violations
    assert "down_proj.weight: has NaN" in violations
    assert "embed_tokens.weight: has NaN or infinite weights" in violations
    (folder / "fistapruner.json").write_text('{"operators": [1]}')
    with pytest.raises(FistaPrunerError, match="no mapping of operators"):
        inspect_checkpoint(folder)


def test_a_run_without_a_finished_checkpoint_is_said_to_go_on_with(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(FistaPrunerError, match="has no finished checkpoint: go on with 'fistapruner resume"):
        inspect_checkpoint(tmp_path)


def test_a_gguf_file_is_inspected_as_it_is_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: tiny.Cli
) -> None:
    pytest.importorskip("gguf", reason="needs the extra 'gguf'")
    from tiny_gguf import write_gguf

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = write_gguf(tmp_path / "tiny.gguf", kind="F16")
    found = json.loads(cli("inspect", tmp_path / "tiny.gguf", "--json").out)
    assert len(found["operators"]) == 14
    assert found["model"]["weights"] == sum(parameter.numel() for parameter in model.parameters())
    cli("inspect", tmp_path / "tiny.gguf", "--pattern", "2:4", "--quiet", status=1)
    (tmp_path / "model.bin").touch()
    with pytest.raises(FistaPrunerError, match="neither a folder"):
        inspect_checkpoint(tmp_path / "model.bin")


@pytest.mark.parametrize(("removed", "found"), [(0, "2:4"), (19, "2:4"), (21, None)])
def test_a_pattern_that_keeps_more_than_5_percent_too_many_is_none(removed: int, found: str | None) -> None:
    """Of 400 weights, 200 are kept in groups of four, and so in groups of eight and 16; then some go."""
    weight = torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(100)
    weight[8 : 8 + 4 * removed : 4] = 0
    pattern = exact_pattern(weight.view(5, 80), 200 + removed)
    assert found == (None if pattern is None else str(pattern))
    assert exact_pattern(torch.zeros(4, 16), 64) is None


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bit_floats_are_counted(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = pruned(tmp_path / "m", "2:4")
    state = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(state | {name: state[name].to(dtype)}, folder / "model.safetensors", {"format": "pt"})
    found = next(operator for operator in inspect_checkpoint(folder).operators if operator.name == name)
    assert (found.pattern, found.fault) == ("2:4", None)

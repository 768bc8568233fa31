"""An adapter of another library is merged into a pruned checkpoint: the zeros stay, the report says what it cost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import fistapruner as fp
import tiny
from fistapruner.cli import main
from fistapruner.core import parse_sparsity
from fistapruner.errors import FistaPrunerError
from fistapruner.evaluation.inspection import inspect_checkpoint
from fistapruner.models.files.checkpoint import Checkpoint

OPERATORS = {
    "llama": ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"),
    "gpt2": ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"),
    "opt": ("model.decoder.layers.0.self_attn.q_proj", "model.decoder.layers.1.fc2"),
}
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def pruned(
    folder: Path, architecture: str = "llama", sparsity: str = "50%", dtype: torch.dtype = torch.bfloat16
) -> Any:
    """A pruned model, saved; its first operator is dense."""
    model = tiny.build(architecture).to(dtype)
    first = OPERATORS[architecture][0]
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in ("Linear", "Conv1D") and any(part.isdigit() for part in name.split(".")) and name != first:
            weight = module.weight.data.T if kind == "Conv1D" else module.weight.data
            weight *= parse_sparsity(sparsity).project(weight.float().abs())
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return model


def adapter(folder: Path, model: Any, kind: str, names: tuple[str, ...], **config: Any) -> dict[str, dict[str, Tensor]]:
    """Save an adapter of some operators of a model; returns its tensors by operator and part."""
    made: dict[str, dict[str, Tensor]] = {}
    files = {}
    for seed, name in enumerate(names):
        weight = model.get_submodule(name).weight
        rows, columns = weight.shape[::-1] if type(model.get_submodule(name)).__name__ == "Conv1D" else weight.shape
        if kind == "IA3":
            made[name] = {"l": 1 + draw(*((rows, 1) if seed == 0 else (1, columns)), seed=seed)}
        else:
            made[name] = {"A": draw(2, columns, seed=seed), "B": draw(rows, 2, seed=seed + 10)}
        end = ".weight" if kind == "LORA" else ""
        prefix = "" if kind == "IA3" else kind.lower() + "_"
        for part, tensor in made[name].items():
            files[f"base_model.model.{name}.{'ia3_l' if kind == 'IA3' else prefix + part}{end}"] = tensor
    folder.mkdir()
    save_file(files, folder / "adapter_model.safetensors")
    basic = {"LORA": LORA, "HIRA": {"peft_type": "HIRA", "r": 2}, "IA3": {"peft_type": "IA3"}}[kind]
    (folder / "adapter_config.json").write_text(json.dumps({**basic, **config}))
    return made


def expected(weight: Tensor, kind: str, parts: dict[str, Tensor]) -> Tensor:
    """The unmasked effective weight (m, n) in fp32."""
    weight = weight.float()
    if kind == "IA3":
        return weight * parts["l"]
    return weight + 2 * parts["B"] @ parts["A"] if kind == "LORA" else weight * (1 + parts["B"] @ parts["A"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["LORA", "HIRA", "IA3"])
@pytest.mark.parametrize("architecture", OPERATORS)
def test_merged_weights_are_masked_and_rounded_once(
    architecture: str, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = pruned(tmp_path / "model", architecture, dtype=dtype)
    dense, sparse = OPERATORS[architecture]
    made = adapter(tmp_path / "adapter", model, kind, (dense, sparse))
    report = fp.merge_adapter(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    before, after = Checkpoint.open(tmp_path / "model"), Checkpoint.open(tmp_path / "out")
    merged = {}
    for name, parts in made.items():
        stored = next(tensor for tensor in before.names() if name.endswith(tensor.removesuffix(".weight")))
        old, new = before.read(stored), after.read(stored)
        merged[stored] = name
        transposed = architecture == "gpt2"
        filled = expected(old.T if transposed else old, kind, parts)
        filled = (filled.T if transposed else filled).to(dtype)
        if name == sparse:
            assert torch.equal(new == 0, old == 0)
            assert not new[new == 0].signbit().any()
            filled = torch.where(old == 0, 0.0, filled.float()).to(dtype)
        assert torch.allclose(new.float(), filled.float(), rtol=0.01 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
        assert not torch.equal(new, old)
    bias = dense.removeprefix("transformer.") + ".bias"
    for name in before.names():
        if name in merged:
            continue
        if kind == "IA3" and name in (bias, dense + ".bias"):
            factor = made[dense]["l"][:, 0]
            assert torch.equal(after.read(name), (before.read(name).float() * factor).to(dtype))
        else:
            assert torch.equal(after.read(name), before.read(name)), name
    by_name = {operator.name: operator for operator in report.operators}
    assert by_name[dense].zeros == by_name[dense].masked == 0
    found = by_name[sparse]
    assert found.zeros == found.weights // 2
    assert report.densification == (1.0 if kind == "LORA" else 0.0)
    assert (0.3 < found.masked / found.change < 0.7) == (kind == "LORA")
    assert "all kept" in str(report)


def test_the_report_counts_what_the_mask_took(tmp_path: Path) -> None:
    model = pruned(tmp_path / "model", dtype=torch.float32)
    name = OPERATORS["llama"][1]
    parts = adapter(tmp_path / "adapter", model, "LORA", (name,))[name]
    weight = model.get_submodule(name).weight.detach()
    parts["B"][3] = 0.0  # row 3 of the operator stays as it is: its zeros would not be filled
    save_file(
        {f"base_model.model.{name}.lora_{part}.weight": tensor for part, tensor in parts.items()},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    report = fp.merge_adapter(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    change = 2 * parts["B"] @ parts["A"]
    zero = weight == 0
    rest = torch.ones(len(weight), dtype=torch.bool)
    rest[3] = False
    assert report.densification == pytest.approx(float(zero[rest].sum() / zero.sum()))
    assert report.masked_share == pytest.approx(float((change * zero).square().sum() / change.square().sum()), rel=1e-4)
    assert f"fills {report.densification * 100:.3g}" in str(report)


def of_experts(folder: Path, model: Any, layer: int, rank: int, **config: Any) -> dict[str, Tensor]:
    """Save an adapter of all experts of a decoder layer as PEFT does; returns the changes (experts, …) by tensor."""
    experts = model.model.layers[layer].mlp.experts
    files, changes = {}, {}
    # PEFT wraps the module once for each parameter; the last one is outside.
    for place, (name, wrapped) in enumerate((("down_proj", ""), ("gate_up_proj", ".base_layer"))):
        shape = getattr(experts, name).shape
        count, columns, rows = shape if experts.is_transposed else (shape[0], *shape[:0:-1])
        turned = config.get("peft_version") == ("0.19.0" if experts.is_transposed else "0.18.1")
        if turned:
            rows, columns = columns, rows
        a, b = draw(rank * count, columns, seed=place), draw(rows, rank * count, seed=place + 10)
        key = f"base_model.model.model.layers.{layer}.mlp.experts{wrapped}"
        files |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        change = torch.einsum("ore,eri->eoi", b.view(rows, rank, count), a.view(count, rank, columns))
        changes[name] = change.transpose(1, 2) if experts.is_transposed != turned else change
    folder.mkdir()
    save_file(files, folder / "adapter_model.safetensors")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": [], "target_parameters": targets}
    settings["peft_version"] = "0.19.1"
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    return changes


@pytest.mark.parametrize("version", ["0.19.1", "before"])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_an_adapter_of_experts_is_masked(architecture: str, version: str, tmp_path: Path) -> None:
    """Whether the files have the experts' matrices one by one or in one tensor, and whatever PEFT took for inputs."""
    if version == "before":
        version = "0.19.0" if architecture == "gpt_oss" else "0.18.1"
    dense, calibration = tiny.save(architecture, tmp_path / "dense"), {"samples": 2, "seqlen": 16}
    fp.prune(dense, tmp_path / "run", method="wanda", sparsity="50%", calibration=calibration)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    changes = of_experts(tmp_path / "adapter", before, 1, rank=3, peft_version=version)
    report = fp.merge_adapter(tmp_path / "run", tmp_path / "adapter", tmp_path / "out")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    zeros = weights = 0
    for name, weight in before.named_parameters():
        part = name.rpartition(".")[2]
        wanted = weight.detach()
        if "layers.1.mlp.experts" in name and part in changes:
            wanted = (wanted + 4 / 3 * changes[part]) * (wanted != 0)
            zeros, weights = zeros + int((wanted == 0).sum()), weights + wanted.numel()
            assert torch.equal(after.get_parameter(name) == 0, weight == 0)
        torch.testing.assert_close(after.get_parameter(name).detach(), wanted, rtol=1e-5, atol=1e-6)
    parts = 2 if architecture == "gpt_oss" else 3
    assert len(report.operators) == 4 * parts
    assert {operator.rank for operator in report.operators} == {3}
    assert (report.zeros, sum(operator.weights for operator in report.operators)) == (zeros, weights)
    assert report.zeros == weights // 2
    assert report.densification > 0.99
    assert "model.layers.1.mlp.experts.3.down_proj" in {operator.name for operator in report.operators}
    assert not inspect_checkpoint(tmp_path / "out").violations


def test_adapters_of_experts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = tiny.save("qwen3_moe", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    other = tiny.build("qwen3_moe", moe_intermediate_size=24)
    for name, made, config, said in (
        ("sizes", other, {}, r"A \[8, 32\], B \[48, 8\], but the tensors of its experts have 32 outputs and 32 inputs"),
        ("version", other, {}, r"32 inputs or 32 outputs and 16 inputs \(peft_version is '0\.19\.1'\): the adapter"),
        ("square", model, {"peft_version": None}, r"experts\.base_layer fits the matrices .* config, '', does not"),
        ("unsure", model, {"peft_version": "0.19.1.dev0@a1b2"}, r"'0\.19\.1\.dev0@a1b2', does not tell which"),
        ("rank", model, {"r": 4}, r"experts\.base_layer has rank 2, but .* says 4"),
        ("patterns", model, {"rank_pattern": {"experts": 2}}, "without rank_pattern and alpha_pattern"),
        ("kind", model, {"peft_type": "HIRA"}, "target_parameters is understood for LoRA"),
    ):
        of_experts(tmp_path / name, made, 0, rank=2, **config)
        with pytest.raises(FistaPrunerError, match=said):
            fp.merge_adapter(folder, tmp_path / name, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_survivor_that_becomes_zero_keeps_its_value(tmp_path: Path) -> None:
    model = pruned(tmp_path / "model")
    name = OPERATORS["llama"][1]
    adapter(tmp_path / "adapter", model, "IA3", (name,))
    rows = model.get_submodule(name).weight.shape[0]
    factor = torch.ones(rows, 1)
    factor[2] = 0.0
    save_file({f"{name}.ia3_l": factor}, tmp_path / "adapter" / "adapter_model.safetensors")
    report = fp.merge_adapter(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    old, new = (Checkpoint.open(tmp_path / folder).read(f"{name}.weight") for folder in ("model", "out"))
    assert torch.equal(old, new)
    assert report.operators[0].restored == int((old[2] != 0).sum()) > 0
    assert "surviving weights that the adapter makes 0 keep their values" in str(report)


def test_an_operator_that_is_not_pruned_may_lose_weights_to_the_adapter(tmp_path: Path) -> None:
    model = pruned(tmp_path / "model")
    name = OPERATORS["llama"][0]
    adapter(tmp_path / "adapter", model, "IA3", (name,))
    factor = torch.ones(model.get_submodule(name).weight.shape[0], 1)
    factor[2] = 0.0
    save_file({f"{name}.ia3_l": factor}, tmp_path / "adapter" / "adapter_model.safetensors")
    report = fp.merge_adapter(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    old, new = (Checkpoint.open(tmp_path / folder).read(f"{name}.weight") for folder in ("model", "out"))
    assert torch.equal(new, old * factor.to(old.dtype))
    assert report.operators[0].restored == 0


def test_the_command_prints_json_and_refuses_flags_without_effect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter(tmp_path / "adapter", pruned(tmp_path / "pruned"), "LORA", OPERATORS["llama"])
    command = [
        "recover",
        str(tmp_path / "pruned"),
        "--merge",
        str(tmp_path / "adapter"),
        "--out",
        str(tmp_path / "out"),
    ]
    flags = ("--tokens 1k", "--data c4", "--dense model", "--evaluate python", "--device cpu", "--recipe spp")
    for flag, value in (words.split() for words in flags):
        assert main([*command, flag, value]) == 2
        assert f"fistapruner: {flag}: --merge trains and evaluates nothing" in capsys.readouterr().err
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["out"]) == ("LORA", str(tmp_path / "out"))
    assert len(found["operators"]) == 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished 2:4 run with reordered channels."""
    folder = tmp_path_factory.mktemp("merge")
    dense = tiny.save("llama", folder / "dense", num_hidden_layers=2)
    fp.prune(
        dense,
        folder / "run",
        method="wanda",
        sparsity="2:4",
        permutation="channels",
        calibration={"source": "python", "samples": 2, "seqlen": 16},
    )
    return folder / "run"


def test_a_damaged_model_of_a_run_is_refused(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "model" / "model.safetensors").write_bytes(b"")
    with pytest.raises(FistaPrunerError, match="make the checkpoint again with 'fistapruner resume"):
        fp.merge_adapter(copy, tmp_path / "adapter", tmp_path / "out")


def test_claims_and_lineage_go_on(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(run / "model")
    names = tuple(f"model.layers.{index}.self_attn.{name}" for index in (0, 1) for name in ("q_proj", "k_proj"))
    adapter(tmp_path / "adapter", model, "LORA", names)
    monkeypatch.chdir(tmp_path / "adapter")
    report = fp.merge_adapter(run, ".", tmp_path / "out", command="the command")
    assert len(report.operators) == 4
    found = inspect_checkpoint(tmp_path / "out")
    assert not found.violations
    assert {operator.pattern for operator in found.pruned} == {"2:4"}
    assert len(found.pruned) == 14
    assert found.lineage is not None
    assert [stage.kind for stage in found.lineage.stages] == ["prune", "merge"]
    assert found.lineage.stages[1].settings["adapter"] == "adapter"
    assert "merged the LoRA adapter adapter into model, its" in (tmp_path / "out" / "README.md").read_text()
    assert found.lineage.stages[1].command == "the command"
    record = json.loads((run / "model" / "fistapruner.json").read_text())
    assert json.loads((tmp_path / "out" / "fistapruner.json").read_text())["operators"] == record["operators"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with fp.hold_mask(loaded) as held:
        assert len(held.operators) == 14
    assert "A pruned model with a merged adapter" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "name", ["mlp.down_proj", "mlp.up_proj", "mlp.gate_proj", "self_attn.v_proj", "self_attn.o_proj"]
)
def test_adapters_of_another_order_of_channels_are_refused(run: Path, name: str, tmp_path: Path) -> None:
    """Both sides of reordered channels: who reads them, and who writes them."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(run / "model")
    operator = f"model.layers.0.{name}"
    for place, base in enumerate((None, str(run.parent / "dense"), str(run / "model"))):
        folder = tmp_path / f"adapter{place}"
        adapter(folder, model, "LORA", (operator,), base_model_name_or_path=base)
        if base == str(run / "model"):  # it was trained on the pruned model itself
            fp.merge_adapter(run, folder, tmp_path / "out")
        else:
            with pytest.raises(FistaPrunerError, match=rf"{operator}: its channels were reordered .* trained on"):
                fp.merge_adapter(run, folder, tmp_path / "out")


def test_the_order_of_channels_is_remembered_by_the_next_run(run: Path, tmp_path: Path) -> None:
    first = json.loads((run / "model" / "fistapruner.json").read_text())["permuted"]
    assert "model.layers.0.mlp.down_proj.weight" in first
    assert "model.layers.0.mlp.up_proj.weight" in first
    assert "model.layers.0.self_attn.q_proj.weight" not in first
    calibration = {"source": "python", "samples": 2, "seqlen": 16}
    fp.prune(run / "model", tmp_path / "again", method="magnitude", sparsity="60%", calibration=calibration)
    assert json.loads((tmp_path / "again" / "model" / "fistapruner.json").read_text())["permuted"] == first


@pytest.mark.parametrize(
    ("architecture", "prefix", "name"),
    [
        ("llama", "base_model.model.", "layers.1.mlp.down_proj"),
        ("gpt2", "", "h.1.mlp.c_proj"),
    ],
)
def test_names_of_a_model_with_another_prefix_are_found(
    architecture: str, prefix: str, name: str, tmp_path: Path
) -> None:
    model = pruned(tmp_path / "model", architecture)
    operator = OPERATORS[architecture][1]
    parts = adapter(tmp_path / "adapter", model, "LORA", (operator,))[operator]
    files = {f"{prefix}{name}.lora_{part}.weight": tensor for part, tensor in parts.items()}
    save_file(files, tmp_path / "adapter" / "adapter_model.safetensors")
    report = fp.merge_adapter(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    assert [operator.name for operator in report.operators] == [operator]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("lm_head",), "changes lm_head, which is no operator of a decoder layer"),
        (("model.embed_tokens",), "changes model.embed_tokens"),
    ],
)
def test_only_operators_of_decoder_layers_are_changed(names: tuple[str, ...], said: str, tmp_path: Path) -> None:
    model = pruned(tmp_path / "model")
    adapter(tmp_path / "adapter", model, "LORA", names)
    with pytest.raises(FistaPrunerError, match=said):
        fp.merge_adapter(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mistakes_are_named_before_any_work(tmp_path: Path) -> None:
    model = pruned(tmp_path / "model")
    name = OPERATORS["llama"][1]
    adapter(tmp_path / "adapter", model, "LORA", (name,))
    wide = tiny.build("llama", intermediate_size=64)
    adapter(tmp_path / "wide", wide, "LORA", (name,))
    with pytest.raises(
        FistaPrunerError, match=r"down_proj has A \[2, 64\], .* 32 outputs and 48 inputs: the adapter belongs"
    ):
        fp.merge_adapter(tmp_path / "model", tmp_path / "wide", tmp_path / "out")
    with pytest.raises(FistaPrunerError, match=r"no adapter_config\.json"):
        fp.merge_adapter(tmp_path / "model", tmp_path / "model", tmp_path / "out")
    with pytest.raises(FistaPrunerError, match="exists already"):
        fp.merge_adapter(tmp_path / "model", tmp_path / "adapter", tmp_path / "wide")
    fp.pack(tmp_path / "model", tmp_path / "packed", values="bf16")
    with pytest.raises(FistaPrunerError, match="fistapruner unpack"):
        fp.merge_adapter(tmp_path / "packed", tmp_path / "adapter", tmp_path / "out")
    claims = {f"{name}.weight": {"operator": name, "sparsity": "90%", "zeros": 1400, "shape": [32, 48]}}
    (tmp_path / "model" / "fistapruner.json").write_text(json.dumps({"operators": claims}))
    with pytest.raises(FistaPrunerError, match=r"has 768 zeros, fistapruner\.json claims 1400"):
        fp.merge_adapter(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    (tmp_path / "model" / "fistapruner.json").write_text(json.dumps({"operators": {"gone": {}}}))
    with pytest.raises(FistaPrunerError, match="has no such operator"):
        fp.merge_adapter(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_change_that_the_checkpoint_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = pruned(tmp_path / "model", dtype=torch.float16)
    name = OPERATORS["llama"][1]
    adapter(tmp_path / "adapter", model, "LORA", (name,), lora_alpha=10**8)
    with pytest.raises(FistaPrunerError, match=r"values that torch\.float16 cannot hold"):
        fp.merge_adapter(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "adapter"}


@pytest.mark.parametrize(
    "name", ["mlp.down_proj", "vision_tower.model.layers.1.mlp.down_proj", "model.layers.9.mlp.down_proj"]
)
def test_names_that_are_no_or_several_operators_are_refused(name: str, tmp_path: Path) -> None:
    model = pruned(tmp_path / "model")
    parts = adapter(tmp_path / "adapter", model, "LORA", (OPERATORS["llama"][1],))[OPERATORS["llama"][1]]
    files = {f"{name}.lora_{part}.weight": tensor for part, tensor in parts.items()}
    save_file(files, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(FistaPrunerError, match=rf"changes {name}, which is no operator of a decoder layer"):
        fp.merge_adapter(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")

"""Adapters of the installed PEFT library are merged as it merges them, but masked; ours load in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fistapruner.tuning.forms import Spp
from torch import Tensor

import fistapruner as fp
import tiny
from fistapruner.core import parse_sparsity
from fistapruner.errors import FistaPrunerError
from fistapruner.training.adapters import write_hira_adapter

peft = pytest.importorskip("peft", minversion="0.21")
pytestmark = pytest.mark.filterwarnings("ignore")

FF = {"llama": ["down_proj"], "gpt2": ["mlp.c_proj"]}
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}


def tokens() -> Tensor:
    return torch.randint(0, tiny.VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))


def linears(model: Any) -> dict[str, Any]:
    """The operators of the decoder layers."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and any(part.isdigit() for part in name.split("."))
    }


def pruned(folder: Path, architecture: str, sparsity: str = "50%", dtype: torch.dtype = torch.float32) -> Any:
    model = tiny.build(architecture, **({"n_layer": 2} if architecture == "gpt2" else {"num_hidden_layers": 2}))
    for module in linears(model).values():
        weight = module.weight.data.T if type(module).__name__ == "Conv1D" else module.weight.data
        weight *= parse_sparsity(sparsity).project(weight.abs())
    model.to(dtype).save_pretrained(folder)
    return load(folder)


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def trained(model: Any, config: Any, folder: Path, steps: int = 5) -> Any:
    """Train an adapter with AdamW, save it and return the wrapped model."""
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        wrapped(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    wrapped.save_pretrained(folder)
    return wrapped.eval()


def config(kind: str, architecture: str, **settings: Any) -> Any:
    targets = TARGETS[architecture]
    if kind == "ia3":
        return peft.IA3Config(target_modules=targets, feedforward_modules=FF[architecture], **settings)
    return {"lora": peft.LoraConfig, "hira": peft.HiraConfig}[kind](target_modules=targets, r=4, **settings)


@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("kind", ["lora", "hira", "ia3"])
def test_a_trained_adapter_is_merged_as_peft_does_and_masked(
    kind: str, architecture: str, sparsity: str, tmp_path: Path
) -> None:
    model = pruned(tmp_path / "model", architecture, sparsity)
    masks = {name: module.weight.detach() != 0 for name, module in linears(model).items()}
    merged = linears(trained(model, config(kind, architecture), tmp_path / "adapter").merge_and_unload())
    report = fp.merge_adapter(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    ours = linears(load(tmp_path / "out"))
    zeros = filled = 0
    for name, mask in masks.items():
        theirs = merged[name].weight.detach()
        assert torch.allclose(ours[name].weight, theirs * mask, atol=1e-5), name
        assert torch.equal(ours[name].weight != 0, mask), name
        if ours[name].bias is not None:
            assert torch.allclose(ours[name].bias, merged[name].bias, atol=1e-6)
        if any(name.endswith(target) for target in TARGETS[architecture]):
            zeros += int((~mask).sum())
            filled += int((theirs[~mask] != 0).sum())
    assert report.zeros == zeros
    assert report.densification == filled / zeros
    assert report.densification > 0.99 if kind == "lora" else report.densification == 0


@pytest.mark.parametrize("architecture", TARGETS)
def test_ranks_and_factors_by_operator(architecture: str, tmp_path: Path) -> None:
    model = pruned(tmp_path / "model", architecture)
    masks = {name: module.weight.detach() != 0 for name, module in linears(model).items()}
    first, second = TARGETS[architecture]
    settings = {
        "rank_pattern": {first: 2, rf"1\..*{second}": 3},
        "alpha_pattern": {second: 5.5},
        "use_rslora": True,
        "init_lora_weights": False,
    }
    merged = linears(trained(model, config("lora", architecture, **settings), tmp_path / "a").merge_and_unload())
    fp.merge_adapter(tmp_path / "model", tmp_path / "a", tmp_path / "out")
    for name, module in linears(load(tmp_path / "out")).items():
        assert torch.allclose(module.weight, merged[name].weight * masks[name], atol=1e-5), name


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
    ],
)
def test_what_cannot_be_merged_is_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = pruned(tmp_path / "model", "llama")
    trained(model, config("lora", "llama", **settings), tmp_path / "adapter", steps=0)
    with pytest.raises(FistaPrunerError, match=said):
        fp.merge_adapter(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("form", ["hira", "spp"])
def test_an_exported_adapter_loads_in_peft_and_gives_the_same_logits(
    form: str, architecture: str, tmp_path: Path
) -> None:
    model = pruned(tmp_path / "model", architecture)
    generator = torch.Generator().manual_seed(0)
    operators, whole = {}, {}
    for place, (name, module) in enumerate(linears(model).items()):
        rows, columns = module.weight.shape[::-1] if architecture == "gpt2" else module.weight.shape
        rank = 3 if place == 1 else 4
        a, b = torch.randn(rank, columns, generator=generator), torch.randn(rows, 1, generator=generator) * 0.2
        if form == "spp":
            hira = Spp(rank, 2.0).as_hira({"A": a, "b": b})
            operators[name] = hira["A"], hira["B"]
        else:
            operators[name] = a, torch.randn(rows, rank, generator=generator) * 0.1
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and name.rpartition(".")[0] not in operators:
            whole[name] = parameter.detach() * 1.5
    write_hira_adapter(
        tmp_path / "adapter", tmp_path / "model", operators, whole=whole, transposed=architecture == "gpt2"
    )
    loaded = peft.PeftModel.from_pretrained(load(tmp_path / "model"), tmp_path / "adapter").eval()
    with torch.no_grad():
        for name, (a, b) in operators.items():
            weight = model.get_submodule(name).weight
            weight *= 1 + ((b @ a).T if architecture == "gpt2" else b @ a)
        for name, value in whole.items():
            model.get_parameter(name).copy_(value)
        wanted = model(tokens()).logits
        assert torch.allclose(loaded(tokens()).logits, wanted, atol=1e-3 * float(wanted.abs().max()))
        merged = loaded.merge_and_unload()
        assert torch.allclose(merged(tokens()).logits, wanted, atol=1e-3 * float(wanted.abs().max()))
    for name, module in linears(merged).items():
        assert torch.equal(module.weight == 0, model.get_submodule(name).weight == 0)


def test_an_exported_adapter_is_merged_by_merge_adapter(tmp_path: Path) -> None:
    model = pruned(tmp_path / "model", "llama", dtype=torch.bfloat16)
    name = "model.layers.0.mlp.up_proj"
    a, b = torch.randn(4, 32), torch.randn(48, 4) * 0.1
    write_hira_adapter(tmp_path / "adapter", tmp_path / "model", {name: (a, b)})
    report = fp.merge_adapter(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    weight = model.get_submodule(name).weight.detach().float()
    wanted = (weight + weight * (b @ a)).to(torch.bfloat16)
    assert torch.equal(load(tmp_path / "out").get_submodule(name).weight.detach(), wanted)
    assert report.densification == 0


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_a_trained_adapter_of_experts_is_merged_as_peft_does_and_masked(architecture: str, tmp_path: Path) -> None:
    model = tiny.build(architecture)
    for parameter in model.parameters():
        if parameter.ndim == 3:
            parameter.data *= parse_sparsity("50%").project(parameter.data.flatten(0, 1).abs()).view(parameter.shape)
    model.save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model")
    masks = {name: parameter.detach() != 0 for name, parameter in model.named_parameters()}
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=targets)
    merged = dict(trained(model, settings, tmp_path / "adapter").merge_and_unload().named_parameters())
    report = fp.merge_adapter(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    assert report.densification > 0.99
    for name, parameter in load(tmp_path / "out").named_parameters():
        mask = masks[name] if parameter.ndim == 3 else 1
        assert torch.allclose(parameter, merged[name] * mask, atol=1e-5), name


def test_training_an_adapter_and_merging_it_is_found_by_hold_mask(tmp_path: Path) -> None:
    model = pruned(tmp_path / "model", "llama")

    def train() -> None:
        trained(model, config("lora", "llama"), tmp_path / "adapter").merge_and_unload()

    said = r"layers\.0\.self_attn\.q_proj\.weight: \d+ of its pruned weights"
    with pytest.raises(FistaPrunerError, match=said), fp.hold_mask(model):
        train()
    model = pruned(tmp_path / "again", "llama")
    wrapped = peft.get_peft_model(model, config("lora", "llama"))
    with fp.hold_mask(wrapped) as held:
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01)
        wrapped(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    assert len(held.operators) == 14
    assert all(parameter.any() for name, parameter in wrapped.named_parameters() if "lora_B" in name)

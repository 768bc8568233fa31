"""Mixtures of experts are walked, and their experts are operators, however the checkpoint stores them."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

import tiny
from fistapruner.models.checkpoint import Checkpoint, Stack
from fistapruner.models.experts import ExpertLinear
from fistapruner.models.operators import discover, expert_modules, linear_modules
from fistapruner.models.write import write_checkpoint
from fistapruner.passes.stream import check_model
from fistapruner.training.masked import vectors

FORMS = [True, False]
"""Names and forms of the published checkpoints, and those of transformers today."""


@pytest.mark.parametrize("original", FORMS)
@pytest.mark.parametrize("architecture", tiny.MIXTURES)
def test_the_walk_has_the_models_own_logits(tmp_path: Path, architecture: str, original: bool) -> None:
    """Trainers leave in a config that it asks for a loss of routers, which changes no prediction."""
    asks = {} if original else {"output_router_logits": True}
    model = tiny.opened(tiny.save(architecture, tmp_path, original=original, **asks))
    check_model(model)
    tokens = torch.arange(3, 27)[None]
    with torch.no_grad():
        expected = tiny.loaded(tmp_path)(tokens).logits
    torch.testing.assert_close(model.own_logits(tokens), expected, rtol=1e-5, atol=1e-5)


def test_what_routes_stays_in_fp32_as_in_transformers(tmp_path: Path) -> None:
    """Rounded to bf16, it would choose other experts than the model that users load."""
    tiny.need_transformers("5.24")  # 5.16 rounds the router's weight itself
    folder = tiny.save("deepseek_v3", tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    expected = {name: tensor for name, tensor in whole.state_dict().items() if ".experts." not in name}
    routers = [name for name in expected if name.endswith(("mlp.gate.weight", "e_score_correction_bias"))]
    assert [expected[name].dtype for name in routers] == [torch.float32] * 2
    model = tiny.opened(folder, torch.bfloat16)
    with model.resident():
        found = model.model.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert all(found[name].dtype == tensor.dtype for name, tensor in expected.items())


def by_hand(architecture: str, matrices: dict[str, Tensor], x: Tensor) -> Tensor:
    """What one expert computes of a token, from the paper's formula and its stored matrices."""
    read = {key: value @ x for key, value in matrices.items() if key not in ("down", "down_bias", "joined_bias")}
    if architecture == "gpt_oss":
        joined = read["joined"] + matrices["joined_bias"]
        gate, up = joined[::2].clamp(max=7.0), joined[1::2].clamp(-7.0, 7.0)
        return matrices["down"] @ ((up + 1) * gate * torch.sigmoid(1.702 * gate)) + matrices["down_bias"]
    activation = partial(functional.gelu, approximate="tanh") if architecture == "gemma4" else functional.silu
    gate, up = read["joined"].chunk(2) if "joined" in read else (read["gate"], read["up"])
    return matrices["down"] @ (activation(gate) * up)


def stored(architecture: str, tensors: dict[str, Tensor], expert: int) -> dict[str, Tensor]:
    """The matrices of an expert in decoder layer 1, (outputs, inputs), as the published checkpoint has them."""
    stacks = {
        "gpt_oss": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        "granitemoe": ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
        "gemma4": ("experts.gate_up_proj", "experts.down_proj"),
    }
    if architecture in stacks:
        names = dict(zip(("joined", "down"), stacks[architecture], strict=True))
        found = {key: tensors[f"model.layers.1.{name}"][expert] for key, name in names.items()}
        if architecture == "gpt_oss":
            found = {key: value.T for key, value in found.items()}
            found |= {f"{key}_bias": tensors[f"model.layers.1.{name}_bias"][expert] for key, name in names.items()}
        return found
    mixtral = architecture == "mixtral"
    prefix = f"model.layers.1.{'block_sparse_moe' if mixtral else 'mlp'}.experts.{expert}"
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    return {key: tensors[f"{prefix}.{name}.weight"] for key, name in zip(("gate", "up", "down"), names, strict=True)}


@pytest.mark.parametrize("architecture", tiny.MIXTURES)
def test_experts_compute_what_a_loop_over_tokens_by_hand_does(tmp_path: Path, architecture: str) -> None:
    model = tiny.opened(tiny.save(architecture, tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    torch.manual_seed(0)
    inputs, weights = torch.randn(11, 32), torch.rand(11, 2)
    chosen = torch.rand(11, 4).topk(2).indices
    with model.layer(1) as layer, torch.no_grad():
        (experts,) = expert_modules(layer).values()
        computed = experts(inputs, chosen, weights)
    for token in range(11):
        expected = sum(
            weights[token, place] * by_hand(architecture, stored(architecture, tensors, int(expert)), inputs[token])
            for place, expert in enumerate(chosen[token])
        )
        torch.testing.assert_close(computed[token], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["qwen2_moe", "gpt_oss"])
def test_every_experts_matrices_are_operators_and_what_routes_is_none(tmp_path: Path, architecture: str) -> None:
    model = tiny.opened(tiny.save(architecture, tmp_path))
    layout = discover(model)
    parts = ["gate_up_proj"] if architecture == "gpt_oss" else ["gate_proj", "up_proj"]
    names = [[operator.name for operator in group] for group in layout.layers[1]]
    routed = [group for group in names if ".experts." in group[0]]
    assert routed == [
        [f"mlp.experts.{expert}.{part}" for part in group] for expert in range(4) for group in (parts, ["down_proj"])
    ]
    assert not any("gate.weight" in name or name.endswith((".gate", "router", "_gate")) for n in names for name in n)
    assert {operator.expert for group in layout.layers[1] for operator in group if operator.experts} == {0, 1, 2, 3}
    tensors = load_file(tmp_path / "model.safetensors")
    with model.layer(1) as layer:
        for operator in (operator for group in layout.layers[1] for operator in group if operator.experts):
            part = operator.name.rpartition(".")[2].removesuffix("_proj").replace("gate_up", "joined")
            assert torch.equal(operator.weight(layer), stored(architecture, tensors, operator.expert)[part])


def test_a_shared_expert_as_wide_as_there_are_experts_is_no_router(tmp_path: Path) -> None:
    """Qwen3-Next has 512 of both."""
    model = tiny.opened(tiny.save("qwen2_moe", tmp_path, shared_expert_intermediate_size=4))
    names = {operator.name for group in discover(model).layers[1] for operator in group}
    shared = {f"mlp.shared_expert.{part}" for part in ("gate_proj", "up_proj", "down_proj")}
    assert {name for name in names if "shared" in name or name == "mlp.gate"} == shared


@pytest.mark.parametrize("inner", [16, 32])
def test_a_router_that_is_a_small_mlp_is_left_as_it_is(tmp_path: Path, inner: int) -> None:
    """What leads from the hidden states, 32 wide, to one number for each of the 4 experts."""
    layer = tiny.opened(tiny.save("qwen2_moe", tmp_path)).layers[1]
    mlp = layer.get_submodule("mlp")
    mlp.gate = nn.Sequential(nn.Linear(32, inner), nn.ReLU(), nn.Linear(inner, 4))
    names = {name for name, _ in linear_modules(layer)}
    assert "mlp.gate.2" not in names
    assert "mlp.gate.2.bias" not in vectors(layer)
    assert "mlp.shared_expert.down_proj" in names


def test_a_router_beside_attention_and_mlp_is_left_as_it_is(tmp_path: Path) -> None:
    """In Gemma 4 it stands in the decoder layer; a gate of the MLP beside it is an operator all the same."""
    model = tiny.opened(tiny.save("gemma4", tmp_path, intermediate_size=4))
    names = {operator.name for group in discover(model).layers[1] for operator in group}
    assert {"mlp.gate_proj", "self_attn.q_proj", "experts.3.gate_up_proj"} <= names
    trained = vectors(model.layers[1])
    assert "input_layernorm.weight" in trained
    assert not [name for name in names | trained if "router" in name]


def test_a_mixture_is_one_writer_to_the_residual_stream(tmp_path: Path) -> None:
    """So drift can be corrected in attention; what is routed elsewhere where noise is added does not matter."""
    assert (
        discover(tiny.opened(tiny.save("qwen3_moe", tmp_path))).residual_writers == (("self_attn.o_proj", "mlp"),) * 2
    )


def test_a_tensor_of_all_experts_is_read_and_written_by_matrix(tmp_path: Path) -> None:
    source = Checkpoint.open(tiny.save("gpt_oss", tmp_path / "model"))
    name = "model.layers.0.mlp.experts.down_proj"
    whole = source.read(name)
    parts = source.take_apart(Stack(name, transposed=True))
    assert [source.entry(part).shape for part in parts] == [whole[0].T.shape] * 4
    assert all(torch.equal(source.read(part), whole[number].T) for number, part in enumerate(parts))
    assert not set(parts) - set(source.names())
    assert name not in source.names()
    new = torch.ones_like(whole[2].T)
    write_checkpoint(source, tmp_path / "out", lambda part: new if part == parts[2] else None)
    written, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", tmp_path / "model"))
    assert list(written) == list(before)
    whole[2] = 1
    assert torch.equal(written[name], whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_in_low_precision_have_few_sizes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of tokens; the outputs, and what hooks see, are of the tokens alone."""
    linear, sizes = functional.linear, set()
    layer, inputs = ExpertLinear(32, 16).to(dtype), torch.randn(200, 32).to(dtype)
    wanted = [linear(inputs[:tokens], layer.weight, layer.bias) for tokens in range(200)]
    monkeypatch.setattr(functional, "linear", lambda x, *others: sizes.add(len(x)) or linear(x, *others))
    layer.register_forward_hook(lambda _, args, output: seen.append((len(args[0]), len(output))))
    seen: list[tuple[int, int]] = []
    for tokens in range(200):
        assert torch.allclose(layer(inputs[:tokens]), wanted[tokens], rtol=1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert seen == [(tokens, tokens) for tokens in range(200)]
    assert len(sizes) == (5 if dtype == torch.bfloat16 else 200)

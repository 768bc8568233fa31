"""Links of operators whose channels can be reordered or rotated: found in every architecture, and proven."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import tiny
from fistapruner.models.checkpoint import ROTATED, reorder
from fistapruner.models.layers import LayerwiseModel
from fistapruner.models.links import find_links, links_inside, reordered
from fistapruner.models.operators import discover

FUSED = ("gpt2", "gpt_neox", "falcon", "bloom", "phi3")
"""Architectures whose query, key and value are one operator."""


def reorder_all(model: LayerwiseModel, links: Any, tensors: dict[str, Tensor], prefix: str = "") -> None:
    """Permute the channels of all links at random, and rotate those that may be, in place."""
    for index, link in ((index, link) for index, found in enumerate(links) for link in found):
        order = torch.stack([torch.randperm(link.channels) for _ in range(link.blocks)])
        turn = torch.linalg.qr(torch.randn(link.blocks, link.channels, link.channels)).Q
        for way in (order, turn) if link.rotates else (order,):
            for name, change in reordered(model, index, link, way).items():
                tensors[prefix + name].copy_(reorder(tensors[prefix + name], *change))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_links_are_found_and_reordering_changes_nothing(tmp_path: Path, architecture: str, dtype: torch.dtype) -> None:
    folder = tiny.save(architecture, tmp_path / "model", dtype=dtype)
    skeleton = tiny.opened(folder)
    links = find_links(skeleton, discover(skeleton))
    heads = (
        None if architecture in FUSED else (("self_attn.v_proj",), tiny.ATTENTION.get(architecture, "self_attn.o_proj"))
    )
    mlp = None if architecture == "phi3" else tiny.MLP[architecture]  # its gate and up are one operator
    for found in links:
        assert {(link.producers, link.consumer.name) for link in found} == {heads, mlp} - {None}
        assert all(
            (link.blocks > 1) == link.rotates == ((link.producers, link.consumer.name) == heads) for link in found
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(3, tiny.VOCABULARY, (2, 12))
    before = model(tokens).logits
    state = model.state_dict()
    prefix = "" if any(name in state for name in skeleton.checkpoint.names()) else model.base_model_prefix + "."
    reorder_all(skeleton, links, state, prefix)
    torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("architecture", "operator"), [("doge", "v_proj"), ("deepseek_v3", "q_a_proj")])
def test_channels_that_something_else_reads_in_order_are_not_linked(
    tmp_path: Path, architecture: str, operator: str
) -> None:
    """Doge makes its attention mask from the values; DeepSeek has a norm with weights near one between operators."""
    folder = tmp_path / "model"
    if architecture == "doge":
        config = transformers.DogeConfig(**tiny.SIZES, **tiny.GQA)
        torch.manual_seed(0)
        tiny.spread(AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    else:
        tiny.save(architecture, folder)
    skeleton = tiny.opened(folder)
    links = find_links(skeleton, discover(skeleton))
    assert all(links)
    assert not any(name.endswith(operator) for found in links for link in found for name in link.producers)
    tokens = torch.randint(3, tiny.VOCABULARY, (2, 12))
    before = tiny.loaded(folder)(tokens).logits
    with tiny.edited(folder) as tensors:
        reorder_all(skeleton, links, tensors)
    after = tiny.loaded(folder)(tokens).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def test_layers_that_differ_in_an_attribute_only_are_tried_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes of layers with and without a sliding window are the same; those that differ in their number are one."""
    tried: list[int] = []
    run = LayerwiseModel.run
    monkeypatch.setattr(
        LayerwiseModel, "run", lambda self, index, *rest: [tried.append(index), run(self, index, *rest)][1]
    )
    for architecture, expected in (("llama", {0}), ("gemma2", {0, 1})):
        skeleton = tiny.opened(tiny.save(architecture, tmp_path / architecture))
        layout = discover(skeleton)
        tried.clear()
        find_links(skeleton, layout)
        assert set(tried) == expected


class Heads(nn.Module):
    """Two heads of four channels, each with a weight that depends on the input, as attention's do."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.v_proj, self.o_proj, self.gate, self.between = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2), between

    def forward(self, hidden: Tensor) -> Tensor:
        values = self.between(self.v_proj(hidden).unflatten(-1, (2, 4)))
        return self.o_proj((values * self.gate(hidden).softmax(-1)[..., None]).flatten(-2))


@pytest.mark.parametrize(
    ("between", "rotates"),
    [
        (lambda values: values, True),
        (lambda values: values / values.square().mean(-1, keepdim=True).sqrt(), True),
        (torch.tanh, False),
        (lambda values: values.clamp(-8, 8), False),  # which no value of the short window reaches
    ],
    ids=["nothing", "norm", "tanh", "clipped"],
)
def test_what_a_nonlinearity_reads_is_not_rotated(between: Callable[[Tensor], Tensor], rotates: bool) -> None:
    layer, hidden = Heads(between), torch.randn(3, 16, 8)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with torch.no_grad():
        (link,) = links_inside(layer, {4}, lambda values: functional_call(layer, values, (hidden,)))
    assert (link.producers, link.blocks, link.rotates) == (("v_proj",), 2, rotates)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("repeats", [1, 3])
def test_a_rotated_tensor_is_its_product_with_one_matrix(repeats: int, dtype: torch.dtype) -> None:
    rotation, columns = torch.linalg.qr(torch.randn(2, 4, 4)).Q, 8 * repeats
    matrix = torch.block_diag(*rotation.repeat_interleave(repeats, 0)).double()
    weight = torch.randn(ROTATED + 5, columns).to(dtype)
    assert torch.equal(reorder(weight, 1, rotation), (weight.double() @ matrix).to(dtype))
    assert torch.equal(reorder(weight.T.contiguous(), 0, rotation), (matrix.T @ weight.T.double()).to(dtype))
    many = torch.linalg.qr(torch.randn(2 * ROTATED // 4, 4, 4)).Q
    bias = torch.randn(2 * ROTATED * repeats).to(dtype)
    blocks = bias.double().view(len(many), repeats, 4) @ many.double()
    assert torch.equal(reorder(bias, 0, many), blocks.flatten().to(dtype))

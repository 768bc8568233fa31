"""Which operators go to sparse tensor cores, with the device replaced: the decision is tested, the GPU is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiny
from fistapruner import NM, FistaPrunerError, SparseLinear, to_semi_structured


def model():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 32)).bfloat16()
    for layer in layers[:2]:
        layer.weight.data *= NM(2, 4).project(layer.weight.data.float().abs())
    return layers


def scripted(times):
    remaining = iter(times)

    def clock(call, device):
        call()
        return next(remaining)

    return clock


def test_only_what_is_faster_is_changed():
    network, made = model(), []

    def to_sparse(weight):
        made.append(weight.shape)
        return weight.clone()

    before = [layer.weight for layer in network]
    choices = to_semi_structured(network, tokens=8, to_sparse=to_sparse, clock=scripted([2.0, 1.0, 1.0, 0.99]))
    assert [choice.sparse for choice in choices] == [True, False, False]
    assert [layer.weight is old for layer, old in zip(network, before, strict=True)] == [False, True, True]
    assert choices[1].reason == "only 1.01 times faster at 8 tokens, less than 1.05"
    assert choices[2].reason == "it is not 2:4"
    assert made == [torch.Size([64, 32]), torch.Size([32, 64])]


def test_what_torch_refuses_stays_dense():
    def refuse(weight):
        raise RuntimeError("shape is not supported")

    choices = to_semi_structured(model(), to_sparse=refuse, clock=scripted([]))
    assert not any(choice.sparse for choice in choices)
    assert "shape is not supported" in choices[0].reason


def test_experts_in_one_tensor_stay_dense_and_are_named():
    network = tiny.build("qwen3_moe").bfloat16()
    choices = to_semi_structured(network, to_sparse=torch.clone, clock=scripted([]))
    experts = [choice for choice in choices if "experts" in choice.name]
    assert [choice.name.rpartition("mlp.")[2] for choice in experts] == [
        "experts.gate_up_proj",
        "experts.down_proj",
    ] * 2
    assert all("one tensor of all experts" in choice.reason and not choice.sparse for choice in experts)


def test_operators_that_are_no_linear_layers_are_named():
    network = tiny.build("gpt2").bfloat16()
    choices = to_semi_structured(network, to_sparse=torch.clone, clock=scripted([]))
    turned = [choice for choice in choices if ".c_" in choice.name]
    assert len(turned) == 4 * len(network.transformer.h)
    assert all("Conv1D" in choice.reason and not choice.sparse for choice in turned)
    packed = nn.Sequential(SparseLinear.from_dense(model()[0]))
    (choice,) = to_semi_structured(packed, to_sparse=torch.clone)
    assert choice.reason.startswith("its weight is packed")


def test_other_dtypes_stay_dense():
    choices = to_semi_structured(model().float(), to_sparse=torch.clone, clock=scripted([]))
    assert "float32" in choices[0].reason


def test_a_cpu_model_is_refused():
    with pytest.raises(FistaPrunerError, match=r"fistapruner\.load"):
        to_semi_structured(model())
    for tokens in (0, "8"):
        with pytest.raises(FistaPrunerError, match=f"tokens {tokens!r} is not a whole number of at least 1"):
            to_semi_structured(model(), tokens=tokens)


def test_what_is_no_model_is_refused():
    with pytest.raises(FistaPrunerError, match="model is of the class str, and a loaded model is expected"):
        to_semi_structured("folder")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device with sparse tensor cores")
def test_on_a_gpu():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4096, 4096, bias=False)).half().cuda()
    network[0].weight.data *= NM(2, 4).project(network[0].weight.data.float().abs())
    x = torch.randn(512, 4096, device="cuda", dtype=torch.half)
    with torch.inference_mode():
        expected = network(x)
        to_semi_structured(network, tokens=512)
        torch.testing.assert_close(network(x), expected, rtol=1e-2, atol=1e-1)

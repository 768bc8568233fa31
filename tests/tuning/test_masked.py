"""Masked parameters: zeros stay exact, survivors stay survivors, what does not change goes back bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fistapruner.tuning.masked import MaskedParameters

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "adam": lambda tensors: torch.optim.Adam(tensors, lr=0.05),
    "fused adam": lambda tensors: torch.optim.Adam(tensors, lr=0.05, fused=True),
    "adamw": lambda tensors: torch.optim.AdamW(tensors, lr=0.05, weight_decay=0.1),
    "sgd": lambda tensors: torch.optim.SGD(tensors, lr=0.05, momentum=0.9, weight_decay=0.1),
}


def pruned(seed: int, dtype: torch.dtype, n: int = 0, m: int = 0) -> dict[str, Tensor]:
    """Tensors as of a pruned layer: two pruned operators (half, or n:m), a dense one and a vector; one zero is
    negative."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(12, 16, generator=generator).to(dtype) for name in ("first", "second", "dense")}
    for name in ("first", "second"):
        scores = torch.rand(12, 16, generator=generator).view(-1, m or 32)
        dropped = scores.topk(m - n or 16, dim=1).indices
        tensors[name].view(scores.shape).scatter_(1, dropped, 0.0)
    first = tensors["first"].flatten()
    first[first.eq(0).nonzero()[0]] = -0.0
    tensors["norm"] = torch.randn(16, generator=generator).to(dtype)
    return tensors


def train(parameters: MaskedParameters, optimizer: str, steps: int = 3) -> None:
    inputs = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    optimiser = OPTIMIZERS[optimizer](list(parameters.masters.values()))
    for _ in range(steps):
        optimiser.zero_grad()
        values = parameters.values()
        hidden = inputs.to(values["norm"].dtype) * values["norm"]
        sum((hidden @ values[name].T).float().square().mean() for name in ("first", "second", "dense")).backward()  # type: ignore[union-attr]
        optimiser.step()
        for name, mask in parameters.masks.items():
            assert torch.equal(parameters.values()[name] != 0, mask), name
            assert not parameters.masters[name][~mask].any(), name


@pytest.mark.parametrize(("n", "m"), [(0, 0), (2, 4), (1, 4), (4, 8)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_are_exact_after_every_step(dtype: torch.dtype, n: int, m: int, optimizer: str) -> None:
    tensors = pruned(1, dtype, n, m)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    parameters = MaskedParameters(tensors, ["first", "second"])
    train(parameters, optimizer)
    parameters.write()
    for name in ("first", "second"):
        assert torch.equal(tensors[name] == 0, before[name] == 0)
    assert all(not torch.equal(tensors[name], before[name]) for name in tensors)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unchanged_values_go_back_bit_for_bit(dtype: torch.dtype, stored: torch.dtype, seed: int) -> None:
    tensors = {name: tensor.to(stored).to(dtype) for name, tensor in pruned(seed, stored).items()}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    parameters = MaskedParameters(tensors, ["first", "second"])
    kept = parameters.copy()
    train(parameters, "adam")
    parameters.restore(kept)
    parameters.write(lambda _, value: value.to(stored) if dtype == torch.float32 else value)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), name
        assert torch.equal(tensor.signbit(), before[name].signbit()), name


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_a_survivor_that_rounds_to_zero_keeps_its_start_value(stored: torch.dtype) -> None:
    start = torch.tensor([[0.5, 0.0, -0.25, 1.0]])
    tensors = {"weight": start.clone()}
    parameters = MaskedParameters(tensors, ["weight"])
    with torch.no_grad():
        parameters.masters["weight"].copy_(torch.tensor([[1e-45, 0.0, -1e-45, 2.0]]))
    parameters.write(lambda _, value: value.to(stored))
    assert tensors["weight"].tolist() == [[0.5, 0.0, -0.25, 2.0]]


def test_an_unmasked_tensor_may_become_zero() -> None:
    tensors = {"bias": torch.ones(3)}
    parameters = MaskedParameters(tensors)
    with torch.no_grad():
        parameters.masters["bias"].zero_()
    parameters.write()
    assert not tensors["bias"].any()


def test_the_root_mean_square_is_over_survivors() -> None:
    parameters = MaskedParameters({"weight": torch.tensor([[3.0, 0.0, 0.0, 4.0]]), "none": torch.zeros(2)}, ["weight"])
    assert parameters.root_mean_squares() == pytest.approx([12.5**0.5, 0.0])


def test_a_pruned_name_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="'other' is not one of the 1 tensors"):
        MaskedParameters({"weight": torch.ones(2, 2)}, ["other"])

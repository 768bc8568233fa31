"""Masters behind a mask: the start is the checkpoint, zeros stay, torch's AdamW takes the steps."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_objective import make_text, opened
from torch import Tensor, nn

import tiny
from fistapruner.models.operators import discover
from fistapruner.papers.spp import Spp
from fistapruner.settings.train import RecoverRecipe
from fistapruner.training.loss import Objective
from fistapruner.training.masked import Form, Lora, Masters, Trained

FORMS: dict[str, Form] = {"full": Form(), "lora": Lora(3, 2.0), "spp": Spp(3, 2.0)}


def matrix(m: int, n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator)
    return weight * (torch.rand(m, n, generator=generator) < 0.5)


def moved(form: Form, weight: Tensor) -> dict[str, Tensor]:
    """Masters away from their start."""
    start = form.start(weight.float(), torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    return {name: each + 0.3 * torch.randn(each.shape, generator=generator) for name, each in start.items()}


@pytest.mark.parametrize("name", FORMS)
@given(m=st.integers(1, 12), n=st.integers(1, 12))
@settings(max_examples=15, deadline=None)
def test_the_start_is_the_weight_and_zeros_stay(name: str, m: int, n: int) -> None:
    form, weight = FORMS[name], matrix(m, n)
    start = form.start(weight, torch.Generator().manual_seed(0))
    assert torch.equal(form.weight(weight, start), weight)
    if name != "full":  # whose zeros the gradient keeps
        effective = form.weight(weight, moved(form, weight))
        assert torch.equal(effective == 0, weight == 0)


def test_lora_is_the_masked_product() -> None:
    form, weight = Lora(2, 3.0), matrix(5, 4)
    masters = moved(form, weight)
    expected = weight + 3.0 * (masters["B"] @ masters["A"]) * (weight != 0)
    torch.testing.assert_close(form.weight(weight, masters), expected)


@pytest.mark.parametrize("name", FORMS)
def test_a_model_keeps_its_zeros_and_comes_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    """Over steps with random gradients; what was kept as the best is restored; a state goes on with the same bits."""
    model = opened(tiny.save("llama", tmp_path / "model", num_hidden_layers=2), torch.float32)
    recipe = RecoverRecipe.build({"parameters": name, "rank": 4, "lr": 0.02})

    def step(trained: Trained, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for each in trained.parameters.values():
            each.grad = torch.randn(each.shape, generator=generator)
        trained.step(1.0)

    with model.resident():
        zeroed = [model.layers[1].get_parameter(f"mlp.{part}_proj.weight") for part in ("up", "down")]
        for weight in zeroed:
            weight.data[:, ::2] = 0.0
        trained = Trained(model, discover(model), recipe)
        assert dict(trained.result()) == {}
        for seed in range(3):
            step(trained, seed)
        trained.keep()
        kept, state = trained.tensors(), {key: each.clone() for key, each in trained.tensors().items()}
        assert {key.partition("/")[0] for key in kept} >= {"trained", "best", "exp_avg", "exp_avg_sq", "step"}
        step(trained, 7)
        ahead = {key: each.clone() for key, each in trained.tensors().items()}
        values = trained.layers[1].values()
        assert all(bool((values[f"mlp.{part}_proj.weight"][:, ::2] == 0).all()) for part in ("up", "down"))
        assert not torch.equal(values["mlp.up_proj.weight"], zeroed[0])
        other = Trained(model, discover(model), recipe)
        other.load(state)
        step(other, 7)
        assert all(torch.equal(each, ahead[key]) for key, each in other.tensors().items())
        trained.restore()
        restored = trained.tensors()
        assert all(torch.equal(restored[key], state[key]) for key in state if key.startswith("trained/"))


def test_a_step_is_torchs_adamw_on_survivors() -> None:
    start, gradient = matrix(6, 5), matrix(6, 5, seed=3) + 1.0
    ours, plain = nn.Parameter(start.clone()), nn.Parameter(start[start != 0].clone())
    masters = Masters({"w": ours}, {"w": 0.1}, ["w"])
    optimizer = torch.optim.AdamW([plain], lr=0.05, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(4):
        ours.grad, plain.grad = gradient.clone(), gradient[start != 0].clone()
        size = masters.step(0.5)
        assert size == pytest.approx(float(plain.grad.norm()), rel=1e-6)
        optimizer.step()
    torch.testing.assert_close(ours.detach()[start != 0], plain.detach())
    assert torch.equal(ours == 0, start == 0)
    ours.grad = torch.full_like(start, torch.nan)
    before = ours.detach().clone()
    assert not masters.step(1.0) < 1
    assert torch.equal(ours, before)


def test_training_in_bf16_lowers_the_loss(tmp_path: Path) -> None:
    model = opened(tiny.save("llama", tmp_path / "model", num_hidden_layers=2), torch.bfloat16)
    text = make_text()
    with model.resident():
        trained = Trained(model, discover(model), RecoverRecipe.build({"parameters": "full", "lr": 0.02}))
        objective = Objective(model, trained.run, text, 0.0, None, 2)
        losses = []
        for _ in range(6):
            losses.append(objective.backward([0, 1, 2, 3]))
            trained.step(1.0)
        assert losses[-1] < losses[0] - 0.1
        assert {each.dtype for each in trained.parameters.values()} == {torch.float32}

"""MeZO and SubZero: the estimate against autograd, steps from seeds, zeros kept, rounding without bias."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny
from fistapruner.models.operators import discover
from fistapruner.papers.mezo import EPS, Draw, ForwardOnly, standard_normal
from fistapruner.papers.subzero import RANK, REFRESH, subspace_normal
from fistapruner.text.training import TrainingText
from fistapruner.training.loss import Objective

DRAWS = {"mezo": standard_normal, "subzero": subspace_normal}


def whole(draw: Draw, step: int, weight: Tensor, name: str = "w") -> Tensor:
    return draw(step, name, weight, 0, len(weight))


@pytest.mark.parametrize("method", DRAWS)
def test_directions_come_from_seed_step_and_name(method: str) -> None:
    draw, weight = DRAWS[method](3), torch.zeros(24, 40)
    drawn = whole(draw, 5, weight)
    assert torch.equal(whole(DRAWS[method](3), 5, weight), drawn)  # in the midst of a run
    assert not torch.equal(whole(draw, 6, weight), drawn)
    assert not torch.equal(whole(draw, 5, weight, "other"), drawn)
    assert not torch.equal(whole(DRAWS[method](4), 5, weight), drawn)
    many = torch.stack([whole(draw, step, weight) for step in range(1, 401)])
    assert float(many.square().mean()) == pytest.approx(1.0, abs=0.05)


def test_subzero_stays_in_its_subspace_until_it_is_drawn_anew() -> None:
    draw, weight = subspace_normal(0), torch.zeros(24, 40)
    first, second, later = (whole(draw, step, weight) for step in (1, REFRESH, REFRESH + 1))
    assert int(torch.linalg.matrix_rank(first)) == RANK
    assert int(torch.linalg.matrix_rank(torch.cat([first, second], 1))) == RANK
    assert int(torch.linalg.matrix_rank(torch.cat([first, later], 1))) == 2 * RANK
    torch.testing.assert_close(draw(1, "w", weight, 8, 16), first[8:16])
    assert whole(draw, 1, torch.zeros(7)).shape == (7,)


def begin(folder: Path, method: str, dtype: torch.dtype, rate: float = 1e-3) -> tuple[ForwardOnly, Objective]:
    model = tiny.opened(folder, dtype)
    model.check()
    tokens = tiny.tokens(4, 24, seed=3)
    none = torch.zeros(4, dtype=torch.int64)
    text = TrainingText(tokens, torch.ones(4, 24, dtype=torch.bool), none.bool(), none, ("text",), {})
    model.__dict__["loaded"] = model.resident()
    model.__dict__["loaded"].__enter__()
    for layer in model.layers:
        layer.get_parameter("mlp.up_proj.weight").data[:, ::2] = 0.0
    trained = ForwardOnly(model, discover(model), DRAWS[method](0), folder / "best.safetensors", rate, 0)
    return trained, Objective(model, model.run, text, 0.0, None, 2)


@pytest.mark.parametrize("method", DRAWS)
def test_the_slope_is_the_gradient_along_the_direction(tmp_path: Path, method: str) -> None:
    """Of all parameters, embeddings and head among them; the weights are the same bits after the two losses."""
    trained, objective = begin(tiny.save("llama", tmp_path / "model", num_hidden_layers=2), method, torch.float32)
    before = {name: each.clone() for name, each in trained.tensors().items()}
    losses = [trained.loss(objective, [0, 1, 2], 1, eps) for eps in (EPS, -EPS)]
    assert all(torch.equal(each, before[name]) for name, each in trained.tensors().items())
    model = trained.model.model
    tokens = objective.text.tokens[:3]
    for each in trained.weights.values():
        each.requires_grad_()
    logits = model(input_ids=tokens).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))
    loss.backward()
    slope = 0.0
    for name, each in trained.weights.items():
        direction = torch.cat([value - rows for rows, value in trained.along(1, name, 1.0)])
        assert name not in trained.pruned or bool((direction[each == 0] == 0).all())
        slope += float((each.grad * direction.detach()).sum())
    assert "model.embed_tokens.weight" in trained.weights
    assert (losses[0] - losses[1]) / (2 * EPS) == pytest.approx(slope, rel=0.02, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", DRAWS)
def test_steps_keep_zeros_and_come_from_seeds(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    folder = tiny.save("llama", tmp_path / "model", num_hidden_layers=2)
    found = []
    for _ in range(2):
        trained, objective = begin(folder, method, dtype, rate=1e-4)
        trained.keep()
        start = {name: each.clone() for name, each in trained.tensors().items()}
        results = [trained.step(objective, [0, 1], number, 1.0) for number in (1, 2, 3)]
        found.append((results, {name: each.clone() for name, each in trained.tensors().items()}))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(each, found[1][1][name]) for name, each in found[0][1].items())
    for name, each in found[0][1].items():
        assert not torch.equal(each, start[name])
        assert name not in trained.pruned or torch.equal(each == 0, start[name] == 0)
    assert trained.numbers == sum(int((each != 0).sum()) for each in trained.weights.values())
    trained.restore()
    assert all(torch.equal(each, start[name]) for name, each in trained.tensors().items())


def test_small_steps_on_16_bits_are_taken_on_average(tmp_path: Path) -> None:
    trained, _ = begin(tiny.save("llama", tmp_path / "model", num_hidden_layers=2), "mezo", torch.bfloat16)
    value = torch.full((100_000,), 1.0 + 2**-10)  # an eighth of the distance to the next bf16 number
    rounded = trained._rounded(value, torch.bfloat16, 1, "w", 0).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert float(rounded.mean()) == pytest.approx(1.0 + 2**-10, abs=1e-4)

"""Steps without gradients: directions, estimates against autograd, replay from three numbers a step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_objective import make_text, whole
from test_trained import live, opened, pruned, recipe, written
from torch import Tensor
from torch.nn.functional import cross_entropy

from fistapruner.activations.store import scratch_factory
from fistapruner.tuning.forms import Form, Full, Lora, Spp
from fistapruner.tuning.losses import TokenLoss
from fistapruner.tuning.masked import MaskedParameters
from fistapruner.tuning.objective import Objective
from fistapruner.tuning.steppers import ForwardOnly
from fistapruner.tuning.trained import Trained
from fistapruner.tuning.zeroth_order import Directions, ZerothOrder, most_square

CPU = torch.device("cpu")


def small(form: Form, rows: int = 10, columns: int = 20) -> MaskedParameters:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.rand(rows, columns, generator=generator) < 0.5
    return MaskedParameters({"w": weight, "v": torch.ones(7)}, ["w"], form)


def test_frames_are_orthonormal_and_last_for_a_period() -> None:
    directions = Directions(0, subspace=8, refresh=5)
    frames = {step: directions.frames(step, "w", 24, 40, CPU) for step in range(1, 12)}
    for left, right in frames.values():
        assert (left.shape, right.shape) == ((24, 8), (40, 8))
        for frame in (left, right):
            torch.testing.assert_close(frame.T @ frame, torch.eye(8), atol=1e-5, rtol=0)
    for step in range(2, 12):
        assert torch.equal(frames[step][0], frames[step - 1][0]) == (step not in (6, 11))
    fresh = Directions(0, subspace=8, refresh=5)
    assert torch.equal(fresh.frames(9, "w", 24, 40, CPU)[1], frames[7][1])  # in the midst of a period
    assert not torch.equal(fresh.frames(9, "other", 24, 40, CPU)[1], frames[7][1])
    assert Directions(0, subspace=99).frames(1, "w", 24, 40, CPU)[0].shape == (24, 24)


@pytest.mark.parametrize("subspace", [None, 8])
def test_the_mean_square_of_a_direction_is_one(subspace: int | None) -> None:
    directions = Directions(0, subspace, refresh=10)
    drawn = [
        directions.normal(step, "w", (24, 40), CPU) if subspace is None else directions.matrix(step, "w", 24, 40, CPU)
        for step in range(1, 601)
    ]
    assert float(torch.stack(drawn).square().mean()) == pytest.approx(1.0, abs=0.03)
    if subspace is not None:
        assert all(int(torch.linalg.matrix_rank(each)) == subspace for each in drawn[:3])


@pytest.mark.parametrize("subspace", [None, 4])
@pytest.mark.parametrize("form", [Full(), Lora(4, 2.0), Spp(4, 2.0)], ids=["full", "lora", "spp"])
def test_directions_have_the_shapes_of_masters_in_any_order(form: Form, subspace: int | None) -> None:
    parameters = small(form)
    drawn = Directions(1, subspace).of(3, parameters)
    assert {name: each.shape for name, each in drawn.items()} == {
        name: master.shape for name, master in parameters.masters.items()
    }
    assert len({float(each.flatten()[0]) for each in drawn.values()}) == len(drawn)
    other = Directions(1, subspace)
    other.of(2, parameters)
    parameters.masters = dict(reversed(parameters.masters.items()))
    again = other.of(3, parameters)
    assert all(torch.equal(each, again[name]) for name, each in drawn.items())
    later = other.of(4, parameters)
    assert not any(torch.equal(each, later[name]) for name, each in drawn.items())


def test_subzero_draws_masters_in_its_subspaces() -> None:
    parameters = small(Full())
    mask, z = parameters.masks["w"], Directions(1, 3).of(3, parameters)["w"]
    left, right = Directions(1, 3).frames(3, "w", 10, 20, CPU)
    span = torch.einsum("ik,jl->ijkl", left, right)[mask].flatten(1)  # survivors of every U Z V^T
    torch.testing.assert_close(span @ torch.linalg.lstsq(span, z[:, None]).solution, z[:, None], rtol=0, atol=1e-4)
    for form in (Lora(4, 2.0), Spp(4, 2.0)):
        parameters = small(form)
        for name, drawn in Directions(1, 3).of(3, parameters).items():
            matrix = drawn.view(most_square(drawn.numel()))
            whole = parameters.origin[name] not in parameters.masks  # a vector, which is drawn as in MeZO
            assert int(torch.linalg.matrix_rank(matrix)) == min(matrix.shape[0], 99 if whole else 3)


def test_most_square() -> None:
    assert [most_square(count) for count in (1, 12, 16, 13, 576 * 16)] == [(1, 1), (3, 4), (4, 4), (1, 13), (96, 96)]


@pytest.mark.parametrize("subspace", [None, 6])
def test_the_mean_of_slope_times_direction_is_the_masked_gradient(subspace: int | None) -> None:
    parameters = small(Full())
    target = torch.randn(10, 20, generator=torch.Generator().manual_seed(5))
    gradient = parameters.chain({"w": target, "v": torch.zeros(7)})["w"]  # of the linear loss sum(target * weight)
    directions = Directions(2, subspace, refresh=1)
    total = torch.zeros_like(gradient)
    for step in range(1, 4097):
        z = directions.of(step, parameters)["w"]
        total += (gradient @ z) * z
    assert float(torch.cosine_similarity(total, gradient, dim=0)) > 0.9


def test_the_error_of_the_slope_falls_with_the_square_of_eps() -> None:
    parameters, inputs = small(Full()), torch.randn(30, 20, generator=torch.Generator().manual_seed(1)).double()
    theta, z = parameters.masters["w"].detach().double(), Directions(0).of(1, parameters)["w"].double()
    mask, weight = parameters.masks["w"], parameters.starts()["w"].double()

    def loss(values: Tensor) -> Tensor:
        return torch.tanh(inputs @ Full().weight(weight, mask, {"": values}).T).square().mean()

    theta.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(theta), theta)
    exact, theta = float(gradient @ z), theta.detach()
    errors = [
        abs(float(loss(theta + eps * z) - loss(theta - eps * z)) / (2 * eps) - exact) for eps in (0.02, 0.01, 0.005)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, abs=1)
    assert errors[1] / errors[2] == pytest.approx(4, abs=1)


@pytest.mark.parametrize("optimizer", ["mezo", "subzero"])
@pytest.mark.parametrize("form", ["full", "lora", "norms"])
def test_the_slope_of_a_model_is_its_gradient_along_the_direction(tmp_path: Path, form: str, optimizer: str) -> None:
    model, layout = opened(pruned("llama", tmp_path))
    settings: dict[str, Any] = {"parameters": form, "optimizer": optimizer, "subspace": 4, "eps": 1e-3}
    trained = Trained(model, layout, recipe(**settings))
    steps = ZerothOrder(trained)
    steps.take(1, 3.0, 1.0)  # away from the start, where the gradient of A is zero
    objective = Objective(model, make_text(), TokenLoss(0.0), None, 4, scratch_factory(None, torch.float32))
    numbers = [0, 1, 2, 3]
    before = live(trained)
    slope = steps.slope(objective.losses(numbers, steps.variants(2)).sum(1) / objective.counts(numbers).sum())
    assert all(torch.equal(value, before[name]) for name, value in live(trained).items())
    along = 0.0

    def collect(index: int, layer: torch.nn.Module, gradients: dict[str, Tensor]) -> None:
        nonlocal along
        parameters = trained.parameters(index, layer)
        prefix = f"{model.layers_name}.{index}."
        found = parameters.chain({model.source(prefix + name): gradient for name, gradient in gradients.items()})
        drawn = steps.directions.of(2, parameters)
        along += sum(float((found[name] * each).sum()) for name, each in drawn.items())

    objective.gradient(numbers, trained.values, collect)
    assert slope == pytest.approx(along, rel=0.02, abs=2e-3)


@pytest.mark.parametrize("optimizer", ["mezo", "subzero"])
@pytest.mark.parametrize("form", ["full", "lora", "spp", "norms"])
def test_three_numbers_a_step_give_the_same_tensors_again(tmp_path: Path, form: str, optimizer: str) -> None:
    model, layout = opened(pruned("gpt2", tmp_path, torch.bfloat16, two_four=True))
    settings = recipe(parameters=form, optimizer=optimizer, subspace=4, refresh=2, decay=0.1)
    first, again = (Trained(model, layout, settings) for _ in range(2))
    lines = [(1, 2.5, 1.0), (2, None, 1.0), (3, -1.25, 0.5), (4, 0.1, 0.25), (5, 4.0, 0.1)]
    steps = ZerothOrder(first)
    for step, slope, factor in lines:
        for index in reversed(range(len(first))):
            with model.layer(index) as layer:
                for values in steps.variants(step)(index, layer):
                    for name, value in values.items():
                        if value.ndim == 2:
                            assert torch.equal(value != 0, layer.get_parameter(name) != 0)
                steps.update(index, layer, step, slope, factor)
    replayed = ZerothOrder(again)
    for step, slope, factor in lines:
        replayed.take(step, slope, factor)
    assert first.tensors().keys() == again.tensors().keys()
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in first.tensors().items())
    result = written(first)
    assert result
    for name, tensor in result.items():
        if tensor.ndim == 2:
            assert torch.equal(tensor == 0, model.checkpoint.read(name) == 0)


def forward_only(folder: Path, marked: float, **settings: Any) -> ForwardOnly:
    model, layout = opened(folder)
    trained = Trained(model, layout, recipe(parameters="full", **settings))
    text = make_text(marked=marked)
    return ForwardOnly(trained, Objective(model, text, TokenLoss(0.0), None, 4, scratch_factory(None, torch.float32)))


def masters(trained: Trained) -> dict[str, Tensor]:
    """All trained tensors, copied, by name in the checkpoint."""
    found: dict[str, Tensor] = {}
    for index in range(len(trained)):
        with trained.model.layer(index) as layer:
            parameters = trained.parameters(index, layer)
            found |= {name: master.detach().clone() for name, master in parameters.masters.items()}
    return found


@pytest.mark.parametrize("optimizer", ["mezo", "subzero"])
def test_a_step_is_that_of_the_losses_of_two_whole_models(tmp_path: Path, optimizer: str) -> None:
    """theta (1 - rate decay) - rate g z, with g from losses per token by transformers; vectors do not decay."""
    eps, rate, decay = 0.01, 0.01 * 0.5, 4.0
    settings: dict[str, Any] = {"optimizer": optimizer, "subspace": 4, "eps": eps, "lr": 0.01, "decay": decay}
    steps = forward_only(pruned("llama", tmp_path), 0.5, seed=5, **settings)
    trained, before = steps.trained, masters(steps.trained)
    z, other = {}, {}
    for index in range(len(trained)):
        with trained.model.layer(index) as layer:
            for seed, drawn in ((5, z), (6, other)):
                directions = Directions(seed, 4 if optimizer == "subzero" else None)
                drawn.update(directions.of(1, trained.parameters(index, layer)))
    assert z.keys() == before.keys()
    assert not any(torch.equal(each, other[name]) for name, each in z.items())
    text, windows = steps.objective.text, [2, 0, 3]
    tokens, counted = text.tokens[windows], text.marks[windows][:, 1:]
    assert 0 < int(counted.sum()) < counted.numel()
    model = whole(tmp_path).double()
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in before}
    survive = {name: parameter != 0 for name, parameter in parameters.items()}
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            for name, parameter in parameters.items():
                where = survive[name] if parameter.ndim == 2 else ...
                parameter.copy_(start[name])
                parameter[where] += sign * eps * z[name]
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
            losses.append(float(cross_entropy(logits[counted], tokens[:, 1:][counted])))
    slope = (losses[0] - losses[1]) / (2 * eps)
    result = steps.step(1, windows, 0.5)
    assert (result.loss, result.size) == pytest.approx((sum(losses) / 2, slope), rel=5e-3)
    after = masters(trained)
    for name, theta in before.items():
        shrunk = theta * (1 - rate * decay) if start[name].ndim == 2 else theta
        torch.testing.assert_close(after[name], shrunk - rate * slope * z[name], rtol=0, atol=5e-3 * rate * abs(slope))


def test_steps_lower_the_training_loss(tmp_path: Path) -> None:
    steps, windows = forward_only(pruned("llama", tmp_path), 1.0, optimizer="mezo", lr=1e-3), [0, 1, 2, 3]
    before = steps.losses(windows).sum()
    for number in range(1, 31):
        steps.step(number, windows, 1.0)
    assert float(steps.losses(windows).sum()) < 0.99 * float(before)


def test_a_slope_that_is_not_finite_is_none() -> None:
    class Holder:
        recipe = recipe(optimizer="mezo", eps=0.5)

    steps = ZerothOrder(Holder())  # type: ignore[arg-type]
    assert steps.slope(torch.tensor([2.0, 1.0])) == 1.0
    assert steps.slope([math.nan, 1.0]) is None
    assert steps.slope([math.inf, 1.0]) is None

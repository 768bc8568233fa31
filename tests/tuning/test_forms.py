"""Forms against autograd in fp64, published formulas and torch's own optimizer."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fistapruner.recipes.align_settings import AlignRecipe
from fistapruner.recipes.recover_settings import RecoverRecipe
from fistapruner.tuning.adamw import Patience, Verdict, adamw_step, check_due, schedule
from fistapruner.tuning.forms import Form, Full, Hira, Lora, Spp, WholeMatrix, first_rate, form_of
from fistapruner.tuning.masked import MaskedParameters

FORMS: dict[str, Form] = {
    "dense": WholeMatrix(),
    "full": Full(),
    "lora": Lora(3, 2.0),
    "spp": Spp(3, 2.0),
    "hira": Hira(3),
}


def matrix(m: int, n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator)
    return weight * (torch.rand(m, n, generator=generator) < 0.5)


def drawn(form: Form, weight: Tensor, seed: int = 1) -> dict[str, Tensor]:
    """Trained tensors of the form away from their start."""
    start = form.start(weight.float(), weight != 0, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    return {
        name: value.to(weight.dtype) + 0.3 * torch.randn(value.shape, generator=generator, dtype=weight.dtype)
        for name, value in start.items()
    }


@pytest.mark.parametrize("name", FORMS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    form, weight = FORMS[name], matrix(5, 4).double()
    trained = drawn(form, weight)
    names = list(trained)

    def effective(*values: Tensor) -> Tensor:
        return form.weight(weight, weight != 0, dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(effective, [trained[key].requires_grad_() for key in names])


@pytest.mark.parametrize("shape", [(12, 8), (7, 5), (2, 9)])
@pytest.mark.parametrize("name", FORMS)
def test_the_start_is_the_weight_and_zeros_stay(name: str, shape: tuple[int, int]) -> None:
    form, weight = FORMS[name], matrix(*shape)
    start = form.start(weight, weight != 0, torch.Generator().manual_seed(0))
    assert tuple(start) == form.names
    assert form.numbers(*shape, int((weight != 0).sum())) == sum(value.numel() for value in start.values())
    assert torch.equal(form.weight(weight, weight != 0, start), weight)
    moved = form.weight(weight, weight != 0, drawn(form, weight))
    assert torch.equal(moved != 0, weight != 0)
    assert not torch.equal(moved, weight)


def test_spp_is_its_published_product() -> None:
    m, n, r, c = 12, 8, 3, 2.0
    weight, x = matrix(m, n).double(), torch.randn(5, n, dtype=torch.float64)
    trained = drawn(Spp(r, c), weight)
    # Two products (arXiv 2405.16057): x W^T + c (x (W * rep(A))^T) * b, A's rows repeated for m / r outputs.
    change = x @ (weight * trained["A"].repeat_interleave(m // r, 0)).T
    expected = x @ weight.T + c * change * trained["b"].T
    torch.testing.assert_close(x @ Spp(r, c).weight(weight, weight != 0, trained).T, expected)


@pytest.mark.parametrize("m", [12, 7])
def test_spp_is_hira(m: int) -> None:
    weight, form = matrix(m, 8), Spp(3, 2.0)
    trained = drawn(form, weight)
    hira = form.as_hira(trained)
    for output in range(m):
        block = output * 3 // m
        expected = torch.zeros(3)
        expected[block] = 2.0 * trained["b"][output, 0]
        assert torch.equal(hira["B"][output], expected)
    assert torch.equal(form.weight(weight, weight != 0, trained), Hira(3).weight(weight, weight != 0, hira))


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(33, 17), (64, 48), (1, 5)])
def test_adamw_on_survivors_has_the_bits_of_torch_on_the_masked_matrix(shape: tuple[int, int], decay: float) -> None:
    weight, generator = matrix(*shape), torch.Generator().manual_seed(3)
    mask = weight != 0
    dense = torch.nn.Parameter(weight.clone())
    oracle = torch.optim.AdamW([dense], betas=(0.9, 0.95), weight_decay=decay, foreach=False, fused=False)
    values = weight[mask]
    first, second = torch.zeros_like(values), torch.zeros_like(values)
    for step in range(1, 51):
        gradient = torch.randn(shape, generator=generator)
        oracle.param_groups[0]["lr"] = rate = 0.01 * schedule(step, 50)
        dense.grad = gradient * mask
        oracle.step()
        adamw_step(values, gradient[mask], first, second, step, rate, (0.9, 0.95), decay)
        assert torch.equal(dense.detach()[mask], values)
        assert not dense.detach()[~mask].any()


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_masters_are_those_of_one_differentiable_pass(name: str, transposed: bool) -> None:
    weight = matrix(6, 8)
    tensors = {"w": weight.T.contiguous() if transposed else weight.clone(), "v": torch.ones(4)}
    parameters = MaskedParameters(tensors, ["w"], FORMS[name], transposed=["w"] if transposed else [])
    for key, master in parameters.masters.items():
        master.data.add_(0.1 * torch.randn(master.shape, generator=torch.Generator().manual_seed(len(key))))
    gradients = {key: torch.randn(tensor.shape) for key, tensor in tensors.items()}
    exact = parameters.exact()
    sum((exact[key] * gradients[key]).sum() for key in tensors).backward()  # type: ignore[union-attr]
    chained = parameters.chain(gradients)
    for key, master in parameters.masters.items():
        assert master.grad is not None
        torch.testing.assert_close(chained[key], master.grad)
    assert all(not gradient.any() for key, gradient in parameters.chain({"v": gradients["v"]}).items() if key != "v")


@pytest.mark.parametrize("name", FORMS)
def test_a_survivor_that_rounds_to_zero_keeps_its_start_value(name: str) -> None:
    weight = 0.01 * matrix(32, 24)
    parameters = MaskedParameters({"w": weight}, ["w"], FORMS[name])
    for master in parameters.masters.values():
        master.data.add_(0.001)

    def rounding(_: str, value: Tensor) -> Tensor:
        return value.to(torch.float8_e4m3fn)

    exact = parameters.exact()["w"].detach()
    lost = (exact.to(torch.float8_e4m3fn).float() == 0) & (weight != 0)
    assert 0.01 < float(lost.float().mean()) < 0.2
    values = parameters.rounded(rounding)["w"]
    assert torch.equal(values != 0, weight != 0)
    assert torch.equal(values[lost], weight[lost])
    assert torch.equal(values[~lost], exact.to(torch.float8_e4m3fn).float()[~lost])


def recipe(**settings: Any) -> RecoverRecipe:
    return RecoverRecipe.build(settings)


def test_automatic_rates() -> None:
    assert first_rate(recipe(), 576, 576, 0.1) == 2e-3
    assert first_rate(recipe(parameters="full"), None, 576, 0.1) == pytest.approx(5e-5)
    assert first_rate(recipe(parameters="spp"), 576, 576, 0.1) == pytest.approx(0.0096)
    assert first_rate(recipe(parameters="spp"), 4096, 4096, 0.1) == pytest.approx(0.0256)
    assert first_rate(recipe(parameters="hira"), 576, 576, 0.1) == pytest.approx(0.0048)
    assert first_rate(recipe(lr=4e-3), 576, 576, 0.1) == 4e-3
    assert first_rate(recipe(lr=4e-3), None, 576, 0.1) == pytest.approx(2 * 5e-4 * 0.1)
    assert first_rate(recipe(parameters="full", lr=1e-3), None, 576, 0.1) == pytest.approx(1e-4)
    assert first_rate(recipe(parameters="full", lr=1e-3, lr_unit="absolute"), None, 576, 0.1) == 1e-3
    assert first_rate(recipe(parameters="full", optimizer="mezo"), None, 576, 0.1) == 1e-6
    assert first_rate(recipe(parameters="full", optimizer="mezo", lr=1e-5), None, 576, 0.1) == 1e-5
    assert first_rate(recipe(parameters="full", optimizer="mezo", lr=0.01, lr_unit="share"), None, 576, 0.1) == 1e-3
    assert form_of(recipe(parameters="norms")) is None
    assert form_of(recipe(rank=4)) == Lora(4, 2.0)


@pytest.mark.parametrize("form", ["full", "lora", "spp", "hira"])
def test_automatic_rates_of_an_alignment_are_a_twentieth(form: str) -> None:
    align = AlignRecipe.build({"data": {"pairs": "pairs.jsonl"}, "parameters": form})
    for columns in (576, None) if form != "full" else (None,):
        expected = first_rate(recipe(parameters=form), columns, 576, 0.1) / 20
        assert first_rate(align, columns, 576, 0.1) == pytest.approx(expected)


@pytest.mark.parametrize("form", ["spp", "hira"])
def test_the_automatic_rate_aims_at_the_first_change(form: str) -> None:
    weight, settings = torch.ones(64, 4096), recipe(parameters=form, rank=8)
    made = form_of(settings)
    assert made is not None
    trained = made.start(weight, weight != 0, torch.Generator().manual_seed(0))
    # Adam's first step moves every entry by the learning rate; that of B or b alone changes the weight.
    moved = "b" if form == "spp" else "B"
    signs = torch.randn(trained[moved].shape, generator=torch.Generator().manual_seed(1)).sign()
    trained[moved] += first_rate(settings, 4096, 4096, 0.1) * signs
    change = (made.weight(weight, weight != 0, trained) - 1).abs().mean()
    assert float(change) == pytest.approx(4e-4, rel=0.1)


def test_schedules() -> None:
    for kind in ("cosine", "linear", "constant"):
        factors = [schedule(step, 100, 0.1, kind) for step in range(1, 101)]  # type: ignore[arg-type]
        assert factors[:10] == pytest.approx([step / 10 for step in range(1, 11)])
        assert all(later <= before for before, later in itertools.pairwise(factors[9:]))
        assert factors[-1] == (1.0 if kind == "constant" else pytest.approx(0.0, abs=0.02))
        assert min(factors) > 0
    assert schedule(1, 10, 0.0) == 1.0
    assert schedule(55, 100, 0.1) == pytest.approx(0.5 * (1 + math.cos(math.pi * 45 / 91)))
    assert [step for step in range(1, 21) if check_due(step, 20, 4)] == [5, 10, 15, 20]


def test_there_are_as_many_checks_as_were_asked_for() -> None:
    assert [step for step in range(1, 126) if check_due(step, 125, 4)] == [31, 62, 93, 125]
    for steps, checks in itertools.product(range(1, 70), range(1, 12)):
        due = [step for step in range(1, steps + 1) if check_due(step, steps, checks)]
        assert due == sorted({number * steps // checks for number in range(1, checks + 1)} - {0})
        assert len(due) == min(steps, checks)  # the plan counts so many


def test_patience() -> None:
    patience = Patience.begin(5.0)
    assert patience.check(1, 4.0) is Verdict.BETTER
    assert (patience.best, patience.best_step, patience.rate) == (4.0, 1, 1.0)
    assert patience.check(2, 4.0) is Verdict.BACK
    assert patience.check(3, float("nan")) is Verdict.BACK
    assert patience.check(4, 3.0) is Verdict.BETTER
    assert patience.rate == pytest.approx(0.09)
    assert [patience.check(step, 9.0) for step in (5, 6)] == [Verdict.BACK, Verdict.STOP]
    assert (patience.best, patience.best_step) == (3.0, 4)
    small = Patience.begin(5.0, 1e-3)  # it stops below a share of the first rate, whatever that is
    assert [small.check(step, 9.0) for step in range(4)] == [Verdict.BACK] * 3 + [Verdict.STOP]
    calm = Patience.begin(5.0, on=False)
    assert [calm.check(step, 9.0) for step in range(9)] == [Verdict.WORSE] * 9
    assert calm.rate == 1.0

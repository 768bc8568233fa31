"""Loss and gradients layer by layer, against autograd on the whole model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM

import tiny
from fistapruner.activations.store import scratch_factory
from fistapruner.calibration.training_text import TrainingText
from fistapruner.errors import FistaPrunerError
from fistapruner.models.files.checkpoint import Checkpoint
from fistapruner.models.layerwise import LayerwiseModel
from fistapruner.runtime.numerics import Budgets
from fistapruner.tuning.losses import TokenLoss
from fistapruner.tuning.objective import Objective
from fistapruner.tuning.teacher import Teacher

WINDOWS, SEQLEN = 4, 24
EVERYTHING = sorted(tiny.ARCHITECTURES)


def make_text(windows: int = WINDOWS, seqlen: int = SEQLEN, marked: float = 1.0) -> TrainingText:
    generator = torch.Generator().manual_seed(3)
    return TrainingText(
        tokens=torch.randint(3, tiny.VOCABULARY, (windows, seqlen), generator=generator),
        marks=torch.rand(windows, seqlen, generator=generator) < marked,
        held_out=torch.zeros(windows, dtype=torch.bool),
        task=torch.zeros(windows, dtype=torch.int64),
        tasks=("text",),
        facts={},
    )


def opened(folder: Path, dtype: torch.dtype | None = None) -> LayerwiseModel:
    return LayerwiseModel(Checkpoint.open(folder), torch.device("cpu"), dtype)


def whole(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def everything(index: int, layer: nn.Module) -> dict[str, Tensor]:
    """All parameters of a layer, as values to train."""
    return {name: parameter.detach() for name, parameter in layer.named_parameters()}


def gradients_of(objective: Objective, numbers: list[int], values: Any = everything) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by the parameter's name in the model."""
    found: dict[str, Tensor] = {}
    seen: list[int] = []

    def update(index: int, layer: nn.Module, gradients: dict[str, Tensor]) -> None:
        assert not any(parameter.is_meta for parameter in layer.parameters())
        seen.append(index)
        found.update({f"{objective.model.layers_name}.{index}.{name}": grad for name, grad in gradients.items()})

    loss = objective.gradient(numbers, values, update)
    assert seen == list(reversed(range(len(objective.model))))
    return loss, found


def autograd(model: Any, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor], check: Callable[[Tensor, Tensor], None]) -> None:
    assert ours
    for name, grad in ours.items():
        assert grad.dtype == torch.float32
        check(grad, theirs.get(name, torch.zeros_like(grad)))


def identical(a: Tensor, b: Tensor) -> None:
    assert torch.equal(a, b)


def close(a: Tensor, b: Tensor) -> None:
    # The gradient of a key bias is zero but for rounding.
    assert float((a - b).norm()) <= 1e-5 * float(b.norm()) + 1e-8


@pytest.mark.parametrize("architecture", EVERYTHING)
def test_gradients_are_those_of_the_whole_model(tmp_path: Path, architecture: str) -> None:
    folder = tiny.save(architecture, tmp_path / "model")
    text = make_text()
    numbers = [2, 0, 3]
    tokens = text.tokens[numbers]
    model = whole(folder)
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    loss = cross_entropy(logits.reshape(-1, tiny.VOCABULARY), tokens[:, 1:].reshape(-1))
    expected = autograd(model, loss)
    for batch_size, check in ((3, identical), (2, close)):
        objective = Objective(
            opened(folder), text, TokenLoss(0.0), None, batch_size, scratch_factory(None, torch.float32)
        )
        value, found = gradients_of(objective, numbers)
        assert value == pytest.approx(loss.item(), rel=1e-6)
        compare(found, expected, check)
    assert len(found) == sum(1 for layer in objective.model.layers for _ in layer.named_parameters())
    assert all(parameter.is_meta for parameter in objective.model.model.parameters())


def of_experts(name: str, theirs: dict[str, Tensor], *, transposed: bool) -> Tensor:
    """The part of an expert's matrix or bias in the gradient of a tensor of all experts."""
    mixture, number, part, kind = name.rsplit(".", 3)
    halves = {"gate_proj": 0, "up_proj": 1}
    if part in halves:
        return theirs[f"{mixture}.gate_up_proj"][int(number)].chunk(2)[halves[part]]
    whole = theirs[f"{mixture}.{part}{'_bias' if kind == 'bias' else ''}"][int(number)]
    return whole.T if transposed and kind == "weight" else whole


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [*((architecture, {}) for architecture in tiny.MIXTURES), ("qwen3_moe", {"num_experts": 64})],
)
def test_gradients_of_mixtures_are_those_of_the_whole_model(
    tmp_path: Path, architecture: str, changes: dict[str, int]
) -> None:
    """Also of experts that no token reaches: zero."""
    folder = tiny.save(architecture, tmp_path / "model", **changes)
    text = make_text()
    tokens, model = text.tokens[[1, 3]], whole(folder)
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    loss = cross_entropy(logits.reshape(-1, tiny.VOCABULARY), tokens[:, 1:].reshape(-1))
    theirs = autograd(model, loss)
    transposed = architecture == "gpt_oss"
    for keep in (False, True):
        objective = Objective(
            opened(folder), text, TokenLoss(0.0), None, 2, scratch_factory(None, torch.float32), keep_graphs=keep
        )
        value, found = gradients_of(objective, [1, 3])
        assert value == pytest.approx(loss.item(), rel=1e-6)
        assert sum(".experts." in name for name in found) >= 4 * 2
        assert all(bool(grad.any()) for name, grad in found.items() if name.endswith("proj.weight")) != bool(changes)
        for name, grad in found.items():
            wanted = of_experts(name, theirs, transposed=transposed) if ".experts." in name else theirs[name]
            close(grad, wanted)


def teacher_of(folder: Path, text: TrainingText, blocks: Path, **settings: Any) -> Teacher:
    return Teacher(opened(folder), text.tokens, blocks, batch_size=2, **settings)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False}),
        ("gemma2", {"final_logit_softcapping": 2.0}),  # strongly capped
        ("opt", {}),
    ],
)
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_divergence_is_that_of_the_whole_models(
    tmp_path: Path, architecture: str, changes: dict[str, Any], share: float
) -> None:
    dense = tiny.save(architecture, tmp_path / "dense", seed=1, **changes)
    folder = tiny.save(architecture, tmp_path / "model", seed=2, **changes)
    text = make_text(marked=0.7)
    numbers = [3, 1]
    tokens, where = text.tokens[numbers], text.marks[numbers][:, 1:]
    model = whole(folder)
    own = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()[where].log_softmax(-1)
    with torch.no_grad():
        wanted = whole(dense)(input_ids=tokens, use_cache=False).logits[:, :-1].float()[where].log_softmax(-1)
    kl = kl_div(own, wanted, log_target=True, reduction="batchmean")
    ce = -own.gather(1, tokens[:, 1:][where][:, None]).mean()
    loss = share * kl + (1 - share) * ce
    expected = autograd(model, loss)
    teacher = teacher_of(dense, text, tmp_path / "teacher")
    budgets = Budgets(head=2 * 4 * tiny.VOCABULARY * 7, rows=4 * tiny.VOCABULARY * 3)  # slices of 7 and 3 tokens
    for some in (Budgets(), budgets):
        objective = Objective(
            opened(folder), text, TokenLoss(share), teacher, 2, scratch_factory(None, torch.float32), budgets=some
        )
        value, found = gradients_of(objective, numbers)
        assert value == pytest.approx(loss.item(), rel=1e-6)
        compare(found, expected, close)
        sums = objective.losses(numbers, lambda index, layer: [{}])
        assert sums.dtype == torch.float64
        assert float(sums.sum() / objective.counts(numbers).sum()) == pytest.approx(loss.item(), rel=1e-6)


def test_only_marked_tokens_carry_loss(tmp_path: Path) -> None:
    """The sums of windows are those of their marked tokens; a window without any has no loss."""
    folder = tiny.save("llama", tmp_path / "model")
    text = make_text(marked=0.3)
    text.marks[1] = False
    text.marks[2] = False
    text.marks[2, 0] = True  # nothing predicts the first token
    numbers = list(range(WINDOWS))
    objective = Objective(opened(folder), text, TokenLoss.named("ce"), None, 3, scratch_factory(None, torch.float32))
    sums = objective.losses(numbers, lambda index, layer: [{}])
    with torch.no_grad():
        logits = whole(folder)(input_ids=text.tokens, use_cache=False).logits[:, :-1].float()
    each = cross_entropy(logits.transpose(1, 2), text.tokens[:, 1:], reduction="none") * text.marks[:, 1:]
    torch.testing.assert_close(sums[0], each.double().sum(1), rtol=1e-5, atol=1e-6)
    assert objective.counts(numbers).tolist() == text.marks[:, 1:].sum(1).tolist()
    assert sums[0, 1] == sums[0, 2] == 0
    value, found = gradients_of(objective, [1, 2])
    assert value == 0
    assert all(not bool(grad.any()) for grad in found.values())


def moved(amount: float) -> Any:
    """Values that differ from the checkpoint's weights, some parameters only."""

    def values(index: int, layer: nn.Module) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {
            name: parameter + amount * torch.randn(parameter.shape, generator=generator)
            for name, parameter in everything(index, layer).items()
            if "mlp" in name or "norm" in name
        }

    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resident_layers_and_stores_on_disk_give_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    dense = tiny.save("gemma2", tmp_path / "dense", seed=1, dtype=dtype)
    folder = tiny.save("gemma2", tmp_path / "model", seed=2, dtype=dtype)
    text = make_text()
    numbers = [0, 3, 1]

    def measured(on_disk: bool, resident: bool = False) -> tuple[float, dict[str, Tensor], Tensor]:
        teacher = Teacher(opened(dense, dtype), text.tokens, tmp_path / "teacher", batch_size=2)
        store = scratch_factory(tmp_path if on_disk else None, dtype)
        objective = Objective(opened(folder, dtype), text, TokenLoss(0.5), teacher, 2, store)

        def values(index: int, layer: nn.Module) -> dict[str, Tensor]:
            return {name: value.to(dtype) for name, value in moved(0.05)(index, layer).items()}

        def both() -> tuple[float, dict[str, Tensor], Tensor]:
            result = gradients_of(objective, numbers, values)
            return *result, objective.losses(numbers, lambda index, layer: [values(index, layer), {}])

        if not resident:
            return both()
        with objective.resident():
            both()
            return both()

    value, found, sums = measured(on_disk=False)
    assert not torch.equal(sums[0], sums[1])
    for other in (measured(True), measured(False, resident=True)):
        assert other[0] == value
        assert torch.equal(other[2], sums)
        assert other[1].keys() == found.keys()
        compare(other[1], found, identical)
    assert not list(tmp_path.glob("hidden-*")) + list(tmp_path.glob("gradient"))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "opt", "falcon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_graphs_give_the_same_bits(tmp_path: Path, architecture: str, dtype: torch.dtype) -> None:
    folder = tiny.save(architecture, tmp_path / "model", dtype=dtype)
    text = make_text(marked=0.8)

    def measured(**settings: bool) -> tuple[float, dict[str, Tensor]]:
        model = opened(folder, dtype)
        objective = Objective(model, text, TokenLoss(0.0), None, 2, scratch_factory(None, dtype), **settings)
        result = gradients_of(objective, [2, 0, 3])
        assert all(parameter.is_meta for parameter in model.model.parameters())
        return result

    (value, found), (expected_value, expected) = measured(keep_graphs=True), measured()
    assert value == expected_value
    assert found.keys() == expected.keys()
    compare(found, expected, identical)


def test_gradients_do_not_underflow_in_fp16(tmp_path: Path) -> None:
    """Those of a mean over many tokens would: they are computed of a sum."""
    folder = tiny.save("llama", tmp_path / "model", dtype=torch.float16)
    text = make_text(windows=40, seqlen=100)
    numbers = list(range(40))
    found, expected = (
        gradients_of(
            Objective(opened(folder, dtype), text, TokenLoss(0.0), None, 8, scratch_factory(None, dtype)), numbers
        )[1]
        for dtype in (torch.float16, torch.float32)
    )
    for name, grad in found.items():
        assert float((grad - expected[name]).norm()) < 0.005 * float(expected[name].norm())


def test_values_take_the_place_of_parameters(tmp_path: Path) -> None:
    """Losses and gradients are those of a whole model with the values written into it; variants do not mix."""
    folder = tiny.save("qwen3", tmp_path / "model")
    text = make_text()
    numbers = [1, 2, 0]
    tokens = text.tokens[numbers]
    objective = Objective(opened(folder), text, TokenLoss(0.0), None, 3, scratch_factory(None, torch.float32))
    sums = objective.losses(numbers, lambda index, layer: (moved(amount)(index, layer) for amount in (0.1, 0.0, -0.1)))
    assert sums.shape == (3, 3)
    for row, amount in zip(sums, (0.1, 0.0, -0.1), strict=True):
        model = whole(folder)
        for index, layer in enumerate(model.model.layers):
            layer.load_state_dict({**everything(index, layer), **moved(amount)(index, layer)})
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        each = cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        torch.testing.assert_close(row, each.detach().double().sum(1), rtol=1e-6, atol=1e-6)
        expected = autograd(model, each.mean())
        _, found = gradients_of(objective, numbers, moved(amount))
        compare(found, expected, close)
        assert found
        assert all("mlp" in name or "norm" in name for name in found)


def test_gradients_of_several_passes_are_added_in_fp32(tmp_path: Path) -> None:
    """In bf16 passes, too: the mean of the passes' own gradients, with no bit lost."""
    folder = tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16)
    model = opened(folder, torch.bfloat16)
    objective = Objective(model, make_text(), TokenLoss(0.0), None, 1, scratch_factory(None, torch.bfloat16))
    both, first, second = (gradients_of(objective, numbers)[1] for numbers in ([1, 2], [1], [2]))
    for name, grad in both.items():
        assert first[name].dtype == torch.float32
        assert torch.equal(grad, first[name] / 2 + second[name] / 2)
        assert not torch.equal(grad, grad.bfloat16().float())


def test_a_loss_that_is_not_finite_has_no_gradient(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    objective = Objective(opened(folder), make_text(), TokenLoss(0.0), None, 2, scratch_factory(None, torch.float32))

    def broken(index: int, layer: nn.Module) -> dict[str, Tensor]:
        return {"mlp.up_proj.weight": torch.full((48, 32), torch.nan)}

    def update(index: int, layer: nn.Module, gradients: dict[str, Tensor]) -> None:
        raise AssertionError

    for objective.keep_graphs in (False, True):
        assert math.isnan(objective.gradient([0, 1], broken, update))


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    dense = tiny.save("llama", tmp_path / "dense", vocab_size=160)
    text = make_text()
    teacher = teacher_of(dense, text, tmp_path / "teacher")
    with pytest.raises(FistaPrunerError, match=r"128 tokens .* 160"):
        Objective(opened(folder), text, TokenLoss(1.0), teacher, 2, scratch_factory(None, torch.float32))


def test_equal_ends_of_two_models_are_in_memory_once(tmp_path: Path) -> None:
    dense = tiny.save("llama", tmp_path / "dense", seed=1)
    other = tiny.save("llama", tmp_path / "other", seed=2)
    first, second, third = opened(dense), opened(dense), opened(other)
    with first.resident(), second.resident(layers=False, like=first), third.resident(layers=False, like=first):
        places = [m.model.get_input_embeddings().weight.data_ptr() for m in (first, second, third)]
        assert places[0] == places[1] != places[2]
        assert all(parameter.is_meta for parameter in second.layers[0].parameters())
        assert not any(parameter.is_meta for parameter in first.model.parameters())
        with first.layer(1), pytest.raises(ValueError, match="layer 0"), first.layer(0, {"x": torch.zeros(1)}):
            pass
        assert not first.layers[1].mlp.up_proj.weight.is_meta
    for model in (first, second, third):
        assert all(parameter.is_meta for parameter in model.model.parameters())

"""Loss and gradients of windows, against autograd on the whole model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM

import tiny
from fistapruner.models.checkpoint import Checkpoint
from fistapruner.models.layers import LayerwiseModel
from fistapruner.models.operators import discover
from fistapruner.runtime.numerics import Budgets
from fistapruner.settings.train import RecoverRecipe
from fistapruner.text.training import TrainingText
from fistapruner.training.loss import Objective, Teacher
from fistapruner.training.masked import Trained

WINDOWS, SEQLEN = 4, 24


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
    model = LayerwiseModel(Checkpoint.open(folder), torch.device("cpu"), dtype)
    model.check()
    return model


def whole(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def close(a: Tensor, b: Tensor) -> None:
    # The gradient of a key bias is zero but for rounding.
    assert float((a - b).norm()) <= 1e-5 * float(b.norm()) + 1e-8


ONE_BY_ONE = [name for name in sorted(tiny.ARCHITECTURES) if "moe" not in name]


@pytest.mark.parametrize("architecture", ONE_BY_ONE)
def test_gradients_are_those_of_the_whole_model(tmp_path: Path, architecture: str) -> None:
    """Of every operator, norm and bias; in one pass, in two, and with layers that run twice."""
    folder, text, numbers = tiny.save(architecture, tmp_path / "model"), make_text(), [2, 0, 3]
    tokens, reference = text.tokens[numbers], whole(folder)
    logits = reference(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    loss = cross_entropy(logits.reshape(-1, tiny.VOCABULARY), tokens[:, 1:].reshape(-1))
    expected = gradients(reference, loss)
    model, passes, found = opened(folder, torch.float32), ((3, False), (3, True), (2, False)), []
    with model.resident():
        trained = Trained(model, discover(model), RecoverRecipe.build({"parameters": "full"}))
        for batch_size, again in passes:
            objective = Objective(model, trained.run, text, 0.0, None, batch_size, checkpointing=again)
            assert objective.backward(numbers) == pytest.approx(loss.item(), rel=1e-6)
            named = ((key.replace("/", "."), each.grad) for key, each in trained.parameters.items())
            found.append({name: gradient for name, gradient in named if gradient is not None})
            for each in trained.parameters.values():
                each.grad = None
    assert found[0]
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name])
        for one in (gradient, found[2][name]):
            if name in expected:
                turned = architecture == "gpt2" and one.ndim == 2  # whose layers hold weights as (inputs, outputs)
                close(one.T if turned else one, expected[name])
    assert any(name in expected for name in found[0])


@pytest.mark.parametrize(("share", "marked"), [(1.0, 0.5), (0.3, 1.0)])
def test_divergence_from_the_dense_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, marked: float
) -> None:
    """Its last hidden states are stored; logits are computed in slices of few tokens."""
    folder = tiny.save("gemma2", tmp_path / "model")
    dense = tiny.save("gemma2", tmp_path / "dense", seed=1)
    text, numbers = make_text(marked=marked), [1, 3]
    tokens, where = text.tokens[numbers], text.marks[numbers][:, 1:]
    reference = whole(folder)
    logits, wanted = (each(input_ids=tokens).logits[:, :-1][where] for each in (reference, whole(dense)))
    kl = kl_div(logits.log_softmax(-1), wanted.detach().log_softmax(-1), log_target=True, reduction="sum")
    ce = cross_entropy(logits, tokens[:, 1:][where], reduction="sum")
    loss = (share * kl + (1 - share) * ce) / int(where.sum())
    expected = gradients(reference, loss)
    model = opened(folder, torch.float32)
    teacher = Teacher(opened(dense, torch.float32), text.tokens, tmp_path / "teacher", batch_size=2)
    monkeypatch.setattr("fistapruner.training.loss.BUDGETS", Budgets(head=2 * 4 * tiny.VOCABULARY * 7))
    with model.resident():
        trained = Trained(model, discover(model), RecoverRecipe.build({"parameters": "full"}))
        objective = Objective(model, trained.run, text, share, teacher, 2)
        with objective.resident():
            value = objective.backward(numbers)
            assert value == pytest.approx(loss.item(), rel=1e-5)
            total = float(objective.losses(numbers).sum() / text.counts[numbers].sum())
            assert total == pytest.approx(value, rel=1e-6)
        for name, each in trained.parameters.items():
            close(each.grad, expected[name.replace("/", ".")])


def test_predictions_are_kept_and_made_again_where_they_are_damaged(tmp_path: Path) -> None:
    dense, text, folder = opened(tiny.save("llama", tmp_path / "dense")), make_text(), tmp_path / "teacher"
    made = list[str]()

    def teacher(identity: str) -> Teacher:
        found = Teacher(dense, text.tokens, folder, 2, identity=identity, tick=lambda what, *_: made.append(what))
        for block in found.blocks:
            found.hidden(block[0])
        return found

    first = [teacher("a").hidden(window) for window in range(WINDOWS)]
    reference = whole(tmp_path / "dense")
    states = reference.model(text.tokens, output_hidden_states=True).hidden_states
    assert len(states) == len(dense) + 1
    count = len(made)
    assert all(torch.equal(teacher("a").hidden(window), first[window]) for window in range(WINDOWS))
    assert len(made) == count
    (folder / "00000.safetensors").write_bytes(b"damaged")
    assert torch.equal(teacher("a").hidden(0), first[0])
    assert len(made) == 2 * count
    teacher("b")
    assert len(made) == 3 * count

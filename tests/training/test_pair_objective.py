"""The loss of preference pairs, against autograd on the whole model and against TRL's numbers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_objective import gradients, opened, whole
from torch import Tensor
from torch.nn.functional import kl_div, logsigmoid

import tiny
from fistapruner.models.operators import discover
from fistapruner.papers.mrpo import margins_of
from fistapruner.settings.align import PairData
from fistapruner.settings.train import RecoverRecipe
from fistapruner.text.examples import read_pairs
from fistapruner.text.training import Pairs, tokenise_pairs
from fistapruner.training.loss import Objective, PairObjective, Teacher
from fistapruner.training.masked import Trained

TRL_PAIRS = [
    ("The sky is", " blue.", " green."),
    ("Two and two make", " four, as everybody knows.", " five."),
    ("To open a jar,", " turn the lid.", " paint the lid with a brush."),
    ("Ice is", " cold", " hot"),
]

BETA = 0.1


def make_pairs(folder: Path, pairs: list[tuple[str, str, str]]) -> Pairs:
    path = folder / "pairs.jsonl"
    names = ("prompt", "chosen", "rejected")
    path.write_text("".join(json.dumps(dict(zip(names, pair, strict=True))) + "\n" for pair in pairs))
    read = read_pairs(path)
    return tokenise_pairs(read, PairData(pairs=str(path)), tiny.tokenizer(), 96, lambda sentence: None)


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    return make_pairs(tmp_path, TRL_PAIRS)


def answers(folder: Path, pairs: Pairs, windows: list[int], batch_size: int = 4) -> Tensor:
    model = opened(folder, torch.float32)
    with model.resident():
        return -Objective(model, model.run, pairs, 0.0, None, batch_size).losses(windows).view(-1, 2)


def losses(folder: Path, pairs: Pairs, windows: list[int], **terms: Any) -> Tensor:
    model = opened(folder, torch.float32)
    with model.resident():
        return PairObjective(model, model.run, pairs, 0.0, None, 4, **terms).losses(windows)


def test_log_probabilities_do_not_depend_on_batch_or_padding(tmp_path: Path, pairs: Pairs) -> None:
    folder = tiny.save("llama", tmp_path / "model", num_hidden_layers=2)
    model, expected = whole(folder), []
    for window in range(8):
        tokens = pairs.tokens[window][None, : int(pairs.lengths[window])]
        with torch.no_grad():
            logs = model(input_ids=tokens).logits[:, :-1].log_softmax(-1)
        own = logs.gather(-1, tokens[:, 1:, None])[0, :, 0]
        expected.append(own[pairs.marks[window, 1 : tokens.shape[1]]].sum().double())
    for batch_size, order in ((2, [*range(8)]), (8, [*range(8)]), (4, [6, 7, 0, 1, 4, 5, 2, 3])):
        found = answers(folder, pairs, order, batch_size)
        assert torch.allclose(found, torch.stack([expected[window] for window in order]).view(-1, 2), atol=1e-4)


def test_loss_is_that_of_trl(tmp_path: Path, pairs: Pairs) -> None:
    """DPOTrainer of TRL 1.16.0 on the same two models and four pairs, beta 0.1; fixed numbers of its log."""
    policy = tiny.save("llama", tmp_path / "policy", num_hidden_layers=2, seed=0)
    reference = tiny.save("llama", tmp_path / "reference", num_hidden_layers=2, seed=1)
    own, theirs = (answers(folder, pairs, [*range(8)]) for folder in (policy, reference))
    assert own.mean(0).tolist() == pytest.approx([-67.25531768798828, -60.595645904541016], abs=1e-4)
    rewards = BETA * (own - theirs)
    assert rewards.mean(0).tolist() == pytest.approx([0.417417973279953, 0.3509760797023773], abs=1e-5)
    references = margins_of(theirs)[None], torch.ones(1, 4).double()
    found = losses(policy, pairs, [*range(8)], references=references, beta=BETA)
    assert float(found.sum() / 4) == pytest.approx(0.6940270066261292, abs=1e-6)
    at_start = margins_of(own)[None], torch.ones(1, 4).double()
    assert losses(policy, pairs, [*range(8)], references=at_start, beta=BETA)[::2].tolist() == [math.log(2)] * 4


def test_accuracy_counts_pairs(tmp_path: Path, pairs: Pairs) -> None:
    folder = tiny.save("llama", tmp_path / "model", num_hidden_layers=2)
    own = answers(folder, pairs, [*range(8)])
    found = losses(folder, pairs, [*range(8)], accuracy=True)
    assert found[::2].tolist() == (own[:, 0] <= own[:, 1]).double().tolist()


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize(("likelihood", "anchor"), [(0.0, 0.0), (0.5, 0.3)])
def test_gradients_are_those_of_the_whole_model(
    tmp_path: Path, pairs: Pairs, architecture: str, likelihood: float, anchor: float
) -> None:
    """All three terms, in passes of different sizes."""
    folder = tiny.save(architecture, tmp_path / "model", seed=0)
    dense = tiny.save(architecture, tmp_path / "dense", seed=1)
    numbers = [4, 5, 0, 1, 2, 3]
    margins = torch.tensor([[3.0, -20.0, 1.0, 0.0], [0.0, 9.0, -30.0, 0.0]], dtype=torch.float64)
    weights = torch.tensor([[0.3, 0.9, 0.5, 1.0], [0.7, 0.1, 0.5, 0.0]], dtype=torch.float64)
    expected, value = whole_gradients(folder, dense, pairs, numbers, (margins, weights), likelihood, anchor)
    teacher = None
    if anchor:
        teacher = Teacher(opened(dense, torch.float32), pairs.tokens, tmp_path / "teacher", batch_size=2)
    for batch_size in (2, 6):
        model = opened(folder, torch.float32)
        with model.resident():
            trained = Trained(model, discover(model), RecoverRecipe.build({"parameters": "full"}))
            terms = {"references": (margins, weights), "beta": BETA, "likelihood": likelihood, "anchor": anchor}
            objective = PairObjective(model, trained.run, pairs, 0.0, teacher, batch_size, **terms)
            with objective.resident():
                assert objective.backward(numbers) == pytest.approx(value, rel=1e-5)
                assert objective.losses(numbers)[1::2].tolist() == [0.0] * 3
            for name, each in trained.parameters.items():
                wanted = expected[name.replace("/", ".")]
                difference = float((each.grad - wanted).norm())
                assert difference <= 1e-4 * float(wanted.norm()) + 1e-7


def whole_gradients(
    folder: Path,
    dense: Path,
    pairs: Pairs,
    numbers: list[int],
    references: tuple[Tensor, Tensor],
    likelihood: float,
    anchor: float,
) -> tuple[dict[str, Tensor], float]:
    """Gradients of all three terms by autograd, one window at a time without padding."""
    model, wanted = whole(folder), whole(dense)
    total: Any = 0.0
    margins, weights = references
    for chosen in numbers[::2]:
        own = []
        for window in (chosen, chosen + 1):
            tokens = pairs.tokens[window][None, : int(pairs.lengths[window])]
            where = pairs.marks[window, 1 : tokens.shape[1]]
            logs = model(input_ids=tokens, use_cache=False).logits[0, :-1].float().log_softmax(-1)[where]
            own.append(logs.gather(-1, tokens[0, 1:][where][:, None]).sum())
            if window == chosen:
                count = int(where.sum())
                with torch.no_grad():
                    theirs = wanted(input_ids=tokens, use_cache=False).logits[0, :-1].float()[where]
                divergence = kl_div(logs, theirs.log_softmax(-1), log_target=True, reduction="sum")
        z = BETA * (own[0] - own[1] - margins[:, chosen // 2])
        total = total - (weights[:, chosen // 2] * logsigmoid(z)).sum() - likelihood * own[0] / count
        total = total + anchor * divergence / count
    loss = total / (len(numbers) // 2)
    return gradients(model, loss), float(loss.detach())

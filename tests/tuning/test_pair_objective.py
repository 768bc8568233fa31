"""The loss of preference pairs layer by layer, against autograd on the whole model and against TRL's numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_objective import autograd, compare, gradients_of, opened, whole
from torch import Tensor
from torch.nn.functional import kl_div, logsigmoid

import tiny
from fistapruner.activations.store import scratch_factory
from fistapruner.calibration.pairs import Pairs, read_pairs, tokenise_pairs
from fistapruner.recipes.align_settings import PairData
from fistapruner.tuning.losses import TopTokens
from fistapruner.tuning.pair_objective import DIVERGENCE, LIKELIHOOD, AnswerObjective, PairObjective, Preference
from fistapruner.tuning.preference import margins_of
from fistapruner.tuning.references import (
    ReferenceModel,
    answer_log_probabilities,
    log_probabilities_by_parts,
    reference_log_probabilities,
)
from fistapruner.tuning.teacher import Teacher

TRL_PAIRS = [
    ("The sky is", " blue.", " green."),
    ("Two and two make", " four, as everybody knows.", " five."),
    ("To open a jar,", " turn the lid.", " paint the lid with a brush."),
    ("Ice is", " cold", " hot"),
]

STORE = scratch_factory(None, torch.float32)
BETA = 0.1


def make_pairs(folder: Path, pairs: list[tuple[str, str, str]]) -> Pairs:
    path = folder / "pairs.jsonl"
    names = ("prompt", "chosen", "rejected")
    path.write_text("".join(json.dumps(dict(zip(names, pair, strict=True))) + "\n" for pair in pairs))
    read, _ = read_pairs(path)
    return tokenise_pairs(read, PairData(pairs=str(path)), tiny.tokenizer(), 96, lambda sentence: None)


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    return make_pairs(tmp_path, TRL_PAIRS)


def nothing(index: int, layer: Any) -> list[dict[str, Tensor]]:
    return [{}]


def log_probabilities(folder: Path, pairs: Pairs, windows: list[int]) -> Tensor:
    """Of the answers, by transformers, one window at a time without padding, differentiable."""
    model = whole(folder)
    found = []
    for window in windows:
        tokens = pairs.tokens[window][None, : int(pairs.lengths[window])]
        logs = model(input_ids=tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        own = logs.gather(-1, tokens[:, 1:, None])[0, :, 0]
        found.append(own[pairs.marks[window, 1 : tokens.shape[1]]].sum())
    return torch.stack(found).view(-1, 2)


def test_log_probabilities_do_not_depend_on_batch_or_padding(tmp_path: Path, pairs: Pairs) -> None:
    folder = tiny.save("llama", tmp_path / "model", num_hidden_layers=2)
    windows = list(range(8))
    with torch.no_grad():
        expected = log_probabilities(folder, pairs, windows).double()
    for batch_size, order in ((2, windows), (8, windows), (4, [6, 7, 0, 1, 4, 5, 2, 3])):
        objective = AnswerObjective(opened(folder), pairs, LIKELIHOOD, None, batch_size, STORE)
        (found,) = answer_log_probabilities(objective, order, nothing)
        assert torch.allclose(found, expected[[window // 2 for window in order[::2]]], atol=1e-4)
        by_parts = list(log_probabilities_by_parts(objective, order, nothing, 4))
        numbers = [number for part, _ in by_parts for number in part]
        assert sorted(numbers) == list(range(4))
        sums = torch.cat([part for _, part in by_parts])
        assert torch.allclose(sums, expected[numbers], atol=1e-4)
    with pytest.raises(ValueError, match="batch_size is 3"):
        AnswerObjective(opened(folder), pairs, LIKELIHOOD, None, 3, STORE)


def test_both_answers_of_a_pair_are_in_one_pass_at_every_length(tmp_path: Path) -> None:
    """More windows pass where they are shorter; three of 64 tokens are as many as two of 96."""
    lines = [(f"{count}", " so" * count, " no") for count in (11, 15, 19, 31)]  # three tokens each
    pairs = make_pairs(tmp_path, lines)
    assert pairs.tokens.shape[1] == 96
    folder = tiny.save("llama", tmp_path / "model", num_hidden_layers=2)
    preference = Preference(torch.zeros(1, 4), torch.ones(1, 4), BETA)
    objective = PairObjective(opened(folder), pairs, LIKELIHOOD, None, 2, STORE, preference=preference)
    assert {objective.batch(length) for length in range(32, 97)} == {2, 4, 6}
    with torch.no_grad():
        chosen, rejected = log_probabilities(folder, pairs, list(range(8))).double().T
    found = objective.losses(range(8), nothing)[0, ::2]
    torch.testing.assert_close(found, -logsigmoid(BETA * (chosen - rejected)), rtol=1e-4, atol=1e-5)


def test_losses_of_many_pairs_keep_few_hidden_states_and_have_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [(f"{number} is", f" {'no ' * (number % 3)}{number}.", " so.") for number in range(20)]
    pairs, kept = make_pairs(tmp_path, lines), list[int]()

    def store(name: str, shape: tuple[int, int, int]) -> Any:
        kept.append(shape[0] * shape[1])
        return STORE(name, shape)

    objective = AnswerObjective(
        opened(tiny.save("llama", tmp_path / "model", num_hidden_layers=2)), pairs, LIKELIHOOD, None, 4, store
    )
    whole = objective.losses(range(40), nothing)
    before = max(kept)
    kept.clear()
    monkeypatch.setattr("fistapruner.tuning.pair_objective.AT_ONCE", 9)
    assert torch.equal(objective.losses(range(40), nothing), whole)
    assert max(kept) <= 9 * pairs.tokens.shape[1] < before


def test_loss_is_that_of_trl(tmp_path: Path, pairs: Pairs) -> None:
    """DPOTrainer of TRL 1.16.0 on the same two models and four pairs, beta 0.1; fixed numbers of its log."""
    policy = tiny.save("llama", tmp_path / "policy", num_hidden_layers=2, seed=0)
    reference = tiny.save("llama", tmp_path / "reference", num_hidden_layers=2, seed=1)
    windows = list(range(8))
    found = {
        folder.name: answer_log_probabilities(
            AnswerObjective(opened(folder), pairs, LIKELIHOOD, None, 4, STORE), windows, nothing
        )[0]
        for folder in (policy, reference)
    }
    assert found["policy"].mean(0).tolist() == pytest.approx([-67.25531768798828, -60.595645904541016], abs=1e-4)
    rewards = BETA * (found["policy"] - found["reference"])
    assert rewards.mean(0).tolist() == pytest.approx([0.417417973279953, 0.3509760797023773], abs=1e-5)
    assert float((margins_of(rewards) > 0).double().mean()) == 0.5
    preference = Preference(margins_of(found["reference"])[None], torch.ones(1, 4).double(), BETA)
    objective = PairObjective(opened(policy), pairs, LIKELIHOOD, None, 4, STORE, preference=preference)
    losses = objective.losses(windows, nothing)[0]
    assert float(losses.sum() / objective.counts(windows).sum()) == pytest.approx(0.6940270066261292, abs=1e-6)
    assert gradients_of(objective, windows)[0] == pytest.approx(0.6940270066261292, abs=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize(
    ("likelihood", "anchor", "kind"), [(0.0, 0.0, "top64"), (0.5, 0.3, "top64"), (0.0, 0.3, "hidden")]
)
def test_gradients_are_those_of_the_whole_model(
    tmp_path: Path, pairs: Pairs, architecture: str, likelihood: float, anchor: float, kind: Any
) -> None:
    """All three terms, in passes of different sizes, with the graphs kept or not."""
    folder = tiny.save(architecture, tmp_path / "model", seed=0)
    dense = tiny.save(architecture, tmp_path / "dense", seed=1)
    numbers = [4, 5, 0, 1, 2, 3]
    margins = torch.tensor([[3.0, -20.0, 1.0, 0.0], [0.0, 9.0, -30.0, 0.0]], dtype=torch.float64)
    weights = torch.tensor([[0.3, 0.9, 0.5, 1.0], [0.7, 0.1, 0.5, 0.0]], dtype=torch.float64)
    expected, value = whole_gradients(folder, dense, pairs, numbers, (margins, weights), likelihood, anchor, kind)
    teacher = None
    if anchor:
        teacher = Teacher(opened(dense), pairs.tokens, tmp_path / "teacher", batch_size=2, kind=kind)
    for batch_size, keep in ((2, False), (6, True)):
        objective = PairObjective(
            opened(folder),
            pairs,
            DIVERGENCE if anchor else LIKELIHOOD,
            teacher,
            batch_size,
            STORE,
            keep_graphs=keep,
            preference=Preference(margins, weights, BETA),
            likelihood=likelihood,
            anchor=anchor,
        )
        found, gradients = gradients_of(objective, numbers)
        assert found == pytest.approx(value, rel=2e-5)  # top64 is stored in fp16
        compare(gradients, expected, near)
        losses = objective.losses(numbers, nothing)[0]
        assert losses[1::2].tolist() == [0.0] * 3
        assert float(losses.sum() / 3) == pytest.approx(value, rel=2e-5)  # top64 is stored in fp16


def near(a: Tensor, b: Tensor) -> None:
    assert float((a - b).norm()) <= 1e-4 * float(b.norm()) + 1e-7


def whole_gradients(
    folder: Path,
    dense: Path,
    pairs: Pairs,
    numbers: list[int],
    references: tuple[Tensor, Tensor],
    likelihood: float,
    anchor: float,
    kind: str,
) -> tuple[dict[str, Tensor], float]:
    """Gradients of all three terms by autograd, one window at a time without padding."""
    model, wanted = whole(folder), whole(dense)
    total: Any = 0.0
    margins, weights = references
    for chosen in numbers[::2]:
        answers = []
        for window in (chosen, chosen + 1):
            tokens = pairs.tokens[window][None, : int(pairs.lengths[window])]
            where = pairs.marks[window, 1 : tokens.shape[1]]
            logs = model(input_ids=tokens, use_cache=False).logits[0, :-1].float().log_softmax(-1)[where]
            answers.append(logs.gather(-1, tokens[0, 1:][where][:, None]).sum())
            if window == chosen:
                count = int(where.sum())
                with torch.no_grad():
                    theirs = wanted(input_ids=tokens, use_cache=False).logits[0, :-1].float()[where]
                if kind == "hidden":
                    divergence = kl_div(logs, theirs.log_softmax(-1), log_target=True, reduction="sum")
                else:
                    divergence = with_the_rest(TopTokens.of(theirs, 64), logs)
        h = answers[0] - answers[1]
        z = BETA * (h - margins[:, chosen // 2])
        total = total - (weights[:, chosen // 2] * logsigmoid(z)).sum() - likelihood * answers[0] / count
        total = total + anchor * divergence / count
    loss = total / (len(numbers) // 2)
    return autograd(model, loss), float(loss.detach())


def with_the_rest(top: TopTokens, own: Tensor) -> Tensor:
    """Divergence with all but the most likely tokens as one bucket, by its definition."""
    p, q = top.log_p.exp(), own.exp()
    rest = 1 - q.gather(-1, top.tokens).sum(-1)
    kept = (p * (top.log_p - own.gather(-1, top.tokens))).sum()
    return kept + (top.rest * (top.rest.log() - rest.log())).sum()


def test_the_anchor_of_a_step_of_several_lengths_goes_in_rounds(tmp_path: Path) -> None:
    """As where all predictions of the dense model are on the disk."""
    folders = [tiny.save("llama", tmp_path / str(seed), num_hidden_layers=2, seed=seed) for seed in (0, 1)]
    pairs = make_pairs(
        tmp_path, [(f"{n} is" + n % 2 * " said to be, as everybody knows,", " odd", " even") for n in range(8)]
    )
    found = []
    for room in (None, 4):
        teacher = Teacher(
            opened(folders[1]),
            pairs.tokens,
            tmp_path / f"teacher {room}",
            batch_size=1,
            order=range(0, 16, 2),
            windows_per_step=4,
            windows_on_disk=room,
        )
        objective = PairObjective(opened(folders[0]), pairs, DIVERGENCE, teacher, 2, STORE, preference=None, anchor=0.3)
        losses = []
        for step, start in enumerate((0, 8), 1):
            objective.begin_step(step)
            losses.append(objective.losses(list(range(start, start + 8)), nothing))
        found.append(losses)
    assert len({objective.seqlen([window]) for window in range(8)}) == 2
    for whole_text, in_rounds in zip(*found, strict=True):
        assert torch.equal(whole_text, in_rounds)


def test_at_the_start_every_loss_is_log_two(tmp_path: Path, pairs: Pairs) -> None:
    folder = tiny.save("llama", tmp_path / "model", num_hidden_layers=2)
    windows = list(range(8))
    objective = AnswerObjective(opened(folder), pairs, LIKELIHOOD, None, 4, STORE)
    (own,) = answer_log_probabilities(objective, windows, nothing)
    preference = Preference(margins_of(own)[None], torch.ones(1, 4).double(), BETA)
    losses = PairObjective(opened(folder), pairs, LIKELIHOOD, None, 4, STORE, preference=preference)
    assert losses.losses(windows, nothing)[0, ::2].tolist() == [math.log(2)] * 4


def test_cached_references_are_used_until_something_changes(tmp_path: Path, pairs: Pairs) -> None:
    folder = tiny.save("llama", tmp_path / "model", num_hidden_layers=2)
    path = tmp_path / "references.safetensors"
    said: list[str] = []

    def asked(windows: list[int], dtype: torch.dtype | None = None, **identity: str) -> Tensor:
        said.clear()
        known = {"the tokens": "t", "its weights": "w", "its precision": str(dtype), **identity}
        reference = ReferenceModel(lambda: opened(folder, dtype), windows, known)
        store = scratch_factory(None, dtype or torch.float32)
        return reference_log_probabilities(path, {"pruned": reference}, pairs, 2, store, said.append)["pruned"]

    first = asked([0, 1, 4, 5])
    assert said == ["log-probabilities of 2 pairs under the pruned model"]
    assert torch.isnan(first[[1, 3]]).all()
    before = path.stat().st_mtime_ns
    assert torch.equal(asked([0, 1, 4, 5])[[0, 2]], first[[0, 2]])
    assert said == []
    assert path.stat().st_mtime_ns == before
    assert not torch.isnan(asked(list(range(8)))).any()
    assert said == ["log-probabilities of 2 pairs under the pruned model"]  # the file has the others
    assert torch.equal(asked([0, 1, 4, 5])[[0, 2]], asked(list(range(8)))[[0, 2]])
    assert said == []
    for changed, words in (
        ({"its weights": "v"}, "its weights"),
        ({"the tokens": "s"}, "the tokens"),
        ({"dtype": torch.bfloat16}, "its precision"),
        ({"its adapter": "a"}, "its adapter"),  # which the file does not know
    ):
        asked([0, 1, 4, 5])
        asked(**{"windows": [0, 1, 4, 5], **changed})
        assert said[0] == f"log-probabilities of the pruned model are computed again: {words} changed"
    for damage in (lambda data: data[:-8], lambda data: data[:-1] + bytes([data[-1] ^ 1])):
        asked([0, 1, 4, 5])
        path.write_bytes(damage(path.read_bytes()))
        again = asked([0, 1, 4, 5])
        assert "is not used" in said[0]
    assert torch.allclose(again[[0, 2]], first[[0, 2]], rtol=1e-6)


@pytest.mark.parametrize("at_once", [2, 4])
def test_references_that_were_interrupted_go_on_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    pairs = make_pairs(tmp_path, [*TRL_PAIRS, ("One", " a", " b"), ("Two", " ab" * 9, " b")])
    folder = tiny.save("llama", tmp_path / "model", num_hidden_layers=2)
    monkeypatch.setattr("fistapruner.tuning.references.LEAST_SECONDS", -1.0)
    parts = 12 // at_once
    passed: list[int] = []
    ticks: list[tuple[int, int]] = []
    stop_at: int | None = None

    def counted(objective: AnswerObjective, windows: list[int], *more: Any) -> Tensor:
        if len(passed) == stop_at:
            raise KeyboardInterrupt
        passed.append(len(windows))
        return answer_log_probabilities(objective, windows, *more)

    def computed(path: Path) -> Tensor:
        model = ReferenceModel(lambda: opened(folder), range(12), {"its weights": "w"})
        settings = {"at_once": at_once, "tick": lambda _, done, total: ticks.append((done, total))}
        passed.clear()
        ticks.clear()
        return reference_log_probabilities(path, {"pruned": model}, pairs, 2, STORE, print, **settings)["pruned"]

    monkeypatch.setattr("fistapruner.tuning.references.answer_log_probabilities", counted)
    whole = computed(tmp_path / "whole")
    assert passed == [at_once] * parts
    assert ticks == [(part * at_once // 2, 6) for part in range(1, parts + 1)]
    for stopped in range(parts):
        path, stop_at = tmp_path / f"stopped at {stopped}", stopped
        with pytest.raises(KeyboardInterrupt):
            computed(path)
        stop_at = None
        assert torch.equal(computed(path), whole)
        assert len(passed) == parts - stopped
        assert path.read_bytes() == (tmp_path / "whole").read_bytes()
        computed(path)
        assert not passed

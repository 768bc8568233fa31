"""Training windows of a recovery run: the held-out split, packing, mixtures, and the order of the windows."""

import json
import random
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_windows import LETTERS, letters_tokenizer, text_of, tiny_model

from fistapruner import FistaPrunerError
from fistapruner.papers.mamf import Mixture
from fistapruner.settings.train import TrainingData
from fistapruner.text.training import TrainingText, order, pack_documents, training_text

EOS = "</s>"
WORDS = st.text(LETTERS, min_size=1, max_size=30)


def lines(path: Path, documents: list[str], field: str = "text") -> str:
    """Write a .jsonl file of documents, or of completions; return its path."""
    path.write_text("".join(json.dumps({"prompt": "", field: document}) + "\n" for document in documents))
    return str(path)


def random_documents(count: int, name: str = "", size: int = 20) -> list[str]:
    generator = random.Random(0)
    return [name + "".join(generator.choices(LETTERS, k=size)) for _ in range(count)]


def sides_of(text: TrainingText) -> list[set[str]]:
    """The words between end-of-text tokens, of what is held out and of what is trained on."""
    found = []
    for rows in (text.held_out, ~text.held_out):
        words = "".join(text_of(letters_tokenizer(), window) + "|" for window in text.tokens[rows])
        found.append({word for word in re.split(r"</s>|\|", words) if word})
    return found


@settings(max_examples=40, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=30), st.integers(2, 20), st.integers(1, 9), st.booleans())
def test_windows_are_the_joined_documents(documents: list[str], seqlen: int, windows: int, bos: bool) -> None:
    tokenizer = letters_tokenizer(bos)
    cut = pack_documents(documents, tokenizer, seqlen, windows, "text")
    assert len(cut.windows) <= windows
    assert all(len(window) == seqlen for window in cut.windows)
    assert not bos or bool((cut.windows[:, 0] == 1).all())
    joined = EOS.join([*documents, ""])
    got = "".join(text_of(tokenizer, window[int(bos) :]) for window in cut.windows)
    assert joined.startswith(got)
    whole = pack_documents(documents, tokenizer, seqlen, None, "text")
    assert torch.equal(cut.windows, whole.windows[:windows])
    assert whole.documents == len(documents)
    if bos:  # where one token begins and ends documents, what joins two of them is not taken for a window's first one
        cut = pack_documents(documents, letters_tokenizer(bos, eos="<s>"), seqlen, windows, "text")
        got = "".join(text_of(tokenizer, window[1:]) for window in cut.windows)
        assert joined.replace(EOS, "<s>").startswith(got)
    if bos:  # documents that a chat template wrote: no window begins with two of them, and no end stands twice
        chats = [f"<s>{document}{EOS}" for document in documents]
        cut = pack_documents(chats, tokenizer, seqlen, windows, "text")
        plain = pack_documents(chats, letters_tokenizer(), 1, None, "text")
        assert text_of(tokenizer, plain.windows.flatten()) == "".join(chats)
        assert not bool((cut.windows[:, 1] == 1).any())


@pytest.mark.parametrize("seed", range(4))
def test_documents_that_are_added_move_none_from_one_side_to_the_other(tmp_path: Path, seed: int) -> None:
    documents, sides = random_documents(600), []
    for texts in (documents[:300] * 2, documents):
        data = TrainingData(source=lines(tmp_path / "a.jsonl", texts), tokens=10**5, held_out=0.3, seed=seed)
        text = training_text(data, letters_tokenizer(), 64)
        sides.append([side & set(documents) for side in sides_of(text)])
    (held, trained), (held_later, trained_later) = sides
    assert held
    assert trained
    assert not held & trained
    assert not held & trained_later
    assert not trained & held_later


def test_windows_of_both_sides_are_cut_apart(tmp_path: Path) -> None:
    """Every document is one repeated letter pair, so a window shows which documents it is made of."""
    documents = [a + b * 6 for a in LETTERS for b in LETTERS]
    data = TrainingData(source=lines(tmp_path / "a.jsonl", documents + documents), tokens=2000, held_out=0.2)
    text = training_text(data, letters_tokenizer(), 32)
    assert text.tokens.shape == (len(text.held_out), 32)
    assert text.tokens.dtype == torch.int64
    assert bool(text.marks.all())
    assert torch.equal(text.counts, torch.full((len(text.tokens),), 31))
    assert int((~text.held_out).sum()) == 63  # 2000 tokens
    assert int(text.held_out.sum()) == 16  # the most that are held out
    sides = [{word for word in side if len(word) == 7} for side in sides_of(text)]
    assert all(len(side) > 40 for side in sides)
    assert not sides[0] & sides[1]
    facts = text.facts["tasks"][data.source]
    assert facts["documents"] == 2 * len(documents)
    assert facts["trained"]["tokens"] == 63 * 32
    assert facts["held_out"]["windows"] == 16
    assert torch.equal(text.tokens, training_text(data, letters_tokenizer(), 32).tokens)
    other = training_text(data.model_copy(update={"seed": 1}), letters_tokenizer(), 32)
    assert not torch.equal(text.tokens, other.tokens)


def test_no_more_is_tokenised_than_the_tokens_need(tmp_path: Path) -> None:
    read: list[str] = []
    tokenizer = letters_tokenizer()

    class Counting:
        bos_token_id, eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id

        def __call__(self, text: str, **options: Any) -> Any:
            read.append(text)
            return tokenizer(text, **options)

    data = TrainingData(source=lines(tmp_path / "a.jsonl", random_documents(5000)), tokens=1000)
    text = training_text(data, Counting(), 64)
    assert int((~text.held_out).sum()) == 16
    assert len(read) < 500


def test_one_document_is_cut_into_passages(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(random_documents(200, size=50)))
    text = training_text(TrainingData(source=str(tmp_path / "a.txt"), tokens=2000), letters_tokenizer(), 32)
    assert int((~text.held_out).sum()) == 63
    assert int(text.held_out.sum()) > 4
    assert "one document" in text.facts["tasks"][str(tmp_path / "a.txt")]["how"]


def test_generated_windows_are_held_out_whole() -> None:
    data = TrainingData(source="self", tokens=330, held_out=0.2)
    text = training_text(data, letters_tokenizer(), 32, tiny_model)
    assert [int((text.held_out == side).sum()) for side in (False, True)] == [11, 2]
    fewer = training_text(data, letters_tokenizer(), 32, tiny_model, windows=3)
    assert [int((fewer.held_out == side).sum()) for side in (False, True)] == [3, 2]


def test_a_document_is_left_to_train_on_whatever_share_is_held_out(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", ["abc" * 100, "def" * 100])
    for seed in range(16):
        data = TrainingData(source=source, tokens=100, held_out=0.5, seed=seed)
        text = training_text(data, letters_tokenizer(), 32)
        assert (int((~text.held_out).sum()), int(text.held_out.sum())) == (4, 9)


def test_absent_empty_and_short_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    short = ["b", "b" * 40, "b"]
    for source, words in (
        (str(tmp_path / "absent.txt"), "training source .* is neither"),
        (str(tmp_path / "empty.txt"), "training text .* is empty"),
        (lines(tmp_path / "a.jsonl", ["abcdef"]), r"a\.jsonl' is too short: its tokens do not fill one window of 32"),
        (lines(tmp_path / "b.jsonl", ["abcdef" * 8] * 9), "what is repeated, or held out by another task, does not c"),
        (
            lines(tmp_path / "c.jsonl", short, "completion"),
            "too short: its examples of at most 32 tokens do not fill one",
        ),
    ):
        with pytest.raises(FistaPrunerError, match=words):
            training_text(TrainingData(source=source), letters_tokenizer(), 32)


def test_all_windows_come_once_before_any_comes_twice(tmp_path: Path) -> None:
    data = TrainingData(source=lines(tmp_path / "a.jsonl", random_documents(100)), tokens=1000)
    text = training_text(data, letters_tokenizer(), 32)
    windows = set(text.windows("trained"))
    count = len(windows)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    drawn = order(text, 25, 4, data)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(drawn, order(text, 25, 4, data))
    assert torch.equal(drawn[:3], order(text, 3, 4, data))
    assert not torch.equal(drawn, order(text, 25, 4, data.model_copy(update={"seed": 1})))
    flat = drawn.flatten().tolist()
    for start in range(0, 100 - count, count):
        assert set(flat[start : start + count]) == windows
    assert flat[:count] != flat[count : 2 * count]


def tasks(folder: Path, sizes: dict[str, int]) -> dict[str, str]:
    """Write one file of random documents for each task; a task's documents begin with its name."""
    return {name: lines(folder / f"{name}.jsonl", random_documents(size, name)) for name, size in sizes.items()}


@pytest.mark.parametrize("per_round", [None, 2])
def test_a_mixture_takes_the_same_number_of_tokens_from_each_task(tmp_path: Path, per_round: int | None) -> None:
    data = TrainingData(source=tasks(tmp_path, {"a": 400, "b": 100, "c": 100}), tokens=60 * 32, per_round=per_round)
    text = training_text(data, letters_tokenizer(), 32)
    assert text.tasks == ("a", "b", "c") == tuple(text.facts["tasks"])
    trained = torch.bincount(text.task[~text.held_out])
    assert trained.tolist() == torch.bincount(Mixture(3, per_round, 0).draw(60)).tolist()
    assert per_round is not None or trained.tolist() == [20, 20, 20]
    assert set(text.task[text.held_out].tolist()) == {0, 1, 2}
    assert int(text.held_out.sum()) <= 16
    for task, name in enumerate("abc"):
        windows = text.tokens[text.task == task]
        after_end = windows[:, 1:][windows[:, :-1] == 2]
        assert set(after_end.tolist()) == {letters_tokenizer().convert_tokens_to_ids(name)}
    drawn = order(text, 35, 2, data)
    assert torch.equal(drawn, order(text, 35, 2, data))
    assert not bool(text.held_out[drawn].any())
    of_task = text.task[drawn].flatten()
    assert torch.equal(of_task, Mixture(3, per_round, data.seed).draw(70))
    for task, there in enumerate(trained.tolist()):
        own = drawn.flatten()[of_task == task].tolist()
        assert len(set(own[:there])) == min(there, len(own))
    with pytest.raises(FistaPrunerError, match="needs"):
        order(text, 1, 2, data)


def test_generated_text_is_a_task_too_and_comes_last(tmp_path: Path) -> None:
    sources = {"own": "self", **tasks(tmp_path, {"a": 100, "b": 100})}
    text = training_text(TrainingData(source=sources, tokens=21 * 32), letters_tokenizer(), 32, tiny_model)
    assert torch.bincount(text.task[~text.held_out]).tolist() == [7, 7, 7]
    with pytest.raises(FistaPrunerError, match=r"3 tasks, 1 a round, needs 18 windows .* there are 10"):
        training_text(TrainingData(source=sources, tokens=320, per_round=1), letters_tokenizer(), 32)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(LETTERS[:4], min_size=10, max_size=20), min_size=4, max_size=16, unique=True), st.data())
def test_a_document_that_one_task_holds_out_is_trained_on_by_none(documents: list[str], data: st.DataObject) -> None:
    halves = [data.draw(st.lists(st.sampled_from(documents), min_size=3, unique=True)) for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        sources = {}
        for name, half in zip("ab", halves, strict=True):
            sources[name] = lines(Path(folder) / f"{name}.jsonl", half, "completion")
        try:
            text = training_text(TrainingData(source=sources, tokens=10**4), letters_tokenizer(), 24)
        except FistaPrunerError as error:
            assert "too short" in str(error)  # noqa: PT017
            return
    held_out, trained = sides_of(text)
    assert held_out
    assert not held_out & trained

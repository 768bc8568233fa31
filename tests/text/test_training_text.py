"""Training windows of a recovery run: the held-out split, packing, and the order of the windows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_windows import LETTERS, letters_tokenizer, text_of, tiny

from fistapruner import FistaPrunerError
from fistapruner.settings.recover_settings import TrainingData
from fistapruner.text.packing import pack_documents
from fistapruner.text.text import passages
from fistapruner.text.training_text import TrainingText, document_hash, order, split_documents, training_text

EOS = "</s>"
WORDS = st.text(LETTERS, min_size=1, max_size=30)


def lines(path: Path, documents: list[str]) -> str:
    """Write a .jsonl file of documents; return its path."""
    path.write_text("".join(f'{{"text": "{document}"}}\n' for document in documents))
    return str(path)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=40), st.lists(WORDS, max_size=40), st.floats(0.01, 0.5), st.integers(0, 99))
def test_no_document_is_on_both_sides_and_added_ones_move_none(
    documents: list[str], more: list[str], share: float, seed: int
) -> None:
    def sides(texts: list[str]) -> tuple[set[str], set[str], int]:
        ordered, held = split_documents(texts, share, seed)
        assert sorted(ordered) == sorted(set(texts))
        return set(ordered[:held]), set(ordered[held:]), held

    held, trained, _ = sides(documents + documents)
    assert not held & trained
    assert held
    held_later, trained_later, _ = sides(documents + more)
    assert not trained & held_later
    if len(held) > 1:  # the only one may be there because none was below the share
        assert not held & trained_later


def test_the_share_is_kept() -> None:
    documents = [f"document {number}" for number in range(4000)]
    for share in (0.05, 0.3):
        _, held = split_documents(documents, share, 0)
        assert held / 4000 == pytest.approx(share, abs=0.02)
    assert split_documents(documents, 0.05, 0)[0] != split_documents(documents, 0.05, 1)[0]


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
    assert whole.tokens == sum(map(len, documents))
    if bos:  # where one token begins and ends documents, what joins two of them is not taken for a window's first one
        cut = pack_documents(documents, letters_tokenizer(bos, eos="<s>"), seqlen, windows, "text")
        got = "".join(text_of(tokenizer, window[1:]) for window in cut.windows)
        assert joined.replace(EOS, "<s>").startswith(got)
    if bos:  # documents that a chat template wrote: no window begins with two of them, and no end stands twice
        chats = [f"<s>{document}{EOS}" for document in documents]
        cut = pack_documents(chats, tokenizer, seqlen, windows, "text")
        plain = pack_documents(chats, letters_tokenizer(), 1, None, "text")
        assert text_of(tokenizer, plain.windows.flatten()) == "".join(chats)
        assert bool((cut.windows[:, 0] == 1).all())
        assert not bool((cut.windows[:, 1] == 1).any())
        words = [text_of(tokenizer, window).removeprefix("<s>") for window in cut.windows]
        assert "".join(chats).replace("<s>", "").startswith("".join(words).replace("<s>", ""))
        assert len(words) == windows or len(words) >= (plain.windows.numel() // seqlen)


@settings(max_examples=40, deadline=None)
@given(st.text("ab \n", max_size=300), st.integers(1, 40))
def test_passages_are_the_text(text: str, characters: int) -> None:
    parts = list(passages(text, characters))
    assert all(0 < len(part) <= characters for part in parts)
    assert "".join(parts) == text


def test_windows_of_both_sides_are_cut_apart(tmp_path: Path) -> None:
    """Every document is one repeated letter pair, so a window shows which documents it is made of."""
    documents = [a + b * 6 for a in LETTERS for b in LETTERS]
    data = TrainingData(source=lines(tmp_path / "a.jsonl", documents + documents), tokens=2000, held_out=0.2)
    tokenizer = letters_tokenizer()
    text = training_text(data, tokenizer, 32)
    assert text.tokens.shape == (len(text.held_out), 32)
    assert text.tokens.dtype == torch.int64
    assert bool(text.marks.all())
    assert int((~text.held_out).sum()) == 63  # 2000 tokens
    assert int(text.held_out.sum()) == 16  # the most that are held out
    sides = [
        {piece for window in text.tokens[rows] for piece in text_of(tokenizer, window).split(EOS) if len(piece) == 7}
        for rows in (text.held_out, ~text.held_out)
    ]
    assert all(len(side) > 40 for side in sides)
    assert not sides[0] & sides[1]
    facts = text.facts["tasks"][data.source]
    assert facts["documents"] == 2 * len(documents)
    assert facts["duplicates"] == len(documents)
    assert facts["trained"]["tokens"] == 63 * 32
    assert facts["held_out"]["windows"] == 16
    assert len(text.facts["sha256"]) == 64
    again = training_text(data, tokenizer, 32)
    other = training_text(data.model_copy(update={"seed": 1}), tokenizer, 32)
    assert torch.equal(text.tokens, again.tokens)
    assert not torch.equal(text.tokens, other.tokens)


def test_no_more_is_tokenised_than_the_tokens_need(tmp_path: Path) -> None:
    read: list[int] = []
    tokenizer = letters_tokenizer()

    class Counting:
        bos_token_id, eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id

        def __call__(self, texts: Any, **options: Any) -> Any:
            read.append(len(texts))
            return tokenizer(texts, **options)

    generator = random.Random(0)
    documents = ["".join(generator.choices(LETTERS, k=20)) for _ in range(5000)]
    data = TrainingData(source=lines(tmp_path / "a.jsonl", documents), tokens=1000)
    text = training_text(data, Counting(), 64)
    assert int((~text.held_out).sum()) == 16
    assert sum(read) < 500


def test_one_document_is_cut_into_passages(tmp_path: Path) -> None:
    generator = random.Random(0)
    paragraphs = ["".join(generator.choices(LETTERS, k=50)) for _ in range(200)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    text = training_text(TrainingData(source=str(tmp_path / "a.txt"), tokens=2000), letters_tokenizer(), 32)
    assert int((~text.held_out).sum()) == 63
    assert int(text.held_out.sum()) > 4
    assert "one document" in text.facts["tasks"][str(tmp_path / "a.txt")]["how"]


def test_generated_windows_are_held_out_whole() -> None:
    data = TrainingData(source="self", tokens=330, held_out=0.2)
    text = training_text(data, letters_tokenizer(), 32, lambda: tiny("llama"))
    assert int((~text.held_out).sum()) == 11
    assert int(text.held_out.sum()) == 2
    assert text.tokens.shape == (13, 32)
    fewer = training_text(data, letters_tokenizer(), 32, lambda: tiny("llama"), windows=3)
    assert [int((fewer.held_out == side).sum()) for side in (False, True)] == [3, 2]
    with pytest.raises(FistaPrunerError, match="needs the model"):
        training_text(TrainingData(source="self"), letters_tokenizer(), 32)


@pytest.mark.parametrize("documents", [["abcdef"], ["abc" * 10, "def" * 10], ["abcdef" * 8] * 9])
def test_a_text_without_a_window_on_either_side_is_refused(tmp_path: Path, documents: list[str]) -> None:
    data = TrainingData(source=lines(tmp_path / "a.jsonl", documents), tokens="256k")
    there = sum(map(len, set(documents)))
    with pytest.raises(FistaPrunerError, match=f"its {there} tokens do not fill .* of 40 .* 256000 tokens are asked"):
        training_text(data, letters_tokenizer(), 40)


@pytest.mark.parametrize("repeated", [False, True])
def test_a_short_text_says_that_repeated_passages_count_once(tmp_path: Path, repeated: bool) -> None:
    text = tmp_path / "a.txt"
    text.write_text("ab\n" * 500 if repeated else LETTERS)
    with pytest.raises(FistaPrunerError) as refused:
        training_text(TrainingData(source=str(text), tokens=10**4), letters_tokenizer(), 400)
    assert ("what is repeated counts once" in str(refused.value)) == repeated


@pytest.mark.parametrize("lengths", [[2000], [100], [90], [130], [1000, 3], [120, 3, 3, 3, 3], [3] * 4 + [95]])
@pytest.mark.parametrize("seed", range(4))
def test_one_long_document_fills_both_sides(tmp_path: Path, lengths: list[int], seed: int) -> None:
    """A letter is a token: passages are cut as short as it takes, where all tokens make two windows and a bit."""
    generator = random.Random(seed)
    documents = ["".join(generator.choices(LETTERS, k=length)) for length in lengths]
    source = lines(tmp_path / "a.jsonl", documents)
    text = training_text(TrainingData(source=source, tokens=10**4, seed=seed), letters_tokenizer(), 40)
    assert set(text.held_out.tolist()) == {True, False}
    assert text.facts["tasks"][source]["documents"] == len(documents)
    assert {document_hash(document) for document in documents if len(document) > 40} <= text.documents
    source = lines(tmp_path / "b.jsonl", documents * 400)  # what is repeated counts once
    copies = training_text(TrainingData(source=source, tokens=10**4, seed=seed), letters_tokenizer(), 40)
    assert set(copies.held_out.tolist()) == {True, False}


@pytest.mark.parametrize("seed", range(4))
def test_a_document_of_which_one_task_holds_out_a_passage_is_trained_on_by_no_other(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    shared, *others = ("".join(generator.choices(LETTERS, k=length)) for length in (300, *[50] * 20))
    tasks = {"parted": lines(tmp_path / "a.jsonl", [shared]), "whole": lines(tmp_path / "b.jsonl", [*others, shared])}
    data = TrainingData(tasks=tasks, tokens=10**4, mixture="pooled", seed=seed)
    text, tokenizer = training_text(data, letters_tokenizer(), 32), letters_tokenizer()
    parts = [
        {shared[place : place + 12] for place in range(288)} & pieces
        for held in (True, False)
        for pieces in [
            {
                whole[place : place + 12]
                for window in text.tokens[text.held_out == held]
                for whole in [text_of(tokenizer, window)]
                for place in range(20)
            }
        ]
    ]
    assert parts[0]
    assert not parts[0] & parts[1]


def test_a_document_that_one_task_holds_out_is_not_trained_on_in_passages(tmp_path: Path) -> None:
    """Of a file that is this document alone, nothing is left to train on."""
    generator = random.Random(0)
    documents = ["".join(generator.choices(LETTERS, k=300)) for _ in range(20)]
    ordered, held = split_documents(documents, 0.05, 0)
    tasks = {"whole": lines(tmp_path / "a.jsonl", documents), "parted": str(tmp_path / "b.txt")}
    data = TrainingData(tasks=tasks, tokens=1000, mixture="pooled")
    (tmp_path / "b.txt").write_text(ordered[held])  # one that it trains on
    training_text(data, letters_tokenizer(), 32)
    (tmp_path / "b.txt").write_text(ordered[0])
    with pytest.raises(FistaPrunerError, match=r"b\.txt' is too short: its 300 .* without what other tasks hold out"):
        training_text(data, letters_tokenizer(), 32)


def test_a_document_is_left_to_train_on_whatever_share_is_held_out(tmp_path: Path) -> None:
    documents = ["abc" * 100, "def" * 100]
    seed = 13
    assert split_documents(documents, 0.5, seed)[1] == 2
    data = TrainingData(source=lines(tmp_path / "a.jsonl", documents), tokens=100, held_out=0.5, seed=seed)
    text = training_text(data, letters_tokenizer(), 32)
    assert (int((~text.held_out).sum()), int(text.held_out.sum())) == (4, 9)


def test_absent_and_empty_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    for source, words in (
        (None, "give one with --data"),
        (str(tmp_path / "absent.txt"), "training source .* is neither"),
        (str(tmp_path / "empty.txt"), "training text .* is empty"),
    ):
        with pytest.raises(FistaPrunerError, match=words):
            training_text(TrainingData(source=source), letters_tokenizer(), 32)


def test_all_windows_come_once_before_any_comes_twice(tmp_path: Path) -> None:
    generator = random.Random(0)
    documents = ["".join(generator.choices(LETTERS, k=20)) for _ in range(100)]
    data = TrainingData(source=lines(tmp_path / "a.jsonl", documents), tokens=1000)
    text = training_text(data, letters_tokenizer(), 32)
    windows = set((~text.held_out).nonzero().flatten().tolist())
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


@pytest.mark.parametrize("at_once", [1, 100, 2**20])
def test_tokens_with_loss_are_counted_once_and_few_at_a_time(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fistapruner.text.training_text.COUNTED", at_once)
    marks = torch.rand(23, 32, generator=torch.Generator().manual_seed(0)) < 0.5
    number = torch.arange(23)
    text = TrainingText(number[:, None].expand(-1, 32), marks, number > 20, 0 * number, ("a",), {})
    assert torch.equal(text.counts, marks[:, 1:].sum(1))
    assert text.counts is text.counts

"""Make the training windows of a recovery run, and hold windows out to validate on.

Documents are held out before anything is cut, by a hash of their text: the two sides share no document, and
documents that are added to a source move none from one side to the other. Windows of the two sides are cut apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..papers.mamf import Mixture, shuffled
from ..settings.recover_settings import TrainingData
from .examples import Example, read_training_file
from .packing import PURPOSE, Packed, pack_documents, pack_examples
from .self_generated import generate_tokens
from .text import passages
from .windows import GENERATED, SELF, check_source, counted_windows, describe_tasks, source_documents, tokens_sha256

MAX_HELD_OUT_WINDOWS = 16
"""Held-out windows of all tasks: more would take time at every check and hardly change the choice."""

JOINED = "documents joined by end-of-text tokens, windows that do not overlap"
"""How windows of plain documents are made."""

CHARACTERS_PER_TOKEN = 4
"""A source of one document is cut into passages of about one window, at this many characters a token."""

COUNTED = 2**20
"""Tokens whose marks are counted at once."""

SHARED = 3
"""Documents named by :func:`shared_documents`."""


@dataclass(frozen=True)
class TrainingText:
    """Windows to train on and windows held out from training.

    Args:
        tokens: (windows, seqlen) int64 token ids.
        marks: (windows, seqlen) bool: tokens that carry loss when they are predicted.
        held_out: (windows,) bool: windows for validation only.
        task: (windows,) int64 index into ``tasks``.
        tasks: names of the texts; the source where there is one.
        facts: ``how`` windows were made, ``documents`` read, ``seed``, ``sha256`` of the tokens, and ``tasks``, for
            each the same and the windows, documents, tokens and tokens with loss of either side.
        documents: hashes of the documents read, for :func:`shared_documents`.
    """

    tokens: Tensor
    marks: Tensor
    held_out: Tensor
    task: Tensor
    tasks: tuple[str, ...]
    facts: dict[str, Any]
    documents: frozenset[str] = frozenset()

    @cached_property
    def loss_tokens(self) -> Tensor:
        """(windows,) tokens that carry loss."""
        few = max(1, COUNTED // self.marks.shape[1])  # a sum takes eight bytes a token
        return torch.cat([part[:, 1:].sum(1) for part in self.marks.split(few)])

    @property
    def counts(self) -> Tensor:
        """(windows,) numbers that the loss of each window is a sum over: tokens that carry loss."""
        return self.loss_tokens

    def amount(self, held_out: Sequence[int]) -> str:
        """Say how much is held out."""
        return f"{len(held_out)} held-out windows"

    def windows(self, side: str) -> list[int]:
        """Return the window numbers of a side: ``trained`` or ``held_out``; of pairs also ``test``."""
        where = {"held_out": self.held_out, "trained": ~self.held_out}[side]
        return [int(number) for number in where.nonzero().flatten()]


@dataclass(frozen=True)
class _Side:
    """Windows of one side of one task: token ids, marks, documents (None for generated text), tokens."""

    tokens: Tensor
    marks: Tensor
    documents: int | None
    filled: int

    @classmethod
    def of(cls, packed: Packed) -> _Side:
        return cls(packed.windows, packed.marks, packed.documents, packed.filled)

    def facts(self) -> dict[str, int | None]:
        return {
            "documents": self.documents,
            "windows": len(self.tokens),
            "tokens": self.filled,
            "loss_tokens": int(self.marks[:, 1:].sum()),
        }


@dataclass(frozen=True)
class _Task:
    """Both sides of one task, its facts, and the hashes of the documents read."""

    trained: _Side
    held_out: _Side
    facts: dict[str, Any]
    hashes: frozenset[str] = frozenset()


class _Source:
    """One text source, read: plain documents, examples, or nothing for text that the model generates."""

    def __init__(self, source: str, seqlen: int) -> None:
        self.source = source
        self.read: list[str] = []  # as they are in the source
        self.documents: list[str] = []  # or their passages
        self.origin: dict[str, str] = {}  # the document of every passage
        self.examples: dict[str, Example] = {}
        self.how = GENERATED
        self._refined = False
        if source == SELF:
            return
        found = _read(source)
        self.how = JOINED
        if found and isinstance(found[0], Example):
            self.examples = {item.text: item for item in found if isinstance(item, Example)}
            self.how = "whole examples, loss on the answers only"
        self.documents = self.read = [item.text if isinstance(item, Example) else item for item in found]
        if len(found) == 1 and not self.examples:
            self._divide(CHARACTERS_PER_TOKEN * seqlen)

    def _divide(self, characters: int) -> None:
        """Cut the documents into passages of at most so many characters."""
        cut = [(part.rstrip(), text) for text in self.read for part in passages(text, characters)]
        parts = [(part, text) for part, text in cut if part]
        self.documents, self.origin = [part for part, _ in parts], dict(parts)
        documents = "one document" if len(self.read) == 1 else f"{len(self.read)} documents"
        self.how = f"{documents}, cut into {len(self.documents)} passages; {JOINED}"

    def refine(self, tokenizer: Any, seqlen: int) -> bool:
        """Cut long documents into passages short enough to fill a window on either side.

        Returns:
            Whether that is done; not where it was done before, nor with examples, nor with a text of less than two
            windows.
        """
        if self.examples or self._refined:
            return False
        distinct = list(dict.fromkeys(self.read))
        whole = self.pack(distinct, tokenizer, seqlen, None)
        if len(whole.windows) < 2:
            return False
        # What is held out may have almost a passage more than its window: at most half of what two windows leave.
        share = min(1.0, max(1 / 8, (whole.tokens / seqlen - 2) / 2))
        self._divide(max(1, int(share * seqlen * sum(map(len, distinct)) / whole.tokens)))
        self._refined = True
        return True

    @property
    def characters(self) -> int:
        """Characters of all documents."""
        return sum(map(len, self.documents))

    def pack(self, documents: Sequence[str], tokenizer: Any, seqlen: int, windows: int | None) -> Packed:
        """Pack documents of this source into at most that many windows."""
        if self.examples:
            return pack_examples([self.examples[text] for text in documents], tokenizer, seqlen, windows)
        return pack_documents(documents, tokenizer, seqlen, windows, self.source)


def training_text(
    data: TrainingData,
    tokenizer: Any,
    seqlen: int,
    load_model: Callable[[], Any] | None = None,
    say: Callable[[str], None] | None = None,
    windows: int | None = None,
) -> TrainingText:
    """Make the training windows and the held-out windows.

    Args:
        data: source or tasks, tokens, share that is held out, seed.
        tokenizer: a ``transformers`` tokenizer. Where it begins a text with BOS, every window begins with BOS.
        seqlen: tokens in a window.
        load_model: loads the model that generates text; called for the source ``self`` only.
        say: receives the progress of text generation, and what is left out, as sentences.
        windows: to train on, at most; None is as many as the asked tokens need.

    Raises:
        FistaPrunerError: no source, an unknown, unreadable or empty one, a text too short for one window on either
            side or without a token there that carries loss, or fewer windows than the mixture needs.
    """
    named = data.tasks or ({} if data.source is None else {data.source: data.source})
    if not named:
        raise FistaPrunerError("there is no training text: give one with --data")
    sources = [_Source(source, seqlen) for source in named.values()]
    asked = -(-data.tokens // seqlen)
    shares = _windows_of_tasks(data, sources, asked if windows is None else windows)
    splits = [_split(source, data, tokenizer, seqlen) for source in sources]
    # A document that one task holds out is trained on by none, nor is one of which it holds out a passage.
    held = {text for own, _ in splits for text in own}
    parted = {source.origin.get(text, text) for source, (own, _) in zip(sources, splits, strict=True) for text in own}
    splits = [
        (own, [text for text in rest if not {text, source.origin.get(text, text)} & held and text not in parted])
        for source, (own, rest) in zip(sources, splits, strict=True)
    ]
    most = max(1, MAX_HELD_OUT_WINDOWS // len(sources))
    tasks: dict[int, _Task] = {}
    # Text that the model generates comes last: it takes long, and the others may be refused.
    for number in sorted(range(len(sources)), key=lambda number: sources[number].source == SELF):
        if sources[number].source == SELF:
            # However few windows are trained on: few would choose the step by chance.
            held_out = max(1, min(most, round(data.held_out * _windows_of_tasks(data, sources, asked)[number])))
            tasks[number] = _generated(data, tokenizer, seqlen, shares[number], held_out, load_model, say)
        else:
            tasks[number] = _cut(sources[number], splits[number], data, tokenizer, seqlen, shares[number], most, say)
    parts = [(number, held_out) for held_out in (False, True) for number in range(len(sources))]
    sides = [tasks[number].held_out if held_out else tasks[number].trained for number, held_out in parts]
    counts = torch.tensor([len(side.tokens) for side in sides])
    tokens = torch.cat([side.tokens for side in sides])
    about = {name: tasks[number].facts for number, name in enumerate(named)}
    return TrainingText(
        tokens=tokens,
        marks=torch.cat([side.marks for side in sides]),
        held_out=torch.tensor([held_out for _, held_out in parts]).repeat_interleave(counts),
        task=torch.tensor([number for number, _ in parts]).repeat_interleave(counts),
        tasks=tuple(named),
        facts={
            "how": describe_tasks(about) if data.tasks else about[str(data.source)]["how"],
            "documents": sum(task["documents"] or 0 for task in about.values()) or None,
            "seed": data.seed,
            "sha256": tokens_sha256(tokens),
            "tasks": about,
        },
        documents=frozenset().union(*(task.hashes for task in tasks.values())),
    )


def order(text: TrainingText, steps: int, windows_per_step: int, data: TrainingData) -> Tensor:
    """Draw the windows of every step: all training windows once, then all again in another order.

    With several tasks and ``mixture: uniform``, tasks are drawn in rounds (:class:`Mixture`), and so are the windows of
    each task: all once, then all again.

    Args:
        text: the training text.
        steps: optimizer steps.
        windows_per_step: windows of a step.
        data: its mixture and seed decide the order.

    Returns:
        (steps, windows_per_step) int64 numbers of windows.

    Raises:
        FistaPrunerError: fewer windows than the mixture needs.
    """
    numbers, count = (~text.held_out).nonzero().flatten(), steps * windows_per_step
    if len(text.tasks) == 1 or data.mixture == "pooled":
        return shuffled(numbers, count, data.seed, "windows").view(steps, windows_per_step)
    drawn = Mixture(len(text.tasks), data.per_round, data.seed).draw(count)
    windows = torch.empty_like(drawn)
    for task in range(len(text.tasks)):
        own = numbers[text.task[numbers] == task]
        places = drawn == task
        windows[places] = shuffled(own, int(places.sum()), data.seed, "windows", task)
    return windows.view(steps, windows_per_step)


def shared_documents(known: Collection[str], documents: Sequence[str], name: str, purpose: str = PURPOSE) -> str | None:
    """Warn that evaluation text has documents of another text; None where it has none.

    Args:
        known: hashes of the other text's documents.
        documents: of the evaluation text.
        name: of the evaluation text.
        purpose: what the other text is for.
    """
    shared = [document for document in documents if document_hash(document) in known]
    if not shared:
        return None
    examples = ", ".join(repr(" ".join(document[:200].split())[:40]) for document in shared[:SHARED])
    more = " and more" if len(shared) > SHARED else ""
    return (
        f"{len(shared)} of the {len(documents)} documents of the evaluation text {name!r} are also in the "
        f"{purpose} text ({examples}{more}): figures on it are too good"
    )


def document_hash(text: str, seed: int | None = None) -> str:
    """Hash the text of a document, with a seed to decide on which side of the split it belongs."""
    prefix = "" if seed is None else f"{seed}\0"
    return hashlib.sha256((prefix + text).encode("utf-8", "surrogatepass")).hexdigest()


def split_documents(documents: Sequence[str], share: float, seed: int) -> tuple[list[str], int]:
    """Order documents by hash; those to hold out come first.

    A document is held out if its hash, a number from 0 to 1, is below the share. Equal documents are taken once.

    Args:
        documents: the texts.
        share: to hold out.
        seed: part of the hash.

    Returns:
        The documents in the order of their hashes, and how many of them are to be held out (at least 1).
    """
    by_hash = {document_hash(document, seed): document for document in documents}
    hashes = sorted(by_hash)
    below = sum(int(digest[:16], 16) < share * 2**64 for digest in hashes)
    return [by_hash[digest] for digest in hashes], max(1, below)


def training_documents(source: str) -> list[str]:
    """Read the documents of a training text, or its examples as text.

    Raises:
        FistaPrunerError: unknown, unreadable, or empty.
    """
    return [item.text if isinstance(item, Example) else item for item in _read(source)]


def _read(source: str) -> Sequence[str | Example]:
    """Read the documents of a source, or its examples."""
    check_source(source, PURPOSE)
    path = Path(source)
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        return source_documents(source, PURPOSE)
    found = [item for item in read_training_file(path) if isinstance(item, Example) or item.strip()]
    if not found:
        raise FistaPrunerError(f"{PURPOSE} text {source!r} is empty")
    return found


def _windows_of_tasks(data: TrainingData, sources: Sequence[_Source], windows: int) -> list[int]:
    """Share the training windows out among the tasks, as the mixture will draw them."""
    if len(sources) == 1:
        return [windows]
    if data.mixture == "uniform":
        drawn = Mixture(len(sources), data.per_round, data.seed).draw(windows)
        return [max(1, int(count)) for count in torch.bincount(drawn, minlength=len(sources))]
    # In one heap every task has its share of all the text; generated text has as much as the others on average.
    sizes = [source.characters for source in sources]
    known = [size for size in sizes if size]
    average = sum(known) / len(known) if known else 1.0
    total = sum(size or average for size in sizes)
    return [max(1, round(windows * (size or average) / total)) for size in sizes]


def _split(source: _Source, data: TrainingData, tokenizer: Any, seqlen: int) -> tuple[list[str], list[str]]:
    """Split the documents of a source into those held out and the others; nothing for generated text."""
    if not source.documents:
        return [], []
    ordered, held = split_documents(source.documents, data.held_out, data.seed)
    # A held-out side without a whole window would measure nothing.
    first = source.pack(ordered, tokenizer, seqlen, 1).first
    held = max(held, min(first, len(ordered) // 2) if source.examples else first)
    held = min(held, max(1, len(ordered) - 1))
    sides = ordered[:held], ordered[held:]
    if all(len(source.pack(side, tokenizer, seqlen, 1).windows) for side in sides):
        return sides
    return _split(source, data, tokenizer, seqlen) if source.refine(tokenizer, seqlen) else sides


def _cut(
    source: _Source,
    split: tuple[list[str], list[str]],
    data: TrainingData,
    tokenizer: Any,
    seqlen: int,
    windows: int,
    most: int,
    say: Callable[[str], None] | None,
) -> _Task:
    """Pack both sides of a source: ``windows`` to train on, at most ``most`` held out."""
    held, rest = split
    held_out = source.pack(held, tokenizer, seqlen, most)
    trained = source.pack(rest, tokenizer, seqlen, windows)
    if not len(trained.windows) or not len(held_out.windows):
        raise _too_short(source, data, tokenizer, seqlen)
    too_long = held_out.too_long + trained.too_long
    if too_long and say is not None:
        tried = held_out.documents + trained.documents
        say(f"{too_long} of {tried} examples of {source.source} have more than {seqlen} tokens and were left out")
    hashes = {document_hash(text) for text in (*held[: held_out.documents], *rest[: trained.documents])}
    if source.documents is not source.read:
        hashes |= {document_hash(text) for text in set(source.read) - set(source.documents)}
    sides = _Side.of(trained), _Side.of(held_out)
    for side, purpose in zip(sides, ("to train on", "to validate on"), strict=True):
        if not side.facts()["loss_tokens"]:
            raise FistaPrunerError(
                f"{PURPOSE} text {source.source!r}: no token {purpose} carries loss, since each answer there is one "
                "token with nothing before it: give prompts or longer answers"
            )
    facts = {
        "source": source.source,
        "how": source.how,
        "documents": len(source.read),
        "duplicates": len(source.documents) - len(set(source.documents)),
        "too_long": too_long,
    }
    return _Task(*sides, {**facts, **_both(*sides)}, frozenset(hashes))


def _too_short(source: _Source, data: TrainingData, tokenizer: Any, seqlen: int) -> FistaPrunerError:
    """Make the error that a source does not fill one window on either side."""
    whole = source.pack(list(dict.fromkeys(source.documents)), tokenizer, seqlen, None)
    if not whole.tokens:
        return FistaPrunerError(f"the tokenizer makes no tokens of the {PURPOSE} text {source.source!r}")
    others = ", without what other tasks hold out" if len(data.tasks) > 1 else ""
    if source.examples:
        fitting = whole.documents - whole.too_long
        there = f"{fitting} of its {whole.documents} examples have at most {seqlen} tokens, and two are needed:"
        there += f" one to train on and one to validate on{others}"
    elif len(whole.windows) < 2:
        there = f"its {whole.tokens} tokens do not fill one window of {seqlen} to train on and one to validate on"
    else:
        there = f"its {whole.tokens} tokens cannot be split into one window of {seqlen} to train on and one to validate"
        there += f" on{others}"
    if not whole.too_long and any(len(set(texts)) < len(texts) for texts in (source.read, source.documents)):
        there += " (what is repeated counts once)"
    remedy = " or a larger --seqlen" if whole.too_long else "" if source.examples else " or a smaller --seqlen"
    return FistaPrunerError(
        f"{PURPOSE} text {source.source!r} is too short: {there}; {data.tokens} tokens are asked; take a longer "
        f"text{remedy}"
    )


def _generated(
    data: TrainingData,
    tokenizer: Any,
    seqlen: int,
    windows: int,
    held: int,
    load_model: Callable[[], Any] | None,
    say: Callable[[str], None] | None,
) -> _Task:
    """Let the model generate ``windows`` to train on, and ``held`` to hold out."""
    if load_model is None:
        raise FistaPrunerError("training source 'self' needs the model to generate text: give a text source instead")
    progress = None if say is None else counted_windows(say, windows + held, PURPOSE)
    tokens = generate_tokens(load_model(), tokenizer, windows + held, seqlen, seed=data.seed, progress=progress)
    marks = torch.ones_like(tokens, dtype=torch.bool)
    sides = (
        _Side(tokens[held:], marks[held:], None, windows * seqlen),
        _Side(tokens[:held], marks[:held], None, held * seqlen),
    )
    facts = {"source": SELF, "how": GENERATED, "documents": None, "duplicates": 0, "too_long": 0}
    return _Task(*sides, {**facts, **_both(*sides)})


def _both(trained: _Side, held_out: _Side) -> dict[str, Any]:
    samples = len(trained.tokens) + len(held_out.tokens)
    return {"samples": samples, "trained": trained.facts(), "held_out": held_out.facts()}

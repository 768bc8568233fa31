"""Make the training windows of a recovery run, and hold windows out to validate on.

Documents are held out before anything is cut, by a hash of their text: the two sides share no document, and
documents that are added to a source move none from one side to the other. Windows of the two sides are cut apart.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..papers.mamf import Mixture, shuffled
from ..settings.train import TrainingData
from .examples import Example, read_training_file
from .generate import GENERATED, counted_windows, generate_tokens
from .packing import PURPOSE, Packed, pack_documents, pack_examples
from .sources import SELF, check_source, passages, source_documents
from .tokens import tokens_sha256
from .windows import describe_tasks

MAX_HELD_OUT_WINDOWS = 16
"""Held-out windows of all tasks: more would take time at every check and hardly change the choice."""

CHARACTERS_PER_TOKEN = 4
"""A source of one document is cut into passages of about one window, at this many characters a token."""


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
        return self.marks[:, 1:].count_nonzero(1)

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


class _Source:
    """One text source, read: documents or the passages of one, examples, or nothing for generated text."""

    def __init__(self, source: str, seqlen: int) -> None:
        self.source, self.how, self.whole = (
            source,
            "documents joined by end-of-text tokens, windows that do not overlap",
            "",
        )
        found = [] if source == SELF else _read(source)
        self.examples = {item.text: item for item in found if isinstance(item, Example)}
        self.documents = [item.text if isinstance(item, Example) else item for item in found]
        self.read = len(found)
        if self.examples:
            self.how = "whole examples, loss on the answers only"
        elif len(found) == 1:
            self.whole = self.documents[0]
            cut = (part.rstrip() for part in passages(self.whole, CHARACTERS_PER_TOKEN * seqlen))
            self.documents = [part for part in cut if part]
            self.how = f"one document, cut into {len(self.documents)} passages; {self.how}"

    def pack(self, documents: Sequence[str], tokenizer: Any, seqlen: int, windows: int) -> Packed:
        """Pack documents of this source into at most that many windows."""
        if self.examples:
            return pack_examples([self.examples[text] for text in documents], tokenizer, seqlen, windows)
        return pack_documents(documents, tokenizer, seqlen, windows, self.source)

    def split(self, data: TrainingData, tokenizer: Any, seqlen: int) -> tuple[list[str], list[str]]:
        """Split the documents into those held out and the others, in the order of their hashes.

        A document is held out if its hash, a number from 0 to 1, is below the share, and more are until they fill a
        window. Equal documents are taken once.
        """
        if not self.documents:
            return [], []
        by_hash = {document_hash(document, data.seed): document for document in self.documents}
        hashes = sorted(by_hash)
        ordered = [by_hash[digest] for digest in hashes]
        below = sum(int(digest[:16], 16) < data.held_out * 2**64 for digest in hashes)
        first = self.pack(ordered, tokenizer, seqlen, 1).first
        held = max(1, below, min(first, len(ordered) // 2) if self.examples else first)
        held = min(held, max(1, len(ordered) - 1))
        return ordered[:held], ordered[held:]


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
    named = data.sources
    if not named:
        raise FistaPrunerError("there is no training text: give one with --data")
    sources = [_Source(source, seqlen) for source in named.values()]
    asked = math.ceil(data.tokens / seqlen)
    shares = _windows_of_tasks(data, len(sources), asked if windows is None else windows)
    splits = [source.split(data, tokenizer, seqlen) for source in sources]
    elsewhere = {text for held, _ in splits for text in held}  # what one task holds out is trained on by none
    most = max(1, MAX_HELD_OUT_WINDOWS // len(sources))
    sides: dict[int, tuple[Packed, Packed]] = {}  # to train on, and held out
    hashes: set[str] = set()
    # Text that the model generates comes last: it takes long, and the others may be refused.
    for number in sorted(range(len(sources)), key=lambda number: sources[number].source == SELF):
        source, (held, rest) = sources[number], splits[number]
        if source.source == SELF:
            # However few windows are trained on: few would choose the step by chance.
            out = max(1, min(most, round(data.held_out * _windows_of_tasks(data, len(sources), asked)[number])))
            sides[number] = _generated(data, tokenizer, seqlen, shares[number], out, load_model, say)
            continue
        rest = [text for text in rest if text not in elsewhere]
        held_out = source.pack(held, tokenizer, seqlen, most)
        trained = source.pack(rest, tokenizer, seqlen, shares[number])
        if not all(bool(side.marks[:, 1:].any()) for side in (trained, held_out)):
            fitting = f"examples of at most {seqlen} tokens" if source.examples else "tokens"
            raise FistaPrunerError(
                f"{PURPOSE} text {source.source!r} is too short: its {fitting} do not fill one window of {seqlen} to "
                "train on and one to validate on (what is repeated, or held out by another task, does not count); take "
                "a longer text or another seqlen"
            )
        if (too_long := held_out.too_long + trained.too_long) and say is not None:
            tried = held_out.documents + trained.documents
            say(f"{too_long} of {tried} examples of {source.source} have more than {seqlen} tokens and were left out")
        used = (*held[: held_out.documents], *rest[: trained.documents], *([source.whole] if source.whole else []))
        hashes |= {document_hash(text) for text in used}
        sides[number] = trained, held_out
    parts = [(number, held_out) for held_out in (False, True) for number in range(len(sources))]
    packed = [sides[number][held_out] for number, held_out in parts]
    counts = torch.tensor([len(side.windows) for side in packed])
    tokens = torch.cat([side.windows for side in packed])
    about = {name: _facts(sources[number], *sides[number]) for number, name in enumerate(named)}
    return TrainingText(
        tokens=tokens,
        marks=torch.cat([side.marks for side in packed]),
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
        documents=frozenset(hashes),
    )


def _generated(
    data: TrainingData,
    tokenizer: Any,
    seqlen: int,
    windows: int,
    held: int,
    load_model: Callable[[], Any] | None,
    say: Callable[[str], None] | None,
) -> tuple[Packed, Packed]:
    """Let the model generate ``windows`` to train on, and ``held`` to hold out."""
    if load_model is None:
        raise FistaPrunerError("training source 'self' needs the model to generate text: give a text source instead")
    progress = None if say is None else counted_windows(say, windows + held, PURPOSE)
    tokens = generate_tokens(load_model(), tokenizer, windows + held, seqlen, seed=data.seed, progress=progress)
    parts = (tokens[held:], tokens[:held])
    trained, held_out = (Packed(part, part >= 0, 0, 0, part.numel(), part.numel()) for part in parts)
    return trained, held_out


def _facts(source: _Source, trained: Packed, held_out: Packed) -> dict[str, Any]:
    """Describe what was made of a source; generated text has no documents."""
    written = source.source == SELF
    return {
        "source": source.source,
        "how": GENERATED if written else source.how,
        "documents": None if written else source.read,
        "duplicates": len(source.documents) - len(set(source.documents)),
        "too_long": trained.too_long + held_out.too_long,
        "samples": len(trained.windows) + len(held_out.windows),
        **{
            name: {
                "documents": None if written else side.documents,
                "windows": len(side.windows),
                "tokens": side.filled,
                "loss_tokens": int(side.marks[:, 1:].count_nonzero()),
            }
            for name, side in (("trained", trained), ("held_out", held_out))
        },
    }


def _windows_of_tasks(data: TrainingData, tasks: int, windows: int) -> list[int]:
    """Share the training windows out among the tasks, as the mixture will draw them."""
    drawn = Mixture(tasks, data.per_round, data.seed).draw(windows)
    return [max(1, count) for count in torch.bincount(drawn, minlength=tasks).tolist()]


def order(text: TrainingText, steps: int, windows_per_step: int, data: TrainingData) -> Tensor:
    """Draw the windows of every step: all training windows once, then all again in another order.

    Several tasks are drawn in rounds (:class:`Mixture`), and so are the windows of each: all once, then all again.

    Args:
        text: the training text.
        steps: optimizer steps.
        windows_per_step: windows of a step.
        data: its tasks of a round and seed decide the order.

    Returns:
        (steps, windows_per_step) int64 numbers of windows.

    Raises:
        FistaPrunerError: fewer windows than the mixture needs.
    """
    numbers, count = (~text.held_out).nonzero().flatten(), steps * windows_per_step
    if len(text.tasks) == 1:
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
    begins = " ".join(shared[0][:200].split())[:40]
    return (
        f"{len(shared)} of the {len(documents)} documents of the evaluation text {name!r} are also in the "
        f"{purpose} text (such as {begins!r}): figures on it are too good"
    )


def document_hash(text: str, seed: int | None = None) -> str:
    """Hash the text of a document, with a seed to decide on which side of the split it belongs."""
    prefix = "" if seed is None else f"{seed}\0"
    return hashlib.sha256((prefix + text).encode("utf-8", "surrogatepass")).hexdigest()


def training_documents(source: str) -> list[str]:
    """Read the documents of a training text, or its examples as text.

    Raises:
        FistaPrunerError: unknown, unreadable, or empty.
    """
    return [item.text if isinstance(item, Example) else item for item in _read(source)]


def _read(source: str) -> Sequence[str | Example]:
    """Read the documents of a source, or its examples."""
    if Path(source).suffix.lower() != ".jsonl" or not Path(source).is_file():
        return source_documents(source, PURPOSE)
    check_source(source, PURPOSE)
    found = [item for item in read_training_file(source) if isinstance(item, Example) or item.strip()]
    if not found:
        raise FistaPrunerError(f"{PURPOSE} text {source!r} is empty")
    return found

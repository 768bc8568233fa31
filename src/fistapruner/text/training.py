"""Make windows of training text or preference pairs, and hold windows out to validate on.

Documents are held out before anything is cut, by a hash of their text: the two sides share no document, and
documents that are added to a source move none from one side to the other. Windows of the two sides are cut apart.
Plain documents are joined and cut; examples are never split. A pair becomes two windows, chosen and rejected, padded at
their end to the longest of all: with a causal model what stands to the right of a token never changes its prediction.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import FistaPrunerError
from ..models.source import padding_id
from ..papers.mamf import Mixture, shuffled
from ..settings.align import PairData
from ..settings.train import TrainingData
from .examples import Example, Pair, read_training_file
from .generate import GENERATED, generate_tokens
from .sources import SELF, bos_of, document_hash, not_blank, passages, source_documents, token_ids
from .windows import JOINT, text_facts

PURPOSE = "training"

MAX_HELD_OUT_WINDOWS = 16
"""Held-out windows of all tasks: more would take time at every check and hardly change the choice."""

TASK = "pairs"
"""Name of the one text of an alignment."""

TEST = 0.1
"""Share of the prompts that the result is measured on, and nothing else; most are trained on."""

MAX_HELD_OUT_PROMPTS = 512
"""Prompts that are held out: more would take time at every check and hardly change the choice of the step."""

SIDES = ("trained", "held_out", "test")

CHARACTERS_PER_TOKEN = 4
"""A source of one document is cut into passages of about one window, at this many characters a token."""


@dataclass(frozen=True)
class TrainingText:
    """Windows to train on and windows held out from training.

    Args:
        tokens, marks: (windows, seqlen) int64 token ids, and which of them carry loss when they are predicted.
        held_out, test: (windows,) bool, for validation, and of pairs to measure the result on.
        task: (windows,) int64 index into ``tasks``, the names of the texts; the source where there is one.
        facts: ``how`` windows were made, ``documents`` read, ``seed``, ``sha256`` of the tokens, and ``tasks``, for
            each the same and the windows, documents, tokens and tokens with loss of either side.
    """

    tokens: Tensor
    marks: Tensor
    held_out: Tensor
    task: Tensor
    tasks: tuple[str, ...]
    facts: dict[str, Any]
    test: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    together: ClassVar[int] = 1  # windows that no pass may part

    @cached_property
    def loss_tokens(self) -> Tensor:
        """(windows,) tokens that carry loss."""
        return self.marks[:, 1:].count_nonzero(1)

    @property
    def counts(self) -> Tensor:
        """(windows,) numbers that the loss of each window is a sum over: tokens that carry loss."""
        return self.loss_tokens

    def windows(self, side: str) -> list[int]:
        """Return the window numbers of a side: ``trained`` or ``held_out``; of pairs also ``test``."""
        test = self.test if len(self.test) else torch.zeros_like(self.held_out)
        where = {"held_out": self.held_out, "test": test, "trained": ~(self.held_out | test)}[side]
        return [int(number) for number in where.nonzero().flatten()]


@dataclass(frozen=True)
class Packed:
    """Windows of one side of one text.

    Args:
        windows, marks: (windows, seqlen) token ids, and which of them carry loss when they are predicted.
        documents: number of documents, from the first, that were read.
        filled: tokens of the windows, without padding; ``too_long``: examples that no window holds.
    """

    windows: Tensor
    marks: Tensor
    documents: int = 0
    filled: int = 0
    too_long: int = 0


def pack_documents(documents: Sequence[str], tokenizer: Any, seqlen: int, windows: int | None, source: str) -> Packed:
    """Join documents by EOS and cut windows that do not overlap; what does not fill a window is dropped.

    No more documents are tokenised than the ``windows`` need, None are all. Where the tokenizer begins a text with BOS,
    every window does. Neither EOS nor BOS stands twice.
    """
    bos, end_of_text = bos_of(tokenizer), tokenizer.eos_token_id
    joint = token_ids(JOINT, tokenizer, source) if end_of_text is None else [end_of_text]
    written = bos if bos != joint else []  # where BOS is EOS, what looks like BOS is a joint
    stream = array("i")  # a list of integers has nine times the bytes
    starts: list[int] = []
    read = end = 0
    for text in documents:
        ids = token_ids(text, tokenizer, source)
        stream.extend(ids if ids[-1:] == [end_of_text] else ids + joint)
        read += 1
        while len(starts) != windows:
            own = 0 if stream[end : end + 1].tolist() == written else len(bos)
            if len(stream) < end + seqlen - own:
                break
            starts.append(end)
            end += seqlen - own
        if len(starts) == windows:
            break
    cut = torch.empty(len(starts), seqlen, dtype=torch.int64)
    cut[:, : len(bos)] = torch.tensor(bos, dtype=torch.int64)
    for row, start, stop in zip(cut, starts, [*starts, end][1:], strict=True):
        row[seqlen - (stop - start) :] = torch.from_numpy(np.asarray(stream[start:stop]))
    return Packed(cut, torch.ones_like(cut, dtype=torch.bool), read, cut.numel())


def pack_examples(examples: Sequence[Example], tokenizer: Any, seqlen: int, windows: int | None) -> Packed:
    """Pack examples whole: each goes into the first window that has room for it, else it begins a new one.

    Windows are padded at their end; padding carries no loss. Examples without tokens, and of more than ``seqlen``, are
    left out. The first example that needs one window more than ``windows`` ends the packing.
    """
    packed: list[tuple[array[int], array[int]]] = []  # token ids and marks
    room = np.zeros(1024, dtype=np.int64)  # of every window
    read = too_long = filled = 0
    bos = bos_of(tokenizer)
    for example in examples:
        ids, marks = example.encode(tokenizer, bos)
        if ids and len(ids) <= seqlen:
            fits = room[: len(packed)] >= len(ids)
            place = int(fits.argmax()) if fits.any() else len(packed)
            if place == len(packed):
                if place == windows:
                    break
                packed.append((array("i"), array("b")))
                room = np.append(room, np.zeros_like(room)) if place == len(room) else room
                room[place] = seqlen
            packed[place][0].extend(ids)
            packed[place][1].extend(marks)
            room[place] -= len(ids)
            filled += len(ids)
        read, too_long = read + 1, too_long + (len(ids) > seqlen)
    cut = torch.full((len(packed), seqlen), padding_id(tokenizer))
    carry = torch.zeros(len(packed), seqlen, dtype=torch.bool)
    for row, window in enumerate(packed):
        for filling, numbers in zip((cut, carry), window, strict=True):
            filling[row, : len(numbers)] = torch.from_numpy(np.asarray(numbers))
    return Packed(cut, carry, read, filled, too_long)


class _Source:
    """One text source, read: documents or the passages of one, examples, or nothing for generated text."""

    def __init__(self, source: str, seqlen: int) -> None:
        found = [] if source == SELF else _read(source)
        self.source, self.read = source, len(found) or None
        self.examples = {item.text: item for item in found if isinstance(item, Example)}
        self.documents = [item.text if isinstance(item, Example) else item for item in found]
        joined = "documents joined by end-of-text tokens, windows that do not overlap"
        if self.read == 1 and not self.examples:
            cut = (part.rstrip() for part in passages(self.documents[0], CHARACTERS_PER_TOKEN * seqlen))
            self.documents = [part for part in cut if part]
            joined = f"one document, cut into {len(self.documents)} passages; {joined}"
        self.how = "whole examples, loss on the answers only" if self.examples else joined if found else GENERATED

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
        by_hash = {document_hash(document, data.seed): document for document in self.documents}
        hashes = sorted(by_hash)
        ordered = [by_hash[digest] for digest in hashes]
        below = sum(int(digest[:16], 16) < data.held_out * 2**64 for digest in hashes)
        first = self.pack(ordered, tokenizer, seqlen, 1).documents
        held = max(1, below, min(first, len(ordered) // 2) if self.examples else first)
        held = min(held, max(1, len(ordered) - 1))
        return ordered[:held], ordered[held:]

    def facts(self, *sides: Packed) -> dict[str, Any]:
        """Describe what is trained on and what is held out; generated text has no documents."""
        trained, held_out = (
            side_facts(each.documents if self.read else None, each.marks, each.filled) for each in sides
        )
        return {
            "source": self.source,
            "how": self.how,
            "documents": self.read,
            "too_long": sum(each.too_long for each in sides),
            "samples": sum(len(each.windows) for each in sides),
            "trained": trained,
            "held_out": held_out,
        }


def side_facts(documents: int | None, marks: Tensor, filled: int) -> dict[str, Any]:
    """Describe one side of a text: of ``documents``, its windows and tokens, and those that carry loss."""
    loss_tokens = int(marks[:, 1:].count_nonzero())
    return {"documents": documents, "windows": len(marks), "tokens": filled, "loss_tokens": loss_tokens}


def training_text(
    data: TrainingData,
    tokenizer: Any,
    seqlen: int,
    load_model: Callable[[], Any] | None = None,
    say: Callable[[str], None] = lambda _: None,
    windows: int | None = None,
) -> TrainingText:
    """Make the training windows and the held-out windows.

    Args:
        data, tokenizer, seqlen: what is drawn, a ``transformers`` tokenizer, and tokens in a window.
        load_model: loads the model that generates text; needed for the source ``self`` only.
        say: receives the progress of text generation, and what is left out, as sentences.
        windows: to train on, at most; None is as many as the asked tokens need.
    """
    named = data.sources
    sources = [_Source(source, seqlen) for source in named.values()]
    asked = math.ceil(data.tokens / seqlen)
    shares = _windows_of_tasks(data, len(sources), asked if windows is None else windows)
    splits = [source.split(data, tokenizer, seqlen) if source.read else ([], []) for source in sources]
    elsewhere = {text for held, _ in splits for text in held}  # what one task holds out is trained on by none
    most = max(1, MAX_HELD_OUT_WINDOWS // len(sources))
    sides: dict[int, tuple[Packed, Packed]] = {}  # to train on, and held out
    # Text that the model generates comes last: it takes long, and the others may be refused.
    for number in sorted(range(len(sources)), key=lambda number: sources[number].source == SELF):
        source, (held, rest) = sources[number], splits[number]
        if source.source == SELF:
            assert load_model is not None
            # However few windows are trained on: few would choose the step by chance.
            out = max(1, min(most, round(data.held_out * _windows_of_tasks(data, len(sources), asked)[number])))
            made = generate_tokens(load_model(), tokenizer, shares[number] + out, seqlen, seed=data.seed, say=say)
            held_out, trained = (Packed(part, part >= 0, filled=part.numel()) for part in (made[:out], made[out:]))
        else:
            rest = [text for text in rest if text not in elsewhere]
            held_out = source.pack(held, tokenizer, seqlen, most)
            trained = source.pack(rest, tokenizer, seqlen, shares[number])
            _check_sides(source, trained, held_out, seqlen, say)
        sides[number] = trained, held_out
    parts = [(number, held_out) for held_out in (False, True) for number in range(len(sources))]
    packed = [sides[number][held_out] for number, held_out in parts]
    counts = torch.tensor([len(side.windows) for side in packed])
    tokens = torch.cat([side.windows for side in packed])
    about = {name: sources[number].facts(*sides[number]) for number, name in enumerate(named)}
    return TrainingText(
        tokens=tokens,
        marks=torch.cat([side.marks for side in packed]),
        held_out=torch.tensor([held_out for _, held_out in parts]).repeat_interleave(counts),
        task=torch.tensor([number for number, _ in parts]).repeat_interleave(counts),
        tasks=tuple(named),
        facts={**text_facts(data.tasks, about, data.seed, tokens), "tasks": about},
    )


def _check_sides(source: _Source, trained: Packed, held_out: Packed, seqlen: int, say: Callable[[str], None]) -> None:
    """Refuse a source without loss on either side, and say how many examples are left out."""
    if not all(bool(side.marks[:, 1:].any()) for side in (trained, held_out)):
        fitting = f"examples of at most {seqlen} tokens" if source.examples else "tokens"
        raise FistaPrunerError(
            f"{PURPOSE} text {source.source!r} is too short: its {fitting} do not fill one window of {seqlen} to train "
            "on and one to validate on (what is repeated, or held out by another task, does not count); take a longer "
            "text or another seqlen"
        )
    if too_long := held_out.too_long + trained.too_long:
        tried = held_out.documents + trained.documents
        say(f"{too_long} of {tried} examples of {source.source} have more than {seqlen} tokens and were left out")


def _windows_of_tasks(data: TrainingData, tasks: int, windows: int) -> list[int]:
    """Share the training windows out among the tasks, as the mixture will draw them."""
    drawn = Mixture(tasks, data.per_round, data.seed).draw(windows)
    return [max(1, count) for count in torch.bincount(drawn, minlength=tasks).tolist()]


def order(text: TrainingText, steps: int, windows_per_step: int, data: TrainingData) -> Tensor:
    """Draw the windows of every step: all training windows once, then all again in another order.

    Several tasks are drawn in rounds (:class:`Mixture`), and so are the windows of each: all once, then all again.

    Returns:
        (steps, windows_per_step) int64 numbers of windows.
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


def training_documents(source: str) -> list[str]:
    """Read the documents of a training text, or its examples as text."""
    return [item.text if isinstance(item, Example) else item for item in _read(source)]


def _read(source: str) -> Sequence[str | Example]:
    """Read the documents of a source, or its examples, that are not blank."""
    if Path(source).suffix.lower() != ".jsonl" or not Path(source).is_file():
        return source_documents(source, PURPOSE)
    return not_blank(read_training_file(source), source, PURPOSE)


# --- preference pairs


@dataclass(frozen=True)
class Pairs(TrainingText):
    """Tokenised pairs: windows 2 i and 2 i + 1 are the chosen and the rejected answer of pair i."""

    together: ClassVar[int] = 2

    @cached_property
    def counts(self) -> Tensor:
        """See :class:`TrainingText`: the loss of a pair stands at its chosen answer."""
        return torch.tensor([1, 0]).repeat(len(self.tokens) // 2)

    @property
    def lengths(self) -> Tensor:
        """(windows,) tokens up to the last of the answer."""
        return last_places(self.marks)


def tokenise_pairs(
    pairs: Sequence[Pair], data: PairData, tokenizer: Any, max_length: int, say: Callable[[str], None]
) -> Pairs:
    """Tokenise pairs and split them by the SHA-256 of their prompt: equal prompts are on one side.

    Pairs whose prompt fills ``max_length`` are left out, and so are those whose answers add nothing to it or are equal
    up to there; longer answers are cut at their end.

    ``say`` receives how many pairs are left out or cut.
    """
    kept: list[tuple[Pair, int, list[int], list[int]]] = []
    too_long = alike = cut = 0
    for pair in pairs:
        prompt, *answers = pair.encode(tokenizer)
        chosen, rejected = (answer[:max_length] for answer in answers)
        if len(prompt) >= max_length:
            too_long += 1
        elif min(map(len, answers)) <= max(1, len(prompt)) or chosen == rejected:  # nothing precedes the first token
            alike += 1
        else:
            cut += any(len(answer) > max_length for answer in answers)
            kept.append((pair, len(prompt), chosen, rejected))
    for count, sentence in (
        (too_long, f"are left out: their prompts have {max_length} tokens or more"),
        (alike, f"are left out: their answers add no tokens, or the same ones, in the first {max_length}"),
        (cut, f"have answers that are cut at {max_length} tokens"),
    ):
        if count:
            say(f"{count} of {len(pairs)} pairs {sentence}")
    side = torch.tensor(_sides([pair.key for pair, *_ in kept], data, too_long + alike)).repeat_interleave(2)
    written = [torch.tensor(answer) for _, _, *both in kept for answer in both]
    tokens = pad_sequence(written, batch_first=True, padding_value=padding_id(tokenizer))
    starts = torch.tensor([max(1, start) for _, start, *_ in kept]).repeat_interleave(2)  # nothing precedes the first
    places, ends = torch.arange(tokens.shape[1]), torch.tensor([len(answer) for answer in written])
    marks = (places >= starts[:, None]) & (places < ends[:, None])
    facts = {
        "source": str(data.pairs),
        "how": "preference pairs, split by the hash of the prompt",
        "documents": len(pairs),
        "too_long": too_long + alike,
        "samples": len(tokens),
    }
    for number, name in enumerate(SIDES):
        where = side == number
        facts[name] = side_facts(int(where.sum()) // 2, marks[where], int(last_places(marks[where]).sum()))
    return Pairs(
        tokens=tokens,
        marks=marks,
        held_out=side == SIDES.index("held_out"),
        task=torch.zeros(len(tokens), dtype=torch.int64),
        tasks=(TASK,),
        facts={**text_facts(False, {TASK: facts}, data.seed, tokens), "tasks": {TASK: facts}},
        test=side == SIDES.index("test"),
    )


def last_places(marks: Tensor) -> Tensor:
    """Return the (windows,) tokens up to the last one that is marked."""
    return (marks * torch.arange(1, marks.shape[1] + 1)).amax(1)


def _sides(prompts: Sequence[str], data: PairData, left_out: int) -> list[int]:
    """Return the side of every pair, an index into :data:`SIDES`; each has at least one prompt.

    Where the share to hold out has more than :data:`MAX_HELD_OUT_PROMPTS` prompts, the others are trained on.
    """
    hashes = sorted({document_hash(prompt) for prompt in prompts})
    if len(hashes) < len(SIDES):
        longer = f"; {left_out} pairs were left out: take a larger max_length" if left_out else ""
        raise FistaPrunerError(
            f"{data.pairs} has pairs of {len(hashes)} different prompts that fit: at least 3 are needed, to train on, "
            f"to hold out, and to test{longer}"
        )
    share = [int(digest[:16], 16) / 2**64 for digest in hashes]
    held = max(1, sum(each < data.held_out for each in share))
    test = max(1, sum(each < data.held_out + TEST for each in share) - held)
    held, test = min(held, len(hashes) - 2), min(test, len(hashes) - held - 1)
    kept = min(held, MAX_HELD_OUT_PROMPTS)
    numbers = [1] * kept + [0] * (held - kept) + [2] * test + [0] * (len(hashes) - held - test)
    side = dict(zip(hashes, numbers, strict=True))
    return [side[document_hash(prompt)] for prompt in prompts]


def pair_order(pairs: Pairs, steps: int, pairs_per_step: int, seed: int) -> Tensor:
    """Draw the pairs of every step: all training pairs once, then all again in another order.

    Returns:
        (steps, 2 * pairs_per_step) int64 numbers of windows; the answers of a pair are neighbours.
    """
    chosen = torch.tensor(pairs.windows("trained")[::2])
    drawn = shuffled(chosen, steps * pairs_per_step, seed, TASK)
    return torch.stack([drawn, drawn + 1], -1).view(steps, 2 * pairs_per_step)

"""Make the training windows of a recovery run, and hold windows out to validate on.

Documents are held out before anything is cut, by a hash of their text: the two sides share no document, and
documents that are added to a source move none from one side to the other. Windows of the two sides are cut apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..recipes.recover_settings import TrainingData
from ..runtime.numerics import seeded
from .self_generated import generate_tokens
from .text import adds_bos
from .windows import JOINT, SELF, source_documents, tenths, tokenise, tokens_sha256

MAX_HELD_OUT_WINDOWS = 16
"""More would take time at every validation check and hardly change the choice."""

CHARACTERS_PER_TOKEN = 4
"""A source of one document is cut into passages of about one window, at this many characters a token."""

PURPOSE = "training"


@dataclass(frozen=True)
class TrainingText:
    """Windows to train on and windows held out from training.

    Args:
        tokens: (windows, seqlen) int64 token ids.
        marks: (windows, seqlen) bool: tokens that carry loss when they are predicted.
        held_out: (windows,) bool: windows for validation only.
        task: (windows,) int64 index into ``tasks``.
        tasks: names of the texts; the source where there is one.
        facts: for each task its source, how windows were made, documents, windows and tokens on either side; ``seed``;
            ``sha256`` of the tokens.
        documents: hashes of the documents trained on, for :func:`shared_documents`; not stored.
    """

    tokens: Tensor
    marks: Tensor
    held_out: Tensor
    task: Tensor
    tasks: tuple[str, ...]
    facts: dict[str, Any]
    documents: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Cut:
    """Windows of one side of one text.

    Args:
        windows: (windows, seqlen) token ids.
        documents: number of documents that were read for them.
        tokens: tokens of these documents.
    """

    windows: list[list[int]]
    documents: int
    tokens: int


def training_text(
    data: TrainingData,
    tokenizer: Any,
    seqlen: int,
    load_model: Callable[[], Any] | None = None,
    say: Callable[[str], None] | None = None,
) -> TrainingText:
    """Make the training windows, as many as the asked tokens need, and the held-out windows.

    Args:
        data: source, tokens, share that is held out, seed.
        tokenizer: a ``transformers`` tokenizer. Where it begins a text with BOS, every window begins with BOS.
        seqlen: tokens in a window.
        load_model: loads the model that generates text; called for the source ``self`` only.
        say: receives the progress of text generation, as sentences.

    Raises:
        FistaPrunerError: no source, an unknown, unreadable or empty one, or a text too short for one window on
            either side.
    """
    if data.source is None:
        raise FistaPrunerError("there is no training text: give one with --data")
    windows = -(-data.tokens // seqlen)
    documents: set[str] = set()
    if data.source == SELF:
        trained, held, facts = _generated(data, tokenizer, seqlen, windows, load_model, say)
    else:
        trained, held, facts = _documents(data, data.source, tokenizer, seqlen, windows, documents)
    tokens = torch.cat([trained, held])
    held_out = torch.arange(len(tokens)) >= len(trained)
    return TrainingText(
        tokens=tokens,
        marks=torch.ones_like(tokens, dtype=torch.bool),
        held_out=held_out,
        task=torch.zeros(len(tokens), dtype=torch.int64),
        tasks=(data.source,),
        facts={"seed": data.seed, "sha256": tokens_sha256(tokens), "tasks": {data.source: facts}},
        documents=frozenset(documents),
    )


def order(text: TrainingText, steps: int, windows_per_step: int, data: TrainingData) -> Tensor:
    """Draw the windows of every step: all training windows once, then all again in another order.

    Args:
        text: the training text.
        steps: optimizer steps.
        windows_per_step: windows of a step.
        data: its seed decides the order.

    Returns:
        (steps, windows_per_step) int64 numbers of windows.
    """
    numbers = (~text.held_out).nonzero().flatten()
    return repeated(numbers, steps * windows_per_step, data.seed, "order").view(steps, windows_per_step)


def repeated(numbers: Tensor, count: int, seed: int, *purpose: str | int) -> Tensor:
    """Draw ``count`` of the numbers: all once in a random order, then all again in another, and so on."""
    rounds = -(-count // len(numbers))
    return torch.cat(
        [numbers[torch.randperm(len(numbers), generator=seeded(seed, *purpose, turn))] for turn in range(rounds)]
    )[:count]


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


def pack_documents(documents: Sequence[str], tokenizer: Any, seqlen: int, windows: int | None, source: str) -> Cut:
    """Join documents by EOS and cut windows that do not overlap; what does not fill a window is dropped.

    Args:
        documents: the texts; no more of them are tokenised than the windows need.
        tokenizer: a ``transformers`` tokenizer.
        seqlen: tokens in a window, BOS included.
        windows: at most; None cuts all.
        source: name of the text, for messages.
    """
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    room = seqlen - len(bos)
    joint = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else _joint(tokenizer)
    stream: list[int] = []
    read = tokens = 0
    for ids in tokenise(documents, tokenizer, source, PURPOSE):
        stream += ids + joint
        read += 1
        tokens += len(ids)
        if windows is not None and len(stream) >= windows * room:
            break
    count = len(stream) // room if windows is None else min(windows, len(stream) // room)
    return Cut([bos + stream[start : start + room] for start in range(0, count * room, room)], read, tokens)


def passages(text: str, characters: int) -> list[str]:
    """Cut a text into passages of at most ``characters``, where it has blank lines, line ends or spaces."""
    parts, start = [], 0
    while start < len(text):
        end = start + characters
        if end < len(text):
            for separator in ("\n\n", "\n", " "):
                place = text.rfind(separator, start + 1, end)
                if place > 0:
                    end = place + len(separator)
                    break
        parts.append(text[start:end].rstrip())
        start = end
    return [part for part in parts if part]


def _joint(tokenizer: Any) -> list[int]:
    """Tokenise the string that joins documents where there is no EOS."""
    return list(tokenizer(JOINT, add_special_tokens=False, return_attention_mask=False)["input_ids"])


def _documents(
    data: TrainingData, source: str, tokenizer: Any, seqlen: int, windows: int, hashes: set[str]
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Make the windows of a text source; the hashes of the documents trained on are added to ``hashes``."""
    documents = source_documents(source, PURPOSE)
    read = len(documents)
    how = "documents joined by end-of-text tokens, windows that do not overlap"
    if read == 1:
        hashes.add(document_hash(documents[0]))
        documents = passages(documents[0], CHARACTERS_PER_TOKEN * seqlen)
        how = f"one document, cut into {len(documents)} passages; {how}"
    ordered, held = split_documents(documents, data.held_out, data.seed)
    # A held-out side without a whole window would measure nothing.
    held = max(held, pack_documents(ordered, tokenizer, seqlen, 1, source).documents)
    validated = pack_documents(ordered[:held], tokenizer, seqlen, MAX_HELD_OUT_WINDOWS, source)
    trained = pack_documents(ordered[held:], tokenizer, seqlen, windows, source)
    if not trained.windows or not validated.windows:
        there = pack_documents(ordered, tokenizer, seqlen, None, source).tokens
        raise FistaPrunerError(
            f"training text {source!r} is too short: its {there} tokens do not fill one window of {seqlen} to train on "
            f"and one to validate on, and {data.tokens} tokens are asked; take a longer text or a smaller --seqlen"
        )
    hashes.update(map(document_hash, ordered[held : held + trained.documents]))
    facts = {
        "source": source,
        "how": how,
        "documents": read,
        "duplicates": len(documents) - len(ordered),
        "trained": {"documents": trained.documents, "windows": len(trained.windows)},
        "held_out": {"documents": validated.documents, "windows": len(validated.windows)},
        "tokens": len(trained.windows) * seqlen,
    }
    return _tensor(trained.windows), _tensor(validated.windows), facts


def _generated(
    data: TrainingData,
    tokenizer: Any,
    seqlen: int,
    windows: int,
    load_model: Callable[[], Any] | None,
    say: Callable[[str], None] | None,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Let the model generate the windows; whole windows are held out."""
    if load_model is None:
        raise FistaPrunerError("training source 'self' needs the model to generate text: give a text source instead")
    held = max(1, min(MAX_HELD_OUT_WINDOWS, round(data.held_out * windows)))
    progress = None if say is None else tenths(say, PURPOSE)
    tokens = generate_tokens(load_model(), tokenizer, windows + held, seqlen, seed=data.seed, progress=progress)
    facts = {
        "source": SELF,
        "how": "generated by the model at temperature 1",
        "documents": None,
        "duplicates": 0,
        "trained": {"documents": None, "windows": windows},
        "held_out": {"documents": None, "windows": held},
        "tokens": windows * seqlen,
    }
    return tokens[held:], tokens[:held], facts


def _tensor(windows: list[list[int]]) -> Tensor:
    return torch.tensor(windows, dtype=torch.int64)

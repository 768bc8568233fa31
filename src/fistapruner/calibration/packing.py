"""Pack training text into windows: plain documents are joined and cut, examples are never split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .examples import Example
from .text import adds_bos
from .windows import JOINT, tokenise

PURPOSE = "training"


@dataclass(frozen=True)
class Packed:
    """Windows of one side of one text.

    Args:
        windows: token ids of each window, ``seqlen`` of them.
        marks: tokens that carry loss when they are predicted, in the same shape.
        documents: number of documents, from the first, that were read.
        first: of these, how many the first window needed; of examples, how many came before a second one began.
        tokens: tokens of the documents read; ``filled``: tokens of the windows, without padding.
        too_long: examples among them that no window holds.
    """

    windows: list[list[int]]
    marks: list[list[bool]]
    documents: int
    first: int
    tokens: int
    filled: int
    too_long: int = 0


def pack_documents(documents: Sequence[str], tokenizer: Any, seqlen: int, windows: int | None, source: str) -> Packed:
    """Join documents by EOS and cut windows that do not overlap; what does not fill a window is dropped.

    Args:
        documents: the texts; no more of them are tokenised than the windows need.
        tokenizer: a ``transformers`` tokenizer. Where it begins a text with BOS, every window begins with BOS.
        seqlen: tokens in a window, BOS included.
        windows: at most; None cuts all.
        source: name of the text, for messages.
    """
    bos = _bos(tokenizer)
    room = seqlen - len(bos)
    stream: list[int] = []
    read = tokens = first = 0
    joint = _joint(tokenizer)
    for ids in tokenise(documents, tokenizer, source, PURPOSE):
        stream += ids + joint
        read += 1
        tokens += len(ids)
        first = first or (read if len(stream) >= room else 0)
        if windows is not None and len(stream) >= windows * room:
            break
    count = len(stream) // room if windows is None else min(windows, len(stream) // room)
    cut = [bos + stream[start : start + room] for start in range(0, count * room, room)]
    return Packed(cut, [[True] * seqlen for _ in cut], read, first or read, tokens, count * seqlen)


def pack_examples(examples: Sequence[Example], tokenizer: Any, seqlen: int, windows: int | None) -> Packed:
    """Pack examples whole: each goes into the first window that has room for it, else it begins a new one.

    Windows are padded at their end; padding carries no loss. Examples of more than ``seqlen`` tokens are left out.

    Args:
        examples: in the order in which they are packed.
        tokenizer: a ``transformers`` tokenizer.
        seqlen: tokens in a window.
        windows: at most; the first example that needs another one ends the packing. None packs all.
    """
    packed: list[list[int]] = []
    marked: list[list[bool]] = []
    rooms: list[int] = []
    read = tokens = first = too_long = 0
    bos = _bos(tokenizer)
    for example in examples:
        ids, marks = example.encode(tokenizer, bos)
        if len(ids) > seqlen:
            read, too_long, tokens = read + 1, too_long + 1, tokens + len(ids)
            continue
        place = next((place for place, room in enumerate(rooms) if room >= len(ids)), len(rooms))
        if place == len(packed):
            if place == 1:
                first = read
            if place == windows:
                break
            packed.append([])
            marked.append([])
            rooms.append(seqlen)
        packed[place] += ids
        marked[place] += marks
        rooms[place] -= len(ids)
        read, tokens = read + 1, tokens + len(ids)
    padding = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    filled = sum(map(len, packed))
    for window, its_marks, room in zip(packed, marked, rooms, strict=True):
        its_marks.extend([False] * room)
        window.extend([padding] * room)
    return Packed(packed, marked, read, first or read, tokens, filled, too_long)


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


def _bos(tokenizer: Any) -> list[int]:
    """Return what begins a text by the tokenizer's own settings."""
    return [tokenizer.bos_token_id] if adds_bos(tokenizer) else []


def _joint(tokenizer: Any) -> list[int]:
    """Return what joins documents: EOS, or the tokens of a blank line where there is none."""
    if tokenizer.eos_token_id is not None:
        return [tokenizer.eos_token_id]
    return list(tokenizer(JOINT, add_special_tokens=False, return_attention_mask=False)["input_ids"])

"""Pack training text into windows: plain documents are joined and cut, examples are never split."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.tokenizer import padding_id
from .examples import Example
from .tokens import bos_of, token_ids
from .windows import JOINT

PURPOSE = "training"


@dataclass(frozen=True)
class Packed:
    """Windows of one side of one text.

    Args:
        windows: (windows, seqlen) int64 token ids.
        marks: (windows, seqlen) bool: tokens that carry loss when they are predicted.
        documents: number of documents, from the first, that were read.
        first: of these, how many the first window needed; of examples, how many came before a second one began.
        tokens: tokens of the documents read; ``filled``: tokens of the windows, without padding.
        too_long: examples among them that no window holds.
    """

    windows: Tensor
    marks: Tensor
    documents: int
    first: int
    tokens: int
    filled: int
    too_long: int = 0


def pack_documents(documents: Sequence[str], tokenizer: Any, seqlen: int, windows: int | None, source: str) -> Packed:
    """Join documents by EOS and cut windows that do not overlap; what does not fill a window is dropped.

    Documents that end with EOS by themselves get no second one, nor windows that begin with BOS.

    Args:
        documents: the texts; no more of them are tokenised than the windows need.
        tokenizer: a ``transformers`` tokenizer. Where it begins a text with BOS, every window begins with BOS.
        seqlen: tokens in a window, BOS included.
        windows: at most; None cuts all.
        source: name of the text, for messages.
    """
    bos, end_of_text = bos_of(tokenizer), tokenizer.eos_token_id
    joint = token_ids(JOINT, tokenizer, source) if end_of_text is None else [end_of_text]
    written = bos if bos != joint else []  # where BOS is EOS, what looks like BOS is a joint
    stream = array("i")  # a list of integers has nine times the bytes
    starts: list[int] = []
    read = tokens = first = end = 0
    for text in documents:
        ids = token_ids(text, tokenizer, source)
        stream.extend(ids if ids[-1:] == [end_of_text] else ids + joint)
        read += 1
        tokens += len(ids)
        while len(starts) != windows:
            own = 0 if stream[end : end + 1].tolist() == written else len(bos)
            if len(stream) < end + seqlen - own:
                break
            starts.append(end)
            end += seqlen - own
        first = first or (read if starts else 0)
        if len(starts) == windows:
            break
    cut = torch.empty(len(starts), seqlen, dtype=torch.int64)
    cut[:, : len(bos)] = torch.tensor(bos, dtype=torch.int64)
    for row, start, stop in zip(cut, starts, [*starts, end][1:], strict=True):
        row[seqlen - (stop - start) :] = torch.from_numpy(np.asarray(stream[start:stop]))
    return Packed(cut, torch.ones_like(cut, dtype=torch.bool), read, first or read, tokens, cut.numel())


def pack_examples(examples: Sequence[Example], tokenizer: Any, seqlen: int, windows: int | None) -> Packed:
    """Pack examples whole: each goes into the first window that has room for it, else it begins a new one.

    Windows are padded at their end; padding carries no loss. Examples without tokens, and of more than ``seqlen``, are
    left out.

    Args:
        examples: in the order in which they are packed.
        tokenizer: a ``transformers`` tokenizer.
        seqlen: tokens in a window.
        windows: at most; the first example that needs another one ends the packing. None packs all.
    """
    packed: list[tuple[array[int], array[int]]] = []  # token ids and marks
    room = np.zeros(1024, dtype=np.int64)  # of every window
    read = tokens = first = too_long = filled = 0
    bos = bos_of(tokenizer)
    for example in examples:
        ids, marks = example.encode(tokenizer, bos)
        if ids and len(ids) <= seqlen:
            fits = room[: len(packed)] >= len(ids)
            place = int(fits.argmax()) if fits.any() else len(packed)
            if place == len(packed):
                first = read if place == 1 else first
                if place == windows:
                    break
                packed.append((array("i"), array("b")))
                room = np.append(room, np.zeros_like(room)) if place == len(room) else room
                room[place] = seqlen
            packed[place][0].extend(ids)
            packed[place][1].extend(marks)
            room[place] -= len(ids)
            filled += len(ids)
        read, tokens, too_long = read + 1, tokens + len(ids), too_long + (len(ids) > seqlen)
    cut = torch.full((len(packed), seqlen), padding_id(tokenizer))
    carry = torch.zeros(len(packed), seqlen, dtype=torch.bool)
    for row, window in enumerate(packed):
        for filling, numbers in zip((cut, carry), window, strict=True):
            filling[row, : len(numbers)] = torch.from_numpy(np.asarray(numbers))
    return Packed(cut, carry, read, first or read, tokens, filled, too_long)

"""Pack training text into windows: plain documents are joined and cut, examples are never split."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.tokenizer import padding_id
from .examples import Example
from .text import adds_bos
from .windows import JOINT, tokenise

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
    bos = _bos(tokenizer)
    stream = array("i")  # a list of integers has nine times the bytes
    starts: list[int] = []
    read = tokens = first = end = 0
    joint = _joint(tokenizer)
    written = bos if bos != joint else []  # where BOS is EOS, what looks like BOS is a joint
    for ids in tokenise(documents, tokenizer, source, PURPOSE):
        stream.extend(ids if ids[-1:] == [tokenizer.eos_token_id] else ids + joint)
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
        row[seqlen - (stop - start) :] = _tensor(stream[start:stop])
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
    packed: list[array[int]] = []
    marked: list[array[int]] = []
    roomy: list[list[int]] = [[] for _ in range(seqlen + 1)]  # heaps of windows, by their room
    none = np.iinfo(np.int64).max
    lowest = np.full(seqlen + 1, none)  # window of each heap
    read = tokens = first = too_long = 0
    bos = _bos(tokenizer)
    for example in examples:
        ids, marks = example.encode(tokenizer, bos)
        if not ids or len(ids) > seqlen:
            read, too_long, tokens = read + 1, too_long + bool(ids), tokens + len(ids)
            continue
        room = len(ids) + int(lowest[len(ids) :].argmin())
        if not roomy[room]:
            if len(packed) == 1:
                first = read
            if len(packed) == windows:
                break
            room = seqlen
            roomy[room].append(len(packed))
            packed.append(array("i"))
            marked.append(array("b"))
        place, left = heappop(roomy[room]), room - len(ids)
        heappush(roomy[left], place)
        for changed in (room, left):
            lowest[changed] = roomy[changed][0] if roomy[changed] else none
        packed[place].extend(ids)
        marked[place].extend(marks)
        read, tokens = read + 1, tokens + len(ids)
    filled = sum(map(len, packed))
    cut = torch.full((len(packed), seqlen), padding_id(tokenizer))
    carry = torch.zeros(len(packed), seqlen, dtype=torch.bool)
    for row, (window, its_marks) in enumerate(zip(packed, marked, strict=True)):
        cut[row, : len(window)] = _tensor(window)
        carry[row, : len(window)] = _tensor(its_marks)
    return Packed(cut, carry, read, first or read, tokens, filled, too_long)


def _tensor(numbers: array[int]) -> Tensor:
    """Return an array as a tensor that shares its memory."""
    return torch.from_numpy(np.asarray(numbers))


def _bos(tokenizer: Any) -> list[int]:
    """Return what begins a text by the tokenizer's own settings."""
    return [tokenizer.bos_token_id] if adds_bos(tokenizer) else []


def _joint(tokenizer: Any) -> list[int]:
    """Return what joins documents: EOS, or the tokens of a blank line where there is none."""
    if tokenizer.eos_token_id is not None:
        return [tokenizer.eos_token_id]
    return list(tokenizer(JOINT, add_special_tokens=False, return_attention_mask=False)["input_ids"])

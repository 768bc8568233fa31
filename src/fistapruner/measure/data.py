"""Cut evaluation text into token windows, by the protocol that the pruning papers share.

The rows of the data set are joined to one string (:mod:`fistapruner.text.sources`), tokenised once (a large one by
parts), and cut into non-overlapping windows; what does not fill a window is dropped.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..text.sources import (
    DATA_SETS,
    LARGE,
    PYTHON,
    PYTHON_EVAL,
    bos_of,
    check_source,
    load_documents,
    passages,
    python_documents,
    read_documents,
    token_ids,
)


@dataclass(frozen=True)
class Windows:
    """Token windows of one text."""

    tokens: Tensor  # (windows, seqlen) int64
    data: str  # name of the data set or file
    split: str  # of it; file for a local one
    bos: str  # where BOS tokens stand: none, text or window

    @property
    def seqlen(self) -> int:
        """Return the number of tokens in a window."""
        return int(self.tokens.shape[1])

    @property
    def sha256(self) -> str:
        """Hash of the token ids and their shape; equal hashes mean the same windows."""
        shape = "x".join(map(str, self.tokens.shape)).encode()
        return hashlib.sha256(shape + self.tokens.to(torch.int32).contiguous().numpy().tobytes()).hexdigest()


def load_windows(data: str, tokenizer: Any, seqlen: int, windows: int | None = None, bos: str = "auto") -> Windows:
    """Read a text and cut it into windows.

    Args:
        data: a data set (``wikitext2``, ``ptb``, ``c4``, through the extra ``data``), ``python`` (the part of Python's
            language reference that calibration never sees), or a text file, whose documents are joined by blank lines.
        tokenizer: a ``transformers`` tokenizer.
        seqlen: tokens in a window.
        windows: take only this many, from the start.
        bos: ``auto`` puts BOS in front of every window exactly if the tokenizer adds it to a text by its own setting;
            ``text`` leaves it where the tokenizer put it, once in front of the whole text, as the scripts of most
            papers do; ``none`` has no BOS; ``window`` has one in front of every window.
    """
    text, split, most = read_text(data)
    if most is not None:
        windows = min(windows or most, most)
    return cut_windows(text, tokenizer, seqlen, windows, bos, Path(data).name if split == "file" else data, split)


def cut_windows(
    text: str,
    tokenizer: Any,
    seqlen: int,
    windows: int | None = None,
    bos: str = "auto",
    data: str = "text",
    split: str = "text",
) -> Windows:
    """Tokenise a text, a large one by parts, and cut it; see :func:`load_windows`."""
    if bos == "auto":
        bos = "window" if bos_of(tokenizer) else "none"
    if bos != "none" and tokenizer.bos_token_id is None:
        raise FistaPrunerError(f"bos {bos!r} cannot be done: this tokenizer has no BOS token")
    room = seqlen - 1 if bos == "window" else seqlen
    parts, found = [[tokenizer.bos_token_id] if bos == "text" else []], 0
    for passage in passages(text, LARGE):
        parts.append(token_ids(passage, tokenizer, data))
        found += len(parts[-1])
        if windows is not None and found >= windows * room:
            break
    ids = torch.cat([torch.tensor(part, dtype=torch.int32) for part in parts]).long()
    count = len(ids) // room if windows is None else min(windows, len(ids) // room)
    if count < 1:
        raise FistaPrunerError(
            f"{data}: {len(ids)} tokens do not fill one window of {seqlen}: take a longer text or a smaller seqlen"
        )
    tokens = ids[: count * room].view(count, room)
    if bos == "window":
        tokens = torch.cat([torch.full((count, 1), tokenizer.bos_token_id), tokens], dim=1)
    return Windows(tokens, data, split, bos)


def read_text(data: str) -> tuple[str, str, int | None]:
    """Read the joined text of a data set or file, its split, and the most windows the protocol takes."""
    text = "\n\n".join(evaluation_documents(data))
    if Path(data).is_file():
        return text, "file", None
    known = DATA_SETS.get(data)
    return (text, "held out", None) if known is None else (text, known.held_out.name, known.held_out.windows)


def check_data(data: str) -> None:
    """Refuse evaluation text that is neither a known name nor a text file, or needs a missing extra."""
    check_source(data, "data", (*DATA_SETS, PYTHON))


def evaluation_documents(data: str) -> list[str]:
    """Read the documents of a data set or file for evaluation; a data set with a protocol is one document."""
    check_data(data)
    if Path(data).is_file():
        return read_documents(data)
    return load_documents(data, held_out=True) if data in DATA_SETS else python_documents(PYTHON_EVAL)

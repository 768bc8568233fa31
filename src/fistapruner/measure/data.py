"""Cut evaluation text into token windows, by the protocol that the pruning papers share.

The rows of the data set are joined to one string (:mod:`fistapruner.text.sources`), tokenised once (a
large one by parts), and cut into non-overlapping windows; what does not fill a window is dropped.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import A_TEXT, FistaPrunerError, path_text
from ..text.sources import (
    DATA_SETS,
    LARGE,
    PYTHON,
    PYTHON_EVAL,
    bos_of,
    check_extra,
    check_file,
    load_documents,
    passages,
    python_documents,
    read_documents,
    token_ids,
)

UNSURE = 64
"""Last tokens of the beginning of a text, which are left out because what follows might change them."""


@dataclass(frozen=True)
class Windows:
    """Token windows of one text.

    Args:
        tokens: (windows, seqlen) int64 token ids.
        data: name of the data set or file; ``split``: of it, ``file`` for a local one.
        bos: ``none``, ``text`` or ``window``: where BOS tokens stand.
    """

    tokens: Tensor
    data: str
    split: str
    bos: str

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
        data: ``wikitext2``, ``ptb``, ``c4`` (through the extra ``data``), ``python`` (the part of Python's language
            reference that calibration never sees), or a ``.txt``, ``.raw``, ``.md``, ``.jsonl`` or ``.parquet`` file
            (documents are joined by blank lines).
        tokenizer: a ``transformers`` tokenizer.
        seqlen: tokens in a window.
        windows: take only this many, from the start.
        bos: ``auto`` puts BOS in front of every window exactly if the tokenizer adds it to a text by its own setting;
            ``text`` leaves it where the tokenizer put it, once in front of the whole text, as the scripts of most
            papers do; ``none`` has no BOS; ``window`` has one in front of every window.

    Raises:
        FistaPrunerError: no such data, a text that the tokenizer cannot read or that is too short for one window, or
            a setting out of range.
    """
    check_count("seqlen", seqlen, 2)
    check_count("windows", windows)
    text, split, limit = read_text(data)
    name = Path(data).name if split == "file" else data
    limits = [count for count in (windows, limit) if count is not None]
    return cut_windows(text, tokenizer, seqlen, min(limits, default=None), bos=bos, data=name, split=split)


def check_count(name: str, value: int | None, least: int = 1) -> None:
    """Refuse a setting that is no whole number of at least ``least``; None leaves it out."""
    if value is not None and (type(value) is not int or value < least):
        raise FistaPrunerError(f"{name} {value!r} is out of range: a whole number, at least {least}, or leave it out")


def cut_windows(
    text: str,
    tokenizer: Any,
    seqlen: int,
    windows: int | None = None,
    *,
    bos: str = "auto",
    data: str = "text",
    split: str = "text",
) -> Windows:
    """Tokenise ``text``, a large one by parts, and cut it; see :func:`load_windows`."""
    if bos not in ("auto", "none", "text", "window"):
        raise FistaPrunerError(f"bos {bos!r} is not known: auto, none, text or window")
    if bos == "auto":
        bos = "window" if bos_of(tokenizer) else "none"
    if bos != "none" and tokenizer.bos_token_id is None:
        raise FistaPrunerError(f"bos {bos!r} cannot be done: this tokenizer has no BOS token")
    room = seqlen - 1 if bos == "window" else seqlen
    ids = _tokens(text, tokenizer, data, None if windows is None else windows * room)
    if bos == "text":
        ids.insert(0, tokenizer.bos_token_id)
    count = len(ids) // room
    if windows is not None:
        count = min(windows, count)
    if count == 0:
        raise FistaPrunerError(
            f"{data}: {len(ids)} tokens do not fill one window of {seqlen}: take a longer text or a smaller seqlen"
        )
    tokens = torch.tensor(np.asarray(ids[: count * room]), dtype=torch.int64).view(count, room)
    if bos == "window":
        tokens = torch.cat([torch.full((count, 1), tokenizer.bos_token_id), tokens], dim=1)
    return Windows(tokens, data, split, bos)


def _tokens(text: str, tokenizer: Any, data: str, enough: int | None) -> array[int]:
    """Tokenise a text, or as much of its beginning as it takes for ``enough`` tokens.

    A text of more than :data:`LARGE` characters is tokenised by parts, cut at blank lines where it has any.
    """
    if enough is not None:
        characters = 8 * (enough + UNSURE)
        while characters < min(len(text), LARGE):
            ids = array("i", token_ids(next(passages(text, characters)), tokenizer, data)[:-UNSURE])
            if len(ids) >= enough:
                return ids
            characters *= 2
    ids = array("i")
    for part in passages(text, LARGE):
        ids.extend(token_ids(part, tokenizer, data))
        if enough is not None and len(ids) >= enough:
            break
    return ids


def read_text(data: str) -> tuple[str, str, int | None]:
    """Read the joined text of a data set or file, its split, and the most windows the protocol takes."""
    known = DATA_SETS.get(data) if not Path(data).is_file() else None
    split = known.held_out.name if known else "file" if Path(data).is_file() else "held out"
    return "\n\n".join(evaluation_documents(data)), split, known.held_out.windows if known else None


def check_data(data: str) -> None:
    """Refuse evaluation text that is neither a known name nor a text file, or needs a missing extra.

    Raises:
        FistaPrunerError: names the text and the known ones.
        MissingExtraError: a data set or a Parquet file needs the extra ``data``.
    """
    data = path_text("data", data, A_TEXT)
    if Path(data).is_file():
        check_file(Path(data))
    elif data not in (*DATA_SETS, PYTHON):
        known = ", ".join([*DATA_SETS, PYTHON])
        raise FistaPrunerError(f"data {data!r} is neither a file nor a known data set ({known})")
    check_extra(data)


def evaluation_documents(data: str) -> list[str]:
    """Read the documents of a data set or file for evaluation; a data set with a protocol is one document.

    Raises:
        FistaPrunerError: no such data, or it cannot be read.
    """
    check_data(data)
    if Path(data).is_file():
        return read_documents(data)
    return load_documents(data, held_out=True) if data in DATA_SETS else python_documents(PYTHON_EVAL)

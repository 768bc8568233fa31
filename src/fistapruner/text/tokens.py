"""Turn texts into token ids, with the tokenizer's own rule for BOS."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor

from ..errors import FistaPrunerError, one_line


def adds_bos(tokenizer: Any) -> bool:
    """Check whether the tokenizer, by its own settings, begins a text with BOS."""
    if tokenizer.bos_token_id is None:
        return False
    ids = tokenizer("a", return_attention_mask=False)["input_ids"]
    return bool(len(ids) > 1 and ids[0] == tokenizer.bos_token_id)


def bos_of(tokenizer: Any) -> list[int]:
    """Return what begins a text by the tokenizer's own settings: BOS, or nothing."""
    return [tokenizer.bos_token_id] if adds_bos(tokenizer) else []


def token_ids(text: str, tokenizer: Any, where: str) -> list[int]:
    """Tokenise a text without special tokens.

    Args:
        text: what is read.
        tokenizer: a ``transformers`` tokenizer.
        where: file and line, or the name of the text, for messages.

    Raises:
        FistaPrunerError: the tokenizer cannot read the text.
    """
    try:
        return list(tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])
    except Exception as error:  # tokenizers have their own exceptions
        raise FistaPrunerError(f"{where}: the tokenizer cannot read the text: {one_line(error)}") from None


def tokens_sha256(tokens: Tensor) -> str:
    """Hash token ids with SHA-256."""
    return hashlib.sha256(tokens.contiguous().flatten().numpy().data).hexdigest()

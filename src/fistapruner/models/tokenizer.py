"""Load the tokenizer of a checkpoint folder."""

from __future__ import annotations

from importlib.metadata import Distribution
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from ..errors import FistaPrunerError, needs_code, one_line
from ..runtime.files import refuse_lfs_pointer

SENTENCEPIECE = ("sentencepiece", "protobuf")
"""Packages that read a SentencePiece vocabulary."""


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load a checkpoint's tokenizer; an error says what is missing or not understood."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises nothing narrower of a file that it does not understand
        for name in ("tokenizer.json", "tokenizer.model"):
            refuse_lfs_pointer(folder / name)
        reason = one_line(error)
        missing = [name for name in SENTENCEPIECE if not [*Distribution.discover(name=name)]]
        if (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists() and missing:
            reason = f"its tokenizer.model needs other packages: pip install {' '.join(missing)}"
        if type(error) is Exception or isinstance(error, JSONDecodeError | LookupError):
            reason += "; the file is damaged, or needs newer versions of the packages tokenizers and transformers"
        said = f"{folder} has no tokenizer that can be loaded (tokenizer.json or its parts): {reason}"
        raise needs_code(folder, error) or FistaPrunerError(said) from None


def padding_id(tokenizer: Any) -> int:
    """Return the token that fills shorter rows: padding, EOS, or 0 where the tokenizer has neither."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def pad_with_known_token(tokenizer: Any, size: int) -> None:
    """Let a tokenizer pad with EOS where its padding token is beyond the ``size`` tokens of a model.

    Padding tokens that were added to a tokenizer alone are common; what stands at padding changes no result.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= size:
        tokenizer.pad_token = tokenizer.eos_token

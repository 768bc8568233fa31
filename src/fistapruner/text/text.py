"""Read texts as lists of documents: local files and the language reference that Python ships with.

Calibration and evaluation both use it, so that they read a file in the same way.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import FistaPrunerError, one_line, unreadable
from .datasets import check_extra

PYTHON, PYTHON_EVAL = "python", "python-eval"
PYTHON_EVAL_TOPICS = ("compound", "debugger", "formatstrings")
"""Topics of the language reference for evaluation only: statements, the debugger, format strings."""

PLAIN = (".txt", ".raw", ".md")
SUFFIXES = (*PLAIN, ".jsonl", ".parquet")

LARGE = 2**24
"""Longest calibration document or evaluation text that is tokenised at once, in characters.

A fast tokenizer takes about 150 bytes of memory for each byte of it. A longer text is tokenised by passages, which can
change a few tokens where it is cut.
"""


def check_file(path: Path) -> None:
    """Refuse a text file that does not exist or is of no known kind.

    Raises:
        FistaPrunerError: names it.
    """
    if not path.is_file():
        raise FistaPrunerError(f"text file {str(path)!r} does not exist")
    if (suffix := path.suffix.lower()) not in SUFFIXES:
        raise FistaPrunerError(f"text file {str(path)!r} has the suffix {suffix!r}; known are {', '.join(SUFFIXES)}")


def read_documents(path: str | Path) -> list[str]:
    """Read the documents of a local file: a whole text file, a ``.jsonl`` line or a Parquet row each.

    Lines and rows have their text in the field ``text``.

    Raises:
        FistaPrunerError: no such file, another suffix, not UTF-8, a broken line (its number is given), no ``text``.
        MissingExtraError: Parquet without ``pyarrow``.
    """
    path = Path(path)
    check_file(path)
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            return list(_parquet_documents(path))
        if suffix != ".jsonl":
            return [path.read_text("utf-8-sig")]
        return [text_of(record, where) for where, record in read_lines(path)]
    except UnicodeDecodeError as error:
        raise FistaPrunerError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise unreadable(path, error) from None


def read_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the records of a ``.jsonl`` file, each with its place: file and line, for messages.

    A byte order mark before the first line is skipped. A line that is not a mapping is a record without fields.

    Raises:
        FistaPrunerError: a line that is not UTF-8 or not JSON; an unreadable file.
    """
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if content.strip():
                    where = f"{path}, line {number}"
                    yield where, _record(content, where)
    except OSError as error:
        raise unreadable(path, error) from None


def passages(text: str, characters: int) -> Iterator[str]:
    """Cut a text into passages of at most ``characters``, behind blank lines, line ends or spaces.

    A text that is not longer is one passage. Joined, passages are the text.
    """
    start = 0
    while start < len(text):
        end = start + characters
        if end < len(text):
            for separator in ("\n\n", "\n", " "):
                place = text.rfind(separator, start + 1, end)
                if place > 0:
                    end = place + len(separator)
                    break
        yield text[start:end]
        start = end


def python_documents(part: str = PYTHON) -> list[str]:
    """Read the language reference that Python ships with (``pydoc_data.topics``), one topic a document.

    Repeated paragraphs are taken once. Paragraphs of :data:`PYTHON_EVAL_TOPICS` are in the part ``python-eval`` only,
    all others in the part ``python`` only.

    Args:
        part: ``python`` (calibration) or ``python-eval`` (evaluation).

    Raises:
        FistaPrunerError: this Python has no ``pydoc_data``.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise FistaPrunerError(f"text {part!r}: this Python comes without the module pydoc_data.topics") from None
    # Large topics first: they are whole chapters; small topics repeat parts of them.
    order = sorted(topics, key=lambda name: (name not in PYTHON_EVAL_TOPICS, -len(topics[name]), name))
    seen: set[str] = set()
    documents = []
    for name in order:
        fresh = [
            paragraph for paragraph in topics[name].split("\n\n") if paragraph.strip() not in seen and paragraph.strip()
        ]
        seen.update(paragraph.strip() for paragraph in fresh)
        if fresh and (name in PYTHON_EVAL_TOPICS) == (part == PYTHON_EVAL):
            documents.append("\n\n".join(fresh))
    return documents


def adds_bos(tokenizer: Any) -> bool:
    """Check whether the tokenizer, by its own settings, begins a text with BOS."""
    if tokenizer.bos_token_id is None:
        return False
    ids = tokenizer("a", return_attention_mask=False)["input_ids"]
    return bool(len(ids) > 1 and ids[0] == tokenizer.bos_token_id)


def _record(line: bytes, where: str) -> dict[str, Any]:
    """Read the record of one ``.jsonl`` line; ``where`` names it in messages."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise FistaPrunerError(f"{where} is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise FistaPrunerError(f"{where} is not JSON: {str(error)[:100]}") from None
    return record if isinstance(record, dict) else {}


def text_of(record: dict[str, Any], where: str, others: str = "") -> str:
    """Return the text of a record of a ``.jsonl`` line.

    Args:
        record: of the line; ``where``: names the line in messages.
        others: what else the line might have had instead, for the message.

    Raises:
        FistaPrunerError: it has none, or half a character in it.
    """
    if not isinstance(record.get("text"), str):
        raise FistaPrunerError(f"{where} has no field 'text' with a string in it{others}")
    return whole_text(record["text"], "text", where)


def whole_text(text: str, field: str, where: str) -> str:
    """Return a text of a ``.jsonl`` line; refuse half of a surrogate pair, which no tokenizer reads.

    Raises:
        FistaPrunerError: it has one; ``where`` names the line, ``field`` the field.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FistaPrunerError(f"{where}: {field!r} has half a character ({text[error.start]})") from None
    return text


def _parquet_documents(path: Path) -> Iterator[str]:
    """Yield the texts of a Parquet file."""
    check_extra(path)
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise FistaPrunerError(
                    f"{path} has no column 'text', only {', '.join(map(str, file.schema_arrow.names))}"
                )
            for batch in file.iter_batches(columns=["text"]):
                for value in batch.column(0).to_pylist():
                    if not isinstance(value, str):
                        raise FistaPrunerError(f"{path}: column 'text' holds {type(value).__name__}, not text")
                    yield value
    except pyarrow.ArrowException as error:
        raise FistaPrunerError(f"{path} is not a whole Parquet file: {one_line(error)}") from None

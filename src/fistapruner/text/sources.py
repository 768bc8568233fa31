"""Read texts as lists of documents: data sets, local files, and Python's own language reference.

The rows of a data set and the string that joins them follow the protocol of the pruning papers: a blank line for
WikiText-2, a space for Penn Treebank and C4. C4 has no small test split, so the papers use its first 1,100 validation
documents, and of these the first 256 windows.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import A_TEXT, FistaPrunerError, MissingExtraError, one_line, path_text, unreadable

SELF = "self"
"""The source that is no text to read: the model writes it (:mod:`.generate`)."""

PYTHON, PYTHON_EVAL = "python", "python-eval"
PYTHON_EVAL_TOPICS = ("compound", "debugger", "formatstrings")
"""Topics of the language reference for evaluation only: statements, the debugger, format strings."""

SUFFIXES = (".txt", ".raw", ".md", ".jsonl", ".parquet")

LARGE = 2**24
"""Longest document that is tokenised at once, in characters: a fast tokenizer takes about 150 bytes for each."""


@dataclass(frozen=True)
class Split:
    """One split of a data set.

    Args:
        name: as ``datasets.load_dataset`` takes it.
        joint: string that joins rows; None keeps every row as a document.
        files: files of the split in the repository; None is the data set's own list.
        rows, windows: at most; None takes all.
    """

    name: str
    joint: str | None
    files: str | None = None
    rows: int | None = None
    windows: int | None = None


@dataclass(frozen=True)
class DataSet:
    """A data set on the hub, its text column, and its splits for calibration and evaluation."""

    path: str
    configuration: str | None
    column: str
    training: Split
    held_out: Split
    revision: str | None = None


DATA_SETS: dict[str, DataSet] = {
    "wikitext2": DataSet(
        "Salesforce/wikitext", "wikitext-2-raw-v1", "text", Split("train", "\n\n"), Split("test", "\n\n")
    ),
    "ptb": DataSet(
        "ptb-text-only/ptb_text_only",
        None,
        "sentence",
        Split("train", " ", "penn_treebank/train/*.parquet"),
        Split("test", " ", "penn_treebank/test/*.parquet"),
        revision="refs/convert/parquet",  # the main one is a script, which datasets from 4.0 on refuses
    ),
    "c4": DataSet(
        "allenai/c4",
        None,
        "text",
        Split("train", None, "en/c4-train.00000-of-01024.json.gz"),
        Split("validation", " ", "en/c4-validation.00000-of-00008.json.gz", rows=1100, windows=256),
    ),
}


def check_source(source: str, purpose: str = "calibration") -> None:
    """Refuse a source that is neither a known name nor a file of a known kind, or needs a missing extra.

    Raises:
        FistaPrunerError: names the source and the known ones.
        MissingExtraError: a data set or a Parquet file needs the extra ``data``.
    """
    path_text(f"{purpose} source", source, A_TEXT)
    known, path = source in (SELF, PYTHON, PYTHON_EVAL, *DATA_SETS), Path(source)
    if not known and (not path.is_file() or path.suffix.lower() not in SUFFIXES):
        names = ", ".join((SELF, PYTHON, *DATA_SETS))
        raise FistaPrunerError(
            f"{purpose} source {source!r} is neither a {'/'.join(SUFFIXES)} file that exists nor one of: {names}"
        )
    check_extra(source)


def check_extra(source: str | Path) -> None:
    """Refuse a known data set, or a Parquet file, whose reader is not installed.

    Raises:
        MissingExtraError: names the package and the extra.
    """
    if Path(source).suffix.lower() == ".parquet":
        package, purpose = "pyarrow", f"reading {source}"
    elif source in DATA_SETS and not Path(source).is_file():
        package, purpose = "datasets", f"the data set {source!r}"
    else:
        return
    if find_spec(package) is None:
        raise MissingExtraError(package, "data", purpose)


def check_file(path: Path) -> None:
    """Refuse a text file that does not exist or is of no known kind.

    Raises:
        FistaPrunerError: names it.
    """
    if not path.is_file():
        raise FistaPrunerError(f"text file {str(path)!r} does not exist")
    if (suffix := path.suffix.lower()) not in SUFFIXES:
        raise FistaPrunerError(f"text file {str(path)!r} has the suffix {suffix!r}; known are {', '.join(SUFFIXES)}")


def source_documents(source: str, purpose: str = "calibration") -> list[str]:
    """Read the documents of a source (any but ``self``) that are not blank.

    Args:
        source: name or path.
        purpose: what the text is for, in messages.

    Raises:
        FistaPrunerError: unknown, unreadable, or empty.
    """
    check_source(source, purpose)
    if Path(source).is_file():
        documents = read_documents(source)
    elif source in DATA_SETS:
        documents = load_documents(source)
    else:
        documents = python_documents(source)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise FistaPrunerError(f"{purpose} text {source!r} is empty")
    return documents


def load_documents(name: str, *, held_out: bool = False) -> list[str]:
    """Load the documents of one split of a known data set through the ``datasets`` package.

    Args:
        name: key of :data:`DATA_SETS`.
        held_out: the split for evaluation instead of the one for calibration.

    Raises:
        FistaPrunerError: the data set cannot be loaded (no network, not in the cache).
        MissingExtraError: ``datasets`` is missing.
    """
    known = DATA_SETS[name]
    split = known.held_out if held_out else known.training
    check_extra(name)
    try:
        import datasets

        files = {split.name: split.files} if split.files else None
        rows = datasets.load_dataset(
            known.path, known.configuration, split=split.name, data_files=files, revision=known.revision
        )
    except Exception as error:  # the hub, the network and the loader have their own errors
        reason = one_line(error)
        raise FistaPrunerError(
            f"data set {name!r} ({known.path}) could not be loaded: {reason}; a local file works without network"
        ) from None
    if split.rows is not None:
        rows = rows.select(range(min(split.rows, len(rows))))
    texts = [str(text) for text in rows[known.column]]
    return texts if split.joint is None else [split.joint.join(texts)]


def read_documents(path: str | Path) -> list[str]:
    """Read the documents of a local file: a whole text, or the field ``text`` of lines or rows.

    Raises:
        FistaPrunerError: no such file, another suffix, not UTF-8, a broken line (its number is given), no ``text``.
        MissingExtraError: Parquet without ``pyarrow``.
    """
    path = Path(path)
    check_file(path)
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            return _parquet_documents(path)
        if suffix == ".jsonl":
            return [string_of(record, "text", where) for where, record in read_lines(path)]
        return [path.read_text("utf-8-sig")]
    except UnicodeDecodeError as error:
        raise FistaPrunerError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise unreadable(path, error) from None


def read_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the records of a ``.jsonl`` file, each with its place: file and line, for messages.

    A byte order mark before the first line is skipped. A line that is not a mapping is a record without fields.

    Raises:
        FistaPrunerError: a line that is not UTF-8 or not JSON, or with half of a surrogate pair, which no tokenizer
            reads; an unreadable file.
    """
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if not content.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    record = json.loads(content.decode("utf-8"))
                    if b"\\u" in content:
                        json.dumps(record, ensure_ascii=False).encode()
                except UnicodeDecodeError:
                    raise FistaPrunerError(f"{where} is not UTF-8 text") from None
                except UnicodeEncodeError as error:
                    raise FistaPrunerError(
                        f"{where}: a text has half a character ({error.object[error.start]!r})"
                    ) from None
                except (ValueError, RecursionError) as error:
                    raise FistaPrunerError(f"{where} is not JSON: {str(error)[:100]}") from None
                yield where, record if isinstance(record, dict) else {}
    except OSError as error:
        raise unreadable(path, error) from None


def string_of(record: dict[str, Any], field: str, where: str) -> str:
    """Return a field of a ``.jsonl`` line that is text.

    Raises:
        FistaPrunerError: it is not there or no text; ``where`` names the line.
    """
    if not isinstance(value := record.get(field), str):
        raise FistaPrunerError(f"{where} has no field {field!r} with a string in it")
    return value


def _parquet_documents(path: Path) -> list[str]:
    """Read the texts of a Parquet file."""
    check_extra(path)
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                names = ", ".join(map(str, file.schema_arrow.names))
                raise FistaPrunerError(f"{path} has no column 'text', only {names}")
            found = [value for batch in file.iter_batches(columns=["text"]) for value in batch.column(0).to_pylist()]
    except pyarrow.ArrowException as error:
        raise FistaPrunerError(f"{path} is not a whole Parquet file: {one_line(error)}") from None
    if wrong := [type(value).__name__ for value in found if not isinstance(value, str)]:
        raise FistaPrunerError(f"{path}: column 'text' holds {wrong[0]}, not text")
    return found


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

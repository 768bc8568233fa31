"""Read texts as lists of documents: data sets, files, Python's language reference; tokenise them.

The rows of a data set and the string that joins them follow the protocol of the pruning papers: a blank line for
WikiText-2, a space for Penn Treebank and C4. C4 has no small test split, so the papers use its first 1,100 validation
documents, and of these the first 256 windows.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from ..errors import A_TEXT, FistaPrunerError, MissingExtraError, one_line, path_text
from ..runtime.files import disk_errors

SELF = "self"
"""The source that is no text to read: the model writes it (:mod:`.generate`)."""

PYTHON, PYTHON_EVAL = "python", "python-eval"
PYTHON_EVAL_TOPICS = ("compound", "debugger", "formatstrings")
"""Topics of the language reference for evaluation only: statements, the debugger, format strings."""

SUFFIXES = (".txt", ".raw", ".md", ".jsonl", ".parquet")

Text = TypeVar("Text")

LARGE = 2**24
"""Longest document that is tokenised at once, in characters: a fast tokenizer takes about 150 bytes for each."""


@dataclass(frozen=True)
class Split:
    """One split of a data set on the hub.

    Args:
        path, name: of the data set and its split; ``options``: what else ``datasets.load_dataset`` is given.
        column: of the text; ``joint``: string that joins rows, None keeps every row as a document.
        rows, windows: at most; None takes all.
    """

    path: str
    name: str
    column: str
    joint: str | None
    options: dict[str, Any]
    rows: int | None = None
    windows: int | None = None


class DataSet(NamedTuple):
    """The splits of a data set for calibration and evaluation."""

    training: Split
    held_out: Split


def _ptb(split: str) -> Split:
    """Return a split of Penn Treebank; ``datasets`` from 4.0 on refuses the script of its main revision."""
    files = {"data_files": {split: f"penn_treebank/{split}/*.parquet"}, "revision": "refs/convert/parquet"}
    return Split("ptb-text-only/ptb_text_only", split, "sentence", " ", files)


def _c4(split: str, file: str, joint: str | None, **most: int) -> Split:
    return Split("allenai/c4", split, "text", joint, {"data_files": {split: f"en/c4-{file}.json.gz"}}, **most)


def _wikitext(split: str) -> Split:
    return Split("Salesforce/wikitext", split, "text", "\n\n", {"name": "wikitext-2-raw-v1"})


DATA_SETS = {
    "wikitext2": DataSet(_wikitext("train"), _wikitext("test")),
    "ptb": DataSet(_ptb("train"), _ptb("test")),
    "c4": DataSet(
        _c4("train", "train.00000-of-01024", None),
        _c4("validation", "validation.00000-of-00008", " ", rows=1100, windows=256),
    ),
}


SOURCES = (SELF, PYTHON, *DATA_SETS)
"""Names of texts that are no files."""


def check_source(source: str, purpose: str = "calibration source", known: Sequence[str] = SOURCES) -> None:
    """Refuse a text that is neither a known name nor a text file, or whose reader is not installed.

    Args:
        source: the text; ``purpose``: what it is, for messages.
        known: names that are taken.
    """
    path_text(purpose, source, A_TEXT)
    path = Path(source)
    if source not in known and not (path.is_file() and path.suffix.lower() in SUFFIXES):
        kinds = "/".join(SUFFIXES)
        raise FistaPrunerError(
            f"{purpose} {source!r} is neither a {kinds} file that exists nor one of: {', '.join(known)}"
        )
    parquet = path.suffix.lower() == ".parquet"
    if (parquet or source in DATA_SETS) and find_spec(package := "pyarrow" if parquet else "datasets") is None:
        raise MissingExtraError(package, "data", f"reading {source}")


def source_documents(source: str, purpose: str = "calibration") -> list[str]:
    """Read the documents of a source that are not blank; ``purpose`` says what the text is for."""
    check_source(source, f"{purpose} source")
    if Path(source).is_file():
        documents = read_documents(source)
    else:
        documents = load_documents(source) if source in DATA_SETS else python_documents(source)
    return not_blank(documents, source, purpose)


def not_blank(documents: Sequence[Text], source: str, purpose: str) -> list[Text]:
    """Leave out the documents that are blank, and refuse a source that has no others."""
    found = [document for document in documents if not isinstance(document, str) or document.strip()]
    if not found:
        raise FistaPrunerError(f"{purpose} text {source!r} is empty")
    return found


def load_documents(name: str, *, held_out: bool = False) -> list[str]:
    """Load the documents of a data set through ``datasets``; ``held_out``: those for evaluation."""
    split = DATA_SETS[name].held_out if held_out else DATA_SETS[name].training
    try:
        import datasets

        rows = datasets.load_dataset(split.path, split=split.name, **split.options)
    except Exception as error:  # the hub, the network and the loader have their own errors
        reason = one_line(error)
        raise FistaPrunerError(
            f"data set {name!r} ({split.path}) could not be loaded: {reason}; a local file works without network"
        ) from None
    if split.rows is not None:
        rows = rows.select(range(min(split.rows, len(rows))))
    texts = [str(text) for text in rows[split.column]]
    return texts if split.joint is None else [split.joint.join(texts)]


def read_documents(path: str | Path) -> list[str]:
    """Read the documents of a local file: a whole text, or the field ``text`` of lines or rows."""
    path = Path(path)
    suffix = path.suffix.lower()
    try:
        with disk_errors(path, "read"):
            if suffix == ".parquet":
                return _parquet_documents(path)
            if suffix == ".jsonl":
                return [field_of(record, "text", where) for where, record in read_lines(path)]
            return [path.read_text("utf-8-sig")]
    except UnicodeDecodeError as error:
        raise FistaPrunerError(f"{path} is not UTF-8 text (byte {error.start})") from None


def read_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the records of a ``.jsonl`` file, each with its place: file and line, for messages.

    A byte order mark before the first line is skipped. A line that is not a mapping is a record without fields.
    """
    with disk_errors(path, "read"), open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not content.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(content.decode("utf-8"))
                if b"\\u" in content:
                    json.dumps(record, ensure_ascii=False).encode()  # no tokenizer reads half of a surrogate pair
            except (ValueError, RecursionError) as error:
                raise FistaPrunerError(f"{where} is not JSON in UTF-8: {one_line(error)}") from None
            yield where, record if isinstance(record, dict) else {}


def field_of(record: dict[str, Any], field: str, where: str, kind: type = str) -> Any:
    """Return a field of a ``.jsonl`` line, or refuse the line, ``where``, without one of that kind."""
    if not isinstance(value := record.get(field), kind):
        raise FistaPrunerError(f"{where} has no field {field!r} with a {'string' if kind is str else 'list'} in it")
    return value


def _parquet_documents(path: Path) -> list[str]:
    """Read the texts of a Parquet file."""
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            texts = file.read(columns=["text"]).column("text").to_pylist()
    except (ArrowException, KeyError) as error:
        raise FistaPrunerError(f"{path} is no whole Parquet file with a column 'text': {one_line(error)}") from None
    return [field_of({"text": text}, "text", f"{path}, row {number}") for number, text in enumerate(texts, 1)]


def python_documents(part: str = PYTHON) -> list[str]:
    """Read the language reference that Python ships with (``pydoc_data.topics``), one topic a document.

    Repeated paragraphs are taken once. Paragraphs of :data:`PYTHON_EVAL_TOPICS` are in the part ``python-eval`` only,
    all others in the part ``python`` only.
    """
    from pydoc_data.topics import topics

    # Large topics first: they are whole chapters; small topics repeat parts of them.
    order = sorted(topics, key=lambda name: (name not in PYTHON_EVAL_TOPICS, -len(topics[name]), name))
    seen: set[str] = set()
    documents = []
    for name in order:
        fresh = [text for text in topics[name].split("\n\n") if text.strip() and text.strip() not in seen]
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


def document_hash(text: str, seed: int | None = None) -> str:
    """Hash the text of a document, with a seed to decide on which side of a split it belongs."""
    prefix = "" if seed is None else f"{seed}\0"
    return hashlib.sha256((prefix + text).encode("utf-8", "surrogatepass")).hexdigest()


def bos_of(tokenizer: Any) -> list[int]:
    """Return what begins a text by the tokenizer's own settings: BOS, or nothing."""
    ids = [] if tokenizer.bos_token_id is None else tokenizer("a", return_attention_mask=False)["input_ids"]
    return ids[:1] if len(ids) > 1 and ids[0] == tokenizer.bos_token_id else []


def token_ids(text: str, tokenizer: Any, where: str) -> list[int]:
    """Tokenise a text without special tokens; ``where`` names it in the error of one that cannot be read."""
    try:
        return list(tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])
    except Exception as error:  # tokenizers have their own exceptions
        raise FistaPrunerError(f"{where}: the tokenizer cannot read the text: {one_line(error)}") from None


def tokens_sha256(tokens: Tensor) -> str:
    """Hash token ids with SHA-256."""
    return hashlib.sha256(tokens.contiguous().flatten().numpy().data).hexdigest()

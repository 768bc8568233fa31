"""Load the known data sets: one table for calibration (train split) and evaluation (held-out split).

The rows and the string that joins them follow the protocol of the pruning papers: a blank line for WikiText-2, a
space for Penn Treebank and C4. C4 has no small test split, so the papers use its first 1,100 validation documents,
and of these the first 256 windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..errors import FistaPrunerError, MissingExtraError, one_line


@dataclass(frozen=True)
class Split:
    """One split of a data set.

    Args:
        name: as ``datasets.load_dataset`` takes it.
        joint: string that joins rows; None keeps every row as a document.
        files: files of the split in the repository; None is the data set's own list.
        rows: maximum number of rows; None takes all.
        windows: maximum number of windows; None takes all.
    """

    name: str
    joint: str | None
    files: str | None = None
    rows: int | None = None
    windows: int | None = None


@dataclass(frozen=True)
class DataSet:
    """A data set on the Hugging Face hub.

    Args:
        path: repository; ``configuration``: its configuration.
        column: column with the text.
        training: split for calibration.
        held_out: split for evaluation.
        revision: of the repository; None is its main one.
    """

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


def check_extra(source: str | Path) -> None:
    """Refuse a known data set, or a Parquet file, whose reader is not installed.

    Args:
        source: name or path; any other needs no extra.

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

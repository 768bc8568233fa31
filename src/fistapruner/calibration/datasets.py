"""The known data sets: one table for calibration (train split) and evaluation (held-out split).

The string that joins rows and the rows that are taken are part of the protocol that the pruning papers share: a blank
line for WikiText-2, a space for Penn Treebank and C4. C4 has no small test split, so the papers take its first 1,100
validation documents, and of them the first 256 windows.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import FistaPrunerError, MissingExtraError


@dataclass(frozen=True)
class Split:
    """One split of a data set.

    Args:
        name: as ``datasets.load_dataset`` takes it.
        joint: string between rows; None keeps every row as a document of its own.
        files: files of the repository that hold it; None takes the data set's own list.
        rows: most rows to take; None takes all.
        windows: most windows to take; None takes all.
    """

    name: str
    joint: str | None
    files: str | None = None
    rows: int | None = None
    windows: int | None = None


@dataclass(frozen=True)
class DataSet:
    """A data set of the hub.

    Args:
        path: repository; ``configuration``: of it.
        column: column of the text.
        training: split that calibration reads.
        held_out: split that evaluation reads.
    """

    path: str
    configuration: str | None
    column: str
    training: Split
    held_out: Split


DATA_SETS: dict[str, DataSet] = {
    "wikitext2": DataSet("Salesforce/wikitext", "wikitext-2-raw-v1", "text", Split("train", "\n\n"), Split("test", "\n\n")),
    "ptb": DataSet("ptb-text-only/ptb_text_only", "penn_treebank", "sentence", Split("train", " "), Split("test", " ")),
    "c4": DataSet(
        "allenai/c4",
        None,
        "text",
        Split("train", None, "en/c4-train.00000-of-01024.json.gz"),
        Split("validation", " ", "en/c4-validation.00000-of-00008.json.gz", rows=1100, windows=256),
    ),
}


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
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "data", f"the data set {name!r}") from None
    try:
        files = {split.name: split.files} if split.files else None
        rows = datasets.load_dataset(known.path, known.configuration, split=split.name, data_files=files)
    except Exception as error:  # the hub, the network and the loader each fail in their own ways
        reason = " ".join(str(error).split())[:200]
        raise FistaPrunerError(
            f"data set {name!r} ({known.path}) could not be loaded: {reason}; a local file works without network"
        ) from None
    if split.rows is not None:
        rows = rows.select(range(min(split.rows, len(rows))))
    texts = [str(text) for text in rows[known.column]]
    return texts if split.joint is None else [split.joint.join(texts)]

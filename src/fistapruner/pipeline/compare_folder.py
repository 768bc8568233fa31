"""The folder of a comparison: what an earlier one has left in it, and the figures so far."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import FistaPrunerError
from ..models.source import ModelSource, Permissions
from ..reporting.comparison import comparison_markdown
from ..runs.comparison_records import DENSE, FIGURES, PAGE, RUNS, STATES, TABLE, CompareRow, Comparison, load_comparison
from ..runs.continuation import interrupted_with, refuse_other_settings
from ..runs.decision import PruneRecord
from ..runs.directory import refuse_out
from ..runs.identity import changed_files
from ..runs.lock import NAME as LOCK
from ..runs.lock import hold
from ..runs.prune_directory import PruneDirectory
from ..runtime.files import PARTIAL, disk_errors, entries, read_json, write_json_atomic, write_text_atomic
from ..settings.settings import Recipe
from .compare_jobs import CompareJob, run_name
from .protocol import Protocol


@contextmanager
def comparing(folder: Path) -> Iterator[None]:
    """Make and hold the folder of a comparison.

    An interruption says that the same command goes on with all of it, not with one row.
    """
    with disk_errors(folder):
        (folder / RUNS).mkdir(parents=True, exist_ok=True)
    with interrupted_with(lambda: "interrupted; nothing is lost: give the same command again"), hold(folder):
        yield


def find_source_of_rows(model: str, folder: Path, permissions: Permissions) -> ModelSource:
    """Find the model where the rows that have begun found it, so that all rows are of the same files."""
    record = _begun(folder)
    return (
        permissions.find(model)
        if record is None or not record.decision.folder.is_dir()
        else permissions.at(record.decision.folder)
    )


def _begun(folder: Path) -> PruneRecord | None:
    """Read the record of a row that has begun; None where there is none."""
    for file in sorted((folder / RUNS).glob("*/run.json")):
        with suppress(FistaPrunerError):  # a damaged record is named where its row is asked for
            if (record := PruneDirectory(file.parent).record()) is not None:
                return record
    return None


def earlier_comparison(folder: Path, model: str) -> Comparison:
    """Read the comparison that ``folder`` already holds; one without rows where there is none."""
    refuse_other_things(folder, (STATES, DENSE, DENSE + PARTIAL))
    if not (folder / FIGURES).is_file():
        return Comparison()
    try:
        read_json(folder / FIGURES)
    except FistaPrunerError as error:
        raise FistaPrunerError(
            f"{error}: remove it; rows that are asked for are read again from {folder / RUNS}"
        ) from None
    before = load_comparison(folder)
    known, begun = before.model.source, _begun(folder)
    # The path in a row's record is absolute; the same relative name may be another model in another folder.
    if begun is not None and Path(begun.decision.model).exists():
        known = begun.decision.model
    if known != model:
        raise FistaPrunerError(
            f"--out {folder} holds a comparison of {known!r}, this one is of {model!r}: name another folder"
        )
    return before


def refuse_other_things(folder: Path, own: Sequence[str] = ()) -> None:
    """Refuse a folder that has other things in it and no ``compare.json``.

    A comparison that was stopped before its first row has left the dense model's figures at most, and runs begun after
    them; one whose damaged ``compare.json`` was removed has its table and page, too.

    Args:
        folder: of the comparison to be.
        own: files that it makes before its first figures.

    Raises:
        FistaPrunerError: names the first of them.
    """
    refuse_out(folder)
    if not folder.is_dir() or (folder / FIGURES).is_file():
        return
    names = {path.name for path in entries(folder)} - {RUNS, LOCK, FIGURES + PARTIAL, *own}
    if (folder / DENSE).is_file() and (folder / RUNS).is_dir():
        names -= {TABLE, PAGE}
    else:
        names |= {f"{RUNS}/{path.name}" for path in entries(folder / RUNS)} if (folder / RUNS).is_dir() else set()
    if names:
        raise FistaPrunerError(f"--out {folder} is a folder with other things in it ({min(names)}); name a new folder")


def rows_that_stay(
    before: list[CompareRow], jobs: Sequence[CompareJob], protocol: Protocol, folder: Path
) -> list[CompareRow]:
    """Select the rows of an earlier comparison that stay, or stand until they are made again.

    One that is asked for now stands if it was measured on the same windows: an interruption does not lose it.

    Raises:
        FistaPrunerError: a row was made by another protocol, or one that is asked for was begun with other settings.
    """
    asked = {job.key for job in jobs}
    stay = []
    for row in before:
        kept = row.key not in asked
        protocol.check(row, folder, kept=kept)
        if kept or protocol.covers(row.perplexity):
            stay.append(row)
    for job in jobs:
        run = job.run(folder)
        if (record := run.record()) is not None:
            earlier = Recipe.build(record.recipe, str(run.run_file)).identity()
            refuse_other_settings(run, earlier, job.recipe.identity())
    return stay


def unchanged_rows(
    rows: list[CompareRow], jobs: Sequence[CompareJob], source: ModelSource, folder: Path
) -> tuple[list[CompareRow], list[str]]:
    """Leave out rows whose model or calibration text has changed.

    Returns:
        The others, and a warning for each that is left out and not asked for now.
    """
    asked = {job.key for job in jobs}
    stay, warnings = [], []
    for row in rows:
        changed = _changed(PruneDirectory(folder / RUNS / run_name(*row.key)), source)
        if changed is None:
            stay.append(row)
        elif row.key not in asked:
            warnings.append(
                f"the row {row.label}, {row.sparsity}, seed {row.seed} is left out: {changed}; name it to make it again"
            )
    return stay, warnings


def _changed(run: PruneDirectory, source: ModelSource) -> str | None:
    """Say whether model or calibration text of a run has changed since it began; None where not."""
    with suppress(FistaPrunerError):  # a damaged record is named where its row is asked for
        if (record := run.record()) is not None:
            return changed_files(record.decision.stamps, source)
    return None


def write_comparison(folder: Path, comparison: Comparison) -> None:
    write_json_atomic(folder / FIGURES, comparison.model_dump(mode="json"))
    write_text_atomic(folder / TABLE, comparison_markdown(comparison))

"""The lineage of a model: the dense model it was made from, then every run that changed it.

It is kept in ``fistapruner.json`` of the model's folder, and in the report of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import FistaPrunerError, explain, with_name
from ..models.checkpoint import PRUNING_RECORD
from ..models.record import read_pruning_record
from ..models.source import SMALL_MODEL, resolve_model
from ..runtime.files import write_json_atomic
from .directory import RunDirectory
from .records import Lineage, Report, Stage, StageFigures


def read_lineage(record: Mapping[str, Any], folder: Path) -> Lineage | None:
    """Read the lineage in ``fistapruner.json`` of a model's folder; None where there is none."""
    try:
        return Lineage.model_validate(found) if (found := record.get("lineage")) else None
    except ValidationError as error:
        said = f"has a lineage that cannot be read ({explain(error)}): mend or remove the file"
        raise FistaPrunerError(f"{folder / PRUNING_RECORD} {said}") from None


def lineage_of(folder: Path) -> Lineage | None:
    """Read the lineage of the model in a folder, as :func:`read_lineage` does."""
    return read_lineage(read_pruning_record(folder), folder)


def dense_name(lineage: Lineage | None) -> str | None:
    """Name the dense model of a lineage; None where its first run began with a model pruned elsewhere.

    None also for a relative path: it was one of the folder where that run began, which is not known.
    """
    if lineage is None or not lineage.stages or lineage.stages[0].kind != "prune":
        return None
    name = lineage.source.source
    return None if Path(name).exists() and not Path(name).is_absolute() else name or None


def trained_on(lineage: Lineage | None) -> str | None:
    """Warn that zero-shot scores may be of what a model was aligned on; None where it was not aligned."""
    stages = [stage for stage in lineage.stages if stage.kind == "align"] if lineage is not None else []
    files = dict.fromkeys(Path(str((stage.settings.get("data") or {}).get("pairs", "?"))).name for stage in stages)
    said = "its score on a task that they were made from is not zero-shot"
    return f"the model was aligned on the pairs of {' and '.join(files)}: {said}" if files else None


def update_stage(report: Report) -> None:
    """Put the run of a report at the end of its lineage, in the place of what was there of it."""
    if report.lineage is not None:
        stages = [stage for stage in report.lineage.stages if stage.fingerprint != report.fingerprint]
        report.lineage.stages = [*stages, stage_of(report)]


def stage_of(report: Report) -> Stage:
    """Describe a run as a stage of its model's making, without figures of single windows."""
    measured = next((found for found in report.evaluations if found.perplexity is not None), None)
    texts = (measured.perplexity, measured.reference) if measured else (None, None)
    perplexity, reference = (None if text is None else replace(text, window_nlls=()) for text in texts)
    return Stage(
        kind=report.kind,
        command=report.command,
        finished=report.finished,
        fingerprint=report.fingerprint,
        settings={key: value for key, value in report.recipe.items() if key != "execution"},
        versions=report.versions,
        figures=StageFigures(
            operator_weights=report.totals.operator_weights,
            operator_zeros=report.totals.operator_zeros,
            parameters=report.totals.model_weights if report.widths else None,
            tokens=report.recovery.tokens if report.recovery else None,
            perplexity=perplexity,
            reference=reference,
            divergence=measured and measured.divergence,
        ),
    )


def record_with_stage(record: dict[str, Any], stage: Stage) -> dict[str, Any]:
    """Return a model's record with one more stage in its lineage, which keeps operators and zeros."""
    if (lineage := read_lineage(record, Path())) is None:
        return record
    before = lineage.stages[-1].figures if lineage.stages else StageFigures()
    figures = StageFigures(operator_weights=before.operator_weights, operator_zeros=before.operator_zeros)
    lineage.stages.append(stage.model_copy(update={"figures": figures}))
    return {**record, "lineage": lineage.model_dump(mode="json")}


def write_lineage(model: Path, lineage: Lineage | None) -> None:
    """Renew the lineage in ``fistapruner.json`` of a finished model."""
    record = read_pruning_record(model)
    if lineage is not None and record:
        write_json_atomic(model / PRUNING_RECORD, {**record, "lineage": lineage.model_dump(mode="json")})


# --- the runs behind a run


def input_run(model: str) -> RunDirectory | None:
    """Return the run directory that the input is, or is the ``model`` folder of; None for any other."""
    path = with_name(Path(model))  # "." inside of the folder
    for folder in (path, path.parent if path.name == "model" else None):
        if folder is not None and (folder / "run.json").is_file():
            return RunDirectory(folder)
    return None


@dataclass(frozen=True)
class Dense:
    """The dense model that a run's result goes back to; its folder may be gone.

    ``stamps`` are checksums of its files, empty where no run has noted them.
    """

    folder: Path
    stamps: tuple[tuple[str, str], ...] = ()


def dense_of(run: RunDirectory | None) -> Dense | None:
    """Return the dense model that a run has noted; None where it is not known."""
    record = None if run is None else run.record()
    if record is None or record.decision.dense is None:
        return None
    return Dense(record.decision.dense, record.decision.dense_stamps)


def dense_behind(folder: Path, lineage: Lineage | None) -> Dense | None:
    """Find the dense model behind a pruned one: that of its run, or the one that its lineage names.

    The latter is taken where it is on this machine; nothing is downloaded.
    """
    if (noted := dense_of(input_run(str(folder)))) is not None:
        return noted
    name = dense_name(lineage)
    if name is None or not (name == SMALL_MODEL or Path(name).exists()):
        return None
    try:
        return Dense(resolve_model(name).absolute())
    except FistaPrunerError:
        return None

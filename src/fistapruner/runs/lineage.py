"""The lineage of a model: the dense model it was made from, then every run that changed it.

It is kept in ``fistapruner.json`` of the model's folder, and in the report of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import FistaPrunerError, explain
from ..models.checkpoint import PRUNING_RECORD
from ..models.record import read_pruning_record
from ..runtime.files import write_json_atomic
from .records import Lineage, ModelFacts, Report, Stage, StageFigures
from .results import Perplexity


def read_lineage(record: Mapping[str, Any], origin: Path) -> tuple[Lineage | None, str | None]:
    """Read the lineage in a model's record.

    Args:
        record: content of ``fistapruner.json``.
        origin: the model's folder, for the message.

    Returns:
        The lineage, None where there is none; and a sentence where it cannot be read.
    """
    if (found := record.get("lineage")) is None:
        return None, None
    try:
        return Lineage.model_validate(found), None
    except ValidationError as error:
        return None, f"{origin / PRUNING_RECORD} has a lineage that cannot be read ({explain(error)})"


def lineage_of(folder: Path) -> tuple[Lineage | None, str | None]:
    """Read the lineage of the model in a folder, as :func:`read_lineage` does."""
    return read_lineage(read_pruning_record(folder), folder)


def begin_lineage(folder: Path, model: ModelFacts) -> tuple[Lineage, str | None]:
    """Begin the lineage of a run's result with that of its input.

    Args:
        folder: of the input.
        model: describes the input; the lineage begins with it where the folder has none of its own.

    Returns:
        The lineage, and a sentence where the folder's own cannot be read.
    """
    try:
        found, fault = lineage_of(folder)
    except FistaPrunerError as error:
        found, fault = None, str(error)
    return found or Lineage(source=model), fault


def dense_name(lineage: Lineage | None) -> str | None:
    """Name the dense model of a lineage; None where its first run began with a model pruned elsewhere.

    None also where the name is a relative path here: it was one of the folder where that run began, which is not known.
    """
    if lineage is None or not lineage.stages or lineage.stages[0].kind != "prune":
        return None
    name = lineage.source.source
    relative = Path(name).exists() and not Path(name).is_absolute()
    return None if relative else name or None


def trained_on(lineage: Lineage | None) -> str | None:
    """Warn that zero-shot scores may be of what a model was aligned on; None where it was not aligned."""
    stages = [stage for stage in lineage.stages if stage.kind == "align"] if lineage is not None else []
    files = dict.fromkeys(Path(str((stage.settings.get("data") or {}).get("pairs", "?"))).name for stage in stages)
    if not files:
        return None
    return (
        f"the model was aligned on the pairs of {' and '.join(files)}: its score on a task that they were made from is "
        "not zero-shot"
    )


def add_stage(report: Report) -> None:
    """Append the run of a report to its lineage."""
    if report.lineage is not None:
        report.lineage.stages.append(stage_of(report))


def update_stage(report: Report) -> None:
    """Renew the run's own stage, the last of its lineage, after a measurement."""
    if report.lineage is not None and report.lineage.stages:
        report.lineage.stages[-1] = stage_of(report)


def stage_of(report: Report) -> Stage:
    """Describe a run as a stage of its model's making."""
    measured = next((found for found in report.evaluations if found.perplexity is not None), None)
    return Stage(
        kind=report.kind,
        command=report.command,
        finished=report.finished,
        fingerprint=report.fingerprint,
        settings={key: value for key, value in report.settings.items() if key != "execution"},
        versions=report.versions,
        figures=StageFigures(
            operator_weights=report.totals.operator_weights,
            operator_zeros=report.totals.operator_zeros,
            parameters=report.totals.model_weights if report.widths else None,
            relative_error=report.mean_error,
            seconds=report.totals.seconds,
            tokens=report.recovery.tokens if report.recovery else None,
            perplexity=_short(measured.perplexity if measured else None),
            reference=_short(measured.reference if measured else None),
            divergence=measured and measured.divergence,
        ),
    )


def _short(found: Perplexity | None) -> Perplexity | None:
    """Leave out the figures of single windows: a lineage is copied from model to model."""
    return None if found is None else replace(found, window_nlls=())


def record_with_stage(record: dict[str, Any], stage: Stage) -> dict[str, Any]:
    """Return a model's record with one more stage in its lineage, whose operators and zeros stay the same.

    A record without a lineage stays as it is.
    """
    lineage, _ = read_lineage(record, Path())
    if lineage is None:
        return record
    before = lineage.stages[-1].figures if lineage.stages else StageFigures()
    counts = {"operator_weights": before.operator_weights, "operator_zeros": before.operator_zeros}
    lineage.stages.append(stage.model_copy(update={"figures": stage.figures.model_copy(update=counts)}))
    return {**record, "lineage": lineage.model_dump(mode="json")}


def write_lineage(model: Path, lineage: Lineage | None) -> None:
    """Renew the lineage in ``fistapruner.json`` of a finished model."""
    record = read_pruning_record(model)
    if lineage is not None and record:
        write_json_atomic(model / PRUNING_RECORD, {**record, "lineage": lineage.model_dump(mode="json")})

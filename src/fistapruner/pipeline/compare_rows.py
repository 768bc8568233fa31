"""Run the rows of a comparison: prune and measure, or read what was done before."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ..errors import FistaPrunerError, explain
from ..measure.evaluate import evaluate as run_evaluation
from ..measure.streaming import KeptStates
from ..models.source import ModelSource
from ..pruning.run import prune
from ..runs.comparison_records import DENSE, CompareRow, Comparison
from ..runs.directory import RunDirectory
from ..runs.identity import changed_files, stamps
from ..runs.listener import Listener
from ..runs.prune_directory import PruneDirectory
from ..runs.records import Report
from ..runs.results import Evaluation, Perplexity
from ..runtime.files import read_json, write_json_atomic
from ..settings.settings import Recipe
from .compare_jobs import CalibrationWindows, CompareJob
from .measure import publish
from .protocol import Protocol
from .result import add_warning

_PERPLEXITY = TypeAdapter(Perplexity)

STAMPS = "stamps"
"""Key in ``dense.json`` of the :func:`~fistapruner.runs.identity.stamps` of the model that was measured."""


@dataclass(frozen=True)
class Shared:
    """What all jobs of a comparison share.

    Args:
        model: as the user named it; ``source``: its folder.
        folder: of the comparison.
        protocol: how every row is measured.
        listener: receives progress.
        keep: make the pruned checkpoints that are not there; ``stay``: keys of the rows whose checkpoints are kept, as
            this command or an earlier one asked.
        kept: hidden states of the dense model on the windows of the protocol.
        calibrated: calibration windows that are drawn, and how, by their settings.
        command: shell line that reproduces the comparison, and with it every run.
    """

    model: str
    source: ModelSource
    folder: Path
    protocol: Protocol
    listener: Listener
    keep: bool
    stay: Collection[tuple[str, str, int]]
    kept: KeptStates
    calibrated: CalibrationWindows
    command: str | None

    def evaluate(
        self, checkpoint: Path, against: Path | None = None, warn: Callable[[str], None] | None = None
    ) -> Evaluation:
        """Measure a checkpoint on the windows of the protocol; see :func:`fistapruner.evaluate` for ``warn``."""
        permissions, protocol = self.source.permissions, self.protocol
        return run_evaluation(
            checkpoint,
            protocol.text,
            against=against,
            device=protocol.device,
            dtype=protocol.asked_dtype,
            memory_limit=protocol.memory_limit,
            warn=warn,
            tick=self.listener.tick,
            kept=self.kept,
            **permissions.keywords(),
        )

    def report_of(self, job: CompareJob) -> Report:
        """Prune and measure, or read the report of a run that was pruned and measured so before.

        One whose checkpoint is to be kept, and was not, is made again.
        """
        run = job.run(self.folder)
        report = _measured(run, job.recipe, self.protocol, self.source)
        if report is not None and _has_model(run, report):
            publish(run, report, Listener())  # a killed command may have left card and page without figures
        elif self.keep:
            report = None
        if report is None:
            report = self._prune(run, job.recipe)
        if job.key not in self.stay:
            run.remove_weights()
        return report

    def _prune(self, run: PruneDirectory, recipe: Recipe) -> Report:
        """Prune a row, and measure it unless these very weights were measured before they were deleted."""
        report = prune(
            self.model,
            run.folder,
            recipe=recipe,
            listener=self.listener,
            command=self.command,
            tokens=self.calibrated.get(recipe.calibration.model_dump_json()),
            source=self.source,
            **self.source.permissions.keywords(),
        )
        return self._measure(run, report)

    def _measure(self, run: RunDirectory, report: Report) -> Report:
        """Measure the result of a run on the windows of the protocol, and publish the figures with the run."""
        if _evaluation(report, self.protocol) is None:
            self.listener.say(f"evaluating on {self.protocol.text.data}")
            found = self.evaluate(
                run.model, self.source.folder, lambda sentence: add_warning(report, sentence, self.listener)
            )
            report.evaluations.append(found)
            publish(run, report, Listener())  # pruning has named the report already
        return report


def run_job(job: CompareJob, shared: Shared, comparison: Comparison, dense: Perplexity) -> CompareRow:
    """Prune and measure one row, or find that it was done before.

    Args:
        job: what to do.
        shared: what all jobs share.
        comparison: receives the calibration that all runs have in common, and the key of a row that failed.
        dense: perplexity of the dense model.

    Returns:
        The row; one without figures says why. That of an earlier command stays where this one cannot make it again.
    """
    recipe = job.recipe
    row = CompareRow(
        method=recipe.method_name,
        label=job.label,
        sparsity=str(recipe.sparsity),
        seed=job.seed,
        settings=recipe.model_dump(mode="json", exclude={"execution"}),
        kept=job.key in shared.stay,
    )
    try:
        report = shared.report_of(job)
        _adopt(comparison, report, shared.protocol)
        return _filled(row, report, shared.protocol, dense)
    except FistaPrunerError as error:
        row.error = str(error)
        comparison.failed.add(row.key)
        shared.listener.say(f"{job.label}: {error}")
        earlier = next((other for other in comparison.rows if other.key == row.key), row)
        if earlier.perplexity is None or earlier.settings != row.settings:
            return row
        comparison.warnings.append(
            f"the row {row.name}, {row.sparsity}, seed {row.seed} has the figures of an earlier command: {error}"
        )
        return earlier


def measure_dense(shared: Shared) -> Perplexity:
    """Measure the dense model on the windows of the protocol, or read what was measured before."""
    file, protocol = shared.folder / DENSE, shared.protocol
    weights = [list(stamp) for stamp in stamps(shared.source.checkpoint())]
    found = _earlier_dense(file, protocol, weights, shared.listener)
    if found is None:
        shared.listener.say(f"evaluating the dense model on {protocol.text.data}")
        found = shared.evaluate(shared.source.folder).perplexity
        assert found is not None
        write_json_atomic(file, {**_PERPLEXITY.dump_python(found, mode="json"), STAMPS: weights})
    return found


def _earlier_dense(file: Path, protocol: Protocol, weights: list[list[str]], listener: Listener) -> Perplexity | None:
    """Read the dense model's perplexity, if these weights were measured on the same windows before."""
    if not file.is_file():
        return None
    try:
        content = read_json(file)
    except FistaPrunerError as error:
        listener.say(f"the dense model is evaluated again: {error}")
        return None
    same = content.pop(STAMPS, None) == weights
    try:
        stored = _PERPLEXITY.validate_python(content)
    except ValidationError as error:
        raise FistaPrunerError(
            f"{file} is not what a comparison writes ({explain(error)}): remove it, or choose another --out"
        ) from None
    return stored if same and protocol.covers(stored) else None


def _measured(run: PruneDirectory, recipe: Recipe, protocol: Protocol, source: ModelSource) -> Report | None:
    """Read the report of a run that pruned this model with these settings and was measured on this text."""
    if not run.report_file.is_file():
        return None
    try:
        report = run.read_report()
    except FistaPrunerError:  # pruning says so, and makes it again
        return None
    record = run.record()
    changed = record is not None and changed_files(record.decision.stamps, source)
    same = Recipe.build(report.recipe).fingerprint() == recipe.fingerprint() and not changed
    return report if same and report.status == "finished" and _evaluation(report, protocol) is not None else None


def _has_model(run: RunDirectory, report: Report | None) -> bool:
    """Check that the checkpoint of a finished run is there, whole and of this run."""
    return report is not None and run.model_fault(report.fingerprint or "") is None


def _evaluation(report: Report, protocol: Protocol) -> Evaluation | None:
    """Find the report's measurement on the windows of the protocol."""
    return next((found for found in report.evaluations if protocol.covers(found.perplexity)), None)


def _adopt(comparison: Comparison, report: Report, protocol: Protocol) -> None:
    """Take the calibration from a run, unless it has its own."""
    if comparison.calibration is None and protocol.shares(Recipe.build(report.recipe).calibration):
        comparison.calibration = report.calibration


def _filled(row: CompareRow, report: Report, protocol: Protocol, dense: Perplexity) -> CompareRow:
    """Fill a row with the figures of its report."""
    totals = report.totals
    if (measured := _evaluation(report, protocol)) is not None:
        row.perplexity, row.divergence = measured.perplexity, measured.divergence
    if row.perplexity is not None and math.isfinite(row.perplexity.nll):
        row.gap = row.perplexity.nll - dense.nll
    row.relative_error = report.mean_error
    row.seconds, row.time_split, row.peak_memory = totals.seconds, totals.time_split, totals.peak_memory
    row.operator_weights, row.operator_zeros = totals.operator_weights, totals.operator_zeros
    row.low_rank_weights, row.checkpoint_bytes = totals.low_rank_weights, totals.checkpoint_bytes
    if report.widths:
        row.dense_weights, row.model_weights = report.model.parameters, totals.model_weights
        row.dense_flops_per_token, row.flops_per_token = totals.dense_flops_per_token, totals.flops_per_token
    return row

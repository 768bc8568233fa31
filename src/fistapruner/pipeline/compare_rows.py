"""Run the rows of a comparison: prune, recover and measure, or read what was done before."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ..errors import FistaPrunerError, explain
from ..evaluation.evaluate import evaluate as run_evaluation
from ..evaluation.streaming import KeptStates
from ..models.source import ModelSource
from ..recipes.recover_settings import RecoverRecipe
from ..recipes.settings import Recipe
from ..runs.comparison_records import DENSE, CompareRow, Comparison
from ..runs.decision import TrainingRecord
from ..runs.directory import RunDirectory
from ..runs.identity import changed_files, stamps
from ..runs.listener import Listener
from ..runs.prune_directory import PruneDirectory
from ..runs.records import Report
from ..runs.results import Evaluation, Perplexity
from ..runs.training_directory import RecoverDirectory
from ..runtime.files import read_json, write_json_atomic
from .begun import changed_text
from .compare_jobs import CalibrationWindows, CompareJob
from .measure import publish
from .protocol import Protocol
from .prune import prune
from .recover import recover
from .recover_inputs import (
    check_trained,
    recovers,
    recovery_recipe,
)
from .result import add_warning
from .training import changed_texts
from .training_inputs import asked

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

    def reports_of(self, job: CompareJob) -> tuple[Report, Report | None]:
        """Prune and measure, or read the report of a run that was pruned and measured so before.

        One whose checkpoint is to be kept, and was not, is made again.

        Returns:
            The report of pruning, and that of the recovery where the recipe asks for one.
        """
        run = job.run(self.folder)
        recovered = RecoverDirectory(run.recovered)
        training = None if job.recipe.recover is None else recovery_recipe(job.recipe)
        report, recovery = _measured(run, job.recipe, self.protocol, self.source), None
        if report is not None and training is not None:
            recovery = _recovered(run, report, training, self.protocol, self.listener)
        if self.keep:
            recovery = recovery if _has_model(recovered, recovery) else None
            report = report if _has_model(run, report) else None
        for made, known in ((run, report), (recovered, recovery)):
            if known is not None and _has_model(made, known):
                publish(made, known, Listener())  # a killed command may have left card and page without figures
        if report is None or (training is not None and recovery is None and not _has_model(run, report)):
            if training is not None and recovery is None:
                check_trained(job.recipe, self.source, run)
            report = self._prune(run, job.recipe)
        if training is not None and recovery is None:
            recovery = self._recover(run, report, training)
        if job.key not in self.stay:
            run.remove_weights()
            recovered.remove_weights()
        return report, recovery

    def _prune(self, run: PruneDirectory, recipe: Recipe) -> Report:
        """Prune a row, and measure it unless these very weights were measured before they were deleted."""
        report = prune(
            self.model,
            run.folder,
            recipe=recipe.model_copy(update={"recover": None}),
            listener=self.listener,
            command=self.command,
            tokens=self.calibrated.get(recipe.calibration.model_dump_json()),
            source=self.source,
            **self.source.permissions.keywords(),
        )
        return self._measure(run, report)

    def _recover(self, run: PruneDirectory, pruned: Report, recipe: RecoverRecipe) -> Report:
        """Recover a pruned row and measure it. Remove a recovery with other settings or another input."""
        following, permissions = RecoverDirectory(run.recovered), self.source.permissions
        begun = following.record()
        if begun is not None and (
            not _follows(begun, pruned, recipe) or changed_files(begun.decision.stamps, permissions.at(run.model))
        ):
            self.listener.say(f"the recovery in {following.folder} is of other settings or input: it is made again")
            following.remove(run.model)
        report = recover(
            run.folder,
            following.folder,
            recipe=recipe,
            evaluate=None,
            listener=self.listener,
            command=self.command,
            **permissions.keywords(),
        )
        return self._measure(following, report)

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
        report, recovery = shared.reports_of(job)
        _adopt(comparison, report, shared.protocol)
        return _filled(row, report, recovery, shared.protocol, dense)
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
    changed = record is not None and (changed_text(record, recipe) or changed_files(record.decision.stamps, source))
    same = Recipe.build(report.recipe).fingerprint() == recipe.fingerprint() and not changed
    return report if same and report.status == "finished" and _evaluation(report, protocol) is not None else None


def _recovered(
    run: PruneDirectory, pruned: Report, recipe: RecoverRecipe, protocol: Protocol, listener: Listener
) -> Report | None:
    """Read the report of a recovery of this pruning with these settings, if it was measured on this text."""
    following = RecoverDirectory(run.recovered)
    begun = following.record()
    if begun is None or not following.report_file.is_file() or not _follows(begun, pruned, recipe):
        return None
    try:
        report = following.read_report()
    except FistaPrunerError as error:
        listener.say(f"the report is made again: {error}")
        return None
    return report if report.status == "finished" and _evaluation(report, protocol) is not None else None


def _has_model(run: RunDirectory, report: Report | None) -> bool:
    """Check that the checkpoint of a finished run is there, whole and of this run."""
    return report is not None and run.model_fault(report.fingerprint or "") is None


def _follows(begun: TrainingRecord, pruned: Report, recipe: RecoverRecipe) -> bool:
    """Check that a recovery has these settings, this pruning as its input, and texts as they are now."""
    return begun.decision.asked == asked(recipe) and recovers(begun, pruned) and not changed_texts(begun)


def _evaluation(report: Report, protocol: Protocol) -> Evaluation | None:
    """Find the report's measurement on the windows of the protocol."""
    return next((found for found in report.evaluations if protocol.covers(found.perplexity)), None)


def _adopt(comparison: Comparison, report: Report, protocol: Protocol) -> None:
    """Take the calibration from a run, unless it has its own."""
    if comparison.calibration is None and protocol.shares(Recipe.build(report.recipe).calibration):
        comparison.calibration = report.calibration


def _filled(
    row: CompareRow, report: Report, recovery: Report | None, protocol: Protocol, dense: Perplexity
) -> CompareRow:
    """Fill a row with the figures of its reports: quality after the recovery, where there is one."""
    totals = report.totals
    if (measured := _evaluation(recovery or report, protocol)) is not None:
        row.perplexity, row.divergence = measured.perplexity, measured.divergence
    if row.perplexity is not None and math.isfinite(row.perplexity.nll):
        row.gap = row.perplexity.nll - dense.nll
    row.relative_error = report.mean_error if recovery is None else None  # it is of the model before the recovery
    row.seconds, row.time_split, row.peak_memory = totals.seconds, totals.time_split, totals.peak_memory
    row.operator_weights, row.operator_zeros = totals.operator_weights, totals.operator_zeros
    row.low_rank_weights, row.checkpoint_bytes = totals.low_rank_weights, totals.checkpoint_bytes
    if report.widths:
        row.dense_weights, row.model_weights = report.model.parameters, totals.model_weights
        row.dense_flops_per_token, row.flops_per_token = totals.dense_flops_per_token, totals.flops_per_token
    if recovery is not None and recovery.totals.seconds is not None:
        row.seconds = (row.seconds or 0.0) + recovery.totals.seconds
        row.time_split = {**row.time_split, "recovery": recovery.totals.seconds}
        row.peak_memory = max(row.peak_memory or 0, recovery.totals.peak_memory or 0)
    return row

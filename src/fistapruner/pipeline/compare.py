"""Many methods, one protocol: the same model, calibration windows and evaluation text for every one.

    DIR/
        compare.json   compare.md     the figures so far; rewritten after every run
        runs/NAME/                    one run directory for each method, sparsity and seed

Every run is a normal run, so a comparison that was stopped continues. Once a run is measured, its checkpoint and
tensors are deleted (they are as large as the model); its records stay.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from ..calibration import SELF, window_length
from ..errors import FistaPrunerError, MissingExtraError, explain, out_path
from ..evaluation.data import check_data, load_windows
from ..evaluation.evaluate import evaluate as run_evaluation
from ..evaluation.streaming import KeptStates
from ..execution.context import open_model
from ..execution.executors import default_threads
from ..models.files.low_rank import refuse_low_rank, remove_adapter
from ..models.source import ModelSource, Permissions
from ..recipes.loading import merge
from ..recipes.recover_settings import RecoverRecipe
from ..recipes.settings import Recipe
from ..reporting.comparison import comparison_markdown
from ..reporting.write import write_page
from ..runs.base import read_json
from ..runs.decision import TrainingRecord
from ..runs.directory import RunDirectory, refuse_out
from ..runs.identity import changed_files, stamps
from ..runs.listener import Listener
from ..runs.lock import NAME as LOCK
from ..runs.lock import hold
from ..runs.prune_directory import PruneDirectory
from ..runs.records import STATES, CompareRow, Comparison, Report, load_comparison, load_run
from ..runs.results import Evaluation, Perplexity
from ..runs.times import forget_times
from ..runs.training_directory import RecoverDirectory
from ..runtime.devices import choose_device, cpu_threads
from ..runtime.files import PARTIAL, disk_errors, write_json_atomic, write_text_atomic
from ..runtime.machine import describe_machine, now, versions
from ..runtime.numerics import dtype_name, undisturbed
from ..sensitivity.workload import read_workload
from .begun import changed_text, continued_by_its_command, find_source, refuse_other_settings, same_model
from .contenders import Contender, parse_contenders
from .measure import add_warning, publish
from .plan import check_sources
from .prepare import describe_model, draw_windows, drawing_of
from .protocol import Protocol, distinct_seeds
from .prune import prune
from .prune_inputs import refuse_overlap, shared_text
from .recover import recover
from .recover_inputs import (
    TRAINED_BY,
    check_fits,
    check_following,
    check_trained,
    recovers,
    recovery_recipe,
    refuse_processes,
)
from .training import changed_texts
from .training_inputs import asked

CalibrationWindows = dict[str, tuple[Tensor, dict[str, Any]]]
"""Calibration windows, and how they were drawn, by their settings."""

_PERPLEXITY = TypeAdapter(Perplexity)

STAMPS = "stamps"
"""Key in ``dense.json`` of the :func:`~fistapruner.runs.identity.stamps` of the model that was measured."""


@undisturbed()
def compare(
    model: str | Path,
    methods: str | Sequence[str],
    sparsities: Sequence[str],
    out: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    settings: Mapping[str, Any] | None = None,
    data: str = "python",
    windows: int | None = None,
    keep: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    listener: Listener | None = None,
    command: str | None = None,
) -> Comparison:
    """Prune a model in many ways and measure all of them alike.

    Args:
        model: hub id, local folder, GGUF file, or ``smollm2``.
        methods: see :func:`parse_contenders`.
        sparsities: patterns, such as ``["50%", "2:4"]``.
        out: folder of the comparison; one that was begun is continued, and rows it has beside those asked for now stay,
            but for those whose model or calibration text has changed.
        seeds: each draws its own calibration windows; every method sees the same ones.
        settings: recipe settings that all share.
        data: text to evaluate on, as :func:`fistapruner.evaluate` takes it, in windows as long as the first method's
            calibration windows.
        windows: only its first so many windows.
        keep: keep the pruned checkpoints.
        allow_pickle: read legacy ``.bin`` weights.
        trust_remote_code: run Python code that comes with the checkpoint.
        listener: receives progress.
        command: shell line that reproduces the comparison.

    Returns:
        What is in ``out/compare.json``. A method that cannot do a sparsity has a row that says why.

    Raises:
        FistaPrunerError: bad input, named, before anything is pruned; or another comparison works on ``out``.
    """
    listener, permissions = listener or Listener(), Permissions(allow_pickle, trust_remote_code)
    model, folder = str(model), out_path(out)
    jobs = plan_jobs(parse_contenders(methods), sparsities, seeds, settings or {})
    for job in jobs:
        refuse_processes(job.recipe)
        if job.recipe.pattern.supports_allocation:
            read_workload(job.recipe)
        if not job.run(folder).run_file.exists():
            check_sources(job.recipe)
    check_data(data)
    before = _before(folder, model)
    source = _find_source(model, folder, permissions)
    refuse_overlap(source.folder, folder)
    refuse_low_rank(source.folder, "compare")
    jobs = [replace(job, recipe=job.recipe.resolved(family=source.family)) for job in jobs]
    protocol = agree_protocol(source, jobs[0].recipe, data, windows, settings or {})
    _rows_that_stay(before.rows, jobs, protocol, folder)
    check_recoveries(jobs, source, folder, listener)
    calibrated: CalibrationWindows = {}
    for job in jobs:
        if SELF not in job.recipe.calibration.sources.values():  # a fault in the text shows now
            draw(job, source, folder, calibrated, listener)
    with disk_errors(folder):
        (folder / "runs").mkdir(parents=True, exist_ok=True)
    with continued_by_its_command(), hold(folder):
        before = _before(folder, model)  # as it is now that it is held
        rows, dropped = _unchanged(_rows_that_stay(before.rows, jobs, protocol, folder), jobs, source, folder)
        comparison = Comparison(
            command=command,
            started=now(),
            versions=versions(),
            machine=describe_machine(choose_device(protocol.device), default_threads(jobs[0].recipe.execution)),
            model=describe_model(source, model, open_model(source, jobs[0].recipe)),
            calibration=before.calibration if rows else None,
            rows=rows,
        )
        for warning in [*dropped, *shared_texts(jobs, data)]:
            listener.say(warning)
            comparison.warnings.append(warning)
        with closing(KeptStates(source.folder, folder / STATES)) as kept:
            shared = _Shared(model, source, folder, protocol, listener, keep, kept, calibrated, command)
            dense = measure_dense(shared)
            comparison.dense = dense
            if before.rows:  # those that are out of date go before their runs are made again
                _write(folder, comparison)
            for number, job in enumerate(jobs, 1):
                listener.say(f"{number}/{len(jobs)}: {job.label}, {job.recipe.sparsity}, seed {job.seed}")
                draw(job, source, folder, calibrated, listener)
                row = run_job(job, shared, comparison, dense)
                comparison.rows = [*(other for other in comparison.rows if other.key != row.key), row]
                _write(folder, comparison)
        comparison.status = "finished"
        comparison.finished = now()
        _write(folder, comparison)
        try:
            listener.say(f"page: {write_page(folder)}")
        except MissingExtraError as error:
            listener.say(str(error))
    return comparison


@dataclass(frozen=True)
class Job:
    """One run of a comparison.

    Args:
        label: the method as the user wrote it.
        seed: of the run and of its calibration windows.
        recipe: all settings.
    """

    label: str
    seed: int
    recipe: Recipe

    @property
    def key(self) -> tuple[str, str, int]:
        """Identify its row among those of a comparison."""
        return self.label, str(self.recipe.sparsity), self.seed

    def run(self, folder: Path) -> PruneDirectory:
        """Return its run directory in that of a comparison."""
        return PruneDirectory(folder / "runs" / run_name(*self.key))


def plan_jobs(
    contenders: Sequence[Contender], sparsities: Sequence[str], seeds: Sequence[int], settings: Mapping[str, Any]
) -> list[Job]:
    """List the runs of a comparison: every method at every sparsity, seed after seed.

    Raises:
        FistaPrunerError: nothing to do, a seed or sparsity named twice, or settings that are no recipe.
    """
    distinct_seeds(seeds)
    jobs = []
    for seed in seeds:
        for sparsity in sparsities:
            for contender in contenders:
                said = merge(dict(settings), {"seed": seed, "calibration": {"seed": seed}})
                said = merge(merge(said, contender.settings), {"sparsity": sparsity})
                jobs.append(Job(contender.label, seed, Recipe.build(said, contender.label)))
    if not jobs:
        raise FistaPrunerError("nothing to compare: name methods, sparsities and seeds")
    if len({str(job.recipe.sparsity) for job in jobs}) < len(sparsities):  # 0.5 is 50%
        raise FistaPrunerError(f"--sparsity {','.join(sparsities)!r} names the same sparsity twice")
    return jobs


def check_recoveries(jobs: Sequence[Job], source: ModelSource, folder: Path, listener: Listener) -> None:
    """Check the texts of all recoveries that have not begun, and that these fit.

    Raises:
        FistaPrunerError: a text that cannot be read, or is too short for the windows of a recovery; or memory or disk
            that are too small.
    """
    following = [job for job in jobs if job.recipe.recover is not None]
    following = [job for job in following if not RecoverDirectory(job.run(folder).recovered).run_file.exists()]
    checked = set()
    for recipe in (job.recipe for job in following):
        texts = json.dumps([recipe.calibration.sources, recipe.recover.model_dump(mode="json")])
        if texts not in checked:
            check_following(recipe, source)
            checked.add(texts)
    for job in following:
        trained = json.dumps(job.recipe.model_dump(mode="json", include=TRAINED_BY))
        if trained in checked:
            continue
        try:
            task = check_trained(job.recipe, source, job.run(folder).recovered)
        except FistaPrunerError:  # its row says so
            continue
        checked.add(trained)
        planned = json.dumps(task and [task.recipe.model_dump(mode="json"), dict(task.survivors)])
        if planned not in checked:
            check_fits(task, listener)
            checked.add(planned)


def shared_texts(jobs: Sequence[Job], data: str) -> list[str]:
    """Warn of evaluation text that has documents of the calibration or training text of a run."""
    calibration = {source: None for job in jobs for source in job.recipe.calibration.sources.values()}
    following = [job.recipe.recover.data for job in jobs if job.recipe.recover is not None]
    training = {source: None for text in following for source in [*text.tasks.values(), text.source] if source}
    found = shared_text(calibration, data), shared_text(training, data, training=True)
    return [warning for warning in found if warning is not None]


def agree_protocol(
    source: ModelSource, recipe: Recipe, data: str, windows: int | None, settings: Mapping[str, Any]
) -> Protocol:
    """Fix what all rows share, from the first ``recipe``: evaluation windows, precision, calibration."""
    opened = open_model(source, recipe)
    text = load_windows(data, source.tokenizer(), window_length(recipe.calibration.seqlen, opened), windows)
    calibration = Recipe.build({"calibration": settings.get("calibration") or {}}).resolved().calibration
    execution = recipe.execution
    return Protocol(text, dtype_name(opened.dtype), calibration, execution.device, recipe.dtype, execution.memory_limit)


def measure_dense(shared: _Shared) -> Perplexity:
    """Measure the dense model on the windows of the protocol, or read what was measured before."""
    file, protocol = shared.folder / "dense.json", shared.protocol
    weights = [list(stamp) for stamp in stamps(shared.source.checkpoint())]
    found = _dense(file, protocol, weights)
    if found is None:
        shared.listener.say(f"evaluating the dense model on {protocol.text.data}")
        found = shared.evaluate(shared.source.folder).perplexity
        assert found is not None
        write_json_atomic(file, {**_PERPLEXITY.dump_python(found, mode="json"), STAMPS: weights})
    return found


def draw(job: Job, source: ModelSource, folder: Path, calibrated: CalibrationWindows, listener: Listener) -> None:
    """Draw the calibration windows of a row that has not begun, unless another row has the same.

    They are drawn before the row, so that their time is not that of the method named first.

    Args:
        job: the row.
        source: the model's folder.
        folder: of the comparison.
        calibrated: receives the windows.
        listener: receives progress.

    Raises:
        FistaPrunerError: a text that is too short or cannot be read, or a model that cannot generate it.
    """
    recipe, calibration = job.recipe, job.recipe.calibration
    key = calibration.model_dump_json()
    if key in calibrated or job.run(folder).run_file.exists():
        return
    model = open_model(source, recipe)
    seqlen, found = window_length(calibration.seqlen, model), None
    if SELF in calibration.sources.values():  # it takes long: rows that are begun or were stopped have left it
        drawing = drawing_of(calibration, model, seqlen)
        earlier = (PruneDirectory(run).drawn(drawing) for run in sorted(folder.glob("runs/*")))
        found = next(filter(None, earlier), None)
    with cpu_threads(default_threads(recipe.execution)):
        drawn = found or draw_windows(recipe, source, model, source.tokenizer(), seqlen, listener)
    model.check_tokens(drawn[0])
    calibrated[key] = drawn


def run_job(job: Job, shared: _Shared, comparison: Comparison, dense: Perplexity) -> CompareRow:
    """Prune and measure one row, or find that it was done before.

    Args:
        job: what to do.
        shared: what all jobs share.
        comparison: receives the calibration that all runs have in common.
        dense: perplexity of the dense model.

    Returns:
        The row; one without figures says why.
    """
    recipe = job.recipe
    row = CompareRow(
        method=recipe.method_name,
        label=job.label,
        sparsity=str(recipe.sparsity),
        seed=job.seed,
        settings=recipe.model_dump(mode="json", exclude={"execution"}),
    )
    try:
        report, recovery = shared.reports_of(job)
        _adopt(comparison, report, shared.protocol)
        return _filled(row, report, recovery, shared.protocol, dense)
    except FistaPrunerError as error:
        row.error = str(error)
        shared.listener.say(f"{job.label}: {error}")
        return row


@dataclass(frozen=True)
class _Shared:
    """What all jobs of a comparison share.

    Args:
        model: as the user named it; ``source``: its folder.
        folder: of the comparison.
        protocol: how every row is measured.
        listener: receives progress.
        keep: keep the pruned checkpoints.
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

    def reports_of(self, job: Job) -> tuple[Report, Report | None]:
        """Prune and measure, or read the report of a run that was pruned and measured so before.

        One whose checkpoint is to be kept, and was not, is made again.

        Returns:
            The report of pruning, and that of the recovery where the recipe asks for one.
        """
        run = job.run(self.folder)
        training = None if job.recipe.recover is None else recovery_recipe(job.recipe)
        report, recovery = _measured(run, job.recipe, self.protocol, self.source), None
        if report is not None and training is not None:
            recovery = _recovered(run, report, training, self.protocol)
        if self.keep:
            recovery = recovery if RecoverDirectory(run.recovered).model.is_dir() else None
            report = report if run.model.is_dir() else None
        if report is None or (training is not None and recovery is None and not run.model.is_dir()):
            if training is not None and recovery is None:
                check_trained(job.recipe, self.source, run.recovered)
            report = self._prune(run, job.recipe)
        if training is not None and recovery is None:
            recovery = self._recover(run, report, training)
        if not self.keep:
            _delete_weights(run)
        return report, recovery

    def _prune(self, run: PruneDirectory, recipe: Recipe) -> Report:
        """Prune a row, and measure it unless that was done before its weights were deleted."""
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
        following = RecoverDirectory(run.recovered)
        begun = following.record()
        if begun is not None and not _follows(begun, pruned, recipe):
            self.listener.say(f"the recovery in {following.folder} is of other settings or input: it is made again")
            following.remove()
        report = recover(
            run.folder,
            following.folder,
            recipe=recipe,
            evaluate=None,
            listener=self.listener,
            command=self.command,
            **self.source.permissions.keywords(),
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
            publish(run, report, self.listener)
        return report


def run_name(label: str, sparsity: str, seed: int) -> str:
    """Name the folder of a run: readable, and different for different labels."""
    plain = re.sub(r"[^A-Za-z0-9.+-]+", "_", f"{label}-{sparsity.replace(':', 'of').replace('%', '')}")[:80]
    return f"{plain}-seed{seed}-{hashlib.sha256(f'{label} {sparsity}'.encode()).hexdigest()[:6]}"


def _rows_that_stay(
    before: list[CompareRow], jobs: Sequence[Job], protocol: Protocol, folder: Path
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
            earlier = Recipe.build(record.recipe, str(run.run_file)).model_dump(mode="json")
            refuse_other_settings(run, earlier, job.recipe.identity())
    return stay


def _unchanged(
    rows: list[CompareRow], jobs: Sequence[Job], source: ModelSource, folder: Path
) -> tuple[list[CompareRow], list[str]]:
    """Leave out rows whose model or calibration text has changed.

    Returns:
        The others, and a warning for each that is left out and not asked for now.
    """
    asked = {job.key for job in jobs}
    stay, warnings = [], []
    for row in rows:
        changed = _changed(PruneDirectory(folder / "runs" / run_name(*row.key)), source)
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
            text = changed_text(record, Recipe.build(record.recipe, str(run.run_file)))
            return text or changed_files(record.decision.stamps, source)
    return None


def _find_source(model: str, folder: Path, permissions: Permissions) -> ModelSource:
    """Find the model where the rows that have begun found it, so that all rows are of the same files."""
    for file in sorted((folder / "runs").glob("*/run.json")):
        with suppress(FistaPrunerError):  # a damaged record is named where its row is asked for
            if (record := PruneDirectory(file.parent).record()) is not None:
                return find_source(model, record, permissions)
    return permissions.find(model)


def _before(folder: Path, model: str) -> Comparison:
    """Read the comparison that ``folder`` already holds; one without rows where there is none."""
    refuse_out(folder)
    if (folder / "compare.json").is_file():
        before = load_comparison(folder)
        if not same_model(before.model.source, model):
            raise FistaPrunerError(
                f"--out {folder} holds a comparison of {before.model.source!r}, this one is of {model!r}: name another "
                "folder"
            )
        return before
    # One that was stopped before its first row has left the dense model's figures at most, and runs begun after them.
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    begun = (folder / "dense.json").is_file() or not (folder / "runs").is_dir() or not any((folder / "runs").iterdir())
    own = {"runs", LOCK, STATES, "dense.json", *(name + PARTIAL for name in ("dense.json", "compare.json"))}
    if names - own or not begun:
        raise FistaPrunerError(f"--out {folder} is a folder with other things in it; name a new folder")
    return Comparison()


def _measured(run: PruneDirectory, recipe: Recipe, protocol: Protocol, source: ModelSource) -> Report | None:
    """Read the report of a run that pruned this model with these settings and was measured on this text."""
    if not run.report_file.is_file():
        return None
    report = run.read_report()
    record = run.record()
    changed = record is not None and (changed_text(record, recipe) or changed_files(record.decision.stamps, source))
    same = Recipe.build(report.recipe).fingerprint() == recipe.fingerprint() and not changed
    return report if same and report.status == "finished" and _evaluation(report, protocol) is not None else None


def _recovered(run: PruneDirectory, pruned: Report, recipe: RecoverRecipe, protocol: Protocol) -> Report | None:
    """Read the report of a recovery of this pruning with these settings, if it was measured on this text."""
    following = RecoverDirectory(run.recovered)
    begun = following.record()
    if begun is None or not following.report_file.is_file() or not _follows(begun, pruned, recipe):
        return None
    report = load_run(following.folder)
    return report if report.status == "finished" and _evaluation(report, protocol) is not None else None


def _follows(begun: TrainingRecord, pruned: Report, recipe: RecoverRecipe) -> bool:
    """Check that a recovery has these settings, this pruning as its input, and texts as they are now."""
    return begun.decision.asked == asked(recipe) and recovers(begun, pruned) and not changed_texts(begun)


def _evaluation(report: Report, protocol: Protocol) -> Evaluation | None:
    """Find the report's measurement on the windows of the protocol."""
    return next((found for found in report.evaluations if protocol.covers(found.perplexity)), None)


def _dense(file: Path, protocol: Protocol, weights: list[list[str]]) -> Perplexity | None:
    """Read the dense model's perplexity, if these weights were measured on the same windows before."""
    if not file.is_file():
        return None
    content = read_json(file)
    same = content.pop(STAMPS, None) == weights
    try:
        stored = _PERPLEXITY.validate_python(content)
    except ValidationError as error:
        raise FistaPrunerError(
            f"{file} is not what a comparison writes ({explain(error)}): remove it, or choose another --out"
        ) from None
    return stored if same and protocol.covers(stored) else None


def _filled(
    row: CompareRow, report: Report, recovery: Report | None, protocol: Protocol, dense: Perplexity
) -> CompareRow:
    """Fill a row with the figures of its reports: quality after the recovery, where there is one."""
    totals = report.totals
    if (measured := _evaluation(recovery or report, protocol)) is not None:
        row.perplexity, row.divergence = measured.perplexity, measured.divergence
    if row.perplexity is not None and math.isfinite(row.perplexity.nll):
        row.gap = row.perplexity.nll - dense.nll
    row.relative_error = report.mean_error
    row.seconds, row.time_split, row.peak_memory = totals.seconds, totals.time_split, totals.peak_memory
    row.operator_weights, row.operator_zeros = totals.operator_weights, totals.operator_zeros
    row.low_rank_weights = totals.low_rank_weights
    if recovery is not None and recovery.totals.seconds is not None:
        row.seconds = (row.seconds or 0.0) + recovery.totals.seconds
        row.time_split = {**row.time_split, "recovery": recovery.totals.seconds}
        row.peak_memory = max(row.peak_memory or 0, recovery.totals.peak_memory or 0)
    return row


def _adopt(comparison: Comparison, report: Report, protocol: Protocol) -> None:
    """Take the calibration from a run, unless it has its own."""
    if comparison.calibration is None and protocol.shares(Recipe.build(report.recipe).calibration):
        comparison.calibration = report.calibration


def _delete_weights(run: PruneDirectory) -> None:
    """Delete what is as large as the model: checkpoints, tensors of layers, states of training."""
    following = RecoverDirectory(run.recovered)
    for made in (run, following):
        if made.model.is_dir():
            made.remove_model()
        forget_times(made.folder)
    shutil.rmtree(following.states.folder, ignore_errors=True)
    remove_adapter(run.adapter)
    run.journal.remove_weights()
    run.metrics_file.unlink(missing_ok=True)


def _write(folder: Path, comparison: Comparison) -> None:
    write_json_atomic(folder / "compare.json", comparison.model_dump(mode="json"))
    write_text_atomic(folder / "compare.md", comparison_markdown(comparison))

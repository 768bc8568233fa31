"""Measure a finished checkpoint (quality, speed) and write the figures into report, card and page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import A_TEXT, FistaPrunerError, MissingExtraError, one_line, path_text
from ..evaluation.data import load_windows
from ..evaluation.evaluate import check_request
from ..evaluation.evaluate import evaluate as run_evaluation
from ..evaluation.generations import generate_side_by_side
from ..models.files.record import lost_structure, read_pruning_record
from ..models.source import Permissions
from ..recipes.execution_settings import Execution
from ..recipes.recover_settings import RecoverRecipe
from ..recipes.settings import Recipe
from ..reporting.evaluation_text import item_count
from ..reporting.model_card import model_card
from ..reporting.recovery_text import gain_text
from ..reporting.write import write_page
from ..runs.decision import EvaluationRequest
from ..runs.directory import CARD, RunDirectory, finished_run
from ..runs.identity import changed_files, stamps
from ..runs.lineage import trained_on, update_stage, write_lineage
from ..runs.listener import Listener
from ..runs.lock import hold
from ..runs.prune_directory import PruneDirectory
from ..runs.records import Report, is_run, load_run
from ..runs.results import Evaluation, TaskResult
from ..runs.training_runs import Dense, dense_of, input_run
from ..runtime.devices import choose_device
from ..runtime.files import write_text_atomic
from ..runtime.formatting import shell_line
from ..runtime.machine import describe_machine, now
from ..runtime.numerics import windows_at_once
from ..sparse.bench import bench, packed_bytes
from ..sparse.bench import record as speed_record
from ..sparse.speed import Speed
from .begun import absolute
from .prune_inputs import shared_text


@dataclass(frozen=True)
class Compared:
    """The models that the result of a run is compared with.

    Args:
        dense: folder of the dense model, which may be gone; None where it is not known.
        before: folder of the pruned model that a recovery run began with; None for a pruning run.
    """

    dense: Path | None
    before: Path | None = None

    @classmethod
    def of(cls, run: RunDirectory) -> Compared:
        """Find them in what the run has decided."""
        record, dense = run.record(), dense_of(run)
        before = None if record is None or record.kind == "prune" else record.decision.folder
        return cls(None if dense is None else dense.folder, before)


def measure(
    run: RunDirectory,
    report: Report,
    request: EvaluationRequest | None,
    execution: Execution,
    permissions: Permissions,
    listener: Listener,
    before: Sequence[Evaluation] = (),
) -> Report:
    """Evaluate ``RUN/model`` beside the dense model, and write report, model card and page.

    The model that a recovery run began with is evaluated on the same windows. What the report already holds of these
    is not measured again.

    Args:
        run: the run directory, with a finished checkpoint.
        report: of the finished run.
        request: the text to evaluate on; None evaluates nothing.
        execution: names the device and the most memory; a run may end on another machine than it began on.
        permissions: what the models' files may do.
        listener: receives progress.
        before: figures of the model that a recovery run began with, which other runs have measured.

    Raises:
        FistaPrunerError: the text cannot be read.
    """
    if request is not None:
        compared = Compared.of(run)
        begun_with_dense = report.kind == "prune" and (report.lineage is None or len(report.lineage.stages) < 2)
        if not begun_with_dense and (compared.dense is None or not compared.dense.exists()):
            where = "is not known" if compared.dense is None else f"is not at {compared.dense}"
            add = f"'{shell_line('evaluate', run.folder, '--against', 'DENSE')}' adds them"
            listener.say(f"no figures of the dense model, which {where}: {add}")
            compared = replace(compared, dense=None)  # the run itself did not need it
        _evaluate(run, report, compared, request, execution, permissions, listener, before)
        _generate(run, report, compared, execution, permissions, listener)
    publish(run, report, listener)
    return report


def _evaluate(
    run: RunDirectory,
    report: Report,
    compared: Compared,
    request: EvaluationRequest,
    execution: Execution,
    permissions: Permissions,
    listener: Listener,
    before: Sequence[Evaluation],
) -> None:
    """Measure perplexity and divergence, and keep them with the report at once."""
    assert report.calibration is not None
    _compare_texts(report, request.data, listener, trained=False)
    seqlen = request.seqlen or report.calibration.seqlen
    cut = load_windows(request.data, permissions.at(run.model).tokenizer(), seqlen, request.windows)
    settings = {
        "device": execution.device,
        "dtype": report.recipe.get("dtype", "auto"),
        "batch_size": _batch_size(run, report, seqlen, execution),
        "memory_limit": execution.memory_limit,
        "warn": lambda sentence: add_warning(report, sentence, listener),  # what the run has made is not lost for it
        "tick": listener.tick,
        **permissions.keywords(),
    }
    measured = (
        found for found in report.evaluations if found.perplexity and found.perplexity.text_sha256 == cut.sha256
    )
    found = next(measured, None)
    if found is None:
        what = "pruned" if report.kind == "prune" else report.trained
        listener.say(f"evaluating the {'dense and the ' if compared.dense else ''}{what} model on {request.data}")
        found = run_evaluation(run.model, cut, against=compared.dense, **settings)
        report.evaluations.append(found)
        run.write_report(report)
    if _evaluate_input(report, compared, found, listener, before, data=cut, **settings):
        run.write_report(report)


def add_warning(report: Report, sentence: str, listener: Listener) -> None:
    """Add a warning to a report and say it, unless it is there."""
    if sentence not in report.warnings:
        listener.say(sentence)
        report.warnings.append(sentence)


def _compare_texts(report: Report, data: str, listener: Listener, *, trained: bool = True) -> tuple[str, ...]:
    """Warn of evaluation text that is also calibration or training text of a run or of those before it.

    Args:
        report: of the run; receives the warnings.
        data: the evaluation text.
        listener: receives them, too.
        trained: compare the run's own training text; the documents that it took of it are compared where it is cut.

    Returns:
        The warnings, those that the report had before among them.
    """
    before = [] if report.lineage is None else report.lineage.stages
    stages = [(stage.kind, stage.settings) for stage in before if stage.fingerprint != report.fingerprint]
    if trained or report.kind == "prune":
        stages.append((report.kind, report.recipe))
    calibration, training = dict[str, None](), dict[str, None]()
    for kind, settings in stages:
        with suppress(FistaPrunerError):  # settings of another release
            if kind == "prune":
                calibration |= dict.fromkeys(Recipe.build(settings).calibration.sources.values())
            elif kind == "recover":
                training |= dict.fromkeys(RecoverRecipe.build(settings).data.texts)
    found = []
    for sources, trains in ((calibration, False), (training, True)):
        with suppress(FistaPrunerError):  # a file that cannot be read any more cannot be compared
            if shared := shared_text(sources, absolute(data), training=trains):
                add_warning(report, shared, listener)
                found.append(shared)
    return tuple(found)


def _batch_size(run: RunDirectory, report: Report, seqlen: int, execution: Execution) -> int:
    """Choose the windows in one pass: the default, or fewer that were asked for or come down to.

    What the plan of a training run came down to says nothing of a forward pass alone.
    """
    device = choose_device(execution.device)
    sizes = [windows_at_once(seqlen, device), *filter(None, [execution.batch_size])]
    if isinstance(run, PruneDirectory) and (record := run.record()) is not None and report.calibration is not None:
        numerics = record.decision.numerics
        if numerics.batch_size < windows_at_once(report.calibration.seqlen, torch.device(numerics.device)):
            sizes.append(numerics.batch_size)
        if device.type == "cuda" and (reduced := run.journal.reduced(record.fingerprint or "")) is not None:
            sizes.append(reduced[0])
    return min(sizes)


def _evaluate_input(
    report: Report,
    compared: Compared,
    found: Evaluation,
    listener: Listener,
    before: Sequence[Evaluation] = (),
    **settings: Any,
) -> bool:
    """Find or measure the figures of the model that training began with, on the windows of its result.

    They are taken from other runs that began with it, or from the report of the run that made it, where they were
    measured there against the same dense model; else they are measured. Scores of tasks are taken only.

    Args:
        report: receives them.
        compared: the models.
        found: the figures of the result.
        listener: receives progress.
        before: what other runs have measured of that model.
        **settings: as for :func:`fistapruner.evaluate`.

    Returns:
        Whether the report has changed.
    """
    if report.recovery is None or compared.before is None:
        return False
    others = (*before, *_of_input(report, compared.before))
    added = _add_scores(report.recovery.before, report.evaluations, others)
    if found.perplexity is None:
        return added
    known = next((one for one in report.recovery.before if _same_comparison(one, found)), None)
    changed = known is None
    if known is None:
        known = next((one for one in others if _same_comparison(one, found)), None)
    if known is None:
        if not compared.before.exists():
            listener.say(f"no figures of the model before {report.training}, which is not at {compared.before}")
            return added
        listener.say(f"evaluating the model before {report.training} on {found.perplexity.data}")
        known = run_evaluation(compared.before, against=found.against, **settings)
    if changed:
        report.recovery.before = [*(one for one in report.recovery.before if not _same_text(one, found)), known]
    if gain := gain_text(known, found, report.training):
        listener.say(gain)
    return changed or added


def _add_scores(before: list[Evaluation], evaluations: Sequence[Evaluation], others: Sequence[Evaluation]) -> bool:
    """Add scores of a run's input on the same items of its result's tasks; tell whether any are new.

    Args:
        before: evaluations of the input that the run has; receives them.
        evaluations: of the result.
        others: evaluations of the input by other runs.
    """
    wanted = {task.measured_on for one in evaluations for task in one.tasks}
    wanted -= {task.measured_on for one in before for task in one.tasks}
    count = len(before)
    for one in others:
        if tasks := tuple(task for task in one.tasks if task.measured_on in wanted):
            before.append(replace(one, perplexity=None, reference=None, divergence=None, tasks=tasks))
            wanted -= {task.measured_on for task in tasks}
    return len(before) > count


def _of_input(report: Report, before: Path) -> list[Evaluation]:
    """Return what was measured on a recovery run's input, by the run that made it."""
    origin, stages = input_run(str(before)), report.lineage.stages if report.lineage else []
    if origin is None or len(stages) < 2:
        return []
    try:
        made = load_run(origin.folder)
    except FistaPrunerError:
        return []
    return made.evaluations if made.fingerprint == stages[-2].fingerprint else []


def _generate(
    run: RunDirectory,
    report: Report,
    compared: Compared,
    execution: Execution,
    permissions: Permissions,
    listener: Listener,
) -> None:
    """Continue a few prompts with the dense model, the run's result, and the model before recovery."""
    if report.generations:
        return
    device = choose_device(execution.device)
    models = {"dense": compared.dense, "pruned": compared.before, "recovered": run.model}
    if compared.before is None:
        models = {"dense": compared.dense, "pruned": run.model}
    faults = FistaPrunerError, RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError
    try:
        report.generations = generate_side_by_side(
            {name: folder for name, folder in models.items() if folder is not None and folder.exists()},
            device,
            memory_limit=execution.memory_limit,
            tick=listener.tick,
            **permissions.keywords(),
        )
    except faults as error:  # of the models' own code: an example is no figure
        listener.say(f"no examples: {type(error).__name__}: {one_line(error)}")


def recovered_beside(folder: str | Path) -> str | None:
    """Say that the model of a pruning run was recovered; None where it was not."""
    recovered = PruneDirectory(Path(folder)).recovered
    if not (recovered / "model").is_dir():
        return None
    return f"{recovered} holds the recovered model; this is the one before it"


def evaluate_run(
    folder: str | Path,
    data: str | Path | None = None,
    *,
    against: str | Path | None = None,
    listener: Listener | None = None,
    **settings: Any,
) -> Evaluation:
    """Evaluate a finished run against its dense model, and keep the result with the run.

    The figures go into ``report.json``, the page and the model card. They take the place of earlier ones of the same
    tokens and precision, or of the same task and not more items. If tasks fail, the perplexity before them is there.
    The model that a recovery run began with is evaluated on the same text too, unless its own run has done that.
    Figures against another model than the run's own dense model are returned only: the run's are of that one.

    Args:
        folder: the run directory.
        data: text for perplexity, see :func:`fistapruner.evaluate`; None measures tasks only.
        against: the dense model; default is the one that was pruned.
        listener: receives progress.
        **settings: as for :func:`fistapruner.evaluate`, less ``keep`` and ``warn``.

    Returns:
        What was measured.

    Raises:
        FistaPrunerError: not a finished run, its dense model is gone or has changed, or bad settings.
    """
    data = None if data is None else path_text("data", data, A_TEXT)
    check_request(data, **settings)
    permissions = Permissions(settings.get("allow_pickle", False), settings.get("trust_remote_code", False))
    with _finished(folder) as (run, report):
        compared = Compared.of(run)
        dense, listener = dense_of(run), listener or Listener()
        kept = True
        if against is None:
            against = compared.dense
            if against is None:
                raise FistaPrunerError(f"{folder} names no dense model: say where it is with --against")
            if not Path(against).exists():
                raise FistaPrunerError(
                    f"{folder}: the model it was made from is not at {against}: say where it is with --against"
                )
            if why := _changed(dense, permissions):
                raise FistaPrunerError(f"{why} since {folder} began: name the dense model with --against")
        elif _is_another(against, dense, permissions):
            kept = False
            listener.say(
                f"{against} is not the dense model of this run, {compared.dense}: the figures are not kept with the run"
            )
        if beside := recovered_beside(folder):
            listener.say(beside)
        if (settings.get("tasks") or settings.get("tasks_dir")) and (warning := trained_on(report.lineage)) is not None:
            listener.say(warning)
            if warning not in report.warnings:
                report.warnings.append(warning)

        shared = () if data is None else _compare_texts(report, data, listener)

        def warned(found: Evaluation) -> Evaluation:
            return replace(found, warnings=(*shared, *found.warnings))

        def keep(found: Evaluation) -> None:
            if kept:
                for task in _fuller(report.evaluations, found):
                    listener.say(
                        f"{task.task} {task.metric}: the run keeps its score on {item_count(task)}: they are more"
                    )
                report.evaluations = _in_place(report.evaluations, warned(found))
                publish(run, report, listener)

        found = run_evaluation(run.model, data, against=against, keep=keep, **settings)
        keep(found)
        text = {name: value for name, value in settings.items() if name not in ("tasks", "tasks_dir", "limit")}
        if kept and _evaluate_input(report, compared, found, listener, data=data, **text):
            publish(run, report, listener)
    return warned(found)


def _changed(dense: Dense | None, permissions: Permissions) -> str | None:
    """Say which file of a dense model is not what it was; None where all are, or no run has noted them."""
    return changed_files(dense.stamps, permissions.at(dense.folder)) if dense is not None and dense.stamps else None


def _is_another(model: str | Path, dense: Dense | None, permissions: Permissions) -> bool:
    """Tell whether a model has other files than the dense model of a run; False where that is not known.

    Args:
        model: as the user named it.
        dense: of the run; where no checksums of its files were noted, they are taken from its folder.
        permissions: what the models' files may do.

    Raises:
        FistaPrunerError: the model cannot be opened.
    """
    if dense is None:
        return False
    noted = dense.stamps
    if not noted and dense.folder.exists():
        noted = tuple(stamps(permissions.at(dense.folder).checkpoint()))
    return bool(noted) and changed_files(noted, permissions.find(model)) is not None


def bench_run(folder: str | Path, *, listener: Listener | None = None, **settings: Any) -> list[Speed]:
    """Measure speed and sizes of the checkpoint of a finished run, and keep the result with the run.

    The figures go into ``report.json``, the page and the model card, in the place of earlier ones. Every form runs in a
    process of its own, which imports the script that calls this: put the call under ``if __name__ == "__main__":``.

    Args:
        folder: the run directory.
        listener: receives progress.
        **settings: ``batch``, ``prompt``, ``tokens``, ``runs``, ``threads``, as for
            :func:`fistapruner.sparse.bench.bench`.

    Raises:
        FistaPrunerError: not a finished run, a number that is too small, or it does not fit disk or memory.
    """
    with _finished(folder) as (run, report):
        listener = listener or Listener()
        if beside := recovered_beside(folder):
            listener.say(beside)
        dense = dense_of(run) if lost_structure(read_pruning_record(run.model)) else None
        before = dense.folder if dense is not None and dense.folder.is_dir() else None
        if before is not None and (why := _changed(dense, Permissions(settings.get("allow_pickle", False)))):
            listener.say(f"{why} since {folder} began: the dense model is not measured")
            before = None
        found = bench(run.model, before=before, **settings)
        machine = describe_machine(torch.device("cpu")).model_dump(mode="json")
        report.speed = {**speed_record(found, run.model), "machine": machine, "measured": now()}
        report.totals.compressed_bytes = packed_bytes(found)
        publish(run, report, listener)
    return found


def publish(run: RunDirectory, report: Report, listener: Listener) -> None:
    """Write a finished run's ``report.json``, its model card, and the page if it can be drawn."""
    update_stage(report)
    run.write_report(report)
    write_lineage(run.model, report.lineage)
    write_text_atomic(run.model / CARD, model_card(report))
    try:
        listener.say(f"report: {write_page(run.folder)}")
    except MissingExtraError as error:
        listener.say(str(error))


@contextmanager
def _finished(folder: str | Path) -> Iterator[tuple[RunDirectory, Report]]:
    """A finished run and its report, held so that no other process writes them meanwhile."""
    if not is_run(folder):
        raise FistaPrunerError(f"{folder} is not a run: it has neither run.json nor report.json")
    with hold(Path(folder)):
        yield finished_run(Path(folder))


def _in_place(earlier: Sequence[Evaluation], found: Evaluation) -> list[Evaluation]:
    """Put an evaluation in the place of the earlier one on its text, or last.

    What it measures again is left out of the others; a score that :func:`_fuller` keeps, of the new one.
    """
    fuller = {(task.task, task.metric) for task in _fuller(earlier, found)}
    found = replace(found, tasks=tuple(task for task in found.tasks if (task.task, task.metric) not in fuller))
    again = {(task.task, task.metric) for task in found.tasks}
    kept: list[Evaluation] = []
    place = None
    for evaluation in earlier:
        tasks = tuple(task for task in evaluation.tasks if (task.task, task.metric) not in again)
        rest = replace(evaluation, tasks=tasks)
        if _same_text(evaluation, found):
            rest = replace(rest, perplexity=None, reference=None, divergence=None)
            place = len(kept) if place is None else place
        if rest.perplexity is not None or rest.tasks:
            kept.append(rest)
    if found.perplexity is not None or found.tasks:
        kept.insert(len(kept) if place is None else place, found)
    return kept


def _fuller(earlier: Sequence[Evaluation], found: Evaluation) -> list[TaskResult]:
    """List the earlier scores that stay: of more items than a new one, which is not of all items."""
    new = {(task.task, task.metric): task for task in found.tasks}
    return [
        old
        for evaluation in earlier
        for old in evaluation.tasks
        if (task := new.get((old.task, old.metric))) is not None
        and task.items < old.items
        and (task.source != old.source or task.items != task.available)
    ]


def _same_comparison(a: Evaluation, b: Evaluation) -> bool:
    """Whether two evaluations are of the same windows in the same precision, against the same dense model."""
    dense = [None if one.against is None else Path(one.against).resolve() for one in (a, b)]
    return dense[0] == dense[1] and _same_text(a, b)


def _same_text(a: Evaluation, b: Evaluation) -> bool:
    if a.perplexity is None or b.perplexity is None:
        return False
    return a.perplexity.measured_on == b.perplexity.measured_on

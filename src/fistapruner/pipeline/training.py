"""A whole run that trains: prepare, train, write the checkpoint, measure it, report."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic

from ..errors import FistaPrunerError, out_path
from ..execution.training_context import TrainingContext
from ..models.source import Permissions
from ..runs.decision import EvaluationRequest, TrainingDecision, TrainingRecord
from ..runs.identity import changed_files
from ..runs.listener import Listener
from ..runs.lock import hold
from ..runs.log import Logged, log_file
from ..runs.records import Report
from ..runs.steps import read_steps
from ..runs.times import spent
from ..runs.training_directory import TrainingDirectory
from ..runs.training_runs import dense_of, input_run
from ..runtime.devices import choose_device, cpu_threads, device_title
from ..runtime.files import disk_errors, sha256_file
from ..runtime.formatting import shell_line
from ..runtime.launcher import launched
from ..runtime.memory import reset_peak_memory
from ..runtime.numerics import undisturbed
from .begun import (
    execution_here,
    interrupted_with,
    is_lost,
    keep_recipe,
    refuse_input,
    refuse_lost_text,
    refuse_other_settings,
    say_kept_plan,
    say_other_versions,
)
from .find_model import absolute, find_dense, same_path
from .finish_training import AddResults, finish
from .measure import measure
from .result import refuse_foreign_files, reporting_failure
from .training_inputs import R, TrainingRequest, asked, evaluated_length, evaluation_of, find_input


@dataclass(frozen=True)
class TrainingVerb(Generic[R]):
    """What a verb that trains does in its own way.

    Args:
        settings: kind of its recipes.
        directory: kind of its run directories; ``context``: of its opened runs.
        prepare: checks the input and records what the whole run will use.
        make_text: makes the windows of a run, which its recipe decides, and stores them.
        changed: says that what they are made of is another: ``the pairs have changed``.
        add_results: adds to the report what is measured of the trained model.
    """

    settings: type[R]
    directory: type[TrainingDirectory]
    context: type[TrainingContext]
    prepare: Callable[[TrainingDirectory, TrainingRequest[R], Listener], None]
    make_text: Callable[[TrainingDirectory, TrainingRequest[R], Listener], None]
    changed: str
    add_results: AddResults = lambda context, trained, report, listener: None


def train(
    verb: TrainingVerb[R], out: str | Path, request: TrainingRequest[R], listener: Listener | None = None
) -> Report:
    """Begin a run, or go on with one that was begun, as the public function of its verb describes it."""
    return _run(verb, verb.directory(out_path(out)), request, listener or Listener())


def resume_training(verb: TrainingVerb[R], folder: Path, permissions: Permissions, listener: Listener) -> Report:
    """Continue a run as it was begun.

    Args:
        verb: that began it.
        folder: its directory, with a record.
        permissions: what the models' files may do.
        listener: receives progress.
    """
    run = verb.directory(folder)
    record = run.begun_record()
    recipe = verb.settings.build(record.recipe, str(run.run_file))
    recipe = recipe.model_copy(update={"execution": execution_here(recipe.execution, listener)})
    decision = record.decision
    dense = None if decision.dense is None else str(decision.dense)
    request = TrainingRequest(
        decision.model, recipe, dense, permissions, record.command, decision.evaluation, evaluates=False
    )
    return _run(verb, run, request, listener, resumed=True)


def _run(
    verb: TrainingVerb[R],
    run: TrainingDirectory,
    request: TrainingRequest[R],
    told: Listener,
    *,
    resumed: bool = False,
) -> Report:
    """Do what is left of a run in this process."""
    run.check_place()
    refuse_input(request.model, run.folder)
    if (count := launched()) > 1:
        raise FistaPrunerError(
            f"WORLD_SIZE is {count}, and {run.verb} trains in one process: leave the launcher out; without one, unset "
            "RANK and WORLD_SIZE"
        )
    with undisturbed():
        return _lead(verb, run, request, told, resumed=resumed)


def _lead(
    verb: TrainingVerb[R], run: TrainingDirectory, request: TrainingRequest[R], told: Listener, *, resumed: bool
) -> Report:
    """Do what is left of a run: nothing, its measurements, its checkpoint, or all of it."""
    listener = Logged(told)
    run.record()  # a run of another verb is refused before its log is written to
    interruption = interrupted_with(lambda: _how_to_continue(run))
    with interruption, run.created(), hold(run.folder), log_file(run.log_file):
        begun = run.record()
        if begun is not None:
            if not resumed:
                refuse_other_settings(run, begun.decision.asked, asked(request.recipe))
                begun = _note_command(run, begun, request)
            refuse_lost_text(_evaluation(begun.decision, request), "the command of the run again")
            _say_changed_text(begun, listener)
        report = _finished(run, begun)
        if begun is not None:
            _refuse_changed(run, begun, request.permissions, finished=report is not None)
        fault = None if report is None else run.model_fault(report.fingerprint or "")
        if report is None or fault:
            if report is not None:
                listener.say(f"the checkpoint is made again: {fault}")
            # The report of a finished run stays, whatever becomes of its checkpoint.
            with spent(run.folder) as times, nullcontext() if report else reporting_failure(run, times):
                reset_peak_memory(choose_device(request.recipe.execution.device))
                if begun is None:
                    verb.prepare(run, request, listener)
                else:
                    keep_recipe(run, begun, listener)
                    _check_machine(begun, request, listener)
                    _restore_text(verb, run, begun, request, listener)
                listener.tick("opening the run", 0, 1)
                context = verb.context.open(run, verb.settings, request.recipe.execution, request.permissions)
                refuse_foreign_files(run, context.model.checkpoint, context.fingerprint)
                trained, state = context.train(listener, times.note)
                with cpu_threads(context.decision.numerics.threads):  # whatever those of this process are
                    report = finish(context, trained, state, times, listener, verb.add_results, report)
        else:
            if begun is not None:
                keep_recipe(run, begun, listener)
            listener.say(f"{run.folder} holds the finished run of this recipe")
        evaluation = _evaluation(run.begun_record().decision, request)
        return measure(run, report, evaluation, request.recipe.execution, request.permissions, listener)


def _finished(run: TrainingDirectory, record: TrainingRecord | None) -> Report | None:
    """Read the report of a finished run; None where something is left to do."""
    if record is None or not run.report_file.exists():
        return None
    with suppress(FistaPrunerError):  # a damaged report is made again
        report = run.read_report()
        if report.status == "finished" and report.fingerprint == record.fingerprint:
            return report
    return None


def _evaluation(decision: TrainingDecision, request: TrainingRequest[R]) -> EvaluationRequest | None:
    """Return the text that a begun run is evaluated on; None where it is not."""
    origin, known = input_run(decision.model), decision.evaluation
    if request.evaluates and known is None:  # as if the run had begun so
        known = evaluation_of(origin)
    elif request.evaluates and known is not None and is_lost(known) and origin is not None:  # as in a moved tree
        now = evaluation_of(origin)
        if now is not None and Path(now.data).name == Path(known.data).name:
            known = known.model_copy(update={"data": now.data})
    evaluation = request.evaluation_beside(known)
    if evaluation is not None and evaluation.seqlen is None:
        seqlen = (known and known.seqlen) or evaluated_length(origin)
        evaluation = evaluation.model_copy(update={"seqlen": seqlen})
    return evaluation


def _note_command(run: TrainingDirectory, begun: TrainingRecord, request: TrainingRequest[R]) -> TrainingRecord:
    """Record what a command for a begun run changes, so that ``resume`` goes on with it.

    That is the text to evaluate on, and where the models are: the same files in another place are the same model. They
    are elsewhere in a moved tree, or where another release has converted a GGUF file anew.

    Returns:
        The new record.

    Raises:
        FistaPrunerError: the run is of another model; names both.
    """
    decision, permissions = begun.decision, request.permissions
    places: dict[str, Any] = {}
    if not same_path(decision.model, here := absolute(request.model)):
        with suppress(FistaPrunerError):  # no such model
            source = find_input(request.model, permissions)
            if changed_files(decision.stamps, source) is None:
                places |= {"model": here, "folder": source.folder.absolute()}
        if not places:
            raise _other_model(run, "a run of", decision.model, here)
    if request.dense is not None:
        found = find_dense(request.dense, begun, permissions)
        folder = found.folder.absolute()
        if decision.dense is None or not same_path(decision.dense, folder):
            if changed_files(decision.dense_stamps, found) is not None:
                raise _other_model(run, "a run with the dense model", decision.dense, folder)
            places["dense"] = folder
    elif decision.dense is not None and (origin := input_run(request.model)) is not None:
        known = dense_of(origin)  # it may be elsewhere where the input has not moved
        if known is not None and not same_path(decision.dense, known.folder):
            with suppress(FistaPrunerError):  # it is gone
                if changed_files(decision.dense_stamps, permissions.at(known.folder)) is None:
                    places["dense"] = known.folder
    decision = decision.model_copy(update=places)
    decision = decision.model_copy(update={"evaluation": _evaluation(decision, request)})
    if decision != begun.decision:
        begun = begun.model_copy(update={"decision": decision})
        run.write_record(begun)
    return begun


def _other_model(run: TrainingDirectory, what: str, before: object, now: object) -> FistaPrunerError:
    return FistaPrunerError(
        f"--out {run.folder} holds {what} {before or 'none'}, not {now}: name another folder, or remove it"
    )


def _refuse_changed(run: TrainingDirectory, begun: TrainingRecord, permissions: Permissions, *, finished: bool) -> None:
    """Refuse a run whose models are not those that it began with, or whose input is gone and needed.

    A dense model that is gone is refused where it is opened: a run may not need it any more.

    Raises:
        FistaPrunerError: names the folder, or the file and its checksums.
    """
    decision = begun.decision
    models = {decision.folder: decision.stamps}
    if decision.dense is not None:
        models[decision.dense] = decision.dense_stamps
    for folder, stamps in models.items():
        if not folder.is_dir():
            if not finished and folder == decision.folder:
                raise FistaPrunerError(
                    f"the model of the run in {run.folder} is not at {folder} any more; give the command of the run "
                    "again with its new place"
                )
        elif why := changed_files(stamps, permissions.at(folder)):
            raise FistaPrunerError(f"{why} since the run in {run.folder} began: name another --out")


def _check_machine(begun: TrainingRecord, request: TrainingRequest[R], listener: Listener) -> None:
    """Say what may change the last bits of a run that goes on."""
    say_other_versions(begun.versions, listener)
    numerics, execution = begun.decision.numerics, request.recipe.execution
    if execution.threads not in (None, numerics.threads):
        listener.say(f"this run began with {numerics.threads} threads and keeps them")
    say_kept_plan(begun, execution, listener)
    began = begun.machine.device_name or numerics.device
    if (here := device_title(choose_device(execution.device))) != began:
        listener.say(f"this run began on {began}; on {here} its last bits may differ")


def changed_texts(begun: TrainingRecord) -> list[str]:
    """Name the files of a run's training text that have changed since it began."""
    digests = begun.decision.text_sha256.items()
    return [name for name, digest in digests if Path(name).is_file() and sha256_file(Path(name)) != digest]


def _say_changed_text(begun: TrainingRecord, listener: Listener) -> None:
    for name in changed_texts(begun):
        listener.say(f"{name} has changed since this run began, which keeps the windows that it cut then")


def _restore_text(
    verb: TrainingVerb[R],
    run: TrainingDirectory,
    begun: TrainingRecord,
    request: TrainingRequest[R],
    listener: Listener,
) -> None:
    """Make the windows of a begun run again if they are gone or damaged.

    Raises:
        FistaPrunerError: what they were made of has changed since, or is gone.
    """
    decision = begun.decision
    if run.windows_file.is_file() and sha256_file(run.windows_file) == decision.windows_sha256:
        return
    listener.say(f"{run.windows_file} is gone or damaged: it is made again")
    with disk_errors(run.windows_file):
        run.windows_file.unlink(missing_ok=True)
    recipe = verb.settings.build(begun.recipe, str(run.run_file))
    recipe = recipe.model_copy(update={"execution": request.recipe.execution})
    dense = None if decision.dense is None else str(decision.dense)
    same = replace(request, model=decision.model, recipe=recipe, dense=dense, evaluation=None, evaluates=False)
    verb.make_text(run, same, listener)
    if sha256_file(run.windows_file) != decision.windows_sha256:
        raise FistaPrunerError(f"{run.windows_file} is gone or damaged, and {verb.changed} since: name another --out")


def _how_to_continue(run: TrainingDirectory) -> str:
    """Say where a run was interrupted, and which command continues it."""
    how, where = "give the same command again", "before the first step"
    with suppress(FistaPrunerError):
        if (record := run.record()) is not None:
            how = f"go on with: {shell_line('resume', run.folder)}"
            if (lines := read_steps(run.steps_file)) and lines[-1]["step"] > 0:
                where = f"after step {lines[-1]['step']} of {record.decision.steps}"
    return f"interrupted {where}; {how}"

"""Recover or align a pruned model: prepare, train, write the checkpoint, measure it, report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic

from ..errors import FistaPrunerError, OtherRankFailed, out_path
from ..models.source import UNTRUSTED, Permissions
from ..pipeline.begun import (
    execution_here,
    interrupted_with,
    keep_recipe,
    refuse_input,
    refuse_other_settings,
    say_other_versions,
)
from ..pipeline.find_model import absolute, same_path
from ..pipeline.measure import measure
from ..pipeline.result import refuse_foreign_files, reporting_failure
from ..runs.align_directory import AlignDirectory
from ..runs.arguments import checked_arguments
from ..runs.decision import TrainingRecord
from ..runs.directory import refuse_out
from ..runs.listener import Listener
from ..runs.lock import hold
from ..runs.log import Logged, log_file
from ..runs.records import Report
from ..runs.steps import read_steps
from ..runs.times import spent
from ..runs.training_directory import RecoverDirectory, TrainingDirectory
from ..runs.training_runs import input_run
from ..runtime.devices import choose_device, cpu_threads
from ..runtime.formatting import shell_line
from ..runtime.memory import reset_peak_memory
from ..runtime.numerics import undisturbed
from ..settings.align_settings import AlignRecipe
from ..settings.recover_settings import RecoverRecipe
from ..settings.training_settings import TrainingRecipe
from .context import AlignContext, TrainingContext
from .distributed import World, joined
from .finish import collect, finish
from .inputs import R, TrainingRequest, asked, evaluated_length
from .plan import Plan, plan_training
from .prepare import (
    alignment_task,
    check_alignment,
    check_pairs,
    check_recovery,
    cut_pairs,
    known_text,
    prepare_alignment,
    prepare_recovery,
    recovery_task,
)

STAND_IN = "python"
"""Text that a plan takes where none is named: only its number of tokens matters."""


@checked_arguments
def recover(
    model: str | Path,
    out: str | Path,
    *,
    recipe: RecoverRecipe | Mapping[str, Any] | str | Path | None = None,
    dense: str | Path | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    listener: Listener | None = None,
    command: str | None = None,
    evaluate: str | Path | None = "auto",
    evaluate_windows: int | None = None,
    **settings: Any,
) -> Report:
    """Train a pruned model, with every zero kept, to win back what pruning lost.

    Args:
        model: run directory of ``fistapruner.prune`` or of this function, or a pruned checkpoint.
        out: the run directory. One that holds an unfinished run of the same recipe is continued.
        recipe: all settings: a RecoverRecipe, a mapping, or the name of a shipped recipe or of a YAML file; None is the
            default recipe.
        dense: the dense model; None takes the one that the run or the checkpoint's record names.
        allow_pickle: read legacy ``.bin`` weights.
        trust_remote_code: run Python code that comes with the checkpoint.
        listener: receives progress.
        command: shell line that reproduces the run, for the report; None leaves it out.
        evaluate: text for the perplexity, as ``fistapruner.evaluate`` takes it; ``auto`` is that of the input's
            run, or ``python`` where a checkpoint goes in that is of no run; None evaluates nothing.
        evaluate_windows: only its first so many windows.
        **settings: single settings over the recipe, as in a recipe file: ``parameters="full"``, ``lr=1e-3``,
            ``data={"tokens": "500k"}``.

    Returns:
        The report, as in ``out/report.json``; the checkpoint is in ``out/model``.

    Raises:
        FistaPrunerError: bad input, named; before any long work where that can be known.
    """
    request = TrainingRequest.of(
        model,
        RecoverRecipe.of(recipe).changed(settings),
        dense=dense,
        permissions=Permissions(allow_pickle, trust_remote_code),
        command=command,
        evaluate=evaluate,
        evaluate_windows=evaluate_windows,
    )
    return _run(RECOVER, RecoverDirectory(out_path(out)), request, listener or Listener())


@checked_arguments
def align(
    model: str | Path,
    out: str | Path,
    *,
    recipe: AlignRecipe | Mapping[str, Any] | str | Path | None = None,
    dense: str | Path | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    listener: Listener | None = None,
    command: str | None = None,
    evaluate: str | Path | None = "auto",
    evaluate_windows: int | None = None,
    **settings: Any,
) -> Report:
    """Train a pruned model on preference pairs, with every zero kept.

    Args:
        model: run directory of ``fistapruner.prune``, ``fistapruner.recover`` or of this function, or a
            pruned checkpoint.
        recipe: all settings: an AlignRecipe, a mapping, or the name of a YAML file; None is the default recipe.
        **settings: single settings over the recipe, as in a recipe file: ``data={"pairs": "pairs.jsonl"}``,
            ``loss="harmonic"``, ``beta=0.05``.

    Other arguments, result and errors are those of ``fistapruner.recover``.
    """
    recipe = AlignRecipe.of(recipe).changed(settings)
    recipe.refuse_idle()
    request = TrainingRequest.of(
        model,
        recipe,
        dense=dense,
        permissions=Permissions(allow_pickle, trust_remote_code),
        command=command,
        evaluate=evaluate,
        evaluate_windows=evaluate_windows,
    )
    return _run(ALIGN, AlignDirectory(out_path(out)), request, listener or Listener())


def plan_recovery(
    model: str | Path,
    recipe: RecoverRecipe,
    out: str | Path = ".",
    *,
    dense: str | Path | None = None,
    permissions: Permissions = UNTRUSTED,
) -> Plan:
    """Predict what recovering a pruned model will need; arguments as for :func:`recover`."""
    refuse_out(folder := out_path(out))
    if recipe.data.source is None and not recipe.data.tasks and known_text(input_run(str(model))) is None:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": STAND_IN})})
    request = TrainingRequest(str(model), recipe, None if dense is None else str(dense), permissions, evaluates=False)
    return plan_training(recovery_task(check_recovery(RecoverDirectory(folder / "run"), request, Listener())))


def plan_alignment(
    model: str | Path,
    recipe: AlignRecipe,
    out: str | Path = ".",
    *,
    dense: str | Path | None = None,
    permissions: Permissions = UNTRUSTED,
) -> Plan:
    """Predict what aligning a pruned model will need; arguments as for :func:`align`."""
    refuse_out(folder := out_path(out))
    recipe.refuse_idle()
    pairs = check_pairs(recipe)
    request = TrainingRequest(str(model), recipe, None if dense is None else str(dense), permissions, evaluates=False)
    inputs = check_alignment(AlignDirectory(folder / "run"), request, Listener())
    return plan_training(alignment_task(inputs, cut_pairs(inputs, pairs, Listener())))


@dataclass(frozen=True)
class TrainingVerb(Generic[R]):
    """What a verb that trains does in its own way.

    Args:
        settings: kind of its recipes.
        directory: kind of its run directories; ``context``: of its opened runs.
        prepare: checks the input and records what the whole run will use.
    """

    settings: type[R]
    directory: type[TrainingDirectory]
    context: type[TrainingContext]
    prepare: Callable[[TrainingDirectory, TrainingRequest[R], Listener], None]


RECOVER = TrainingVerb(RecoverRecipe, RecoverDirectory, TrainingContext, prepare_recovery)
ALIGN = TrainingVerb(AlignRecipe, AlignDirectory, AlignContext, prepare_alignment)


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
    decision, recipe = record.decision, verb.settings.build(record.recipe, str(run.run_file))
    recipe = recipe.model_copy(update={"execution": execution_here(recipe.execution, listener)})
    dense = None if decision.dense is None else str(decision.dense)
    request = TrainingRequest(decision.model, recipe, dense, permissions, record.command, None, evaluates=False)
    return _run(verb, run, request, listener, resumed=True)


def _run(
    verb: TrainingVerb[R],
    run: TrainingDirectory,
    request: TrainingRequest[R],
    told: Listener,
    *,
    resumed: bool = False,
) -> Report:
    """Do what is left of a run: nothing, its measurements, its checkpoint, or all of it."""
    execution = request.recipe.execution
    with undisturbed(), joined(execution.device, execution.offload) as world:
        if world.size == 1:
            return _lead(verb, run, request, told, world, resumed=resumed)
        if fault := _not_divided(request.recipe, world.size):
            raise (OtherRankFailed if world.rank else FistaPrunerError)(fault)
        execution = execution.model_copy(update={"device": str(world.device)})
        request = replace(request, recipe=request.recipe.model_copy(update={"execution": execution}))
        if world.rank:
            return _follow(verb, run, request, world)
        try:
            report = _lead(verb, run, request, told, world, resumed=resumed)
        except FistaPrunerError as error:
            if not world.told:
                world.tell(f"{error}")
            raise
        if not world.told:
            world.tell(DONE)
        world.tell()
        return report


def _not_divided(recipe: TrainingRecipe, processes: int) -> str | None:
    """Say why several processes cannot share a run; None where they can."""
    if recipe.zeroth_order:
        return f"optimizer {recipe.optimizer} trains in one process: leave torchrun out"
    unit, size = "windows_per_step", recipe.step_windows
    if isinstance(recipe, AlignRecipe):
        unit, size = "pairs_per_step", recipe.pairs_per_step
    return f"{unit} is {size}: {processes} processes need a multiple of {processes}" if size % processes else None


DONE, READY = "", "ready"
"""What process 0 tells the others: nothing is left to train, or the run is prepared; else why it cannot be."""


def _follow(verb: TrainingVerb[R], run: TrainingDirectory, request: TrainingRequest[R], world: World) -> Report:
    """Train along with process 0."""
    if (said := world.tell()) == READY:
        context = verb.context.open(run, verb.settings, request.recipe.execution, request.permissions)
        context.world = world
        with context.trained(Listener(), lambda: None) as (trained, _):
            collect(context, trained, Listener())
    elif said != DONE:
        raise OtherRankFailed(said)
    world.tell()
    return run.read_report()


def _lead(
    verb: TrainingVerb[R],
    run: TrainingDirectory,
    request: TrainingRequest[R],
    told: Listener,
    world: World,
    *,
    resumed: bool,
) -> Report:
    """Do what is left of a run in the one process, or in the first of several."""
    run.check_place()
    refuse_input(request.model, run.folder)
    listener = Logged(told)
    run.record()  # a run of another verb is refused before its log is written to
    with (
        interrupted_with(lambda: _how_to_continue(run)),
        run.created(),
        hold(run.folder),
        log_file(run.log_file),
    ):
        begun = run.record()
        if begun is not None:
            if not resumed:
                _refuse_other(run, begun, request)
            keep_recipe(run, begun, listener)
            say_other_versions(begun.versions, listener)
        report = _finished(run, begun)
        fault = None if report is None else run.model_fault(report.fingerprint or "")
        if report is None or fault:
            if report is not None:
                listener.say(f"the checkpoint is made again: {fault}")
            # The report of a finished run stays, whatever becomes of its checkpoint.
            with spent(run.folder) as times, nullcontext() if report else reporting_failure(run, times):
                reset_peak_memory(choose_device(request.recipe.execution.device))
                if begun is None:
                    verb.prepare(run, request, listener)
                listener.tick("opening the run", 0, 1)
                context = verb.context.open(run, verb.settings, request.recipe.execution, request.permissions)
                context.world = world
                refuse_foreign_files(run, context.model.checkpoint, context.fingerprint)
                world.tell(READY)
                with (
                    context.trained(listener, times.note) as (trained, state),
                    cpu_threads(context.decision.numerics.threads),  # whatever those of this process are
                ):
                    collected = collect(context, trained, listener)
                    report = finish(context, collected, state, times, listener, report)
        else:
            listener.say(f"{run.folder} holds the finished run of this recipe")
        decision = run.begun_record().decision
        evaluation = request.evaluation_beside(decision.evaluation) if not resumed else decision.evaluation
        if evaluation is not None and evaluation.seqlen is None:
            known = decision.evaluation.seqlen if decision.evaluation is not None else None
            seqlen = known or evaluated_length(input_run(decision.model))
            evaluation = evaluation.model_copy(update={"seqlen": seqlen})
        return measure(run, report, evaluation, request.recipe.execution, request.permissions, listener)


def _refuse_other(run: TrainingDirectory, begun: TrainingRecord, request: TrainingRequest[R]) -> None:
    """Refuse a command for a run directory that holds another run.

    Raises:
        FistaPrunerError: names what differs.
    """
    refuse_other_settings(run, begun.decision.asked, asked(request.recipe))
    if not same_path(begun.decision.model, here := absolute(request.model)):
        raise FistaPrunerError(
            f"--out {run.folder} holds a run of {begun.decision.model}, not {here}: name another folder, or remove it"
        )
    if request.dense is not None:
        dense = request.permissions.find(request.dense).folder.absolute()
        if begun.decision.dense is None or not same_path(begun.decision.dense, dense):
            raise FistaPrunerError(
                f"--out {run.folder} holds a run with the dense model {begun.decision.dense or 'none'}, not {dense}: "
                "name another folder, or remove it"
            )


def _finished(run: TrainingDirectory, record: TrainingRecord | None) -> Report | None:
    """Read the report of a finished run; None where something is left to do."""
    if record is None or not run.report_file.exists():
        return None
    with suppress(FistaPrunerError):  # a damaged report is made again
        report = run.read_report()
        if report.status == "finished" and report.fingerprint == record.fingerprint:
            return report
    return None


def _how_to_continue(run: TrainingDirectory) -> str:
    """Say where a run was interrupted, and which command continues it."""
    how, where = "give the same command again", "before the first step"
    with suppress(FistaPrunerError):
        if (record := run.record()) is not None:
            how = f"go on with: {shell_line('resume', run.folder)}"
            if (lines := read_steps(run.steps_file)) and lines[-1]["step"] > 0:
                where = f"after step {lines[-1]['step']} of {record.decision.steps}"
    return f"interrupted {where}; {how}"

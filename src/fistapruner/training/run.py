"""Recover or align a pruned model: settle, open, train, write, measure, report."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import A_MODEL, FistaPrunerError, out_path, path_text
from ..measure.run import measure
from ..models.source import UNTRUSTED, Permissions
from ..pruning.result import refuse_foreign_files, reporting_failure
from ..runs.directory import TrainingDirectory, refuse_out
from ..runs.lineage import input_run
from ..runs.listener import Listener
from ..runs.lock import hold
from ..runs.log import Logged, log_file
from ..runs.records import Report
from ..runs.settled import (
    TrainingRecord,
    absolute,
    execution_here,
    interrupted_with,
    refuse_other_settings,
    refuse_other_versions,
    refuse_overlap,
)
from ..runs.steps import read_steps
from ..runs.times import spent
from ..runtime.devices import choose_device, cpu_threads, reset_peak_memory
from ..runtime.numerics import undisturbed
from ..runtime.show import shell_line
from ..settings.align import AlignRecipe
from ..settings.train import RecoverRecipe, TrainingRecipe
from .alignment import Alignment
from .distributed import World, joined
from .opened import Training
from .plan import Plan
from .recovery import Recovery
from .result import collect, write
from .settle import Request, asked, check_inputs, plan_of, settle

RECOVER: type[Training] = Recovery
ALIGN: type[Training] = Alignment

STAND_IN = "python"
"""Text that a plan takes where none is named: only its number of tokens matters."""


def recover(
    model: str | Path,
    out: str | Path,
    *,
    recipe: TrainingRecipe | Mapping[str, Any] | str | Path | None = None,
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
            default recipe. An AlignRecipe aligns, as ``fistapruner.align`` does.
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
    kind = ALIGN if isinstance(recipe, AlignRecipe) else RECOVER
    request: Request[Any] = Request(
        path_text("model", model, A_MODEL),
        kind.settings.of(recipe).changed(settings),
        None if dense is None else path_text("dense", dense, A_MODEL),
        Permissions(allow_pickle, trust_remote_code),
        command,
        evaluate,
        evaluate_windows,
    )
    return _run(kind, kind.directory(out_path(out)), request, listener or Listener())


def align(
    model: str | Path,
    out: str | Path,
    *,
    recipe: AlignRecipe | Mapping[str, Any] | str | Path | None = None,
    **arguments: Any,
) -> Report:
    """Train a pruned model on preference pairs, with every zero kept.

    Args:
        model: run directory of ``fistapruner.prune``, ``fistapruner.recover`` or of this function, or a pruned
            checkpoint.
        out: the run directory. One that holds an unfinished run of the same recipe is continued.
        recipe: all settings: an AlignRecipe, a mapping, or the name of a YAML file; None is the default recipe.
        **arguments: ``dense``, ``listener``, ``evaluate`` and the other arguments of ``fistapruner.recover``, and
            single settings over the recipe: ``data={"pairs": "pairs.jsonl"}``, ``loss="harmonic"``, ``beta=0.05``.

    Result and errors are those of ``fistapruner.recover``.
    """
    return recover(model, out, recipe=AlignRecipe.of(recipe), **arguments)


def plan_recovery(
    model: str | Path,
    recipe: TrainingRecipe,
    out: str | Path = ".",
    *,
    dense: str | Path | None = None,
    permissions: Permissions = UNTRUSTED,
) -> Plan:
    """Predict what training a pruned model will need; arguments as for :func:`recover`."""
    refuse_out(folder := out_path(out))
    kind, origin = ALIGN if isinstance(recipe, AlignRecipe) else RECOVER, input_run(str(model))
    if isinstance(recipe, RecoverRecipe) and not recipe.data.texts and origin is None:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": STAND_IN})})
    request = Request(str(model), recipe, None if dense is None else str(dense), permissions, evaluate=None)
    return plan_of(kind, check_inputs(kind, request, Listener()), folder, Listener())[1]


def resume_training(kind: type[Training], folder: Path, permissions: Permissions, listener: Listener) -> Report:
    """Continue a run as it was begun.

    Args:
        kind: the verb that began it.
        folder: its directory, with a record.
        permissions: what the models' files may do.
        listener: receives progress.
    """
    run = kind.directory(folder)
    record = run.begun_record()
    recipe = kind.settings.build(record.decision.asked, str(run.run_file))
    execution = kind.settings.build(record.recipe, str(run.run_file)).execution
    recipe = recipe.model_copy(update={"execution": execution_here(execution, listener)})
    return _run(kind, run, Request(record.decision.model, recipe, None, permissions, record.command), listener)


def _run(kind: type[Training], run: TrainingDirectory, request: Request[Any], told: Listener) -> Report:
    """Do what is left of a run, alone or as one of the processes of torchrun."""
    execution = request.recipe.execution
    with undisturbed(), joined(execution.device, execution.offload) as world:
        if world.size == 1:
            return _lead(kind, run, request, told, world)
        if fault := _not_divided(request.recipe, world.size):
            raise FistaPrunerError(fault)
        execution = execution.model_copy(update={"device": str(world.device)})
        request = replace(request, recipe=request.recipe.model_copy(update={"execution": execution}))
        if world.rank:
            return _follow(kind, run, request, world)
        try:
            report = _lead(kind, run, request, told, world)
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
    unit = "pairs_per_step" if isinstance(recipe, AlignRecipe) else "windows_per_step"
    size = getattr(recipe, unit)
    return f"{unit} is {size}: {processes} processes need a multiple of {processes}" if size % processes else None


DONE, READY = "", "ready"
"""What process 0 tells the others: nothing is left to train, or the run is settled; else why it cannot be."""


def _follow(kind: type[Training], run: TrainingDirectory, request: Request[Any], world: World) -> Report:
    """Train along with process 0."""
    if (said := world.tell()) == READY:
        training = kind.open(run, request.recipe.execution, request.permissions, world)
        with training.trained(Listener(), lambda: None) as (trained, _):
            collect(training, trained, Listener())
    elif said != DONE:
        raise FistaPrunerError(said)
    world.tell()
    return run.read_report()


def _lead(kind: type[Training], run: TrainingDirectory, request: Request[Any], told: Listener, world: World) -> Report:
    """Do what is left of a run in the one process, or in the first of several."""
    run.check_place()
    refuse_overlap(request.model, run.folder)
    run.record()  # a run of another verb is refused before its log is written to
    with (
        interrupted_with(lambda: _how_to_continue(run)),
        run.created(),
        hold(run.folder),
        log_file(run.log_file),
    ):
        listener = Logged(told)
        report, fault = None, None
        if (begun := run.record()) is not None:
            _refuse_other(run, begun, request)
            report, fault = run.finished_report(begun.fingerprint)
        if report is None or fault:
            if fault:
                listener.say(fault)
            # The report of a finished run stays, whatever becomes of its checkpoint.
            with spent(run.folder) as times, nullcontext() if report else reporting_failure(run, times):
                reset_peak_memory(choose_device(request.recipe.execution.device))
                if begun is not None and report is None:
                    refuse_other_versions(run, begun)
                if begun is None:
                    settle(kind, run, request, listener)
                listener.tick("opening the run", 0, 1)
                training = kind.open(run, request.recipe.execution, request.permissions, world)
                refuse_foreign_files(run, training.model.checkpoint, training.fingerprint)
                world.tell(READY)
                with (
                    training.trained(listener, times.note) as (trained, state),
                    cpu_threads(training.decision.numerics.threads),  # whatever those of this process are
                ):
                    report = write(training, collect(training, trained, listener), state, times, listener, report)
        else:
            listener.say(f"{run.folder} holds the finished run of this recipe")
        evaluation = request.evaluation(run.begun_record().decision)
        return measure(run, report, evaluation, request.recipe.execution, request.permissions, listener)


def _refuse_other(run: TrainingDirectory, begun: TrainingRecord, request: Request[Any]) -> None:
    """Refuse a command for a run directory that holds another run.

    Raises:
        FistaPrunerError: names what differs.
    """
    refuse_other_settings(run, begun.decision.asked, asked(request.recipe))
    dense = None if request.dense is None else request.permissions.find(request.dense).folder.absolute()
    for what, before, here in (
        ("model", begun.decision.model, absolute(request.model)),
        ("dense model", begun.decision.dense or "none", dense),
    ):
        if here is not None and str(before) != str(here):
            raise FistaPrunerError(
                f"--out {run.folder} holds a run with the {what} {before}, not {here}: name another folder"
            )


def _how_to_continue(run: TrainingDirectory) -> str:
    """Say where a run was interrupted, and which command continues it."""
    how, where = "give the same command again", "before the first step"
    with suppress(FistaPrunerError):
        if (record := run.record()) is not None:
            how = f"go on with: {shell_line('resume', run.folder)}"
            if (lines := read_steps(run.steps_file)) and lines[-1]["step"] > 0:
                where = f"after step {lines[-1]['step']} of {record.decision.steps}"
    return f"interrupted {where}; {how}"

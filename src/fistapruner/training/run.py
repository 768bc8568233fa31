"""Recover or align a pruned model: settle, open, train, write, measure, report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import A_MODEL, FistaPrunerError, out_path, path_text
from ..measure.run import measure
from ..models.operators import Operator
from ..models.record import read_pruning_record
from ..models.source import Permissions
from ..papers.mezo import ForwardOnly
from ..pruning import write
from ..reporting.facts import length_setting
from ..runs import settled
from ..runs.directory import TrainingDirectory, finished_run, refuse_out
from ..runs.log import Listener, Logged, Times, spent
from ..runs.records import LayerEntry, OperatorEntry, Report, Totals
from ..runtime.devices import choose_device, peak_device_memory, peak_memory, reset_peak_memory
from ..runtime.numerics import undisturbed
from ..settings.align import AlignRecipe
from ..settings.train import TrainingRecipe
from .alignment import Alignment
from .distributed import DONE, READY, World, joined
from .loop import State
from .masked import Trained
from .plan import Plan
from .recovery import Recovery, Request

KINDS: dict[str, type[Recovery]] = {"recover": Recovery, "align": Alignment}


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
        evaluate: text for the perplexity, as ``fistapruner.evaluate`` takes it; ``auto`` is that of the input's
            run, or ``python`` where a checkpoint goes in that is of no run; None evaluates nothing.
        evaluate_windows: only its first so many windows.
        **settings: single settings over the recipe, as in a recipe file: ``parameters="full"``, ``lr=1e-3``,
            ``data={"tokens": "500k"}``. Other arguments are as of ``fistapruner.prune``.

    Returns:
        The report, as in ``out/report.json``; the checkpoint is in ``out/model``.

    Raises:
        FistaPrunerError: bad input, named; before any long work where that can be known.
    """
    kind = KINDS["align" if isinstance(recipe, AlignRecipe) else "recover"]
    request = Request(
        TrainingDirectory(out_path(out), kind.settings.verb),
        path_text("model", model, A_MODEL),
        kind.settings.of(recipe).changed(settings),
        None if dense is None else path_text("dense", dense, A_MODEL),
        Permissions(allow_pickle, trust_remote_code),
        command,
        evaluate,
        evaluate_windows,
    )
    return _run(request, listener or Listener())


def align(
    model: str | Path,
    out: str | Path,
    *,
    recipe: AlignRecipe | Mapping[str, Any] | str | Path | None = None,
    **arguments: Any,
) -> Report:
    """Train a pruned model on preference pairs, with every zero kept.

    As ``fistapruner.recover``, with settings of an AlignRecipe: ``data={"pairs": "pairs.jsonl"}``, ``beta=0.05``.
    """
    return recover(model, out, recipe=AlignRecipe.of(recipe), **arguments)


def plan_recovery(model: str, recipe: TrainingRecipe, out: str, dense: str | None, permissions: Permissions) -> Plan:
    """Predict what training a pruned model will need; arguments as for :func:`recover`."""
    refuse_out(folder := out_path(out))
    request = Request(TrainingDirectory(folder, recipe.verb), model, recipe, dense, permissions, evaluate=None)
    return KINDS[recipe.verb](request, Listener()).settle()


def resume_training(verb: str, folder: Path, permissions: Permissions, listener: Listener) -> Report:
    """Continue a run of a verb as it was begun; ``permissions`` say what the models' files may do."""
    run = TrainingDirectory(folder, verb)
    record = run.begun_record()
    recipe = KINDS[verb].settings.build(record.decision.asked, str(run.run_file))
    request = Request(run, record.decision.model, recipe, None, permissions, record.command)
    return _run(request, listener)


def _run(request: Request, told: Listener) -> Report:
    """Do what is left of a run, alone or as one of the processes of torchrun."""
    recipe, execution, run = request.recipe, request.recipe.execution, request.run
    with undisturbed(), joined(execution.device, execution.offload) as world:
        if world.size > 1:
            unit = "pairs_per_step" if isinstance(recipe, AlignRecipe) else "windows_per_step"
            fault, units = None, getattr(recipe, unit)
            if recipe.zeroth_order:
                fault = f"optimizer {recipe.optimizer} trains in one process: leave torchrun out"
            elif units % world.size:
                fault = f"{unit} is {units}: {world.size} processes need a multiple of {world.size}"
            if fault:
                raise FistaPrunerError(fault)
            execution = execution.model_copy(update={"device": str(world.device)})
            request = replace(request, recipe=recipe.model_copy(update={"execution": execution}))
        if world.rank == 0:
            try:
                report = _lead(request, told, world)
            except FistaPrunerError as error:
                world.announce(str(error))
                raise
            world.announce(DONE)
            world.tell()
            return report
        if (said := world.tell()) == READY:
            training = KINDS[recipe.verb](request, Listener(), world)
            training.open()
            with training.trained() as (trained, _):
                training.describe(trained, None)
                dict(trained.result())  # whose tensors may be divided among all
        elif said != DONE:
            raise FistaPrunerError(said)
        world.tell()
        return run.read_report()


def _lead(request: Request, told: Listener, world: World) -> Report:
    """Do what is left of a run in the one process, or in the first of several."""
    run, permissions, execution = request.run, request.permissions, request.recipe.execution
    run.check_place()
    settled.refuse_overlap(request.model, run.folder)
    run.record()  # a run of another verb is refused before its log is written to
    with run.entered():
        listener, begun = Logged(told), run.record()
        report = None
        if begun is not None:
            before, here = begun.decision, {"model": settled.absolute(request.model), **request.asked}
            del here["execution"]
            if request.dense is not None:
                here["dense"] = str(permissions.find(request.dense).folder.absolute())
            dense = before.dense and str(before.dense)
            settled.refuse_other_settings(run, {"model": before.model, "dense": dense, **before.asked}, here)
            report = run.finished_report(begun.fingerprint)
        if report is None:
            with spent(run.folder) as times, write.reporting_failure(run, times):
                reset_peak_memory(choose_device(execution.device))
                training = KINDS[request.recipe.verb](request, listener, world)
                if begun is None:
                    training.settle()
                    training.write()
                else:
                    settled.refuse_other_versions(run, begun)
                listener.tick("opening the run", 0, 1)
                training.open()
                world.announce(READY)
                with training.trained(times.note) as (trained, state):
                    report = _write(training, trained, state, times)
        else:
            finished_run(run.folder)
            listener.say(f"{run.folder} holds the finished run of this recipe")
        run.remove_working_files()
        return measure(run, report, request.evaluation(run.begun_record()), execution, permissions, listener)


def _write(training: Recovery, trained: Trained | ForwardOnly, state: State, times: Times) -> Report:
    """Write the checkpoint, with the input's zeros and the best weights, and the report."""
    run, model, listener = training.run, training.model, training.listener
    report: Report = run.begun_record().report()
    training.describe(trained, report)
    listener.tick("comparing the trained weights with the input's", 0, 1)
    changed = dict(trained.result())
    report.layers = [
        LayerEntry(
            index=index,
            name=f"{training.layout.layers_name}.{index}",
            operators=[_operator(training, changed, index, each) for each in training.layout.in_layer(index)],
        )
        for index in range(len(model))
    ]
    _describe(training, trained, state, report)
    report.totals = Totals(
        operator_weights=report.operator_weights,
        operator_zeros=report.operator_zeros,
        model_weights=model.parameter_count(),
        model_zeros=training.decision.zeros,
        seconds=times.total(),
        peak_memory=peak_memory(),
        peak_device_memory=peak_device_memory(model.device),
    )
    record = read_pruning_record(training.decision.folder)
    record["operators"] = write.operator_claims(report, model) | (record.get("operators") or {})
    if (part := training.low_rank) is not None:
        record |= write.write_low_rank(run, part.factors, part.rank, training.layout, report.totals)
    assert report.recovery is not None
    report.totals.time_split["train"] = report.recovery.seconds
    source = model.checkpoint
    write.finish(run, training.fingerprint, report, record, times, listener, source=source, replacement=changed.get)
    trained_weights = [model.source(f"{name}.weight") for name, _ in training.layout.operators()]
    write.check_zeros(run.model, source, trained_weights)
    run.write_report(report)
    return report


def _operator(training: Recovery, changed: Mapping[str, Tensor], index: int, operator: Operator) -> OperatorEntry:
    """Describe an operator of decoder layer ``index``."""
    name = training.layout.full_name(index, operator)
    source = training.model.source(f"{name}.weight")
    before = training.model.checkpoint.read(source).float()
    after = changed[source].float() if source in changed else before
    zeros = before.numel() - int(torch.count_nonzero(before))
    return OperatorEntry(
        name=operator.name,
        shape=(operator.rows, operator.columns),
        sparsity=training.decision.operators[name],
        zeros=zeros,
        density=1 - zeros / before.numel(),
        change=float((after - before).norm() / before.norm().clamp_min(1e-30)),
        changed=int((after != before).sum()),
    )


def _describe(training: Recovery, trained: Trained | ForwardOnly, state: State, report: Report) -> None:
    """Say in the report what was trained, and whether it has failed or has not helped."""
    operators, survivors = report.operators, report.operator_weights - report.operator_zeros
    found = report.recovery
    assert found is not None
    found.read_journal(training.run.steps_file)
    lowest, highest = min(trained.rates.values()), max(trained.rates.values())
    found.lr, found.trained = {"lowest": lowest, "highest": highest}, trained.numbers
    found.operators = 0 if found.parameters == "norms" else len(operators)
    found.changed = sum(operator.changed or 0 for operator in operators) / max(1, survivors)
    found.change = max((operator.change or 0.0 for operator in operators), default=None)
    tried = f"learning rates {lowest:.2g} to {highest:.2g}: try a lower --lr"
    if state.fault is not None:
        kept = f"the weights of step {state.best_step} are kept ({tried})"
        kept = kept if state.step else "the weights are those of the input"
        report.warnings.append(f"training stopped: {state.fault}; {kept}")
    elif state.best_step == 0:
        report.warnings.append(
            f"no step was better than the start on what is held out, so the weights are those of the input ({tried}; a "
            f"higher one where the loss has hardly changed, or more {length_setting(report)})"
        )

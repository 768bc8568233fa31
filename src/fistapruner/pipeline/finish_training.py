"""After the last step: the checkpoint with the zeros of the input, and the report of what was trained."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..execution.training_context import TrainingContext
from ..models.discovery import linear_modules
from ..models.files.low_rank import remove_adapter
from ..models.files.record import read_pruning_record, stack_of
from ..models.layerwise import LayerwiseModel
from ..planning.plan import check_plan
from ..planning.training_sizes import STEP, TRAINING
from ..reporting.advice import length_setting
from ..reporting.model_card import model_card
from ..runs.layer_records import LayerEntry, OperatorEntry
from ..runs.lineage import add_stage, update_stage
from ..runs.listener import Listener
from ..runs.records import Report, Totals
from ..runs.steps import read_steps
from ..runs.times import Times
from ..runtime.machine import now
from ..runtime.memory import peak_device_memory, peak_memory
from ..tuning.adapters import write_hira_adapter
from ..tuning.trained import Trained
from ..tuning.trainer import TrainingState
from .result import (
    check_zeros,
    checkpoint_record,
    close_report,
    model_documents,
    operator_claims,
    stored_weights,
    write_low_rank,
    write_model,
)

AddResults = Callable[[Any, Trained, Report, Listener], None]
"""Receives (opened run, trained tensors, report) before the checkpoint is written, and adds to the report."""


def finish(
    context: TrainingContext,
    trained: Trained,
    state: TrainingState,
    times: Times,
    listener: Listener,
    add_results: AddResults,
    earlier: Report | None = None,
) -> Report:
    """Write the checkpoint and the report of a run that has trained.

    Args:
        context: the opened run.
        trained: holds the best weights.
        state: where training ended.
        times: wall time of the run so far.
        listener: receives progress.
        add_results: adds what the verb measures of the trained model.
        earlier: report of the finished run whose checkpoint is written again; see :func:`.result.close_report`.

    Raises:
        FistaPrunerError: the written checkpoint does not have the zeros of the input, or the disk is full.
    """
    listener.tick("comparing the trained weights with the input's", 0, 1)
    run = context.run
    report = run.begun_record().report()
    report.layers = [_describe(context, trained, index, report) for index in range(len(context.model))]
    _describe_training(context, state, report)
    _warn(state, report)
    add_results(context, trained, report, listener)
    report.totals = _totals(context, report, times.total())
    content = read_pruning_record(context.decision.folder)
    claims = operator_claims(report, context.model) | (content.get("operators") or {})
    report.stacked_experts = any(stack_of(name) for name in claims)
    report.finished = now()
    add_stage(report)
    begin = time.perf_counter()
    if context.low_rank is not None:
        part = context.low_rank
        content |= write_low_rank(run, part.factors, part.rank, context.layout, report.totals)
    _write(context, trained, report, content, claims, listener)
    check_zeros(run.model, context.model.checkpoint, stored_weights(context.model, context.layout))
    if context.low_rank is None:
        _write_adapter(context, trained, listener, changed=state.patience.best_step > 0)
    if report.recovery is not None:
        report.totals.time_split["train"] = report.recovery.seconds
    close_report(run, report, earlier, times, begin)
    disk = sum(path.stat().st_size for path in run.folder.rglob("*") if path.is_file())
    report.plan = check_plan(report.plan, report.totals, [], disk, _seconds(context))
    update_stage(report)
    # The snapshots stay: the checkpoint can be written again from them. A finished run leaves nothing else behind.
    shutil.rmtree(run.teacher, ignore_errors=True)
    run.write_report(report)
    return report


def _describe(context: TrainingContext, trained: Trained, index: int, report: Report) -> LayerEntry:
    """Describe one decoder layer, and add what was trained in it to the report."""
    model, claims, entry = context.model, context.decision.operators, LayerEntry(index=index)
    entry.name = f"{context.layout.layers_name}.{index}"
    with model.layer(index) as layer:
        new = trained.result(index, layer)
        numbers, rates = trained.describe(index, layer)
    assert report.recovery is not None
    report.recovery.trained += numbers
    known = [*report.recovery.lr.values(), *rates]
    report.recovery.lr = {"lowest": min(known), "highest": max(known)} if known else {}
    for operator in context.layout.in_layer(index):
        name = context.layout.full_name(index, operator)
        source = model.source(f"{name}.weight")
        before = model.checkpoint.read(source).float()
        after = new[source].float() if source in new else before
        zeros = before.numel() - int(torch.count_nonzero(before))
        entry.operators.append(
            OperatorEntry(
                name=operator.name,
                shape=(operator.rows, operator.columns),
                sparsity=claims[name],
                zeros=zeros,
                density=1 - zeros / before.numel(),
                change=float((after - before).norm() / before.norm().clamp_min(1e-30)),
                changed=int((after != before).sum()),
            )
        )
    return entry


def _describe_training(context: TrainingContext, state: TrainingState, report: Report) -> None:
    operators, survivors = report.operators, report.operator_weights - report.operator_zeros
    found = report.recovery
    assert found is not None
    found.read_journal(context.run.steps_file)
    found.operators = 0 if found.parameters == "norms" else len(operators)
    found.steps, found.kept_step = state.step, state.patience.best_step
    found.changed = sum(operator.changed or 0 for operator in operators) / max(1, survivors)
    found.change = max((operator.change or 0.0 for operator in operators), default=None)


def _warn(state: TrainingState, report: Report) -> None:
    """Say in the report that training has failed, or has not helped."""
    found = report.recovery
    assert found is not None
    rates = f"learning rates {found.lr['lowest']:.2g} to {found.lr['highest']:.2g}" if found.lr else ""
    if state.fault and state.step == 0:
        report.warnings.append(
            f"training stopped: {state.fault}; the weights are those of the input. The predictions of the model that "
            "goes in, or of the dense model, are not finite"
        )
    elif state.fault:
        report.warnings.append(
            f"training stopped: {state.fault}; the weights of step {state.patience.best_step} are kept ({rates}: try "
            "a lower --lr)"
        )
    elif found.lr and not found.lr["highest"]:
        report.warnings.append(
            "nothing was trained, so the weights are those of the input: all that is trained is zero there, and "
            "learning rates are shares of its size: give --lr with --lr-unit absolute"
        )
    elif state.patience.best_step == 0:
        more = "" if report.kind == "align" else f", or more {length_setting(report)}"
        report.warnings.append(
            f"no step was better than the start on what is held out, so the weights are those of the input "
            f"({rates}: try a lower --lr; a higher one where the loss has hardly changed{more})"
        )


def _seconds(context: TrainingContext) -> dict[str, float | None]:
    """Return the measured times of the plan: training as a whole, and a step without a check."""
    lines = read_steps(context.run.steps_file)
    steps = [line["seconds"] for line in lines if "held_out" not in line]
    whole = sum(line.get("seconds", 0.0) for line in lines)
    return {TRAINING: whole, STEP: statistics.median(steps) if steps else None}


def _write(
    context: TrainingContext,
    trained: Trained,
    report: Report,
    earlier: Mapping[str, Any],
    claims: Mapping[str, Any],
    listener: Listener,
) -> None:
    """Write the checkpoint with its card and its record (``fistapruner.json``).

    Args:
        context: the opened run.
        trained: holds the best weights.
        report: of the run.
        earlier: record of the input.
        claims: about the zeros of every operator, by the name of its stored weight.
        listener: receives progress.
    """
    model = context.model

    def documents() -> dict[str, str]:
        return model_documents(model_card(report), {**earlier, **checkpoint_record(report, claims)})

    write_model(context.run, model.checkpoint, context.fingerprint, replacements(model, trained), documents, listener)


def replacements(model: LayerwiseModel, trained: Trained) -> Callable[[str], Tensor | None]:
    """Return a function that gives the trained tensors by checkpoint name, None for all others.

    One layer's tensors are in memory at a time.
    """
    prefix = f"{model.layers_name}."
    places = {
        model.source(name): int(name.removeprefix(prefix).partition(".")[0])
        for index in range(len(model))
        for name in model.layer_parameters(index)
    }

    @lru_cache(maxsize=1)
    def layer_result(index: int) -> Mapping[str, Tensor]:
        with model.layer(index) as layer:
            return trained.result(index, layer)

    return lambda name: layer_result(places[name]).get(name) if name in places else None


def _write_adapter(context: TrainingContext, trained: Trained, listener: Listener, *, changed: bool) -> None:
    """Write what ``spp`` or ``hira`` has trained as a PEFT adapter of the input, too; none with experts.

    Where no step was kept (``changed`` is False) it is the adapter of the start, which changes nothing.
    """
    operators, model, folder = trained.rescalings(), context.model, context.run.adapter
    if not operators or any(operator.experts for _, operator in context.layout.operators()):
        return
    whole: dict[str, Tensor] = {}
    left_out = 0
    for index in range(len(model)):
        with model.layer(index) as layer:
            linear = {name for name, _ in linear_modules(layer)}
            values = trained.values(index, layer)
            others = {name for name in values if name.rpartition(".")[0] not in linear}
            for name, value in values.items():
                module, dot, parameter = name.rpartition(".")
                if module in linear and parameter == "weight":
                    continue
                # PEFT replaces whole modules: all that a module holds must have been trained.
                if {f"{module}{dot}{key}" for key in layer.get_submodule(module).state_dict()} <= others:
                    whole[model.full_name(index, name)] = value
                else:
                    left_out += 1
    remove_adapter(folder)
    write_hira_adapter(folder, context.decision.folder, operators, whole=whole, transposed=context.layout.transposed)
    without = f", without {left_out} trained vectors, which PEFT's HiRA cannot hold" if left_out else ""
    idle = "" if changed else "; it changes nothing, as no step was better than the start"
    listener.say(f"the same as a PEFT adapter (HiRA): {folder}{without}{idle}")


def _totals(context: TrainingContext, report: Report, seconds: float) -> Totals:
    return Totals(
        operator_weights=report.operator_weights,
        operator_zeros=report.operator_zeros,
        model_weights=context.model.parameter_count(),
        model_zeros=context.decision.zeros,
        seconds=seconds,
        peak_memory=peak_memory(),
        peak_device_memory=peak_device_memory(context.model.device),
    )

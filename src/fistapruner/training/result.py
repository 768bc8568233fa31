"""Write what a run has trained: the checkpoint with the zeros of the input, and the report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.record import read_pruning_record, stack_of
from ..papers.mezo import ForwardOnly
from ..pruning.result import (
    check_zeros,
    checkpoint_record,
    close_report,
    model_documents,
    operator_claims,
    stored_weights,
    write_low_rank,
    write_model,
)
from ..reporting.facts import length_setting
from ..reporting.model_card import model_card
from ..runs.lineage import add_stage, update_stage
from ..runs.listener import Listener
from ..runs.records import LayerEntry, OperatorEntry, Report, Totals
from ..runs.times import Times
from ..runtime.devices import peak_device_memory, peak_memory
from ..runtime.machine import now
from .loop import State
from .masked import Trained
from .opened import Training


@dataclass(frozen=True)
class Collected:
    """What is taken from a trained model, by all of its processes.

    Args:
        changed: tensors by checkpoint name, as the checkpoint stores them.
        measured: what the verb has measured of it.
        trained: how many numbers were trained; ``rates``: the first learning rates.
    """

    changed: dict[str, Tensor]
    measured: Any
    trained: int
    rates: list[float]


def collect(training: Training, trained: Trained | ForwardOnly, listener: Listener) -> Collected:
    """Take the results from a trained model, which is loaded; called by all of its processes."""
    measured = training.measured(trained, listener)
    listener.tick("comparing the trained weights with the input's", 0, 1)
    if isinstance(trained, ForwardOnly):
        return Collected(dict(trained.result()), measured, trained.count(), [trained.rate])
    changed: dict[str, Tensor] = {}
    for index in range(len(trained.layers)):
        changed |= trained.result(index)
    return Collected(changed, measured, trained.numbers, list(trained.rates.values()))


def write(
    training: Training,
    collected: Collected,
    state: State,
    times: Times,
    listener: Listener,
    earlier: Report | None,
) -> Report:
    """Write the checkpoint and the report of a run that has trained.

    Args:
        training: the opened run, its model loaded.
        collected: what was taken from it, with the best weights.
        state: where training ended.
        times: wall time of the run so far.
        listener: receives progress.
        earlier: report of the finished run whose checkpoint is written again.

    Raises:
        FistaPrunerError: the written checkpoint does not have the zeros of the input, or the disk is full.
    """
    run, model, changed = training.run, training.model, collected.changed
    report: Report = run.begun_record().report()
    training.describe(collected.measured, report, listener)
    report.layers = [_layer(training, changed, index) for index in range(len(model))]
    _describe(training, collected, state, report)
    report.totals = Totals(
        operator_weights=report.operator_weights,
        operator_zeros=report.operator_zeros,
        model_weights=model.parameter_count(),
        model_zeros=training.decision.zeros,
        seconds=times.total(),
        peak_memory=peak_memory(),
        peak_device_memory=peak_device_memory(model.device),
    )
    content = read_pruning_record(training.decision.folder)
    claims = operator_claims(report, model) | (content.get("operators") or {})
    report.stacked_experts = any(stack_of(name) for name in claims)
    report.finished = now()
    add_stage(report)
    begin = time.perf_counter()
    if (part := training.low_rank) is not None:
        content |= write_low_rank(run, part.factors, part.rank, training.layout, report.totals)

    def documents() -> dict[str, str]:
        return model_documents(model_card(report), {**content, **checkpoint_record(report, claims)})

    write_model(run, model.checkpoint, training.fingerprint, changed.get, documents, listener)
    check_zeros(run.model, model.checkpoint, stored_weights(model, training.layout))
    if report.recovery is not None:
        report.totals.time_split["train"] = report.recovery.seconds
    close_report(run, report, earlier, times, begin)
    update_stage(report)
    # The snapshots stay: the checkpoint can be written again from them. A finished run leaves nothing else behind.
    shutil.rmtree(run.teacher, ignore_errors=True)
    run.write_report(report)
    return report


def _layer(training: Training, changed: Mapping[str, Tensor], index: int) -> LayerEntry:
    """Describe one decoder layer."""
    model, entry = training.model, LayerEntry(index=index)
    entry.name = f"{training.layout.layers_name}.{index}"
    for operator in training.layout.in_layer(index):
        name = training.layout.full_name(index, operator)
        source = model.source(f"{name}.weight")
        before = model.checkpoint.read(source).float()
        after = changed[source].float() if source in changed else before
        zeros = before.numel() - int(torch.count_nonzero(before))
        entry.operators.append(
            OperatorEntry(
                name=operator.name,
                shape=(operator.rows, operator.columns),
                sparsity=training.decision.operators[name],
                zeros=zeros,
                change=float((after - before).norm() / before.norm().clamp_min(1e-30)),
                changed=int((after != before).sum()),
            )
        )
    return entry


def _describe(training: Training, collected: Collected, state: State, report: Report) -> None:
    """Say in the report what was trained, and whether it has failed or has not helped."""
    operators, survivors = report.operators, report.operator_weights - report.operator_zeros
    found, rates, words = report.recovery, collected.rates, ""
    assert found is not None
    found.read_journal(training.run.steps_file)
    if rates:
        found.lr = {"lowest": min(rates), "highest": max(rates)}
        words = f"learning rates {min(rates):.2g} to {max(rates):.2g}: "
    found.trained, found.steps, found.kept_step = collected.trained, state.step, state.best_step
    found.operators = 0 if found.parameters == "norms" else len(operators)
    found.changed = sum(operator.changed or 0 for operator in operators) / max(1, survivors)
    found.change = max((operator.change or 0.0 for operator in operators), default=None)
    if state.fault and state.step == 0:
        report.warnings.append(
            f"training stopped: {state.fault}; the weights are those of the input. The predictions of the model that "
            "goes in, or of the dense model, are not finite"
        )
    elif state.fault:
        report.warnings.append(
            f"training stopped: {state.fault}; the weights of step {state.best_step} are kept ({words}try a lower --lr)"
        )
    elif state.best_step == 0:
        report.warnings.append(
            "no step was better than the start on what is held out, so the weights are those of the input "
            f"({words}try a lower --lr; a higher one where the loss has hardly changed, or more "
            f"{length_setting(report)})"
        )

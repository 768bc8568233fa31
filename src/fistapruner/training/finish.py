"""After the last step: the checkpoint with the zeros of the input, and the report of what was trained."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..measure.preferences import accuracy_error, preference_figures
from ..models.files.record import read_pruning_record, stack_of
from ..papers.mezo import ForwardOnly
from ..papers.mrpo import accuracy, margins_of
from ..pipeline.result import (
    add_warning,
    check_zeros,
    checkpoint_record,
    close_report,
    model_documents,
    operator_claims,
    stored_weights,
    write_low_rank,
    write_model,
)
from ..planning.plan import check_plan
from ..reporting.advice import length_setting
from ..reporting.model_card import model_card
from ..runs.layer_records import LayerEntry, OperatorEntry
from ..runs.lineage import add_stage, update_stage
from ..runs.listener import Listener
from ..runs.records import Report, Totals
from ..runs.steps import read_steps
from ..runs.times import Times
from ..runs.training_records import Alignment
from ..runtime.machine import now
from ..runtime.memory import peak_device_memory, peak_memory
from ..runtime.numerics import mean_and_error
from ..settings.align_settings import PREFERENCE_LOSSES
from .context import AlignContext, TrainingContext
from .loop import State
from .masked import Trained
from .plan import STEP, TRAINING

LOWEST_REWARD = -1.0
"""Mean reward of the chosen answers below which a warning says that they have become less likely."""

RESULT = "aligned"


@dataclass(frozen=True)
class Collected:
    """What is taken from a trained model, by all of its processes.

    Args:
        changed: tensors by checkpoint name, as the checkpoint stores them.
        preferences: (test pairs, 2) log-probabilities of an alignment; ``references``: (pairs, 2) of other models.
        trained: how many numbers were trained; ``rates``: the first learning rates.
    """

    changed: dict[str, Tensor]
    preferences: Tensor | None
    references: dict[str, Tensor]
    trained: int
    rates: list[float]


def collect(context: TrainingContext, trained: Trained | ForwardOnly, listener: Listener) -> Collected:
    """Take the results from a trained model, which is loaded; called by all of its processes."""
    own, references = None, {}
    if isinstance(context, AlignContext):
        pairs = len(context.text.windows("test")) // 2
        listener.say(f"log-probabilities of {pairs} test pairs under the aligned model")
        own, references = context.test_log_probabilities(trained), context.references(listener)
    listener.tick("comparing the trained weights with the input's", 0, 1)
    if isinstance(trained, ForwardOnly):
        return Collected(dict(trained.result()), own, references, trained.count(), [trained.rate])
    changed: dict[str, Tensor] = {}
    for index in range(len(trained.layers)):
        changed |= trained.result(index)
    return Collected(changed, own, references, trained.numbers, list(trained.rates.values()))


def finish(
    context: TrainingContext,
    collected: Collected,
    state: State,
    times: Times,
    listener: Listener,
    earlier: Report | None = None,
) -> Report:
    """Write the checkpoint and the report of a run that has trained.

    Args:
        context: the opened run, its model loaded.
        collected: what was taken from it, with the best weights.
        state: where training ended.
        times: wall time of the run so far.
        listener: receives progress.
        earlier: report of the finished run whose checkpoint is written again; see
            :func:`fistapruner.pipeline.result.close_report`.

    Raises:
        FistaPrunerError: the written checkpoint does not have the zeros of the input, or the disk is full.
    """
    run, model, report = context.run, context.model, context.run.begun_record().report()
    if isinstance(context, AlignContext) and collected.preferences is not None:
        _add_preferences(context, collected.preferences, collected.references, report, listener)
    changed = collected.changed
    report.layers = [_describe(context, changed, index) for index in range(len(model))]
    _describe_training(context, collected, state, report)
    _warn(state, report)
    report.totals = Totals(
        operator_weights=report.operator_weights,
        operator_zeros=report.operator_zeros,
        model_weights=model.parameter_count(),
        model_zeros=context.decision.zeros,
        seconds=times.total(),
        peak_memory=peak_memory(),
        peak_device_memory=peak_device_memory(model.device),
    )
    content = read_pruning_record(context.decision.folder)
    claims = operator_claims(report, model) | (content.get("operators") or {})
    report.stacked_experts = any(stack_of(name) for name in claims)
    report.finished = now()
    add_stage(report)
    begin = time.perf_counter()
    if (part := context.low_rank) is not None:
        content |= write_low_rank(run, part.factors, part.rank, context.layout, report.totals)

    def documents() -> dict[str, str]:
        return model_documents(model_card(report), {**content, **checkpoint_record(report, claims)})

    write_model(run, model.checkpoint, context.fingerprint, changed.get, documents, listener)
    check_zeros(run.model, model.checkpoint, stored_weights(model, context.layout))
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


def _describe(context: TrainingContext, changed: Mapping[str, Tensor], index: int) -> LayerEntry:
    """Describe one decoder layer."""
    model, claims, entry = context.model, context.decision.operators, LayerEntry(index=index)
    entry.name = f"{context.layout.layers_name}.{index}"
    for operator in context.layout.in_layer(index):
        name = context.layout.full_name(index, operator)
        source = model.source(f"{name}.weight")
        before = model.checkpoint.read(source).float()
        after = changed[source].float() if source in changed else before
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


def _describe_training(context: TrainingContext, collected: Collected, state: State, report: Report) -> None:
    operators, survivors = report.operators, report.operator_weights - report.operator_zeros
    found = report.recovery
    assert found is not None
    found.read_journal(context.run.steps_file)
    rates = collected.rates
    found.trained, found.lr = collected.trained, {"lowest": min(rates), "highest": max(rates)} if rates else {}
    found.operators = 0 if found.parameters == "norms" else len(operators)
    found.steps, found.kept_step = state.step, state.best_step
    found.changed = sum(operator.changed or 0 for operator in operators) / max(1, survivors)
    found.change = max((operator.change or 0.0 for operator in operators), default=None)


def _warn(state: State, report: Report) -> None:
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
            f"training stopped: {state.fault}; the weights of step {state.best_step} are kept ({rates}: try "
            "a lower --lr)"
        )
    elif state.best_step == 0:
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


def _add_preferences(
    context: AlignContext, own: Tensor, references: Mapping[str, Tensor], report: Report, listener: Listener
) -> None:
    """Measure what the trained model prefers on the test pairs, and add it to the report."""
    text, recipe = context.text, context.recipe
    if context.decision.dense is not None and "dense" not in references:
        gone = f"no preferences of the dense model, which is not at {context.decision.dense} any more"
        add_warning(report, gone, listener)
    windows = text.windows("test")
    places = [window // 2 for window in windows[::2]]
    mixture = context.mixture(references)
    tokens = text.marks[windows].sum(1).view(-1, 2)
    models: dict[str, Tensor] = {name: references[name][places] for name in ("dense", "pruned") if name in references}
    rewards = recipe.beta * (own - mixture.mixed[places])
    margins = margins_of(rewards)
    weights = mixture.weights[:, context.trained_pairs].mean(1).tolist()
    chosen, rejected = rewards.mean(0).tolist()
    left_out: dict[str, Any] = next(iter(text.facts["tasks"].values()))
    report.alignment = Alignment(
        pairs=len(text.windows("trained")) // 2,
        held_out_pairs=len(text.windows("held_out")) // 2,
        test_pairs=len(places),
        left_out=left_out["too_long"],
        references=dict(zip(mixture.names, weights, strict=True)) if recipe.resolved_references else {},
        test=preference_figures({**models, RESULT: own}, tokens, RESULT),
        reward_accuracy=float(accuracy(margins)),
        reward_accuracy_error=accuracy_error(margins),
        margin=float(margins.mean()),
        margin_error=mean_and_error(margins)[1],
        chosen_reward=chosen,
        chosen_reward_error=mean_and_error(rewards[:, 0])[1],
        rejected_reward=rejected,
        rejected_reward_error=mean_and_error(rewards[:, 1])[1],
    )
    if chosen < LOWEST_REWARD:
        preference = recipe.loss in PREFERENCE_LOSSES
        than = f"the references, as {recipe.loss} may do" if preference else "the model that went in"
        more = "a larger --beta, or --anchor 0.1" if preference else f"or fewer {length_setting(report)}"
        report.warnings.append(
            f"the mean reward of the chosen answers is {chosen:.2f}: they have become much less likely than under "
            f"{than}; try a lower --lr, {more}"
        )

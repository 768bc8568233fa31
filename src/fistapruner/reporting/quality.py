"""Compare evaluations, and say what they measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import stdev

from ..runs.records import Report
from ..runs.results import Divergence, Evaluation, Perplexity, TaskResult
from ..runtime.show import align_columns, counted, duration, p_value, percent_with_error, significant, with_error
from .fact import QUALITY, Fact


@dataclass(frozen=True)
class Gain:
    """What training changed on one text.

    Args:
        closed: share of the gap to the dense model, ln(perplexity before / dense), that is closed; ``closed_error``:
            its standard error, paired over windows (delta method). None without a dense model, and where the gap is
            not above twice its own standard error: a share of noise says nothing.
    """

    closed: float | None = None
    closed_error: float | None = None


def gain(before: Evaluation, after: Evaluation) -> Gain | None:
    """Compare two evaluations of the same windows; None where they are not.

    With the gaps b and a before and after training, the share r = 1 - a / b is closed. To first order its error is
    that of the mean of (a - (1 - r) b) / b over windows.
    """
    old, new = before.perplexity, after.perplexity
    if old is None or new is None or old.measured_on != new.measured_on or not math.isfinite(old.nll - new.nll):
        return None
    dense = after.reference or before.reference
    if dense is None or dense.measured_on != new.measured_on:
        return Gain()
    gap, gaps = old.nll - dense.nll, _differences(old, dense)
    if not gap > 0 or gap <= 2 * _error(gaps):
        return Gain()
    left = (new.nll - dense.nll) / gap
    pairs = zip(_differences(new, dense), gaps, strict=False)
    return Gain(1 - left, _error([(a - left * b) / gap for a, b in pairs]))


def gain_of(report: Report, after: Evaluation) -> tuple[Evaluation, Gain] | None:
    """Find the evaluation of a run's input that belongs to an evaluation of its result.

    An alignment is not made to close the gap to the dense model, so of an alignment no share of the gap is told.
    """
    for before in report.recovery.before if report.recovery else []:
        if (found := gain(before, after)) is not None:
            return before, found if report.kind != "align" else Gain()
    return None


def gain_text(before: Evaluation, after: Evaluation, training: str) -> str:
    """Say in one line what recovery or alignment changed on a text; empty where that is not known."""
    found, old, new = gain(before, after), before.perplexity, after.perplexity
    if found is None or old is None or new is None:
        return ""
    dense = after.reference or before.reference
    text = f"perplexity on {new.data}: {old.perplexity:.2f} before {training}, {new.perplexity:.2f} after it"
    if dense is not None:
        text += f", {dense.perplexity:.2f} dense"
    shown = found.closed is not None and training != "alignment"
    return f"{text}: {percent_with_error(found.closed, found.closed_error)} % of the gap is closed" if shown else text


def quality_facts(report: Report) -> list[Fact]:
    """List what was measured on the result: of a text that was evaluated several times the last figures."""
    last = {(one.perplexity.data, one.perplexity.split): one for one in report.evaluations if one.perplexity}
    facts = []
    for evaluation in report.evaluations:
        if evaluation in last.values():
            before, won = gain_of(report, evaluation) or (None, Gain())
            facts += text_facts(evaluation, before, won)
    tasks = [task for evaluation in report.evaluations for task in evaluation.tasks]
    earlier = [task for one in (report.recovery.before if report.recovery else ()) for task in one.tasks]
    return facts + task_facts(tasks, earlier)


DIVERGENCES: tuple[tuple[str, Callable[[Divergence], str], str], ...] = (
    (
        "NLL gap, nats a token",
        lambda found: with_error(found.nll_difference, found.nll_difference_standard_error, 3),
        "ln of the ratio of the perplexities, paired over windows",
    ),
    (
        "KL from dense, nats a token",
        lambda found: with_error(found.kl, found.kl_standard_error, 3),
        "mean over the same tokens of KL(dense || model)",
    ),
    (
        "Top-1 agreement, %",
        lambda found: percent_with_error(found.top1_agreement, found.top1_standard_error),
        "tokens whose most likely successor is the same in both models",
    ),
)
"""What is told of a divergence: label, value, how it was measured."""


def text_facts(found: Evaluation, before: Evaluation | None = None, won: Gain | None = None) -> list[Fact]:
    """List perplexity and divergence from the dense model on a text, beside those before training."""
    text, dense = found.perplexity, found.reference
    facts = []
    if text is not None:
        times = f"×{significant(text.perplexity / dense.perplexity)} of dense; " if dense is not None else ""
        old = perplexity_text(before.perplexity if before else None)
        how = times + perplexity_conditions(text)
        facts.append(Fact(QUALITY, f"Perplexity, {text.data}", perplexity_text(text), perplexity_text(dense), old, how))
    if won is not None and won.closed is not None:
        closed = percent_with_error(won.closed, won.closed_error)
        how = "share of ln(perplexity before / dense), paired over windows"
        facts.append(Fact(QUALITY, "Gap closed, %", closed, how=how))
    if found.divergence is not None:
        start = before.divergence if before else None
        for label, write, how in DIVERGENCES:
            old = write(start) if start is not None else ""
            facts.append(Fact(QUALITY, label, write(found.divergence), before=old, how=how))
    return facts


def task_facts(tasks: Sequence[TaskResult], before: Sequence[TaskResult] = ()) -> list[Fact]:
    """List task scores, and their mean where there are several tasks.

    Args:
        tasks: scores of the result.
        before: scores that the model had before training; only those on the same items are shown.
    """
    earlier = {task.measured_on: task for task in before}
    facts = []
    for task in tasks:
        old, how = earlier.get(task.measured_on), ""
        if task.reference is not None and (error := task.difference_error) is not None:
            how = f"difference from dense {points(task.value - task.reference, error)}; "
        if task.p_value is not None:
            how += f"{task.lost} lost, {task.won} won, McNemar {p_value(task.p_value)}; "
        how += f"{task.shots}-shot, {item_count(task)}" + (f", {task.dtype}" if task.dtype else "")
        scores = _score(task), _reference(task), _score(old) if old else ""
        facts.append(Fact(QUALITY, f"{task.task}, {task.metric}, %", *scores, f"{how}, {task.source}"))
    if len(together := one_metric(tasks)) > 1:
        facts.append(_mean(together, [earlier.get(task.measured_on) for task in together]))
    return facts


def _mean(tasks: Sequence[TaskResult], before: Sequence[TaskResult | None]) -> Fact:
    """Average scores of tasks that are taken as independent."""

    def mean(values: Sequence[tuple[float | None, float | None]]) -> str:
        known = [(value, error) for value, error in values if value is not None and error is not None]
        if len(known) < len(tasks):
            return ""
        error = math.hypot(*(error for _, error in known)) / len(known)
        return percent_with_error(sum(value for value, _ in known) / len(known), error)

    after = mean([(task.value, task.standard_error) for task in tasks])
    dense = mean([(task.reference, task.reference_standard_error) for task in tasks])
    old = mean([(task.value, task.standard_error) for task in before if task is not None])
    how = "unweighted mean over " + ", ".join(f"{task.task} {task.metric}" for task in tasks)
    if dense:
        apart = sum(task.value - (task.reference or 0.0) for task in tasks) / len(tasks)
        errors = [math.nan if task.difference_error is None else task.difference_error for task in tasks]
        how = f"difference from dense {points(apart, math.hypot(*errors) / len(tasks))}; {how}"
    return Fact(QUALITY, f"Mean of {len(tasks)} tasks, %", after, dense, old, how)


def one_metric(tasks: Sequence[TaskResult]) -> list[TaskResult]:
    """Choose one result of each task for a mean: plain accuracy where there is one."""
    chosen: dict[str, TaskResult] = {}
    for task in tasks:
        if task.task not in chosen or task.metric == "acc":
            chosen[task.task] = task
    return list(chosen.values())


def evaluation_text(evaluation: Evaluation) -> str:
    """Write an evaluation for the terminal, a line for each measure."""
    rows = [fact.row for fact in [*text_facts(evaluation), *task_facts(evaluation.tasks)]]
    if evaluation.low_rank is not None:
        rows.append(("of the model", f"with its low-rank part, {evaluation.low_rank} additional weights"))
    rows += [("warning", warning) for warning in evaluation.warnings]
    rows.append(("time", f"{duration(evaluation.seconds)} on {evaluation.device}"))
    return align_columns(rows)


def perplexity_text(found: Perplexity | None) -> str:
    """Write a perplexity with its error: ``25.32 ± 0.41``; nothing for None."""
    return "" if found is None else with_error(found.perplexity, found.standard_error)


def perplexity_conditions(text: Perplexity) -> str:
    """Say what a perplexity depends on, in one line."""
    bos = {"none": "no BOS", "text": "BOS before the text", "window": "BOS in every window"}.get(text.bos, text.bos)
    windows = f"{counted(text.windows, 'window')} of {text.seqlen} tokens"
    error = "; ± one standard error" if math.isfinite(text.standard_error) else ""
    return f"{text.data} ({text.split}), {windows}, {bos}, {text.dtype}{error}"


def points(difference: float, error: float | None = None) -> str:
    """Format a difference of two shares in percentage points, with its sign and its error."""
    sign = "+" if round(100 * difference, 1) > 0 else ""
    return (sign + percent_with_error(difference, error)).replace("-", "−")


def item_count(task: TaskResult) -> str:
    """Write ``2376 items``, or ``the first 400 of 2376 items`` where not all were used."""
    some = task.available not in (None, task.items)
    return f"the first {task.items} of {task.available} items" if some else f"{task.items} items"


def _score(task: TaskResult) -> str:
    return percent_with_error(task.value, task.standard_error)


def _reference(task: TaskResult) -> str:
    return "" if task.reference is None else percent_with_error(task.reference, task.reference_standard_error)


def _differences(a: Perplexity, b: Perplexity) -> list[float]:
    """Subtract window by window; empty where the figures of single windows were not recorded."""
    if len(a.window_nlls) != len(b.window_nlls):
        return []
    return [x - y for x, y in zip(a.window_nlls, b.window_nlls, strict=True)]


def _error(values: Sequence[float]) -> float:
    """Return the standard error of a mean; NaN for fewer than two values."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan

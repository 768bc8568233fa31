"""List the quality of a pruned model beside the dense one, for the page's table of measured results."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..runs.records import Report
from ..runs.results import Evaluation, TaskResult
from ..runtime.formatting import p_value, percent_with_error, significant, with_error
from .alignment_text import preference_rows
from .evaluation_text import kl_text, perplexity_conditions, perplexity_text, points, task_protocol
from .recovery_text import closed_text, gain_of
from .size_and_speed import Row


def quality_rows(evaluations: Sequence[Evaluation]) -> list[Row]:
    """List perplexity, divergence from the dense model and task scores, one row for each."""
    return [*_text_rows(evaluations), *_task_rows(evaluations)]


def recovery_rows(report: Report) -> list[tuple[str, ...]]:
    """List the same of a model that was trained, with the figures before training as third column."""
    rows: list[tuple[str, ...]] = []
    for evaluation in report.evaluations:
        earlier = gain_of(report, evaluation)
        rows += _beside(_text_rows([evaluation]), _text_rows([earlier[0]] if earlier else []))
        if earlier is not None and earlier[1].closed is not None:
            how = "share of ln(perplexity before / dense), paired over windows"
            rows.append(("Gap closed, %", "", "0", closed_text(earlier[1]).removesuffix(" %"), "", how))
    rows += [(name, dense, old, new, "", how) for name, dense, old, new, how in preference_rows(report)]
    tasks = zip(_task_rows(report.evaluations), _scores_before(report), strict=True)
    return rows + [(name, dense, old, new, change, how) for (name, dense, new, change, how), old in tasks]


def task_before(report: Report, task: TaskResult) -> TaskResult | None:
    """Find the score that a run's input had on the same items of a task."""
    before = [old for evaluation in report.recovery.before for old in evaluation.tasks] if report.recovery else []
    return next((old for old in before if old.measured_on == task.measured_on), None)


def _scores_before(report: Report) -> list[str]:
    """Write the scores before training beside :func:`_task_rows`, and their mean over the same tasks."""
    tasks = [task for evaluation in report.evaluations for task in evaluation.tasks]
    known = {task.measured_on: task_before(report, task) for task in tasks}
    scores = [
        percent_with_error(old.value, old.standard_error) if (old := known[task.measured_on]) else "–" for task in tasks
    ]
    if len(together := one_metric(tasks)) > 1:
        before = [old for task in together if (old := known[task.measured_on]) is not None]
        scores.append(percent_with_error(*mean_score(before)[:2]) if len(before) == len(together) else "–")
    return scores


def _beside(rows: Sequence[Row], before: Sequence[Row]) -> list[tuple[str, ...]]:
    known = {name: value for name, _, value, _, _ in before}
    return [(name, dense, known.get(name, "–"), value, change, how) for name, dense, value, change, how in rows]


def _text_rows(evaluations: Sequence[Evaluation]) -> list[Row]:
    rows: list[Row] = []
    for evaluation in evaluations:
        text, dense, damage = evaluation.perplexity, evaluation.reference, evaluation.divergence
        if text is not None:
            change = f"×{significant(text.perplexity / dense.perplexity)}" if dense is not None else "–"
            name = f"Perplexity, {text.data}"
            rows.append((name, perplexity_text(dense), perplexity_text(text), change, perplexity_conditions(text)))
        if damage is not None:
            gap = with_error(damage.nll_difference, damage.nll_difference_standard_error, 3)
            rows.append(
                ("NLL gap, nats a token", "0", gap, "", "ln of the ratio of the perplexities, paired over windows")
            )
            how = "mean over the same tokens of KL(dense || model)"
            rows.append(("KL from dense, nats a token", "0", kl_text(damage, 3), "", how))
            agreement = percent_with_error(damage.top1_agreement, damage.top1_standard_error)
            rows.append(
                (
                    "Top-1 agreement, %",
                    "100",
                    agreement,
                    "",
                    "tokens whose most likely successor is the same in both models",
                )
            )
    return rows


def _task_rows(evaluations: Sequence[Evaluation]) -> list[Row]:
    rows: list[Row] = []
    tasks = [task for evaluation in evaluations for task in evaluation.tasks]
    for task in tasks:
        before, change, how = "–", "–", f"{task_protocol(task)}, {task.source}"
        if task.reference is not None and task.reference_standard_error is not None:
            before = percent_with_error(task.reference, task.reference_standard_error)
            change = points(task.value - task.reference, task.difference_error)
            if task.p_value is not None:
                how += f"; {task.lost} lost, {task.won} won, McNemar {p_value(task.p_value)}"
        rows.append(
            (
                f"{task.task}, {task.metric}, %",
                before,
                percent_with_error(task.value, task.standard_error),
                change,
                how,
            )
        )
    together = one_metric(tasks)
    if len(together) > 1:
        mean, error, dense_mean, dense_error = mean_score(together)
        before = percent_with_error(dense_mean, dense_error or 0) if dense_mean is not None else "–"
        apart = [task.difference_error or math.nan for task in together]
        change = points(mean - dense_mean, math.hypot(*apart) / len(apart)) if dense_mean is not None else "–"
        how = "unweighted mean over " + ", ".join(f"{task.task} {task.metric}" for task in together)
        rows.append((f"Mean of {len(together)} tasks, %", before, percent_with_error(mean, error), change, how))
    return rows


def one_metric(tasks: Sequence[TaskResult]) -> list[TaskResult]:
    """Choose one result of each task for a mean: plain accuracy where there is one."""
    chosen: dict[str, TaskResult] = {}
    for task in tasks:
        if task.task not in chosen or task.metric == "acc":
            chosen[task.task] = task
    return list(chosen.values())


def mean_score(tasks: Sequence[TaskResult]) -> tuple[float, float, float | None, float | None]:
    """Average scores, tasks taken as independent.

    Returns:
        Mean and its standard error; the same of the dense model, None unless every task has them.
    """
    count = len(tasks)
    mean = sum(task.value for task in tasks) / count
    error = math.hypot(*(task.standard_error for task in tasks)) / count
    dense = [task.reference for task in tasks if task.reference is not None]
    errors = [task.reference_standard_error for task in tasks if task.reference_standard_error is not None]
    if len(dense) < count or len(errors) < count:
        return mean, error, None, None
    return mean, error, sum(dense) / count, math.hypot(*errors) / count

"""Which evaluations a report keeps: what a new one replaces, and what two have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..runs.results import Evaluation, TaskResult


def put_in_place(earlier: Sequence[Evaluation], found: Evaluation) -> list[Evaluation]:
    """Put an evaluation in the place of earlier ones on its text, whatever their windows, or last.

    What it measures again is left out of the others; a score that :func:`fuller_scores` keeps, of the new one.
    """
    fuller = {(task.task, task.metric) for task in fuller_scores(earlier, found)}
    found = replace(found, tasks=tuple(task for task in found.tasks if (task.task, task.metric) not in fuller))
    again = {(task.task, task.metric) for task in found.tasks}
    kept: list[Evaluation] = []
    place = None
    for evaluation in earlier:
        tasks = tuple(task for task in evaluation.tasks if (task.task, task.metric) not in again)
        rest = replace(evaluation, tasks=tasks)
        texts = evaluation.perplexity, found.perplexity
        if None not in texts and len({(text.data, text.split) for text in texts if text is not None}) == 1:
            rest = replace(rest, perplexity=None, reference=None, divergence=None)
            place = len(kept)
        if rest.perplexity is not None or rest.tasks:
            kept.append(rest)
    if found.perplexity is not None or found.tasks:
        kept.insert(len(kept) if place is None else place, found)
    return kept


def fuller_scores(earlier: Sequence[Evaluation], found: Evaluation) -> list[TaskResult]:
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


def add_scores(before: list[Evaluation], evaluations: Sequence[Evaluation], others: Sequence[Evaluation]) -> bool:
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


def same_comparison(a: Evaluation, b: Evaluation) -> bool:
    """Check that two evaluations are of the same windows, precision and dense model."""
    dense = [None if one.against is None else Path(one.against).resolve() for one in (a, b)]
    return dense[0] == dense[1] and same_text(a, b)


def same_text(a: Evaluation, b: Evaluation) -> bool:
    """Check that two evaluations are of the same windows in the same precision."""
    if a.perplexity is None or b.perplexity is None:
        return False
    return a.perplexity.measured_on == b.perplexity.measured_on

"""Write an evaluation in a few lines, for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..runs.results import Divergence, Evaluation, Perplexity, TaskResult
from ..runtime.formatting import align_columns, counted, duration, p_value, percent_with_error, with_error


def evaluation_text(evaluation: Evaluation) -> str:
    """Write lines of ``name  value``; every perplexity says what it depends on."""
    rows: list[tuple[str, str]] = []
    if evaluation.perplexity is not None:
        rows.append(("perplexity", perplexity_text(evaluation.perplexity)))
    if evaluation.reference is not None:
        rows.append(("  dense", perplexity_text(evaluation.reference)))
    if evaluation.divergence is not None:
        damage = evaluation.divergence
        rows.append(
            (
                "NLL gap",
                f"{with_error(damage.nll_difference, damage.nll_difference_standard_error, 4)} nats a token (paired)",
            )
        )
        rows.append(("KL from dense", f"{kl_text(damage, 4)} nats a token"))
        agreement = percent_with_error(damage.top1_agreement, damage.top1_standard_error)
        rows.append(("top-1 agreement", f"{agreement} % of tokens"))
    if evaluation.perplexity is not None:
        rows.append(("measured on", perplexity_conditions(evaluation.perplexity)))
    if evaluation.low_rank is not None:
        rows.append(("of the model", f"with its low-rank part, {evaluation.low_rank} additional weights"))
    rows += [(f"{task.task} {task.metric}", task_text(task)) for task in evaluation.tasks]
    rows += [("warning", warning) for warning in evaluation.warnings]
    rows.append(("time", f"{duration(evaluation.seconds)} on {evaluation.device}"))
    return align_columns(rows)


def on_text(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """Choose the first evaluation that has a perplexity: others are of tasks alone."""
    return next((evaluation for evaluation in evaluations if evaluation.perplexity is not None), None)


def perplexity_text(found: Perplexity | None) -> str:
    """Write a perplexity with its error: ``25.32 ± 0.41``; ``–`` for None."""
    return "–" if found is None else with_error(found.perplexity, found.standard_error)


def kl_text(found: Divergence | None, digits: int) -> str:
    """Write a KL divergence with its error: ``0.021 ± 0.002``; ``–`` for None."""
    return "–" if found is None else with_error(found.kl, found.kl_standard_error, digits)


def perplexity_conditions(text: Perplexity) -> str:
    """Say what a perplexity depends on, in one line."""
    bos = {"none": "no BOS", "text": "BOS before the text", "window": "BOS in every window"}.get(text.bos, text.bos)
    windows = f"{counted(text.windows, 'window')} of {text.seqlen} tokens"
    error = "; ± one standard error" if math.isfinite(text.standard_error) else ""
    return f"{text.data} ({text.split}), {windows}, {bos}, {text.dtype}{error}"


def task_text(task: TaskResult) -> str:
    """Write a task's score, with the paired test where there is a dense model.

    ``41.2 ± 1.0 % of 2376 items (dense 43.0 ± 1.0 %; difference −0.9 ± 0.6; 120 lost, 98 won, p = 0.15)``
    """
    text = f"{percent_with_error(task.value, task.standard_error)} % of {item_count(task)}"
    if task.reference is None or task.reference_standard_error is None:
        return text
    before = percent_with_error(task.reference, task.reference_standard_error)
    if task.p_value is None:
        return f"{text} (dense {before} %)"
    apart = points(task.value - task.reference, task.difference_error)
    return f"{text} (dense {before} %; difference {apart}; {task.lost} lost, {task.won} won, {p_value(task.p_value)})"


def points(difference: float, error: float | None = None) -> str:
    """Format a difference of two shares in percentage points, with its sign and its error."""
    sign = "+" if round(100 * difference, 1) > 0 else ""
    return (sign + percent_with_error(difference, error)).replace("-", "−")


def task_protocol(task: TaskResult) -> str:
    """Say what a task's score depends on: ``0-shot, 2376 items, bfloat16``."""
    return f"{task.shots}-shot, {item_count(task)}" + (f", {task.dtype}" if task.dtype else "")


def item_count(task: TaskResult) -> str:
    """Write ``2376 items``, or ``the first 400 of 2376 items`` where not all were used."""
    return (
        f"{task.items} items"
        if task.available in (None, task.items)
        else f"the first {task.items} of {task.available} items"
    )

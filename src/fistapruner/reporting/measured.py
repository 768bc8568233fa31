"""List the quality, size and speed of a result as facts; what was not measured is said to be so."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..measure import QUANTISE_FIRST
from ..runs.records import Divergence, Evaluation, Perplexity, Report, TaskResult
from ..runtime.show import (
    align_columns,
    counted,
    duration,
    p_value,
    percent_with_error,
    significant,
    size,
    with_error,
)

QUALITY, TRAINING, PRUNING = "Quality", "Training", "Pruning"
SIZE, COST, ORIGIN = "Size and speed", "Time and memory", "Made from"


@dataclass(frozen=True)
class Fact:
    """One thing that a report says.

    Args:
        section: heading that it stands under; ``label``: its name.
        after: value of the result; ``dense``: of the dense model; ``before``: of the model that a training began with.
            Empty where there is none.
        how: how the value was obtained, and what it depends on.
    """

    section: str
    label: str
    after: str
    dense: str = ""
    before: str = ""
    how: str = ""

    @property
    def line(self) -> str:
        """The values in one line: ``46.53 ± 0.93 (dense 25.32 ± 0.51); 60 windows of 1024 tokens``."""
        known = [f"{name} {value}" for name, value in (("dense", self.dense), ("before", self.before)) if value]
        beside = f"({', '.join(known)})" if known else ""
        return " ".join(part for part in (self.after, beside) if part) + (f"; {self.how}" if self.how else "")

    @property
    def row(self) -> tuple[str, str]:
        """Label, in lower case unless it begins with an abbreviation, and line, for the terminal."""
        label = self.label if self.label[1:2].isupper() else self.label[:1].lower() + self.label[1:]
        return label, self.line


def file_name(source: str) -> str:
    """Cut the name of a text to its last part: cards are published, folders of a machine are not."""
    return source.rsplit("/", 1)[-1]


def input_evaluation(report: Report, after: Evaluation) -> Evaluation | None:
    """Find the evaluation of a run's input that is on the windows of an evaluation of its result."""
    text, known = after.perplexity, report.recovery.before if report.recovery else []
    return next(
        (one for one in known if text and one.perplexity and one.perplexity.measured_on == text.measured_on), None
    )


def quality_facts(report: Report) -> list[Fact]:
    """List what was measured on the result: of a text that was evaluated several times the last figures."""
    last = {(one.perplexity.data, one.perplexity.split): one for one in report.evaluations if one.perplexity}
    facts = []
    for evaluation in report.evaluations:
        if evaluation in last.values():
            facts += text_facts(evaluation, input_evaluation(report, evaluation))
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


def text_facts(found: Evaluation, before: Evaluation | None = None) -> list[Fact]:
    """List perplexity and divergence from the dense model on a text, beside those before training."""
    text, dense = found.perplexity, found.reference
    facts = []
    if text is not None:
        times = f"×{significant(text.perplexity / dense.perplexity)} of dense; " if dense is not None else ""
        old = perplexity_text(before.perplexity if before else None)
        how = times + perplexity_conditions(text)
        facts.append(Fact(QUALITY, f"Perplexity, {text.data}", perplexity_text(text), perplexity_text(dense), old, how))
    if found.divergence is not None:
        start = before.divergence if before else None
        for label, write, how in DIVERGENCES:
            old = write(start) if start is not None else ""
            facts.append(Fact(QUALITY, label, write(found.divergence), before=old, how=how))
    return facts


def task_facts(tasks: Sequence[TaskResult], before: Sequence[TaskResult] = ()) -> list[Fact]:
    """List task scores, beside those before training on the same items, and the mean of several tasks."""
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


NOT_MEASURED = "not measured; 'fistapruner bench RUN' measures it"


def becomes_smaller_packed(report: Report) -> bool:
    """Check whether ``pack`` takes the model as it is, and leaves out more zeros than a mask has bits."""
    bits = 16 if report.model.dtype == "bfloat16" else 0
    zeros, weights = report.totals.operator_zeros or 0, report.totals.operator_weights or math.inf
    return not report.stacked_experts and bits * zeros > weights


def size_facts(report: Report) -> list[Fact]:
    """List the size of the weight files as written, and packed if that makes them smaller."""
    totals, dense = report.totals, report.origin.bytes
    if not totals.checkpoint_bytes:
        return []

    def fact(label: str, value: int | None, how: str, *, beside: bool = False) -> Fact:
        times = f"×{significant(value / dense)} of dense; " if value and dense else ""
        return Fact(SIZE, label, size(value), size(dense) if beside and dense else "", how=times + how)

    how = "fewer parameters" if report.only_structure else "zeros are stored as they are"
    facts = [fact("Checkpoint on disk", totals.checkpoint_bytes, how, beside=True)]
    if totals.low_rank_bytes:
        facts.append(fact("Low-rank adapter beside it", totals.low_rank_bytes, "comes on top"))
    packed = totals.compressed_bytes
    measured = [row for row in speeds(report) if _form(row) == "packed"]
    if not report.only_structure and (measured if speeds(report) else becomes_smaller_packed(report)):
        how = "packed, the same weights bit for bit: a mask and the kept values" if packed else NOT_MEASURED
        how += "; the adapter is counted" if packed and totals.low_rank_bytes else ""
        facts.append(fact("Compressed checkpoint", packed, how))
    return facts


def speed_facts(report: Report) -> list[Fact]:
    """List what ``bench`` measured; a finished run without that has one fact that says so."""
    if speeds(report):
        return form_facts(report.speed or {})
    measurable = report.status == "finished" and not report.stacked_experts
    return [Fact(SIZE, "Decoding speed, tokens/s", "–", how=NOT_MEASURED)] if measurable else []


def form_facts(measured: Mapping[str, Any]) -> list[Fact]:
    """List speed, memory and size of every form of a model, against the fastest dense form."""
    rows = [row for row in measured["speeds"] if row.get("tokens_per_second")]
    best = max((row for row in rows if _form(row) == "dense"), key=_rate, default=None)
    facts = []
    for row in rows:
        spread = " to ".join(significant(value) for value in row.get("tokens_per_second_range", ()))
        value, dense, how = significant(_rate(row)) + (f" ({spread})" if spread else ""), "", []
        if best is not None and row is not best:
            dense, how = significant(_rate(best)), [f"×{significant(_rate(row) / _rate(best))} of {best['variant']}"]
        for key, name, write in SPEED_PARTS:
            how += [f"{name} {write(row[key])}"] if row.get(key) is not None else []
        facts.append(Fact(SIZE, f"Decoding, {row['variant']}, tokens/s", value, dense, how=", ".join(how)))
    first = rows[0] if rows else {}
    conditions = ["greedy", f"batch {first['batch']}"] if "batch" in first else ["greedy"]
    for key, noun in (("prompt", "prompt token"), ("tokens", "new token"), ("threads", "thread")):
        conditions += [counted(first[key], noun)] if key in first else []
    conditions += [f"kernel {measured['kernel']}"] if "kernel" in measured else []
    conditions += [cpu] if (cpu := (measured.get("machine") or {}).get("cpu")) else []
    runs = f"median (range) of {counted(first['runs'], 'run')}" if "runs" in first else "one run"
    return [*facts, Fact(SIZE, "Speeds", runs, how=", ".join(conditions))] if facts else []


SPEED_PARTS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("first_token", "first token", duration),
    ("peak_memory", "peak memory", size),
    ("file_size", "file", size),
)
"""What is told of the speed of a form beside tokens per second: key, name, how it is written."""


def speeds_text(measured: Mapping[str, Any]) -> str:
    """Write the measurements of ``bench`` for the terminal."""
    return f"{align_columns([fact.row for fact in form_facts(measured)])}\n{QUANTISE_FIRST}"


def speeds(report: Report) -> list[dict[str, Any]]:
    """Return the rows of a speed measurement, one for each form of the model."""
    return (report.speed or {}).get("speeds") or []


def _form(row: Mapping[str, Any]) -> str:
    """Return the form of a row's model: ``dense``, ``packed`` or ``smaller``."""
    return str(row["variant"]).partition(" ")[0]


def _rate(row: Mapping[str, Any]) -> float:
    return float(row["tokens_per_second"])

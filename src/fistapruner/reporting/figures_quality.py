"""Draw what was measured on the result of a run: perplexity, divergence, zero-shot tasks."""

from __future__ import annotations

import math
from typing import Any

from ..runs.records import Report
from ..runtime.formatting import percent, percent_with_error, significant
from .drawing import INK, SERIES, Drawing, draw, label_right, style
from .evaluation_text import kl_text, perplexity_text
from .lineage_text import DONE
from .recovery_text import gain_of

OVER_WINDOWS = "Lines are one standard error over windows."


def _text_labels(report: Report) -> list[str]:
    """Name the text of every evaluation; with windows and their length where several have it."""
    texts = [evaluation.perplexity for evaluation in report.evaluations]
    data = [text.data for text in texts if text is not None]
    return [
        "" if text is None else text.data + (f", {text.windows} x {text.seqlen}" if data.count(text.data) > 1 else "")
        for text in texts
    ]


def quality_figures(report: Report) -> dict[str, Drawing]:
    """Draw all figures that there is data for, by key."""
    drawings = [perplexities(report), divergences(report), zero_shot(report)]
    return {drawing.key: drawing for drawing in drawings if drawing is not None}


def perplexities(report: Report) -> Drawing | None:
    """Draw perplexities with standard errors: dense model, before recovery, result."""
    name, rows = DONE[report.kind], []
    for evaluation, data in zip(report.evaluations, _text_labels(report), strict=True):
        text = evaluation.perplexity
        if text is not None and math.isfinite(text.perplexity):
            earlier = gain_of(report, evaluation)
            bars = [
                ("dense", evaluation.reference, SERIES[2]),
                ("before", earlier[0].perplexity if earlier else None, SERIES[1]),
                (name, text, SERIES[0]),
            ]
            known = [(label, found, color) for label, found, color in bars if found is not None]
            rows.append((data, [bar for bar in known if math.isfinite(bar[1].perplexity)]))
    if not rows:
        return None
    ends = [p.perplexity + _finite(p.standard_error) for _, row in rows for _, p, _ in row]
    bars_in_all = sum(len(row) for _, row in rows)

    def plot(figure: Any, width: int) -> None:
        axes = figure.subplots()
        position = 0.0
        ticks = []
        for data, row in rows:
            for label, found, color in row:
                error = _finite(found.standard_error)
                axes.barh(position, found.perplexity, height=0.72, color=color)
                axes.errorbar(found.perplexity, position, xerr=error, color=INK, capsize=3, linewidth=1.2)
                label_right(axes, found.perplexity + error, position, f"{found.perplexity:.2f}")
                ticks.append((position, f"{data}, {label}"))
                position += 1
            position += 0.6
        axes.set_yticks([p for p, _ in ticks], [label for _, label in ticks])
        axes.set_ylim(position - 0.9, -0.7)
        axes.set_xlim(0, 1.25 * max(ends))
        axes.set_xlabel("perplexity (lower is better)")
        style(axes, grid="x")

    return draw(
        "perplexity",
        "Perplexity",
        plot,
        caption="exp of the mean NLL of a token over non-overlapping windows; "
        "lines are one standard error over windows. All models saw the same tokens.",
        description="; ".join(
            f"{data}: " + ", ".join(f"{label} {perplexity_text(p)}" for label, p, _ in reversed(row))
            for data, row in rows
        ),
        heights=(90 + 31 * bars_in_all, 90 + 31 * bars_in_all),
        table=(
            ["data", "windows", "tokens in each", "precision", "model", "perplexity"],
            [
                [
                    f"{p.data} ({p.split})",
                    str(p.windows),
                    str(p.seqlen),
                    p.dtype,
                    label,
                    perplexity_text(p),
                ]
                for _, row in rows
                for label, p, _ in row
            ],
        ),
    )


def divergences(report: Report) -> Drawing | None:
    """Draw the KL divergence from the dense model, and tokens whose most likely successor changed."""
    rows = []
    for evaluation, data in zip(report.evaluations, _text_labels(report), strict=True):
        if evaluation.perplexity is not None and evaluation.divergence is not None:
            earlier = gain_of(report, evaluation)
            if earlier is not None and earlier[0].divergence is not None:
                rows.append((f"{data}, before", earlier[0].divergence))
            rows.append((data if report.recovery is None else f"{data}, {report.trained}", evaluation.divergence))
    rows = [(data, found) for data, found in rows if math.isfinite(found.kl)]
    if not rows:
        return None

    def plot(figure: Any, width: int) -> None:
        left, right = figure.subplots(1, 2, sharey=True) if width > 500 else figure.subplots(2, 1)
        for axes, name, values, errors, color in (
            (left, "KL, nats a token", [d.kl for _, d in rows], [d.kl_standard_error for _, d in rows], SERIES[0]),
            (
                right,
                "tokens whose top-1 changed, %",
                [100 * (1 - d.top1_agreement) for _, d in rows],
                [100 * d.top1_standard_error for _, d in rows],
                SERIES[1],
            ),
        ):
            for position, (value, error) in enumerate(zip(values, errors, strict=True)):
                spread = _finite(error)
                axes.barh(position, value, height=0.6, color=color)
                axes.errorbar(value, position, xerr=spread, color=INK, capsize=3, linewidth=1.2)
                label_right(axes, value + spread, position, significant(value))
            axes.set_yticks(range(len(rows)), [data for data, _ in rows])
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.set_xlim(0, max(1e-9, 1.4 * max(values)))
            axes.set_xlabel(name)
            style(axes, grid="x")

    return draw(
        "divergence",
        "Distance from the dense model",
        plot,
        caption=f"How far next-token distributions moved: damage that perplexity can hide. {OVER_WINDOWS}",
        description="; ".join(
            f"{data}: KL {kl_text(d, 3)}, top-1 agreement {percent(d.top1_agreement)}" for data, d in rows
        ),
        heights=(110 + 44 * len(rows), 190 + 60 * len(rows)),
        table=(
            ["data", "KL, nats a token", "top-1 agreement, %"],
            [
                [
                    n,
                    kl_text(d, 4),
                    percent_with_error(d.top1_agreement, d.top1_standard_error, 2),
                ]
                for n, d in rows
            ],
        ),
    )


def zero_shot(report: Report) -> Drawing | None:
    """Draw the zero-shot scores of the dense model and of the result, with standard errors."""
    tasks, name = [task for e in report.evaluations for task in e.tasks], DONE[report.kind]
    if not tasks:
        return None

    def plot(figure: Any, width: int) -> None:
        axes = figure.subplots()
        for row, task in enumerate(tasks):
            pairs = [
                (task.reference, task.reference_standard_error, -0.14, SERIES[2], "s"),
                (task.value, task.standard_error, 0.14, SERIES[0], "o"),
            ]
            for value, error, shift, color, marker in pairs:
                if value is not None:
                    spread = 100 * error if error is not None and math.isfinite(error) else 0.0
                    axes.errorbar(
                        100 * value, row + shift, xerr=spread, fmt=marker, color=color, markersize=6, capsize=3
                    )
        axes.set_yticks(range(len(tasks)), [f"{t.task}\n{t.metric}" for t in tasks])
        axes.set_ylim(len(tasks) - 0.5, -0.5)
        axes.set_xlabel(f"right answers, %  (square dense, dot {name})")
        style(axes, grid="x")

    return draw(
        "zero-shot",
        "Zero-shot tasks",
        plot,
        caption="Lines are one standard error over items; p is of the exact McNemar test on the same items.",
        description="; ".join(
            f"{t.task} {t.metric}: {percent(t.value)}"
            + (f", dense {percent(t.reference)}" if t.reference is not None else "")
            for t in tasks
        ),
        heights=(80 + 44 * len(tasks), 80 + 44 * len(tasks)),
        table=(
            ["task", "metric", "items", "dense, %", f"{name}, %", "lost", "won", "p"],
            [
                [
                    t.task,
                    t.metric,
                    f"{t.items} of {t.available}" if t.available else str(t.items),
                    percent_with_error(t.reference, t.reference_standard_error),
                    percent_with_error(t.value, t.standard_error),
                    str(t.lost) if t.lost is not None else "–",
                    str(t.won) if t.won is not None else "–",
                    significant(t.p_value, 2),
                ]
                for t in tasks
            ],
        ),
    )


def _finite(error: float) -> float:
    """Return a standard error, 0 where it is not defined."""
    return error if math.isfinite(error) else 0.0

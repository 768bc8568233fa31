"""Draw what was measured on the pruned model: perplexity, divergence, zero-shot tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..runs.results import Evaluation
from ..runtime.formatting import percent, significant, with_error
from .drawing import INK, SERIES, Drawing, draw, label_right, style

OVER_WINDOWS = "Lines are one standard error over windows."


def quality_figures(evaluations: Sequence[Evaluation]) -> dict[str, Drawing]:
    """Draw all figures that there is data for, by key."""
    drawings = [perplexities(evaluations), divergences(evaluations), zero_shot(evaluations)]
    return {drawing.key: drawing for drawing in drawings if drawing is not None}


def perplexities(evaluations: Sequence[Evaluation]) -> Drawing | None:
    """Draw the perplexity of the dense and the pruned model, with standard errors."""
    rows = [
        (e.perplexity, e.reference)
        for e in evaluations
        if e.perplexity is not None and math.isfinite(e.perplexity.perplexity)
    ]
    if not rows:
        return None

    def plot(figure: Any, width: int) -> None:
        axes = figure.subplots()
        position = 0.0
        ticks = []
        for pruned, dense in rows:
            pair = [(dense, SERIES[2], "dense"), (pruned, SERIES[0], "pruned")]
            for text, color, label in pair:
                if text is not None:
                    error = text.standard_error if math.isfinite(text.standard_error) else 0.0
                    axes.barh(position, text.perplexity, height=0.72, color=color)
                    axes.errorbar(text.perplexity, position, xerr=error, color=INK, capsize=3, linewidth=1.2)
                    label_right(axes, text.perplexity + error, position, f"{text.perplexity:.2f}")
                    ticks.append((position, f"{text.data}, {label}"))
                    position += 1
            position += 0.6
        axes.set_yticks([p for p, _ in ticks], [label for _, label in ticks])
        axes.set_ylim(position - 0.9, -0.7)
        axes.set_xlim(
            0,
            1.25
            * max(max(p.perplexity + (p.standard_error if math.isfinite(p.standard_error) else 0), 0) for p, _ in rows),
        )
        axes.set_xlabel("perplexity (lower is better)")
        style(axes, grid="x")

    return draw(
        "perplexity",
        "Perplexity",
        plot,
        caption="exp of the mean NLL of a token over non-overlapping windows; "
        "lines are one standard error over windows. Both models saw the same tokens.",
        description="; ".join(
            f"{p.data}: pruned {with_error(p.perplexity, p.standard_error)}"
            + (f", dense {with_error(d.perplexity, d.standard_error)}" if d else "")
            for p, d in rows
        ),
        heights=(90 + 62 * len(rows), 90 + 62 * len(rows)),
        table=(
            ["data", "windows", "tokens in each", "precision", "dense", "pruned"],
            [
                [
                    f"{p.data} ({p.split})",
                    str(p.windows),
                    str(p.seqlen),
                    p.dtype,
                    with_error(d.perplexity, d.standard_error) if d else "–",
                    with_error(p.perplexity, p.standard_error),
                ]
                for p, d in rows
            ],
        ),
    )


def divergences(evaluations: Sequence[Evaluation]) -> Drawing | None:
    """Draw the KL divergence from the dense model, and tokens whose most likely successor changed."""
    rows = [
        (e.perplexity.data, e.divergence) for e in evaluations if e.divergence is not None and e.perplexity is not None
    ]
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
                spread = error if math.isfinite(error) else 0.0
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
            f"{data}: KL {with_error(d.kl, d.kl_standard_error, 3)}, top-1 agreement {percent(d.top1_agreement)}"
            for data, d in rows
        ),
        heights=(110 + 44 * len(rows), 190 + 60 * len(rows)),
        table=(
            ["data", "KL, nats a token", "top-1 agreement, %"],
            [
                [
                    n,
                    with_error(d.kl, d.kl_standard_error, 4),
                    with_error(100 * d.top1_agreement, 100 * d.top1_standard_error, 2),
                ]
                for n, d in rows
            ],
        ),
    )


def zero_shot(evaluations: Sequence[Evaluation]) -> Drawing | None:
    """Draw the zero-shot scores of the dense and the pruned model, with standard errors."""
    tasks = [task for e in evaluations for task in e.tasks]
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
        axes.set_yticks(range(len(tasks)), [f"{t.task}{' *' if t.significant else ''}\n{t.metric}" for t in tasks])
        axes.set_ylim(len(tasks) - 0.5, -0.5)
        axes.set_xlabel("right answers, %  (square dense, dot pruned)")
        style(axes, grid="x")

    return draw(
        "zero-shot",
        "Zero-shot tasks",
        plot,
        caption="Lines are one standard error over items. A star marks a difference that the exact McNemar test "
        "on the same items finds unlikely to be chance (p < 0.05); without it, the difference is within noise.",
        description="; ".join(
            f"{t.task} {t.metric}: {percent(t.value)}"
            + (f", dense {percent(t.reference)}" if t.reference is not None else "")
            for t in tasks
        ),
        heights=(80 + 44 * len(tasks), 80 + 44 * len(tasks)),
        table=(
            ["task", "metric", "items", "dense, %", "pruned, %", "lost", "won", "p"],
            [
                [
                    t.task,
                    t.metric,
                    f"{t.items} of {t.available}" if t.available else str(t.items),
                    with_error(_scaled(t.reference), _scaled(t.reference_standard_error), 1),
                    with_error(100 * t.value, 100 * t.standard_error, 1),
                    str(t.lost) if t.lost is not None else "–",
                    str(t.won) if t.won is not None else "–",
                    significant(t.p_value, 2),
                ]
                for t in tasks
            ],
        ),
    )


def _scaled(share: float | None) -> float | None:
    return None if share is None else 100 * share

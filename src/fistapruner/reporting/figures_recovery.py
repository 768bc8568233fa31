"""Draw how a run trained."""

from __future__ import annotations

import math
from typing import Any

from ..runs.records import Report
from ..runtime.formatting import significant
from .alignment_text import PAIR_LOSS_TEXTS
from .drawing import INK, SERIES, SURFACE, Drawing, draw, style
from .recovery_text import held_out_text

TOKEN_LOSS_TEXTS = {
    "kl": "KL from the dense model, nats a token",
    "ce": "cross-entropy, nats a token",
    "mix": "mixed loss, nats a token",
}


def training_figures(report: Report) -> dict[str, Drawing]:
    """Draw all figures of the training that the report has data for, by key."""
    drawing = losses(report)
    return {} if drawing is None else {drawing.key: drawing}


def losses(report: Report) -> Drawing | None:
    """Draw the training loss of every step, the held-out loss of every check, and the step that is kept."""
    found = report.recovery
    if found is None or not (found.curve or found.checks):
        return None
    name = (PAIR_LOSS_TEXTS if report.kind == "align" else TOKEN_LOSS_TEXTS).get(found.loss, "loss, nats a token")
    asked, best = max(found.asked_steps, 1), found.best
    finite = [check for check in found.checks if math.isfinite(check.held_out)]
    kept, others = [check for check in finite if check.kept], [check for check in finite if not check.kept]

    def plot(figure: Any, width: int) -> None:
        axes = figure.subplots()
        axes.plot(
            [x for x, _ in found.curve], [y for _, y in found.curve], color=SERIES[2], linewidth=1.2, label="training"
        )
        axes.plot(
            [c.step for c in kept],
            [c.held_out for c in kept],
            "o-",
            color=SERIES[0],
            markersize=6,
            label="held out, better",
        )
        if others:
            shape = {"color": SERIES[1], "markersize": 6, "markerfacecolor": SURFACE, "markeredgewidth": 1.6}
            axes.plot(
                [c.step for c in others], [c.held_out for c in others], "o", label="held out, not better", **shape
            )
        if best is not None:
            axes.axvline(best.step, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            left = best.step > 0.6 * asked
            axes.annotate(
                f"step {best.step}: kept",
                (best.step, 1),
                xycoords=("data", "axes fraction"),
                xytext=(-6 if left else 6, -4),
                textcoords="offset points",
                ha="right" if left else "left",
                va="top",
                color=INK,
                fontsize=11,
            )
        axes.set_xlim(-0.02 * asked, 1.02 * asked)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(name)
        axes.margins(y=0.14)
        style(axes)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3 if width > 500 else 1, columnspacing=1.2)

    by_task = list(found.checks[0].by_task) if found.checks else []
    return draw(
        "training",
        "Training and held-out loss",
        plot,
        caption=f"{name[0].upper() + name[1:]}, the mean. The training loss is that of each step, before it. The "
        "weights of the check with the lowest held-out loss are kept, those before training included.",
        description=f"Lines over {found.steps} of {found.asked_steps} steps. Held-out loss {held_out_text(found)}.",
        heights=(340, 380),
        full=True,
        table=(
            ["step", "held-out loss", *by_task, "weights"],
            [
                [
                    str(check.step),
                    significant(check.held_out, 5),
                    *(significant(check.by_task.get(task), 5) for task in by_task),
                    "kept" if check.kept else "not better",
                ]
                for check in found.checks
            ],
        ),
    )

"""Say in words and numbers what a recovery run won back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..runs.records import Report
from ..runs.results import Evaluation, Perplexity
from ..runs.training_records import Recovery
from ..runtime.formatting import count, counted, percent, percent_with_error, short_count, significant


@dataclass(frozen=True)
class Gain:
    """What recovery changed on one text.

    Args:
        closed: share of the gap to the dense model, ln(perplexity before / dense), that is closed; ``closed_error``:
            its standard error, paired over windows (delta method). None without a dense model, and where the gap is
            not above twice its own standard error: a share of noise says nothing.
    """

    closed: float | None = None
    closed_error: float | None = None


def gain(before: Evaluation, after: Evaluation) -> Gain | None:
    """Compare two evaluations of the same windows; None where they are not.

    With the gaps b and a before and after recovery, the share r = 1 - a / b is closed. To first order its error is
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
    """Find the evaluation of a run's input that belongs to one of its result.

    An alignment is not made to close the gap to the dense model, so of one no share of it is told.
    """
    for before in report.recovery.before if report.recovery else []:
        if (found := gain(before, after)) is not None:
            return before, found if report.kind != "align" else replace(found, closed=None, closed_error=None)
    return None


def closed_text(found: Gain) -> str:
    """Write the share of the gap that is closed: ``34.1 ± 1.2 %``."""
    if found.closed is None:
        return "–"
    return percent_with_error(found.closed, found.closed_error) + " %"


def gain_text(before: Evaluation, after: Evaluation, training: str) -> str:
    """Say in one line what recovery or alignment changed on a text; empty where that is not known.

    As in :func:`gain_of`, no share of the gap is told of an alignment.
    """
    found, old, new = gain(before, after), before.perplexity, after.perplexity
    if found is None or old is None or new is None:
        return ""
    dense = after.reference or before.reference
    text = f"perplexity on {new.data}: {old.perplexity:.2f} before {training}, {new.perplexity:.2f} after it"
    if dense is not None:
        text += f", {dense.perplexity:.2f} dense"
    shown = found.closed is not None and training != "alignment"
    return f"{text}: {closed_text(found)} of the gap is closed" if shown else text


def held_out_text(found: Recovery) -> str:
    """Say how the held-out loss changed and which step is kept; empty before the first check."""
    start, best = found.start, found.best
    if start is None or best is None:
        return ""
    if best.step == 0:
        others = len(found.checks) - 1
        return f"{start.held_out:.4f} before training" + (
            f": none of {counted(others, 'check')} is better, the weights of the input are kept" if others else ""
        )
    return f"{start.held_out:.4f} → {best.held_out:.4f} at step {best.step} of {found.asked_steps}, which is kept"


def task_losses(found: Recovery) -> list[tuple[str, float, float]]:
    """List name, held-out loss before and at the kept step of every task; empty where there is one text."""
    start, best = found.start, found.best
    if start is None or best is None:
        return []
    return [(name, loss, best.by_task[name]) for name, loss in start.by_task.items() if name in best.by_task]


def trained_text(found: Recovery) -> str:
    """Say how many numbers were trained and at which first learning rates."""
    rates = sorted(set(found.lr.values()))
    spread = " to ".join(significant(rate, 2) for rate in (rates if len(rates) < 2 else [rates[0], rates[-1]]))
    text = f"{count(found.trained)} numbers" + (f" of {count(found.operators)} operators" if found.operators else "")
    return text + (f", first learning rate {spread}" if rates else "")


def change_text(report: Report) -> str:
    """Say what share of the surviving weights changed, and where most if any did; empty where unknown."""
    found = report.recovery
    if found is None or found.changed is None:
        return ""
    text = f"{percent(found.changed)} of the surviving weights"
    moved = [(operator.change, layer.index, operator.name) for layer in report.layers for operator in layer.operators]
    known = [(change, index, name) for change, index, name in moved if change]
    if known:
        change, index, name = max(known)
        text += f"; largest ‖ΔW‖ / ‖W‖ {percent(change, 2)} (layer {index}, {name})"
    return text


def text_used(report: Report, source: str | None = None) -> str:
    """Say on what a recovery run trained: text, windows and documents of either side.

    Args:
        report: of the run.
        source: what to call the text; its path by default.
    """
    found, used = report.recovery, report.calibration
    if found is None or used is None:
        return ""
    sides = [
        (found.windows, found.documents, "to train on"),
        (found.held_out_windows, found.held_out_documents, "held out"),
    ]
    shown = [
        counted(windows, "window") + (f" ({counted(documents, 'document')})" if documents else "") + f" {what}"
        for windows, documents, what in sides
    ]
    passed = f"; {short_count(found.tokens)} tokens with loss passed" if found.tokens else ""
    return f"{source or used.source}: {', '.join(shown)}, {used.seqlen} tokens each{passed}"


def _differences(a: Perplexity, b: Perplexity) -> list[float]:
    """Subtract window by window; empty where the figures of single windows were not recorded."""
    if len(a.window_nlls) != len(b.window_nlls):
        return []
    return [x - y for x, y in zip(a.window_nlls, b.window_nlls, strict=True)]


def _error(values: Sequence[float]) -> float:
    """Return the standard error of a mean; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))

"""Say for the terminal what a run did, and where a run stands that is not finished."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import out_path, printable
from ..runs.log import holder
from ..runs.records import FIGURES, RUNS, Recovery, Report, is_run, load_comparison, load_run
from ..runtime.show import align_columns, duration, finite, percent, shell_line
from .figures import mean_error

RECENT_STEPS = 8
"""Steps whose mean is shown as the training loss: that of one step is noisy."""

AGAIN = "running again"
"""Status of a run that a process works on, and whose report is of an attempt that failed."""


@dataclass(frozen=True)
class Status:
    """Where a run or a comparison stands; printed as ``fistapruner status`` prints it."""

    text: str
    facts: dict[str, Any]

    def __str__(self) -> str:
        return self.text

    def to_json(self) -> dict[str, Any]:
        """Return the facts."""
        return self.facts


def status(folder: str | Path) -> Status:
    """Say how far a run or a comparison is, from another process or after it stopped.

    Args:
        folder: the run directory, or the folder of a comparison.

    Raises:
        FistaPrunerError: the folder holds neither, or its files are broken.
    """
    folder = out_path(folder, name="run")
    if (folder / FIGURES).is_file():
        return _comparison(folder)
    if (folder / "log.txt").is_file() and not is_run(folder):
        at_work, said = holder(folder), "stopped before anything was decided; give its command again"
        if at_work is not None:
            said = f"being prepared by process {at_work['pid']} on {at_work['host']}"
        return Status(f"{folder}: {said}", {"status": "preparing", "working": bool(at_work)})
    report, working = load_run(folder), holder(folder) is not None
    text = status_text(report, alive=working)
    return Status(text, {**status_facts(report, alive=working), "working": working})


def _comparison(folder: Path) -> Status:
    """Say which rows a comparison has done, and how far the run is that is at work."""
    rows = len(load_comparison(folder).rows)
    runs = sorted((folder / RUNS).glob("*"))
    at_work = next((run for run in runs if holder(run) is not None), None)
    working = holder(folder) is not None or at_work is not None
    text = f"{folder}: comparison, {rows} rows done, " + ("running" if working else "no process works on it")
    if at_work is not None:
        text += f"\n{status(at_work)}"
    elif runs:
        text += f"\nfor one of its {len(runs)} runs: {shell_line('status', folder / RUNS / '...')}"
    return Status(text, {"rows_done": rows, "working": working, "run": at_work and str(at_work)})


def status_facts(report: Report, now: datetime | None = None, *, alive: bool | None = None) -> dict[str, Any]:
    """Return progress as JSON values: layers or steps done, errors or losses, times.

    The seconds left are an estimate from the time that the finished layers or steps took; None before the first one.

    Durations end at ``now``; ``alive`` says whether a process works on it, None if that is not known.
    """
    now = now or datetime.now(UTC)
    progress = _layer_facts(report, now) if report.recovery is None else _step_facts(report, report.recovery, now)
    return {
        "status": AGAIN if alive and report.status == "failed" else report.status,
        "measured": bool(report.evaluations),
        "error": report.error,
        "model": report.model.source,
        "method": report.method,
        "sparsity": report.sparsity,
        **progress,
        "seconds_since_start": _since(report.started, now),
        "warnings": report.warnings,
    }


def _step_facts(report: Report, found: Recovery, now: datetime) -> dict[str, Any]:
    left = None
    if report.status == "running" and found.steps:
        left = found.seconds / found.steps * (found.asked_steps - found.steps)
    recent = [loss for _, loss in found.curve[-RECENT_STEPS:]]
    return {
        "steps_done": found.steps,
        "steps": found.asked_steps,
        "training_loss": finite(sum(recent) / len(recent)) if recent else None,
        "held_out": [
            {"step": check.step, "loss": finite(check.held_out), "kept": check.kept} for check in found.checks
        ],
        "kept_step": found.kept_step,
        "tokens": found.tokens,
        "seconds_since_last_step": _since(found.last_step, now),
        "seconds_left": left,
    }


def _layer_facts(report: Report, now: datetime) -> dict[str, Any]:
    done, total = len(report.layers), report.model.layers
    took = _worked(report, now)
    last = [layer.finished for layer in report.layers if layer.finished]
    return {
        "layers_done": done,
        "layers": total,
        "mean_relative_error": report.mean_error,
        "seconds_since_last_layer": _since(max(last), now) if last else None,
        "seconds_left": None if report.status != "running" or not took else (total - done) * took / done,
    }


def _worked(report: Report, now: datetime) -> float:
    """Return the seconds in which at least one of the finished layers was worked on: workers share them."""
    found = ((_since(layer.finished, now), sum(layer.seconds.values())) for layer in report.layers)
    worked, until = 0.0, -math.inf
    for begin, end in sorted((-ago - took, -ago) for ago, took in found if ago is not None):
        worked += max(0.0, end - max(begin, until))
        until = max(until, end)
    return worked


def status_text(report: Report, *, alive: bool | None = None, now: datetime | None = None) -> str:
    """Write :func:`status_facts` as text, with a line for each layer or check that is done."""
    found = status_facts(report, now, alive=alive)
    state, error = str(found["status"]), report.error
    if state == AGAIN:
        state, error = f"{state}; the last attempt failed: {error}", None
    elif state == "running" and alive is False:
        state = "stopped: no process works on it; give the same command again to go on"
    elif state == "finished" and alive:
        state += "; a process works on it"
    about = f"{report.model.source}: {report.method}, {report.sparsity}"
    if report.recovery is not None:
        how = report.method.partition(": ")[2]
        about = f"{report.model.source}, {report.sparsity}, {report.training} ({how})"
    lines = [f"{about}: {state}"]
    lines += [f"error: {error}"] if error else []
    left = f", about {duration(found['seconds_left'])} left" if found["seconds_left"] and alive is not False else ""
    if report.recovery is None:
        lines.append(f"{_bar(found['layers_done'], found['layers'])} decoder layers{left}")
        rows = _layer_rows(report)
    else:
        lines.append(f"{_bar(found['steps_done'], found['steps'])} steps{left}")
        if found["training_loss"] is not None:
            lines.append(f"training loss {found['training_loss']:.4f}")
        rows = [
            ("", f"step {check.step}", f"held-out loss {check.held_out:.4f}", "kept" if check.kept else "not better")
            for check in report.recovery.checks
        ]
    lines += align_columns(rows, right=(3,)).splitlines() if rows else []
    return "\n".join(map(printable, [*lines, *(f"warning: {warning}" for warning in report.warnings)]))


def _bar(done: int, total: int) -> str:
    filled = round(30 * done / total) if total else 0
    return ("#" * filled + "-" * (30 - filled) if total else "") + f" {done} of {total}"


def _layer_rows(report: Report) -> list[tuple[str, ...]]:
    """List error, operator with the largest error and time of every finished layer."""
    rows: list[tuple[str, ...]] = []
    for layer in report.layers:
        worst = max(layer.judged, key=lambda operator: operator.relative_error or 0.0, default=None)
        largest = "" if worst is None else f"largest {percent(worst.relative_error)} ({worst.name})"
        took = duration(sum(layer.seconds.values())) if layer.seconds else "–"
        rows.append(("", f"layer {layer.index:>3}", f"error {percent(mean_error(layer)):>8}", took, largest))
    return rows


def _since(moment: str | None, now: datetime) -> float | None:
    if not moment:
        return None
    try:
        then = datetime.fromisoformat(moment)
    except ValueError:
        return None
    return max(0.0, (now - (then if then.tzinfo else then.replace(tzinfo=UTC))).total_seconds())

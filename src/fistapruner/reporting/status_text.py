"""Say where a run stands, for another terminal."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from ..runs.records import Report
from ..runtime.formatting import align_columns, duration, percent
from .layer_errors import mean_error


def status_facts(report: Report, now: datetime | None = None) -> dict[str, Any]:
    """Return progress as JSON values: layers done, mean error, seconds since the start and left.

    The seconds left are an estimate from the mean time of the finished layers; None before the first one.
    """
    now = now or datetime.now(UTC)
    done, total = len(report.layers), report.model.layers
    times = [sum(layer.seconds.values()) for layer in report.layers if layer.seconds]
    left = None if report.status != "running" or not times else (total - done) * sum(times) / len(times)
    errors = [op.relative_error for layer in report.layers for op in layer.operators if op.relative_error is not None]
    last = [layer.finished for layer in report.layers if layer.finished]
    return {
        "status": report.status,
        "error": report.error,
        "model": report.model.source,
        "method": report.method,
        "sparsity": report.sparsity,
        "layers_done": done,
        "layers": total,
        "mean_relative_error": sum(errors) / len(errors) if errors else None,
        "seconds_since_start": _since(report.started, now),
        "seconds_since_last_layer": _since(max(last), now) if last else None,
        "seconds_left": left,
        "warnings": report.warnings,
    }


def status_text(report: Report, *, alive: bool | None = None, now: datetime | None = None) -> str:
    """Write progress as text, with a line for every finished layer.

    Args:
        report: of the run, finished or not.
        alive: whether a process works on it now; None if that is not known.
        now: time that durations end at; the present by default.
    """
    found = status_facts(report, now)
    state = str(found["status"])
    if state == "running" and alive is not None:
        state = "running" if alive else "stopped: no process works on it; give the same command again to go on"
    lines = [f"{found['model']}: {found['method']}, {found['sparsity']}: {state}"]
    if report.error:
        lines.append(f"error: {report.error}")
    done, total = found["layers_done"], found["layers"]
    bar = "█" * round(30 * done / total) + "░" * (30 - round(30 * done / total)) if total else ""
    left = f", about {duration(found['seconds_left'])} left" if found["seconds_left"] and alive is not False else ""
    lines.append(f"{bar} {done} of {total} decoder layers{left}")
    if found["mean_relative_error"] is not None:
        operators = [(layer, operator) for layer in report.layers for operator in layer.operators]
        layer, operator = max(operators, key=lambda pair: pair[1].relative_error or 0.0)
        lines.append(
            f"relative error: mean {percent(found['mean_relative_error'])}, worst {percent(operator.relative_error)} "
            f"(layer {layer.index}, {operator.name})"
        )
    spent = [duration(sum(layer.seconds.values())) if layer.seconds else "–" for layer in report.layers]
    rows = [
        ("", f"layer {layer.index:>3}", f"error {percent(mean_error(layer)):>8}", time)
        for layer, time in zip(report.layers, spent, strict=True)
    ]
    lines += [align_columns(rows, right=(3,))] if rows else []
    lines += [f"warning: {warning}" for warning in report.warnings]
    return "\n".join(lines)


def _since(moment: str | None, now: datetime) -> float | None:
    if not moment:
        return None
    try:
        then = datetime.fromisoformat(moment)
    except ValueError:
        return None
    return max(0.0, (now - (then if then.tzinfo else then.replace(tzinfo=UTC))).total_seconds())

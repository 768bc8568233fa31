"""Say what structure was removed from a model: widths, parameters, operations, errors."""

from __future__ import annotations

from collections.abc import Sequence

from ..runs.layer_records import RemovalEntry
from ..runs.records import Report
from ..runtime.formatting import count, percent, significant, span
from .rendering import Table

PLACES = {"experts": "mixture", "expert channels": "expert", "shared expert channels": "shared expert"}
"""Where so many of a unit are; in decoder layers without an entry."""


def kept_units(report: Report) -> list[tuple[str, str, str]]:
    """List what was removed, its number in the dense model, and what stays in a layer."""
    kept = {
        unit: span(removal.after for layer in report.layers for removal in layer.removals if removal.unit == unit)
        for unit in report.widths
    }
    return [(unit, count(before), kept[unit]) for unit, (before, _) in report.widths.items()]


def structure_rows(report: Report) -> list[tuple[str, str]]:
    """List name and value of what was removed; empty where nothing was."""
    if not report.widths:
        return []
    totals = report.totals
    rows = [
        ("structure", f"{after} of {before} {unit} in every {_place(report, unit)}")
        for unit, before, after in kept_units(report)
    ]
    if totals.model_weights and report.model.parameters:
        rows.append(("parameters", change(report.model.parameters, totals.model_weights)))
    if totals.flops_per_token and totals.dense_flops_per_token:
        how = "matrices of the decoder layers and head; attention between tokens comes on top"
        rows.append(("FLOP a token", f"{change(totals.dense_flops_per_token, totals.flops_per_token)}  {how}"))
    return rows


def structure_sentence(report: Report) -> str:
    """Say what this run removed; empty where it removed nothing."""
    if not report.widths:
        return ""
    kept: dict[str, list[str]] = {}
    for unit, before, after in kept_units(report):
        kept.setdefault(_place(report, unit), []).append(f"{after} of {before} {unit}")
    text = "; ".join(f"every {place} keeps {' and '.join(units)}" for place, units in kept.items())
    text = text.replace("every", "Every", 1)
    weights, dense = report.totals.model_weights, report.model.parameters
    return f"{text}: {count(weights)} of {count(dense)} parameters." if weights and dense else f"{text}."


def _place(report: Report, unit: str) -> str:
    """Name what has so many of a unit: a mixture, an expert, or the decoder layers that lost some."""
    if unit in PLACES:
        return PLACES[unit]
    all_have = all(any(removal.unit == unit for removal in layer.removals) for layer in report.layers)
    return "decoder layer" if all_have else f"decoder layer with {unit}"


def structure_table(report: Report) -> Table:
    """Tabulate the widths and errors of every decoder layer; of a mixture's experts the means."""
    rows = []
    for layer in report.layers:
        alike: dict[str, list[RemovalEntry]] = {}
        for removal in layer.removals:
            text = f"{removal.unit} {removal.before} → {removal.after}{_without(removal)}"
            alike.setdefault(text, []).append(removal)
        for text, removals in alike.items():
            shrink = _mean([removal.shrink for removal in removals])
            dense = [(removal.dense_error or 0.0) if removal.kept is None else None for removal in removals]
            rows.append(
                (
                    str(layer.index),
                    f"{text}, mean of {count(len(removals))} experts" if len(removals) > 1 else text,
                    significant(shrink) if shrink is not None else "–",
                    percent(_mean(dense)),
                    percent(_mean([removal.dropped_error for removal in removals])),
                    percent(_mean([removal.relative_error for removal in removals])),
                    percent(_mean([removal.validated_dropped for removal in removals])),
                    percent(_mean([removal.validated_error for removal in removals])),
                )
            )
    head = (
        "layer",
        "removed",
        "shrinkage",
        "error of all channels",
        "others as they were",
        "as written",
        "fresh, as they were",
        "fresh, as written",
    )
    return Table("Removed structure by layer", head, rows, numeric=(0, 2, 3, 4, 5, 6, 7), stack=True)


def _mean(values: Sequence[float | None]) -> float | None:
    """Average the values that are known; None where none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _without(removal: RemovalEntry) -> str:
    """Name the experts that were removed; empty where channels were."""
    if removal.kept is None:
        return ""
    return ", without " + ", ".join(str(number) for number in range(removal.before) if number not in removal.kept)


def change(before: float, after: float) -> str:
    """Write a count before and after, and the change in percent."""
    return f"{count(round(before))} → {count(round(after))} ({100 * (after / before - 1):+.1f} %)"

"""Say what structure was removed from a model: widths, parameters, operations, errors."""

from __future__ import annotations

from itertools import chain

from ..runs.layer_records import RemovalEntry
from ..runs.records import Report
from ..runtime.formatting import count, percent, significant, span
from .rendering import Table

ONLY_HERE = "Widths differ: transformers loads it after import fistapruner, other engines refuse it."
"""What is said of free widths."""


def has_free_widths(report: Report) -> bool:
    """Return whether layers have widths of their own."""
    return report.structured and report.pruning["structure"].get("widths") == "free"


def kept_units(report: Report) -> list[tuple[str, str, str]]:
    """List what was removed, its number in the dense model, and what stays in a layer."""
    free = has_free_widths(report)  # a layer may lose nothing
    found = []
    for unit, (before, _) in report.widths.items():
        by_layer = [[removal.after for removal in layer.removals if removal.unit == unit] for layer in report.layers]
        found.append((unit, count(before), span(chain.from_iterable(kept or [before] * free for kept in by_layer))))
    return found


def structure_rows(report: Report) -> list[tuple[str, str]]:
    """List name and value of what was removed; empty where nothing was."""
    if not report.widths:
        return []
    totals = report.totals
    rows = [
        ("structure", f"{after} of {before} {unit} in every {'mixture' if unit == 'experts' else 'decoder layer'}")
        for unit, before, after in kept_units(report)
    ]
    if totals.model_weights and report.model.parameters:
        rows.append(("parameters", change(report.model.parameters, totals.model_weights)))
    if totals.flops_per_token and totals.dense_flops_per_token:
        how = "matrices of the decoder layers and head; attention between tokens comes on top"
        rows.append(("FLOP a token", f"{change(totals.dense_flops_per_token, totals.flops_per_token)}  {how}"))
    return rows


def structure_sentence(report: Report) -> str:
    """Say what this run removed, and who cannot load the result; empty where there is nothing to say."""
    only_here = ONLY_HERE if has_free_widths(report) else ""
    if not report.widths:
        return only_here
    units = [f"{after} of {before} {unit}" for unit, before, after in kept_units(report)]
    subject = "Every mixture keeps" if list(report.widths) == ["experts"] else "Every decoder layer keeps"
    text = f"{subject} {' and '.join(units)}"
    weights, dense = report.totals.model_weights, report.model.parameters
    text = f"{text}: {count(weights)} of {count(dense)} parameters." if weights and dense else f"{text}."
    return f"{text} {only_here}".strip()


def structure_table(report: Report) -> Table:
    """Tabulate the widths and errors of every decoder layer."""
    rows = [
        (
            str(layer.index),
            f"{removal.unit} {removal.before} → {removal.after}{_without(removal)}",
            significant(removal.shrink) if removal.shrink is not None else "–",
            percent((removal.dense_error or 0.0) if removal.kept is None else None),
            percent(removal.dropped_error),
            percent(removal.relative_error),
            percent(removal.validated_dropped),
            percent(removal.validated_error),
        )
        for layer in report.layers
        for removal in layer.removals
    ]
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


def _without(removal: RemovalEntry) -> str:
    """Name the experts that were removed; empty where channels were."""
    if removal.kept is None:
        return ""
    return ", without " + ", ".join(str(number) for number in range(removal.before) if number not in removal.kept)


def change(before: float, after: float) -> str:
    """Write a count before and after, and the change in percent."""
    return f"{count(round(before))} → {count(round(after))} ({100 * (after / before - 1):+.1f} %)"

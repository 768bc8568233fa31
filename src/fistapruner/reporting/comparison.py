"""Write a comparison as a table, for the terminal and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..runs.comparison_records import CompareRow, Comparison
from ..runtime.formatting import align_columns, counted, duration, size
from .rendering import render

HEADER = (
    "method",
    "sparsity",
    "seed",
    "perplexity",
    "gap",
    "mean relative error",
    "time",
    "of it solving",
    "peak memory",
    "zeros",
)


def by_quality(rows: Sequence[CompareRow]) -> list[CompareRow]:
    """Sort rows by sparsity, in order of first appearance, then by gap, smallest first; failed rows last."""
    patterns = list(dict.fromkeys(row.sparsity for row in rows))
    return sorted(rows, key=lambda row: (patterns.index(row.sparsity), math.inf if row.gap is None else row.gap))


def comparison_table(comparison: Comparison) -> str:
    """Write the rows in aligned columns, the protocol above them."""
    table = align_columns([HEADER, *map(_cells, by_quality(comparison.rows))])
    failed = failures(comparison)
    return "\n".join([*comparison_lines(comparison), "", table, *(["", *failed] if failed else [])])


def comparison_markdown(comparison: Comparison) -> str:
    """Write the comparison as Markdown, ``DIR/compare.md``."""
    return render(
        "compare.md.j2",
        source=comparison.model.source,
        protocol=comparison_lines(comparison),
        head=HEADER,
        rows=list(map(_cells, by_quality(comparison.rows))),
        failures=failures(comparison),
    )


def comparison_lines(comparison: Comparison) -> list[str]:
    """Say what all rows share, one sentence a line."""
    lines = []
    if (dense := comparison.dense) is not None:
        lines.append(
            f"dense: perplexity {dense.perplexity:.2f} on {dense.data} ({dense.split}), "
            f"{counted(dense.windows, 'window')} of {dense.seqlen} tokens, {dense.dtype}; "
            "gap = ln(perplexity) - ln(dense perplexity)"
        )
    if (facts := comparison.calibration) is not None:
        text = f"{facts.source}, {facts.samples} windows of {facts.seqlen} tokens, {facts.how}"
        lines.append(f"calibration: {text}, seed as in the table")
    machine = comparison.machine
    if machine.cpu or machine.device_name:
        threads = f", {counted(machine.threads, 'thread')}" if machine.threads else ""
        lines.append(f"machine: {machine.device_name or machine.cpu}{threads}")
    return lines


def failures(comparison: Comparison) -> list[str]:
    """List the rows that failed, and why."""
    return [f"{row.name}, {row.sparsity}, seed {row.seed}: {row.error}" for row in comparison.rows if row.error]


def _cells(row: CompareRow) -> tuple[str, ...]:
    share = row.zeros_share
    return (
        row.name,
        row.sparsity,
        str(row.seed),
        "failed" if row.error else ("–" if row.perplexity is None else f"{row.perplexity.perplexity:.2f}"),
        "–" if row.gap is None else f"{row.gap:z.4f}",
        "–" if row.relative_error is None else f"{100 * row.relative_error:.2f} %",
        duration(row.seconds),
        duration(row.time_split.get("solve")),
        size(row.peak_memory),
        ("–" if share is None else f"{100 * share:.4f} %") + row.beside_zeros,
    )

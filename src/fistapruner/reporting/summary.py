"""Sum a finished run up in a few lines, for the terminal."""

from __future__ import annotations

from pathlib import Path

from ..errors import printable
from ..runs.records import Report
from ..runtime.formatting import align_columns
from .advice import next_steps
from .fact import ORIGIN
from .facts import facts


def summary(report: Report) -> str:
    """Write the table that is printed at the end of a run."""
    folder = Path(report.folder or "RUN")
    rows = [
        fact.row
        for fact in facts(report)
        if fact.after not in ("", "–") and (fact.section != ORIGIN or fact.label in ("Model", "Lineage"))
    ]
    rows += [("warning", printable(warning)) for warning in report.warnings]
    rows.append(("checkpoint", str(folder / "model")))
    if report.totals.low_rank_weights:
        rows.append(("adapter", str(folder / "adapter")))
    rows += [("next", f"{command}  {what}") for command, what in next_steps(report, folder)]
    return align_columns(rows)

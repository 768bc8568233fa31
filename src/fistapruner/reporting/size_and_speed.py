"""Say how large and how fast a model is, in each of its forms. What was not measured is said to be so."""

from __future__ import annotations

import math
from typing import Any

from ..runs.records import Report
from ..runtime.formatting import counted, duration, significant, size
from .fact import SIZE, Fact

NOT_MEASURED = "not measured; 'fistapruner bench RUN' measures it"

INT8 = "packed int8"
"""The form that rounds the weights, so that its quality is its own."""


def becomes_smaller_packed(report: Report) -> bool:
    """Check whether ``pack`` takes the model as it is, and leaves out more zeros than a mask has bits."""
    bits = 16 if report.model.dtype == "bfloat16" else 0
    return report.packable and bits * (report.totals.operator_zeros or 0) > (report.totals.operator_weights or math.inf)


def size_facts(report: Report) -> list[Fact]:
    """List the size of the weight files as written, and packed if that makes them smaller."""
    totals, dense = report.totals, report.origin.bytes
    if not totals.checkpoint_bytes:
        return []

    def fact(label: str, value: int | None, how: str, *, beside: bool = False) -> Fact:
        times = f"×{significant(value / dense)} of dense; " if value and dense else ""
        return Fact(SIZE, label, size(value), size(dense) if beside and dense else "", how=times + how)

    how = "fewer parameters" if report.only_structure else "zeros are stored as they are"
    facts = [fact("Checkpoint on disk", totals.checkpoint_bytes, how, beside=True)]
    if totals.low_rank_bytes:
        facts.append(fact("Low-rank adapter beside it", totals.low_rank_bytes, "comes on top"))
    packed = totals.compressed_bytes
    measured = [row for row in speeds(report) if _form(row) == "packed"]
    if not report.only_structure and (measured if speeds(report) else becomes_smaller_packed(report)):
        how = "packed, the same weights bit for bit: a mask and the kept values" if packed else NOT_MEASURED
        how += "; the adapter is counted" if packed and totals.low_rank_bytes else ""
        facts.append(fact("Compressed checkpoint", packed, how))
    return facts


def speed_facts(report: Report) -> list[Fact]:
    """List speed, memory and size of every form that was measured, against the fastest dense form.

    A finished run without measurements has one fact that says so.
    """
    rows = [row for row in speeds(report) if row.get("tokens_per_second")]
    if not rows:
        measurable = report.status == "finished" and report.packable and not speeds(report)
        return [Fact(SIZE, "Decoding speed, tokens/s", "–", how=NOT_MEASURED)] if measurable else []
    best = max((row for row in rows if _form(row) == "dense"), key=_rate, default=None)
    facts = []
    for row in rows:
        spread = " to ".join(significant(value) for value in row.get("tokens_per_second_range", ()))
        value = significant(_rate(row)) + (f" ({spread})" if spread else "")
        against = best is not None and row is not best
        parts = [
            f"×{significant(_rate(row) / _rate(best))} of {best['variant']}" if best is not None and against else "",
            *(
                f"{name} {write(row[key])}"
                for key, name, write in (
                    ("first_token", "first token", duration),
                    ("peak_memory", "peak memory", size),
                    ("file_size", "file", size),
                    ("perplexity", "perplexity", significant),
                    ("kl", "KL", significant),
                )
                if row.get(key) is not None
            ),
        ]
        dense = significant(_rate(best)) if best is not None and against else ""
        how = ", ".join(part for part in parts if part)
        facts.append(Fact(SIZE, f"Decoding, {row['variant']}, tokens/s", value, dense, how=how))
    first = rows[0]
    conditions = [
        "greedy",
        f"batch {first['batch']}" if "batch" in first else "",
        counted(first["prompt"], "prompt token") if "prompt" in first else "",
        counted(first["tokens"], "new token") if "tokens" in first else "",
        counted(first["threads"], "thread") if first.get("device") != "cuda" and "threads" in first else "",
        str(((report.speed or {}).get("machine") or {}).get("cpu") or ""),
    ]
    runs = f"median (range) of {counted(first['runs'], 'run')}" if "runs" in first else "one run"
    return [*facts, Fact(SIZE, "Speeds", runs, how=", ".join(part for part in conditions if part))]


def speeds(report: Report) -> list[dict[str, Any]]:
    """Return the rows of a speed measurement, one for each form of the model."""
    rows = (report.speed or {}).get("speeds")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _form(row: dict[str, Any]) -> str:
    """Return the form of a row's model: ``dense``, ``packed``, ``smaller`` or ``llama.cpp``."""
    return str(row.get("variant", "")).partition(" ")[0]


def _rate(row: dict[str, Any]) -> float:
    return float(row["tokens_per_second"])

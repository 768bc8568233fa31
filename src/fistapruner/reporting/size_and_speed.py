"""List size and speed of a pruned model beside the dense one.

What was not measured is listed as such.
"""

from __future__ import annotations

import math
from typing import Any

from ..runs.records import Report
from ..runtime.formatting import count, counted, duration, percent, significant, size

Row = tuple[str, str, str, str, str]
"""Measure, dense, pruned, change, how it was measured."""

NOT_MEASURED = "not measured; 'fistapruner bench RUN' measures it"

INT8 = "packed int8"
"""The form that rounds the weights, so that its quality is its own."""

QUANTISE_FIRST = (
    "Where a smaller file is all you want, quantise first: at the same size 4 or 8 bits cost less quality in what was "
    "measured; a model without some of its channels (--structure) can be quantised, too ('fistapruner export')."
)
"""Said beside sizes; measured in ``docs/smaller.md``."""


def speeds(report: Report) -> list[dict[str, Any]]:
    """Return the rows of a speed measurement, one for each form of the model."""
    rows = (report.speed or {}).get("speeds")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def dense_speed(report: Report) -> dict[str, Any] | None:
    """Find the fastest dense form, with which the others are compared."""
    return fastest(_dense_rows(report))


def smaller_speeds(report: Report) -> list[dict[str, Any]]:
    """Return the forms of a model that has lost channels or heads, the fastest first."""
    return sorted((row for row in speeds(report) if _is_smaller(row) and _rate(row)), key=lambda row: -_rate(row))


def packed_speeds(report: Report) -> list[dict[str, Any]]:
    """Return the packed forms, in the order in which they were measured."""
    return [row for row in speeds(report) if _is_packed(row) and _rate(row)]


def gguf_speeds(report: Report) -> list[dict[str, Any]]:
    """Return the rows of GGUF files."""
    return [row for row in speeds(report) if _is_gguf(row)]


def has_quality(report: Report) -> bool:
    """Check whether quality stands beside speed."""
    return any(row.get("perplexity") for row in speeds(report))


def becomes_smaller_packed(report: Report) -> bool:
    """Check whether ``pack`` takes the model as it is, and leaves out more zeros than a mask has bits."""
    bits = 16 if report.model.dtype == "bfloat16" else 0
    return report.packable and bits * (report.totals.operator_zeros or 0) > (report.totals.operator_weights or math.inf)


def low_rank_sentence(report: Report) -> str:
    """Say what low-rank parts add to the weights; empty where there are none."""
    totals = report.totals
    if not totals.low_rank_weights:
        return ""
    share = low_rank_share(report)
    beside = f", {share} of the {report.counted}' weights" if share else ""
    return (
        f"Beside its zeros every pruned operator has a low-rank part of rank {totals.low_rank}: "
        f"{count(totals.low_rank_weights)} additional weights{beside} ({size(totals.low_rank_bytes)}), in a LoRA "
        "adapter, a folder of its own. Perplexity, divergence, task scores and errors are of both parts together, "
        "zeros and the checkpoint's size of the sparse part."
    )


def low_rank_share(report: Report) -> str:
    """Write what low-rank parts add to the operators' weights; empty where only some were trained."""
    totals = report.totals
    if report.recovery is not None or not (totals.low_rank_weights and totals.operator_weights):
        return ""
    return percent(totals.low_rank_weights / totals.operator_weights)


def size_rows(report: Report) -> list[Row]:
    """List the size of the weight files as written, and packed if that makes them smaller."""
    totals, dense = report.totals, report.origin.bytes
    rows = []
    if totals.checkpoint_bytes:
        change = _times(totals.checkpoint_bytes, dense)
        how = "fewer parameters" if report.only_structure else "zeros are stored as they are"
        rows.append(("Checkpoint on disk", size(dense), size(totals.checkpoint_bytes), change, how))
        if more := totals.low_rank_bytes:
            rows.append(("Low-rank adapter beside it", "–", size(more), _times(more, dense), "comes on top"))
        if report.only_structure or not (packed_speeds(report) if speeds(report) else becomes_smaller_packed(report)):
            return rows
        packed = totals.compressed_bytes
        how = "packed, the same weights bit for bit: a mask and the kept values" if packed else NOT_MEASURED
        if packed and more:
            how += "; the adapter is counted"
        rows.append(("Compressed checkpoint", "–", size(packed), _times(packed, dense), how))
    return rows


def speed_rows(report: Report) -> list[Row]:
    """List decoding speed and memory of every packed or smaller form against the fastest dense one.

    A finished run without measurements has one row that says so; one that has no packed form none.
    Where no dense form was measured, only decoding speeds are listed.
    """
    dense, packed, smaller = dense_speed(report), packed_speeds(report), smaller_speeds(report)
    if not (packed or smaller):
        measurable = report.status == "finished" and report.packable and not speeds(report)
        return [("Decoding speed, tokens/s", "–", "–", "", NOT_MEASURED)] if measurable else []
    if dense is None:
        return [
            (f"Decoding, {row['variant']}, tokens/s", "–", _rate_text(row), "–", speed_protocol(report, row))
            for row in (*smaller, *packed)
        ]
    rows = []
    for row in (*smaller, *packed):
        name = f"Decoding, {row['variant']}, tokens/s"
        how = f"against {dense['variant']}, the fastest dense form; {speed_protocol(report, row)}"
        if row["variant"] == INT8:
            judged = row.get("perplexity")
            how = f"perplexity {significant(judged) if judged else 'not measured'}, {how}"
        rows.append((name, _rate_text(dense), _rate_text(row), _times(_rate(row), _rate(dense)), how))
    for row in smaller:
        name = f"Reading the prompt, {row['variant']}, tokens/s"
        whole = max(_dense_rows(report), key=_prefill)
        change = _times(_prefill(row), _prefill(whole))
        how = f"against {whole['variant']}; {speed_protocol(report, row)}"
        rows.append((name, significant(_prefill(whole)), significant(_prefill(row)), change, how))
    best = max(packed or smaller, key=_rate)
    how = f"of the process that decodes, {best['variant']} against {dense['variant']}"
    memory = best.get("peak_memory"), dense.get("peak_memory")
    if all(memory):
        rows.append(("Peak memory while decoding", size(memory[1]), size(memory[0]), _times(*memory), how))
    return rows


def speed_protocol(report: Report, row: dict[str, Any]) -> str:
    """Say what a speed depends on, in one line."""
    parts = [
        "greedy",
        f"batch {row['batch']}" if "batch" in row else "",
        counted(row["prompt"], "prompt token") if "prompt" in row else "",
        counted(row["tokens"], "new token") if "tokens" in row else "",
        f"median (range) of {counted(row['runs'], 'run')}" if "runs" in row else "",
        counted(row["threads"], "thread") if row.get("device") != "cuda" and "threads" in row else "",
        str(((report.speed or {}).get("machine") or {}).get("cpu") or ""),
    ]
    return ", ".join(part for part in parts if part)


def speed_table(report: Report) -> list[tuple[str, ...]]:
    """List speed, size and quality of every form.

    A row has its name, tokens/s, slowest to fastest, first token, peak memory and file size, and where quality stands
    beside speed (:func:`has_quality`) perplexity and KL.
    """
    judged = has_quality(report)
    return [
        (
            str(row.get("variant", "?")),
            significant(row.get("tokens_per_second")),
            _range(row),
            duration(row.get("first_token")),
            size(row.get("peak_memory")),
            size(row.get("file_size") or None),
            *((significant(row.get("perplexity")), significant(row.get("kl"))) if judged else ()),
        )
        for row in speeds(report)
    ]


def _dense_rows(report: Report) -> list[dict[str, Any]]:
    """Return the forms that are neither packed nor smaller, nor GGUF files."""
    return [row for row in speeds(report) if not (_is_packed(row) or _is_smaller(row) or _is_gguf(row))]


def _is_gguf(row: dict[str, Any]) -> bool:
    return str(row.get("variant", "")).startswith("llama.cpp")


def _is_packed(row: dict[str, Any]) -> bool:
    return str(row.get("variant", "")).startswith("packed")


def _is_smaller(row: dict[str, Any]) -> bool:
    return str(row.get("variant", "")).startswith("smaller")


def _prefill(row: dict[str, Any]) -> float:
    """Compute the prompt tokens that are read in a second; 0 where the time is not known."""
    first, prompt, batch = (row.get(key) for key in ("first_token", "prompt", "batch"))
    known = all(isinstance(value, (int, float)) for value in (first, prompt, batch))
    return float(prompt) * float(batch) / float(first) if known and first else 0.0  # type: ignore[arg-type]


def _rate(row: dict[str, Any]) -> float:
    rate = row.get("tokens_per_second")
    return float(rate) if isinstance(rate, (int, float)) else 0.0


def fastest(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Find the form that decodes most tokens in a second; None where none was measured."""
    return max((row for row in rows if _rate(row)), key=_rate, default=None)


def _range(row: dict[str, Any]) -> str:
    return " to ".join(significant(value) for value in row.get("tokens_per_second_range", ())) or "–"


def _rate_text(row: dict[str, Any]) -> str:
    spread = _range(row)
    return significant(_rate(row)) + (f" ({spread})" if spread != "–" else "")


def _times(value: float | None, reference: float | None) -> str:
    return f"×{significant(value / reference)}" if value and reference else "–"

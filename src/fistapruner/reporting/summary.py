"""Sum a finished run up in a few lines, for the terminal."""

from __future__ import annotations

from pathlib import Path

from ..runs.labels import PHASES
from ..runs.records import Report
from ..runtime.formatting import align_columns, counted, duration, size
from .alignment_text import pairs_text, preference_rows
from .evaluation_text import perplexity_conditions, perplexity_text
from .lineage_text import lineage_lines
from .recovery_text import change_text, closed_text, gain_of, held_out_text, task_losses, text_used, trained_text
from .size_and_speed import becomes_smaller_packed, low_rank_sentence
from .structure_text import structure_rows
from .workload_text import workload_sentence


def summary(report: Report, folder: str | Path) -> str:
    """Write the short table printed at the end of a run.

    Args:
        report: the finished run.
        folder: the run directory.
    """
    rows: list[tuple[str, str]] = [
        ("model", f"{report.model.source} ({report.model.architecture}, {report.model.dtype})")
    ]
    rows += _pruned(report) if report.recovery is None else _recovered(report)
    rows += _cost(report)
    if report.lineage is not None and len(report.lineage.stages) > 1:
        names = ("made from", *("then" for _ in report.lineage.stages))
        rows += zip(names, lineage_lines(report.lineage), strict=True)
    for warning in report.warnings:
        rows.append(("warning", warning))
    rows.append(("checkpoint", str(Path(folder) / "model")))
    if report.totals.low_rank_weights:
        rows.append(("adapter", str(Path(folder) / "adapter")))
    return align_columns(rows)


def _recovered(report: Report) -> list[tuple[str, str]]:
    """List what a run trained, on what, and what that won."""
    found, totals = report.recovery, report.totals
    assert found is not None
    what, _, how = report.method.partition(": ")
    rows = [(what, f"{how}; {report.sparsity}"), ("trained", trained_text(found))]
    if text := held_out_text(found):
        rows.append(("held-out loss", text))
    rows += [(f"  {name}", f"{start:.4f} → {best:.4f}") for name, start, best in task_losses(found)]
    rows += _quality(report)
    for measure, of_dense, before, after_it, how in preference_rows(report):
        known = [f"{what} {value}" for what, value in (("dense", of_dense), ("before", before)) if value != "–"]
        beside = f" ({', '.join(known)})" if known else ""
        rows.append((measure[0].lower() + measure[1:], f"{after_it}{beside}  {how}"))
    if text := change_text(report):
        rows.append(("changed", text))
    if totals.zeros_share is not None:
        rows.append(("zeros kept", f"{_zeros(report)}, the same as before"))
    rows += _low_rank(report)
    rows.append(("pairs", pairs_text(report)) if report.alignment else ("training text", text_used(report)))
    return rows


def _pruned(report: Report) -> list[tuple[str, str]]:
    """List how a model was pruned and what that did to it."""
    totals = report.totals
    starts = [step["start_kept"] for each in report.operators for step in each.steps if "start_kept" in step]
    kept = f" (the start was kept in {sum(starts)} of {counted(len(starts), 'operator')})" if starts else ""
    rows = [("method", f"{report.method}, {report.sparsity}{kept}")]
    rows += _quality(report)
    if report.calibration is not None:
        rows.append(("calibration", report.calibration.description))
    if report.workload is not None:
        rows.append(("allocation", workload_sentence(report.workload)))
    rows += structure_rows(report)
    if totals.zeros_share is not None and not report.only_structure:
        rows.append(("sparsity", _zeros(report)))
        if totals.model_weights and totals.model_zeros is not None:
            whole = 100 * totals.model_zeros / totals.model_weights
            rows.append(("", f"{whole:.1f} % of all {totals.model_weights} weights"))
    rows += _low_rank(report)
    if report.mean_error is not None:
        over = f"over {len(report.relative_errors)} operators"
        rows.append(("mean relative error", f"{100 * report.mean_error:.2f} % of the outputs' energy, {over}"))
    return rows


def _quality(report: Report) -> list[tuple[str, str]]:
    """List perplexity and divergence of the dense model, of a recovery's input and of the result."""
    rows: list[tuple[str, str]] = []
    trained = "pruned" if report.recovery is None else report.trained
    for evaluation in report.evaluations:
        dense, after = evaluation.reference, evaluation.perplexity
        if after is None:
            continue
        earlier = gain_of(report, evaluation)
        shown = [("dense", dense), ("before", earlier and earlier[0].perplexity), (trained, after)]
        for name, one in shown:
            if one is not None:
                rows.append((f"perplexity, {name}", f"{perplexity_text(one)}  {perplexity_conditions(one)}"))
        if earlier is not None and earlier[1].closed is not None:
            rows.append(("gap closed", f"{closed_text(earlier[1])} of ln(before / dense); error paired over windows"))
        damage, old = evaluation.divergence, earlier and earlier[0].divergence
        if damage is not None:
            start = f"{old.kl:z.3f} → " if old else ""
            agreed = f"{100 * old.top1_agreement:.1f} → " if old else ""
            same = f"{agreed}{100 * damage.top1_agreement:.1f} %"
            rows.append(("divergence", f"KL {start}{damage.kl:z.3f} nats a token, same top token at {same}"))
    return rows


def _zeros(report: Report) -> str:
    totals = report.totals
    share = 100 * (totals.zeros_share or 0.0)
    counts = f"{totals.operator_zeros} of {totals.operator_weights}"
    return f"{counts} weights of the {report.counted} are zero ({share:.4f} %)"


def _low_rank(report: Report) -> list[tuple[str, str]]:
    sentence = low_rank_sentence(report)
    return [("low rank", sentence)] if sentence else []


def _cost(report: Report) -> list[tuple[str, str]]:
    """List time, memory and size."""
    totals = report.totals
    rows: list[tuple[str, str]] = []
    if totals.seconds is not None:
        whole = totals.seconds_in_all or 0.0
        phases = {**totals.time_split, "other": whole - sum(totals.time_split.values())}
        ordered = sorted(phases.items(), key=lambda item: -item[1])
        split = ", ".join(f"{PHASES.get(name, name)} {seconds:.0f}" for name, seconds in ordered if seconds > 0.5)
        rows.append(("time in all", duration(whole) + (f" (seconds: {split})" if split else "")))
    if totals.peak_memory:
        rows.append(("peak memory", size(totals.peak_memory)))
    if totals.checkpoint_bytes:
        adapter = f", and {size(totals.low_rank_bytes)} of adapter" if totals.low_rank_bytes else ""
        text = f"{size(totals.checkpoint_bytes)}{adapter}: zeros are stored; 'fistapruner pack' makes the file smaller"
        if report.only_structure:
            text = f"{size(totals.checkpoint_bytes)}; the dense model has {size(report.origin.bytes)}"
        elif not becomes_smaller_packed(report):
            text = f"{size(totals.checkpoint_bytes)}{adapter}: zeros are stored"
        rows.append(("size on disk", text))
    return rows

"""List the figures of a run that matter most, for the tiles of its page."""

from __future__ import annotations

from ..runs.records import Report
from ..runtime.formatting import count, counted, duration, percent, percent_with_error, short_count, significant, size
from .evaluation_text import kl_text, on_text, perplexity_text
from .quality_rows import mean_score, one_metric
from .recovery_text import closed_text, gain_of
from .size_and_speed import INT8, dense_speed, fastest, low_rank_share, packed_speeds, smaller_speeds
from .structure_text import kept_units

Tile = tuple[str, str, str]
"""Name, value and note of a figure."""


def tiles(report: Report) -> list[Tile]:
    """List the tiles of a page; zero-shot tasks are the third where there are so many."""
    found = [*_quality(report), *_training(report), *_pruning(report)]
    return [*found[:2], *_tasks(report), *found[2:], *_size(report), *_speed(report), *_time(report)]


def _quality(report: Report) -> list[Tile]:
    """List perplexity, how much of its gap is closed, and agreement with the dense model."""
    evaluation = on_text(report.evaluations)
    if evaluation is None or evaluation.perplexity is None:
        return []
    text, dense, earlier = evaluation.perplexity, evaluation.reference, gain_of(report, evaluation)
    note = f"dense {perplexity_text(dense)}; " if dense is not None else ""
    if earlier is not None and earlier[0].perplexity is not None:
        note += f"before {perplexity_text(earlier[0].perplexity)}; "
    found = [("Perplexity", f"{text.perplexity:.2f}", f"{note}{text.data}, windows of {text.seqlen}")]
    if earlier is not None and earlier[1].closed is not None:
        found.append(("Gap closed", closed_text(earlier[1]), "of ln(perplexity before / dense), paired over windows"))
    if (damage := evaluation.divergence) is not None:
        found.append(("Top-1 agreement", percent(damage.top1_agreement), f"KL {kl_text(damage, 3)} nats"))
    return found


def _tasks(report: Report) -> list[Tile]:
    """List the mean over zero-shot tasks, where there are several."""
    tasks = one_metric([task for evaluation in report.evaluations for task in evaluation.tasks])
    if len(tasks) < 2:
        return []
    mean, error, dense_mean, dense_error = mean_score(tasks)
    beside = f"; dense {percent_with_error(dense_mean, dense_error)} %" if dense_mean is not None else ""
    return [("Zero-shot", f"{percent_with_error(mean, error)} %", f"mean of {len(tasks)} tasks{beside}")]


def _training(report: Report) -> list[Tile]:
    """List what training was for: preference accuracy and held-out loss."""
    found = []
    if report.alignment is not None:
        before, after = report.alignment.test["pruned"], report.alignment.test["aligned"]
        note = f"{percent(before.accuracy)} before; {counted(report.alignment.test_pairs, 'test pair')}"
        found.append(("Preference accuracy", percent(after.accuracy), note))
    recovery = report.recovery
    if recovery is not None and recovery.start is not None and recovery.best is not None:
        best = recovery.best
        note = f"{recovery.start.held_out:.4f} before; step {best.step} of {recovery.asked_steps} is kept"
        found.append(("Held-out loss", f"{best.held_out:.4f}", note))
    return found


def _pruning(report: Report) -> list[Tile]:
    """List what was removed, what was added, and the error of the operators."""
    totals, found = report.totals, []
    if report.widths and totals.model_weights and report.model.parameters:
        share = percent(1 - totals.model_weights / report.model.parameters)
        units = [f"{unit} {before} → {after}" for unit, before, after in kept_units(report)]
        found.append(("Parameters removed", share, "; ".join([f"{short_count(totals.model_weights)} stay", *units])))
    if totals.zeros_share is not None and not report.only_structure:
        note = count(totals.operator_zeros)
        if totals.model_weights and totals.model_zeros:
            note += f"; {percent(totals.model_zeros / totals.model_weights)} of the model"
        found.append(("Zeros", percent(totals.zeros_share), note))
    if more := totals.low_rank_weights:
        share = low_rank_share(report) or count(more)
        found.append(("Additional weights", share, f"{count(more)} in low-rank parts of rank {totals.low_rank}"))
    if report.mean_error is not None:
        errors = report.relative_errors
        note = f"worst of {len(errors)} operators {percent(max(errors))}"
        found.append(("Mean relative error", percent(report.mean_error), note))
    return found


def _size(report: Report) -> list[Tile]:
    """List the size of the checkpoint, beside its size packed or that of the dense model."""
    totals = report.totals
    if not totals.checkpoint_bytes:
        return []
    note = (
        f"compressed {size(totals.compressed_bytes)}"
        if totals.compressed_bytes
        else f"dense {size(report.origin.bytes)}"
        if report.only_structure
        else "zeros are stored as they are"
    )
    if totals.low_rank_bytes:
        adapter = f"{size(totals.low_rank_bytes)} of adapter"
        note += f", {adapter} among them" if totals.compressed_bytes else f"; and {adapter}"
    return [("Size on disk", size(totals.checkpoint_bytes), note)]


def _speed(report: Report) -> list[Tile]:
    """List how much faster the fastest form decodes whose weights are not rounded to int8."""
    forms = [row for row in packed_speeds(report) if row["variant"] != INT8]
    baseline, best = dense_speed(report), fastest([*forms, *smaller_speeds(report)])
    if baseline is None or best is None:
        return []
    ratio = float(best["tokens_per_second"]) / float(baseline["tokens_per_second"])
    note = f"{significant(best['tokens_per_second'])} tokens/s, {best['variant']}, against {baseline['variant']}"
    return [("Decoding speed", f"×{significant(ratio)}", note)]


def _time(report: Report) -> list[Tile]:
    """List the time of the whole run."""
    totals = report.totals
    if not totals.seconds:
        return []
    notes = [f"{totals.parts} parts added up"] if totals.parts else []
    if totals.seconds_in_all != totals.seconds:
        notes.append(f"{duration(totals.seconds)} without evaluation")
    notes += [f"peak memory {size(totals.peak_memory)}"] if totals.peak_memory else []
    return [("Time in all", duration(totals.seconds_in_all), "; ".join(notes))]

"""Sum a finished run up in a few lines, for the terminal."""

from __future__ import annotations

from pathlib import Path

from ..runs.records import Report
from ..runtime.formatting import align_columns, size, with_error
from .lineage_text import lineage_lines
from .structure_text import structure_rows


def summary(report: Report, folder: str | Path) -> str:
    """Write the short table printed at the end of ``fistapruner prune``.

    Args:
        report: the finished run.
        folder: the run directory.
    """
    totals = report.totals
    errors = [
        operator.relative_error
        for layer in report.layers
        for operator in layer.operators
        if operator.relative_error is not None
    ]
    rows: list[tuple[str, str]] = [
        ("model", f"{report.model.source} ({report.model.architecture}, {report.model.dtype})")
    ]
    rows.append(("method", f"{report.method}, {report.sparsity}"))
    for evaluation in report.evaluations:
        dense, pruned = evaluation.reference, evaluation.perplexity
        if pruned is None:
            continue
        how = f"{pruned.data} ({pruned.split}), {pruned.windows} windows of {pruned.seqlen} tokens, {pruned.dtype}"
        if dense is not None:
            rows.append(("perplexity, dense", f"{with_error(dense.perplexity, dense.standard_error)}  {how}"))
        rows.append(("perplexity, pruned", f"{with_error(pruned.perplexity, pruned.standard_error)}  {how}"))
        if evaluation.divergence is not None:
            divergence = evaluation.divergence
            rows.append(
                (
                    "divergence",
                    f"KL {divergence.kl:.3f} nats a token, same top token at {100 * divergence.top1_agreement:.1f} %",
                )
            )
    if report.calibration is not None:
        facts = report.calibration
        text = f"{facts.source}: {facts.samples} windows of {facts.seqlen} tokens" + (
            f", {facts.how}" if facts.how else ""
        )
        rows.append(("calibration", text))
    rows += structure_rows(report)
    if totals.operator_weights and totals.operator_zeros is not None and not report.only_structure:
        share = 100 * totals.operator_zeros / totals.operator_weights
        rows.append(
            (
                "sparsity",
                f"{totals.operator_zeros} of {totals.operator_weights} operator weights are zero ({share:.4f} %)",
            )
        )
        if totals.model_weights:
            rows.append(
                (
                    "",
                    f"{100 * totals.operator_zeros / totals.model_weights:.1f} % of all {totals.model_weights} weights",
                )
            )
    if errors:
        rows.append(
            (
                "relative error",
                f"{100 * sum(errors) / len(errors):.2f} % of the outputs' energy, mean over {len(errors)} operators",
            )
        )
    if totals.seconds is not None:
        split = ", ".join(
            f"{name} {seconds:.0f}" for name, seconds in sorted(totals.time_split.items(), key=lambda item: -item[1])
        )
        rows.append(("time", f"{totals.seconds:.0f} s ({split})"))
    if totals.peak_memory:
        rows.append(("peak memory", size(totals.peak_memory)))
    if totals.checkpoint_bytes:
        rows.append(
            (
                "size on disk",
                f"{size(totals.checkpoint_bytes)}; the dense model has {size(report.model.bytes)}"
                if report.only_structure
                else f"{size(totals.checkpoint_bytes)}: zeros are stored; 'fistapruner pack' makes the file smaller",
            )
        )
    if report.lineage is not None and len(report.lineage.stages) > 1:
        names = ("made from", *("then" for _ in report.lineage.stages))
        rows += zip(names, lineage_lines(report.lineage), strict=True)
    for warning in report.warnings:
        rows.append(("warning", warning))
    rows.append(("checkpoint", str(Path(folder) / "model")))
    return align_columns(rows)

"""Tabulate alignments of one model with many losses, as Markdown and for the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import mean, stdev

from ..runs.results import Evaluation
from ..runs.training_records import AlignComparison, AlignRow, PreferenceFigures
from ..runtime.formatting import p_value, with_error
from .alignment_text import accuracy_text, percent_number

HEAD = (
    "model",
    "preference accuracy, %",
    "McNemar against before",
    "by token, %",
    "reward accuracy, %",
    "margin",
    "chosen reward",
    "KL to dense",
    "perplexity",
)


def align_rows(found: AlignComparison) -> list[tuple[str, ...]]:
    """List the rows of the table: dense and pruned model, then every loss, the mean over its seeds."""
    first = next((row for row in found.rows if row.alignment is not None), None)
    rows: list[tuple[str, ...]] = []
    if first is not None and first.alignment is not None:
        test, text = first.alignment.test, first.evaluation
        dense = text and text.reference
        perplexity = with_error(dense.perplexity, dense.standard_error) if dense else "–"
        rows.append(("dense", *_of_others(test.get("dense")), "0" if dense else "–", perplexity))
        rows.append(("pruned", *_of_others(test.get("pruned")), *_text(found.before)))
    labels = dict.fromkeys(row.label for row in found.rows)
    return rows + [_merged(label, [row for row in found.rows if row.label == label]) for label in labels]


def align_table(found: AlignComparison) -> str:
    """Write the table as Markdown, with what it was measured on."""
    lines = ["# Alignments compared", ""]
    lines += [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    lines += [f"| {' | '.join(row)} |" for row in align_rows(found)]
    lines.append("")
    first = next((row.alignment for row in found.rows if row.alignment is not None), None)
    if first is not None:
        seeds = len({row.seed for row in found.rows})
        lines.append(
            f"{first.pairs} pairs to train on, {first.held_out_pairs} held out, {first.test_pairs} test pairs; "
            f"{seeds} {'seed' if seeds == 1 else 'seeds'}."
        )
    lines.append(
        "± is one standard error over test pairs or windows; of several seeds a row has the mean, and in brackets the "
        "standard deviation over seeds. Reward accuracy, margin and chosen reward are against the references of the "
        "loss: they do not compare rows. McNemar p-values are not corrected for the number of rows."
    )
    if failed := align_failures(found):
        lines += ["", *(f"- {failure}" for failure in failed)]
    return "\n".join(lines) + "\n"


def align_failures(found: AlignComparison) -> list[str]:
    """List the runs that failed, and why."""
    return [f"failed: {row.label}, seed {row.seed}: {row.error}" for row in found.rows if row.error]


def _of_others(figures: PreferenceFigures | None) -> tuple[str, ...]:
    if figures is None:
        return ("–",) * 6
    return (accuracy_text(figures), "–", percent_number(figures.normalised), "–", "–", "–")


def _text(found: Evaluation | None) -> tuple[str, str]:
    """Write divergence and perplexity."""
    if found is None or found.perplexity is None:
        return "–", "–"
    kl = "–" if found.divergence is None else with_error(found.divergence.kl, found.divergence.kl_standard_error, 3)
    return kl, with_error(found.perplexity.perplexity, found.perplexity.standard_error)


def _merged(label: str, rows: Sequence[AlignRow]) -> tuple[str, ...]:
    """Write the mean over seeds of one loss."""
    done = [row.alignment for row in rows if row.alignment is not None]
    if not done:
        return (label, "failed", *("–",) * (len(HEAD) - 2))
    if len(done) < len(rows):
        label += f" ({len(done)} of {len(rows)} seeds)"
    results = [each.test["aligned"] for each in done]
    tests = [value for each in done if (value := each.test["pruned"].p_value) is not None]

    def number(values: Sequence[float | None], write: Callable[[float], str]) -> str:
        known = [value for value in values if value is not None]
        if not known:
            return "–"
        return write(mean(known)) + (f" ({write(stdev(known))})" if len(known) > 1 else "")

    error = mean(each.accuracy_error for each in results)
    score = with_error(100 * mean(each.accuracy for each in results), 100 * error if math.isfinite(error) else None, 1)
    if len(results) > 1:
        score += f" ({100 * stdev(each.accuracy for each in results):.1f})"
    texts = [row.evaluation for row in rows if row.evaluation is not None]
    kl, perplexity = _text(texts[0]) if len(texts) == 1 else ("–", "–")
    if len(texts) > 1:
        kl = number([text.divergence.kl if text.divergence else None for text in texts], "{:.3f}".format)
        perplexity = number(
            [text.perplexity.perplexity if text.perplexity else None for text in texts], "{:.2f}".format
        )
    return (
        label,
        score,
        ", ".join(p_value(value) for value in tests) or "–",
        number([each.normalised for each in results], percent_number),
        number([each.reward_accuracy for each in done], percent_number),
        number([each.margin for each in done], "{:.3f}".format),
        number([each.chosen_reward for each in done], "{:.3f}".format),
        kl,
        perplexity,
    )

"""Tabulate alignments of one model with many losses, as Markdown and for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev

from ..runs.comparison_records import AlignComparison, AlignRow
from ..runs.results import Evaluation
from ..runs.training_records import PreferenceFigures
from ..runtime.formatting import counted, p_value, with_error
from .alignment_text import accuracy_text, by_token_text
from .evaluation_text import kl_text, perplexity_text

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
        dense = None if text is None else text.reference
        rows.append(("dense", *_of_others(test.get("dense")), "0" if dense else "–", perplexity_text(dense)))
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
            f"{counted(first.pairs, 'pair')} to train on, {first.held_out_pairs} held out, "
            f"{counted(first.test_pairs, 'test pair')}; {counted(seeds, 'seed')}."
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
    return (accuracy_text(figures), "–", by_token_text(figures), "–", "–", "–")


def _text(found: Evaluation | None) -> tuple[str, str]:
    """Write divergence and perplexity."""
    if found is None or found.perplexity is None:
        return "–", "–"
    return kl_text(found.divergence, 3), perplexity_text(found.perplexity)


def _merged(label: str, rows: Sequence[AlignRow]) -> tuple[str, ...]:
    """Write the mean over seeds of one loss."""
    done = [row.alignment for row in rows if row.alignment is not None]
    if not done:
        return (label, "failed", *("–",) * (len(HEAD) - 2))
    if len(done) < len(rows):
        label += f" ({len(done)} of {len(rows)} seeds)"
    results = [each.test["aligned"] for each in done]
    tests = [value for each in done if (value := each.test["pruned"].p_value) is not None]
    texts = [row.evaluation for row in rows if row.evaluation is not None]
    divergences = [text.divergence for text in texts if text.divergence is not None]
    perplexities = [text.perplexity for text in texts if text.perplexity is not None]
    return (
        label,
        _mean([(_percent(each.accuracy), _percent(each.accuracy_error)) for each in results], 1),
        ", ".join(p_value(value) for value in tests) or "–",
        _mean([(_percent(each.normalised), _percent(each.normalised_error)) for each in results], 1),
        _mean([(_percent(each.reward_accuracy), _percent(each.reward_accuracy_error)) for each in done], 1),
        _mean([(each.margin, each.margin_error) for each in done], 3),
        _mean([(each.chosen_reward, each.chosen_reward_error) for each in done], 3),
        _mean([(each.kl, each.kl_standard_error) for each in divergences], 3),
        _mean([(each.perplexity, each.standard_error) for each in perplexities], 2),
    )


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _mean(found: Sequence[tuple[float | None, float | None]], digits: int) -> str:
    """Write the mean of values with the mean of their errors; of several also the standard deviation."""
    values = [value for value, _ in found if value is not None]
    errors = [error for _, error in found if error is not None and math.isfinite(error)]
    if not values:
        return "–"
    text = with_error(mean(values), mean(errors) if errors else None, digits)
    return text + (f" ({stdev(values):.{digits}f})" if len(values) > 1 else "")

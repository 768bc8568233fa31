"""Say what a run did to its model, in two or three sentences."""

from __future__ import annotations

from ..runs.records import Report
from ..runs.results import Evaluation
from ..runtime.formatting import percent, significant
from .alignment_text import preference_sentence
from .evaluation_text import on_text
from .recovery_text import Gain, closed_text, gain_of, held_out_text
from .size_and_speed import low_rank_sentence
from .structure_text import structure_sentence


def verdict(report: Report) -> str:
    """Say what happened to the model, in two or three sentences."""
    totals = report.totals
    sentences = [sentence] if (sentence := structure_sentence(report)) else []
    if totals.zeros_share is not None and not report.only_structure:
        share = percent(totals.zeros_share, 4)
        kept = f", the same as before {report.training}" if report.recovery is not None else ""
        sentences.append(f"{share} of the {report.counted}' weights are exactly zero{kept}.")
    if sentence := low_rank_sentence(report):
        sentences.append(sentence)
    if report.recovery is not None and (losses := held_out_text(report.recovery)):
        sentences.append(f"Held-out loss: {losses}.")
    if report.alignment is not None:
        sentences.append(preference_sentence(report))
    if (evaluation := on_text(report.evaluations)) is not None:
        text, dense = evaluation.perplexity, evaluation.reference
        if (earlier := gain_of(report, evaluation)) is not None and text is not None:
            sentences.append(_won(*earlier, evaluation))
        elif text is not None and dense is not None:
            ratio = significant(text.perplexity / dense.perplexity)
            change = f"from {dense.perplexity:.2f} to {text.perplexity:.2f} (×{ratio})"
            sentences.append(f"Perplexity on {text.data} went {change}.")
        if evaluation.divergence is not None:
            same = percent(evaluation.divergence.top1_agreement)
            stayed = "stayed the same" if report.recovery is None else "is that of the dense model"
            sentences.append(f"The most likely next token {stayed} for {same} of the tokens.")
    if report.permuted:
        sentences.append(
            f"The hidden channels that {len(report.permuted)} operators read were reordered or rotated for the "
            "pattern: adapters made for the dense model do not fit this one."
        )
    if report.status == "failed":
        sentences.append(f"The run stopped: {report.error or 'reason unknown'}.")
    if report.status == "running":
        what = "layers" if report.recovery is None else "steps"
        sentences.append(f"The run is not finished; this page shows the {what} that are done.")
    return " ".join(sentences)


def _won(before: Evaluation, won: Gain, after: Evaluation) -> str:
    """Say how perplexity changed by recovery, beside that of the dense model."""
    old, new, dense = before.perplexity, after.perplexity, after.reference or before.reference
    assert old is not None  # there is no gain without them
    assert new is not None
    text = f"Perplexity on {new.data} went from {old.perplexity:.2f} to {new.perplexity:.2f}"
    if dense is None or won.closed is None:
        return f"{text}."
    return f"{text}, against {dense.perplexity:.2f} of the dense model: {closed_text(won)} of the gap is closed."

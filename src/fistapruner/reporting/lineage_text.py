"""Write the lineage of a model: the dense model, then one line for each run that changed it."""

from __future__ import annotations

from ..errors import printable
from ..runs.labels import TRAINED, amount_label, methods_label, sets_zeros, training_label
from ..runs.records import Lineage, Stage
from ..runtime.formatting import count, percent
from .evaluation_text import perplexity_text

DONE = {"prune": "pruned", "recover": "recovered", "align": "aligned", "merge": "merged with an adapter"}


def lineage_lines(lineage: Lineage) -> list[str]:
    """Write one line for the dense model and one for each stage, in order."""
    source = lineage.source
    known = [source.architecture, source.dtype, f"revision {source.revision[:12]}" if source.revision else ""]
    about = ", ".join(part for part in known if part)
    lines = [source.source + (f" ({about})" if about else ""), *(_stage_line(stage) for stage in lineage.stages)]
    return [printable(line) for line in lines]


def _stage_line(stage: Stage) -> str:
    """Say what a run did, what it measured, and when."""
    figures, settings = stage.figures, stage.settings
    parts = [DONE[stage.kind]]
    if stage.kind in TRAINED:
        parts[0] = training_label(stage.kind, settings, figures.tokens)
        data = settings.get("data") or {}
        if text := data.get("source") or data.get("pairs") or ", ".join(data.get("tasks") or ()):
            parts[0] += f" of {file_name(str(text))}"
    elif settings.get("sparsity"):
        less = bool((settings.get("structure") or {}).get("remove"))
        parts[0] += f" {'by' if less else 'to'} {amount_label(settings)} with {methods_label(settings)}"
    if figures.parameters:
        parts.append(f"{count(figures.parameters)} parameters")
    if stage.kind == "prune" and figures.zeros_share is not None and sets_zeros(settings):  # no other changes zeros
        parts.append(f"{percent(figures.zeros_share)} zeros in its operators")
    if (text := figures.perplexity) is not None:
        measured = f"{text.windows} windows of {text.seqlen} tokens of {text.data}"
        parts.append(f"perplexity {perplexity_text(text)} on {measured}")
    if stage.finished:
        parts.append(stage.finished[:10])
    return ", ".join(parts)


def file_name(source: str) -> str:
    """Cut the name of a text to its last part: cards are published, folders of a machine are not."""
    return source.rsplit("/", 1)[-1]

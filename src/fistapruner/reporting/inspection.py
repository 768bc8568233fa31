"""Inspect a checkpoint, and write what was found for the terminal."""

from __future__ import annotations

from collections import Counter

from ..errors import printable
from ..measure.inspection import Inspection
from ..measure.inspection import inspect_checkpoint as inspect
from ..models.checkpoint import PRUNING_RECORD
from ..runtime.show import align_columns
from .facts import lineage_lines

__all__ = ["inspect", "inspection_text"]


def inspection_text(found: Inspection, *, operators: bool = True) -> str:
    """Write totals, claims and violations, after a table of the operators."""
    rows = [
        (
            printable(operator.name),
            "x".join(map(str, operator.shape)),
            f"{operator.sparsity:.4%}",
            operator.pattern or "-",
            _claim(operator.claim),
            "VIOLATED" if operator.fault else "holds" if operator.claim else "",
        )
        for operator in found.operators
    ]
    headings = ("operator", "shape", "zeros", "n:m", "claimed", "")
    lines = [align_columns((headings, *rows)), ""] if operators else []
    pruned = found.pruned
    zeros, weights = sum(operator.zeros for operator in pruned), sum(operator.weights for operator in pruned)
    patterns = {operator.pattern for operator in pruned}
    every = f", {patterns.pop()} in every group of each" if len(patterns) == 1 and None not in patterns else ""
    lines.append(f"pruned operators: {len(pruned)} of {len(found.operators)}, {_share(zeros, weights)}{every}")
    lines.append(f"whole model: {_share(found.zeros, found.weights)}")
    for (unit, before, after), layers in Counter(width[1:] for width in found.widths).items():
        lines.append(f"{unit}: {before} -> {after} in {layers} decoder layers")
    if found.low_rank is not None:
        more, rank = found.low_rank
        share = f"{more / max(weights, 1):.2%}"
        lines.append(f"low-rank part beside it, not counted above: {more} weights of rank {rank} ({share})")
    if found.lineage is not None:
        lines.append("made from: " + "\n       then: ".join(lineage_lines(found.lineage)))
    lines += [f"violated: {printable(violation)}" for violation in found.violations]
    if not found.violations:
        claims = found.widths or any(operator.claim for operator in found.operators)
        none = (
            f"no zeros were checked: {found.folder} has no {PRUNING_RECORD} that claims any; copy that of the pruned "
            "model there, or give --pattern"
        )
        lines.append("every claim holds" if claims else none)
    return "\n".join(lines)


Inspection.__str__ = inspection_text  # type: ignore[method-assign, assignment]


def _claim(claim: str | None) -> str:
    """Write a claim; a share with all its digits as the share of zeros beside it."""
    try:
        return f"{float(claim or ''):.4%}"
    except ValueError:  # a pattern, or a percentage
        return printable(claim or "-")


def _share(zeros: int, weights: int) -> str:
    return f"{zeros} of {weights} weights are zero ({zeros / max(weights, 1):.4%})"

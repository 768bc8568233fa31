"""Errors of decoder layers and operators, for pages and for terminal text."""

from __future__ import annotations

from collections.abc import Sequence

from ..runs.layer_records import LayerEntry, OperatorEntry


def hardest(layers: Sequence[LayerEntry], count: int) -> list[tuple[LayerEntry, OperatorEntry]]:
    """Return the operators whose error pruning has raised most, largest first."""
    pairs = [(layer, operator) for layer in layers for operator in layer.operators if operator.loss is not None]
    return sorted(pairs, key=lambda pair: -(pair[1].loss or 0.0))[:count]


def mean_error(layer: LayerEntry) -> float | None:
    """Return the mean relative error of a layer's operators."""
    errors = [operator.relative_error for operator in layer.operators if operator.relative_error is not None]
    return sum(errors) / len(errors) if errors else None

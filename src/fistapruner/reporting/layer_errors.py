"""Errors and short names of decoder layers' operators, for pages and for terminal text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..runs.layer_records import LayerEntry, OperatorEntry


def hardest(layers: Sequence[LayerEntry], count: int) -> list[tuple[LayerEntry, OperatorEntry]]:
    """Return the operators whose error pruning has raised most, largest first."""
    pairs = [(layer, operator) for layer in layers for operator in layer.operators if operator.loss is not None]
    return sorted(pairs, key=lambda pair: -(pair[1].loss or 0.0))[:count]


def mean_error(layer: LayerEntry) -> float | None:
    """Return the mean relative error of a layer's operators, without those that were kept as they were."""
    errors = [operator.relative_error or 0.0 for operator in layer.judged]
    return sum(errors) / len(errors) if errors else None


def short_names(layers: Sequence[LayerEntry]) -> dict[str, str]:
    """Shorten names of operators as far as each still names one of a layer.

    ``attn.c_proj`` becomes ``c_proj`` where it is the only one. A short name does not begin with a number: of an
    expert it is ``experts.17.down_proj``.
    """
    names = {operator.name for layer in layers for operator in layer.operators}
    endings = {name: _endings(name) for name in names}
    found = Counter(ending for several in endings.values() for ending in several)
    return {name: next((e for e in several if found[e] == 1), name) for name, several in endings.items()}


def _endings(name: str) -> list[str]:
    """List the last parts of a name that do not begin with a number, the shortest first."""
    parts = name.split(".")
    return [".".join(parts[place:]) for place in range(len(parts) - 1, -1, -1) if not parts[place].isdigit()]

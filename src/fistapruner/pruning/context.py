"""Define what pruning a decoder layer takes: settings of the run, hidden states, measures, events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..core import Constraint, LayerProblem
from ..models.layerwise import LayerwiseModel
from ..models.layout import Group, Layout
from ..passes.store import HiddenStates, Store
from ..passes.stream import Calls
from ..runs.records import OperatorEntry, RemovalEntry
from ..settings.prune import Recipe
from ..structure.smaller import Widths
from ..structure.units import Unit


def solved_groups(layout: Layout, index: int, sparsity: Mapping[str, Constraint], *, cut: bool) -> list[int]:
    """Return the numbers of the groups that are solved.

    Args:
        layout: the operators to prune, in the shapes that they are to have.
        index: number of the decoder layer.
        sparsity: pattern of every operator, by full name.
        cut: the run removes channels or experts: groups without zeros are then left alone.
    """
    return [
        number
        for number, group in enumerate(layout.layers[index])
        if not cut
        or any(sparsity[layout.full_name(index, operator)].zeros(operator.rows, operator.columns) for operator in group)
    ]


def narrowed_groups(layout: Layout, index: int, units: Sequence[Unit]) -> Counter[int]:
    """Count for each group how many units take outputs from it.

    Args:
        layout: the operators to prune.
        index: number of the decoder layer.
        units: whose channels are removed from it.
    """
    groups = [{operator.name for operator in group} for group in layout.layers[index]]
    return Counter(
        number for unit in units for number, names in enumerate(groups) if not names.isdisjoint(unit.producers)
    )


def fitted_groups(layout: Layout, index: int, units: Sequence[Unit], recipe: Recipe) -> Counter[int]:
    """Count for each group how many units fit it to the dense outputs before they lose channels (goa).

    Args:
        layout: the operators to prune.
        index: number of the decoder layer.
        units: whose channels are removed from it.
        recipe: settings.
    """
    return narrowed_groups(layout, index, units) if recipe.structure.method == "goa" else Counter()


@dataclass(frozen=True)
class LayerContext:
    """Settings and model of a run: the same for all its decoder layers.

    Args:
        model: the dense model.
        layout: the operators to prune, in the shapes that they are to have.
        recipe: settings.
        sparsity: pattern of every operator, by full name.
        calls: arguments of the decoder layers.
        scratch: makes a temporary store from its name and shape.
        widths: whose channels and experts are removed, and how many stay; None where all of them do.
    """

    model: LayerwiseModel
    layout: Layout
    recipe: Recipe
    sparsity: Mapping[str, Constraint]
    calls: Calls
    scratch: Store
    widths: Widths | None = None

    def units(self, index: int) -> tuple[Unit, ...]:
        """Return the channels of decoder layer ``index`` that are removed."""
        return () if self.widths is None else self.widths.channels(index)

    def mixtures(self, index: int) -> tuple[Unit, ...]:
        """Return the mixtures of decoder layer ``index`` that lose experts."""
        return () if self.widths is None else self.widths.mixtures(index)

    def solved(self, index: int) -> list[int]:
        """Return the numbers of the groups that are solved: all, or where structure goes those that get zeros."""
        return solved_groups(self.layout, index, self.sparsity, cut=self.widths is not None)

    def names(self, index: int, group: Group) -> list[str]:
        """Return the full names of a group's operators."""
        return [self.layout.full_name(index, operator) for operator in group]


@dataclass(frozen=True)
class LayerStreams:
    """Stores of the hidden states into and out of one decoder layer.

    Args:
        dense: the layer's input in the dense model; None where neither target nor propagation needs the dense model.
            With ``pruned`` it may hold the first windows only (:func:`~.drift.dense_windows`).
        pruned: the layer's input in the pruned model; None with ``propagate=dense``, where ``dense`` is the input.
        dense_out: receives the dense layer's output; None where it is not needed.
        pruned_out: receives the pruned layer's output; None where it is not needed.
    """

    dense: HiddenStates | None
    pruned: HiddenStates | None
    dense_out: HiddenStates | None
    pruned_out: HiddenStates | None

    @property
    def seen(self) -> HiddenStates:
        """Return the input that the layer problems are solved on."""
        stream = self.pruned or self.dense
        assert stream is not None
        return stream


@dataclass(frozen=True)
class LayerMeasures:
    """Measures of one decoder layer of the dense model (:mod:`fistapruner.allocate.measure`).

    Args:
        metric: metric of output errors in block reconstruction
            (:class:`~fistapruner.training.reconstruct.ReconstructionSettings`).
        importance: weights of the rows of every operator, by full name; None counts all rows alike.
        scores: by full name of the operator that reads them, scores of its channels that were learned (bypass).
    """

    metric: Tensor | None = None
    importance: Mapping[str, Tensor] | None = None
    scores: Mapping[str, Tensor] = field(default_factory=dict)


NO_MEASURES = LayerMeasures()
"""Measures of a recipe that needs none."""


@dataclass(frozen=True)
class LayerEvents:
    """Functions that are called while a decoder layer is pruned.

    Args:
        operators: receives (operator names, worst relative error, or None when their work begins).
        problem: receives (number of the group, its problem) before it is solved.
    """

    operators: Callable[[str, float | None], None] = lambda names, error: None
    problem: Callable[[int, LayerProblem], None] = lambda number, problem: None


NO_EVENTS = LayerEvents()
"""Events that nothing receives."""


@dataclass
class LayerRecord:
    """What is gathered of a decoder layer while it is pruned.

    Attributes:
        weights: pruned tensors by checkpoint name, in the checkpoint's orientation, rounded as it will hold them.
        operators: for the report, in execution order; ``removals``: what was removed.
        warnings: sentences.
        rows: kept rows of the operators that lost some, by name inside the layer.
        parts: sparse and low-rank parts of the operators whose sum the layer holds, by name in checkpoint and journal.
        extra: more for the report, by its key there.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    operators: list[OperatorEntry] = field(default_factory=list)
    removals: list[RemovalEntry] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    rows: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

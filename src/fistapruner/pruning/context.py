"""What pruning a decoder layer is given: the run's settings, the hidden states around the layer, who is told of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..activations.store import HiddenStates, Store
from ..activations.stream import Calls
from ..constraints import Constraint
from ..models.discovery import Group, Layout
from ..models.layerwise import LayerwiseModel
from ..problem import LayerProblem
from ..recipes.settings import Recipe
from ..solvers import solve
from ..solvers.base import Method, Solution

Solver = Callable[[LayerProblem, Sequence[Constraint], Sequence[Method]], Solution]
"""Solves a group of operators by a chain of methods."""


@dataclass(frozen=True)
class LayerContext:
    """Everything that pruning needs and that is the same for all decoder layers of a run.

    Args:
        model: the dense model.
        layout: the operators to prune.
        recipe: settings.
        sparsity: pattern of every operator, by full name.
        calls: how decoder layers are called.
        scratch: makes a temporary store of a given name and shape, in memory or in a file.
        solver: solves a group of operators: all of it at once, or in parts (:mod:`~fistapruner.pruning.partition`).
    """

    model: LayerwiseModel
    layout: Layout
    recipe: Recipe
    sparsity: Mapping[str, Constraint]
    calls: Calls
    scratch: Store
    solver: Solver = solve

    def names(self, index: int, group: Group) -> list[str]:
        """Return the full names of a group's operators."""
        return [self.layout.full_name(index, operator) for operator in group]


@dataclass(frozen=True)
class LayerStreams:
    """The hidden states around one decoder layer.

    Args:
        dense: what enters the layer in the dense model; None where neither target nor propagation needs the dense model.
            Beside ``pruned`` it may hold the first windows only (:func:`~.drift.dense_windows`).
        pruned: what enters the layer in the pruned model; None with ``propagate=dense``, where ``dense`` enters it.
        dense_out: receives the dense layer's output; None if nobody needs it.
        pruned_out: receives the pruned layer's output; None if nobody needs it.
    """

    dense: HiddenStates | None
    pruned: HiddenStates | None
    dense_out: HiddenStates | None
    pruned_out: HiddenStates | None

    @property
    def seen(self) -> HiddenStates:
        """What the pruned operators are solved on."""
        stream = self.pruned or self.dense
        assert stream is not None
        return stream


@dataclass(frozen=True)
class LayerMeasures:
    """What was measured on the dense model for one decoder layer (:mod:`fistapruner.sensitivity.decision`).

    Args:
        metric: weight of errors of the layer's output in block matching (:class:`~fistapruner.tuning.block_matching.MatchSettings`).
        importance: weights of the rows of every operator, by full name; None counts all rows alike.
    """

    metric: Tensor | None = None
    importance: Mapping[str, Tensor] | None = None


NOT_MEASURED = LayerMeasures()
"""The recipe needs no measures."""


@dataclass(frozen=True)
class LayerEvents:
    """Functions that are called while a decoder layer is pruned.

    Args:
        operators: receives (operator names, worst relative error, or None when their work begins).
        problem: receives (number of the group, its problem) before it is solved.
        passed: called when ``LayerStreams.dense_out`` is complete, long before the layer is.
    """

    operators: Callable[[str, float | None], None] = lambda names, error: None
    problem: Callable[[int, LayerProblem], None] = lambda number, problem: None
    passed: Callable[[], None] = lambda: None


NO_EVENTS = LayerEvents()
"""Nobody is told."""

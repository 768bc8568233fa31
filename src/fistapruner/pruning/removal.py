"""Remove channels of one decoder layer: choose them, cut them out, describe what was done.

It happens before the first operator that loses outputs is pruned, on the hidden states of the pruned prefix. What
comes after sees a smaller layer, whose targets are still the dense model's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..constraints import NM
from ..runs.records import OperatorEntry, RemovalEntry
from ..runtime.clock import Clock
from ..sensitivity.channel_order import channel_order, kept_share
from ..sensitivity.decision import permutes
from ..structured.removal import Removal, remove_channels
from ..structured.units import Unit, cut_channels
from .context import LayerContext, LayerMeasures
from .passes import LayerPasses


class LayerRemoval:
    """What was removed from a decoder layer.

    Attributes:
        weights: the tensors that lost channels, by checkpoint name, rounded as the checkpoint will hold them.
        removals: for the report.
        operators: entries of the operators that lost inputs and get no zeros afterwards.
        rows: by name inside the layer, the kept rows of the operators that lost some.
        warnings: sentences.
    """

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.removals: list[RemovalEntry] = []
        self.operators: list[OperatorEntry] = []
        self.rows: dict[str, Tensor] = {}
        self.warnings: list[str] = []

    def add(
        self, context: LayerContext, index: int, unit: Unit, removal: Removal, keep: Tensor, weight: Tensor
    ) -> None:
        """Cut channels out of the loaded layer, write the weights of their consumer, and note all of it.

        Args:
            context: model and recipe.
            index: number of the layer.
            unit: the channels.
            removal: which, and why.
            keep: (k,) kept channels in their new order.
            weight: (m, inputs of k channels) weights of the consumer; rounded on return.
        """
        model, layer = context.model, context.model.layers[index]
        places = keep.cpu()
        tensors = unit.tensors(layer, places)
        cut_channels(layer, unit, places)
        target = unit.consumer.weight(layer)
        target.copy_(model.rounded(model.source(f"{context.layout.full_name(index, unit.consumer)}.weight"), weight))
        weight.copy_(target)
        for name in tensors:
            source = model.source(f"{context.layout.prefix}.{index}.{name}")
            self.weights[source] = model.result(source, layer.get_parameter(name).detach())
        self.rows |= unit.kept_rows(places)
        self.warnings += removal.warnings
        settings = context.recipe.structure
        self.removals.append(
            RemovalEntry(
                unit=unit.kind,
                producers=list(unit.producers),
                consumer=unit.consumer.name,
                before=unit.before,
                after=len(keep),
                method=settings.method,
                compensate=settings.compensate,
                shrink=removal.shrink,
                dense_error=removal.dense,
                dropped_error=removal.dropped,
                validated_error=removal.validated,
                validated_dropped=removal.validated_dropped,
            )
        )


def remove_units(
    context: LayerContext,
    index: int,
    consumers: Sequence[int],
    passes: LayerPasses,
    clock: Clock,
    measures: LayerMeasures,
    told: Callable[[str, float | None], None],
) -> LayerRemoval:
    """Remove inputs of some groups of a decoder layer, one operator each, and the outputs they read.

    Args:
        context: model, layout, widths.
        index: number of the layer, which is loaded.
        consumers: numbers of the groups.
        passes: passes through the layer.
        clock: counts the time.
        measures: what was measured on the dense model for this layer.
        told: receives the name of each operator: with None before the work on it, then with its relative error.

    Returns:
        The new tensors and the report's entries.
    """
    found = LayerRemoval()
    for number in consumers:
        (operator,) = context.layout.layers[index][number]
        unit = next(unit for unit in context.units(index) if unit.consumer.name == operator.name)
        name, short = context.layout.full_name(index, operator), operator.name.rpartition(".")[2]
        told(short, None)
        known = passes.channels_of(number)
        importance = None if measures.importance is None else measures.importance[name].to(context.model.device)
        with clock.phase("structure"):
            removal = remove_channels(known, unit.after, context.recipe.structure, importance, unit.columns)
            keep, places, weight, shares = _ordered(context, name, unit, removal, known.problem.gram)
            found.add(context, index, unit, removal, keep, weight)
            error = known.problem.restricted(places).relative_errors(weight)[0]
        found.removals[-1].relative_error, found.removals[-1].permuted = error, shares
        if number not in passes.solved:
            found.operators.append(_entry(context, unit, number, removal, weight, error))
        told(short, error)
    return found


def _ordered(
    context: LayerContext, name: str, unit: Unit, removal: Removal, gram: Tensor
) -> tuple[Tensor, Tensor, Tensor, tuple[float, float] | None]:
    """Return the kept channels in the order that an n:m pattern asks for, their inputs, and the weights.

    Also the shares of the importance that the pattern keeps in the old and the new order, where it was changed. Groups
    of heads stay in their order.
    """
    nm = context.sparsity[name].nm
    if nm is None or unit.columns > 1 or not permutes(context.recipe):
        return removal.keep, removal.places, removal.weight, None
    pattern = NM(*nm)
    scores = removal.weight.square() * gram.diagonal()[removal.keep]
    order = channel_order(scores, pattern)
    shares = kept_share(scores, pattern), kept_share(scores[:, order], pattern)
    keep = removal.keep[order]
    return keep, keep, removal.weight[:, order].contiguous(), shares


def _entry(
    context: LayerContext, unit: Unit, number: int, removal: Removal, weight: Tensor, error: float
) -> OperatorEntry:
    """Make the report's entry of an operator that lost inputs and gets no zeros."""
    zeros = weight.numel() - int(torch.count_nonzero(weight))
    settings = context.recipe.structure
    steps: list[dict[str, Any]] = [{"method": settings.method, "relative_error": removal.dropped}]
    if settings.compensate == "refit":
        steps.append({"method": "refit", "relative_error": error})
    return OperatorEntry(
        name=unit.consumer.name,
        shape=(weight.shape[0], weight.shape[1]),
        sparsity="0%",
        zeros=zeros,
        density=1.0 - zeros / weight.numel(),
        relative_error=error,
        dense_error=removal.dense,
        group=number,
        steps=steps,
    )

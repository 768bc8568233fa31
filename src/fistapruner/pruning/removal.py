"""Remove channels of one decoder layer: choose them, cut them out, describe what was done.

It happens before the first operator that loses outputs is pruned, on the hidden states of the pruned prefix. What
comes after sees a smaller layer, whose targets are still the dense model's outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..constraints import NM
from ..models.coupling import Link, link_tensors
from ..runs.records import OperatorEntry, RemovalEntry
from ..runtime.clock import Clock
from ..sensitivity.channel_order import channel_order, kept_share
from ..sensitivity.decision import permutes
from ..structured.removal import Removal, remove_channels
from ..structured.units import cut_channels
from .context import LayerContext, LayerMeasures
from .passes import LayerPasses

UNIT = "MLP channels"
"""What is removed, as the report says it."""


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
        self, context: LayerContext, index: int, link: Link, removal: Removal, keep: Tensor, weight: Tensor
    ) -> None:
        """Cut a link in the loaded layer, write the weights of its consumer, and note all of it.

        Args:
            context: model and recipe.
            index: number of the layer.
            link: whose channels are removed.
            removal: which, and why.
            keep: (k,) kept channels in their new order.
            weight: (m, k) weights of the consumer; on return rounded as the checkpoint will hold them.
        """
        model, layer = context.model, context.model.layers[index]
        places = keep.cpu()
        tensors = link_tensors(layer, link, places[None])
        cut_channels(layer, link, places)
        target = link.consumer.weight(layer)
        target.copy_(model.rounded(model.source(f"{context.layout.full_name(index, link.consumer)}.weight"), weight))
        weight.copy_(target)
        for name in tensors:
            source = model.source(f"{context.layout.prefix}.{index}.{name}")
            self.weights[source] = model.result(source, layer.get_parameter(name).detach())
        self.rows |= dict.fromkeys(link.producers, places)
        self.warnings += removal.warnings
        settings = context.recipe.structure
        self.removals.append(
            RemovalEntry(
                unit=UNIT,
                producers=list(link.producers),
                consumer=link.consumer.name,
                before=link.channels,
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
    passes: LayerPasses,
    clock: Clock,
    measures: LayerMeasures,
    done: Callable[[str, float], None],
) -> LayerRemoval:
    """Remove the channels of all links of decoder layer ``index``.

    Args:
        context: model, layout, widths.
        index: number of the layer, which is loaded.
        passes: passes through it.
        clock: counts the time.
        measures: what was measured on the dense model for this layer.
        done: receives the name of the operator that read the channels, and its relative error.

    Returns:
        The new tensors and the report's entries.
    """
    found = LayerRemoval()
    for link in context.links(index):
        name = context.layout.full_name(index, link.consumer)
        number = next(
            number for number, group in passes.groups if link.consumer.name in (operator.name for operator in group)
        )
        known = passes.channels_of(number)
        importance = None if measures.importance is None else measures.importance[name].to(context.model.device)
        with clock.phase("structure"):
            assert context.widths is not None
            removal = remove_channels(known, context.widths.after, context.recipe.structure, importance)
            keep, weight, shares = _ordered(context, name, removal, known.problem.gram)
            found.add(context, index, link, removal, keep, weight)
            error = known.problem.restricted(keep).relative_errors(weight)[0]
        found.removals[-1].relative_error, found.removals[-1].permuted = error, shares
        if number not in passes.solved:
            found.operators.append(_entry(context, link, number, removal, weight, error))
        done(link.consumer.name.rpartition(".")[2], error)
    return found


def _ordered(
    context: LayerContext, name: str, removal: Removal, gram: Tensor
) -> tuple[Tensor, Tensor, tuple[float, float] | None]:
    """Return the kept channels, in the order that an n:m pattern asks for, and the weights.

    Also the shares of the importance that the pattern keeps in the old and the new order, where it was changed.
    """
    nm = context.sparsity[name].nm
    if nm is None or not permutes(context.recipe):
        return removal.keep, removal.weight, None
    pattern = NM(*nm)
    scores = removal.weight.square() * gram.diagonal()[removal.keep]
    order = channel_order(scores, pattern)
    shares = kept_share(scores, pattern), kept_share(scores[:, order], pattern)
    return removal.keep[order], removal.weight[:, order].contiguous(), shares


def _entry(
    context: LayerContext, link: Link, number: int, removal: Removal, weight: Tensor, error: float
) -> OperatorEntry:
    """Make the report's entry of an operator that lost inputs and gets no zeros."""
    zeros = weight.numel() - int(torch.count_nonzero(weight))
    settings = context.recipe.structure
    steps: list[dict[str, Any]] = [{"method": settings.method, "relative_error": removal.dropped}]
    if settings.compensate == "refit":
        steps.append({"method": "refit", "relative_error": error})
    return OperatorEntry(
        name=link.consumer.name,
        shape=(weight.shape[0], weight.shape[1]),
        sparsity="0%",
        zeros=zeros,
        density=1.0 - zeros / weight.numel(),
        relative_error=error,
        dense_error=removal.dense,
        group=number,
        steps=steps,
    )

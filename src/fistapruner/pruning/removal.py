"""Remove channels of one decoder layer: choose them, cut them out, describe what was done.

It happens before the first operator that loses outputs is pruned, on the hidden states of the pruned prefix. What
comes after sees a smaller layer, whose targets are still the dense model's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..allocate.channels import channel_order, raised_shares
from ..allocate.measure import permutes
from ..core import NM
from ..papers.goa import fit_and_choose
from ..runs.records import OperatorEntry, RemovalEntry
from ..runtime.show import Clock
from ..structure.choose import best_channels
from ..structure.refit import Removal, removal_error, remove_channels
from ..structure.units import Unit
from .context import LayerContext, LayerMeasures, LayerRecord
from .passes import LayerPasses


def remove_units(
    context: LayerContext,
    index: int,
    consumers: Sequence[int],
    passes: LayerPasses,
    clock: Clock,
    measures: LayerMeasures,
    progress: Callable[[str, float | None], None],
    record: LayerRecord,
) -> None:
    """Remove inputs of some groups of a decoder layer, one operator each, and the outputs they read.

    Args:
        context: model, layout, widths.
        index: number of the layer, which is loaded.
        consumers: numbers of the groups.
        passes: passes through the layer.
        clock: counts the time.
        measures: what was measured on the dense model for this layer.
        progress: receives the name of each operator: with None before the work on it, then with its relative error.
        record: receives the new tensors and the report's entries, also of the operators that lost inputs and get no
            zeros afterwards.
    """
    for number in consumers:
        (operator,) = context.layout.layers[index][number]
        unit = next(unit for unit in context.units(index) if unit.name == operator.name)
        name, short = context.layout.full_name(index, operator), operator.name.rpartition(".")[2]
        short = f"expert {operator.expert} {short}" if operator.experts else short
        progress(short, None)
        importance = None if measures.importance is None else measures.importance[name].to(context.model.device)
        settings, chosen = context.recipe.structure, None
        if settings.method == "goa":
            groups, of_channels = context.layout.layers[index], partial(passes.channels_of, number)
            known, chosen, warnings = fit_and_choose(
                context.model, index, unit, groups, passes.fitting_problem, of_channels, passes.seen
            )
            record.warnings += warnings
        else:
            known = passes.channels_of(number)
        if name in measures.scores:
            chosen = best_channels(measures.scores[name], unit.after)
        with clock.phase("structure"):
            biased = unit.biased(context.model.layers[index])
            removal = remove_channels(
                known, unit.after, settings, unit.columns, importance=importance, chosen=chosen, biased=biased
            )
            keep, places, weight, shares = _ordered(context, name, unit, removal, known.problem.gram)
            bias = _cut(context, index, unit, removal, keep, weight, record)
            record.removals.append(_removal_entry(context, unit, removal, len(keep), biased=bias is not None))
            error = removal_error(known, places, weight, bias)
        record.removals[-1].relative_error, record.removals[-1].permuted = error, shares
        record.removals[-1].tokens = known.tokens
        if number not in passes.solved:
            record.operators.append(_entry(context, unit, removal, weight, error, known.tokens))
        progress(short, error)


def _cut(
    context: LayerContext,
    index: int,
    unit: Unit,
    removal: Removal,
    keep: Tensor,
    weight: Tensor,
    record: LayerRecord,
) -> Tensor | None:
    """Cut channels out of the loaded layer, write the weights of their consumer, and note all of it.

    Tensors of which only places are kept are taken from the checkpoint: it may have more bits than the passes.

    Args:
        context: model and recipe.
        index: number of the layer.
        unit: the channels.
        removal: which, and why.
        keep: (k,) kept channels in their new order.
        weight: (m, inputs of k channels) weights of the consumer; rounded on return.
        record: receives the new tensors, the kept rows and the warnings.

    Returns:
        (m,) what was added to the consumer's bias, after rounding; None where nothing was.
    """
    model, layer, settings = context.model, context.model.layers[index], context.recipe.structure
    tensors = unit.tensors(keep)
    unit.cut_out(layer, keep)
    target = unit.consumer.weight(layer)
    target.copy_(model.rounded(model.source_of(index, f"{unit.name}.weight"), weight))
    weight.copy_(target)
    goa = settings.method == "goa"
    fitted = unit.names if goa else (unit.name,) if settings.compensation == "refit" else ()
    new, added = [f"{name}.weight" for name in fitted], None
    if removal.bias is not None:
        new.append(f"{unit.name}.bias")
        bias = layer.get_parameter(new[-1]).detach()
        before = bias.to(torch.float32, copy=True)
        source = model.source_of(index, new[-1])
        bias.copy_(model.rounded(source, before + removal.bias))
        added = bias.float() - before
    for name in dict.fromkeys((*tensors, *new)):
        source = model.source_of(index, name)
        if name in new:
            record.weights[source] = model.result(source, layer.get_parameter(name).detach())
        else:
            dim, stay = tensors[name]
            whole = record.weights[source] if source in record.weights else model.checkpoint.read(source)
            record.weights[source] = whole.index_select(dim, stay)  # an expert's may be another one's, renumbered
    record.rows |= unit.kept_rows(keep)
    record.warnings += removal.warnings
    return added


def _removal_entry(context: LayerContext, unit: Unit, removal: Removal, after: int, *, biased: bool) -> RemovalEntry:
    """Make the report's entry of removed channels; ``biased`` says that the consumer's bias has changed."""
    settings = context.recipe.structure
    return RemovalEntry(
        unit=unit.kind,
        producers=list(unit.producers),
        consumer=unit.name,
        before=unit.before,
        after=after,
        method=settings.method,
        compensate="none" if settings.compensation == "bias" and not biased else settings.compensation,
        shrink=removal.shrink,
        dense_error=removal.dense,
        dropped_error=removal.dropped,
        validated_error=removal.validated,
    )


def _ordered(
    context: LayerContext, name: str, unit: Unit, removal: Removal, gram: Tensor
) -> tuple[Tensor, Tensor, Tensor, tuple[float, float] | None]:
    """Return the kept channels in the order that an n:m pattern asks for, their inputs, and the weights.

    Also the shares of the importance that the pattern keeps in the old and the new order, where it was changed. Groups
    of heads stay in their order.
    """
    sparsity = context.sparsity[name]
    nm = sparsity.nm
    if nm is None or unit.columns > 1 or not permutes(context.recipe):
        return removal.keep, removal.places, removal.weight, None
    scores = removal.weight.square() * gram.diagonal()[removal.keep]
    order = channel_order(scores, NM(*nm))
    shares = raised_shares(scores, scores[:, order], sparsity)
    if shares is None:
        return removal.keep, removal.places, removal.weight, None
    keep = removal.keep[order]
    return keep, keep, removal.weight[:, order].contiguous(), shares


def _entry(
    context: LayerContext,
    unit: Unit,
    removal: Removal,
    weight: Tensor,
    error: float,
    tokens: int | None,
) -> OperatorEntry:
    """Make the report's entry of an operator that lost inputs and gets no zeros."""
    zeros = weight.numel() - int(torch.count_nonzero(weight))
    settings = context.recipe.structure
    steps: list[dict[str, Any]] = [{"method": settings.method, "relative_error": removal.dropped}]
    if settings.compensation == "refit":
        steps.append({"method": "refit", "relative_error": error})
    return OperatorEntry(
        name=unit.name,
        shape=(weight.shape[0], weight.shape[1]),
        sparsity="0%",
        zeros=zeros,
        relative_error=error,
        dense_error=removal.dense,
        steps=steps,
        tokens=tokens,
    )

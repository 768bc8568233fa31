"""Remove channels and experts of one decoder layer: choose them, cut them out, describe what was done.

It happens before the first operator that loses outputs is pruned, on the hidden states of the pruned prefix. What
comes after sees a smaller layer, whose targets are still the dense model's outputs.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..allocate.channels import channel_order, raised_shares
from ..allocate.measure import permutes
from ..core import NM
from ..models.experts import Experts
from ..papers.goa import fit_and_choose
from ..runs.records import OperatorEntry, RemovalEntry
from ..structure.choose import best_channels
from ..structure.experts import fewer_experts, kept_experts, reap_scores
from ..structure.refit import ChannelStatistics, Removal, removal_error, remove_channels
from ..structure.units import EXPERTS, Unit
from .context import LayerContext
from .passes import LayerPasses


def remove_channels_of(passes: LayerPasses, number: int) -> float:
    """Remove inputs of group ``number`` and the outputs it reads; return its relative error.

    The result receives the report's entry of the operator, too, if that gets no zeros afterwards.
    """
    context, settings, measures, result = passes.context, passes.recipe.structure, passes.measures, passes.result
    unit = next(unit for unit in context.widths.channels(passes.index) if unit.name == passes.groups[number][0].name)
    name = context.layout.full_name(passes.index, unit.name)
    importance = None if measures.importance is None else measures.importance[name].to(context.model.device)
    known, chosen = _choose(passes, number, unit, measures.scores.get(name))
    with passes.clock.phase("structure"):
        biased = passes.layer.get_submodule(unit.name).bias is not None
        removal = remove_channels(
            known, unit.after, settings, unit.columns, importance=importance, chosen=chosen, biased=biased
        )
        keep, places, weight, shares = _ordered(context, name, unit, removal, known.problem.gram)
        bias = _cut(passes, unit, removal, keep, weight)
        error = removal_error(known, places, weight, bias)
    unchanged = settings.compensation == "bias" and bias is None
    result.entry.removals.append(
        RemovalEntry(
            unit=unit.kind,
            consumer=unit.name,
            before=unit.before,
            after=len(keep),
            method=settings.method,
            compensate="none" if unchanged else settings.compensation,
            shrink=removal.shrink,
            dense_error=removal.dense,
            dropped_error=removal.dropped,
            validated_error=removal.validated,
            relative_error=error,
            permuted=shares,
            tokens=known.tokens,
        )
    )
    if number not in passes.solved:
        steps: list[dict[str, Any]] = [{"method": settings.method, "relative_error": removal.dropped}]
        if settings.compensation == "refit":
            steps.append({"method": "refit", "relative_error": error})
        result.entry.operators.append(
            OperatorEntry(
                name=unit.name,
                shape=(weight.shape[0], weight.shape[1]),
                sparsity="0%",
                zeros=weight.numel() - int(torch.count_nonzero(weight)),
                relative_error=error,
                dense_error=removal.dense,
                steps=steps,
                tokens=known.tokens,
            )
        )
    return error


def _choose(
    passes: LayerPasses, number: int, unit: Unit, scores: Tensor | None
) -> tuple[ChannelStatistics, Tensor | None]:
    """Return what is known of channels, and those that stay where learned ``scores`` or goa choose them."""
    if passes.recipe.structure.method != "goa":
        return passes.channels_of(number), None if scores is None else best_channels(scores, unit.after)
    known, chosen, warnings = fit_and_choose(
        passes.model,
        passes.index,
        unit,
        passes.groups,
        passes.fitting_problem,
        partial(passes.channels_of, number),
        passes.streams.seen,
    )
    passes.result.entry.warnings += warnings
    return known, chosen


def _ordered(
    context: LayerContext, name: str, unit: Unit, removal: Removal, gram: Tensor
) -> tuple[Tensor, Tensor, Tensor, tuple[float, float] | None]:
    """Return the kept channels in the order that an n:m pattern asks for, their inputs, and the weights.

    Also the shares of the importance that the pattern keeps in the old and the new order, where it was changed. Groups
    of heads stay in their order.
    """
    sparsity = context.sparsity[name]
    if sparsity.nm is not None and unit.columns == 1 and permutes(context.recipe):
        scores = removal.weight.square() * gram.diagonal()[removal.keep]
        order = channel_order(scores, NM(*sparsity.nm))
        if (shares := raised_shares(scores, scores[:, order], sparsity)) is not None:
            return removal.keep[order], removal.keep[order], removal.weight[:, order].contiguous(), shares
    return removal.keep, removal.places, removal.weight, None


def _cut(passes: LayerPasses, unit: Unit, removal: Removal, keep: Tensor, weight: Tensor) -> Tensor | None:
    """Cut channels out of the loaded layer, write the weights of their consumer, and note all of it.

    Tensors of which only places are kept are taken from the checkpoint: it may have more bits than the passes.

    Args:
        keep: (k,) kept channels in their new order.
        weight: (m, inputs of k channels) weights of the consumer; rounded on return.

    Returns:
        (m,) what was added to the consumer's bias, after rounding; None where nothing was.
    """
    model, layer, settings, result = passes.model, passes.layer, passes.recipe.structure, passes.result
    tensors = unit.tensors(keep)
    unit.cut_out(layer, keep)
    target = unit.consumer.weight(layer)
    target.copy_(model.rounded(model.source_of(passes.index, f"{unit.name}.weight"), weight))
    weight.copy_(target)
    goa = settings.method == "goa"
    fitted = unit.names if goa else (unit.name,) if settings.compensation == "refit" else ()
    new, added = [f"{name}.weight" for name in fitted], None
    if removal.bias is not None:
        new.append(f"{unit.name}.bias")
        bias = layer.get_parameter(new[-1]).detach()
        before = bias.to(torch.float32, copy=True)
        source = model.source_of(passes.index, new[-1])
        bias.copy_(model.rounded(source, before + removal.bias))
        added = bias.float() - before
    for name in dict.fromkeys((*tensors, *new)):
        source = model.source_of(passes.index, name)
        if name in new:
            result.weights[source] = model.result(source, layer.get_parameter(name).detach())
        else:
            dim, stay = tensors[name]
            whole = result.weights[source] if source in result.weights else model.checkpoint.read(source)
            result.weights[source] = whole.index_select(dim, stay)  # an expert's may be another one's, renumbered
    result.rows |= {name: cut.places(keep, unit.before) for name, cut in unit.producers.items()}
    result.entry.warnings += removal.warnings
    return added


def remove_experts(passes: LayerPasses, unit: Unit, loaded: ExitStack) -> None:
    """Remove experts of a loaded decoder layer, until ``loaded`` is left.

    The result receives the tensors that are others now, with all bits that the checkpoint has.
    """
    model, layer, result = passes.model, passes.layer, passes.result
    checkpoint, stored = model.checkpoint, partial(model.source_of, passes.index)
    routed = passes.routed_to(unit.name)
    experts = layer.get_submodule(unit.name)
    assert isinstance(experts, Experts)
    with passes.clock.phase("structure"):
        scores = reap_scores(experts, routed, model.device)
        keep = kept_experts(scores, unit)
        loaded.enter_context(fewer_experts(layer, unit, keep))
    passes.rerouted(unit.name)
    with passes.clock.phase("io"):
        for name, (dim, places) in unit.tensors(keep).items():
            result.weights[stored(name)] = checkpoint.read(stored(name)).index_select(dim, places)
        for place, number in enumerate(keep.tolist()):
            for name, _ in experts.get_submodule(str(place)).named_parameters() if place != number else ():
                source, old = (stored(f"{unit.name}.{each}.{name}") for each in (place, number))
                result.weights[source] = checkpoint.read(old).to(checkpoint.entry(source).dtype)
    result.entry.removals.append(
        RemovalEntry(
            unit=EXPERTS,
            kept=keep.tolist(),
            scores=scores.tolist(),
            consumer=unit.name,
            before=unit.before,
            after=unit.after,
            method="reap",
            compensate="none",
        )
    )

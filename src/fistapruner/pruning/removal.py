"""Remove channels and experts of one decoder layer; make the layer problems of single experts.

Channels are removed before the first operator that loses outputs is pruned, on the hidden states of the pruned
prefix. What comes after sees a smaller layer, whose targets are still the dense model's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..allocate.channels import channel_order, raised_shares
from ..allocate.measure import permutes
from ..core import NM, LayerProblem, ProblemSums
from ..models.experts import Experts
from ..papers.goa import fit_and_choose
from ..runs.records import OperatorEntry, RemovalEntry
from ..runtime.show import Clock
from ..structure.choose import best_channels
from ..structure.experts import fewer_experts, kept_experts, reap_scores
from ..structure.refit import Removal, problem_without_tokens, removal_error, remove_channels, share_of_few, shrunk
from ..structure.units import EXPERTS, Unit
from .context import LayerContext, LayerMeasures, LayerRecord
from .passes import LayerPasses

FEW = "fewer tokens than inputs"
SHRUNK = ", so their Grams are shrunk towards the diagonal"
NONE = "no token was routed to them, so they are pruned by magnitude"


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


def routed_problem(sums: ProblemSums, name: str, target: float, *, release: bool = True) -> LayerProblem:
    """Make the layer problem of a group of an expert's operators, whatever the number of its tokens.

    With p tokens, fewer than the n inputs, the Gram is singular, and least squares would fit noise. It is shrunk
    towards its diagonal by the share n / (n + p) (:mod:`fistapruner.structure.refit`): the penalty on changes of
    weights is n / p. Errors are then those under the shrunk Gram, as shares of the energy under it. Without tokens the
    Gram is the identity: all inputs count alike.

    Args:
        sums: of the tokens that were routed to the expert.
        name: of the operators.
        target: share of the dense model's output in the target.
        release: the sums will not be used again.
    """
    if not sums.tokens:
        return problem_without_tokens(sums.weight, name)
    problem = sums.problem(name, target, release=release)
    share = share_of_few(problem.shape[1], sums.tokens)
    return problem if share is None else replace(shrunk(problem, share), energy=None)


def routing_warnings(
    layer: str, operators: Sequence[OperatorEntry], removals: Sequence[RemovalEntry], mixtures: Iterable[str]
) -> list[str]:
    """Name the experts of a layer that few calibration tokens, or none, were routed to.

    Args:
        layer: name of the decoder layer.
        operators: the report's entries of its operators.
        removals: of what was removed.
        mixtures: names of its modules of experts.
    """
    warnings = []
    solved = any(entry.tokens and entry.sparsity != "0%" for entry in operators)
    fits = solved or any(entry.tokens and entry.shrink for entry in removals)  # flap alone, for one, does not
    read = [(entry.name, entry.tokens, entry.shape[1]) for entry in operators]
    read += [(entry.consumer, entry.tokens, entry.before) for entry in removals]
    for mixture in mixtures:
        tokens: dict[str, int] = {}
        inputs: dict[str, int] = {}
        for name, count, columns in read:
            if count is not None and name.startswith(mixture + "."):
                expert = name.removeprefix(mixture + ".").partition(".")[0]
                tokens[expert], inputs[expert] = count, max(inputs.get(expert, 0), columns)
        none = [expert for expert, count in tokens.items() if not count]
        few = [f"{expert} ({count} tokens)" for expert, count in tokens.items() if 0 < count < inputs[expert]]
        warnings += [
            f"{layer}.{mixture}: experts {', '.join(found)}: {said}"
            for found, said in ((none, NONE), (few, FEW + SHRUNK if fits else FEW))
            if found
        ]
    return warnings


def remove_experts(
    context: LayerContext,
    index: int,
    unit: Unit,
    passes: LayerPasses,
    clock: Clock,
    loaded: ExitStack,
    record: LayerRecord,
) -> None:
    """Remove experts of a loaded decoder layer, until ``loaded`` is left.

    Args:
        context: model and settings.
        index: number of the layer.
        unit: the mixture, and how many of its experts stay.
        passes: passes through the layer.
        clock: counts the time.
        loaded: holds the layer.
        record: receives the tensors that are others now, with all bits that the checkpoint has, and the report's entry.
    """
    model = context.model
    layer = model.layers[index]

    def stored(name: str) -> str:
        return model.source_of(index, name)

    routed = passes.routed_to(unit.name)
    experts = layer.get_submodule(unit.name)
    assert isinstance(experts, Experts)
    with clock.phase("structure"):
        scores = reap_scores(experts, routed, model.device)
        keep = kept_experts(scores, unit)
        loaded.enter_context(fewer_experts(layer, unit, keep))
    passes.rerouted(unit.name)
    with clock.phase("io"):
        for name, (dim, places) in unit.tensors(keep).items():
            record.weights[stored(name)] = model.checkpoint.read(stored(name)).index_select(dim, places)
        for place, number in enumerate(keep.tolist()):
            for name, _ in experts.get_submodule(str(place)).named_parameters() if place != number else ():
                source, old = (stored(f"{unit.name}.{each}.{name}") for each in (place, number))
                record.weights[source] = model.checkpoint.read(old).to(model.checkpoint.entry(source).dtype)
    entry = RemovalEntry(
        unit=EXPERTS,
        kept=keep.tolist(),
        scores=scores.tolist(),
        consumer=unit.name,
        before=unit.before,
        after=unit.after,
        method="reap",
        compensate="none",
    )
    record.removals.append(entry)

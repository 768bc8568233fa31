"""Prune one decoder layer: the unit that is journaled, resumed, scheduled, timed and reported."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core import Constraint, LayerProblem, ProblemSums
from ..core.problem import unweighted
from ..errors import FistaPrunerError
from ..models.low_rank import A, B, sum_of_parts
from ..models.operators import Group, Operator
from ..runs.records import LayerEntry, OperatorEntry
from ..runtime.devices import release_memory
from ..runtime.numerics import dtype_name
from ..runtime.show import Clock
from ..solvers import parse_method
from ..solvers.base import Method, Solution
from ..solvers.low_rank import LowRank, solve_low_rank
from ..training.reconstruct import ReconstructionSettings, reconstruct_layer
from .context import NO_EVENTS, NO_MEASURES, LayerContext, LayerEvents, LayerMeasures, LayerRecord, LayerStreams
from .passes import LayerPasses
from .removal import remove_experts, remove_units, routed_problem, routing_warnings

ERROR_OF = "what the dense layer adds to its input, first batch of calibration windows"
"""What a layer's relative error is relative to, as the report says it."""


@dataclass(frozen=True)
class LayerResult:
    """A pruned decoder layer.

    Args:
        weights: pruned tensors by checkpoint name, in the checkpoint's orientation, rounded as it will hold them.
        entry: its part of the report.
    """

    weights: dict[str, Tensor]
    entry: LayerEntry


def prune_layer(
    context: LayerContext,
    index: int,
    streams: LayerStreams,
    measures: LayerMeasures = NO_MEASURES,
    events: LayerEvents = NO_EVENTS,
) -> LayerResult:
    """Prune decoder layer ``index``, group after group.

    One dense pass serves all groups: it fills the first group's Gram (nothing is pruned before it), keeps the dense
    inputs or outputs of the other groups for the cross terms, and gives the next layer its dense hidden states. Then
    each group gets one pass with the operators before it pruned, stopped where the group begins.

    Args:
        context: model, layout, settings.
        index: number of the layer.
        streams: hidden states in and out.
        measures: what was measured on the dense model for this layer.
        events: functions that are called on the way.

    Raises:
        FistaPrunerError: NaN or infinity in weights or activations; names the operator.
    """
    model, clock = context.model, Clock(context.model.device)
    record = LayerRecord()
    with ExitStack() as loaded:
        with clock.phase("io"):
            loaded.enter_context(model.layer(index))
        passes = LayerPasses(context, index, streams, clock)
        passes.dense_pass()
        passes.make_wanted()
        _prune_groups(context, index, passes, clock, measures, events, record, loaded)
        _reconstruct(context, index, streams, passes, clock, measures, record)
        error = passes.output_pass()
    name = f"{context.layout.layers_name}.{index}"
    mixtures = dict.fromkeys(operator.experts for operator in context.layout.in_layer(index))
    record.warnings += routing_warnings(name, record.operators, record.removals, filter(None, mixtures))
    entry = LayerEntry(
        index=index,
        name=name,
        seconds=clock.seconds,
        relative_error=error,
        relative_error_of=None if error is None else ERROR_OF,
        operators=record.operators,
        removals=record.removals,
        device=str(model.device),
        warnings=record.warnings,
        **record.extra,
    )
    return LayerResult(record.weights, entry)


def _prune_groups(
    context: LayerContext,
    index: int,
    passes: LayerPasses,
    clock: Clock,
    measures: LayerMeasures,
    events: LayerEvents,
    record: LayerRecord,
    loaded: ExitStack,
) -> None:
    """Remove channels and experts, and prune the operators, of one group after another."""
    for number, group in passes.groups:
        for unit in passes.mixtures_before(number):
            remove_experts(context, index, unit, passes, clock, loaded, record)
            release_memory()
        if consumers := passes.cut_before(number):
            remove_units(context, index, consumers, passes, clock, measures, events.operators, record)
            release_memory()
        if number not in passes.solved:
            passes.pruned(number)
            continue
        names = "+".join(operator.name.rpartition(".")[2] for operator in group)
        names = f"expert {group[0].expert} {names}" if group[0].experts else names
        events.operators(names, None)
        worst = _prune_group(context, index, number, passes.sums_of(number), clock, measures, events, record)
        release_memory()
        record.weights |= _weights(context, index, group) | record.parts
        passes.pruned(number)
        events.operators(names, worst)


def _prune_group(
    context: LayerContext,
    index: int,
    number: int,
    sums: ProblemSums,
    clock: Clock,
    measures: LayerMeasures,
    events: LayerEvents,
    record: LayerRecord,
) -> float:
    """Solve group ``number`` operator by operator, write the solutions, return the worst error.

    What depends on the Gram of the group is computed once; the problem is freed on return.
    """
    group = context.layout.layers[index][number]
    names = context.names(index, group)
    routed, tokens = bool(group[0].experts), sums.tokens
    with clock.phase("problem"):
        make = routed_problem if routed else ProblemSums.problem
        whole = replace(make(sums, "+".join(names), context.recipe.dense_share, release=True), cache={})
    start, worst = 0, 0.0
    for operator, name in zip(group, names, strict=True):
        problem = whole.slice(slice(start, start + operator.rows), name)
        start += operator.rows
        events.problem(number, problem)
        pattern, importance = context.sparsity[name], _importance(context, index, operator, measures, record)
        with clock.phase("solve"):
            steps = parse_method("magnitude") if routed and not tokens else context.recipe.steps
            solution, low_rank = _solve(problem, pattern, steps, context.recipe.low_rank, importance)
            total, unrounded = _write(context, index, operator, name, solution.weight, low_rank, record)
        with clock.phase("report"):
            # Solvers that keep dense weights leave nothing to round: their error is known, and costs as much as a pass.
            known = unrounded and importance is None
            error = solution.stats[0]["relative_error"] if known else problem.relative_error(total)
            entry = _operator_entry(problem, solution, error, operator, str(pattern))
        entry.low_rank = None if low_rank is None else len(low_rank.a)
        entry.tokens = tokens if routed else None
        record.operators.append(entry)
        record.warnings += solution.warnings
        worst = max(worst, error)
    return worst


def _operator_entry(
    problem: LayerProblem, solution: Solution, error: float, operator: Operator, pattern: str
) -> OperatorEntry:
    """Make the entry of an operator.

    Args:
        problem: the solved problem, without row weights.
        solution: weights rounded as in the checkpoint.
        error: its relative error.
        operator: which was solved.
        pattern: its sparsity, as text.
    """
    weight = solution.weight
    zeros = weight.numel() - int(torch.count_nonzero(weight))  # summing booleans would convert them to int64
    return OperatorEntry(
        name=operator.name,
        shape=(operator.rows, operator.columns),
        sparsity=pattern,
        zeros=zeros,
        relative_error=error,
        dense_error=problem.dense_error(),
        steps=solution.stats[0]["steps"],
    )


def _weights(context: LayerContext, index: int, group: Group) -> dict[str, Tensor]:
    """Copy a group's weights out of the loaded layer, by checkpoint name.

    Operators without zeros are left out: the checkpoint may have more bits of them than the layer.
    """
    model, layer = context.model, context.model.layers[index]
    weights = {}
    for operator, name in zip(group, context.names(index, group), strict=True):
        if not context.sparsity[name].zeros(operator.rows, operator.columns):
            continue
        stored = model.source(f"{name}.weight")
        weights[stored] = model.result(stored, layer.get_parameter(f"{operator.name}.weight").detach())
    return weights


def _importance(
    context: LayerContext, index: int, operator: Operator, measures: LayerMeasures, record: LayerRecord
) -> Tensor | None:
    """Return the weights of an operator's rows, (m,); None where they count alike."""
    if measures.importance is None:
        return None
    rows = measures.importance[context.layout.full_name(index, operator)]
    rows = rows[record.rows[operator.name]] if operator.name in record.rows else rows
    return rows.to(context.model.device)


def _solve(
    problem: LayerProblem, pattern: Constraint, steps: Sequence[Method], rank: int, importance: Tensor | None
) -> tuple[Solution, LowRank | None]:
    """Solve an operator's problem, its rows weighted by their importance.

    Weights that stay have the same bits.
    """
    if importance is None:
        return solve_low_rank(problem, pattern, steps, rank)
    weighted = problem.weighted(importance)
    solution, low_rank = solve_low_rank(weighted, pattern, steps, rank)
    stay = solution.mask & (solution.weight == weighted.weight)
    torch.where(stay, problem.weight, unweighted(solution.weight, importance), out=solution.weight)
    if low_rank is not None:
        unweighted(low_rank.b, importance)
    return solution, low_rank


def _reconstruct(
    context: LayerContext,
    index: int,
    streams: LayerStreams,
    passes: LayerPasses,
    clock: Clock,
    measures: LayerMeasures,
    record: LayerRecord,
) -> None:
    """Reconstruct the pruned layer as a block, if the recipe asks for it."""
    if passes.wanted is None:
        return
    recipe, groups = context.recipe, context.layout.layers[index]
    settings = ReconstructionSettings(recipe.reconstruct, recipe.seed, measures.metric)
    with clock.phase("reconstruct"):
        result = reconstruct_layer(
            context.model, index, groups, streams.seen, passes.wanted, context.calls, settings, record.parts
        )
    record.weights |= result.weights
    record.extra["reconstruct"] = result.record


def _write(
    context: LayerContext,
    index: int,
    operator: Operator,
    name: str,
    weight: Tensor,
    low_rank: LowRank | None,
    record: LayerRecord,
) -> tuple[Tensor, bool]:
    """Write a solution into the layer and back into itself, rounded as the checkpoint will hold it.

    Args:
        context: model and settings.
        index: number of the layer.
        operator: which is written.
        name: its full name.
        weight: (m, n) sparse part; receives the rounded values.
        low_rank: the part to add, rounded as the adapter will hold it; None where there is none.
        record: receives both parts as they are stored, where there are two.

    Returns:
        The operator's weight in the layer (m, n), fp32, and whether nothing was rounded or added.

    Raises:
        FistaPrunerError: the dtype of the checkpoint or of the passes cannot hold a weight.
    """
    model, module = context.model, context.model.layers[index]
    target, source = operator.weight(module), model.source(f"{name}.weight")
    rounded = model.rounded(source, weight)
    target.copy_(rounded)
    if not bool(target.isfinite().all()):
        dtype = min((rounded.dtype, target.dtype), key=lambda dtype: torch.finfo(dtype).max)
        better = "convert the checkpoint" if dtype == rounded.dtype else "set dtype"
        raise FistaPrunerError(
            f"{name}: a pruned weight of {float(weight.abs().max()):g} is beyond {torch.finfo(dtype).max:g}, the "
            f"largest of {dtype_name(dtype)}: {better} to bfloat16 or float32"
        )
    unrounded = torch.equal(weight, target.to(weight.dtype))
    weight.copy_(target)
    if low_rank is None:
        return weight, unrounded
    balanced = low_rank.balanced()
    factors = {name + A: model.result(source, balanced.a), name + B: model.result(source, balanced.b)}
    stored = model.result(source, module.get_parameter(f"{operator.name}.weight").detach())
    record.parts |= {source: stored, **factors}
    total = sum_of_parts(target, factors, name, transposed=False)
    target.copy_(total)
    return total.to(target.device), False

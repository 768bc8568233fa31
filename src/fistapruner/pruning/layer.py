"""Prune one decoder layer: the unit that is journaled, resumed, scheduled, timed and reported."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..constraints import Constraint
from ..errors import FistaPrunerError
from ..models.files.low_rank import A, B, sum_of_parts
from ..models.layerwise import LayerwiseModel
from ..models.layout import Group
from ..problem import LayerProblem, ProblemSums, unweighted
from ..runs.layer_records import LayerEntry
from ..runtime.clock import Clock
from ..runtime.memory import release_memory
from ..runtime.numerics import dtype_name
from ..solvers import parse_method
from ..solvers.base import Solution
from ..solvers.low_rank import SparsePlusLowRank, solve_low_rank
from ..tuning.block_reconstruction import ReconstructionSettings, reconstruct_layer
from .context import NO_EVENTS, NO_MEASURES, LayerContext, LayerEvents, LayerMeasures, LayerRecord, LayerStreams
from .entries import operator_entries
from .experts import remove_experts, routed_problem, routing_warnings
from .passes import LayerPasses
from .removal import remove_units

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
        if passes.dense_pass():
            events.passed()
        passed_after = sum(clock.seconds.values())
        passes.make_wanted()
        for number, group in passes.groups:
            for unit in passes.mixtures_before(number):
                tensors, removal = remove_experts(context, index, unit, passes, clock, loaded)
                record.weights |= tensors
                record.removals.append(removal)
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
        passed_after=passed_after,
        **record.extra,
    )
    return LayerResult(record.weights, entry)


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
    """Solve group ``number``, write the solution into the layer, return its worst relative error.

    The problem is freed on return.
    """
    model, group = context.model, context.layout.layers[index][number]
    names = context.names(index, group)
    patterns = [context.sparsity[name] for name in names]
    with clock.phase("problem"):
        rows, share = [operator.rows for operator in group], context.recipe.dense_share
        if routed := group[0].experts:
            problem = routed_problem(sums, names, group, share)
        else:
            problem = sums.problem(names, rows, share, release=True)
    with problem.unchanged("inspect"):
        events.problem(number, problem)
    with clock.phase("solve"):
        if routed and not sums.tokens:
            magnitude = context.solver(problem, patterns, parse_method("magnitude"))
            found = SparsePlusLowRank(magnitude, (None,) * len(group))
        else:
            found = _solve(context, problem, patterns, _importance(context, index, group, measures, record))
        solution, total = found.sparse, found.sparse.weight
        unrounded = _write(model, model.layers[index], group, names, solution)
        if any(part is not None for part in found.low_rank):
            total = _add_low_rank(model, model.layers[index], group, names, found, record)
    with clock.phase("report"):
        # Solvers that keep dense weights leave nothing to round: their error is known, and costs as much as a pass.
        known = unrounded and measures.importance is None and total is solution.weight
        reported = [stats["relative_error"] for stats in solution.stats]
        errors = reported if known else problem.relative_errors(total)
        texts = [str(pattern) for pattern in patterns]
        entries = operator_entries(problem, solution, errors, group, number, texts)
        for entry, part in zip(entries, found.low_rank, strict=True):
            entry.low_rank = None if part is None else len(part.a)
    for entry in entries if routed else ():
        entry.tokens = sums.tokens
    record.operators += entries
    record.warnings += solution.warnings
    return max((entry.relative_error or 0.0) for entry in entries)


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
    context: LayerContext, index: int, group: Group, measures: LayerMeasures, record: LayerRecord
) -> Tensor | None:
    """Return the weights of a group's rows, (m,); None where they count alike."""
    if measures.importance is None:
        return None
    parts = []
    for operator in group:
        rows = measures.importance[context.layout.full_name(index, operator)]
        parts.append(rows[record.rows[operator.name]] if operator.name in record.rows else rows)
    return torch.cat(parts)


def _solve(
    context: LayerContext, problem: LayerProblem, patterns: Sequence[Constraint], importance: Tensor | None
) -> SparsePlusLowRank:
    """Solve a group's problem, its rows weighted by their importance.

    Weights that stay have the same bits.
    """
    steps, rank = context.recipe.steps, context.recipe.low_rank
    if importance is None:
        return solve_low_rank(problem, patterns, steps, rank, context.solver)
    rows = importance.to(problem.weight.device)
    weighted = problem.weighted(rows)
    found = solve_low_rank(weighted, patterns, steps, rank, context.solver)
    weight = found.sparse.weight
    stay = found.sparse.mask & (weight == weighted.weight)
    torch.where(stay, problem.weight, unweighted(weight, rows), out=weight)
    for part, count in zip(found.low_rank, rows.split(problem.rows), strict=True):
        if part is not None:
            unweighted(part.b, count)
    return found


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


def _write(model: LayerwiseModel, module: nn.Module, group: Group, names: Sequence[str], solution: Solution) -> bool:
    """Write the solution into the layer and back into itself, rounded as the checkpoint will hold it.

    Returns:
        Whether rounding changed nothing.

    Raises:
        FistaPrunerError: the dtype of the checkpoint or of the passes cannot hold a weight.
    """
    unrounded = True
    parts = solution.weight.split([operator.rows for operator in group])
    for operator, name, part in zip(group, names, parts, strict=True):
        target = operator.weight(module)
        rounded = model.rounded(model.source(f"{name}.weight"), part)
        target.copy_(rounded)
        if not bool(target.isfinite().all()):
            dtype = min((rounded.dtype, target.dtype), key=lambda dtype: torch.finfo(dtype).max)
            better = "convert the checkpoint" if dtype == rounded.dtype else "set dtype"
            raise FistaPrunerError(
                f"{name}: a pruned weight of {float(part.abs().max()):g} is beyond {torch.finfo(dtype).max:g}, the "
                f"largest of {dtype_name(dtype)}: {better} to bfloat16 or float32, or raise the "
                "method's damping"
            )
        unrounded = unrounded and torch.equal(part, target.to(part.dtype))
        part.copy_(target)
    return unrounded


def _add_low_rank(
    model: LayerwiseModel,
    module: nn.Module,
    group: Group,
    names: Sequence[str],
    found: SparsePlusLowRank,
    record: LayerRecord,
) -> Tensor:
    """Add the low-rank parts, rounded as the adapter will hold them, to the operators in the layer.

    Args:
        model: the dense model.
        module: the loaded layer, whose operators hold the rounded sparse parts.
        group: the operators.
        names: their full names.
        found: both parts.
        record: receives both parts as they are stored.

    Returns:
        The sums (m, n), fp32.
    """
    totals = []
    for operator, name, part in zip(group, names, found.low_rank, strict=True):
        target, source = operator.weight(module), model.source(f"{name}.weight")
        if part is None:
            totals.append(target.float())
            continue
        balanced = part.balanced()
        factors = {name + A: model.result(source, balanced.a), name + B: model.result(source, balanced.b)}
        stored = model.result(source, module.get_parameter(f"{operator.name}.weight").detach())
        record.parts |= {source: stored, **factors}
        total = sum_of_parts(target, factors, name, transposed=False)
        target.copy_(total)
        totals.append(total.to(target.device))
    return torch.cat(totals)

"""How long a run will take, from the first batch of calibration windows in one decoder layer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from torch import Tensor

from ..activations.store import HiddenStates, scratch_factory
from ..activations.stream import embed
from ..constraints import Constraint
from ..models.discovery import Layout
from ..models.layerwise import LayerwiseModel
from ..problem import LayerProblem
from ..pruning.context import LayerContext, LayerEvents, LayerStreams
from ..pruning.drift import dense_windows
from ..pruning.layer import prune_layer
from ..pruning.partition import cut, part_of
from ..recipes.settings import Recipe
from ..solvers import solve
from ..tuning.block_matching import passes

WORTH_A_PROBE = 2e10
"""Multiplications of one pass of the calibration tokens through the model, below which no time is estimated: it is seconds."""

MATCHING_STEPS = 4
"""Steps of block matching that are timed."""


def measure_time(
    skeleton: LayerwiseModel,
    layout: Layout,
    recipe: Recipe,
    sparsity: Mapping[str, Constraint],
    tokens: Tensor,
    batch_size: int,
    by_operator: bool = False,
) -> float | None:
    """Seconds to prune all layers, from the first batch of windows in one layer; None where that is not worth measuring.

    Passes are measured as they are, with magnitude pruning instead of the method. The method is timed on the first rows of
    each group's problem, twice as many the second time, so that what does not grow with the rows is told from what does. Where
    the run solves groups ``by_operator``, that is done of a part of each operator. Of block matching a few steps are timed.
    """
    index = next(index for index, groups in enumerate(layout.layers) if groups)
    if sum(map(layout.weights, range(len(skeleton)))) * tokens.numel() < WORTH_A_PROBE:
        return None
    batch = tokens[:batch_size]
    solving = 0.0

    def time_solve(number: int, problem: LayerProblem) -> None:
        nonlocal solving
        patterns = [sparsity[name] for name in problem.names]
        if by_operator:
            solving += sum(count * _solving(part, [pattern], recipe) for part, pattern, count in _apart(problem, patterns, recipe))
        else:
            solving += _solving(problem, patterns, recipe)

    states = HiddenStates((len(batch), tokens.shape[1], skeleton.width), skeleton.dtype)
    calls = embed(skeleton, batch, len(batch), states)
    onward = HiddenStates((len(batch), tokens.shape[1], skeleton.width), skeleton.dtype)
    streams = LayerStreams(states, None, onward, None)
    if recipe.propagate == "pruned":
        shape = (len(batch), tokens.shape[1], skeleton.width)
        drifted, drifted_on = HiddenStates(shape, skeleton.dtype), HiddenStates(shape, skeleton.dtype)
        drifted.write(0, states.read(0, len(batch)))
        streams = LayerStreams(states, drifted, onward, drifted_on) if recipe.dense_share else LayerStreams(None, drifted, None, drifted_on)
    few_steps = min(recipe.reconstruct, MATCHING_STEPS)
    cheap = recipe.model_copy(update={"method": Recipe.build({"method": "magnitude"}).steps, "reconstruct": few_steps})
    context = LayerContext(skeleton, layout, cheap, sparsity, calls, scratch_factory(None, skeleton.dtype))
    result = prune_layer(context, index, streams, events=LayerEvents(problem=time_solve))
    seconds = result.entry.seconds
    passing = seconds.get("capture", 0.0) + seconds.get("gram", 0.0)
    if streams.pruned is not None and streams.dense is not None:
        windows = dense_windows(recipe, layout, len(tokens), tokens.shape[1], len(batch))
        passing -= max(0.0, (result.entry.passed_after or 0.0) - seconds.get("io", 0.0)) * (1 - windows / len(tokens))
    passing *= len(tokens) / len(batch)
    fixed = sum(value for phase, value in seconds.items() if phase not in ("capture", "gram", "reconstruct"))
    matching = 0.0
    if few_steps:
        matching = seconds["reconstruct"] * passes(recipe.reconstruct, len(tokens)) / passes(few_steps, len(batch))
    return (fixed + solving + matching) * sum(map(bool, layout.layers)) + passing * len(skeleton)


def _apart(problem: LayerProblem, patterns: Sequence[Constraint], recipe: Recipe) -> Iterator[tuple[LayerProblem, Constraint, int]]:
    """Of each operator of a group the first of the parts it is solved in, that part's pattern, and how many parts there are."""
    for _, parts in groupby(cut(problem.rows, problem.shape[1], patterns, recipe.steps), key=lambda part: part.operator):
        first, *others = parts
        yield part_of(problem, first), first.sparsity, 1 + len(others)


def _solving(problem: LayerProblem, patterns: list[Constraint], recipe: Recipe) -> float:
    """Seconds to solve a problem, estimated from its first rows where it has many."""
    few = max(32, problem.shape[0] // 16)
    if 2 * few >= problem.shape[0]:
        return _seconds(problem, patterns, recipe)
    once, twice = (_seconds(problem.slice(0, count), patterns[:1], recipe) for count in (few, 2 * few))
    return once + max(twice - once, 0.0) * (problem.shape[0] - few) / few


def _seconds(problem: LayerProblem, patterns: list[Constraint], recipe: Recipe) -> float:
    begin = time.perf_counter()
    solve(problem, patterns, recipe.steps)
    return time.perf_counter() - begin

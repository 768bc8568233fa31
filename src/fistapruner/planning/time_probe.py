"""Estimate the time of a run from the first batch of windows in a decoder layer of each shape."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..allocate.curves import patterns_measured, row_error_curves
from ..allocate.measure import measured_by
from ..core import Constraint, LayerProblem
from ..models.layerwise import LayerwiseModel
from ..models.layout import Layout
from ..passes.store import Store, scratch_factory
from ..passes.stream import Calls, embed
from ..pruning.context import LayerContext, LayerEvents, LayerStreams
from ..pruning.drift import dense_windows
from ..pruning.layer import prune_layer
from ..runs.layer_records import LayerEntry
from ..settings.settings import Recipe
from ..solvers import solve
from ..structure.smaller import Widths
from ..training.reconstruct import passes

WORTH_MEASURING = 2e10
"""Multiplications of a pass of all calibration tokens, below which a run takes seconds."""

TIMED_SHAPES = 3
"""Most shapes of decoder layers of which one is timed; the most frequent ones are."""

TIMED_STEPS = 4
"""Steps of block reconstruction that are timed."""


@dataclass
class Beside:
    """What is timed beside pruning, of all decoder layers.

    Args:
        token: seconds of a plain pass of one token.
        curves: seconds to estimate how the error of every operator grows with its sparsity.
    """

    token: float = 0.0
    curves: float = 0.0


@dataclass(frozen=True)
class Scale:
    """Scale factors from one timed batch in one decoder layer to a whole run.

    Args:
        windows: calibration windows; ``batch``: windows that were timed.
        dense: windows of the dense pass where it runs beside the pruned one; None where both are one pass.
        layers: decoder layers that the timed one stands for; ``pruned``: those with operators to prune.
        steps: steps of block reconstruction; ``timed_steps``: steps that were timed.
    """

    windows: int
    batch: int
    dense: int | None
    layers: float
    pruned: float
    steps: int = 0
    timed_steps: int = 0


def measure_time(
    model: LayerwiseModel,
    layout: Layout,
    recipe: Recipe,
    sparsity: Mapping[str, Constraint],
    tokens: Tensor,
    batch_size: int,
    least: float = WORTH_MEASURING,
    *,
    widths: Widths | None = None,
    on_device: bool = False,
    beside: Beside | None = None,
) -> float | None:
    """Estimate the seconds to prune all layers from the first batch in a layer of each frequent shape.

    Passes are measured as they are, with magnitude pruning in place of the method. The method is timed apart, on a
    part of each operator's rows (:func:`time_solve`), for experts of one shape once, and of block reconstruction a few
    steps are timed. Low-rank parts are solved in the timed layers; beside them the method runs twice.

    Args:
        model: the model.
        layout: operators to prune.
        recipe: settings.
        sparsity: pattern of every operator, by full name.
        tokens: (windows, seqlen) token ids of the first batch.
        batch_size: windows in one forward pass.
        least: multiplications of one pass of the tokens below which nothing is measured.
        widths: whose channels are removed; ``layout`` has the shapes afterwards.
        on_device: the run keeps hidden states in the GPU's memory.
        beside: receives what is timed beside pruning.

    Returns:
        Seconds, or None where a run is too short to be worth measuring.
    """
    samples, seqlen = recipe.calibration.samples, tokens.shape[1]
    if sum(map(layout.weights, range(len(model)))) * samples * seqlen < least:
        return None
    batch = tokens[:batch_size]
    solving: list[tuple[float, float]] = []
    curved = patterns_measured(recipe.pattern) if measured_by(recipe) in ("error", "workload") else []
    # Experts are alike: one of them is timed, and one that no token was routed to.
    known: dict[Hashable, tuple[float, float]] = {}

    def timed(number: int, problem: LayerProblem) -> None:
        pattern = sparsity[problem.name]
        routed = layout.layers[index][number][0].experts
        key = (*problem.shape, pattern, problem.tokens is None) if routed else problem.name
        if key not in known:
            begin = time.perf_counter()
            if beside is not None and curved:
                row_error_curves(problem.without_drift(), [len(problem.weight)], curved)
            curves = time.perf_counter() - begin
            known[key] = time_solve(problem, pattern, recipe), curves
        solving.append(known[key])

    store = scratch_factory(None, model.dtype, model.device if on_device else torch.device("cpu"))
    streams, calls = _streams(model, batch, recipe, store)
    timed_steps = min(recipe.reconstruct, TIMED_STEPS)
    cheap = recipe.model_copy(
        update={"method": Recipe.build({"method": "magnitude"}).steps, "reconstruct": timed_steps}
    )
    context = LayerContext(model, layout, cheap, sparsity, calls, store, widths=widths)
    both = streams.pruned is not None and streams.dense is not None
    pruned = sum(map(bool, layout.layers))
    shapes = frequent_shapes(layout, sparsity)
    seconds = 0.0
    for index, count in shapes.items():
        share = count / sum(shapes.values())
        scale = Scale(
            windows=samples,
            batch=len(batch),
            dense=dense_windows(recipe, layout, samples, seqlen, len(batch)) if both else None,
            layers=share * len(model),
            pruned=share * pruned,
            steps=recipe.reconstruct,
            timed_steps=timed_steps,
        )
        solving.clear()
        entry = prune_layer(context, index, streams, events=LayerEvents(problem=timed)).entry
        methods, curves = (sum(each) for each in zip((0.0, 0.0), *solving, strict=True))
        seconds += extrapolate(entry, methods * (2 if recipe.low_rank else 1), scale)
        if beside is not None:
            passed = entry.seconds.get("plain", entry.seconds.get("capture", 0.0))
            beside.token += passed / batch.numel() * scale.layers
            beside.curves += curves * scale.pruned
    return seconds


def _streams(model: LayerwiseModel, batch: Tensor, recipe: Recipe, store: Store) -> tuple[LayerStreams, Calls]:
    """Embed a batch for the passes that the recipe makes: dense, pruned, or both."""
    shape = (*batch.shape, model.width)
    states, onward = store("states", shape), store("onward", shape)
    calls = embed(model, batch, len(batch), states)
    if recipe.propagate != "pruned":
        return LayerStreams(states, None, onward, None), calls
    drifted, drifted_on = store("drifted", shape), store("drifted-on", shape)
    drifted.write(0, states.read(0, len(batch)))
    if not recipe.dense_share:
        return LayerStreams(None, drifted, None, drifted_on), calls
    return LayerStreams(states, drifted, onward, drifted_on), calls


def frequent_shapes(layout: Layout, sparsity: Mapping[str, Constraint]) -> dict[int, int]:
    """Return the first decoder layer of each of the most frequent shapes, and how many layers have it.

    Layers of one shape have operators of the same sizes and patterns; those without operators are left out.
    """
    found: dict[Hashable, list[int]] = {}
    for index, groups in enumerate(layout.layers):
        shape = tuple(
            tuple((operator.rows, operator.columns, sparsity[layout.full_name(index, operator)]) for operator in group)
            for group in groups
        )
        if shape:
            found.setdefault(shape, []).append(index)
    frequent = sorted(found.values(), key=len, reverse=True)[:TIMED_SHAPES]
    return {indices[0]: len(indices) for indices in frequent}


def extrapolate(entry: LayerEntry, solving: float, scale: Scale) -> float:
    """Estimate the seconds of a run from one timed decoder layer.

    Args:
        entry: the layer's measured times.
        solving: seconds to solve all of its problems.
        scale: factors from the layer to the run.
    """
    seconds = entry.seconds
    passing = seconds.get("capture", 0.0) + seconds.get("gram", 0.0)
    if scale.dense is not None:
        dense_pass = max(0.0, (entry.passed_after or 0.0) - seconds.get("io", 0.0))
        passing -= dense_pass * (1 - scale.dense / scale.windows)
    passing *= scale.windows / scale.batch
    fixed = sum(value for phase, value in seconds.items() if phase not in ("capture", "gram", "reconstruct"))
    tuning = 0.0
    if scale.timed_steps:
        share = passes(scale.steps, scale.windows) / passes(scale.timed_steps, scale.batch)
        tuning = seconds["reconstruct"] * share
    return (fixed + solving + tuning) * scale.pruned + passing * scale.layers


Timer = Callable[[LayerProblem, Constraint, Recipe], float]
"""Seconds to solve a problem."""


def _seconds(problem: LayerProblem, pattern: Constraint, recipe: Recipe) -> float:
    """Measure the seconds to solve a problem."""
    begin = time.perf_counter()
    solve(problem, pattern, recipe.steps)
    return time.perf_counter() - begin


def time_solve(problem: LayerProblem, pattern: Constraint, recipe: Recipe, timer: Timer = _seconds) -> float:
    """Estimate the seconds to solve an operator from its first rows.

    The solve is timed on some rows and on twice as many, which separates what grows with the rows from what does not.

    Args:
        problem: of the operator.
        pattern: its sparsity.
        recipe: settings.
        timer: solves a problem and returns the seconds.
    """
    few = max(32, problem.shape[0] // 16)
    problem = replace(problem, cache=None)
    if 2 * few >= problem.shape[0]:
        return timer(problem, pattern, recipe)
    once, twice = (timer(problem.slice(slice(count)), pattern, recipe) for count in (few, 2 * few))
    return once + max(twice - once, 0.0) * (problem.shape[0] - few) / few

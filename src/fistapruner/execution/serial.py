"""Prune decoder layers one after the other in this process."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial

from ..core import LayerProblem
from ..passes.store import HiddenStates
from ..pruning.context import LayerEvents, LayerStreams
from ..runs.listener import Listener
from ..settings.settings import Recipe
from .context import RunContext


def prune_serially(
    context: RunContext,
    todo: Collection[int],
    listener: Listener,
    inspect: Callable[[int, int, LayerProblem], None] | None = None,
) -> None:
    """Prune the decoder layers in ``todo``; run hidden states through the others, as journaled.

    Args:
        context: the opened run.
        todo: indices of layers that are not journaled yet.
        listener: receives progress.
        inspect: receives (layer, group, problem) before each solve.
    """
    if not todo:
        return
    last = max(todo)
    stream, calls = context.embed()
    samples = context.dense_windows()
    dense: HiddenStates | None = stream
    pruned: HiddenStates | None = None
    if samples < stream.samples:
        dense, pruned = context.store("dense-0", samples=samples), stream
        for start, stop in calls.batches(samples):
            dense.write(start, stream.read(start, stop))
    for index in range(last + 1):
        dense_on, pruned_on = _needed_after(context.recipe, index, last)
        streams = LayerStreams(
            dense,
            pruned,
            context.store(f"dense-{index + 1}", samples=samples) if dense_on else None,
            context.store(f"pruned-{index + 1}") if pruned_on else None,
        )
        if index in todo:
            events = LayerEvents(operators=partial(listener.operators, index))
            if inspect is not None:
                events = replace(events, problem=partial(inspect, index))
            listener.layer(context.prune(index, streams, calls, events))
        else:
            listener.tick(f"layer {index}, already pruned", 0, 1)
            context.advance(index, streams, calls)
        for store in (dense, pruned):
            if store is not None:
                store.close()
        dense, pruned = streams.dense_out, streams.pruned_out


def _needed_after(recipe: Recipe, index: int, last: int) -> tuple[bool, bool]:
    """Check whether the layer after ``index`` needs (dense, pruned) hidden states."""
    if index == last:
        return False, False
    if recipe.propagate == "dense":
        return True, False
    return recipe.dense_share > 0.0, True

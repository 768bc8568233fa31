"""Measure the sizes of a pruning run: a window through a layer, small solves, the headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..allocate.fisher import HEAD_TOKENS, WIDE
from ..allocate.measure import (
    differentiates,
    needs_measuring,
    permutes,
    weighs_rows,
)
from ..core import Constraint
from ..core.sums import DriftFrom
from ..models.coupling import named_size
from ..models.layerwise import Call, LayerwiseModel
from ..models.layout import Group, Layout
from ..models.whole import whole_bytes
from ..papers.bypass import LENGTH, SEQUENCES
from ..passes.cached_outputs import kept_projections
from ..pruning.context import fitted_groups, solved_groups
from ..pruning.drift import dense_windows, drift_sources, kept_width
from ..runtime.memory import resident_memory
from ..runtime.numerics import ordered_attention
from ..settings.settings import Recipe
from ..structure.smaller import Widths, removed_weights
from ..structure.units import GROUPS, HEADS, Unit
from ..text import SELF
from ..text.generate import generation_bytes
from .footprint import peak_bytes, removal_bytes, solve_bytes
from .sizes import RETAINED, GroupSizes, Sizes


def measure_sizes(
    model: LayerwiseModel,
    layout: Layout,
    recipe: Recipe,
    sparsity: Mapping[str, Constraint],
    tokens: Tensor,
    widths: Widths | None = None,
    *,
    drawn: bool = False,
) -> Sizes:
    """Measure sizes by the checkpoint's headers, a window through a layer, a small solve of each group.

    The layers that may need most are measured. With ``widths`` channels are removed, and ``layout`` has the shapes
    afterwards. ``tokens``: (windows, seqlen) token ids, of which the first window is passed. ``drawn``: the calibration
    windows are in memory already, and the model generates none.
    """
    first, *others = (
        _measure_layer(model, layout, recipe, sparsity, tokens, widths, index, drawn=drawn)
        for index in largest_layers(layout)
    )
    return replace(first, others=tuple(replace(other, base=first.base) for other in others))


def _measure_layer(
    model: LayerwiseModel,
    layout: Layout,
    recipe: Recipe,
    sparsity: Mapping[str, Constraint],
    tokens: Tensor,
    widths: Widths | None,
    index: int,
    *,
    drawn: bool,
) -> Sizes:
    """Measure the sizes of a run whose layers are all like layer ``index``."""
    samples, seqlen = recipe.calibration.samples, tokens.shape[1]
    checkpoint = model.checkpoint
    itemsize = model.dtype.itemsize
    stored = min(itemsize, checkpoint.dtype.itemsize)
    in_layers = [model.layer_sources(index) for index in range(len(model))]
    outside = set(checkpoint.names()).difference(*in_layers)

    with model.embeddings_and_head(head=False):
        hidden, calls = model.embed(tokens[:1])
    groups = layout.layers[index]
    graded = differentiates(recipe)
    forward, backward = _pass_bytes(model, index, hidden, calls[index], both=graded or bool(recipe.reconstruct))
    touched = [set() if widths is None else widths.touched(number) for number in range(len(model))]
    solved = [solved_groups(layout, number, sparsity, cut=widths is not None) for number in range(len(model))]
    renumbered = [_renumbered(model, layout, number, solved[number], widths) for number in range(len(model))]
    units = () if widths is None else widths.channels(index)
    same = recipe.propagate == "dense"
    told = drift_sources(recipe, layout, index, units, same=same, solved=solved[index])
    kept = [kept_width(groups[number], source) for number, source in told.items()]
    pruned = sum(
        operator.rows * operator.columns
        for number, layer in enumerate(layout.layers)
        for place, group in enumerate(layer)
        for operator in group
        if place in solved[number] or (operator.name in touched[number] and not operator.experts)
    )
    more = low_rank_weights(layout, recipe, sparsity)
    measured = _measured_groups(layout, recipe, sparsity, index, units, told, solved[index], model.device)
    generates = SELF in recipe.calibration.sources.values() and not drawn
    text_weights = whole_bytes(checkpoint, model.dtype) if generates else 0
    return Sizes(
        base=resident_memory() + RETAINED + (0 if drawn else torch.int64.itemsize * samples * seqlen),
        ends=model.pass_bytes(outside),
        largest=max(entry.nbytes for entry in checkpoint.stored),
        checkpoint=checkpoint.nbytes
        + checkpoint.companion_bytes
        + more * stored
        - removed_weights(model, widths) * checkpoint.dtype.itemsize,
        pruned=stored * (pruned + more) + sum(renumbered),
        layer=max(map(model.pass_bytes, in_layers)),
        ahead=model.ahead_bytes,
        stored=stored,
        together=not recipe.error_correction,
        window=seqlen * model.width * itemsize,
        forward=forward,
        groups=measured,
        float_input=4 * seqlen * _largest_input(layout, index, units),
        removal=_removal_bytes(model, layout, recipe, index, units),
        proving=_proving_bytes(model, index, units),
        float_residual=2 * 4 * seqlen * model.width * recipe.corrects_drift,
        kept=sum(kept) * seqlen * itemsize,
        entering=_entering_width(layout, recipe, index, model.device) * seqlen * itemsize,
        samples=samples,
        dense=recipe.corrects_drift + (0 if recipe.propagate == "dense" or not recipe.dense_share else 2),
        inside=1 + bool(recipe.reconstruct and recipe.dense_share < 1),
        layers=len(model),
        backward=backward if graded else 0,
        reconstruction=backward + _reconstruction_bytes(model, layout, index) if recipe.reconstruct else 0,
        renumbered=max(renumbered),
        learning=_learning_bytes(model, recipe, units, seqlen, forward),
        comparing=_comparing_bytes(model, recipe, units, seqlen, forward),
        metric=4 * model.width * (model.width if model.width <= WIDE else 1) if recipe.reconstruct else 0,
        logits=4 * 4 * min(seqlen, HEAD_TOKENS) * model.vocabulary,
        text=text_weights and text_weights + generation_bytes(model, samples, seqlen),
        text_weights=text_weights,
        measured=needs_measuring(recipe),
        texts=1 if recipe.workload is None else 2,
        reordered=permutes(recipe),
        weighted=weighs_rows(recipe),
        cuda=model.device.type == "cuda",
        dense_windows=partial(dense_windows, recipe, layout, seqlen=seqlen),
    )


def _pass_bytes(model: LayerwiseModel, index: int, hidden: Tensor, call: Call, *, both: bool) -> tuple[int, int]:
    """Measure the peak of a forward pass, and of a forward and backward one: 0 unless ``both``."""
    with model.layer(index):
        with torch.no_grad():
            forward = peak_bytes(lambda: model.run(index, hidden, call))
        return forward, peak_bytes(lambda: _differentiate(model, index, hidden, call)) if both else 0


def _differentiate(model: LayerwiseModel, index: int, hidden: Tensor, call: Call) -> None:
    """Run a forward and a backward pass through decoder layer ``index``."""
    with torch.enable_grad(), ordered_attention(model.device):
        entering = hidden.detach().requires_grad_()
        torch.autograd.grad(model.run(index, entering, call).float().sum(), entering)


def _measured_groups(
    layout: Layout,
    recipe: Recipe,
    sparsity: Mapping[str, Constraint],
    index: int,
    units: Sequence[Unit],
    told: Mapping[int, DriftFrom],
    solved: Sequence[int],
    device: torch.device,
) -> tuple[GroupSizes, ...]:
    """Measure the groups of a layer: first those that only lose inputs, then those that are solved."""
    groups = layout.layers[index]
    consumers = {unit.name: unit for unit in units}
    found = [
        _cut_sizes(consumers[group[0].name], told.get(number))
        for number, group in enumerate(groups)
        if group[0].name in consumers and number not in solved
    ]
    known: dict[Any, GroupSizes] = {}  # experts are alike: one of them is measured
    for number, group in enumerate(groups):
        if number not in solved:
            continue
        patterns = [sparsity[layout.full_name(index, operator)] for operator in group]
        shapes = [(operator.rows, operator.columns) for operator in group]
        key = (*shapes, *patterns) if group[0].experts else number
        if key not in known:
            known[key] = _group_sizes(group, patterns, recipe, told.get(number), device)
        found.append(known[key])
    return tuple(found)


def _cut_sizes(unit: Unit, drift_from: DriftFrom | None) -> GroupSizes:
    """Count the sizes of an operator that only loses inputs, with the Grams of both halves."""
    n, operator = unit.consumer.columns, unit.consumer
    names, weight = operator.name.rpartition(".")[2], 4 * operator.rows * n
    return GroupSizes(names, 2 * 4 * n * n, weight, drift_from, 0, bool(operator.experts))


def _group_sizes(
    group: Group, patterns: list[Constraint], recipe: Recipe, drift_from: DriftFrom | None, device: torch.device
) -> GroupSizes:
    """Measure the sizes of a group of operators."""
    n = group[0].columns
    rows = [operator.rows for operator in group]
    drift = drift_from is not None
    of_each = zip(rows, patterns, strict=True)
    solving = max(
        solve_bytes(count, n, pattern, recipe.steps, device, drift=drift, rank=recipe.low_rank)
        for count, pattern in of_each
    )
    names = "+".join(operator.name.rpartition(".")[2] for operator in group)
    routed = bool(group[0].experts)
    return GroupSizes(names, 4 * n * n, 4 * sum(rows) * n, drift_from, solving, routed)


def _largest_input(layout: Layout, index: int, units: Sequence[Unit]) -> int:
    """Return the most inputs of an operator of a layer, before any are removed."""
    consumers = [unit.consumer for unit in units]
    return max(operator.columns for operator in (*consumers, *layout.in_layer(index)))


def _reconstruction_bytes(model: LayerwiseModel, layout: Layout, index: int) -> int:
    """Count the bytes of block reconstruction of a layer, without those of a forward and backward pass."""
    return (5 * 4 + 1 + model.dtype.itemsize) * layout.weights(index) + 3 * 4 * model.width**2


def _learning_bytes(model: LayerwiseModel, recipe: Recipe, units: Sequence[Unit], seqlen: int, forward: int) -> int:
    """Count the bytes of a pass through a layer whose weights are masked (bypass): 0 without."""
    if recipe.structure.method != "bypass" or not units:
        return 0
    masked = sum(2 * model.dtype.itemsize * unit.consumer.rows * unit.consumer.columns for unit in units)
    return forward * -(-SEQUENCES * LENGTH // seqlen) + masked


def _comparing_bytes(model: LayerwiseModel, recipe: Recipe, units: Sequence[Unit], seqlen: int, forward: int) -> int:
    """Count the bytes of comparing the heads of a layer (goa): 0 without."""
    if recipe.structure.method != "goa":
        return 0
    heads = named_size(model.config.get_text_config(), HEADS) or 1
    readers = [unit.consumer for unit in units if unit.kind == GROUPS]
    problems = [4 * reader.columns * (3 * reader.columns + 2 * reader.rows) for reader in readers]
    return forward + 4 * 4 * seqlen**2 * heads + max(problems) if problems else 0


def _removal_bytes(model: LayerwiseModel, layout: Layout, recipe: Recipe, index: int, units: Sequence[Unit]) -> int:
    """Measure the peak of choosing which channels are removed, and of the weights that remain."""
    groups = layout.layers[index]
    problems = {  # experts are alike
        (unit.consumer.rows, unit.consumer.columns, unit.after * unit.columns, unit.biased(model.layers[index]))
        for unit in units
    }
    for number in fitted_groups(layout, index, units, recipe):
        problems.add((sum(op.rows for op in groups[number]), groups[number][0].columns, 1, False))
    return max(
        (
            removal_bytes(rows, columns, kept, recipe.structure, model.device, biased=biased)
            for rows, columns, kept, biased in problems
        ),
        default=0,
    )


def _proving_bytes(model: LayerwiseModel, index: int, units: Sequence[Unit]) -> int:
    """Count the bytes beside a layer of proving that channels can go.

    They are of a copy of the reading operators with zeros, and two copies of what stays of all operators.
    """
    layer = model.layers[index]
    zeroed = sum(unit.consumer.rows * unit.consumer.columns for unit in units)
    return model.dtype.itemsize * (zeroed + 2 * sum(unit.after * unit.weights(layer) for unit in units))


def _entering_width(layout: Layout, recipe: Recipe, index: int, device: torch.device) -> int:
    """Sum the widths of the inputs of output projections and of experts that replay stores, at most."""
    groups = layout.layers[index]
    mixtures = {group[0].experts for group in groups} - {""}
    passes = recipe.propagate == "pruned" and not recipe.reconstruct  # after the last group
    columns = {operator.name: operator.columns for group in groups[: len(groups) - (not passes)] for operator in group}
    endings = kept_projections(layout, index, device).values() if recipe.error_correction else ()
    widest = max((columns[ending.operator] for ending in endings if ending.operator in columns), default=0)
    return widest + sum(
        max(group[0].columns for group in groups if group[0].experts == mixture) for mixture in mixtures
    )


def _renumbered(model: LayerwiseModel, layout: Layout, index: int, solved: list[int], widths: Widths | None) -> int:
    """Count the bytes of a layer's experts that stay when others go, or lose channels, and are not solved."""
    units = () if widths is None else widths.mixtures(index)
    weights = sum(unit.after * unit.weights(model.layers[index]) for unit in units)
    mixtures = {unit.name for unit in units}
    cut = [unit for unit in (() if widths is None else widths.channels(index)) if unit.consumer.experts in mixtures]
    weights -= sum((unit.before - unit.after) * unit.weights(model.layers[index]) for unit in cut)
    groups = (layout.layers[index][number] for number in solved)
    weights -= sum(op.rows * op.columns for group in groups for op in group if op.experts in mixtures)
    narrower = {unit.consumer.experts for unit in widths.channels(index)} if widths is not None else set()
    left = [group for number, group in enumerate(layout.layers[index]) if number not in solved]
    narrower -= {"", *mixtures}
    weights += sum(op.rows * op.columns for group in left for op in group if op.experts in narrower)
    return weights * model.checkpoint.dtype.itemsize


def low_rank_weights(layout: Layout, recipe: Recipe, sparsity: Mapping[str, Constraint]) -> int:
    """Count the additional weights of the low-rank parts of all operators that get zeros."""
    return sum(
        recipe.low_rank * (operator.rows + operator.columns)
        for name, operator in layout.operators()
        if sparsity[name].zeros(operator.rows, operator.columns)
    )


def largest_layers(layout: Layout) -> list[int]:
    """Choose the layers that may need most: with the most weights, most inputs, or largest group."""

    def inputs(index: int) -> int:
        return max((operator.columns for operator in layout.in_layer(index)), default=0)

    def largest_group(index: int) -> int:
        groups = layout.layers[index]
        return max((sum(operator.rows * operator.columns for operator in group) for group in groups), default=0)

    layers = range(len(layout.layers))
    return list(dict.fromkeys(max(layers, key=size) for size in (layout.weights, inputs, largest_group)))

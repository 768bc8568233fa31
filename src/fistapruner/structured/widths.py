"""Choose a width for every decoder layer, with as many channels in all as with equal widths.

The error curve of an operator is what greedy elimination costs (:mod:`.elimination`), step by step, on the shrunk Gram
of the dense model's inputs, with every output row weighted by its Fisher sensitivity: half of it predicts the loss in
nats. The dense model is then run with one layer at a time as narrow as with equal widths, and the curves of the layer
are scaled to the loss that this causes. The steps that cost least are taken, over all layers (:func:`allocate`). With
probabilities that were learned (:mod:`.bypass`) the units with the smallest ones go, over all layers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..activations.store import HiddenStates
from ..activations.stream import Visit, embed, run_layer
from ..allocate.fisher import HEAD_TOKENS, DensePasses, InputSums, gathering, measure_sensitivity
from ..errors import FistaPrunerError
from ..models.layerwise import LayerwiseModel
from ..models.layout import Layout
from ..recipes.structure_settings import Structure
from .bypass import Slot, slots_of
from .elimination import eliminate
from .removal import ChannelStatistics, best_channels, block_places, choose_shrink, made_up
from .scores import channel_scores
from .shrinkage import shrunk
from .statistics import ChannelSums
from .units import Unit, Units

SPREAD = 0.5
"""Every layer loses between 1 - this and 1 + this times what it would with equal widths."""

RUN = 2
"""Calibration windows that run through every narrower layer."""

GUARDED = 2
"""The first and last layers that lose half of their units at most."""


def allocate(slopes: Sequence[Sequence[float]], lowest: Sequence[int], total: int) -> list[int]:
    """Choose how many steps each module takes, so that the sum of the costs is smallest.

    Costs of a module that fall from one step to the next are raised to the one before: the choice is then exact.

    Args:
        slopes: of each module, the cost of each step that it may take.
        lowest: steps that each module takes at least.
        total: steps of all modules.

    Raises:
        FistaPrunerError: the modules cannot take that many steps.
    """
    steps = []
    for module, costs in enumerate(slopes):
        highest = -math.inf
        for number, cost in enumerate(costs):
            highest = max(highest, cost)
            steps.append((-math.inf if number < lowest[module] else highest, module, number))
    if len(steps) < total:
        raise FistaPrunerError(f"structure: layers can lose {len(steps)} steps of channels, and {total} are asked for")
    taken = [0] * len(slopes)
    for _, module, _ in sorted(steps, key=lambda step: (step[0], step[2], step[1]))[:total]:
        taken[module] += 1
    return taken


def choose_widths(
    model: LayerwiseModel,
    layout: Layout,
    units: Units,
    tokens: Tensor,
    passes: DensePasses,
    settings: Structure,
    *,
    seed: int,
    scores: Mapping[str, Tensor],
) -> Units:
    """Choose how many units stay in each decoder layer; as many as before in all.

    Args:
        model: the dense model.
        layout: its operators.
        units: as they would be with equal widths.
        tokens: (windows, seqlen) calibration tokens to measure on.
        passes: how passes are carried out.
        settings: the recipe's ``structure``.
        seed: of the labels that Fisher sensitivities draw.
        scores: by full name of the consumer, probabilities to stay; empty where none were learned.
    """
    slots = slots_of(units)
    steps = {unit.kind: step_of(unit, settings) for layer in units for unit in layer}
    limits = _limits(slots, steps, len(model), free=bool(scores))
    costs: dict[str, Tensor] = {}
    if scores:
        for slot in slots:
            name = _name(layout, slot)
            costs[name] = scores[name].double().sort().values.view(-1, steps[slot.unit.kind]).sum(1)
    else:
        curves = error_curves(model, layout, slots, tokens, passes, settings, seed, limits, steps)
        costs = {name: curve.view(-1, steps[kind]).sum(1) for (kind, name), curve in curves.items()}
    chosen: dict[tuple[int, str], int] = {}
    for kind, step in steps.items():
        own = [slot for slot in slots if slot.unit.kind == kind]
        slopes = [costs[_name(layout, slot)][: limits[slot.places.start][1]].tolist() for slot in own]
        total = sum(slot.unit.before - slot.unit.after for slot in own) // step
        taken = allocate(slopes, [limits[slot.places.start][0] for slot in own], total)
        for slot, count in zip(own, taken, strict=True):
            chosen[slot.index, slot.unit.consumer.name] = slot.unit.before - count * step
    return tuple(
        tuple(replace(unit, after=chosen[index, unit.consumer.name]) for unit in layer)
        for index, layer in enumerate(units)
    )


def error_curves(
    model: LayerwiseModel,
    layout: Layout,
    slots: Sequence[Slot],
    tokens: Tensor,
    passes: DensePasses,
    settings: Structure,
    seed: int,
    limits: Mapping[int, tuple[int, int]],
    steps: Mapping[str, int],
) -> dict[tuple[str, str], Tensor]:
    """Predict the loss, in nats, that removing each further unit of each operator adds.

    Args:
        model, layout, tokens, passes, settings, seed: as for :func:`choose_widths`.
        slots: the operators.
        limits: by first unit of an operator, the fewest and most steps of units that it loses.
        steps: by kind, units in a step.

    Returns:
        By kind and full name of the operator, (units,) fp64, in the order in which they go.
    """
    consumers = {(slot.index, slot.unit.consumer.name): slot for slot in slots}
    few = replace(
        layout,
        layers=tuple(
            tuple(group for group in groups if (index, group[0].name) in consumers)
            for index, groups in enumerate(layout.layers)
        ),
    )
    rows = measure_sensitivity(model, few, tokens, passes, seed=seed, outputs=False).rows
    found: dict[tuple[str, str], Tensor] = {}
    narrower: dict[int, dict[str, dict[str, Tensor]]] = {}

    def done(index: int, number: int, sums: _WindowSums) -> None:
        (operator,) = few.layers[index][number]
        slot, name = consumers[index, operator.name], layout.full_name(index, operator)
        unit, fisher = slot.unit, rows[name].to(model.device)
        floor = 1e-8 * fisher.mean() if float(fisher.max()) > 0 else torch.ones((), device=model.device)
        known = sums.sums.statistics(name, 0.0)
        biased = unit.biased(model.layers[index]) and settings.compensation != "none"
        problem = known.centred() if biased else known.problem
        scores = channel_scores("energy", problem, known.mean).view(-1, unit.columns).sum(1)
        keep = block_places(best_channels(scores, unit.after), unit.columns)
        share = choose_shrink(known, keep, settings, biased=biased)[0]
        problem = shrunk(problem.weighted(fisher.clamp_min(floor)), share)
        count = limits[slot.places.start][1] * steps[unit.kind]
        order = eliminate(problem, count, unit.columns)
        found[unit.kind, name] = order.costs / 2
        gone = order.order[: unit.before - unit.after]
        stay = torch.ones(unit.before, dtype=torch.bool).index_fill(0, gone, False).nonzero()[:, 0].to(model.device)
        changed = _without(model.layers[index], unit, known, block_places(stay, unit.columns), share, settings, biased)
        narrower.setdefault(index, {}).setdefault(unit.kind, {}).update(changed)

    visit = gathering(few, InputSums(lambda weight: _WindowSums(weight, *tokens.shape), done))
    losses = narrower_losses(model, tokens, passes, visit, lambda index: narrower.pop(index, {}))
    predicted = dict.fromkeys(losses, 0.0)
    for slot in slots:
        curve = found[slot.unit.kind, _name(layout, slot)]
        predicted[slot.index, slot.unit.kind] += float(curve[: slot.unit.before - slot.unit.after].sum())
    for slot in slots:
        place = slot.index, slot.unit.kind
        if predicted[place] > 0 and losses[place] > 0:
            found[slot.unit.kind, _name(layout, slot)] *= losses[place] / predicted[place]
    return found


def _without(
    layer: nn.Module,
    unit: Unit,
    known: ChannelStatistics,
    places: Tensor,
    shrink: float,
    settings: Structure,
    biased: bool,
) -> dict[str, Tensor]:
    """Make an operator's tensors, of their own shape, that read only the inputs ``places``."""
    weight, bias, _ = made_up(known, places, shrink, settings, biased=biased)
    name = unit.consumer.name
    whole = torch.zeros_like(unit.consumer.weight(layer))
    whole[:, places] = weight.to(whole.dtype)
    found = {f"{name}.weight": (whole.T if unit.consumer.transposed else whole).contiguous()}
    if bias is not None:
        found[f"{name}.bias"] = (layer.get_parameter(f"{name}.bias").detach().float() + bias).to(whole.dtype)
    return found


def narrower_losses(
    model: LayerwiseModel,
    tokens: Tensor,
    passes: DensePasses,
    visit: Visit,
    narrower: Callable[[int], Mapping[str, dict[str, Tensor]]],
) -> dict[tuple[int, str], float]:
    """Measure the loss of the dense model with the narrower tensors of one layer, for each layer.

    Args:
        model: the dense model.
        tokens: (windows, seqlen) token ids; the first :data:`RUN` of them run through the narrower layers.
        passes: how passes are carried out.
        visit: called for every layer, with all windows.
        narrower: returns the tensors of a layer that was visited, by kind of unit.

    Returns:
        By layer and kind, the mean KL(dense || narrower) in nats a token.
    """
    shape = (min(RUN, len(tokens)), tokens.shape[1], model.width)
    states = passes.store("hidden", (*tokens.shape, model.width))
    dense = passes.store("dense", shape)  # the same windows at once as in narrower layers: rounding is alike
    calls = embed(model, tokens, passes.batch_size, states)
    embed(model, tokens[: dense.samples], passes.batch_size, dense, calls)
    found: dict[tuple[int, str], HiddenStates] = {}
    for index in range(len(model)):
        with model.layer(index) as layer:
            model.read_ahead(index + 1)
            with visit(index, layer) as watched:
                run_layer(model, index, states, calls, output=states, watched=watched)
            for before in found.values():
                run_layer(model, index, before, calls, output=before)
            for kind, values in narrower(index).items():
                found[index, kind] = passes.store(f"narrower-{len(found)}", shape)
                run_layer(model, index, dense, calls, output=found[index, kind], values=values)
            run_layer(model, index, dense, calls, output=dense)
        passes.tick("narrower decoder layers", index + 1, len(model))
    losses = dict.fromkeys(found, 0.0)
    starts = range(0, dense.seqlen, HEAD_TOKENS // 4)
    with model.embeddings_and_head():
        for number, (start, window) in enumerate(itertools.product(starts, range(dense.samples))):
            part = slice(start, start + HEAD_TOKENS // 4)
            reference = _log_probabilities(model, dense, window, part)
            weights = reference.exp()
            for place, own in found.items():
                gap = reference - _log_probabilities(model, own, window, part)
                gap.masked_fill_(weights == 0, 0.0)  # a padded vocabulary
                losses[place] += float(torch.linalg.vecdot(weights, gap).double().sum())
            passes.tick("slices of their predictions", number + 1, len(starts) * dense.samples)
    for own in (states, dense, *found.values()):
        own.close()
    return {place: loss / (dense.samples * dense.seqlen) for place, loss in losses.items()}


def _log_probabilities(model: LayerwiseModel, states: HiddenStates, window: int, part: slice) -> Tensor:
    hidden = states.read(window, window + 1, model.device)[:, part]
    ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=model.device)
    return torch.log_softmax(model.logits(hidden, ids)[0].float(), -1)


class _WindowSums:
    """Sums of the inputs of an operator, given as tokens."""

    def __init__(self, weight: Tensor, windows: int, seqlen: int) -> None:
        self.sums = ChannelSums(weight, windows)
        self._seqlen, self._start = seqlen, 0

    def add(self, inputs: Tensor) -> None:
        """Add (tokens, n) inputs of whole windows."""
        windows = inputs.view(-1, self._seqlen, inputs.shape[-1])
        self.sums.add(self._start, windows)
        self._start += len(windows)


def _name(layout: Layout, slot: Slot) -> str:
    return layout.full_name(slot.index, slot.unit.consumer)


def step_of(unit: Unit, settings: Structure) -> int:
    """Return the units of a step of free widths: they stay multiples of it, and the budget is met exactly."""
    return 1 if unit.columns > 1 else math.gcd(settings.multiple, unit.before - unit.after, unit.before)


def _limits(slots: Sequence[Slot], steps: Mapping[str, int], layers: int, *, free: bool) -> dict[int, tuple[int, int]]:
    """Return the fewest and most steps of each operator, by its first unit.

    Args:
        slots: the operators.
        steps: by kind, units in a step.
        layers: decoder layers.
        free: only that one step stays.
    """
    found = {}
    for guarded in (True, False):  # without the guard where it leaves too few
        for slot in slots:
            step, before = steps[slot.unit.kind], slot.unit.before
            gone = before - slot.unit.after
            lowest = 0 if free else math.floor((1 - SPREAD) * gone / step)
            highest = before // step - 1
            if not free:
                highest = min(highest, math.ceil((1 + SPREAD) * gone / step))
                if guarded and not GUARDED <= slot.index < layers - GUARDED:
                    highest = max(lowest, min(highest, before // 2 // step))
            found[slot.places.start] = lowest, highest
        enough = all(
            sum(found[slot.places.start][1] * steps[kind] for slot in slots if slot.unit.kind == kind)
            >= sum(slot.unit.before - slot.unit.after for slot in slots if slot.unit.kind == kind)
            for kind in steps
        )
        if enough:
            break
    return found

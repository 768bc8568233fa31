"""Try the smaller model before any work: find its config, build it, compare its outputs.

How ``config.json`` must change is found by trying: entries that equal an old number are changed, the model is built on
the meta device, and all of its tensors must have the wanted shapes. Then comes surgery, once for each kind of decoder
layer: the columns of some channels are set to zero in one copy, the channels are cut out of two others (the layer as it
is, and that of the changed config), and all must have the same outputs. What does not pass is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import FistaPrunerError
from ..models.build import build_changed, find_decoder_layers
from ..models.layers import Call, LayerwiseModel, assign, buffers_to, hidden_of
from ..models.operators import Layout, layer_signature
from ..models.write import merge_patch
from ..settings.structure import Structure
from .experts import fewer_experts, find_experts, kept_experts
from .smaller import Widths, in_section, stored_text_config
from .units import EXPERTS, GROUPS, Cut, Unit, Units, find_units

SAME = 1e-4
"""Largest relative squared difference between zeroed and removed channels: bf16 rounding is a hundredth of it."""

CHANNELS = "channels"
"""All kinds of channels: a config may have one entry for several."""

LIKELY = {CHANNELS: r"inner|inter|ffn|mlp", GROUPS: r"head(?!.*dim)", EXPERTS: r"^(?!.*(tok|top)).*expert"}
"""Names of entries of a config that may hold the number of what is removed; of channels they may be None."""

Build = Callable[[Mapping[str, Any]], Any]
"""Builds the model on the meta device, from a change of its config."""


def plan_widths(
    model: LayerwiseModel, layout: Layout, settings: Structure, *, trust_remote_code: bool = False
) -> Widths:
    """Find the units of a model, decide how many stay, and show that the smaller model is right."""
    remove = settings.remove
    assert remove is not None
    build: Build = partial(build_changed, model.checkpoint, trust_remote_code=trust_remote_code)
    units, config = find_units(model, layout, settings), dict[str, Any]()
    channels = tuple(tuple(unit for unit in layer if unit.kind != GROUPS) for layer in units)
    if any(channels):
        config = _config(model, build, config, channels, CHANNELS)
    if units != channels:
        config = _config(model, build, config, units, GROUPS)
    if remove.experts is not None:
        mixtures, config = _without_experts(model, build, config, find_experts(model, layout, remove))
        units = tuple(
            tuple(unit for unit in (*own, *layer) if _stays(unit, own))
            for own, layer in zip(mixtures, units, strict=True)
        )
    _compare(model, units, build(config).eval())
    return Widths(units, config)


def _stays(unit: Unit, mixtures: Sequence[Unit]) -> bool:
    """Check that a unit is not of an expert that is removed."""
    mixture = next((mixture for mixture in mixtures if unit.name.startswith(f"{mixture.name}.")), None)
    return mixture is None or int(unit.name.removeprefix(f"{mixture.name}.").partition(".")[0]) < mixture.after


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a module's parameters and stored buffers by name."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict(keep_vars=True).items()}


def _config(model: LayerwiseModel, build: Build, config: Mapping[str, Any], units: Units, kind: str) -> dict[str, Any]:
    """Find the change of ``config.json`` that gives the tensors of units their new shapes.

    Args:
        config: changes that were found before, as a JSON merge patch; they are part of the returned change.
        units: all that are removed with these changes and the one that is looked for.
        kind: of those that it is looked for: :data:`CHANNELS` or :data:`GROUPS`.
    """
    one = next(unit for layer in units for unit in layer if (unit.kind == GROUPS) == (kind == GROUPS))

    def fitting(units: Units) -> dict[str, Any] | None:
        wanted, sizes, more = _shapes(model.model), dict[int, int](), dict[str, int]()
        for index, unit in ((index, unit) for index, layer in enumerate(units) for unit in layer):
            for name, cut in unit.cuts.items():
                full, size = model.full_name(index, name), cut.block * cut.copies * unit.after
                wanted[full] = (*wanted[full][: cut.dim], size, *wanted[full][cut.dim + 1 :])
            if (unit.kind == GROUPS) == (kind == GROUPS):
                sizes[unit.before] = unit.after
        if kind == GROUPS:  # the query heads, too; a head's size is written out
            rows = sorted(cut.block for cut in one.producers.values())
            repeats, more = rows[-1] // rows[0], {"head_dim": rows[0]}
            sizes = {repeats * before: repeats * after for before, after in sizes.items()} | sizes
        found = (
            both for both, smaller in _tried(model, build, config, kind, sizes, more) if _shapes(smaller) == wanted
        )
        return next(found, None)

    if (found := fitting(units)) is not None:
        return found
    would = ""
    if kind == GROUPS:
        others = [
            str(one.before - after)
            for after in reversed(range(1, one.before))
            if fitting(
                tuple(tuple(replace(u, after=after) if u.kind == GROUPS else u for u in layer) for layer in units)
            )
        ]
        would = f"; heads={' or heads='.join(others)} would do" if others else ""
    raise _no_entry(model, one, would)


def _no_entry(model: LayerwiseModel, one: Unit, would: str = "") -> FistaPrunerError:
    """Make the error of a model whose config has no entry for what is removed."""
    return FistaPrunerError(
        f"structure: no entry of config.json makes {type(model.model).__name__} a model with {one.after} of "
        f"{one.before} {one.kind}: they are not removed{would}"
    )


def _tried(
    model: LayerwiseModel,
    build: Build,
    config: Mapping[str, Any],
    kind: str,
    sizes: Mapping[int, int],
    more: Mapping[str, int],
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yield changes of ``config.json`` and the model that they make, likely ones first.

    Of channels one entry may change, or several: the width of experts, and those of shared experts and of dense MLPs.
    Of others all likely ones change together.

    ``kind`` is a key of :data:`LIKELY`, ``sizes`` the new numbers by the old ones; ``more`` is changed, too.
    """
    for change in _changes(model, kind, sizes):
        both = merge_patch(config, in_section(model, {**change, **more}))
        try:
            smaller = build(both)
        except FistaPrunerError:
            continue
        yield both, smaller


def _changes(model: LayerwiseModel, kind: str, sizes: Mapping[int, int]) -> Iterator[dict[str, Any]]:
    """Yield the changes of the text config that :func:`_tried` tries."""
    for entries in (stored_text_config(model), model.config.get_text_config().to_dict()):
        named: dict[str, Any] = {}
        for name, held in entries.items():
            size, count = (held[0], len(held)) if isinstance(held, list) and held else (held, 0)
            if type(size) is int and size in sizes and (not count or held == [size] * count):
                named[name] = [sizes[size]] * count if count else sizes[size]
        likely = {name: value for name, value in named.items() if re.search(LIKELY[kind], name)}
        if kind != CHANNELS and likely:
            yield likely
        if kind != GROUPS:
            yield from ({name: value} for name, value in (likely | named).items())
        if kind == CHANNELS:
            none = [name for name, held in entries.items() if held is None and re.search(LIKELY[kind], name)]
            yield from ({name: after} for name in none for after in sizes.values())
            for count in range(2, len(likely) + 1):
                yield from map(dict, combinations(likely.items(), count))


def _without_experts(
    model: LayerwiseModel, build: Build, config: Mapping[str, Any], mixtures: Units
) -> tuple[Units, dict[str, Any]]:
    """Find the change of ``config.json`` that leaves fewer experts, and what is cut with them.

    Returns:
        The mixtures of every decoder layer with their cuts, and all changes of the config together.
    """
    one = next(unit for layer in mixtures for unit in layer)
    dense = find_decoder_layers(build(config))[1]
    for both, smaller in _tried(model, build, config, EXPERTS, {one.before: one.after}, {}):
        pairs = list(zip(dense, find_decoder_layers(smaller)[1], mixtures, strict=False))
        found = tuple(tuple(_with_cuts(unit, before, after) for unit in layer) for before, after, layer in pairs)
        if len(found) == len(model) and all(unit.cuts for layer in found for unit in layer):
            return found, both
    raise _no_entry(model, one)


def _with_cuts(unit: Unit, before: nn.Module, after: nn.Module) -> Unit:
    """Describe a mixture with what is cut beside its experts, and the sizes that modules note.

    ``before``: its decoder layer; ``after``: that of a smaller model. Nothing is cut where that differs otherwise.
    """
    block = unit.name.rpartition(".")[0]
    inside, whole = f"{block}." if block else "", _shapes(before)
    cuts: dict[str, Cut] = {}
    for name, shape in _shapes(after).items():
        if name.startswith(inside) and shape != (old := whole.get(name, ())):
            dims = [dim for dim, size in enumerate(shape) if old == (*shape[:dim], unit.before, *shape[dim + 1 :])]
            if not dims or shape[dims[0]] != unit.after:
                return unit
            cuts[name] = Cut(dims[0])
    attributes: dict[str, dict[str, int]] = {}
    for name, module in before.named_modules():
        if f"{name}.".startswith(inside) and not f"{name}.".startswith(f"{unit.name}."):
            twin = vars(after.get_submodule(name))
            noted = {key: twin.get(key) for key, value in vars(module).items() if type(value) is int}
            changed = {key: size for key, size in noted.items() if type(size) is int and size != vars(module)[key]}
            attributes |= {name: changed} if changed else {}
    return replace(unit, cuts=cuts, attributes=attributes)


def _compare(model: LayerwiseModel, units: Units, smaller: Any) -> None:
    """Show that cutting units gives what zeros in their place give; experts are left out in both."""
    hidden, calls = model.probe()
    buffers_to(smaller, hidden.device)
    layers = find_decoder_layers(smaller)[1]
    known = set()
    for index, layer_units in enumerate(units):
        if not layer_units or (signature := layer_signature(model.layers[index])) in known:
            continue
        known.add(signature)
        with model.layer(index) as layer, torch.no_grad(), model.failures_explained():
            if wrong := _surgery(layer, layers[index], layer_units, hidden, calls[index]):
                raise FistaPrunerError(
                    f"structure: {model.layers_name}.{index}: cutting {wrong.kind} of {wrong.name} does not give the "
                    "outputs that the layer gives without them: they are not removed"
                )


def _surgery(layer: nn.Module, smaller: nn.Module, units: Sequence[Unit], hidden: Tensor, call: Call) -> Unit | None:
    """Compare a layer with zeroed channels to one with these cut out, and to that of the new config.

    Args:
        layer: the loaded decoder layer, as before on return; ``smaller``: that of the new config, without weights.
        units: what is cut.
        hidden: (1, seqlen, width) hidden states that enter it; ``call``: its other arguments.

    Returns:
        The first unit whose outputs are others; the first one where a pass fails, as it does where it does not follow
        the shapes of its weights. None where all are the same.
    """
    generator = torch.Generator().manual_seed(0)
    channels = [unit for unit in units if unit.reader is not None]
    args, kwargs = call

    def run(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        found: list[Tensor] = []
        with ExitStack() as hooks:
            for unit in channels:
                reader = module.get_submodule(unit.name)
                hooks.enter_context(reader.register_forward_hook(lambda _, __, output: found.append(output.clone())))
            out = functional_call(module, dict(tensors), (hidden.clone(), *args), kwargs)
        return [*found, hidden_of(out) - hidden]

    with ExitStack() as fewer:
        for unit in units:
            if unit.reader is None:
                scores = torch.rand(unit.before, generator=generator)
                fewer.enter_context(fewer_experts(layer, unit, kept_experts(scores, unit)))
        whole = dict(layer.state_dict())  # nothing writes into them: what is cut is a copy
        zeroed = dict(whole)
        keeps = [torch.randperm(unit.before, generator=generator)[: unit.after].sort().values for unit in channels]
        for unit, keep in zip(channels, keeps, strict=True):
            name = f"{unit.name}.weight"
            dim, places = unit.tensors(keep)[name]
            places = places.to(whole[name].device)
            kept = whole[name].index_select(dim, places)
            zeroed[name] = torch.zeros_like(whole[name]).index_copy(dim, places, kept)
        expected = run(layer, zeroed)
        try:
            for unit, keep in zip(channels, keeps, strict=True):
                unit.cut_out(layer, keep)
            cut = dict(layer.state_dict())
            if _shapes(layer) != _shapes(smaller):
                return units[0]
            both = [run(layer, cut), run(smaller, cut)]
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
            return units[0]
        finally:
            for name, tensor in whole.items():
                assign(layer, name, tensor)
    for found in both:
        for unit, a, b in zip((*channels, units[0]), expected, found, strict=True):
            error = float((a.float() - b.float()).square().sum()) if a.shape == b.shape else math.inf
            if not error <= SAME * float(a.float().square().sum()):
                return unit
    return None

"""Prove that a model without some of its channels or heads is right, before any work.

How ``config.json`` must change is found by trying: an entry that equals the old width is changed, the model is built on
the meta device, and all of its tensors must have the wanted shapes. Then comes surgery, once for each shape of decoder
layer: the columns of some channels are set to zero in one copy, the channels are cut out of two others (the layer as it
is, and that of the changed config), and all must have the same outputs. What does not pass is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import FistaPrunerError, NoTemporaryFolderError
from ..models.architecture import build_changed, find_decoder_layers
from ..models.discovery import linear_modules
from ..models.files.widths import read_widths
from ..models.files.writer import merge_patch
from ..models.layerwise import Call, LayerwiseModel, hidden_of
from ..models.layerwise_weights import assign, buffers_to
from ..models.layout import Layout
from ..recipes.structure_settings import Structure
from .goa import attention_probabilities
from .mixtures import find_experts, tensor_shapes, text_section
from .smaller_model import Widths, free_widths
from .units import EXPERT, GROUPS, HEADS, MLP, SHARED, Unit, Units, cut_channels, find_units

SAME = 1e-4
"""Largest relative squared difference between zeroed and removed channels: bf16 rounding is a hundredth of it."""

CHANNELS = frozenset((MLP, SHARED, EXPERT))
"""Kinds of units that are channels of MLPs."""

WIDTH_NAMES = r"inner|inter|ffn|mlp"
"""Entries of a config that may be None and hold the width of an MLP."""


def plan_widths(
    model: LayerwiseModel, layout: Layout, settings: Structure, *, trust_remote_code: bool = False
) -> Widths:
    """Find the units of a model, decide how many stay, and prove that the smaller model is right.

    Args:
        model: the dense model.
        layout: its selected operators.
        settings: the recipe's ``structure``, with an amount to remove.
        trust_remote_code: run the checkpoint's own Python code.

    Raises:
        FistaPrunerError: channels that cannot be removed, or an amount that leaves or removes nothing; names the
            operator or the amount. Or layers that have widths of their own already, which the amount does not fit.
    """
    _check_own_widths(model, settings)
    units = find_units(model, layout, settings)
    if settings.widths == "free":
        if settings.experts is not None:
            raise FistaPrunerError("structure: widths free are of channels and heads: remove experts in a run without")
        _prove(model, units)
        if settings.method == "goa" and settings.heads:
            _check_probabilities(model, units[0])
        return free_widths(units, config_entries(model, units[0]))
    config: dict[str, Any] = {}
    found = {unit.kind for layer in units for unit in layer}
    for kinds in (found & CHANNELS, found - CHANNELS):  # a config may have one entry for several kinds of channels
        if kinds:
            config = _find_config(model, units, kinds, config, trust_remote_code)
    if config:
        _prove(model, units, build_changed(model.checkpoint, config, trust_remote_code=trust_remote_code).eval())
    if settings.method == "goa" and settings.heads:
        _check_probabilities(model, units[0])
    if settings.experts is None:
        return Widths(units, config)
    experts, config = find_experts(model, layout, settings, config, trust_remote_code=trust_remote_code)
    left = [{unit.name: unit.after for unit in mixtures} for mixtures in experts]
    remaining = tuple(
        tuple(unit for unit in layer if unit.kind != EXPERT or unit.consumer.expert < numbers[unit.consumer.experts])
        for layer, numbers in zip(units, left, strict=True)
    )
    return Widths(remaining, config, experts)


def _check_own_widths(model: LayerwiseModel, settings: Structure) -> None:
    """Refuse what cannot be removed from a model whose layers have widths of their own already.

    Equal widths cannot, nor more of what differs between layers.

    Raises:
        FistaPrunerError: names the amount.
    """
    folder = model.checkpoint.folder
    own = read_widths(model.checkpoint.config, folder)
    heads = any("head" in name for sizes in own.values() for name in sizes)
    widths = [{name: size for name, size in own.get(i, {}).items() if "head" not in name} for i in range(len(model))]
    mlp = any(sizes != widths[0] for sizes in widths)
    channels = settings.share is not None or settings.channels is not None
    if not own or (settings.widths == "free" and not (heads and settings.heads) and not (mlp and channels)):
        return
    left = " or ".join(kind for kind, taken in (("mlp", mlp), ("heads", heads)) if not taken)
    raise FistaPrunerError(
        f"structure: decoder layers of {folder} have widths of their own already, and {settings.remove} with --widths "
        f"{settings.widths} cannot be removed from them: remove structure from the dense model"
        + (f", or only {left} with --widths free" if left else "")
    )


def _check_probabilities(model: LayerwiseModel, units: tuple[Unit, ...]) -> None:
    """Make sure that the attention of decoder layer 0 gives the probabilities that goa compares heads by.

    Raises:
        FistaPrunerError: it does not.
    """
    hidden, _ = model.probe()
    (unit,) = (unit for unit in units if unit.kind == GROUPS)
    with model.layer(0):
        next(attention_probabilities(model, 0, unit.consumer.name, hidden.shape[1], [hidden]))


def config_entries(model: LayerwiseModel, units: Sequence[Unit]) -> dict[str, tuple[str, ...]]:
    """Name for each kind of unit the entries of the config that hold its number.

    Of key/value groups they are the numbers of query heads and of groups.
    """
    found: dict[str, tuple[str, ...]] = {}
    for unit in units:
        if unit.kind == MLP:
            named = {name: value for name, value in _entries(model)[0].items() if re.search(WIDTH_NAMES, name)}
            held = (name for name, value in named.items() if value is None or value == unit.before)
            found[MLP] = (next(held, "intermediate_size"),)
        else:
            found[GROUPS] = (HEADS, "num_key_value_heads")
    return found


def _find_config(
    model: LayerwiseModel, units: Units, kinds: Collection[str], config: Mapping[str, Any], trust_remote_code: bool
) -> dict[str, Any]:
    """Find the change of ``config.json`` that gives the tensors of some kinds of units their new shapes.

    Args:
        model: the dense model.
        units: of every decoder layer.
        kinds: which of them: those of channels, or groups.
        config: changes for channels that were found before, as a JSON merge patch.
        trust_remote_code: run the checkpoint's own Python code.

    Returns:
        All changes together.

    Raises:
        FistaPrunerError: no entry does that; names a tensor that is not cut and stands in the way, or else the width,
            and numbers of groups that would do.
    """
    found, uncut = _fitting(model, units, kinds, config, trust_remote_code)
    if found is not None:
        return found
    if uncut is not None:
        each = "head" if GROUPS in kinds else "channel"
        raise FistaPrunerError(
            f"structure: {uncut} has values for each {each}, which are not cut: {' and '.join(sorted(kinds))} are not "
            "removed"
        )
    name = type(model.model).__name__
    if GROUPS not in kinds:
        widths = {unit.before: unit.after for layer in units for unit in layer if unit.kind in kinds}
        shown = " and ".join(f"{after} channels instead of {before}" for before, after in sorted(widths.items()))
        raise FistaPrunerError(
            f"structure: no entry of config.json makes {name} a model whose MLPs have {shown}: its channels are not "
            "removed"
        )
    unit = next(unit for unit in units[0] if unit.kind == GROUPS)

    def fits(after: int) -> bool:
        changed = tuple(
            tuple(replace(unit, after=after) if unit.kind == GROUPS else unit for unit in layer) for layer in units
        )
        return _fitting(model, changed, kinds, config, trust_remote_code)[0] is not None

    others = [
        str(unit.before - after) for after in reversed(range(1, unit.before)) if after != unit.after and fits(after)
    ]
    would = f"; heads={' or heads='.join(others)} would do" if others else ": its key/value groups are not removed"
    raise FistaPrunerError(
        f"structure: the config of {name} cannot express {unit.after} of {unit.before} key/value groups{would}"
    )


def _fitting(
    model: LayerwiseModel, units: Units, kinds: Collection[str], config: Mapping[str, Any], trust_remote_code: bool
) -> tuple[dict[str, Any] | None, str | None]:
    """Try the changes of ``config.json`` for some kinds of units.

    Returns:
        The change that fits, None if none does. And a tensor that no unit cuts, and that has another shape with a
        change that fits all that are cut; None if there is none.
    """
    wanted, cut = tensor_shapes(model.model), set()
    widths: dict[int, int] = {}
    for index, layer in enumerate(units):
        for unit in layer:
            if unit.kind not in kinds and unit.kind not in CHANNELS:  # the channels' entries are known before heads'
                continue
            widths[unit.before] = unit.after
            for name, (dim, places) in unit.tensors(model.layers[index], torch.arange(unit.after)).items():
                full = model.full_name(index, name)
                wanted[full] = (*wanted[full][:dim], len(places), *wanted[full][dim + 1 :])
                cut.add(full)
    groups = next((unit for unit in units[0] if GROUPS in kinds and unit.kind == GROUPS), None)
    changes = _widths(model, widths) if groups is None else _head_counts(model, groups)
    uncut = None
    for change in changes:
        both = merge_patch(config, change)
        try:
            shapes = tensor_shapes(build_changed(model.checkpoint, both, trust_remote_code=trust_remote_code))
        except NoTemporaryFolderError:
            raise
        except FistaPrunerError:
            continue
        if shapes == wanted:
            return both, None
        if shapes.keys() == wanted.keys():
            others = [name for name in wanted if shapes[name] != wanted[name]]
            uncut = uncut or (others[0] if cut.isdisjoint(others) else None)
    return None, uncut


def _widths(model: LayerwiseModel, widths: Mapping[int, int]) -> Iterator[dict[str, Any]]:
    """Yield changes of ``config.json`` that may change the widths of the MLPs, likely ones first.

    One entry changes, or several: the width of experts, and those of shared experts and of dense MLPs beside them.

    Args:
        model: the dense model.
        widths: new ones, by the old ones.
    """
    entries, in_section = _entries(model)
    likely = sorted(entries, key=lambda name: re.search(WIDTH_NAMES, name) is None)
    named: dict[str, Any] = {}
    for name in likely:
        if type(entries[name]) is int and entries[name] in widths:
            named[name] = widths[entries[name]]
    for name in likely:
        listed = entries[name] if isinstance(entries[name], list) else []
        if len(set(map(str, listed))) == 1 and type(listed[0]) is int and listed[0] in widths:
            named[name] = [widths[listed[0]]] * len(listed)
    for name, after in named.items():
        yield in_section({name: after})
    for name in likely:
        if entries[name] is None and re.search(WIDTH_NAMES, name):
            for after in widths.values():
                yield in_section({name: after})
    several = [name for name in named if re.search(WIDTH_NAMES, name)]
    for count in range(2, len(several) + 1):
        for names in combinations(several, count):
            yield in_section({name: named[name] for name in names})


def _head_counts(model: LayerwiseModel, unit: Unit) -> Iterator[dict[str, Any]]:
    """Yield the change of ``config.json`` for other numbers of heads; a head's size is written out."""
    entries, in_section = _entries(model)
    rows = sorted(unit.rows)
    repeats = rows[-1] // rows[0]
    counts = {repeats * unit.before: repeats * unit.after, unit.before: unit.after}
    change = {
        name: counts[value]
        for name, value in entries.items()
        if "head" in name and type(value) is int and value in counts and "dim" not in name
    }
    yield in_section({**change, "head_dim": rows[0]})


def _entries(model: LayerwiseModel) -> tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]:
    """Return the entries of the text config, and what puts changes of it where ``config.json`` has it."""
    section = text_section(model)
    return model.config.get_text_config().to_dict(), lambda change: change if section is None else {section: change}


def _prove(model: LayerwiseModel, units: Units, smaller: Any = None) -> None:
    """Prove by surgery that cutting channels is the same as setting their weights to zero.

    Args:
        model: the dense model.
        units: whose channels are cut.
        smaller: the model of the changed config, without weights; None where the config stays.

    Raises:
        FistaPrunerError: it is not; names the operator.
    """
    hidden, calls = model.probe()
    layers = None if smaller is None else find_decoder_layers(smaller)[1]
    known = set()
    for index, layer_units in enumerate(units):
        shapes = tuple((name, tuple(module.weight.shape)) for name, module in linear_modules(model.layers[index]))
        if shapes in known:
            continue
        known.add(shapes)
        with model.layer(index) as layer, torch.no_grad(), model.failures_explained():
            parts: dict[str, tuple[Unit, ...]] = {}  # experts of a mixture together
            for unit in layer_units:
                name = unit.consumer.experts or unit.consumer.name
                parts[name] = (*parts.get(name, ()), unit)
            for name, together in parts.items():
                if not _surgery(layer, together, hidden, calls[index]):
                    raise _refusal(model, index, together[:1], [name])
            cut = None if layers is None else layers[index]
            if not _surgery(layer, layer_units, hidden, calls[index], cut):
                raise _refusal(model, index, layer_units, parts)


def _refusal(model: LayerwiseModel, index: int, units: Iterable[Unit], names: Iterable[str]) -> FistaPrunerError:
    kinds = " and ".join(dict.fromkeys(unit.kind for unit in units))
    return FistaPrunerError(
        f"structure: {model.layers_name}.{index}: cutting {kinds} of {', '.join(names)} does not give the outputs that "
        "zeros in their place give: they are not removed"
    )


def _surgery(
    layer: nn.Module, units: tuple[Unit, ...], hidden: Tensor, call: Call, smaller: nn.Module | None = None
) -> bool:
    """Compare a layer with zeroed channels to one with them cut: itself, or that of the new config.

    Args:
        layer: the loaded decoder layer; it is as before on return.
        units: whose channels are cut.
        hidden: (1, seqlen, width) hidden states that enter it.
        call: its other arguments.
        smaller: the decoder layer of the new config; None is the layer itself.
    """
    generator = torch.Generator().manual_seed(0)
    keeps = [torch.randperm(unit.before, generator=generator)[: unit.after].sort().values for unit in units]
    whole = dict(layer.state_dict())  # nothing writes into them: what is cut is a copy
    args, kwargs = call

    def run(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        found: list[Tensor] = []
        with ExitStack() as hooks:
            for unit in units:
                consumer = module.get_submodule(unit.consumer.name)
                hooks.enter_context(consumer.register_forward_hook(lambda _, __, output: found.append(output.clone())))
            out = functional_call(module, dict(tensors), (hidden.clone(), *args), kwargs)
        return [*found, hidden_of(out) - hidden]

    zeroed, cut = dict(whole), dict(whole)
    for unit, keep in zip(units, keeps, strict=True):
        for name, (dim, places) in unit.tensors(layer, keep).items():
            cut[name] = whole[name].index_select(dim, places.to(whole[name].device))
            if name == f"{unit.consumer.name}.weight":
                zeroed[name] = torch.zeros_like(whole[name]).index_copy(dim, places.to(whole[name].device), cut[name])
    expected = run(layer, zeroed)
    try:
        if smaller is None:
            for unit, keep in zip(units, keeps, strict=True):
                cut_channels(layer, unit, keep)  # also what a module notes of its shape
        else:
            buffers_to(smaller, hidden.device)
        found = run(smaller or layer, cut)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
        return False  # the forward pass does not follow the shapes of its weights
    finally:
        for name, tensor in whole.items():
            assign(layer, name, tensor)
    return all(
        a.shape == b.shape and float((a.float() - b.float()).square().sum()) <= SAME * float(a.float().square().sum())
        for a, b in zip(expected, found, strict=True)
    )

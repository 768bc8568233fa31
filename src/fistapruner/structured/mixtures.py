"""Find the mixtures that lose experts, and prove that the smaller model computes the same.

How ``config.json`` must change is found by trying; which experts go is decided later, by :mod:`.experts`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ..errors import FistaPrunerError, one_line
from ..models.architecture import build_changed, find_decoder_layers
from ..models.discovery import alike, expert_modules, layer_signature
from ..models.experts import Experts
from ..models.files.writer import merge_patch
from ..models.layerwise import LayerwiseModel, hidden_of
from ..models.layerwise_weights import buffers_to
from ..models.layout import Layout
from ..recipes.structure_settings import Structure
from ..runs.decision import ExpertsDecision
from .experts import ExpertUnits, fewer_experts, kept_experts

GROUP_COUNTS = re.compile(r"(n|num)_(expert_)?groups?")
"""Names of the number of groups of experts that a router chooses among, in its module."""

LIMIT = re.compile(r"top_?k_groups?")
"""Names of the number of these groups that the experts of a token may be of."""


def find_experts(
    model: LayerwiseModel,
    layout: Layout,
    settings: Structure,
    config: Mapping[str, Any],
    *,
    trust_remote_code: bool = False,
) -> tuple[ExpertUnits, dict[str, Any]]:
    """Find a model's mixtures, decide how many experts stay, and prove that the smaller model is right.

    How ``config.json`` must change is found by trying, and the tensors that go with the experts by their new shapes.

    Args:
        model: the dense model.
        layout: its selected operators.
        settings: the recipe's ``structure``, with an amount of experts.
        config: changes of ``config.json`` for other structure, as a JSON merge patch.
        trust_remote_code: run the checkpoint's own Python code.

    Returns:
        What is removed, and all changes of ``config.json`` together.

    Raises:
        FistaPrunerError: no mixture, several sizes, an amount that leaves or removes nothing, or a model that cannot
            lose experts; names what it is.
    """
    mixtures = [expert_modules(layer) for layer in model.layers]
    sizes = {experts.number for found in mixtures for experts in found.values()}
    name = type(model.model).__name__
    if len(sizes) != 1:
        shown = f"mixtures of {', '.join(map(str, sorted(sizes)))} experts" if sizes else "no mixture of experts"
        raise FistaPrunerError(f"structure: {name} has {shown}: no experts are removed")
    for index, found in enumerate(mixtures):
        read = {operator.experts for operator in layout.in_layer(index)}
        if missing := set(found) - read:
            raise FistaPrunerError(
                f"structure: targets and ignore leave out {layout.full_name(index, min(missing))}, whose experts are "
                "to be removed"
            )
    (before,) = sizes
    groups, limit = max(_groups(model.layers[index], found, before) for index, found in enumerate(mixtures))
    after = _remaining(settings, before, groups)
    base = tensor_shapes(build_changed(model.checkpoint, config, trust_remote_code=trust_remote_code))
    for change in _changes(model, before, after):
        both = merge_patch(config, change)
        try:
            smaller = build_changed(model.checkpoint, both, trust_remote_code=trust_remote_code)
        except FistaPrunerError:
            continue
        tensors = _cut_tensors(model, base, tensor_shapes(smaller), before, after)
        if tensors is None:
            continue
        alone = build_changed(model.checkpoint, change, trust_remote_code=trust_remote_code).eval()
        units = _units(model, alone, tensors, before, after, groups, chosen_experts(model))
        _prove(model, units, alone, limit * after // groups)
        return units, both
    raise FistaPrunerError(
        f"structure: no entry of config.json makes {name} a model with {after} experts instead of {before}: no experts "
        "are removed"
    )


def _remaining(settings: Structure, before: int, groups: int) -> int:
    """Decide how many experts of every mixture stay."""
    asked = settings.experts
    assert asked is not None
    gone = round(asked * before / groups) * groups if isinstance(asked, float) else asked
    if gone < 1 or gone >= before:
        what = "removes none" if gone < 1 else "leaves none"
        raise FistaPrunerError(f"structure: {settings.remove} {what} of the {before} experts of every mixture")
    if gone % groups:
        raise FistaPrunerError(
            f"structure: {settings.remove}: the router chooses among {groups} groups of experts, as many must "
            f"go from each: remove a multiple of {groups}"
        )
    return before - gone


def _groups(layer: nn.Module, mixtures: Mapping[str, Experts], experts: int) -> tuple[int, int]:
    """Return the number of groups of a decoder layer's experts, and how many a token may go to.

    Both are 1 without groups.
    """
    found = [(1, 1)]
    for name in mixtures:
        for module in layer.get_submodule(name.rpartition(".")[0]).modules():
            sizes = {key: value for key, value in vars(module).items() if type(value) is int and value > 0}
            limit = min((value for key, value in sizes.items() if LIMIT.fullmatch(key)), default=experts)
            found += [
                (value, min(limit, value))
                for key, value in sizes.items()
                if GROUP_COUNTS.fullmatch(key) and value > 1 and experts % value == 0
            ]
    return max(found)


def _changes(model: LayerwiseModel, before: int, after: int) -> Iterator[dict[str, Any]]:
    """Yield changes of ``config.json`` that may change the number of experts, likely ones first.

    A config may hold it under two names; then both change.
    """
    text, section = model.config.get_text_config(), text_section(model)
    stored = model.checkpoint.config if section is None else model.checkpoint.config[section]
    named = [key for key, held in stored.items() if type(held) is int and held == before and "expert" in key]
    named = [key for key in named if "tok" not in key and "top" not in key]
    others = [key for key, held in text.to_dict().items() if type(held) is int and held == before]
    for keys in (named, *([key] for key in named), *([key] for key in sorted(others, key=lambda k: "expert" not in k))):
        if keys:
            change: dict[str, Any] = dict.fromkeys(keys, after)
            yield change if section is None else {section: change}


def _cut_tensors(
    model: LayerwiseModel,
    base: Mapping[str, tuple[int, ...]],
    smaller: Mapping[str, tuple[int, ...]],
    before: int,
    after: int,
) -> dict[str, int] | None:
    """Return the dimension of the experts in every tensor that shrinks with them, by the model's name.

    None where the tensors that are gone, or whose shapes are others, are not those of experts and what routes to them.
    """
    prefixes = {
        model.full_name(index, name): name for index, layer in enumerate(model.layers) for name in expert_modules(layer)
    }
    blocks = tuple(prefix.rpartition(".")[0] + "." for prefix in prefixes)

    def goes(name: str) -> bool:
        mixture = next((prefix for prefix in prefixes if name.startswith(prefix + ".")), None)
        number = "" if mixture is None else name.removeprefix(mixture + ".").partition(".")[0]
        return number.isdigit() and int(number) >= after

    if {name for name in base if not goes(name)} != set(smaller):
        return None
    cut = {}
    for name, shape in smaller.items():
        if shape == base[name]:
            continue
        changed = [dim for dim, (new, old) in enumerate(zip(shape, base[name], strict=False)) if new != old]
        if len(shape) != len(base[name]) or len(changed) != 1 or not name.startswith(blocks):
            return None
        if (base[name][changed[0]], shape[changed[0]]) != (before, after):
            return None
        cut[name] = changed[0]
    return cut or None


def _units(
    model: LayerwiseModel,
    smaller: Any,
    tensors: Mapping[str, int],
    before: int,
    after: int,
    groups: int,
    chosen: Mapping[str, int],
) -> ExpertUnits:
    """Describe what is removed from every decoder layer: tensors, and sizes that modules note."""
    layers = find_decoder_layers(smaller)[1]
    found = []
    for index, layer in enumerate(model.layers):
        units = []
        for name in expert_modules(layer):
            block = name.rpartition(".")[0]
            prefix = f"{model.layers_name}.{index}."
            inside = f"{prefix}{block}." if block else prefix
            attributes: dict[str, dict[str, int]] = {}
            for inner, module in layer.get_submodule(block).named_modules():
                full = f"{block}.{inner}".strip(".")
                if full == name or full.startswith(name + "."):
                    continue
                twin = vars(layers[index].get_submodule(full))
                changed = {
                    key: twin[key]
                    for key, value in vars(module).items()
                    if type(value) is int and type(twin.get(key)) is int and twin[key] != value
                }
                if changed:
                    attributes[full] = changed
            units.append(
                ExpertsDecision(
                    name=name,
                    before=before,
                    after=after,
                    chosen=chosen[f"{prefix}{name}"],
                    groups=groups,
                    tensors={key.removeprefix(prefix): dim for key, dim in tensors.items() if key.startswith(inside)},
                    attributes=attributes,
                )
            )
        found.append(tuple(units))
    return tuple(found)


def _prove(model: LayerwiseModel, units: ExpertUnits, smaller: Any, most: int) -> None:
    """Prove that a layer whose experts are cut out computes what the layer of the smaller config does.

    Args:
        model: the dense model.
        units: whose experts are cut.
        smaller: the model of the smaller config, without weights.
        most: experts that a token can go to: all that remain, or those of the groups that it may go to.

    Raises:
        FistaPrunerError: it does not, or the router chooses more experts than a token can go to; names the mixture.
    """
    hidden, calls = model.probe()
    layers = find_decoder_layers(smaller)[1]
    buffers_to(smaller, hidden.device)
    known = set()
    for index, layer_units in enumerate(units):
        signature = layer_signature(model.layers[index])
        if not layer_units or signature in known:
            continue
        known.add(signature)
        args, kwargs = calls[index]
        wanted = {name: tuple(tensor.shape) for name, tensor in layers[index].state_dict().items()}
        with model.layer(index) as layer, torch.no_grad():
            for unit in layer_units:
                scores = torch.rand(unit.before, generator=torch.Generator().manual_seed(0))
                keep = kept_experts(scores, unit)
                place = model.full_name(index, unit.name)
                if unit.chosen > most:
                    limited = "" if most == unit.after else f", {most} of them in the groups that a token may go to"
                    raise FistaPrunerError(
                        f"structure: {unit.after} of the {unit.before} experts of {place} would remain{limited}, and "
                        f"the router chooses {unit.chosen} for every token"
                    )
                with fewer_experts(layer, unit, keep):
                    state = dict(layer.state_dict())
                    for name, tensor in state.items():  # a layer may compute with rows that its checkpoint cannot have
                        if wanted.get(name) != tuple(tensor.shape):
                            raise FistaPrunerError(
                                f"structure: {place} cannot be cut to {unit.after} experts: {name} would have the "
                                f"shape {tuple(tensor.shape)}, and the smaller model's has {wanted.get(name)}"
                            )
                    try:
                        cut = model.run(index, hidden.clone(), calls[index])
                        found = hidden_of(functional_call(layers[index], state, (hidden.clone(), *args), kwargs))
                    except (RuntimeError, ValueError, TypeError, IndexError) as error:
                        reason = one_line(error, 150)
                        raise FistaPrunerError(
                            f"structure: {place} cannot run with {unit.after} of its {unit.before} experts ({reason})"
                        ) from None
                if not bool(cut.isfinite().all()) or not alike(found - hidden, cut - hidden):
                    raise FistaPrunerError(
                        f"structure: cutting experts of {place} does not give what a model with {unit.after} experts "
                        "computes: no experts are removed"
                    )


def chosen_experts(model: LayerwiseModel) -> dict[str, int]:
    """Return how many experts the router of every mixture chooses for a token, by the mixture's name.

    Decoder layers that differ in their number and weights only are run once.
    """
    hidden, calls = model.probe()
    found: dict[str, int] = {}
    known: dict[Any, dict[str, int]] = {}
    for index, layer in enumerate(model.layers):
        signature = layer_signature(layer)
        if signature not in known:
            seen: dict[str, int] = {}
            with ExitStack() as hooks, model.layer(index), torch.no_grad():
                for name, module in expert_modules(layer).items():
                    hooks.enter_context(module.register_forward_pre_hook(_noting(seen, name), with_kwargs=True))
                model.run(index, hidden.clone(), calls[index])
            known[signature] = seen
        found |= {model.full_name(index, name): count for name, count in known[signature].items()}
    return found


def _noting(seen: dict[str, int], name: str) -> Any:
    """Make the hook that notes how many experts a mixture is given for a token."""

    def note(module: Experts, args: Any, kwargs: Any) -> None:
        seen[name] = int(module.routed(*args, **kwargs)[1].shape[1])

    return note


def text_section(model: LayerwiseModel) -> str | None:
    """Return the entry of ``config.json`` that holds the text config; None where the file itself does."""
    text = model.config.get_text_config()
    if text is model.config:
        return None
    inner = {key: value for key, value in model.checkpoint.config.items() if isinstance(value, dict)}
    return next((key for key, value in inner.items() if value.get("model_type") == text.model_type), None)


def tensor_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a module's parameters and stored buffers by name."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict(keep_vars=True).items()}

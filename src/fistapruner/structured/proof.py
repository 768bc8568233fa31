"""Prove that a model without some of its MLP channels is right, before any work.

How ``config.json`` must change is found by trying: an entry that equals the old width is changed, the model is built on
the meta device, and all of its tensors must have the wanted shapes. Then comes surgery, once for each shape of decoder
layer: the columns of some channels are set to zero in one copy, the channels are cut out of two others (the layer as it
is, and that of the changed config), and all must have the same outputs. What does not pass is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import FistaPrunerError
from ..models.architecture import build_changed, find_decoder_layers
from ..models.coupling import Link, link_tensors
from ..models.discovery import Layout, linear_modules
from ..models.layerwise import Call, LayerwiseModel, assign, hidden_of
from ..recipes.structure_settings import Structure
from .units import Units, Widths, cut_channels, find_units, kept_width

SAME = 1e-4
"""Largest relative squared difference between zeroed and removed channels: bf16 rounding is a hundredth of it."""

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
            operator or the amount.
    """
    units = find_units(model, layout)
    before = units[0][0].channels
    after = kept_width(model, units, settings)
    config, smaller = _find_config(model, units, before, after, trust_remote_code)
    _prove(model, units, after, smaller)
    return Widths(units, before, after, config)


def _find_config(
    model: LayerwiseModel, units: Units, before: int, after: int, trust_remote_code: bool
) -> tuple[dict[str, Any], Any]:
    """Find the change of ``config.json`` that gives every tensor its new shape.

    Returns:
        The change as a JSON merge patch, and the smaller model on the meta device.

    Raises:
        FistaPrunerError: no entry does that; names the width.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.model.state_dict(keep_vars=True).items()}
    for index, links in enumerate(units):
        for link in links:
            for name, (dim, _) in link_tensors(model.layers[index], link, torch.arange(link.channels)[None]).items():
                full = f"{model.layers_name}.{index}.{name}"
                wanted[full] = (*wanted[full][:dim], after, *wanted[full][dim + 1 :])
    for change in _candidates(model, before, after):
        try:
            smaller = build_changed(model.checkpoint, change, trust_remote_code=trust_remote_code)
        except FistaPrunerError:
            continue
        if {name: tuple(tensor.shape) for name, tensor in smaller.state_dict(keep_vars=True).items()} == wanted:
            return change, smaller.eval()
    raise FistaPrunerError(
        f"structure: no entry of config.json makes {type(model.model).__name__} a model whose MLPs have {after} "
        f"channels instead of {before}: its channels are not removed"
    )


def _candidates(model: LayerwiseModel, before: int, after: int) -> Iterator[dict[str, Any]]:
    """Yield changes of ``config.json`` that may change a width, likely ones first."""
    text = model.config.get_text_config()
    section = None
    if text is not model.config:
        inner = {key: value for key, value in model.checkpoint.config.items() if isinstance(value, dict)}
        section = next((key for key, value in inner.items() if value.get("model_type") == text.model_type), None)
    entries = text.to_dict()
    likely = sorted(entries, key=lambda name: re.search(WIDTH_NAMES, name) is None)
    changes: list[tuple[str, Any]] = [
        (name, after) for name in likely if type(entries[name]) is int and entries[name] == before
    ]
    lists = [
        name for name in likely if isinstance(entries[name], list) and set(map(str, entries[name])) == {str(before)}
    ]
    changes += [(name, [after] * len(entries[name])) for name in lists]
    changes += [(name, after) for name in likely if entries[name] is None and re.search(WIDTH_NAMES, name)]
    for name, value in changes:
        yield {name: value} if section is None else {section: {name: value}}


def _prove(model: LayerwiseModel, units: Units, after: int, smaller: Any) -> None:
    """Prove by surgery that cutting channels is the same as setting their weights to zero.

    Raises:
        FistaPrunerError: it is not; names the operator.
    """
    tokens = model.check_window(16)
    with model.embeddings_and_head(head=False):
        hidden, calls = model.embed(tokens)
    layers = find_decoder_layers(smaller)[1]
    known = set()
    for index, links in enumerate(units):
        shapes = tuple((name, tuple(module.weight.shape)) for name, module in linear_modules(model.layers[index]))
        if shapes in known:
            continue
        known.add(shapes)
        with model.layer(index) as layer, torch.no_grad(), model.failures_explained():
            if not _surgery(layer, layers[index], links, after, hidden, calls[index]):
                names = ", ".join(link.consumer.name for link in links)
                raise FistaPrunerError(
                    f"structure: {model.layers_name}.{index}: cutting channels of {names} does not give the outputs "
                    "that zeros in their place give: its channels are not removed"
                )


def _surgery(
    layer: nn.Module, smaller: nn.Module, links: tuple[Link, ...], after: int, hidden: Tensor, call: Call
) -> bool:
    """Compare a layer with zeroed channels to two with them cut: itself, and that of the new config."""
    generator = torch.Generator().manual_seed(0)
    keeps = [torch.randperm(link.channels, generator=generator)[:after].sort().values for link in links]
    whole = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    args, kwargs = call
    found: list[list[Tensor]] = []

    def run(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        found.append([])
        handles = [
            module.get_submodule(link.consumer.name).register_forward_hook(
                lambda _, __, output: found[-1].append(output.clone())
            )
            for link in links
        ]
        try:
            out = functional_call(module, dict(tensors), (hidden.clone(), *args), kwargs)
            found[-1].append(hidden_of(out) - hidden)
        finally:
            for handle in handles:
                handle.remove()

    zeroed, cut = dict(whole), dict(whole)
    for link, keep in zip(links, keeps, strict=True):
        for name, (dim, places) in link_tensors(layer, link, keep[None]).items():
            cut[name] = whole[name].index_select(dim, places.to(whole[name].device))
            if name == f"{link.consumer.name}.weight":
                zeroed[name] = torch.zeros_like(whole[name]).index_copy(dim, places.to(whole[name].device), cut[name])
    for module in smaller.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[key] = buffer.to(hidden.device)
    run(layer, zeroed)
    run(smaller, cut)
    try:
        for link, keep in zip(links, keeps, strict=True):
            cut_channels(layer, link, keep)  # also what a module notes of its shape
        run(layer, cut)
    finally:
        for name, tensor in whole.items():
            assign(layer, name, tensor)
    expected, *others = found
    return all(
        float((a.float() - b.float()).square().sum()) <= SAME * float(a.float().square().sum())
        for other in others
        for a, b in zip(expected, other, strict=True)
    )

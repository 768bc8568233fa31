"""Remove experts of a mixture whole, by REAP's criterion (Lasby et al. 2025, arXiv 2510.13999).

An expert's score is the mean, over the tokens that the router sends to it, of the weight that the router gives it times
the length of its output: what a token loses without it. An expert that no token reaches scores 0 and goes first. The
router's rows of the removed experts go with them; tokens then go to the experts that remain.

Differs from the authors' program in: the weights are those that the model multiplies with; where these do not sum to 1
for a token (OLMoE, Qwen2-MoE), the program normalises them first.

Where the router chooses among groups of experts first (DeepSeek-V3), as many are removed from every group, so that the
others stay in their groups.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FistaPrunerError
from ..models.experts import Experts
from ..models.layers import LayerwiseModel, assign
from ..models.operators import Layout, expert_modules, layer_signature
from ..passes.store import RoutedTokens
from ..settings.structure import Remove
from .units import EXPERTS, Unit, Units

GROUP_COUNTS, LIMIT = re.compile(r"(n|num)_(expert_)?groups?"), re.compile(r"top_?k_groups?")
"""A router's names of the number of groups that it chooses among, and of those that a token's experts may be of."""


def reap_scores(experts: Experts, routed: RoutedTokens, device: torch.device) -> Tensor:
    """Compute REAP's score of every expert of a loaded module: (experts,) fp64.

    ``routed``: the module's inputs and where they go; ``device``: where to compute.
    """
    scores = torch.zeros(experts.number, dtype=torch.float64)
    for number, expert in experts.experts():
        tokens = 0
        for inputs, weights in routed.weighted(number, device):
            with torch.no_grad():
                lengths = expert(inputs).double().norm(dim=1)
            scores[number] += float((lengths * weights.double().abs()).sum())
            tokens += len(inputs)
        scores[number] /= max(tokens, 1)
    return scores


def kept_experts(scores: Tensor, unit: Unit) -> Tensor:
    """Choose the experts of a mixture that stay, by their (before,) scores: (after,) numbers, ascending."""
    by_group = scores.view(unit.groups, -1)
    gone = by_group.sort(dim=1, stable=True).indices[:, : (unit.before - unit.after) // unit.groups]
    stay = torch.ones_like(by_group, dtype=torch.bool).scatter_(1, gone, False)
    return stay.flatten().nonzero().flatten()


def find_experts(model: LayerwiseModel, layout: Layout, remove: Remove) -> Units:
    """Find a model's mixtures, and decide how many experts stay; what is cut with them is found by trying."""
    mixtures = [expert_modules(layer) for layer in model.layers]
    sizes = {experts.number for found in mixtures for experts in found.values()}
    if len(sizes) != 1:
        shown = f"mixtures of {', '.join(map(str, sorted(sizes)))} experts" if sizes else "no mixture of experts"
        raise FistaPrunerError(f"structure: {type(model.model).__name__} has {shown}: no experts are removed")
    (before,) = sizes
    groups, limit = max(_groups(layer, found, before) for layer, found in zip(model.layers, mixtures, strict=True))
    asked = remove.experts
    gone = round(asked * before / groups) * groups if isinstance(asked, float) else asked or 0
    chosen = chosen_experts(model)
    least = -(-max(chosen.values()) // limit) * groups  # a token goes to the experts of so many groups
    if not 0 < gone <= before - least or gone % groups:
        multiples = f" in multiples of {groups}, the router's groups," if groups > 1 else ""
        raise FistaPrunerError(
            f"structure: {remove} removes {gone} of the {before} experts of every mixture, and at most "
            f"{before - least}{multiples} can go, since the router chooses {max(chosen.values())} for every token"
        )
    units = []
    for index, found in enumerate(mixtures):
        selected = {operator.experts for operator in layout.in_layer(index)}
        for name in found:
            full = layout.full_name(index, name)
            if name not in selected:
                raise FistaPrunerError(f"structure: targets and ignore leave out {full}: its experts cannot go")
        units.append(tuple(Unit(EXPERTS, name, before, before - gone, {}, groups=groups) for name in found))
    return tuple(units)


def _groups(layer: nn.Module, mixtures: dict[str, Experts], experts: int) -> tuple[int, int]:
    """Return the number of groups of experts, and how many a token may go to; 1 without groups."""
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


@contextmanager
def fewer_experts(layer: nn.Module, unit: Unit, keep: Tensor | None = None) -> Iterator[None]:
    """Let a decoder layer have fewer experts for the block: those that stay are renumbered.

    ``keep``: (after,) numbers of those that stay, to which the router's rows are cut. None where the tensors of the
    loaded layer are the smaller model's already.
    """
    experts = layer.get_submodule(unit.name)
    assert isinstance(experts, Experts)
    modules, number = dict(experts._modules), experts.number
    old = [
        (layer.get_submodule(module), name, getattr(layer.get_submodule(module), name), value)
        for module, values in unit.attributes.items()
        for name, value in values.items()
    ]
    tensors = dict(layer.named_parameters()) | dict(layer.named_buffers())
    whole = {name: tensors[name].detach() for name in unit.cuts if keep is not None}
    places = range(unit.after) if keep is None else keep.tolist()
    try:
        if keep is not None:
            unit.cut_out(layer, keep)
        experts._modules = {str(place): modules[str(old_place)] for place, old_place in enumerate(places)}
        experts.number = unit.after
        for module, name, _, value in old:
            setattr(module, name, value)
        yield
    finally:
        experts._modules, experts.number = modules, number
        for name, tensor in whole.items():
            assign(layer, name, tensor)
        for module, name, value, _ in old:
            setattr(module, name, value)


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
                    hook = partial(_note_chosen, seen, name)
                    hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
                model.run(index, hidden.clone(), calls[index])
            known[signature] = seen
        found |= {model.full_name(index, name): count for name, count in known[signature].items()}
    return found


def _note_chosen(seen: dict[str, int], name: str, module: Any, args: Any, kwargs: Any) -> None:
    """Note how many experts a mixture is given for a token."""
    seen[name] = int(module.routed(*args, **kwargs)[1].shape[1])

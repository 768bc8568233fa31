"""Remove experts of a mixture whole, by REAP's criterion (Lasby et al. 2025, arXiv 2510.13999).

An expert's score is the mean, over the tokens that the router sends to it, of the weight that the router gives it times
the length of its output: what a token loses without it. An expert that no token reaches scores 0 and goes first. The
router's rows of the removed experts go with them; tokens then go to the experts that remain.

Differs from the authors' program in: the weights are those that the model multiplies with; where these do not sum to 1
for a token (OLMoE, Qwen2-MoE), the program normalises them first.

Where the router chooses among groups of experts first (DeepSeek-V3), as many are removed from every group, so that the
others stay in their groups. A router that takes the softmax over all experts, and does not normalise the weights of the
chosen ones, gives these a little more than before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..activations.routed import RoutedTokens
from ..models.experts import Experts
from ..models.layerwise import LayerwiseModel
from ..models.layerwise_weights import assign
from ..runs.decision import ExpertsDecision

EXPERTS = "experts"
"""What is removed, as the report says it."""

ExpertUnits = tuple[tuple[ExpertsDecision, ...], ...]
"""For every decoder layer, the mixtures whose experts are removed."""


def reap_scores(experts: Experts, routed: RoutedTokens, device: torch.device) -> Tensor:
    """Compute REAP's score of every expert: (experts,) fp64.

    Args:
        experts: the loaded module.
        routed: its inputs and where they go.
        device: where to compute.
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


def kept_experts(scores: Tensor, unit: ExpertsDecision) -> Tensor:
    """Choose the experts that stay: (after,) numbers, ascending; of equal ones the first go.

    Args:
        scores: (before,) of the experts.
        unit: their mixture.
    """
    by_group = scores.view(unit.groups, -1)
    gone = by_group.sort(dim=1, stable=True).indices[:, : (unit.before - unit.after) // unit.groups]
    stay = torch.ones_like(by_group, dtype=torch.bool).scatter_(1, gone, False)
    return stay.flatten().nonzero().flatten()


@contextmanager
def fewer_experts(layer: nn.Module, unit: ExpertsDecision, keep: Tensor | None = None) -> Iterator[None]:
    """Let a decoder layer have fewer experts for the block: those that stay are renumbered.

    Args:
        layer: the loaded decoder layer.
        unit: whose experts are removed.
        keep: (after,) numbers of those that stay; the router's rows are cut to them. None where the layer's tensors
            are the smaller model's already.
    """
    experts = layer.get_submodule(unit.name)
    assert isinstance(experts, Experts)
    modules, number = dict(experts._modules), experts.number
    attributes = [
        (layer.get_submodule(module), name, value)
        for module, values in unit.attributes.items()
        for name, value in values.items()
    ]
    old = [(module, name, getattr(module, name)) for module, name, _ in attributes]
    whole: dict[str, Tensor] = {}
    places = range(unit.after) if keep is None else keep.tolist()
    for name, dim in unit.tensors.items() if keep is not None else ():
        tensor = (layer.get_parameter if name in dict(layer.named_parameters()) else layer.get_buffer)(name).detach()
        assert keep is not None
        whole[name] = tensor
        assign(layer, name, tensor.index_select(dim, keep.to(tensor.device)))
    try:
        experts._modules = {str(place): modules[str(old_place)] for place, old_place in enumerate(places)}
        experts.number = unit.after
        for module, name, value in attributes:
            setattr(module, name, value)
        yield
    finally:
        experts._modules, experts.number = modules, number
        for name, tensor in whole.items():
            assign(layer, name, tensor)
        for module, name, value in old:
            setattr(module, name, value)


def removed_experts_weights(model: LayerwiseModel, units: ExpertUnits) -> int:
    """Count the parameters that go with the experts of a model."""
    gone = 0
    for layer, layer_units in zip(model.layers, units, strict=True):
        for unit in layer_units:
            gone += (unit.before - unit.after) * expert_weights(layer, unit)
    return gone


def expert_weights(layer: nn.Module, unit: ExpertsDecision) -> int:
    """Count the parameters of one expert of a mixture, with its rows of the router."""
    parameters = dict(layer.named_parameters())
    expert = layer.get_submodule(f"{unit.name}.0")
    rows = sum(parameters[name].numel() // unit.before for name in unit.tensors if name in parameters)
    return rows + sum(parameter.numel() for parameter in expert.parameters())


def dropped_tensors(model: LayerwiseModel, units: ExpertUnits) -> tuple[set[str], dict[str, tuple[int, ...]]]:
    """Return the stored tensors of removed experts, and new shapes of those that hold all experts."""
    dropped: set[str] = set()
    shapes: dict[str, tuple[int, ...]] = {}
    for index, layer_units in enumerate(units):
        for unit in layer_units:
            prefix = f"{model.layers_name}.{index}.{unit.name}."
            for name in model.layer_parameters(index):
                if not name.startswith(prefix) or int(name.removeprefix(prefix).partition(".")[0]) < unit.after:
                    continue
                stored = model.source(name)
                stack = model.checkpoint.stack_of(stored)
                if stack is None:
                    dropped.add(stored)
                else:
                    whole = model.checkpoint.entry(stack.name).shape
                    shapes[stack.name] = (unit.after, *whole[1:])
    return dropped, shapes

"""Channels between two operators of a decoder layer whose order is free.

The hidden channels of an MLP have no order of their own: exchange two rows of ``up_proj`` (and ``gate_proj``) and the same two
columns of ``down_proj``, and the layer computes what it did. Nothing is listed by architecture here either: operators whose
sizes fit are exchanged on a small forward pass, and a link is what leaves its output the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .layout import Layout, Operator, linear_modules
from .skeleton import Skeleton

ALIKE = 1e-3
"""Squared difference of two outputs, as a share of their energy, that summation in another order explains at any precision."""


@dataclass(frozen=True)
class Link:
    """Operators whose output channels become the input channels of another one, in the same order, and nothing else's.

    Args:
        producers: names inside the decoder layer, such as ``mlp.gate_proj`` and ``mlp.up_proj``.
        consumer: the operator that reads the channels, such as ``mlp.down_proj``.
    """

    producers: tuple[str, ...]
    consumer: Operator


def find_links(skeleton: Skeleton, layout: Layout) -> tuple[tuple[Link, ...], ...]:
    """The links of every decoder layer to operators of ``layout``; an operator is in one link at most.

    Layers with the same operators are looked at once. Loads the embeddings and one decoder layer.
    """
    tokens = torch.arange(16).remainder(int(skeleton.config.get_text_config().vocab_size)).unsqueeze(0)
    with skeleton.ends(head=False):
        hidden, calls = skeleton.embed(tokens)
    known: dict[tuple[tuple[str, tuple[int, ...]], ...], list[Link]] = {}
    found = []
    for index, layer in enumerate(skeleton.layers):
        signature = tuple((name, tuple(module.weight.shape)) for name, module in linear_modules(layer))
        if signature not in known:
            with skeleton.layer(index) as module, torch.no_grad():
                known[signature] = _watch(module, lambda i=index: skeleton.run(i, hidden, calls[i]))  # type: ignore[misc]
        pruned = {operator.name for group in layout.layers[index] for operator in group}
        found.append(tuple(link for link in known[signature] if link.consumer.name in pruned))
    return tuple(found)


def reordered(skeleton: Skeleton, index: int, link: Link, order: Tensor) -> dict[str, tuple[int, Tensor]]:
    """How the tensors of a link of decoder layer ``index`` change when its channels take another order; see :data:`.checkpoint.Orders`.

    Args:
        order: (channels,) old place of each new channel.
    """
    parameters = _parameters(skeleton.layers[index], link)
    return {skeleton.source(f"{skeleton.layers_name}.{index}.{name}"): (dim, order.cpu()) for name, dim in parameters.items()}


def _watch(layer: nn.Module, run: Callable[[], Tensor]) -> list[Link]:
    operators = [Operator.of(name, module) for name, module in linear_modules(layer)]
    links: list[Link] = []
    for consumer in operators:
        used = {name for link in links for name in (*link.producers, link.consumer.name)}
        parent = consumer.name.rpartition(".")[0]
        producers = tuple(
            operator.name
            for operator in operators
            if operator.rows == consumer.columns and operator.name != consumer.name and operator.name.rpartition(".")[0] == parent
        )
        link = Link(producers, consumer)
        if producers and not used & {*producers, consumer.name} and _is_free(layer, link, run):
            links.append(link)
    return links


def _is_free(layer: nn.Module, link: Link, run: Callable[[], Tensor]) -> bool:
    """Whether the layer and the consumer answer the same with the link's channels exchanged at random."""
    order = torch.randperm(link.consumer.columns, generator=torch.Generator().manual_seed(0))
    answers: list[Tensor] = []
    handle = layer.get_submodule(link.consumer.name).register_forward_hook(lambda _, __, output: answers.append(output))
    try:
        answers.append(run())
        for name, dim in _parameters(layer, link).items():
            _exchange(layer.get_parameter(name), dim, order)
        answers.append(run())
    finally:
        handle.remove()
    for name, dim in _parameters(layer, link).items():
        _exchange(layer.get_parameter(name), dim, order.argsort())
    consumer, whole, consumer_after, whole_after = answers
    return _alike(consumer, consumer_after) and _alike(whole, whole_after)


def _parameters(layer: nn.Module, link: Link) -> dict[str, int]:
    """Names inside the layer of the tensors that hold a link's channels, and the dimension in which they do."""
    dims = {}
    for name in link.producers:
        module = layer.get_submodule(name)
        dims[f"{name}.weight"] = 1 if isinstance(module, Conv1D) else 0
        if module.bias is not None:
            dims[f"{name}.bias"] = 0
    dims[f"{link.consumer.name}.weight"] = 0 if link.consumer.transposed else 1
    return dims


def _exchange(parameter: Tensor, dim: int, order: Tensor) -> None:
    parameter.copy_(parameter.index_select(dim, order.to(parameter.device)))


def _alike(a: Tensor, b: Tensor) -> bool:
    a, b = a.float(), b.float()
    return float((a - b).square().sum()) <= ALIKE * float(a.square().sum())

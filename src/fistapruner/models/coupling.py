"""Channels between two operators of a decoder layer whose order is free.

The hidden channels of an MLP have no order of their own: exchange two rows of ``up_proj`` (and ``gate_proj``) and the same two
columns of ``down_proj``, and the layer computes what it did. So it is with the channels of ``v_proj`` inside an attention head
and the columns of ``o_proj`` that read that head. Nothing is listed by architecture here either: channels of operators whose
sizes fit are exchanged on a small forward pass, and a link is what leaves its output the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .discovery import Layout, Operator, alike, linear_modules
from .layerwise import LayerwiseModel


@dataclass(frozen=True)
class Link:
    """Operators whose output channels become the input channels of another one, in the same order, and nothing else's.

    Args:
        producers: names inside the decoder layer, such as ``mlp.gate_proj`` and ``mlp.up_proj``.
        consumer: the operator that reads the channels, such as ``mlp.down_proj``.
        blocks: heads; channels may be exchanged inside one of them only. An MLP is one block.
        repeats: how often in a row the consumer reads each block: query heads that share a value head.
    """

    producers: tuple[str, ...]
    consumer: Operator
    blocks: int = 1
    repeats: int = 1

    @property
    def channels(self) -> int:
        """Channels in a block."""
        return self.consumer.columns // (self.blocks * self.repeats)

    def by_block(self, values: Tensor) -> Tensor:
        """(blocks, m * repeats, channels): what the consumer's columns of ``values`` (m, columns) say of each block's channels."""
        return values.view(len(values), self.blocks, self.repeats, self.channels).transpose(0, 1).reshape(self.blocks, -1, self.channels)

    def places(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """Old place of each of the producers' rows, and of each of the consumer's columns.

        Args:
            order: (blocks, channels) old place inside its block of each new channel.
        """
        order = order.cpu()
        rows = order + self.channels * torch.arange(self.blocks)[:, None]
        columns = order.repeat_interleave(self.repeats, 0) + self.channels * torch.arange(self.blocks * self.repeats)[:, None]
        return rows.reshape(-1), columns.reshape(-1)


def find_links(model: LayerwiseModel, layout: Layout) -> tuple[tuple[Link, ...], ...]:
    """The links of every decoder layer to operators of ``layout``; an operator is in one link at most.

    Layers with the same operators are looked at once. Loads the embeddings and one decoder layer.
    """
    tokens = torch.arange(16).remainder(int(model.config.get_text_config().vocab_size)).unsqueeze(0)
    with model.embeddings_and_head(head=False):
        hidden, calls = model.embed(tokens)
    known: dict[tuple[tuple[str, tuple[int, ...]], ...], list[Link]] = {}
    found = []
    for index, layer in enumerate(model.layers):
        signature = tuple((name, tuple(module.weight.shape)) for name, module in linear_modules(layer))
        if signature not in known:
            with model.layer(index) as module, torch.no_grad():
                heads = _head_sizes(model.config.get_text_config())
                known[signature] = _watch(module, heads, lambda i=index: model.run(i, hidden.clone(), calls[i]))  # type: ignore[misc]
        pruned = {operator.name for group in layout.layers[index] for operator in group}
        found.append(tuple(link for link in known[signature] if link.consumer.name in pruned))
    return tuple(found)


def reordered(model: LayerwiseModel, index: int, link: Link, order: Tensor) -> dict[str, tuple[int, Tensor]]:
    """How the tensors of a link of decoder layer ``index`` change when its channels take another order.

    Args:
        order: (blocks, channels) old place inside its block of each new channel.

    Returns:
        See :data:`.checkpoint.Orders`.
    """
    changes = _changes(model.layers[index], link, order)
    return {model.source(f"{model.layers_name}.{index}.{name}"): change for name, change in changes.items()}


def _head_sizes(config: Any) -> set[int]:
    """Channels of an attention head, as far as the config tells."""
    heads = getattr(config, "num_attention_heads", None) or 1
    sizes = {named_size(config, "head_dim"), named_size(config, "v_head_dim"), config.hidden_size // heads}
    return {size for size in sizes if isinstance(size, int) and size > 0}


def named_size(config: Any, name: str) -> Any:
    """A size that a config may name, else None: one whose layers differ refuses to name one for all."""
    with suppress(RuntimeError):
        return getattr(config, name, None)
    return None


def _watch(layer: nn.Module, heads: set[int], run: Callable[[], Tensor]) -> list[Link]:
    operators = [Operator.of(name, module) for name, module in linear_modules(layer)]
    links: list[Link] = []
    for consumer in operators:
        parent = consumer.name.rpartition(".")[0]
        beside = [operator for operator in operators if operator.name.rpartition(".")[0] == parent and operator is not consumer]
        # All that have the consumer's channels for rows, together; or one whose heads are read.
        whole = Link(tuple(operator.name for operator in beside if operator.rows == consumer.columns), consumer)
        candidates = [whole] if whole.producers else []
        for operator in beside:
            for size in heads:
                if operator.rows % size == 0 and consumer.columns % operator.rows == 0:
                    candidates.append(Link((operator.name,), consumer, operator.rows // size, consumer.columns // operator.rows))
        for link in candidates:
            used = {name for other in links for name in (*other.producers, other.consumer.name)}
            if not used & {*link.producers, consumer.name} and _is_free(layer, link, run):
                links.append(link)
    return links


def _is_free(layer: nn.Module, link: Link, run: Callable[[], Tensor]) -> bool:
    """Whether the layer and the consumer answer the same with the link's channels exchanged at random."""
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(link.channels, generator=generator) for _ in range(link.blocks)])
    answers: list[Tensor] = []
    handle = layer.get_submodule(link.consumer.name).register_forward_hook(lambda _, __, output: answers.append(output))
    changes = _changes(layer, link, order)
    try:
        answers.append(run())
        for name, (dim, places) in changes.items():
            _exchange(layer.get_parameter(name), dim, places)
        answers.append(run())
    finally:
        handle.remove()
    for name, (dim, places) in changes.items():
        _exchange(layer.get_parameter(name), dim, places.argsort())
    consumer, whole, consumer_after, whole_after = answers
    return alike(consumer, consumer_after) and alike(whole, whole_after)


def _changes(layer: nn.Module, link: Link, order: Tensor) -> dict[str, tuple[int, Tensor]]:
    """For each tensor that holds a link's channels, by its name inside the layer: the dimension that does, and the old places."""
    rows, columns = link.places(order)
    changes = {}
    for name in link.producers:
        module = layer.get_submodule(name)
        changes[f"{name}.weight"] = (1 if isinstance(module, Conv1D) else 0, rows)
        if module.bias is not None:
            changes[f"{name}.bias"] = (0, rows)
    changes[f"{link.consumer.name}.weight"] = (0 if link.consumer.transposed else 1, columns)
    return changes


def _exchange(parameter: Tensor, dim: int, order: Tensor) -> None:
    parameter.copy_(parameter.index_select(dim, order.to(parameter.device)))

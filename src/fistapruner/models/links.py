"""Find the channels between operators of a decoder layer that can be permuted or rotated.

Permute the rows of ``up_proj`` (and ``gate_proj``) and the columns of ``down_proj``: the output of the layer does not
change. Channels of ``v_proj`` inside an attention head and the columns of ``o_proj`` may also be rotated. Operators
whose sizes fit are tried with random changes in a small forward pass, in fp32, and linked where the output stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from ..runtime.numerics import exact_products
from .checkpoint import reorder
from .layers import Call, LayerwiseModel
from .operators import Layout, Operator, alike, expert_modules, layer_signature, linear_modules

SAME = 1e-8
"""Largest relative squared difference of outputs that are the same; rounding in fp32 makes about 1e-13."""

LOUDER = 64.0
"""Factor of the channels that are rotated in the search for links, which shows where they are clipped."""


@dataclass(frozen=True)
class Link:
    """Operators whose output channels are the input channels of one other operator, in the same order.

    Args:
        producers: names inside the decoder layer, such as ``mlp.gate_proj`` and ``mlp.up_proj``.
        consumer: the operator that reads the channels, such as ``mlp.down_proj``.
        blocks: heads; channels are permuted inside a head only. An MLP is one block.
        repeats: consecutive times that the consumer reads each block: query heads that share a value head.
        rotates: the channels of a block may be rotated too.
    """

    producers: tuple[str, ...]
    consumer: Operator
    blocks: int = 1
    repeats: int = 1
    rotates: bool = False

    @property
    def channels(self) -> int:
        """Return the number of channels of a block."""
        return self.consumer.columns // (self.blocks * self.repeats)

    def by_block(self, values: Tensor) -> Tensor:
        """Rearrange ``values`` (m, columns) of the consumer by block: (blocks, m * repeats, channels)."""
        parts = values.view(len(values), self.blocks, self.repeats, self.channels)
        return parts.transpose(0, 1).reshape(self.blocks, -1, self.channels)

    def places(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """Return the old position of each row of the producers and of each column of the consumer.

        The order is (blocks, channels): the old place inside its block of each new channel; or (blocks, channels,
        channels) rotations, which are the same for rows and columns.
        """
        order = order.cpu()
        if order.ndim == 3:
            return order, order
        rows, columns = (
            order.repeat_interleave(times, 0) + self.channels * torch.arange(self.blocks * times)[:, None]
            for times in (1, self.repeats)
        )
        return rows.reshape(-1), columns.reshape(-1)


def find_links(model: LayerwiseModel, layout: Layout) -> tuple[tuple[Link, ...], ...]:
    """Find the links of every decoder layer to operators of ``layout``, disjoint ones.

    Layers that differ in their number and weights only are run once. Loads the embeddings and one decoder layer, and
    copies that in fp32.
    """
    hidden, calls = tree_map(_in_fp32, model.probe())
    known: dict[Any, list[Link]] = {}
    found = []
    for index, layer in enumerate(model.layers):
        if (signature := layer_signature(layer)) not in known:
            run = partial(_run, model, index, hidden, calls[index])
            with model.layer(index) as module, torch.no_grad(), exact_products():
                known[signature] = links_inside(module, _head_sizes(model.config.get_text_config()), run)
                known[signature] += _in_experts(module, hidden)
        pruned = {operator.name for operator in layout.in_layer(index)}
        found.append(tuple(link for link in known[signature] if link.consumer.name in pruned))
    return tuple(found)


def _run(model: LayerwiseModel, index: int, hidden: Tensor, call: Call, values: dict[str, Tensor]) -> Tensor:
    return model.run(index, hidden.clone(), call, values)


def reordered(model: LayerwiseModel, index: int, link: Link, order: Tensor) -> dict[str, tuple[int, Tensor]]:
    """Return how the stored tensors of a link change; ``order`` is as for :meth:`Link.places`."""
    changes = link_tensors(model.layers[index], link, order)
    return {model.source_of(index, name): change for name, change in changes.items()}


def _head_sizes(config: Any) -> set[int]:
    """Return the possible sizes of an attention head, from the config."""
    heads = getattr(config, "num_attention_heads", None) or 1
    sizes = {named_size(config, "head_dim"), named_size(config, "v_head_dim"), config.hidden_size // heads}
    return {size for size in sizes if isinstance(size, int) and size > 0}


def named_size(config: Any, name: str) -> Any:
    """Return a size from a config, None where it has none; configs with different layers raise an error."""
    with suppress(RuntimeError):
        return getattr(config, name, None)
    return None


def _in_experts(layer: nn.Module, hidden: Tensor) -> list[Link]:
    """Find the links inside the experts of a loaded decoder layer.

    Those of the first one are those of all. It runs alone, since a pass over few tokens need not reach it.
    """
    links = []
    for name, experts in expert_modules(layer).items():
        first = experts.get_submodule("0")
        inputs = next(Operator.of(key, module).columns for key, module in linear_modules(first))
        tokens = torch.randn(16, inputs, generator=torch.Generator().manual_seed(0)).to(hidden)
        run = partial(torch.func.functional_call, first, args=(tokens,))
        for link in links_inside(first, set(), run):
            for number, _ in experts.experts():
                prefix = f"{name}.{number}."
                consumer = replace(link.consumer, name=prefix + link.consumer.name, experts=name)
                links.append(replace(link, producers=tuple(map(prefix.__add__, link.producers)), consumer=consumer))
    return links


def links_inside(layer: nn.Module, heads: set[int], run: Callable[[dict[str, Tensor]], Tensor]) -> list[Link]:
    """Find the links of a loaded module, those inside experts left out.

    Args:
        layer: the module.
        heads: possible sizes of an attention head.
        run: runs it with other values of its parameters and buffers.
    """
    values = _tried_values(layer)
    experts = tuple(name + "." for name in expert_modules(layer))
    operators = [Operator.of(name, module) for name, module in linear_modules(layer) if not name.startswith(experts)]
    links: list[Link] = []
    for consumer in operators:
        parents = (operator.name.rpartition(".")[0] == consumer.name.rpartition(".")[0] for operator in operators)
        beside = [operator for operator, same in zip(operators, parents, strict=True) if same and operator != consumer]
        # All operators with as many rows as the consumer has columns, together; or one operator with heads.
        whole = Link(tuple(operator.name for operator in beside if operator.rows == consumer.columns), consumer)
        candidates = [whole] if whole.producers else []
        for operator in (operator for operator in beside if consumer.columns % operator.rows == 0):
            blocks = [operator.rows // size for size in heads if operator.rows % size == 0]
            repeats = consumer.columns // operator.rows
            candidates += [Link((operator.name,), consumer, count, repeats) for count in blocks]
        for link in candidates:
            used = {name for other in links for name in (*other.producers, other.consumer.name)}
            if not used & {*link.producers, consumer.name} and _is_free(layer, link, values, run, rotated=False):
                turns = link is not whole and _is_free(layer, link, values, run, rotated=True)
                links.append(replace(link, rotates=turns))
    return links


def _changed(link: Link, *, rotated: bool) -> Tensor:
    """Draw the change of a link's channels: a random permutation or rotation of each block."""
    generator = torch.Generator().manual_seed(0)
    if not rotated:
        return torch.stack([torch.randperm(link.channels, generator=generator) for _ in range(link.blocks)])
    rotations: Tensor = torch.linalg.qr(torch.randn(link.blocks, link.channels, link.channels, generator=generator)).Q
    return rotations


def _in_fp32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _tried_values(layer: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers in fp32, those that are no operators' weights randomly scaled.

    So a link depends on what is computed, and not on values near one or zero. Experts, which would take several times
    the memory of the rest, are zero: they are in no link with what is outside of them.
    """
    generator = torch.Generator().manual_seed(0)
    weights = {f"{name}.weight" for name, _ in linear_modules(layer)}
    experts = tuple(name + "." for name in expert_modules(layer))
    values = {name: _in_fp32(buffer) for name, buffer in layer.named_buffers()}
    for name, parameter in layer.named_parameters():
        if name.startswith(experts):
            values[name] = torch.zeros((), device=parameter.device).expand(parameter.shape)
            continue
        values[name] = value = _in_fp32(parameter)
        if name not in weights and value.is_floating_point():
            factor = 0.5 + torch.rand(value.shape, generator=generator).to(value.device)
            values[name] = torch.where(value == 0, factor - 1, value * factor)
    return values


def _is_free(
    layer: nn.Module,
    link: Link,
    values: Mapping[str, Tensor],
    run: Callable[[dict[str, Tensor]], Tensor],
    *,
    rotated: bool,
) -> bool:
    """Check that layer and consumer have the same output with the link's channels permuted or rotated.

    ``run`` runs the layer with ``values`` of its parameters and buffers.
    """
    changes = link_tensors(layer, link, _changed(link, rotated=rotated))
    given = dict(values)
    for name in changes.keys() - {f"{link.consumer.name}.weight"} if rotated else ():
        given[name] = LOUDER * given[name]
    answers: list[Tensor] = []
    consumer = layer.get_submodule(link.consumer.name)
    with consumer.register_forward_hook(lambda _, __, output: answers.append(output)):
        answers.append(run(given))
        answers.append(run(given | {name: reorder(given[name], *change) for name, change in changes.items()}))
    if len(answers) != 4:  # the consumer is not called: its weight is read otherwise
        return False
    read, whole, read_after, whole_after = answers
    return alike(read, read_after, SAME) and alike(whole, whole_after, SAME)


def link_tensors(layer: nn.Module, link: Link, order: Tensor) -> dict[str, tuple[int, Tensor]]:
    """Return dimension and order of the channels of each tensor of a link, by name inside the layer.

    The weights of the layer need not be loaded; ``order`` is as for :meth:`Link.places`.
    """
    rows, columns = link.places(order)
    found = {}
    for name in link.producers:
        module = layer.get_submodule(name)
        found[f"{name}.weight"] = (1 if isinstance(module, Conv1D) else 0, rows)
        if module.bias is not None:
            found[f"{name}.bias"] = (0, rows)
    found[f"{link.consumer.name}.weight"] = (0 if link.consumer.transposed else 1, columns)
    return found

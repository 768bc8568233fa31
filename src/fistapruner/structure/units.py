"""Find MLP channels and key/value groups that can be removed, and decide how many of them stay.

No architecture is listed by name. MLP channels that can be permuted (:mod:`fistapruner.models.links`) and heads
whose sizes fit are the candidates; :mod:`.trial` shows that they can be cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import FistaPrunerError
from ..models.experts import Experts
from ..models.layers import LayerwiseModel, assign
from ..models.links import Link, find_links, named_size
from ..models.operators import Layout, Operator, expert_modules, linear_modules
from ..settings.structure import Structure

MLP, SHARED, EXPERT, GROUPS = "MLP channels", "shared expert channels", "expert channels", "key/value groups"
"""Kinds of units, as reports call them. Shared experts are MLPs in the module that holds a mixture."""

EXPERTS, HEADS = "experts", "num_attention_heads"
"""The kind of experts that are removed whole, and a config's entry with the number of query heads."""


class Cut(NamedTuple):
    """Where the units are in a tensor.

    Args:
        dim: dimension.
        block: consecutive places of each unit.
        copies: parts, one after the other, that have all units in order: 2 where gate and up are one tensor.
    """

    dim: int
    block: int = 1
    copies: int = 1

    def places(self, keep: Tensor, before: int) -> Tensor:
        """Return the places of the units ``keep`` (k,), of ``before`` in all."""
        parts = [block_places(keep.cpu() + part * before, self.block) for part in range(self.copies)]
        return torch.cat(parts)


def block_places(keep: Tensor, block: int) -> Tensor:
    """Return the places of units of ``block`` consecutive places each."""
    return (keep[:, None] * block + torch.arange(block, device=keep.device)).reshape(-1)


@dataclass(frozen=True)
class Unit:
    """Channels, key/value groups or experts of one place in a decoder layer, of which some are removed.

    Args:
        kind: :data:`MLP`, :data:`SHARED`, :data:`EXPERT`, :data:`EXPERTS` or :data:`GROUPS`, each a key and a value
            head with the query heads that share them.
        name: of the operator that reads the channels, or of the module of the experts, inside the decoder layer.
        before: their number in the dense model.
        after: how many stay.
        cuts: the tensors that become smaller, by their names inside the layer: of experts, those that route to them.
        reader: the operator that reads the channels; None for experts.
        groups: as many experts are removed from each of so many groups, one after the other.
        attributes: sizes that modules note and that change with the experts, by module inside the layer.
    """

    kind: str
    name: str
    before: int
    after: int
    cuts: Mapping[str, Cut]
    reader: Operator | None = None
    groups: int = 1
    attributes: Mapping[str, dict[str, int]] = field(default_factory=dict)

    @classmethod
    def of_channels(
        cls, kind: str, layer: nn.Module, producers: Mapping[str, Cut], consumer: Operator, columns: int = 1
    ) -> Unit:
        """Describe channels of a decoder layer, all of which stay; weights need not be loaded.

        Args:
            kind: what they are.
            producers: the operators that write them, and the places of the channels in their outputs.
            consumer: the operator that reads them; ``columns``: its inputs that belong to one channel.
        """
        cuts = {}
        for name, cut in producers.items():
            module = layer.get_submodule(name)
            cuts[f"{name}.weight"] = cut._replace(dim=1) if isinstance(module, Conv1D) else cut
            if module.bias is not None:
                cuts[f"{name}.bias"] = cut
        cuts[f"{consumer.name}.weight"] = Cut(0 if consumer.transposed else 1, columns)
        before = consumer.columns // columns
        return cls(kind, consumer.name, before, before, cuts, consumer)

    @property
    def consumer(self) -> Operator:
        """Return the operator that reads the channels."""
        assert self.reader is not None
        return self.reader

    @property
    def columns(self) -> int:
        """Return the inputs of the consumer that belong to one channel."""
        return self.cuts[f"{self.name}.weight"].block

    @property
    def producers(self) -> dict[str, Cut]:
        """Return the operators that write the channels, or route to the experts, and the places in them."""
        found = {key.removesuffix(".weight"): cut for key, cut in self.cuts.items() if key.endswith(".weight")}
        return {name: cut for name, cut in found.items() if name != self.name}

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of all operators of channels."""
        return (*self.producers, self.name)

    def tensors(self, keep: Tensor) -> dict[str, tuple[int, Tensor]]:
        """Return the dimension and the places of the units ``keep`` (k,), in any order, in each tensor."""
        return {name: (cut.dim, cut.places(keep, self.before)) for name, cut in self.cuts.items()}

    def weights(self, layer: nn.Module) -> int:
        """Count the parameters of one of them; ``layer`` may be on the meta device."""
        parameters = dict(layer.named_parameters())
        whole = layer.get_submodule(f"{self.name}.0").parameters() if self.reader is None else ()
        cut = (parameters[name].numel() // self.before for name in self.cuts if name in parameters)
        return sum(cut) + sum(parameter.numel() for parameter in whole)

    def cut_out(self, layer: nn.Module, keep: Tensor) -> None:
        """Leave the units ``keep`` (k,), in this order, in the loaded tensors of a decoder layer."""
        for name, (dim, places) in self.tensors(keep).items():
            tensor: Tensor = attrgetter(name)(layer).detach()
            assign(layer, name, tensor.index_select(dim, places.to(tensor.device)))


Units = tuple[tuple[Unit, ...], ...]
"""For each decoder layer what is removed."""


def find_units(model: LayerwiseModel, layout: Layout, settings: Structure) -> Units:
    """Find the channels and groups of every decoder layer that are removed, and decide how many stay."""
    remove = settings.remove
    assert remove is not None
    found: list[tuple[Unit, ...]] = [()] * len(model)
    if remove.share is not None or remove.mlp is not None:
        links = find_links(model, layout)
        channels = tuple(_mlp_units(model.layers[index], layout, index, links[index]) for index in range(len(model)))
        kept = channels_kept(model, channels, settings)
        found = [tuple(replace(unit, after=kept[unit.before]) for unit in layer) for layer in channels]
    if remove.heads is not None:
        groups = [_key_value_groups(model, layout, index) for index in range(len(model))]
        if remove.heads >= groups[0].before:
            raise FistaPrunerError(
                f"structure: heads={remove.heads} leaves none of the {groups[0].before} key/value groups of every "
                "layer: one stays at least"
            )
        for index, unit in enumerate(groups):
            found[index] += (replace(unit, after=unit.before - remove.heads),)
    sources = Counter(
        model.source_of(index, name) for index, units in enumerate(found) for unit in units for name in unit.cuts
    )
    if twice := next((name for name, count in sources.items() if count > 1), None):
        raise FistaPrunerError(f"structure: tensor {twice!r} is used in several places: its channels are not removed")
    return tuple(found)


def _mlp_units(layer: nn.Module, layout: Layout, index: int, links: Iterable[Link]) -> tuple[Unit, ...]:
    """Return the MLP channels of a decoder layer; refuse what is not found, or not selected."""
    mixtures = expert_modules(layer)
    blocks = tuple(f"{block}." for name in mixtures if (block := name.rpartition(".")[0]))
    whole = [link for link in links if not link.consumer.experts and _is_whole(layer, link)]
    pairs = [(dict.fromkeys(link.producers, Cut(0)), link.consumer) for link in whole] or _fused(layout, index)
    units = [
        Unit.of_channels(SHARED if reader.name.startswith(blocks) else MLP, layer, writers, reader)
        for writers, reader in pairs
    ]
    for name, experts in mixtures.items():
        units += _expert_channels(layer, name, experts)
    alone = {group[0].name for group in layout.layers[index] if len(group) == 1}
    left_out = [unit.name for unit in units if unit.name not in alone]
    uncut = [name for name in mixtures if not any(unit.name.startswith(f"{name}.") for unit in units)]
    if left_out or uncut or not units:
        where = ".".join([layout.layers_name, str(index), *(left_out or uncut)[:1]])
        raise FistaPrunerError(
            f"structure: {where}: no selected operators were found beside one another of which some write the inputs "
            "of another one and nothing else, as those of an MLP do (do targets or ignore leave some out?)"
        )
    return tuple(units)


def _is_whole(layer: nn.Module, link: Link) -> bool:
    """Check that a link has no heads and all operators beside its consumer that write such inputs."""
    parent = link.consumer.name.rpartition(".")[0]
    beside = {
        name
        for name, module in linear_modules(layer)
        if name.rpartition(".")[0] == parent
        and name != link.consumer.name
        and Operator.of(name, module).rows == link.consumer.columns
    }
    return link.blocks == 1 and link.repeats == 1 and set(link.producers) == beside


def _fused(layout: Layout, index: int) -> list[tuple[dict[str, Cut], Operator]]:
    """Return the operators of an MLP where gate and up are one tensor, one after the other.

    The largest operator that has twice as many outputs as the only other one beside it has inputs.
    """
    operators = [operator for operator in layout.in_layer(index) if not operator.experts]
    beside = Counter(operator.name.rpartition(".")[0] for operator in operators)
    pairs = [
        (writer, reader)
        for reader in operators
        for writer in operators
        if (parent := writer.name.rpartition(".")[0]) == reader.name.rpartition(".")[0]
        and writer.rows == 2 * reader.columns
        and writer != reader
        and beside[parent] == 2
    ]
    if not pairs:
        return []
    writer, reader = max(pairs, key=lambda pair: pair[0].rows)
    return [({writer.name: Cut(0, copies=2)}, reader)]


def _expert_channels(layer: nn.Module, name: str, experts: Experts) -> list[Unit]:
    """Return the channels of every expert of a mixture; none where their rows are not found.

    Where one operator has the rows of gate and up, they are two halves or take turns (gpt-oss). That is tried, on what
    joins them. Weights need not be loaded.
    """
    expert = dict(experts.experts())[0]
    consumer = Operator.of("down_proj", expert.down_proj)
    outputs = [expert.get_submodule(reader).get_parameter("weight").shape[0] for reader in expert.readers]
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(8, sum(outputs), generator=generator)
    keep = torch.randperm(consumer.columns, generator=generator)[: -(-consumer.columns // 2)]
    for cut in (Cut(0), Cut(0, copies=2), Cut(0, block=2)):
        if any(count != cut.block * cut.copies * consumer.columns for count in outputs):
            continue
        places = cut.places(keep, consumer.columns)
        less = torch.cat([part[:, places] for part in values.split(outputs, 1)], 1)
        if torch.allclose(expert.channels(less), expert.channels(values)[:, keep], rtol=1e-4, atol=1e-6):
            return [
                Unit.of_channels(
                    EXPERT,
                    layer,
                    {f"{name}.{number}.{reader}": cut for reader in expert.readers},
                    replace(consumer, name=f"{name}.{number}.down_proj", experts=name),
                )
                for number in range(experts.number)
            ]
    return []


def _key_value_groups(model: LayerwiseModel, layout: Layout, index: int) -> Unit:
    """Find the key/value groups of a decoder layer by the sizes of operators that stand in one module."""
    config = model.config.get_text_config()
    heads = named_size(config, HEADS) or 1
    groups = named_size(config, "num_key_value_heads") or heads
    alone = [group[0] for group in layout.layers[index] if len(group) == 1]
    found = []
    for consumer in alone:
        parent, size = consumer.name.rpartition(".")[0], consumer.columns // heads
        beside = [
            other for other in layout.in_layer(index) if other.name.rpartition(".")[0] == parent and other != consumer
        ]
        rows = sorted(operator.rows for operator in beside)
        if consumer.columns % heads == heads % groups == 0 and rows == [size * groups, size * groups, size * heads]:
            cuts = {operator.name: Cut(0, operator.rows // groups) for operator in beside}
            columns = size * heads // groups
            found.append(Unit.of_channels(GROUPS, model.layers[index], cuts, consumer, columns))
    if len(found) != 1:
        raise FistaPrunerError(
            f"structure: {layout.layers_name}.{index}: no separate query, key and value operators of {heads} and "
            f"{groups} heads, and one that reads them, were found beside one another (fused ones are not cut; do "
            "targets or ignore leave some out?): its key/value groups are not removed"
        )
    return found[0]


def channels_kept(model: LayerwiseModel, units: Units, settings: Structure) -> dict[int, int]:
    """Decide how many channels stay, by the number of channels before.

    The width of a shared expert that is a multiple of the experts' stays the same multiple: it may be several in one.
    """
    remove, step = settings.remove, settings.multiple
    assert remove is not None
    kinds = {unit.before: unit.kind for layer in units for unit in layer}
    of_experts = {unit.before for layer in units for unit in layer if unit.kind == EXPERT}
    shared = {unit.before for layer in units for unit in layer if unit.kind == SHARED}
    kept: dict[int, int] = {}
    share = remove.mlp if isinstance(remove.mlp, float) else 0.0
    if remove.share is not None:
        held = sum(
            unit.before * unit.weights(model.layers[index]) for index, layer in enumerate(units) for unit in layer
        )
        share = remove.share * layer_weights(model) / held
    for before in sorted(kinds):
        if isinstance(remove.mlp, int):
            after = remove.mlp
        else:
            part = next((width for width in of_experts if before in shared and before % width == 0), before)
            after = before // part * round(part * (1 - share) / step) * step
        if not 0 < after < before:
            raise FistaPrunerError(
                f"structure: {remove} leaves {max(after, 0)} of the {before} {kinds[before]}, in multiples of {step}: "
                "give another amount or structure.multiple"
            )
        kept[before] = after
    return kept


def layer_weights(model: LayerwiseModel) -> int:
    """Count the parameters of all decoder layers."""
    return sum(parameter.numel() for layer in model.layers for parameter in layer.parameters())

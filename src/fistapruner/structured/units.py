"""Find MLP channels and key/value groups that can be removed, and decide how many of them stay.

No architecture is listed by name. MLP channels that can be permuted (:mod:`fistapruner.models.coupling`) and heads
whose sizes fit are the candidates; :mod:`.proof` shows that they can be cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import FistaPrunerError
from ..models.coupling import Link, channel_tensors, find_links, named_size
from ..models.discovery import Layout, Operator, discover, linear_modules
from ..models.layerwise import LayerwiseModel
from ..models.layerwise_weights import assign
from ..recipes.structure_settings import Structure
from .removal import block_places

MLP, GROUPS = "MLP channels", "key/value groups"
"""Kinds of units, as reports call them."""

HEADS = "num_attention_heads"
"""Entry of a config with the number of query heads."""


@dataclass(frozen=True)
class Unit:
    """Channels that are removed together from several operators: of an MLP, or groups of heads.

    A key/value group is a key and a value head, with the query heads that share them.

    Args:
        kind: :data:`MLP` or :data:`GROUPS`.
        producers: operators that write the channels, by their names inside the decoder layer.
        rows: rows of each of them that belong to one channel, in each copy.
        copies: parts of each of them that have all channels in order, one after the other: 2 where gate and up are one
            tensor.
        consumer: the operator that reads the channels.
        columns: its columns that belong to one channel.
        after: channels that stay.
    """

    kind: str
    producers: tuple[str, ...]
    rows: tuple[int, ...]
    copies: tuple[int, ...]
    consumer: Operator
    columns: int = 1
    after: int = 0

    @property
    def before(self) -> int:
        """Return the number of channels in the dense model."""
        return self.consumer.columns // self.columns

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of all its operators."""
        return (*self.producers, self.consumer.name)

    def biased(self, layer: nn.Module) -> bool:
        """Return whether the operator that reads the channels has a bias; ``layer`` may be on the meta device."""
        return layer.get_submodule(self.consumer.name).bias is not None

    def kept_rows(self, keep: Tensor) -> dict[str, Tensor]:
        """Return the rows of each producer that belong to the channels ``keep`` (k,)."""
        keep = keep.cpu()
        return {
            name: torch.cat([block_places(keep + part * self.before, rows) for part in range(copies)])
            for name, rows, copies in zip(self.producers, self.rows, self.copies, strict=True)
        }

    def tensors(self, layer: nn.Module, keep: Tensor) -> dict[str, tuple[int, Tensor]]:
        """Return the dimension and the places of some channels in each tensor, by name inside the layer.

        Args:
            layer: the decoder layer; its weights need not be loaded.
            keep: (k,) channels, in any order.
        """
        keep = keep.cpu()
        return channel_tensors(layer, self.kept_rows(keep), self.consumer, block_places(keep, self.columns))


Units = tuple[tuple[Unit, ...], ...]
"""For each decoder layer the channels that can be removed."""


def find_units(model: LayerwiseModel, layout: Layout, settings: Structure) -> Units:
    """Find the channels of every decoder layer that are removed, and decide how many stay.

    Raises:
        FistaPrunerError: a layer without them, several widths, or an amount that leaves or removes nothing.
    """
    kinds = []
    if settings.share is not None or settings.channels is not None:
        channels = _mlp_channels(model, layout)
        kinds.append(_with_width(channels, channels_kept(model, channels, settings)))
    if settings.heads:
        groups = key_value_groups(model, layout, fused=settings.widths == "free")
        before = groups[0][0].before
        if settings.heads >= before:
            raise FistaPrunerError(
                f"structure: heads={settings.heads} leaves none of the {before} key/value groups of every layer: one "
                "stays at least"
            )
        kinds.append(_with_width(groups, before - settings.heads))
    by_layer = list(zip(*kinds, strict=True)) if kinds else [()] * len(model)
    found = tuple(tuple(unit for units in layers for unit in units) for layers in by_layer)
    sources = [
        model.source_of(index, name)
        for index, units in enumerate(found)
        for unit in units
        for name in unit.tensors(model.layers[index], torch.arange(unit.before))
    ]
    if twice := next((name for name in sources if sources.count(name) > 1), None):
        raise FistaPrunerError(f"structure: tensor {twice!r} is used in several places: its channels are not removed")
    return found


def _with_width(units: Units, after: int) -> Units:
    return tuple(tuple(replace(unit, after=after) for unit in layer) for layer in units)


def _mlp_channels(model: LayerwiseModel, layout: Layout) -> Units:
    """Find the MLP channels of every decoder layer.

    Raises:
        FistaPrunerError: a layer without them, or several widths; names it.
    """
    found = []
    for index, links in enumerate(find_links(model, layout)):
        units = _mlp_units(model, layout, index, links)
        if not units:
            whole = discover(model)
            there = _mlp_units(model, whole, index, find_links(model, whole)[index])
            why = (
                "no operators were found beside one another, in one module, that write the inputs of another one and "
                "nothing else, as those of an MLP do"
            )
            if there:
                why = _left_out(there[0], layout, index, "MLP whose channels can be removed")
            raise FistaPrunerError(f"structure: {layout.layers_name}.{index}: {why}")
        found.append(units)
    widths = {unit.before for units in found for unit in units}
    if len(widths) > 1:
        shown = ", ".join(map(str, sorted(widths)))
        raise FistaPrunerError(f"structure: the MLPs have different widths ({shown}), which one config cannot change")
    return tuple(found)


def _mlp_units(model: LayerwiseModel, layout: Layout, index: int, links: Sequence[Link]) -> tuple[Unit, ...]:
    """Return the MLP channels of a decoder layer; none where one of their readers shares its inputs.

    Raises:
        FistaPrunerError: the layer has a mixture of experts.
    """
    if any(operator.experts for operator in layout.in_layer(index)):
        raise FistaPrunerError(
            f"structure: {layout.layers_name}.{index} has a mixture of experts, whose channels are not removed: take "
            "experts=25% or the like"
        )
    units = tuple(
        Unit(MLP, link.producers, (1,) * len(link.producers), (1,) * len(link.producers), link.consumer)
        for link in links
        if _is_whole(model.layers[index], link)
    )
    units = units or _fused(layout, index)
    alone = {group[0].name for group in layout.layers[index] if len(group) == 1}
    return units if all(unit.consumer.name in alone for unit in units) else ()


def key_value_groups(model: LayerwiseModel, layout: Layout, *, fused: bool) -> Units:
    """Find the key/value groups of every decoder layer.

    They are taken from sizes alone; :mod:`.proof` shows whether they can be cut.

    Args:
        model: the dense model.
        layout: its selected operators.
        fused: query, key and value of a head may be one block of rows of one operator (GPT-NeoX). Configs of such
            models have no size of a head, so this is for free widths.

    Raises:
        FistaPrunerError: a layer without separate query, key and value operators, or with one group only; names it.
    """
    config = model.config.get_text_config()
    heads = named_size(config, HEADS) or 1
    groups = named_size(config, "num_key_value_heads") or heads
    found = []
    for index in range(len(model)):
        prefix = f"{layout.layers_name}.{index}"
        units = _groups_of(layout, index, heads, groups, fused=fused)
        there = units or _groups_of(discover(model), index, heads, groups, fused=fused)
        if len(there) != 1:
            raise FistaPrunerError(
                f"structure: {prefix}: no separate query, key and value operators of {heads} and {groups} heads and "
                "one that reads them were found beside one another, in one module (fused ones are not cut): its "
                "key/value groups are not removed"
            )
        if groups == 1:
            raise FistaPrunerError(f"structure: {prefix}: the model has one key/value head, which stays")
        if not units:
            why = _left_out(there[0], layout, index, "key/value groups that can be removed")
            raise FistaPrunerError(f"structure: {prefix}: {why}")
        found.append(units)
    return tuple(found)


def _groups_of(layout: Layout, index: int, heads: int, groups: int, *, fused: bool) -> tuple[Unit, ...]:
    """Return the key/value groups of a decoder layer, for each operator that reads some."""
    operators = {operator.name: operator for operator in layout.in_layer(index)}
    alone = {group[0].name for group in layout.layers[index] if len(group) == 1}
    return tuple(
        unit
        for consumer in operators.values()
        if consumer.name in alone and (unit := _attention(consumer, operators, heads, groups, fused=fused))
    )


def _attention(
    consumer: Operator, operators: Mapping[str, Operator], heads: int, groups: int, *, fused: bool
) -> Unit | None:
    """Return the key/value groups that an operator reads; None where it reads none."""
    parent = consumer.name.rpartition(".")[0]
    beside = [other for other in operators.values() if other.name.rpartition(".")[0] == parent and other != consumer]
    size = consumer.columns // heads
    if fused and heads == groups and [operator.rows for operator in beside] == [3 * size * heads]:
        return Unit(GROUPS, (beside[0].name,), (3 * size,), (1,), consumer, size)
    if len(beside) != 3 or consumer.columns % heads or heads % groups:
        return None
    rows = sorted(operator.rows for operator in beside)
    if rows != [size * groups, size * groups, size * heads]:
        return None
    blocks = tuple(operator.rows // groups for operator in beside)
    names = tuple(operator.name for operator in beside)
    return Unit(GROUPS, names, blocks, (1, 1, 1), consumer, size * heads // groups)


def channels_kept(model: LayerwiseModel, units: Units, settings: Structure) -> int:
    """Decide how many channels of each unit stay.

    Raises:
        FistaPrunerError: the amount removes no channel, or all of them.
    """
    before, step, asked = units[0][0].before, settings.multiple, settings.remove
    if isinstance(settings.channels, int):
        if not settings.channels < before:
            raise FistaPrunerError(f"structure: {asked} is not less than the {before} channels of the model's MLPs")
        return settings.channels
    if step >= before:
        raise FistaPrunerError(
            f"structure: widths are multiples of {step} and the model's MLPs have {before} channels: give a smaller "
            "--structure-multiple"
        )
    share = settings.channels
    if share is None:
        assert settings.share is not None
        weights = layer_weights(model)
        share = settings.share * weights / (before * channel_weights(model, units))
        most = 1 - step / before
        if share > most + step / 2 / before:
            limit = most * before * channel_weights(model, units) / weights
            raise FistaPrunerError(
                f"structure: {asked} of the decoder layers' {weights} parameters is more than their MLP channels can "
                f"give: {limit:.1%} leaves {step} channels in every MLP"
            )
    after = round(before * (1 - share) / step) * step
    if after < step:
        raise FistaPrunerError(
            f"structure: {asked} leaves fewer than {step} of the {before} channels of every MLP: remove less, or give "
            "a smaller --structure-multiple"
        )
    if after >= before:
        raise FistaPrunerError(
            f"structure: {asked} removes less than half of {step} of the {before} channels of every MLP, so none: "
            "remove more, or give a smaller --structure-multiple"
        )
    return after


def layer_weights(model: LayerwiseModel) -> int:
    """Count the parameters of all decoder layers."""
    return sum(parameter.numel() for layer in model.layers for parameter in layer.parameters())


def channel_weights(model: LayerwiseModel, units: Units) -> int:
    """Count the parameters that go if every unit of the model loses one channel."""
    return sum(
        model.layers[index].get_parameter(name).numel() // unit.before
        for index, layer in enumerate(units)
        for unit in layer
        for name in unit.tensors(model.layers[index], torch.arange(unit.before))
    )


def cut_channels(layer: nn.Module, unit: Unit, keep: Tensor) -> None:
    """Remove channels from the loaded tensors of a decoder layer.

    Args:
        layer: the decoder layer.
        unit: the channels.
        keep: (k,) places of those that stay, in their new order.
    """
    for name, (dim, places) in unit.tensors(layer, keep).items():
        parameter = layer.get_parameter(name).detach()
        assign(layer, name, parameter.index_select(dim, places.to(parameter.device)))


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


def _fused(layout: Layout, index: int) -> tuple[Unit, ...]:
    """Return the MLP channels of a decoder layer where gate and up are one tensor, one after the other.

    The largest operator that has twice as many outputs as another one beside it has inputs. :mod:`.proof` shows whether
    it is what it seems.
    """
    operators = layout.in_layer(index)
    pairs = [
        (writer.rows, writer.name, reader)
        for reader in operators
        for writer in operators
        if writer.name.rpartition(".")[0] == reader.name.rpartition(".")[0] and writer.rows == 2 * reader.columns
    ]
    if not pairs:
        return ()
    _, name, reader = max(pairs, key=lambda pair: pair[0])
    return (Unit(MLP, (name,), (1,), (2,), reader),)


def _left_out(unit: Unit, layout: Layout, index: int, what: str) -> str:
    """Say that targets and ignore leave out an operator of the channels of a decoder layer.

    Args:
        unit: the channels, as all operators of the model have them.
        layout: the selected operators.
        index: of the decoder layer.
        what: they do not leave.
    """
    selected = {operator.name for operator in layout.in_layer(index)}
    missing = next(name for name in (unit.consumer.name, *unit.producers) if name not in selected)
    return f"targets and ignore leave no {what} ({missing} is left out)"

"""Find MLP channels and key/value groups that can be removed, and decide how many of them stay.

No architecture is listed by name. MLP channels that can be permuted (:mod:`fistapruner.models.coupling`) and heads
whose sizes fit are the candidates; :mod:`.proof` shows that they can be cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import FistaPrunerError
from ..models.coupling import Link, channel_tensors, find_links, named_size
from ..models.discovery import discover, expert_modules, linear_modules
from ..models.experts import Experts
from ..models.layerwise import LayerwiseModel
from ..models.layerwise_weights import assign
from ..models.layout import Layout, Operator
from ..recipes.structure_settings import Structure
from .removal import block_places

MLP, SHARED, EXPERT, GROUPS = "MLP channels", "shared expert channels", "expert channels", "key/value groups"
"""Kinds of units, as reports call them. Shared experts are MLPs in the module that holds a mixture."""

HEADS = "num_attention_heads"
"""Entry of a config with the number of query heads."""


@dataclass(frozen=True)
class Unit:
    """Channels that are removed together from several operators: of an MLP, or groups of heads.

    A key/value group is a key and a value head, with the query heads that share them.

    Args:
        kind: :data:`MLP`, :data:`SHARED`, :data:`EXPERT` or :data:`GROUPS`.
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
        channels = _mlp_channels(model, layout, settings)
        kept = channels_kept(model, channels, settings)
        kinds.append(tuple(tuple(replace(unit, after=kept[unit.before]) for unit in layer) for layer in channels))
    if settings.heads:
        groups = key_value_groups(model, layout, fused=settings.widths == "free")
        before = groups[0][0].before
        if settings.heads >= before:
            raise FistaPrunerError(
                f"structure: heads={settings.heads} leaves none of the {before} key/value groups of every layer: one "
                "stays at least"
            )
        after = before - settings.heads
        kinds.append(tuple(tuple(replace(unit, after=after) for unit in layer) for layer in groups))
    by_layer = list(zip(*kinds, strict=True)) if kinds else [()] * len(model)
    found = tuple(tuple(unit for units in layers for unit in units) for layers in by_layer)
    sources = Counter(
        model.source_of(index, name)
        for index, units in enumerate(found)
        for unit in units
        for name in unit.tensors(model.layers[index], torch.arange(unit.before))
    )
    if twice := next((name for name, count in sources.items() if count > 1), None):
        raise FistaPrunerError(f"structure: tensor {twice!r} is used in several places: its channels are not removed")
    return found


def _mlp_channels(model: LayerwiseModel, layout: Layout, settings: Structure) -> Units:
    """Find the MLP channels of every decoder layer, those of experts among them.

    Raises:
        FistaPrunerError: a layer without them, several widths of one kind, or settings that are not for experts; names
            it.
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
            elif any(map(expert_modules, model.layers)):
                why += "; experts=25% or the like removes whole experts"
            raise FistaPrunerError(f"structure: {layout.layers_name}.{index}: {why}")
        found.append(units)
    widths: dict[str, set[int]] = {}
    for unit in (unit for units in found for unit in units):
        widths.setdefault(unit.kind, set()).add(unit.before)
    for kind, sizes in widths.items():
        if len(sizes) > 1:
            shown = ", ".join(map(str, sorted(sizes)))
            raise FistaPrunerError(
                f"structure: the {_WHOSE[kind]} have different widths ({shown}), which one config cannot change"
            )
    if EXPERT in widths and settings.widths == "free":
        raise FistaPrunerError(
            "structure: --widths free is for dense MLPs: every expert keeps the same number of channels, with --widths "
            "uniform"
        )
    if EXPERT in widths and settings.method in ("goa", "bypass"):
        raise FistaPrunerError(
            f"structure: {settings.method} does not rate channels of experts: take --structure-method obs, energy, "
            "flap or magnitude"
        )
    return tuple(found)


_WHOSE = {MLP: "MLPs", SHARED: "shared experts", EXPERT: "experts"}
"""Whose channels those of a kind are, as messages say it."""

_EVERY = {MLP: "MLP", EXPERT: "expert", SHARED: "shared expert"}
"""One of them, as messages say it after ``every``."""


def _mlp_units(model: LayerwiseModel, layout: Layout, index: int, links: Sequence[Link]) -> tuple[Unit, ...]:
    """Return the MLP channels of a decoder layer; none where one of their readers shares its inputs.

    Raises:
        FistaPrunerError: experts that cannot be cut, or that are not all selected; names them.
    """
    layer = model.layers[index]
    mixtures = expert_modules(layer)
    blocks = tuple(f"{block}." for name in mixtures if (block := name.rpartition(".")[0]))
    units = tuple(
        Unit(MLP, link.producers, (1,) * len(link.producers), (1,) * len(link.producers), link.consumer)
        for link in links
        if not link.consumer.experts and _is_whole(layer, link)
    )
    units = tuple(
        replace(unit, kind=SHARED) if unit.consumer.name.startswith(blocks) else unit
        for unit in units or _fused(layout, index)
    )
    for name, experts in mixtures.items():
        own = _expert_channels(name, experts)
        if own is None:
            raise FistaPrunerError(
                f"structure: {layout.layers_name}.{index}.{name}: which rows of its experts belong to a channel was "
                "not found: their channels are not removed"
            )
        selected = {operator.name for operator in layout.in_layer(index)}
        if missing := next((one for unit in own for one in unit.names if one not in selected), None):
            raise FistaPrunerError(
                f"structure: targets and ignore leave out {layout.layers_name}.{index}.{missing}: of a mixture, "
                "channels are removed from all experts"
            )
        units += own
    alone = {group[0].name for group in layout.layers[index] if len(group) == 1}
    return units if all(unit.consumer.name in alone for unit in units) else ()


def _expert_channels(name: str, experts: Experts) -> tuple[Unit, ...] | None:
    """Return the channels of every expert of a mixture; None where their rows are not found.

    Where one operator has the rows of gate and up, they are two halves or take turns (gpt-oss). That is tried, on what
    joins them.

    Args:
        name: of the module inside the decoder layer.
        experts: the module; its weights need not be loaded.
    """
    expert = dict(experts.experts())[0]
    consumer = Operator.of("down_proj", expert.down_proj)
    outputs = [expert.get_submodule(reader).get_parameter("weight").shape[0] for reader in expert.readers]
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(8, sum(outputs), generator=generator)
    keep = torch.randperm(consumer.columns, generator=generator)[: -(-consumer.columns // 2)]
    for rows, copies in ((1, 1), (1, 2), (2, 1)):
        count = len(expert.readers)
        if outputs != [rows * copies * consumer.columns] * count:
            continue
        unit = Unit(EXPERT, expert.readers, (rows,) * count, (copies,) * count, consumer)
        parts = zip(values.split(outputs, 1), unit.kept_rows(keep).values(), strict=True)
        cut = torch.cat([part[:, places] for part, places in parts], 1)
        if torch.allclose(expert.channels(cut), expert.channels(values)[:, keep], rtol=1e-4, atol=1e-6):
            prefixes = [f"{name}.{number}." for number in range(experts.number)]
            return tuple(
                replace(
                    unit,
                    producers=tuple(prefix + reader for reader in expert.readers),
                    consumer=replace(consumer, name=prefix + consumer.name, experts=name),
                )
                for prefix in prefixes
            )
    return None


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


def channels_kept(model: LayerwiseModel, units: Units, settings: Structure) -> dict[int, int]:
    """Decide how many channels stay, by the number of channels before.

    The width of a shared expert that is a multiple of the experts' stays the same multiple: it may be several in one.

    Raises:
        FistaPrunerError: the amount removes no channel, or all of them.
    """
    widths = sorted({unit.before for layer in units for unit in layer})
    before, step, asked = widths[0], settings.multiple, settings.remove
    if isinstance(settings.channels, int):
        if len(widths) > 1:
            raise FistaPrunerError(
                f"structure: {asked} is one width, and the model's MLPs and experts have several "
                f"({', '.join(map(str, widths))} channels): give a share such as mlp=20%"
            )
        if not settings.channels < before:
            raise FistaPrunerError(f"structure: {asked} is not less than the {before} channels of the model's MLPs")
        return {before: settings.channels}
    of_kind = {kind: {unit.before for layer in units for unit in layer if unit.kind == kind} for kind in _WHOSE}
    if step >= before:
        whose = next(owner for kind, owner in _WHOSE.items() if before in of_kind[kind])
        raise FistaPrunerError(
            f"structure: widths are multiples of {step} and the model's {whose} have {before} channels: give a smaller "
            "--structure-multiple"
        )
    share = settings.channels
    if share is None:
        assert settings.share is not None
        weights = layer_weights(model)
        held = sum(
            unit.before * unit_weights(model.layers[index], unit) for index, layer in enumerate(units) for unit in layer
        )
        share = settings.share * weights / held
        most = 1 - step / before
        if share > most + step / 2 / before:
            limit = most * held / weights
            raise FistaPrunerError(
                f"structure: {asked} of the decoder layers' {weights} parameters is more than their MLP channels can "
                f"give: {limit:.1%} leaves {step} of {before} channels"
            )
    kept: dict[int, int] = {}
    for before in widths:
        part = next((width for width in of_kind[EXPERT] if before in of_kind[SHARED] and before % width == 0), before)
        after = before // part * round(part * (1 - share) / step) * step
        whose = next(owner for kind, owner in _EVERY.items() if before in of_kind[kind])
        if after < step:
            raise FistaPrunerError(
                f"structure: {asked} leaves fewer than {step} of the {before} channels of every {whose}: remove less, "
                "or give a smaller --structure-multiple"
            )
        if after >= before:
            raise FistaPrunerError(
                f"structure: {asked} removes less than half of {step} of the {before} channels of every {whose}, so "
                "none: remove more, or give a smaller --structure-multiple"
            )
        kept[before] = after
    return kept


def layer_weights(model: LayerwiseModel) -> int:
    """Count the parameters of all decoder layers."""
    return sum(parameter.numel() for layer in model.layers for parameter in layer.parameters())


def unit_weights(layer: nn.Module, unit: Unit) -> int:
    """Count the parameters of one channel of a unit."""
    return sum(layer.get_parameter(name).numel() // unit.before for name in unit.tensors(layer, torch.arange(1)))


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

    The largest operator that has twice as many outputs as the only other one beside it has inputs. :mod:`.proof` shows
    whether it is what it seems.
    """
    operators = [operator for operator in layout.in_layer(index) if not operator.experts]
    beside = Counter(operator.name.rpartition(".")[0] for operator in operators)
    pairs = [
        (writer.rows, writer.name, reader)
        for reader in operators
        for writer in operators
        if writer.name.rpartition(".")[0] == reader.name.rpartition(".")[0] and writer.rows == 2 * reader.columns
        if writer != reader and beside[reader.name.rpartition(".")[0]] == 2
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

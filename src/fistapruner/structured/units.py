"""Find the MLP channels that can be removed, and decide how many of them stay.

No architecture is listed by name. Channels that can be permuted (:mod:`fistapruner.models.coupling`) are the
candidates; :mod:`.proof` shows that they can be cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FistaPrunerError
from ..models.coupling import Link, find_links, link_tensors
from ..models.discovery import Layout, Operator, linear_modules
from ..models.layerwise import LayerwiseModel, assign
from ..recipes.structure_settings import Structure
from ..runs.decision import StructureDecision, UnitDecision

Units = tuple[tuple[Link, ...], ...]
"""For each decoder layer the links whose channels can be removed."""


@dataclass(frozen=True)
class Widths:
    """How many channels a model keeps.

    Args:
        units: for each decoder layer, the links whose channels are removed.
        before: channels of each of them.
        after: channels that each of them keeps.
        config: change of ``config.json``, as a JSON merge patch.
    """

    units: Units
    before: int
    after: int
    config: Mapping[str, Any]

    @classmethod
    def of(cls, decision: StructureDecision, layout: Layout) -> Widths:
        """Read what a run has decided.

        Args:
            decision: of the run.
            layout: the dense model's operators.
        """
        units = []
        for groups, links in zip(layout.layers, decision.units, strict=True):
            operators = {operator.name: operator for group in groups for operator in group}
            units.append(tuple(Link(link.producers, operators[link.consumer]) for link in links))
        return cls(tuple(units), decision.before, decision.after, decision.config)

    def decision(self) -> StructureDecision:
        """Return the same as a record for ``run.json``."""
        units = tuple(
            tuple(UnitDecision(producers=link.producers, consumer=link.consumer.name) for link in links)
            for links in self.units
        )
        return StructureDecision(units=units, before=self.before, after=self.after, config=dict(self.config))

    def consumers(self, index: int) -> set[str]:
        """Return the names of the operators of decoder layer ``index`` that lose input channels."""
        return {link.consumer.name for link in self.units[index]}

    def touched(self, index: int) -> set[str]:
        """Return the names of the operators of decoder layer ``index`` that lose inputs or outputs."""
        return self.consumers(index) | {name for link in self.units[index] for name in link.producers}


def find_units(model: LayerwiseModel, layout: Layout) -> Units:
    """Find the links of every decoder layer whose channels can be removed.

    Raises:
        FistaPrunerError: a layer without such a link, or links of several widths; names it.
    """
    found = []
    for index, links in enumerate(find_links(model, layout)):
        units = tuple(link for link in links if _is_whole(model.layers[index], link))
        alone = {group[0].name for group in layout.layers[index] if len(group) == 1}
        if not units or not all(link.consumer.name in alone for link in units):
            raise FistaPrunerError(
                f"structure: {layout.prefix}.{index}: {_why_not(model.layers[index], layout, index)}"
            )
        found.append(units)
    sources = [
        model.source(f"{layout.prefix}.{index}.{name}")
        for index, units in enumerate(found)
        for link in units
        for name in link_tensors(model.layers[index], link, torch.arange(link.channels)[None])
    ]
    if twice := next((name for name in sources if sources.count(name) > 1), None):
        raise FistaPrunerError(f"structure: tensor {twice!r} is used in several places: its channels are not removed")
    widths = {link.channels for units in found for link in units}
    if len(widths) > 1:
        shown = ", ".join(map(str, sorted(widths)))
        raise FistaPrunerError(f"structure: the MLPs have different widths ({shown}), which one config cannot change")
    return tuple(found)


def kept_width(model: LayerwiseModel, units: Units, settings: Structure) -> int:
    """Decide how many channels of each unit stay.

    Raises:
        FistaPrunerError: the amount removes no channel, or all of them.
    """
    before, step, asked = units[0][0].channels, settings.multiple, settings.remove
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
    count = 0
    for index, links in enumerate(units):
        for link in links:
            for name in link_tensors(model.layers[index], link, torch.arange(link.channels)[None]):
                count += model.layers[index].get_parameter(name).numel() // link.channels
    return count


def removed_weights(model: LayerwiseModel, widths: Widths | None) -> int:
    """Count the parameters that are removed from a model."""
    return 0 if widths is None else (widths.before - widths.after) * channel_weights(model, widths.units)


def resized(layout: Layout, widths: Widths) -> Layout:
    """Return the layout with the shapes that operators have after the removal."""
    layers = []
    for groups, links in zip(layout.layers, widths.units, strict=True):
        producers = {name for link in links for name in link.producers}
        consumers = {link.consumer.name for link in links}
        layers.append(
            tuple(
                tuple(
                    replace(
                        operator,
                        rows=widths.after if operator.name in producers else operator.rows,
                        columns=widths.after if operator.name in consumers else operator.columns,
                    )
                    for operator in group
                )
                for group in groups
            )
        )
    return replace(layout, layers=tuple(layers))


def cut_channels(layer: nn.Module, link: Link, keep: Tensor) -> None:
    """Remove channels from the loaded tensors of a link.

    Args:
        layer: the decoder layer.
        link: its link.
        keep: (k,) places of the channels that stay, in their new order.
    """
    for name, (dim, places) in link_tensors(layer, link, keep[None]).items():
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


def _why_not(layer: nn.Module, layout: Layout, index: int) -> str:
    """Say why no channels of a decoder layer can be removed."""
    operators = {operator.name: operator for group in layout.layers[index] for operator in group}
    fused = [
        (other.rows, other.name, name)
        for name, operator in operators.items()
        for other in operators.values()
        if other.name.rpartition(".")[0] == name.rpartition(".")[0] and other.rows == 2 * operator.columns
    ]
    if fused:
        _, other, name = max(fused)
        return f"{other} writes the gate and the channels of {name} as one tensor, which is not cut"
    present = {name for name, _ in linear_modules(layer)}
    if left := sorted(present - set(operators)):
        return f"targets and ignore leave no MLP whose channels can be removed ({left[0]} is left out)"
    return "no operators were found that write the inputs of another one and nothing else, as those of an MLP do"

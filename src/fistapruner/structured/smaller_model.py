"""Describe a model without the units that are removed: widths, config, layout, parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..models.files.widths import widths_section
from ..models.files.writer import merge_patch
from ..models.layerwise import LayerwiseModel
from ..models.layout import Layout
from ..runs.decision import ExpertsDecision, StructureDecision, UnitDecision
from .experts import ExpertUnits, removed_experts_weights
from .mixtures import text_section
from .units import HEADS, Unit, Units, unit_weights

LAYER = re.compile(r"(.*?\.\d+\.)(.+)")
"""Stored name of a tensor in a list of layers: what the names of its layer begin with, and its name inside."""

PREDICTORS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
"""Entries of configs with the number of layers of multi-token prediction."""


@dataclass(frozen=True)
class Widths:
    """How many channels a model keeps.

    Args:
        units: for each decoder layer, the channels that are removed.
        config: change of ``config.json``, as a JSON merge patch.
        experts: for each decoder layer, the mixtures that lose experts; empty where none do.
    """

    units: Units
    config: Mapping[str, Any]
    experts: ExpertUnits = ()

    @classmethod
    def of(cls, decision: StructureDecision, layout: Layout) -> Widths:
        """Read what a run has decided.

        Args:
            decision: of the run.
            layout: the dense model's operators.
        """
        layers = []
        for groups, units in zip(layout.layers, decision.units, strict=True):
            operators = {operator.name: operator for group in groups for operator in group}
            layers.append(tuple(Unit(**{**dict(unit), "consumer": operators[unit.consumer]}) for unit in units))
        return cls(tuple(layers), decision.config, decision.experts)

    def decision(self) -> StructureDecision:
        """Return the same as a record for ``run.json``."""
        layers = tuple(
            tuple(UnitDecision(**{**vars(unit), "consumer": unit.consumer.name}) for unit in units)
            for units in self.units
        )
        return StructureDecision(units=layers, experts=self.experts, config=dict(self.config))

    def mixtures(self, index: int) -> tuple[ExpertsDecision, ...]:
        """Return the mixtures of decoder layer ``index`` that lose experts."""
        return self.experts[index] if self.experts else ()

    def touched(self, index: int) -> set[str]:
        """Return the names of the operators of decoder layer ``index`` that lose inputs or outputs."""
        return {name for unit in self.units[index] for name in unit.names}


def removed_weights(model: LayerwiseModel, widths: Widths | None) -> int:
    """Count the parameters that are removed from a model."""
    if widths is None:
        return 0
    return removed_experts_weights(model, widths.experts or ((),) * len(model)) + sum(
        (unit.before - unit.after) * unit_weights(model.layers[index], unit)
        for index, units in enumerate(widths.units)
        for unit in units
    )


def unread_tensors(model: LayerwiseModel, widths: Widths | None) -> list[str]:
    """List the stored tensors of layers that the model does not read and the changed config does not fit.

    Such are layers of multi-token prediction: ``mtp.layers.0``, or one more decoder layer. The config gives them the
    widths of the others, so they are recognised by a matrix of the name and the shape of one that is cut.
    """
    if widths is None or "quantization_config" in widths.config:  # free widths leave the config's to other layers
        return []
    checkpoint = model.checkpoint
    cut = set()
    for index, units in enumerate(widths.units):
        names = [name for unit in units for name in unit.tensors(model.layers[index], torch.arange(1))]
        for name in (*names, *(name for unit in widths.mixtures(index) for name in unit.tensors)):
            stored = model.source_of(index, name)
            if (found := LAYER.fullmatch(stored)) and len(shape := checkpoint.entry(stored).shape) > 1:
                cut.add((found[2], shape))
    read = {found[1] for name in model.sources() if (found := LAYER.fullmatch(name))}
    others = [(name, found) for name in checkpoint.names() if (found := LAYER.fullmatch(name)) and found[1] not in read]
    stale = {found[1] for name, found in others if (found[2], checkpoint.entry(name).shape) in cut}
    return [name for name, found in others if found[1] in stale]


def changed_config(model: LayerwiseModel, widths: Widths) -> Mapping[str, Any]:
    """Return the change of ``config.json`` for a result: the widths', and no layers that are left out.

    Its number of layers of multi-token prediction becomes 0 where that many are left out (:func:`unread_tensors`).
    """
    gone = len({found[1] for name in unread_tensors(model, widths) if (found := LAYER.fullmatch(name))})
    section = text_section(model)
    stored = model.checkpoint.config if section is None else model.checkpoint.config[section]
    none = {key: 0 for key in PREDICTORS if gone and stored.get(key) == gone}
    return merge_patch(widths.config, none if section is None or not none else {section: none})


def free_widths(units: Units, entries: Mapping[str, Sequence[str]]) -> Widths:
    """Return widths that differ between layers, and the section of ``config.json`` that says so.

    Where all units of a layer stay it has none.

    Args:
        units: of every decoder layer.
        entries: by kind, the entries of the config that its number of units is in place of.
    """
    sizes: dict[int, dict[str, int]] = {}
    for index, layer in enumerate(units):
        for unit in (unit for unit in layer if unit.after < unit.before):
            rows = sorted(unit.rows)
            for name in entries[unit.kind]:
                repeats = rows[-1] // rows[0] if name == HEADS else 1
                sizes.setdefault(index, {})[name] = unit.after * repeats
    cut = tuple(tuple(unit for unit in layer if unit.after < unit.before) for layer in units)
    return Widths(cut, {"quantization_config": widths_section(sizes)})


def resized(layout: Layout, widths: Widths) -> Layout:
    """Return the layout with the shapes that operators have after the removal."""
    layers = []
    for index, (groups, units) in enumerate(zip(layout.layers, widths.units, strict=True)):
        left = {unit.name: unit.after for unit in widths.mixtures(index)}
        rows = {
            name: len(places) for unit in units for name, places in unit.kept_rows(torch.arange(unit.after)).items()
        }
        columns = {unit.consumer.name: unit.columns * unit.after for unit in units}
        layers.append(
            tuple(
                tuple(
                    replace(
                        operator,
                        rows=rows.get(operator.name, operator.rows),
                        columns=columns.get(operator.name, operator.columns),
                    )
                    for operator in group
                )
                for group in groups
                if not group[0].experts or group[0].expert < left.get(group[0].experts, math.inf)
            )
        )
    return replace(layout, layers=tuple(layers))

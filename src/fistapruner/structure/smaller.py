"""Describe a model without what is removed: shapes, config, parameters, tensors left out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from pydantic import TypeAdapter

from ..models.layers import LayerwiseModel
from ..models.operators import Layout
from ..models.write import merge_patch
from .units import EXPERTS, Unit, Units

LAYER = re.compile(r"(.*?\.\d+\.)(.+)")
"""Stored name of a tensor in a list of layers: what the names of its layer begin with, and its name inside."""

PREDICTORS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
"""Entries of configs with the number of layers of multi-token prediction."""


@dataclass(frozen=True)
class Widths:
    """What is removed from each decoder layer, and the change of ``config.json``, a JSON merge patch.

    Without ``units`` nothing is removed.
    """

    units: Units = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Widths:
        """Read what :meth:`record` has returned, from ``run.json``."""
        return TypeAdapter(cls).validate_python(record)

    def record(self) -> dict[str, Any]:
        """Return the same as a record for ``run.json``."""
        record: dict[str, Any] = TypeAdapter(Widths).dump_python(self, mode="json")
        return record

    def channels(self, index: int) -> tuple[Unit, ...]:
        """Return the channels and groups that decoder layer ``index`` loses."""
        return tuple(unit for unit in chain(*self.units[index : index + 1]) if unit.reader is not None)

    def mixtures(self, index: int) -> tuple[Unit, ...]:
        """Return the mixtures of decoder layer ``index`` that lose experts."""
        return tuple(unit for unit in chain(*self.units[index : index + 1]) if unit.kind == EXPERTS)


def removed_weights(model: LayerwiseModel, widths: Widths) -> int:
    """Count the parameters that are removed from a model."""
    return sum(
        (unit.before - unit.after) * unit.weights(layer)
        for layer, units in zip(model.layers, widths.units, strict=True)
        for unit in units
    )


def resized(layout: Layout, widths: Widths) -> Layout:
    """Return the layout with the shapes that operators have after the removal."""
    layers = []
    for index, groups in enumerate(layout.layers):
        units, left = widths.channels(index), {unit.name: unit.after for unit in widths.mixtures(index)}
        rows = {name: cut.block * cut.copies * unit.after for unit in units for name, cut in unit.producers.items()}
        columns = {unit.name: unit.columns * unit.after for unit in units}
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


def dropped_tensors(model: LayerwiseModel, widths: Widths) -> tuple[set[str], dict[str, tuple[int, ...]]]:
    """Return the stored tensors of removed experts, and new shapes of those that hold all experts."""
    dropped: set[str] = set()
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(len(model)):
        for unit in widths.mixtures(index):
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


def unread_tensors(model: LayerwiseModel, widths: Widths) -> list[str]:
    """List the stored tensors of layers that the model does not read and the changed config does not fit.

    Such are layers of multi-token prediction: ``mtp.layers.0``, or one more decoder layer. The config gives them the
    widths of the others, so they are recognised by a matrix of the name and the shape of one that is cut.
    """
    checkpoint = model.checkpoint
    cut = set()
    for index, units in enumerate(widths.units):
        for stored in (model.source_of(index, name) for unit in units for name in unit.cuts):
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
    none = {key: 0 for key in PREDICTORS if gone and stored_text_config(model).get(key) == gone}
    return merge_patch(widths.config, in_section(model, none)) if none else widths.config


def _text_section(model: LayerwiseModel) -> str | None:
    """Return the entry of ``config.json`` that holds the text config; None where the file itself does."""
    text = model.config.get_text_config()
    inner = {key: value for key, value in model.checkpoint.config.items() if isinstance(value, dict)}
    own = (key for key, value in inner.items() if value.get("model_type") == text.model_type)
    return None if text is model.config else next(own, None)


def stored_text_config(model: LayerwiseModel) -> Mapping[str, Any]:
    """Return the text config as ``config.json`` has it."""
    section = _text_section(model)
    stored: Mapping[str, Any] = model.checkpoint.config if section is None else model.checkpoint.config[section]
    return stored


def in_section(model: LayerwiseModel, change: dict[str, Any]) -> dict[str, Any]:
    """Put a change of the text config where ``config.json`` has that."""
    section = _text_section(model)
    return change if section is None else {section: change}

"""The tensors that the checkpoint of a pruning run has in other values or shapes, or leaves out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import FistaPrunerError
from ..execution.context import RunContext
from ..models.files.checkpoint import Checkpoint
from ..models.files.record import read_pruning_record
from ..models.files.safetensors import SafetensorsFile
from ..structure.smaller import dropped_tensors, unread_tensors


@dataclass(frozen=True)
class ChangedTensors:
    """What the checkpoint of a run has in place of its input's tensors.

    Args:
        checkpoint: the input; ``earlier``: its record, empty where there is none, or it cannot be read.
        places: the file of the journal that holds a new tensor, by checkpoint name.
        shapes: new shapes of the tensors that lost channels or experts, by checkpoint name.
        dropped: stored tensors that are left out: of removed experts, and of layers that the model does not read and
            the new config does not fit.
        gone: these, and the parts of removed experts in tensors that hold all experts.
    """

    checkpoint: Checkpoint
    earlier: Mapping[str, Any]
    places: Mapping[str, SafetensorsFile]
    shapes: Mapping[str, tuple[int, ...]]
    dropped: Collection[str]
    gone: Collection[str]

    @classmethod
    def of(cls, context: RunContext) -> ChangedTensors:
        """Collect them of a run whose layers are all journaled."""
        checkpoint, widths, journal = context.model.checkpoint, context.widths, context.run.journal
        places = {name: file for file in map(journal.weights, range(len(context.model))) for name in file.entries}
        dropped = set(unread_tensors(context.model, widths))
        cut: dict[str, tuple[int, ...]] = {}
        stacked: dict[str, tuple[int, ...]] = {}
        if widths is not None:
            of_experts, stacked = dropped_tensors(context.model, widths)
            dropped |= of_experts
        for name, file in places.items() if widths is not None else ():
            shape, stack = file.entries[name].shape, checkpoint.stack_of(name)
            if shape == checkpoint.entry(name).shape:
                continue
            if stack is None:
                cut[name] = shape
            else:  # every expert that stays has this shape
                count = stacked.get(stack.name, checkpoint.entry(stack.name).shape)[0]
                stacked[stack.name] = (count, *shape[:: -1 if stack.transposed else 1])
        parts = {part for name in stacked for part in checkpoint.parts(name)}
        stay = {checkpoint.stacks[name].part(index) for name, shape in stacked.items() for index in range(shape[0])}
        try:
            earlier = read_pruning_record(checkpoint.folder)
        except FistaPrunerError:  # the report says so: the lineage is in the same file
            earlier = {}
        return cls(checkpoint, earlier, places, stacked | cut, dropped, dropped | (parts - stay))

    def replacement(self, name: str) -> Tensor | None:
        """Read a tensor of the new checkpoint; None where it is as it was."""
        if name in self.places:
            return self.places[name].read(name)
        return self.checkpoint.read(name) if name in self.checkpoint.orders else None

"""Decide which operators of a pruned checkpoint are packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..models.files.checkpoint import Checkpoint
from ..models.files.folder_files import PRUNING_RECORD
from ..models.files.record import recorded_claims, stacked_experts, stores_inputs_first, violation_of
from ..models.files.safetensors import TensorEntry
from ..runtime.formatting import shell_line
from ..runtime.numerics import dtype_name
from ..runtime.progress import Tick
from .format import OperatorSpec
from .packed import FLOATS, PackedOperator, pack_operator

MIN_ZEROS_TO_PACK = 0.25
"""Least share of zeros of a matrix that counts as pruned if there is no record of a pruning run."""


class NoPackedFormError(FistaPrunerError):
    """A pruned model cannot be packed: nothing becomes smaller, experts are one tensor, or it is not bf16."""


@dataclass(frozen=True)
class PlannedOperator:
    """How one operator will be stored; decided in a first pass, because headers precede values.

    Args:
        spec: its packed form.
        stored: number of values that are stored.
        source: the tensor in the checkpoint.
        cast: dtype that its values are rounded to first.
    """

    spec: OperatorSpec
    stored: int
    source: TensorEntry
    cast: torch.dtype

    @property
    def rounds(self) -> bool:
        """Whether the stored values are not those of the checkpoint."""
        return self.spec.int8 or self.cast != self.source.dtype

    def build(self, weight: Tensor) -> PackedOperator:
        """Pack the weight, as it is in the checkpoint."""
        return pack_operator(weight.to(self.cast), int8=self.spec.int8)


def plan_packing(
    source: Checkpoint, record: dict[str, Any], values: str, progress: Tick
) -> tuple[dict[str, PlannedOperator], str | None]:
    """Decide how each pruned operator that becomes smaller is stored.

    Args:
        source: the pruned checkpoint.
        record: of the pruning run; may be empty.
        values, progress: as for :func:`.pack.pack`.

    Returns:
        The decisions, and :attr:`.pack.PackReport.violation`.

    Raises:
        NoPackedFormError: none becomes smaller, pruned experts are stored as one tensor, or values are not bf16.
    """
    if stacked := stacked_experts(record):
        raise NoPackedFormError(
            f"{source.folder}: {stacked} is one tensor of all experts, and only matrices are packed: keep the folder "
            "as it is, or prune with --ignore re:experts to pack the other operators"
        )
    listed, faults = recorded_claims(record, source, source.folder)
    if faults:
        raise FistaPrunerError(f"{source.folder / PRUNING_RECORD} is of another checkpoint: {faults[0]}")
    inputs_first = stores_inputs_first(listed, {name: source.entry(name) for name in listed})
    violation: str | None = None
    int8, plan, weights, zeros, wide = values == "int8", {}, 0, 0, ""
    names = source.names()
    for done, name in enumerate(names):
        progress("tensors looked through for zeros", done, len(names))
        entry = source.entry(name)
        if len(entry.shape) != 2 or entry.dtype not in (*FLOATS, torch.float64) or 0 in entry.shape:
            continue
        known = listed.get(name)
        if listed and known is None:
            continue
        cast = torch.bfloat16 if values == "bf16" else entry.dtype
        stored_weight = source.read(name)
        if known is not None and violation is None:
            count = stored_weight.numel() - int(torch.count_nonzero(stored_weight))
            if fault := violation_of(stored_weight.T if inputs_first else stored_weight, count, known):
                violation = (
                    f"{source.folder} is not what its record claims: {name}: {fault}; "
                    f"'{shell_line('inspect', source.folder)}' shows all"
                )
        if known is not None and known.get("sparsity") == "0%":
            continue  # an operator that was not pruned keeps its values
        weight = stored_weight.to(cast)
        nonzero = int(torch.count_nonzero(weight))
        if not listed and nonzero > (1 - MIN_ZEROS_TO_PACK) * weight.numel():
            continue
        if cast not in (FLOATS if int8 else (torch.bfloat16,)):
            wide = wide or name
            continue
        spec = OperatorSpec((entry.shape[0], entry.shape[1]), cast, int8)
        if int8 and not bool(torch.isfinite(weight).all()):
            raise FistaPrunerError(f"{source.folder}: {name} has values that are not finite, so it cannot become int8")
        if sum(part.nbytes for part in spec.entries(name, nonzero)) < entry.nbytes:
            plan[name] = PlannedOperator(spec, nonzero, entry, cast)
        weights, zeros = weights + weight.numel(), zeros + weight.numel() - nonzero
    if plan:
        return plan, violation
    if wide:
        advice = "values are packed as bf16, or as int8 of bf16, fp16 and fp32: give --values bf16, which rounds"
        raise NoPackedFormError(f"{source.folder}: {wide} is {dtype_name(source.entry(wide).dtype)}; {advice}")
    if weights:
        raise NoPackedFormError(
            f"{source.folder}: no operator becomes smaller without its zeros ({zeros / weights:.1%} of the weights), "
            "since the mask takes one bit for every weight"
        )
    why = "its record claims no zeros" if listed else f"no matrix has at least {MIN_ZEROS_TO_PACK:.0%} zeros"
    raise FistaPrunerError(f"{source.folder} has no pruned operators: {why}")

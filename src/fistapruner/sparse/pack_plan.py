"""Decide which operators of a pruned checkpoint are packed, and in which layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import NM, parse_sparsity
from ..core.constraints import patterns_met
from ..errors import FistaPrunerError
from ..models.files.checkpoint import Checkpoint
from ..models.files.folder_files import PRUNING_RECORD
from ..models.files.record import recorded_claims, stacked_experts, stores_inputs_first, violation_of
from ..models.files.safetensors import TensorEntry
from ..runtime.formatting import shell_line
from ..runtime.numerics import dtype_name
from ..runtime.progress import Tick
from .format import MAX_M, OperatorSpec
from .packed import FLOATS, PackedOperator, pack_operator

MIN_ZEROS_TO_PACK = 0.25
"""Least share of zeros of a matrix that counts as pruned if there is no record of a pruning run."""


class NoPackedFormError(FistaPrunerError):
    """A pruned model cannot be packed: nothing becomes smaller, experts are one tensor, or it is fp64."""


def choose_layout(weight: Tensor, hint: NM | None = None, *, int8: bool = False) -> NM | None:
    """Choose the smallest layout of a weight: an n:m pattern that it has, or None for a bit mask.

    Args:
        weight: (rows, columns) in the dtype that is stored.
        hint: a pattern that is tried first.
        int8: whether the values are stored as int8.
    """
    rows, columns = weight.shape

    def nbytes(layout: NM | None, stored: int) -> int:
        spec = OperatorSpec((rows, columns), weight.dtype, layout, int8)
        return sum(part.nbytes for part in spec.entries("", stored))

    best, least = None, nbytes(None, int(torch.count_nonzero(weight)))
    found = patterns_met(weight, MAX_M)
    if hint is not None and hint.m <= MAX_M and hint.satisfies(weight):
        found.insert(0, hint)
    for pattern in found:
        size = nbytes(pattern, weight.numel() // pattern.m * pattern.n)
        if size < least:
            best, least = pattern, size
    return best


@dataclass(frozen=True)
class PlannedOperator:
    """How one operator will be stored; decided in a first pass, because headers precede values.

    Args:
        spec: its packed form.
        stored: number of values that are stored; ``nonzero``: of those that are not zero.
        source: the tensor in the checkpoint.
        cast: dtype that its values are rounded to first.
    """

    spec: OperatorSpec
    stored: int
    nonzero: int
    source: TensorEntry
    cast: torch.dtype

    @property
    def rounds(self) -> bool:
        """Whether the stored values are not those of the checkpoint."""
        return self.spec.int8 or self.cast != self.source.dtype

    def build(self, weight: Tensor) -> PackedOperator:
        """Pack the weight, as it is in the checkpoint."""
        operator = pack_operator(weight.to(self.cast), self.spec.layout)
        return operator.quantised(self.spec.group) if self.spec.int8 else operator


def plan_packing(
    source: Checkpoint, record: dict[str, Any], values: str, group: int, progress: Tick
) -> tuple[dict[str, PlannedOperator], str | None]:
    """Decide how each pruned operator that becomes smaller is stored.

    Args:
        source: the pruned checkpoint.
        record: of the pruning run; may be empty.
        values, group, progress: as for :func:`.pack.pack`.

    Returns:
        The decisions, and :attr:`.pack.PackReport.violation`.

    Raises:
        NoPackedFormError: none becomes smaller, pruned experts are stored as one tensor, or values are fp64.
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
    plan, weights, zeros, wide = {}, 0, 0, ""
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
        if cast not in FLOATS:
            wide = wide or name
            continue
        layout = choose_layout(weight, _hint(known), int8=values == "int8")
        stored = nonzero if layout is None else weight.numel() // layout.m * layout.n
        shape = (entry.shape[0], entry.shape[1])
        spec = OperatorSpec(shape, cast, layout, values == "int8", group if values == "int8" else 0)
        if values == "int8" and not bool(torch.isfinite(weight).all()):
            raise FistaPrunerError(f"{source.folder}: {name} has values that are not finite, so it cannot become int8")
        if sum(part.nbytes for part in spec.entries(name, stored)) < entry.nbytes:
            plan[name] = PlannedOperator(spec, stored, nonzero, entry, cast)
        weights, zeros = weights + weight.numel(), zeros + weight.numel() - nonzero
    if plan:
        return plan, violation
    if wide:
        advice = "bf16, fp16 and fp32 are packed: give --values bf16"
        raise NoPackedFormError(f"{source.folder}: {wide} is {dtype_name(source.entry(wide).dtype)}; {advice}")
    if weights:
        raise NoPackedFormError(
            f"{source.folder}: no operator becomes smaller without its zeros ({zeros / weights:.1%} of the weights), "
            "since the mask takes one bit for every weight"
        )
    why = "its record claims no zeros" if listed else f"no matrix has at least {MIN_ZEROS_TO_PACK:.0%} zeros"
    raise FistaPrunerError(f"{source.folder} has no pruned operators: {why}")


def _hint(known: Mapping[str, Any] | None) -> NM | None:
    """Return the n:m pattern of a recorded claim; it is checked against the weight later."""
    try:
        pattern = parse_sparsity(str(known["sparsity"])) if known and "sparsity" in known else None
    except FistaPrunerError:
        return None
    return None if pattern is None or pattern.nm is None else NM(*pattern.nm)

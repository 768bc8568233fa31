"""Inspect a checkpoint: zeros and n:m pattern of every operator, and whether its claims hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import NM, Constraint, parse_sparsity
from ..core.constraints import patterns_met
from ..errors import FistaPrunerError
from ..models.checkpoint import Checkpoint, model_inside
from ..models.layers import LayerwiseModel
from ..models.low_rank import LowRankAdapter
from ..models.operators import Operator, operators_by_weight
from ..models.record import (
    MIN_ZEROS,
    read_pruning_record,
    recorded_claims,
    take_claimed_apart,
    violation_of,
)
from ..models.safetensors import TensorEntry
from ..models.source import resolve_model
from ..packed.pack import unpacked
from ..runs.directory import checkpoint_of
from ..runs.lineage import read_lineage
from ..runs.records import Lineage
from ..runtime.show import Tick, silent

LONGEST_GROUP = 32
"""Weights in the longest groups that are searched for an n:m pattern."""

NOT_FINITE = "has NaN or infinite weights"


@dataclass(frozen=True)
class OperatorInspection:
    """One linear operator as it is stored.

    ``pattern`` is the n:m pattern that holds in every group: the claimed one, or one that was found where nothing is
    claimed; None if there is none as sparse as the operator.
    """

    name: str  # its tensor in the checkpoint
    shape: tuple[int, ...]
    zeros: int
    weights: int
    pattern: str | None
    claim: str | None  # sparsity that the checkpoint's record, or --pattern, claims
    fault: str | None  # a violated claim, NaN or infinite weights

    @property
    def sparsity(self) -> float:
        """Return the share of zeros."""
        return self.zeros / max(self.weights, 1)


@dataclass(frozen=True)
class Inspection:
    """The result of inspecting a checkpoint.

    ``zeros`` and ``weights`` count the parameters of the whole model, each shared one once (all floating-point tensors
    where the model cannot be built from ``config.json``), without the low-rank part beside it.
    """

    folder: Path
    operators: tuple[OperatorInspection, ...]  # of its decoder layers, in order
    zeros: int
    weights: int
    faults: tuple[str, ...] = ()  # of the record, and of tensors that are no operators
    widths: tuple[tuple[str, str, int, int], ...] = ()  # decoder layer, what was removed, number before and after
    lineage: Lineage | None = None  # how the model was made
    low_rank: tuple[int, int] | None = None  # weights of the low-rank part, and its rank

    @property
    def pruned(self) -> tuple[OperatorInspection, ...]:
        """Return the operators that are claimed to have zeros; without claims, those with at least 1% zeros."""
        if any(operator.claim is not None for operator in self.operators):
            return tuple(operator for operator in self.operators if operator.claim not in (None, "0%"))
        return tuple(operator for operator in self.operators if operator.sparsity >= MIN_ZEROS)

    @property
    def violations(self) -> list[str]:
        """Return all faults, one sentence each."""
        return [*self.faults, *(f"{operator.name}: {operator.fault}" for operator in self.operators if operator.fault)]

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        pruned, names = self.pruned, ("layer", "unit", "before", "after")
        zeros, weights = (sum(getattr(operator, name) for operator in pruned) for name in ("zeros", "weights"))
        return {
            "checkpoint": str(self.folder),
            "operators": [{**asdict(operator), "sparsity": operator.sparsity} for operator in self.operators],
            "pruned": {"operators": len(pruned), "zeros": zeros, "weights": weights},
            "model": {"zeros": self.zeros, "weights": self.weights},
            "widths": [dict(zip(names, width, strict=True)) for width in self.widths],
            "low_rank": None if self.low_rank is None else {"weights": self.low_rank[0], "rank": self.low_rank[1]},
            "lineage": self.lineage.model_dump(mode="json") if self.lineage else None,
            "violations": self.violations,
            "ok": not self.violations,
        }


def inspect_checkpoint(
    folder: str | Path,
    pattern: str | Constraint | None = None,
    *,
    allow_pickle: bool = False,
    progress: Tick = silent,
) -> Inspection:
    """Inspect a checkpoint, one tensor in memory at a time.

    Args:
        folder: a local Hugging Face folder (a packed one is unpacked into a temporary folder), a GGUF file (inspected
            as it is converted for pruning), or a run directory (its finished model is taken).
        pattern: what every operator of the decoder layers is claimed to be (``2:4``, ``50%``), instead of the claims
            of ``fistapruner.json``. It holds along the inputs of every matrix, those of single experts among them.
        allow_pickle: read legacy ``.bin`` weights.
        progress: called with each tensor's name, how many were inspected before it, and the number of all.

    Raises:
        FistaPrunerError: no checkpoint there, or a damaged one; the run is not finished; or a pattern is asked of a
            model that cannot be built from its configuration, so that its operators are not known.
    """
    folder = Path(folder)
    if folder.is_file():
        folder = resolve_model(folder)
    if not (folder / "config.json").exists():
        folder = inner if (inner := model_inside(folder)) != folder else checkpoint_of(folder)
    asked = None if pattern is None else parse_sparsity(pattern)
    with unpacked(folder) as dense:
        return _inspected(folder, Checkpoint.open(dense, allow_pickle), asked, progress)


def _inspected(folder: Path, checkpoint: Checkpoint, asked: Constraint | None, progress: Tick) -> Inspection:
    """Inspect an ordinary checkpoint, which ``folder`` holds, packed or as it is."""
    record, known, parameters = read_pruning_record(checkpoint.folder), dict[str, Operator](), None
    with suppress(FistaPrunerError):  # its operators are not known then
        model = LayerwiseModel(checkpoint, torch.device("cpu"))
        known, parameters = operators_by_weight(model), model.stored_parameters()
    take_claimed_apart(checkpoint, record)
    entries = {name: checkpoint.entry(name) for name in checkpoint.names()}
    claims, faults = recorded_claims(record, entries)
    if asked is not None:
        if not known:
            raise FistaPrunerError(f"{folder}: its config.json does not tell which tensors are to be {asked}")
        claims, faults = {name: {"sparsity": str(asked)} for name in known if name in entries}, []
    operators = []
    zeros = weights = 0
    for done, (name, entry) in enumerate(entries.items()):
        if not entry.dtype.is_floating_point:
            continue
        progress(name, done, len(entries))
        tensor = checkpoint.read(name)
        if entry.dtype.itemsize == 1:  # torch counts no zeros of 8-bit floats
            tensor = tensor.float()
        zero = tensor.numel() - int(torch.count_nonzero(tensor))
        if parameters is None or parameters.issuperset(checkpoint.whole(name)):
            zeros, weights = zeros + zero, weights + tensor.numel()
        if name in claims or _is_operator(entry):
            oriented = tensor.T if name in known and known[name].transposed else tensor
            operators.append(_inspect(entry, oriented, zero, claims.get(name)))
        elif not bool(torch.isfinite(tensor).all()):
            faults.append(f"{name}: {NOT_FINITE}")
    widths = []
    for cut in record.get("widths", ()) if asked is None else ():
        layer, unit, after = cut["layer"], cut["unit"], cut["after"]
        widths.append((layer, unit, cut["before"], after))
        faults += [
            f"{layer}: {name} has the shape {list(entries[name].shape)}, {after} {unit} are claimed"
            for part, size in cut["sizes"].items()
            if (name := f"{layer}.{part}.weight") in entries and after * size not in entries[name].shape
        ]
    lineage = adapter = None
    try:
        lineage = read_lineage(record, folder)
        adapter = LowRankAdapter.beside(checkpoint.folder)
    except FistaPrunerError as error:
        faults.append(str(error))
    low_rank = None if adapter is None else (adapter.weights, adapter.rank)
    return Inspection(folder, tuple(operators), zeros, weights, tuple(faults), tuple(widths), lineage, low_rank)


def exact_pattern(weight: Tensor, zeros: int) -> NM | None:
    """Find the sparsest n:m pattern of a (rows, columns) weight, with the shortest groups.

    A pattern that keeps more weights than are nonzero by over 5 % of all describes only a few full rows: then None.
    """
    if zeros == weight.numel():
        return None
    found = patterns_met(weight, LONGEST_GROUP)
    best = min(found, key=lambda pattern: (pattern.n / pattern.m, pattern.m), default=None)
    return best if best is not None and best.n / best.m <= 1 - zeros / weight.numel() + 0.05 else None


def _inspect(entry: TensorEntry, weight: Tensor, zeros: int, claim: Mapping[str, Any] | None) -> OperatorInspection:
    """Inspect one operator, a (rows, columns) weight."""
    weight = weight.contiguous()
    fault = None if bool(torch.isfinite(weight).all()) else NOT_FINITE
    said = None if claim is None else str(claim.get("sparsity"))
    pattern = exact_pattern(weight, zeros) if claim is None and weight.ndim == 2 else None
    if claim is not None and fault is None:
        fault = violation_of(weight, zeros, claim)
    held = said if fault is None and ":" in str(said) else None if pattern is None else str(pattern)
    return OperatorInspection(entry.name, entry.shape, zeros, weight.numel(), held, said, fault)


def _is_operator(entry: TensorEntry) -> bool:
    """Check for a matrix inside a numbered layer; names of embeddings and heads have no number."""
    return (
        len(entry.shape) == 2
        and entry.name.endswith((".weight", "]"))
        and re.search(r"\.\d+\.|^\d+\.", entry.name) is not None
    )

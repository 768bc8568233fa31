"""Inspect a checkpoint: zeros and n:m pattern of every operator, and whether its claims hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import NM, Constraint, parse_sparsity
from ..core.constraints import patterns_met
from ..errors import FistaPrunerError
from ..models.checkpoint import PRUNING_RECORD, Checkpoint, model_inside
from ..models.operators import Operator, stored_model
from ..models.record import (
    MIN_ZEROS,
    read_pruning_record,
    recorded_claims,
    stores_inputs_first,
    take_claimed_apart,
    violation_of,
)
from ..models.safetensors import TensorEntry
from ..models.source import resolve_model
from ..packed.checkpoint import PackedCheckpoint, is_packed, low_rank_part
from ..runs.directory import checkpoint_of
from ..runs.lineage import read_lineage
from ..runs.records import Lineage
from ..runtime.progress import Tick, silent

LONGEST_GROUP = 32
"""Weights in the longest groups that are searched for an n:m pattern."""

NOT_FINITE = "has NaN or infinite weights"


@dataclass(frozen=True)
class OperatorInspection:
    """One linear operator as it is stored.

    Args:
        name: its tensor in the checkpoint.
        shape: stored shape.
        zeros: weights that are zero; ``weights``: all of them.
        pattern: the n:m pattern that holds in every group: a claimed one, or one that was found where nothing is
            claimed; None if there is none as sparse as the operator.
        claim: sparsity that the checkpoint's record, or ``--pattern``, claims; None without a claim.
        fault: a violated claim, NaN or infinite weights; None if there is none.
    """

    name: str
    shape: tuple[int, ...]
    zeros: int
    weights: int
    pattern: str | None
    claim: str | None
    fault: str | None

    @property
    def sparsity(self) -> float:
        """Return the share of zeros."""
        return self.zeros / max(self.weights, 1)


@dataclass(frozen=True)
class Inspection:
    """The result of inspecting a checkpoint.

    Args:
        folder: the checkpoint's folder.
        operators: the linear operators of its decoder layers, in order.
        zeros: zeros of the whole model; ``weights``: all of its parameters, each shared one once (all floating-point
            tensors where the model cannot be built from ``config.json``).
        faults: claims about operators that the checkpoint does not have, or that have another shape; other tensors that
            have NaN or infinite weights.
        widths: what the record tells of removed structure: decoder layer, what was removed, number before and after.
        lineage: how the model was made, None where its record does not say.
        low_rank: additional weights of the low-rank part beside the checkpoint, which is inspected without it, and its
            rank; None without one.
    """

    folder: Path
    operators: tuple[OperatorInspection, ...]
    zeros: int
    weights: int
    faults: tuple[str, ...] = ()
    widths: tuple[tuple[str, str, int, int], ...] = ()
    lineage: Lineage | None = None
    low_rank: tuple[int, int] | None = None

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
        pruned = self.pruned
        return {
            "checkpoint": str(self.folder),
            "operators": [{**asdict(operator), "sparsity": operator.sparsity} for operator in self.operators],
            "pruned": {
                "operators": len(pruned),
                "zeros": sum(operator.zeros for operator in pruned),
                "weights": sum(operator.weights for operator in pruned),
            },
            "model": {"zeros": self.zeros, "weights": self.weights},
            "widths": [
                {"layer": layer, "unit": unit, "before": before, "after": after}
                for layer, unit, before, after in self.widths
            ],
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
        folder: a local Hugging Face folder, dense or packed, a GGUF file (inspected as it is converted for pruning), or
            a run directory (its finished model is taken).
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
    stored = _open(folder, allow_pickle)
    entries = stored.entries
    claims, faults = recorded_claims(stored.record, entries, folder)
    inputs_first = stores_inputs_first(claims, entries)
    if asked is not None:
        if not stored.operators:
            raise FistaPrunerError(f"{folder}: its config.json does not tell which tensors are to be {asked}")
        claims, faults = {name: {"sparsity": str(asked)} for name in stored.operators if name in entries}, []
    operators = []
    zeros = weights = 0
    for done, (name, entry) in enumerate(entries.items()):
        if not entry.dtype.is_floating_point:
            continue
        progress(name, done, len(entries))
        tensor = stored.read(name)
        if entry.dtype.itemsize == 1:  # torch counts no zeros of 8-bit floats
            tensor = tensor.float()
        zero = tensor.numel() - int(torch.count_nonzero(tensor))
        if name in stored.parameters:
            zeros, weights = zeros + zero, weights + tensor.numel()
        if name in claims or _is_operator(entry):
            transposed = stored.operators[name].transposed if name in stored.operators else inputs_first
            operators.append(_inspect(entry, tensor.T if transposed else tensor, zero, claims.get(name)))
        elif not bool(torch.isfinite(tensor).all()):
            faults.append(f"{name}: {NOT_FINITE}")
    lineage, fault = read_lineage(stored.record, folder)
    faults += [fault] if fault else []
    widths = []
    for layer, unit, before, after, sizes in () if asked is not None else _widths(stored.record, folder):
        widths.append((layer, unit, before, after))
        faults += [
            f"{layer}: {name} has the shape {list(entries[name].shape)}, {after} {unit} are claimed"
            for name, size in sizes.items()
            if name in entries and after * size not in entries[name].shape
        ]
    low_rank = None
    try:
        if (adapter := low_rank_part(folder)) is not None:
            low_rank = adapter.weights, adapter.rank
    except FistaPrunerError as error:
        faults.append(str(error))
    return Inspection(folder, tuple(operators), zeros, weights, tuple(faults), tuple(widths), lineage, low_rank)


def _widths(record: Mapping[str, Any], folder: Path) -> tuple[tuple[str, str, int, int, dict[str, int]], ...]:
    """Read a record's widths: layer, unit, number before and after, rows or columns of one by tensor.

    Raises:
        FistaPrunerError: the record is damaged.
    """
    try:
        return tuple(
            (
                str(entry["layer"]),
                str(entry["unit"]),
                int(entry["before"]),
                int(entry["after"]),
                {f"{entry['layer']}.{name}.weight": int(size) for name, size in entry["sizes"].items()},
            )
            for entry in record.get("widths", [])
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise FistaPrunerError(f"{folder / PRUNING_RECORD} has a list of widths that cannot be read") from None


def exact_pattern(weight: Tensor, zeros: int) -> NM | None:
    """Find the n:m pattern that holds in every group of every row of a (rows, columns) weight.

    Of several patterns, the one that keeps the fewest weights is taken, then the one with the shortest groups. A
    pattern that keeps many more weights than are nonzero describes only a few full rows, so its share may exceed
    theirs by at most 5% of all weights; else the result is None.
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
    pattern = None
    if claim is None and weight.ndim == 2:
        found = exact_pattern(weight, zeros)
        pattern = None if found is None else str(found)
    elif claim is not None and fault is None:
        fault = violation_of(weight, zeros, claim)
        pattern = said if fault is None and ":" in str(said) else None
    return OperatorInspection(entry.name, entry.shape, zeros, weight.numel(), pattern, said, fault)


@dataclass(frozen=True)
class _Stored:
    """A checkpoint as it is read for inspection.

    Args:
        entries: header entries of its dense tensors, by name; experts one by one.
        read: reads one of them.
        record: the pruning record.
        operators: those that the model's code names, by tensor; empty where the model cannot be built.
        parameters: names of the entries that hold parameters; all where those cannot be told.
    """

    entries: Mapping[str, TensorEntry]
    read: Callable[[str], Tensor]
    record: Mapping[str, Any]
    operators: Mapping[str, Operator]
    parameters: Collection[str]


def _open(folder: Path, allow_pickle: bool) -> _Stored:
    """Open a folder, dense or packed."""
    if is_packed(folder):
        packed = PackedCheckpoint(folder)

        def same(name: str, other: str) -> bool:
            one, two = packed.tensor(name), packed.tensor(other)
            return one.dtype == two.dtype and torch.equal(one, two)

        entries = {entry.name: entry for shard in packed.contents().values() for entry in shard}
        found = stored_model(packed.checkpoint, packed.shapes(), same)
        operators = {} if found is None else found.operators
        parameters = entries if found is None or found.parameters is None else found.parameters
        return _Stored(entries, packed.tensor, packed.record, operators, parameters)
    checkpoint, record = Checkpoint.open(folder, allow_pickle), read_pruning_record(folder)
    found = stored_model(checkpoint)
    take_claimed_apart(checkpoint, record)
    entries = {name: checkpoint.entry(name) for name in checkpoint.names()}
    known = None if found is None else found.parameters
    counted = {name for name in entries if known is None or set(checkpoint.whole(name)) <= known}
    return _Stored(entries, checkpoint.read, record, {} if found is None else found.operators, counted)


def _is_operator(entry: TensorEntry) -> bool:
    """Check for a matrix inside a numbered layer; names of embeddings and heads have no number."""
    return (
        len(entry.shape) == 2
        and entry.name.endswith((".weight", "]"))
        and re.search(r"\.\d+\.|^\d+\.", entry.name) is not None
    )

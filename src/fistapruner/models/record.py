"""Read the record that a pruning run writes into its model folder: the sparsity of every operator."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core import parse_sparsity
from ..errors import FistaPrunerError
from .checkpoint import PRUNING_RECORD, Checkpoint, Stack, read_json_in
from .safetensors import TensorEntry

MIN_ZEROS = 0.01
"""Least share of zeros of an operator that counts as pruned where no record says so."""


def read_pruning_record(folder: Path) -> dict[str, Any]:
    """Read ``fistapruner.json`` of a model folder; empty where there is none."""
    return read_json_in(folder, PRUNING_RECORD) if (folder / PRUNING_RECORD).exists() else {}


def permuted_tensors(record: Mapping[str, Any]) -> set[str]:
    """Read the names of the tensors whose channels are not those of the dense model."""
    names = record.get("permuted")
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


def lost_structure(record: Mapping[str, Any]) -> bool:
    """Return whether a model's record says that channels, heads or experts were removed on its way."""
    lineage = record.get("lineage")
    stages = lineage.get("stages") if isinstance(lineage, Mapping) else None
    settings = [stage.get("settings") for stage in stages or () if isinstance(stage, Mapping)]
    sections = [found.get("structure") for found in settings if isinstance(found, Mapping)]
    return any(isinstance(section, Mapping) and section.get("remove") for section in sections)


def has_zeros(record: Mapping[str, Any]) -> bool:
    """Return whether a model's record claims zeros; where it claims nothing, unless it is smaller."""
    if not (claims := _operators(record).values()):
        return not lost_structure(record)
    return any(not isinstance(claim, Mapping) or claim.get("sparsity") != "0%" for claim in claims)


def _operators(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a record claims of operators, by name; nothing where it cannot be read."""
    return operators if isinstance(operators := record.get("operators"), Mapping) else {}


def stack_of(name: str) -> str:
    """Name the tensor of all experts that holds a matrix such as ``down_proj[3]``; empty for others."""
    found = re.fullmatch(r"(.+)\[\d+\]", name)
    return found[1] if found else ""


def stacked_experts(record: Mapping[str, Any]) -> str:
    """Name a tensor of all experts that a model's record claims to be pruned; empty where there is none."""
    return next(filter(None, map(stack_of, _operators(record))), "")


def take_claimed_apart(checkpoint: Checkpoint, record: Mapping[str, Any]) -> None:
    """Take the tensors apart of which a record claims something for the matrices of single experts."""
    for name, claim in _operators(record).items():
        whole = stack_of(name)
        known = whole in checkpoint and whole not in checkpoint.stacks and isinstance(claim, Mapping)
        if known and len(checkpoint.entry(whole).shape) == 3:
            checkpoint.take_apart(Stack(whole, transposed=claim.get("transposed") is True))


def recorded_claims(
    record: Mapping[str, Any], entries: Container[str], origin: str | Path
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Read a record's claims about operators, by stored names, which may leave out ``.weight``.

    Args:
        record: what a pruning run wrote (``fistapruner.json``); one that is damaged is refused.
        entries: names of the checkpoint's tensors; ``origin``: its folder.

    Returns:
        Claims by tensor name, and one sentence for every claim about a missing tensor.
    """
    operators = record.get("operators", {})
    if not isinstance(operators, dict) or not all(isinstance(claim, dict) for claim in operators.values()):
        raise FistaPrunerError(f"{Path(origin) / PRUNING_RECORD} has no mapping of operators to claims")
    found = {name: next((each for each in (name, f"{name}.weight") if each in entries), "") for name in operators}
    claims = {found[name]: claim for name, claim in operators.items() if found[name]}
    lost = {name: claim.get("sparsity") for name, claim in operators.items() if not found[name]}
    said = "is claimed, but the checkpoint has no such operator"
    return claims, [f"{name}: {sparsity} {said}" for name, sparsity in lost.items()]


def stores_inputs_first(claims: Mapping[str, Mapping[str, Any]], entries: Mapping[str, TensorEntry]) -> bool:
    """Check whether operators are stored as (inputs, outputs), as GPT-2's are, by their recorded shapes."""
    shapes = [(claim.get("shape"), list(entries[name].shape)) for name, claim in claims.items()]
    return any(said == stored[::-1] and said != stored for said, stored in shapes)


def violation_of(weight: Tensor, zeros: int, claim: Mapping[str, Any]) -> str | None:
    """Describe how a weight (rows, columns) violates a claim; None if it does not."""
    try:
        sparsity = parse_sparsity(claim["sparsity"])
    except (FistaPrunerError, KeyError) as error:
        return f"its claim cannot be read: {error}"
    promised = claim.get("zeros")
    if type(promised) is int and zeros < promised:
        return f"has {zeros} zeros, {promised} are claimed"
    if type(promised) is int and sparsity.supports_allocation:
        return None  # the exact count says more than the percentage, which is rounded
    if weight.ndim != 2 or not sparsity.satisfies(weight):
        return f"is not {sparsity} ({zeros / max(weight.numel(), 1):.2%} zeros)"
    return None

"""Read the record that a pruning run writes into its model folder: the sparsity of every operator."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core import parse_sparsity
from ..errors import FistaPrunerError
from .checkpoint import ADAPTER_CONFIG, PRUNING_RECORD, Checkpoint, Stack, read_json_in

CONFIG, WEIGHTS = ADAPTER_CONFIG, "adapter_model.safetensors"
"""Files of a PEFT adapter."""

FOLDER = "adapter"
FILES = (f"{FOLDER}/{CONFIG}", f"{FOLDER}/{WEIGHTS}")
"""The low-rank part beside a run's checkpoint, or inside a packed or unpacked one."""

LOW_RANK = "low_rank"
"""Key of the checkpoint's record that describes its low-rank part (:mod:`.low_rank`)."""

MIN_ZEROS = 0.01
"""Least share of zeros of an operator that counts as pruned where no record says so."""


def read_pruning_record(folder: Path) -> dict[str, Any]:
    """Read ``fistapruner.json`` of a model folder; empty where there is none."""
    record = read_json_in(folder, PRUNING_RECORD) if (folder / PRUNING_RECORD).exists() else {}
    operators, permuted = record.get("operators", {}), record.get("permuted", [])
    claimed = isinstance(operators, dict) and all(isinstance(claim, dict) for claim in operators.values())
    if not claimed or not isinstance(permuted, list) or not all(isinstance(name, str) for name in permuted):
        what = "no mapping of operators to claims, or no list of permuted tensors"
        raise FistaPrunerError(f"{folder / PRUNING_RECORD} has {what}")
    return record


def lost_structure(record: Mapping[str, Any]) -> bool:
    """Return whether a model's record says that channels, heads or experts were removed on its way."""
    try:
        stages = record["lineage"]["stages"]
        return any(stage["settings"].get("structure", {}).get("remove") for stage in stages)
    except (KeyError, TypeError, AttributeError):  # none, or one that cannot be read, which its reader says
        return False


def has_zeros(record: Mapping[str, Any]) -> bool:
    """Return whether a model's record claims zeros; where it claims nothing, unless it is smaller."""
    claims = record.get("operators", {}).values()
    return any(claim.get("sparsity") != "0%" for claim in claims) if claims else not lost_structure(record)


def stack_of(name: str) -> str:
    """Name the tensor of all experts that holds a matrix such as ``down_proj[3]``; empty for others."""
    found = re.fullmatch(r"(.+)\[\d+\]", name)
    return found[1] if found else ""


def stacked_experts(record: Mapping[str, Any]) -> str:
    """Name a tensor of all experts that a model's record claims to be pruned; empty where there is none."""
    return next(filter(None, map(stack_of, record.get("operators", {}))), "")


def take_claimed_apart(checkpoint: Checkpoint, record: Mapping[str, Any]) -> None:
    """Take the tensors apart of which a record claims something for the matrices of single experts."""
    for name, claim in record.get("operators", {}).items():
        whole = stack_of(name)
        if whole in checkpoint and whole not in checkpoint.stacks and len(checkpoint.entry(whole).shape) == 3:
            checkpoint.take_apart(Stack(whole, transposed=claim.get("transposed") is True))


def recorded_claims(record: Mapping[str, Any], entries: Container[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Read a record's claims about operators, by stored names, which may leave out ``.weight``.

    The second result is one sentence for every claim about a tensor that is not among ``entries``.
    """
    claims, lost = {}, []
    for name, claim in record.get("operators", {}).items():
        if found := next((each for each in (name, f"{name}.weight") if each in entries), ""):
            claims[found] = claim
        else:
            lost.append(f"{name}: {claim.get('sparsity')} is claimed, but the checkpoint has no such operator")
    return claims, lost


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


def adapter_folder(checkpoint: Path) -> Path:
    """Find the folder of a checkpoint's low-rank part: inside the checkpoint's own, or beside that."""
    inside = checkpoint / FOLDER
    return inside if inside.is_dir() else checkpoint.resolve().parent / FOLDER


def refuse_low_rank(checkpoint: Path, verb: str) -> None:
    """Refuse a checkpoint that is only the sparse part of a model, where the rest cannot be added."""
    record: dict[str, Any] = {}
    with suppress(FistaPrunerError):  # a record that cannot be read: the verb says so itself
        record = read_pruning_record(checkpoint)
    if record.get(LOW_RANK) is not None:
        keeps = verb not in ("prune", "compare", "export", "--dense")  # these take a model without zeros, too
        dense = "" if keeps else f"give {verb} the dense model that PEFT (merge_and_unload) makes of both, or "
        raise FistaPrunerError(
            f"{checkpoint} is the sparse part of a model whose low-rank part is {adapter_folder(checkpoint)}, which "
            f"{verb} would leave out: {dense}prune again without low_rank"
        )

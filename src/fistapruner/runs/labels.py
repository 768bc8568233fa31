"""Write recipes shortly: method, amount, and training."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..runtime.show import short_count
from ..settings.loading import read_share
from ..settings.structure_settings import compensation_of

DONE = {"prune": "pruned", "recover": "recovered", "align": "aligned", "merge": "merged with an adapter"}
"""What a run has done to its model, by the kind of the run."""

PHASES = {
    "calibration": "calibration text",
    "sensitivity": "measuring the dense model",
    "capture": "passes through the model",
    "gram": "sums over the calibration text",
    "problem": "preparing the solver",
    "structure": "choosing channels",
    "solve": "choosing zeros and weights",
    "reconstruct": "training decoder layers",
    "io": "files",
    "report": "measuring errors",
    "plain": "timing a plain pass",
    "train": "training and its checks",
    "write": "writing the checkpoint",
    "evaluation": "evaluation",
    "samples": "sample prompts",
}
"""Phases of a run's time, in words."""

OTHERS_BY_NAME = ", others by name"
"""Follows the sparsity of a recipe whose allocation gives operators that it names another one."""


def method_label(method: Any) -> str:
    """Write a method chain as on the command line, such as ``wanda+refit``.

    Args:
        method: as recipes store it: a name, or a list of names and one-entry mappings.
    """
    if isinstance(method, str):
        return method
    return "+".join(next(iter(step)) if isinstance(step, dict) and step else str(step) for step in method or ())


def sets_zeros(recipe: Mapping[str, Any]) -> bool:
    """Check whether a recipe sets weights to zero, in all operators or in some that its allocation names."""
    return recipe.get("sparsity") != "0%" or bool(_named_patterns(recipe))


def _named_patterns(recipe: Mapping[str, Any]) -> list[str]:
    """List the different patterns with zeros of an allocation that is a mapping."""
    allocation = recipe.get("allocation")
    patterns = dict.fromkeys(map(str, allocation.values())) if isinstance(allocation, Mapping) else ()
    return [pattern for pattern in patterns if ":" in pattern or read_share(pattern) is not None]


def sparsity_label(recipe: Mapping[str, Any]) -> str:
    """Write the sparsity of a recipe: ``2:4``, or ``mixed n:4 (45.4%)`` if chosen by error.

    Where only some operators have zeros, whose names its allocation has: ``2:4 by name``; where these have others than
    the rest: ``2:4, others by name``.
    """
    sparsity, allocation = str(recipe.get("sparsity", "")), str(recipe.get("allocation", ""))
    n_of_m = re.fullmatch(r"(\d+):(\d+)", sparsity)
    if n_of_m is not None and allocation == "error":
        n, m = map(int, n_of_m.groups())
        return f"mixed n:{m} ({100 * (m - n) / m:g}%)"
    if sparsity == "0%" and (named := _named_patterns(recipe)):
        return f"{', '.join(named)} by name"
    by_name = recipe.get("allocation")
    if sparsity != "0%" and isinstance(by_name, Mapping) and any(str(other) != sparsity for other in by_name.values()):
        return sparsity + OTHERS_BY_NAME
    return sparsity


def amount_label(recipe: dict[str, Any]) -> str:
    """Say what a recipe removes: ``2:4``, ``structure 25%``, or both: ``structure 25% and 2:4``.

    What it adds is said too: ``2:4 + rank 16``.
    """
    removed, sparsity = (recipe.get("structure") or {}).get("remove"), sparsity_label(recipe)
    if not removed:
        return f"{sparsity} + rank {recipe['low_rank']}" if recipe.get("low_rank") else sparsity
    return f"structure {removed}" + ("" if sparsity in ("", "0%") else f" and {sparsity}")


def methods_label(recipe: dict[str, Any]) -> str:
    """Write how a recipe prunes: the choice of structure and the method chain, where they have work."""
    chain, structure = method_label(recipe.get("method", "")), recipe.get("structure") or {}
    if not structure.get("remove"):
        return chain
    units = [part.partition("=")[0] for part in str(structure["remove"]).split(",")]
    how = structure.get("compensate", "auto")
    how = compensation_of(structure["method"], how) if "method" in structure else how
    channels = [f"{structure.get('method')}{'' if how == 'none' else f'+{how}'}"] if units != ["experts"] else []
    own = ", ".join([*channels, *(["reap"] if "experts" in units else [])])
    return f"{own}, {chain}" if sets_zeros(recipe) else own


def training_label(kind: str, settings: Mapping[str, Any], tokens: int | None) -> str:
    """Say what a run trains: ``recovered: lora, kl, 256k tokens with loss``.

    An anchor is said, too: ``aligned: lora, dpo + anchor 0.1``.

    Args:
        kind: of the run.
        settings: its recipe, resolved.
        tokens: with loss, passed in training; None where that is not known.
    """
    optimizer, loss, anchor = (settings.get(key) for key in ("optimizer", "loss", "anchor"))
    parts = [
        settings.get("parameters"),
        None if optimizer == "adamw" else optimizer,
        f"{loss} + anchor {anchor:g}" if anchor and loss != "none" else loss,
        f"{short_count(tokens)} tokens with loss" if tokens else None,
    ]
    return ": ".join(filter(None, (DONE[kind], ", ".join(str(part) for part in parts if part))))

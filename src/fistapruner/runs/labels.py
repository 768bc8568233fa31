"""Write recipes, as records hold them, shortly: method, amount, and training."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..runtime.show import short_count
from ..settings.parse import read_share
from ..settings.structure import Remove, compensation_of

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
    sparsity, allocation = str(recipe.get("sparsity", "")), recipe.get("allocation")
    if allocation == "error" and (n_of_m := re.fullmatch(r"(\d+):(\d+)", sparsity)):
        n, m = map(int, n_of_m.groups())
        return f"mixed n:{m} ({100 * (m - n) / m:g}%)"
    if sparsity == "0%":
        named = _named_patterns(recipe)
        return f"{', '.join(named)} by name" if named else sparsity
    others = isinstance(allocation, Mapping) and any(str(other) != sparsity for other in allocation.values())
    return sparsity + OTHERS_BY_NAME if others else sparsity


def amount_label(recipe: Mapping[str, Any]) -> str:
    """Say what a recipe removes or adds: ``2:4``, ``structure 25% and 2:4``, ``2:4 + rank 16``."""
    removed, sparsity = (recipe.get("structure") or {}).get("remove"), sparsity_label(recipe)
    if not removed:
        return f"{sparsity} + rank {recipe['low_rank']}" if recipe.get("low_rank") else sparsity
    return f"structure {removed_label(removed)}" + ("" if sparsity in ("", "0%") else f" and {sparsity}")


def removed_label(remove: Any) -> str:
    """Write how much is removed, as on the command line: ``25%`` or ``mlp=20%,heads=1``."""
    return str(Remove.model_validate(remove))


def methods_label(recipe: Mapping[str, Any]) -> str:
    """Write how a recipe prunes, the choice of structure first: ``obs+refit, wanda+refit``."""
    steps, structure = recipe.get("method") or "", recipe.get("structure") or {}
    steps = [steps] if isinstance(steps, str) else steps  # of a mapping, its one key is the name
    chain = "+".join(step if isinstance(step, str) else next(iter(step)) for step in steps)
    remove = structure.get("remove")
    if not remove:
        return chain
    units = list(Remove.model_validate(remove).model_dump())
    own = ["reap"] if "experts" in units else []
    if units != ["experts"]:
        method = structure.get("method", "obs")
        how = compensation_of(method, structure.get("compensate", "auto"))
        own.insert(0, method + ("" if how == "none" else f"+{how}"))
    return ", ".join([*own, *([chain] if sets_zeros(recipe) else [])])


def training_label(kind: str, settings: Mapping[str, Any], tokens: int | None) -> str:
    """Say what a run trains: ``recovered: lora, kl, 256k tokens with loss``, ``aligned: lora, dpo``.

    Args:
        kind: of the run.
        settings: its recipe, resolved.
        tokens: with loss, passed in training; None where that is not known.
    """
    optimizer, loss, anchor = (settings.get(key) for key in ("optimizer", "loss", "anchor"))
    parts = [settings.get("parameters"), None if optimizer == "adamw" else optimizer]
    parts += [f"{loss} + anchor {anchor:g}" if anchor and loss != "none" else loss]
    parts += [f"{short_count(tokens)} tokens with loss" if tokens else None]
    return ": ".join(filter(None, (DONE[kind], ", ".join(str(part) for part in parts if part))))

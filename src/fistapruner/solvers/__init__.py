"""Solvers and refinements by name, and the function that runs a chain of them.

The catalogue is read without torch: classes and functions are imported on first use (PEP 562).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import FistaPrunerError, instead_of

if TYPE_CHECKING:
    from .base import Method, Solution, Steps, parse_method, setting, solve

    METHODS: dict[str, type[Method]]
    """Classes of the methods by name."""

__all__ = ["METHODS", "Method", "Solution", "Steps", "parse_method", "setting", "solve"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "METHODS":
        places = {entry.name: entry.place.split(".") for entry in CATALOGUE}
        found: Any = {key: getattr(import_module(f".{file}", __name__), kind) for key, (file, kind) in places.items()}
    else:
        found = getattr(import_module(".base", __name__), name)
    return globals().setdefault(name, found)


@dataclass(frozen=True)
class Entry:
    """Describe one method; ``place`` is its module in this package and its class."""

    name: str
    place: str
    summary: str
    reference: str
    refines: bool = False


CATALOGUE = (
    Entry(
        "proximal",
        "proximal.Proximal",
        "proximal splitting with hard thresholds in the OBS metric, then refit (default)",
        "this project; splitting: Lions & Mercier 1979; growing penalty: ALPS, arXiv 2406.07831",
    ),
    Entry(
        "fista",
        "fista.Fista",
        "FISTAPruner: l1 by FISTA, rounding, adaptive lambda (to the letter of the paper: --recipe paper)",
        "Zhao et al. 2024, arXiv 2408.03728",
    ),
    Entry(
        "alps",
        "alps.ALPS",
        "ADMM with hard thresholding and growing penalty, then conjugate gradients",
        "Meng et al. 2024, arXiv 2406.07831",
    ),
    Entry(
        "sparsegpt",
        "sparsegpt.SparseGPT",
        "column by column, remaining weights compensate (one pass)",
        "Frantar & Alistarh 2023, arXiv 2301.00774",
    ),
    Entry(
        "admm",
        "admm.ADMM",
        "ADMM weight update, sparsity grows over the first steps",
        "Boza 2024, arXiv 2401.02938",
    ),
    Entry(
        "wanda",
        "scores.Wanda",
        "magnitude times input norm, row by row; no weight update",
        "Sun et al. 2023, arXiv 2306.11695",
    ),
    Entry(
        "magnitude",
        "scores.Magnitude",
        "drops the smallest weights of each operator; uses no data",
        "Han et al. 2015, arXiv 1506.02626",
    ),
    Entry(
        "refit",
        "refit.Refit",
        "least squares on the mask of the step before",
        "conjugate gradients: Hestenes & Stiefel 1952; per-row steps as in ALPS, arXiv 2406.07831",
        refines=True,
    ),
    Entry(
        "swap",
        "swap.Swap",
        "exchange kept and dropped weights of a row while that lowers its error",
        "single exchanges for best subsets, Miller 2002; the sweep operator, Goodnight 1979",
        refines=True,
    ),
)
"""All methods, in the order in which they are listed."""


@dataclass(frozen=True)
class Listing:
    """Methods that are listed, printed as ``fistapruner methods`` prints them.

    ``settings`` are default and description by name of the one method that was asked for; None where all are listed.
    """

    entries: tuple[Entry, ...]
    settings: dict[str, tuple[Any, str]] | None = None

    def __str__(self) -> str:
        if self.settings is not None:
            (entry,) = self.entries
            lines = [f"{entry.name}: {entry.summary}", entry.reference]
            for key, (default, description) in self.settings.items():
                lines += [f"  {key} = {json.dumps(default)}", f"      {description}"]
            return "\n".join(lines)
        lines = []
        for refines, title in ((False, "Solvers"), (True, "Refinements (after a solver: wanda+refit)")):
            lines.append(title)
            for entry in self.entries:
                if entry.refines is refines:
                    lines += [f"  {entry.name:<12} {entry.summary}", f"  {'':<12} {entry.reference}"]
        return "\n".join([*lines, "One method: fistapruner methods NAME"])

    def to_json(self) -> dict[str, Any]:
        """Return the methods as JSON values, one with its settings."""
        facts = {
            entry.name: {"summary": entry.summary, "reference": entry.reference, "refines": entry.refines}
            for entry in self.entries
        }
        if self.settings is None:
            return facts
        known = {key: {"default": default, "description": said} for key, (default, said) in self.settings.items()}
        (entry,) = self.entries
        return {"name": entry.name, **facts[entry.name], "settings": known}


def methods(name: str | None = None) -> Listing:
    """List the solvers and refinements, or one of them with its settings."""
    if name is None:
        return Listing(CATALOGUE)
    found = tuple(entry for entry in CATALOGUE if entry.name == name)
    if not found:
        raise FistaPrunerError(f"method {name!r} is not known{instead_of(name, [entry.name for entry in CATALOGUE])}")
    from . import METHODS  # imports torch

    return Listing(found, METHODS[name].descriptions())

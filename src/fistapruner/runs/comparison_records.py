"""The schema of ``compare.json``; see ``docs/files.md``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ..runtime.files import read_json
from ..runtime.machine import Machine
from ..runtime.show import percent
from .labels import removed_label
from .records import VERSION, CalibrationFacts, ModelFacts, Number, Record, ZeroCounts, parse, share_of
from .results import Divergence, Perplexity

FIGURES, TABLE, PAGE = "compare.json", "compare.md", "compare.html"
"""Files of a comparison: the rows so far, their table, and its page."""

RUNS = "runs"
"""Folder with the run directories of the rows."""


class CompareRow(ZeroCounts):
    """One method at one sparsity and seed.

    Args:
        method: chain of solver and refinements; ``label``: as the user wrote it; ``settings``: its recipe.
        gap: ln(perplexity) - ln(dense perplexity); ``relative_error``: mean over changed operators.
        seconds: of the run, without drawing the calibration windows that rows share; ``time_split``: by phase.
        dense_weights, model_weights, dense_flops_per_token, flops_per_token: of the model before and after structure
            was removed; None where none was.
        error: why this row has no figures.
    """

    method: str
    label: str | None = None
    sparsity: str
    seed: int = 0
    perplexity: Perplexity | None = None
    divergence: Divergence | None = None
    gap: float | None = None
    relative_error: float | None = None
    seconds: float | None = None
    time_split: dict[str, Number] = {}
    peak_memory: int | None = None
    low_rank_weights: int | None = None
    checkpoint_bytes: int | None = None
    dense_weights: int | None = None
    model_weights: int | None = None
    dense_flops_per_token: int | None = None
    flops_per_token: int | None = None
    settings: dict[str, Any] = {}
    error: str | None = None

    @property
    def name(self) -> str:
        """What to print for the method."""
        return self.label or self.method

    @property
    def beside_zeros(self) -> str:
        """Say what low-rank parts add and what structure went, behind the share of zeros; else nothing."""
        more = share_of(self.low_rank_weights, self.operator_weights)
        text = f" and {percent(more)} more weights" if more else ""
        if removed := (self.settings.get("structure") or {}).get("remove"):
            parameters = share_of(self.model_weights, self.dense_weights)
            flops = share_of(self.flops_per_token, self.dense_flops_per_token)
            less = {"parameters": parameters, "FLOP a token": flops}
            how = ", ".join(f"−{percent(1 - share)} {what}" for what, share in less.items() if share is not None)
            text += f" (structure {removed_label(removed)} removed{how and f': {how}'})"
        return text


class Comparison(Record):
    """``DIR/compare.json``: many methods, one protocol.

    Args:
        fingerprint: what all rows share, by name: model, calibration, evaluation text, settings.
        kept: run directories in ``DIR/runs`` whose checkpoints this command or an earlier one asked to keep.
        dense: the dense model on the same tokens.
    """

    version: int = VERSION
    kind: Literal["compare"] = "compare"
    status: Literal["running", "finished"] = "running"
    command: str | None = None
    started: str | None = None
    finished: str | None = None
    versions: dict[str, str] = {}
    machine: Machine = Machine()
    model: ModelFacts = Field(default_factory=lambda: ModelFacts(source=""))
    fingerprint: dict[str, Any] = {}
    kept: list[str] = []
    calibration: CalibrationFacts | None = None
    dense: Perplexity | None = None
    rows: list[CompareRow] = []
    warnings: list[str] = []


def is_comparison(folder: Path) -> bool:
    """Check whether a folder is that of a comparison, which may have no row yet."""
    return (folder / FIGURES).is_file()


def load_comparison(folder: Path) -> Comparison:
    """Read ``DIR/compare.json``; a FistaPrunerError says what is wrong with it."""
    return parse(Comparison, read_json(folder / FIGURES), str(folder / FIGURES))

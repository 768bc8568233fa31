"""The schema of ``compare.json``; see ``docs/files.md``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ..errors import FistaPrunerError
from ..runtime.files import entries, read_json
from ..runtime.formatting import percent
from ..runtime.machine import Machine
from .base import VERSION, Number, Record, parse
from .lock import NAME as LOCK
from .records import CalibrationFacts, ModelFacts, share_of
from .results import Divergence, Perplexity


class CompareRow(Record):
    """One method at one sparsity and seed.

    Args:
        method: chain as written on the command line; ``label``: what to print instead; ``sparsity``; ``seed``.
        perplexity, divergence: on the text of the comparison; ``gap``: ln(perplexity) - ln(dense perplexity).
        relative_error: mean over changed operators.
        seconds: of the run; ``time_split``: by phase; ``peak_memory``: bytes.
        operator_weights, operator_zeros: exact; ``low_rank_weights``: additional ones of low-rank parts.
        checkpoint_bytes: of the weight files.
        dense_weights, model_weights: parameters of the whole model before and after structure was removed;
            ``dense_flops_per_token``, ``flops_per_token``: see :class:`~.records.Totals`. None where none was.
        kept: its checkpoint was asked to be kept; ``error``: why this row has no figures, when it failed.
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
    operator_weights: int | None = None
    operator_zeros: int | None = None
    low_rank_weights: int | None = None
    checkpoint_bytes: int | None = None
    dense_weights: int | None = None
    model_weights: int | None = None
    dense_flops_per_token: int | None = None
    flops_per_token: int | None = None
    settings: dict[str, Any] = {}
    kept: bool = False
    error: str | None = None

    @property
    def name(self) -> str:
        """What to print for the method."""
        return self.label or self.method

    @property
    def key(self) -> tuple[str, str, int]:
        """Identify the row among those of a comparison."""
        return self.name, self.sparsity, self.seed

    @property
    def zeros_share(self) -> float | None:
        """Share of zeros in the operators; None where it is not known."""
        return share_of(self.operator_zeros, self.operator_weights)

    @property
    def beside_zeros(self) -> str:
        """Say what low-rank parts add and what structure went, behind the share of zeros; else nothing."""
        more, weights = self.low_rank_weights, self.operator_weights
        text = f" and {percent(more / weights)} more weights" if more and weights else ""
        if removed := (self.settings.get("structure") or {}).get("remove"):
            kept = (
                (share_of(self.model_weights, self.dense_weights), "parameters"),
                (share_of(self.flops_per_token, self.dense_flops_per_token), "FLOP a token"),
            )
            less = ", ".join(f"−{percent(1 - share)} {what}" for share, what in kept if share is not None)
            text += f" (structure {removed} removed{less and f': {less}'})"
        return text


FIGURES, TABLE, PAGE = "compare.json", "compare.md", "compare.html"
"""Files of a comparison: the figures so far, their table, and its page."""

RUNS = "runs"
"""Folder with the run directories of the rows."""

DENSE = "dense.json"
"""File with the dense model's figures."""

STATES = "dense-states"
"""File with the dense model's last hidden states on the evaluation windows, while a comparison runs."""


class Comparison(Record):
    """``DIR/compare.json``: many methods, one protocol.

    Args:
        dense: the dense model on the same tokens.
        asked: keys of the rows that were asked for this time; ``failed``: of those that failed, also where a row has
            the figures of an earlier command; not in the file.
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
    calibration: CalibrationFacts | None = None
    dense: Perplexity | None = None
    rows: list[CompareRow] = []
    asked: set[tuple[str, str, int]] = Field(default_factory=set, exclude=True)
    failed: set[tuple[str, str, int]] = Field(default_factory=set, exclude=True)
    warnings: list[str] = []


def is_comparison(folder: Path) -> bool:
    """Check whether a folder is that of a comparison, which may have no row yet."""
    if any((folder / name).is_file() for name in (FIGURES, DENSE, STATES)):
        return True
    return (folder / RUNS).is_dir() and {entry.name for entry in entries(folder)} <= {RUNS, LOCK}


def load_comparison(folder: Path) -> Comparison:
    """Read ``DIR/compare.json``.

    Raises:
        FistaPrunerError: it is broken or not there yet.
    """
    file = folder / FIGURES
    if not file.is_file():
        raise FistaPrunerError(f"{folder} holds a comparison that has no row yet")
    return parse(Comparison, read_json(file), str(file))

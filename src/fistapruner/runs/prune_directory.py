"""The run directory of a pruning run: what it keeps beside the files of every run.

RUN/
    calibration.safetensors    the token ids
    calibration.begun.safetensors    the texts that the model has written so far, until all are there
    metrics.safetensors        what was measured on the dense model: weights of errors, order of channels
    layers/                    the finished decoder layers (:mod:`fistapruner.runs.journal`)
    bypass.safetensors         the state of learning which channels stay, where the recipe asks for it
    adapter/                   low-rank parts of the operators, where the recipe asks for them
    hidden/                    hidden states that are still needed, where memory does not hold them
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..models.checkpoint import Orders
from ..models.safetensors import SafetensorsFile, write_tensors
from ..runtime.files import PARTIAL, entries, sha256_file
from ..text import tokens_sha256
from .decision import PruneRecord
from .directory import EARLY, RunDirectory
from .journal import LAYER_FILE, LayerJournal

DRAWING = "drawing"
"""Metadata key of the calibration tokens: it distinguishes them from any other file of that name."""

BEFORE_TOKENS = (
    rf"{EARLY}|layers|calibration\.(begun\.)?safetensors{re.escape(PARTIAL)}|calibration\.begun\.safetensors"
)
"""Names that an attempt has left that was stopped before it had drawn calibration tokens."""

BEFORE_RUN_FILE = (
    rf"{BEFORE_TOKENS}|hidden|"
    rf"((calibration|metrics|bypass)\.safetensors|recipe\.yaml|run\.json)({re.escape(PARTIAL)})?"
)
"""Names that an attempt has left that was stopped before ``run.json`` was written."""


class PruneDirectory(RunDirectory):
    """Paths and records of one pruning run.

    Args:
        folder: the run directory.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.calibration_file = folder / "calibration.safetensors"
        self.begun_file = folder / "calibration.begun.safetensors"
        self.metrics_file = folder / "metrics.safetensors"
        self.bypass_file = folder / "bypass.safetensors"
        self.hidden = folder / "hidden"
        self.journal = LayerJournal(folder / "layers")

    def create(self) -> None:
        """Make the folders."""
        self.journal.folder.mkdir(parents=True, exist_ok=True)

    def own_folders(self) -> tuple[Path, ...]:
        return (self.journal.folder, self.model, self.adapter, self.hidden)

    def own_files(self) -> tuple[Path, ...]:
        return (*super().own_files(), self.calibration_file, self.begun_file, self.metrics_file, self.bypass_file)

    def foreign(self) -> list[str]:
        begun, layers = self._has_own_tokens(), self.journal.folder
        names = BEFORE_RUN_FILE if begun else BEFORE_TOKENS
        others = [path.name for path in entries(self.folder) if not re.fullmatch(names, path.name)]
        inside = entries(layers) if layers.is_dir() else []
        others += [f"{layers.name}/{path.name}" for path in inside if not (begun and LAYER_FILE.fullmatch(path.name))]
        return sorted(others)

    def record(self) -> PruneRecord | None:
        return self.read_record(PruneRecord, "prune")

    def begun_record(self) -> PruneRecord:
        """Read ``run.json`` of a run that was begun.

        Raises:
            FistaPrunerError: there is none, or it is none of this verb.
        """
        if (record := self.record()) is None:
            raise FistaPrunerError(f"{self.folder} is not a run that was begun (it has no run.json)")
        return record

    def remove_weights(self) -> None:
        super().remove_weights()
        self.journal.remove_weights()
        shutil.rmtree(self.hidden, ignore_errors=True)
        self.metrics_file.unlink(missing_ok=True)

    def _has_own_tokens(self) -> bool:
        try:
            return DRAWING in SafetensorsFile(self.calibration_file).metadata
        except (FistaPrunerError, OSError):
            return False

    def write_tokens(self, tokens: Tensor, drawing: str, how: Mapping[str, Any]) -> None:
        """Store the (samples, seqlen) calibration token ids.

        Args:
            tokens: the ids.
            drawing: the settings and the model that decide them.
            how: how they were drawn.
        """
        ids = tokens.to(torch.int64)
        about = {DRAWING: drawing, "how": json.dumps(how), "sha256": tokens_sha256(ids)}
        write_tensors(self.calibration_file, {"tokens": ids}, about)
        self.begun_file.unlink(missing_ok=True)

    def keep_texts(self, drawing: str, texts: Tensor, random: Tensor) -> None:
        """Store what the model has written so far, and the state of the random numbers."""
        write_tensors(self.begun_file, {"texts": texts, "random": random}, {DRAWING: drawing})

    def begun_texts(self, drawing: str) -> tuple[Tensor, Tensor] | None:
        """Read what :meth:`keep_texts` stored; None unless by the same settings and model."""
        try:
            file = SafetensorsFile(self.begun_file)
            return (file.read("texts"), file.read("random")) if file.metadata.get(DRAWING) == drawing else None
        except (FistaPrunerError, OSError, KeyError):
            return None

    def drawn(self, drawing: str | None = None) -> tuple[Tensor, dict[str, Any]] | None:
        """Read the token ids and how they were drawn; None where they are gone, damaged or drawn otherwise.

        Args:
            drawing: the settings and the model that must have decided them; None takes any.
        """
        try:
            file = SafetensorsFile(self.calibration_file)
            tokens, how = file.read("tokens"), json.loads(file.metadata["how"])
            same = drawing in (None, file.metadata[DRAWING]) and file.metadata["sha256"] == tokens_sha256(tokens)
        except (FistaPrunerError, OSError, KeyError, ValueError):
            return None
        return (tokens, how) if same else None

    def tokens(self) -> Tensor:
        """Read the (samples, seqlen) calibration token ids."""
        return SafetensorsFile(self.calibration_file).read("tokens")

    def fault(self, settled: PruneRecord) -> str | None:
        """Say which of the files that the run began with is gone or damaged; None where all are whole."""
        if self.drawn() is None:
            return f"{self.calibration_file} is gone or damaged"
        if (digest := settled.decision.metrics_sha256) and not self.has_metrics(digest):
            return f"{self.metrics_file} is gone or damaged"
        return None

    def write_metrics(
        self,
        metrics: Sequence[Tensor],
        importance: Mapping[str, Tensor],
        orders: Orders,
        scores: Mapping[str, Tensor],
    ) -> None:
        """Store what was measured on the dense model, as far as the recipe needs it.

        Args:
            metrics: of every decoder layer, the weight of errors of its output.
            importance: of every operator, by full name, the weights of its rows.
            orders: of every tensor whose channels are reordered, by name, the dimension and the old places.
            scores: by full name of the operator that reads them, scores of channels.
        """
        tensors = {f"output.{index:04d}": metric for index, metric in enumerate(metrics)}
        tensors |= {f"rows.{name}": rows for name, rows in importance.items()}
        tensors |= {f"order.{dim}.{name}": order for name, (dim, order) in orders.items()}
        tensors |= {f"scores.{name}": values for name, values in scores.items()}
        write_tensors(self.metrics_file, tensors)

    def has_metrics(self, sha256: str) -> bool:
        """Check that what was measured on the dense model is there and has this checksum."""
        return self.metrics_file.is_file() and sha256_file(self.metrics_file) == sha256

    def metric(self, index: int) -> Tensor:
        """Read the weight of errors of decoder layer ``index``'s output."""
        return SafetensorsFile(self.metrics_file).read(f"output.{index:04d}")

    def importance(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Read the weights of the rows of some operators, by full name."""
        file = SafetensorsFile(self.metrics_file)
        return {name: file.read(f"rows.{name}") for name in names}

    def scores(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Read the scores of channels that some operators read, by full name; those without are left out."""
        file = SafetensorsFile(self.metrics_file)
        return {name: file.read(f"scores.{name}") for name in names if f"scores.{name}" in file.entries}

    def orders(self) -> Orders:
        """Read the new order of channels, by tensor."""
        file = SafetensorsFile(self.metrics_file)
        named = [name.split(".", 2) for name in file.entries if name.startswith("order.")]
        return {tensor: (int(dim), file.read(f"order.{dim}.{tensor}")) for _, dim, tensor in named}

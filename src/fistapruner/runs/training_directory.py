"""The run directory of a run that trains: what it keeps beside the files of every run.

RUN/
    windows.safetensors    the training text: token ids, which of them carry loss, which windows are held out, and the
                           hashes of its documents
    teacher/               the dense model's predictions of these windows (:mod:`fistapruner.training.teacher`)
    steps.jsonl            one line a step (:mod:`fistapruner.runs.steps`)
    states/                the newest training states (:mod:`fistapruner.runs.snapshots`)
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..models.safetensors import SafetensorsFile, write_tensors
from ..runtime.files import PARTIAL
from ..text.training import TrainingText
from .decision import TrainingRecord
from .directory import EARLY, RunDirectory
from .snapshots import Snapshots

TEXT = "training"
"""Metadata key of the windows: the settings and the model that decide them."""

BEFORE_RUN_FILE = rf"{EARLY}|(windows\.safetensors|recipe\.yaml|run\.json)({re.escape(PARTIAL)})?"
"""Names that an attempt has left that was stopped before ``run.json`` was written."""


class TrainingDirectory(RunDirectory):
    """Paths and records of one run that trains.

    Args:
        folder: the run directory.

    Attributes:
        verb: that makes such runs.
    """

    verb: ClassVar[str]
    early = BEFORE_RUN_FILE

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.windows_file = folder / "windows.safetensors"
        self.steps_file = folder / "steps.jsonl"
        self.teacher = folder / "teacher"
        self.states = Snapshots(folder / "states")

    def own_folders(self) -> tuple[Path, ...]:
        return (self.model, self.adapter, self.teacher, self.states.folder)

    def own_files(self) -> tuple[Path, ...]:
        return (*super().own_files(), self.windows_file, self.steps_file)

    def record(self) -> TrainingRecord | None:
        return self.read_record(TrainingRecord, self.verb)

    def begun_record(self) -> TrainingRecord:
        """Read ``run.json`` of a run that was begun.

        Raises:
            FistaPrunerError: there is none, or it is none of this verb.
        """
        if (record := self.record()) is None:
            raise FistaPrunerError(f"{self.folder} is not a run that was begun (it has no run.json)")
        return record

    def remove_weights(self) -> None:
        super().remove_weights()
        for folder in (self.states.folder, self.teacher):
            shutil.rmtree(folder, ignore_errors=True)

    def write_text(self, text: TrainingText, drawing: str) -> None:
        """Store the training text.

        Args:
            text: its windows.
            drawing: the settings and the model that decide them.
        """
        about = {"tasks": list(text.tasks), "facts": text.facts}
        write_tensors(self.windows_file, self.tensors(text), {TEXT: drawing, "about": json.dumps(about)})

    def tensors(self, text: TrainingText) -> dict[str, Tensor]:
        """Return what is stored of a training text, by name."""
        tensors = {"tokens": text.tokens, "marks": text.marks, "held_out": text.held_out, "task": text.task}
        if text.documents:
            hashes = bytearray.fromhex("".join(sorted(text.documents)))
            tensors["documents"] = torch.frombuffer(hashes, dtype=torch.uint8).view(len(text.documents), -1)
        return tensors

    def made(self, fields: dict[str, Any], tensors: dict[str, Tensor]) -> TrainingText:
        """Make a training text of its fields; ``tensors`` are all that were stored."""
        return TrainingText(**fields)

    def text(self, drawing: str | None = None) -> TrainingText | None:
        """Read the training text; None where there is none, or it was cut by other settings.

        Args:
            drawing: what must have decided it; None takes any.
        """
        try:
            file = SafetensorsFile(self.windows_file)
            about: dict[str, Any] = json.loads(file.metadata["about"])
            if drawing is not None and file.metadata.get(TEXT) != drawing:
                return None
            tensors = {name: file.read(name) for name in file.entries}
            fields = {
                "tokens": tensors["tokens"],
                "marks": tensors["marks"].to(torch.bool),
                "held_out": tensors["held_out"].to(torch.bool),
                "task": tensors["task"],
                "tasks": tuple(about["tasks"]),
                "facts": about["facts"],
                "documents": frozenset(row.tobytes().hex() for row in tensors.get("documents", torch.empty(0)).numpy()),
            }
            return self.made(fields, tensors)
        except (FistaPrunerError, OSError, KeyError, ValueError, TypeError):
            return None


class RecoverDirectory(TrainingDirectory):
    """Paths and records of one recovery run."""

    verb: ClassVar[str] = "recover"

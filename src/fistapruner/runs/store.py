"""What a run keeps of finished work: layers and training states, each with a sealed record.

A part is NNNN.safetensors and NNNN.json. The JSON is written last, and has the run's fingerprint and the checksum of
the tensors. A part counts if it is whole and of this run; any other is made again.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import FistaPrunerError
from ..models.safetensors import LazyTensors, SafetensorsFile, write_tensors
from ..runtime.files import PARTIAL, disk_errors, entries, read_sealed_json, sha256_file, write_sealed_json
from .records import LayerEntry

log = logging.getLogger("fistapruner")

PART_FILE = rf"\d{{4,}}\.(json|safetensors)({re.escape(PARTIAL)})?"
"""Names of the files of parts."""

KEPT = 2
"""Snapshots that are kept."""

LEAST_SECONDS = 900.0
"""A snapshot is written at every check, and after this time; after ten times as long as one takes, if that is more."""


class Store:
    """Numbered parts in a folder; the numbers in their names have so many ``digits``."""

    def __init__(self, folder: Path, digits: int = 4) -> None:
        self.folder = folder
        self.digits = digits

    def files(self, number: int) -> tuple[Path, Path]:
        """Name the tensors and the JSON of a part."""
        name = f"{number:0{self.digits}d}"
        return self.folder / f"{name}.safetensors", self.folder / f"{name}.json"

    def numbers(self) -> list[int]:
        """List the parts that have a JSON, in order, unchecked."""
        return sorted(int(path.stem) for path in self._own() if path.suffix == ".json")

    def put(self, number: int, fingerprint: str, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
        """Store a part: its tensors, then the JSON without which they do not count."""
        file, record = self.files(number)
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            record.unlink(missing_ok=True)
        write_tensors(file, tensors, {"fingerprint": fingerprint})
        seal = {"fingerprint": fingerprint, "number": number, "sha256": sha256_file(file)}
        write_sealed_json(record, {**content, "file": seal})

    def get(self, number: int, fingerprint: str) -> dict[str, Any] | None:
        """Read the JSON of a part; None, with the reason in the log, where it or its tensors do not count."""
        file, record = self.files(number)
        if not record.exists():
            return None
        try:
            content = read_sealed_json(record)
            seal = content.pop("file")
            if (seal["fingerprint"], seal["number"]) != (fingerprint, number):
                raise ValueError("it is of another run, or another part")
            if sha256_file(file) != seal["sha256"]:
                raise ValueError(f"{file.name} is not the file it was written with")
            return content
        except (OSError, ValueError, KeyError, TypeError, FistaPrunerError) as error:
            log.warning("%s does not count: %s", record, error)
            return None

    def weights(self, number: int) -> SafetensorsFile:
        """Open the tensors of a part."""
        return SafetensorsFile(self.files(number)[0])

    def _own(self) -> list[Path]:
        return entries(self.folder, PART_FILE)


class LayerJournal(Store):
    """The decoder layers of a run: each is stored when it is finished, so a kill loses one at most."""

    def write(self, fingerprint: str, weights: Mapping[str, Tensor], entry: LayerEntry) -> None:
        """Store a finished layer: its pruned tensors by name, and its part of the report."""
        self.put(entry.index, fingerprint, weights, entry.model_dump(mode="json"))

    def finished(self, index: int, fingerprint: str) -> LayerEntry | None:
        """Read the journaled layer ``index``; None, with the reason in the log, where it must be pruned again."""
        content = self.get(index, fingerprint)
        return None if content is None else LayerEntry.model_validate(content)


@dataclass(frozen=True)
class Snapshot:
    """A stored training state: steps taken, plain values, and tensors, on disk until they are read."""

    step: int
    values: dict[str, Any]
    tensors: SafetensorsFile


class Snapshots(Store):
    """The newest training states of a run: ``RUN/states/``, numbered by their steps."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, 8)

    def write(self, fingerprint: str, step: int, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Store the state after a step, plain values and tensors, and remove those that it replaces."""
        self.put(step, fingerprint, tensors, {"values": dict(values)})
        self.tidy(step)

    def tidy(self, step: int) -> None:
        """Remove all but the newest :data:`KEPT` up to a step, and what a killed attempt has left."""
        kept = [other for other in self.numbers() if other <= step][-KEPT:]
        with disk_errors(self.folder):
            for path in self._own():  # the JSON comes first: without it the tensors do not count
                if int(path.name.partition(".")[0]) not in kept or path.name.endswith(PARTIAL):
                    path.unlink(missing_ok=True)

    def newest(self, fingerprint: str, last: int | None = None) -> Snapshot | None:
        """Find the newest whole snapshot of this run, of a step up to ``last``; None where there is none."""
        for step in reversed(self.numbers()):
            if (last is None or step <= last) and (content := self.get(step, fingerprint)) is not None:
                return Snapshot(step, content["values"], self.weights(step))
        return None

    def restore(self, fingerprint: str, last: int, trained: Any) -> dict[str, Any] | None:
        """Load the newest whole snapshot up to a step into what is trained; return its plain values, or None."""
        if (snapshot := self.newest(fingerprint, last)) is None:
            return None
        trained.load(LazyTensors(snapshot.tensors.entries, snapshot.tensors.read))
        return snapshot.values

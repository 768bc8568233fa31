"""What a run keeps of finished work: numbered tensors with a sealed record, and its training steps.

A part is NNNN.safetensors and NNNN.json. The JSON is written last, and has the run's fingerprint and the checksum of
the tensors. A part counts if it is whole and of this run; any other is made again.
"""

from __future__ import annotations

import json
import logging
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from ..errors import FistaPrunerError
from ..models.files.safetensors import SafetensorsFile, write_tensors
from ..runtime.files import (
    PARTIAL,
    disk_errors,
    entries,
    open_file,
    read_sealed_json,
    sha256_file,
    write_all,
    write_sealed_json,
)

log = logging.getLogger("fistapruner")

PART_FILE = rf"\d{{4,}}\.(json|safetensors)({re.escape(PARTIAL)})?"
"""Names of the files of parts."""

KEPT = 2
"""Snapshots that are kept."""

LEAST_SECONDS = 900.0
"""A snapshot is written at every check, and after this time; after ten times as long as one takes, if that is more."""


class Store:
    """Numbered parts in a folder.

    Args:
        folder: where their files are.
        digits: of the numbers in their names.
    """

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

    def get(self, number: int, fingerprint: str, *, tensors: bool = True) -> dict[str, Any] | None:
        """Read the JSON of a part; None, with the reason in the log, where it (or its tensors) does not count."""
        file, record = self.files(number)
        if not record.exists():
            return None
        try:
            content = read_sealed_json(record)
            seal = content.pop("file")
            if (seal["fingerprint"], seal["number"]) != (fingerprint, number):
                raise ValueError("it is of another run, or another part")
            if tensors and sha256_file(file) != seal["sha256"]:
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


@dataclass(frozen=True)
class Snapshot:
    """A stored training state: steps taken, plain values, and tensors, on disk until they are read."""

    step: int
    values: dict[str, Any]
    tensors: SafetensorsFile


class Snapshots(Store):
    """The newest training states of a run: ``RUN/states/``, numbered by their steps.

    Args:
        folder: where their files are.
    """

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


def snapshot_interval(seconds: float) -> float:
    """Return the seconds to wait between snapshots that take ``seconds`` each to write."""
    return max(LEAST_SECONDS, 10 * seconds)


class StepJournal:
    """The journal of training steps, ``RUN/steps.jsonl``, open for appending. Use it as a context manager.

    A line is a JSON object with the key ``step`` (from 1; the line of step 0 has the check before training), a tab and
    the CRC-32 of the object's text. A torn or damaged line ends the journal: its step and all later ones are taken
    again.

    Args:
        path: the file; it is made if it is missing.
        last: last step to keep; later lines are dropped.
    """

    def __init__(self, path: Path, last: int) -> None:
        self.path = path
        self._end = max((end for line, end in _lines(path) if line["step"] <= last), default=0)
        self._descriptor = open_file(path)

    def __enter__(self) -> Self:
        with disk_errors(self.path):
            if os.fstat(self._descriptor).st_size > self._end:  # its date is that of the last step
                os.ftruncate(self._descriptor, self._end)
        return self

    def append(self, line: Mapping[str, Any]) -> None:
        """Append a line; it is on the disk after :meth:`sync`."""
        text = json.dumps(line, separators=(",", ":")).encode()
        data = text + b"\t%08x\n" % zlib.crc32(text)
        with disk_errors(self.path):
            write_all(self._descriptor, data, self._end)
        self._end += len(data)

    def sync(self) -> None:
        """Flush the lines to the disk."""
        with disk_errors(self.path):
            os.fsync(self._descriptor)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.sync()
        finally:
            os.close(self._descriptor)


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a journal of steps, up to the first that is torn or damaged."""
    return [line for line, _ in _lines(path)]


def _lines(path: Path) -> list[tuple[dict[str, Any], int]]:
    """Read the whole lines of a journal, each with the offset behind it."""
    found: list[tuple[dict[str, Any], int]] = []
    end = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        text, _, check = line.rpartition(b"\t")
        if not text or check != b"%08x\n" % zlib.crc32(text):
            break
        end += len(line)
        found.append((json.loads(text), end))
    return found

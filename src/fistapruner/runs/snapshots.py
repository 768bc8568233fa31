"""Snapshots of a training state, so that a killed run goes on with the same bits.

RUN/states/
    00000128.safetensors    every tensor of the state after step 128
    00000128.json           its plain values and the checksum of its tensors; written last

A snapshot counts if its JSON is there, belongs to this run, and the checksum of its tensors is right. The newest two
are kept.
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
from ..models.safetensors import SafetensorsFile, write_tensors
from ..runtime.files import PARTIAL, disk_errors, read_sealed_json, sha256_file, write_sealed_json

log = logging.getLogger("fistapruner")

KEPT = 2
"""Snapshots that are kept."""

LEAST_SECONDS = 900.0
"""A snapshot is written at every check, and after this time; after ten times as long as one takes, if that is more."""

STATE_FILE = re.compile(rf"\d{{8}}\.(json|safetensors)({re.escape(PARTIAL)})?")
"""Names of the snapshots' files."""


def snapshot_interval(seconds: float) -> float:
    """Return the seconds to wait between snapshots that take ``seconds`` each to write."""
    return max(LEAST_SECONDS, 10 * seconds)


@dataclass(frozen=True)
class Snapshot:
    """A stored training state.

    Args:
        step: optimizer steps that were taken.
        values: its plain values.
        tensors: its tensors, on disk until they are read.
    """

    step: int
    values: dict[str, Any]
    tensors: SafetensorsFile


class Snapshots:
    """The snapshots of a run.

    Args:
        folder: where their files are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, fingerprint: str, step: int, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Store a state, and remove those that it replaces (:meth:`tidy`).

        Args:
            fingerprint: of the run.
            step: optimizer steps that were taken.
            values: plain values, as JSON takes them.
            tensors: tensors by name.
        """
        file, record = self._files(step)
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            record.unlink(missing_ok=True)
        write_tensors(file, tensors, {"fingerprint": fingerprint})
        content = {"fingerprint": fingerprint, "step": step, "values": dict(values), "file": sha256_file(file)}
        write_sealed_json(record, content)
        self.tidy(step)

    def tidy(self, step: int) -> None:
        """Remove all but the newest :data:`KEPT`, what an attempt has left that was killed, and later states.

        Args:
            step: that the run is at; what was stored of later ones is void.
        """
        kept = [other for other in self.steps() if other <= step][-KEPT:]
        with disk_errors(self.folder):
            # The JSON first: without it the tensors do not count.
            for path in sorted(self.folder.glob("*")):
                if STATE_FILE.fullmatch(path.name) and (int(path.name[:8]) not in kept or path.name.endswith(PARTIAL)):
                    path.unlink(missing_ok=True)

    def newest(self, fingerprint: str, last: int | None = None) -> Snapshot | None:
        """Find the newest snapshot of this run that is whole; None where there is none.

        Args:
            fingerprint: of the run.
            last: newest step that counts; None takes any.
        """
        for step in reversed(self.steps()):
            if last is not None and step > last:
                continue
            file, record = self._files(step)
            try:
                content = read_sealed_json(record)
                if content["fingerprint"] != fingerprint:
                    raise ValueError("it belongs to another run")
                if content["step"] != step or sha256_file(file) != content["file"]:
                    raise ValueError(f"{file.name} is not the file it was written with")
                return Snapshot(step, content["values"], SafetensorsFile(file))
            except (OSError, ValueError, KeyError, FistaPrunerError) as error:
                log.warning("snapshot %s is not used: %s", record.name, error)
        return None

    def steps(self) -> list[int]:
        """List the steps of all snapshots, in order, unchecked."""
        return sorted(int(path.stem) for path in self.folder.glob("*.json") if STATE_FILE.fullmatch(path.name))

    def _files(self, step: int) -> tuple[Path, Path]:
        return self.folder / f"{step:08d}.safetensors", self.folder / f"{step:08d}.json"

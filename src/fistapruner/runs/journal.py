"""The journal of decoder layers: each is stored when it is finished, so a kill loses one at most.

    RUN/layers/
        0003.safetensors    the pruned tensors of a decoder layer
        0003.json           its part of the report and the checksum of its tensors; written last

A layer counts as finished if its JSON is there, belongs to this run, and the checksum of its tensors is right. Any
other layer is pruned again.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..errors import FistaPrunerError
from ..models.safetensors import SafetensorsFile, write_tensors
from ..runtime.files import PARTIAL, disk_errors, files_named, read_sealed_json, sha256_file, write_sealed_json
from .layer_records import LayerEntry

log = logging.getLogger("fistapruner")

LAYER_FILE = re.compile(rf"\d{{4,}}\.(json|safetensors)({re.escape(PARTIAL)})?")
"""Names of the journal's files."""


class LayerJournal:
    """The finished decoder layers of a run.

    Args:
        folder: where their files are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def files(self, index: int) -> tuple[Path, Path]:
        """Name the tensors and the JSON of decoder layer ``index``."""
        return self.folder / f"{index:04d}.safetensors", self.folder / f"{index:04d}.json"

    def write(self, fingerprint: str, weights: Mapping[str, Tensor], entry: LayerEntry) -> None:
        """Store a finished layer: its tensors first, then the JSON without which they do not count.

        Args:
            fingerprint: of the run.
            weights: pruned tensors by their name in the checkpoint.
            entry: the layer's part of the report.
        """
        tensors, record = self.files(entry.index)
        with disk_errors(record):
            record.unlink(missing_ok=True)
        write_tensors(tensors, weights, {"fingerprint": fingerprint})
        content = entry.model_dump(mode="json")
        content["file"] = {"fingerprint": fingerprint, "sha256": sha256_file(tensors), "bytes": tensors.stat().st_size}
        write_sealed_json(record, content)

    def finished(self, index: int, fingerprint: str) -> LayerEntry | None:
        """Read the journaled layer ``index``; None, with the reason in the log, where it must be pruned again."""
        tensors, record = self.files(index)
        if not record.exists():
            return None
        try:
            content = read_sealed_json(record)
            file = content["file"]
            if file["fingerprint"] != fingerprint:
                raise ValueError("it belongs to another recipe, model or calibration set")
            if content["index"] != index:
                raise ValueError(f"it is of layer {content['index']}")
            if tensors.stat().st_size != file["bytes"] or sha256_file(tensors) != file["sha256"]:
                raise ValueError(f"{tensors.name} is not the file it was written with")
            return LayerEntry.model_validate(content)
        except (OSError, ValueError, KeyError, TypeError, FistaPrunerError) as error:
            log.warning("layer %d is done again: %s: %s", index, record.name, error)
            return None

    def weights(self, index: int) -> SafetensorsFile:
        """Open the pruned tensors of a finished layer."""
        return SafetensorsFile(self.files(index)[0])

    def records(self) -> list[Path]:
        """List the JSON files of the layers that are there, unchecked."""
        return sorted(self.folder.glob("*.json"))

    def remove(self) -> None:
        """Remove the records of all layers, so that they are pruned again."""
        for record in self.records():
            with disk_errors(record):
                record.unlink()

    def remove_weights(self) -> None:
        """Remove the tensors of all layers, which are as large as the model; their records stay."""
        for path in files_named(self.folder, LAYER_FILE.pattern):
            if path.suffix != ".json":
                path.unlink()

"""Open a packed folder and read its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import A_FOLDER, FistaPrunerError, path_text
from ..models.checkpoint import PACKED_KEYS, PACKED_RECORD, Checkpoint, WeightFile, inside, read_json_in
from ..models.low_rank import LowRankAdapter
from ..models.record import FILES, FOLDER
from ..models.safetensors import TensorEntry
from ..runtime.files import sha256_file
from ..runtime.show import shell_line
from .format import OperatorSpec, PackedOperator, damaged, decode, operator_fault, read_specs, require_version


def is_packed(folder: str | Path) -> bool:
    """Check whether a folder is a packed checkpoint."""
    return (Path(path_text("folder", folder, A_FOLDER)) / PACKED_RECORD).is_file()


def refuse_packed(folder: Path) -> None:
    """Refuse a packed folder where a checkpoint is needed."""
    if is_packed(folder):
        raise FistaPrunerError(f"{folder} is packed: unpack it first with '{shell_line('unpack', folder, 'DIR')}'")


class PackedCheckpoint:
    """An opened and checked packed folder: descriptions in memory, values on disk.

    Args:
        folder: a folder that :func:`~.pack.pack` wrote.
        verify: compare every file with its checksum before anything is read.

    Attributes:
        checkpoint: the folder as a checkpoint of its stored tensors.
        specs: every packed operator's description, by the name of its dense tensor.
        record: the record of the pruning run, from ``packed.json``.
        low_rank: the low-rank part of the model, whose sparse part is packed; None where it has none.
    """

    def __init__(self, folder: str | Path, *, verify: bool = True) -> None:
        self.folder = Path(path_text("folder", folder, A_FOLDER))
        if not (self.folder / PACKED_RECORD).is_file():
            raise FistaPrunerError(
                f"{self.folder} is not a packed checkpoint, or not all of one: it has no {PACKED_RECORD}. 'fistapruner "
                "pack FOLDER OUT' makes one of a pruned model, 'hf download NAME --local-dir DIR' a whole folder of "
                "a packed one on the hub, of which transformers leaves that file out"
            )
        about = read_json_in(self.folder, PACKED_RECORD)
        if about.get("format") != "fistapruner-packed":
            raise damaged(self.folder / PACKED_RECORD, "it does not describe a packed checkpoint")
        require_version(about.get("version"), str(self.folder))
        self.record: dict[str, Any] = about["record"] if isinstance(about.get("record"), dict) else {}
        self.checkpoint = Checkpoint.open(self.folder)
        self.low_rank = LowRankAdapter.recorded(self.record, self.folder / FOLDER)
        self._check_files(about.get("files"), verify)
        self.specs: dict[str, OperatorSpec] = {}
        self._holders: dict[str, WeightFile] = {}
        for file in self.checkpoint.files.values():
            for name, spec in read_specs(file.metadata, file.entries, str(file.path)).items():
                if name in self.specs or name in self.checkpoint:
                    raise damaged(self.folder, f"operator {name[:200]!r} is there twice")
                self.specs[name], self._holders[name] = spec, file
        self._parts = {entry.name for name, spec in self.specs.items() for entry in spec.entries(name, 0)}

    def _check_files(self, files: Any, verify: bool) -> None:
        there = {name: inside(self.folder, name) for name in self.checkpoint.files}
        if self.low_rank is not None:
            there |= {name: inside(self.low_rank.folder, Path(name).name) for name in FILES}
        if not isinstance(files, dict) or set(files) != set(there):
            raise damaged(self.folder / PACKED_RECORD, "it lists other files than the checkpoint has")
        for name, claim in files.items():
            path, size = there[name], there[name].stat().st_size if there[name].is_file() else "no"
            if not isinstance(claim, dict) or claim.get("bytes") != size:
                raise damaged(path, f"it has {size} bytes, {PACKED_RECORD} says otherwise")
            if verify and claim.get("sha256") != sha256_file(path):
                raise damaged(path, f"its checksum is not what {PACKED_RECORD} says")

    def operator(self, name: str) -> PackedOperator:
        """Read one packed operator."""
        file = self._holders[name]
        return decode(name, self.specs[name], file.read, operator_fault(str(file.path), name))

    def tensor(self, name: str) -> Tensor:
        """Read one dense tensor, unpacking it if it is a packed operator."""
        return self.operator(name).to_dense() if name in self.specs else self.checkpoint.read(name)

    def experts(self, matrices: Sequence[Sequence[str]]) -> Tensor:
        """Join the matrices of experts to one tensor (experts, m, n)."""
        return torch.stack([torch.cat([self.tensor(name) for name in own]) for own in zip(*matrices, strict=True)])

    def names(self) -> list[str]:
        """List the names of the dense model's tensors; the packed ones last."""
        return [*(name for name in self.checkpoint.names() if name not in self._parts), *self.specs]

    def contents(self) -> dict[str, list[TensorEntry]]:
        """List the tensors of the dense model by file, in the order of the checkpoint that was packed."""
        out: dict[str, list[TensorEntry]] = {}
        for shard, file in self.checkpoint.files.items():
            values = {f"{name}.values": name for name, holder in self._holders.items() if holder is file}
            out[shard] = []
            for entry in file.entries.values():
                if (name := values.get(entry.name)) is not None:
                    out[shard].append(TensorEntry.of(name, self.specs[name].dtype, self.specs[name].shape))
                elif entry.name not in self._parts:
                    out[shard].append(entry)
        return out

    def config(self) -> dict[str, Any]:
        """Return ``config.json`` of the dense model."""
        return {key: value for key, value in self.checkpoint.config.items() if key not in PACKED_KEYS}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the dense model's tensors."""
        return {entry.name: entry.shape for entries in self.contents().values() for entry in entries}

"""Write a checkpoint like its source, with some tensors replaced, one tensor in memory at a time.

Replaced tensors may have new shapes, and ``config.json`` may be changed with them. The folder is built as
``OUT.partial`` and renamed when everything is in it. Beside every finished shard lies a record of its checksum: when a
run is killed and comes back, shards whose bytes still match their record are kept, the others are written again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import FistaPrunerError
from ...runtime.files import (
    PARTIAL,
    copy_atomic,
    disk_errors,
    require_space,
    sha256_file,
    write_json_atomic,
    write_text_atomic,
)
from .checkpoint import Checkpoint, WeightFile
from .folder import checkpoint_folder, copy_companions, write_index
from .folder_files import INDEX, read_json_in
from .safetensors import SafetensorsWriter, TensorEntry
from .widths import read_widths

SHARD_RECORD = ".written.json"
"""Suffix of the record beside a finished shard."""


def write_checkpoint(
    source: Checkpoint,
    out: Path,
    replacement: Callable[[str], Tensor | None],
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    dropped: Collection[str] = (),
    config_changes: Mapping[str, Any] | None = None,
    identity: str = "",
    documents: Mapping[str, str] | None = None,
    resume: bool = True,
) -> dict[str, str]:
    """Write ``source`` to the folder ``out`` with some tensors replaced.

    File names, tensor names, order, dtypes and metadata are the source's; legacy ``.bin`` files become safetensors.
    ``config.json`` and the companions (tokenizer, generation settings, chat templates, licence) are copied.

    Args:
        source: the checkpoint to copy.
        out: folder to make; it must not exist.
        replacement: called once for each tensor that is written, or for each matrix of a tensor that the source takes
            apart (:attr:`.Checkpoint.stacks`); returns the tensor to store, in any floating dtype, or None to copy the
            source's unchanged.
        shapes: by tensor name, the shape that a tensor has in ``out`` where it is not the source's. ``replacement``
            must return these tensors. Whether the new config expresses the new shapes is the caller's to know: a
            folder whose shapes the config cannot express is written, but ``transformers`` refuses to load it.
        dropped: names of tensors that are left out; files without others are left out, too.
        config_changes: changes of ``config.json`` as a JSON merge patch (RFC 7396): nested objects are merged, None
            removes a key.
        identity: what decides the replaced tensors (a recipe's fingerprint). Shards of a killed attempt are kept only
            if they were written under the same identity, in the same shapes, from the same source.
        documents: more text files by name, such as a model card; they replace the source's.
        resume: keep the finished shards of a killed attempt, and of this one when it fails. Otherwise nothing is left.

    Returns:
        SHA-256 of every weight file, by name.

    Raises:
        FistaPrunerError: ``out`` exists, the disk is full, ``shapes`` does not fit the source, a replacement is
            missing, has another shape or leaves the range of the stored dtype, or the source is damaged.
    """
    shards = _shards(source, shapes or {}, dropped, identity)

    def joined(name: str) -> Tensor | None:
        """Return what replaces a stored tensor: of one that is taken apart, its matrices joined."""
        if name not in source.stacks:
            return replacement(name)
        count = (shapes or {}).get(name, source.files[source.file_of(name)].entries[name].shape)[0]
        parts = [(part, replacement(part)) for part in source.parts(name)[:count]]
        if all(tensor is None for _, tensor in parts) and count == len(source.parts(name)):
            return None
        return source.stacks[name].joined([source.read(part) if tensor is None else tensor for part, tensor in parts])

    with checkpoint_folder(out, resume=resume) as partial:
        kept = {shard.name: shard.kept(partial) for shard in shards}
        finished = [name for name, digest in kept.items() if digest is not None]
        _keep_only(partial, {*finished, *(name + SHARD_RECORD for name in finished)})
        require_space(
            partial, sum(entry.nbytes for shard in shards if kept[shard.name] is None for entry in shard.entries)
        )
        written = {shard.name: kept[shard.name] or shard.write(partial, joined) for shard in shards}
        files = set(written) | copy_companions(source, partial) | {"config.json"}
        _write_config(source, partial, config_changes or {})
        for name, text in (documents or {}).items():
            write_text_atomic(partial / name, text)
            files.add(name)
        if source.index is not None:
            write_index(partial, {shard.name: shard.entries for shard in shards}, _index_metadata(source, shards))
            files.add(INDEX)
        _keep_only(partial, files)  # records of the shards do not belong into a finished checkpoint
    return written


def _keep_only(partial: Path, files: set[str]) -> None:
    """Remove the files of an unfinished folder that are not named, but not its mark."""
    with disk_errors(partial):
        for path in partial.iterdir():
            if path.is_file() and path.name not in files | {PARTIAL}:
                path.unlink()


@dataclass(frozen=True)
class _Shard:
    """One weight file to write.

    Args:
        name: its name in the new folder.
        source: the source's file.
        entries: its tensors, in their new shapes.
        identity: what decides the replaced tensors.
    """

    name: str
    source: WeightFile
    entries: tuple[TensorEntry, ...]
    identity: str

    def write(self, folder: Path, replacement: Callable[[str], Tensor | None]) -> str:
        """Write the file and the record of its checksum; returns its SHA-256."""
        with SafetensorsWriter(folder / self.name, self.entries, self.source.metadata or {"format": "pt"}) as writer:
            for entry in self.entries:
                tensor = replacement(entry.name)
                writer.write(entry.name, self._unchanged(entry) if tensor is None else _as_stored(tensor, entry))
        digest = sha256_file(folder / self.name)
        write_json_atomic(folder / (self.name + SHARD_RECORD), self._record(digest))
        return digest

    def kept(self, folder: Path) -> str | None:
        """Return the SHA-256 of the file if a killed attempt finished it, None if it must be written."""
        try:
            record = json.loads((folder / (self.name + SHARD_RECORD)).read_bytes())
            digest = sha256_file(folder / self.name)
        except (OSError, ValueError, FistaPrunerError):
            return None
        return digest if record == self._record(digest) else None

    def _record(self, digest: str) -> dict[str, Any]:
        """Describe what the file is made from: a file with another record is written again."""
        status = self.source.path.stat()
        changed = {entry.name: list(entry.shape) for entry in self.entries if entry != self.source.entries[entry.name]}
        stamp = f"{status.st_size}@{status.st_mtime_ns}"
        return {"identity": self.identity, "source": stamp, "shapes": changed, "sha256": digest}

    def _unchanged(self, entry: TensorEntry) -> Tensor:
        stored = self.source.entries[entry.name].shape
        if stored != entry.shape:
            wanted = f"a tensor of the new shape {list(entry.shape)} is needed, the checkpoint's is {list(stored)}"
            raise FistaPrunerError(f"{entry.name}: {wanted}")
        return self.source.read(entry.name)


def _shards(
    source: Checkpoint, shapes: Mapping[str, tuple[int, ...]], dropped: Collection[str], identity: str
) -> list[_Shard]:
    for name, shape in shapes.items():
        stored = source.entry(name).shape
        if len(shape) != len(stored) or not all(type(size) is int and size > 0 for size in shape):
            raise FistaPrunerError(f"{name}: the new shape {list(shape)} does not fit a tensor of shape {list(stored)}")
    shards = [
        _Shard(
            safetensors_name(name),
            file,
            tuple(
                TensorEntry.of(key, entry.dtype, shapes.get(key, entry.shape))
                for key, entry in file.entries.items()
                if key not in dropped
            ),
            identity,
        )
        for name, file in source.files.items()
    ]
    return [shard for shard in shards if shard.entries]


def _index_metadata(source: Checkpoint, shards: list[_Shard]) -> dict[str, Any]:
    """Copy the metadata of the source's index; the number of parameters follows the new shapes."""
    assert source.index is not None
    metadata = read_json_in(source.folder, source.index).get("metadata")
    if not isinstance(metadata, dict):
        return {}
    if type(metadata.get("total_parameters")) is int:
        stored = sum(math.prod(entry.shape) for file in source.files.values() for entry in file.entries.values())
        written = sum(math.prod(entry.shape) for shard in shards for entry in shard.entries)
        metadata["total_parameters"] += written - stored
    return metadata


def _as_stored(tensor: Tensor, entry: TensorEntry) -> Tensor:
    if tuple(tensor.shape) != entry.shape:
        raise FistaPrunerError(f"{entry.name}: the new tensor is {list(tensor.shape)}, {list(entry.shape)} is expected")
    stored = tensor.to(entry.dtype)
    if not stored.dtype.is_floating_point:
        return stored
    if not bool(torch.isfinite(stored).all()):
        raise FistaPrunerError(f"{entry.name}: the new tensor has values that {entry.dtype} cannot hold")
    return stored + 0.0  # so that -0.0, which a mask makes of a negative weight, is stored as other zeros are


def safetensors_name(shard: str) -> str:
    """Turn ``pytorch_model-00001-of-00002.bin`` into ``model-00001-of-00002.safetensors``."""
    if not shard.endswith(".bin"):
        return shard
    return shard.removesuffix(".bin").removeprefix("pytorch_") + ".safetensors"


def _write_config(source: Checkpoint, folder: Path, changes: Mapping[str, Any]) -> None:
    """Copy ``config.json`` or write it changed; plain weights need no ``quantization_config``."""
    config = dict(source.config)
    plain = all(
        entry.dtype.is_floating_point and entry.dtype.itemsize > 1 for entry in map(source.entry, source.names())
    )
    if plain and not read_widths(config, source.folder):
        config.pop("quantization_config", None)
    config = merge_patch(config, changes)
    if config == source.config:
        copy_atomic(source.folder / "config.json", folder / "config.json")
    else:
        write_json_atomic(folder / "config.json", config)


def merge_patch(value: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Apply a JSON merge patch (RFC 7396): nested objects are merged, None removes a key."""
    merged = dict(value)
    for key, change in changes.items():
        if change is None:
            merged.pop(key, None)
        elif isinstance(change, Mapping):
            held = merged.get(key)
            merged[key] = merge_patch(held if isinstance(held, Mapping) else {}, change)
        else:
            merged[key] = change
    return merged

"""Write a checkpoint like its source, with some tensors replaced, one tensor in memory at a time.

Replaced tensors may have new shapes, and ``config.json`` may be changed with them. The folder is built as
``OUT.partial`` and renamed when everything is in it; what a killed attempt has left is removed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import FistaPrunerError
from ...runtime.files import copy_atomic, sha256_file, write_json_atomic, write_text_atomic
from .checkpoint import Checkpoint
from .folder import checkpoint_folder, copy_companions, write_index
from .folder_files import read_json_in
from .safetensors import SafetensorsWriter, TensorEntry
from .widths import read_widths


def write_checkpoint(
    source: Checkpoint,
    out: Path,
    replacement: Callable[[str], Tensor | None],
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    dropped: Collection[str] = (),
    config_changes: Mapping[str, Any] | None = None,
    documents: Mapping[str, str] | None = None,
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
            must return these tensors. Whether the new config expresses the new shapes is the caller's to know.
        dropped: names of tensors that are left out; files without others are left out, too.
        config_changes: changes of ``config.json`` as a JSON merge patch (RFC 7396): nested objects are merged, None
            removes a key.
        documents: more text files by name, such as a model card; they replace the source's.

    Returns:
        SHA-256 of every weight file, by name.

    Raises:
        FistaPrunerError: ``out`` exists, the disk is full, a replacement is missing, has another shape or leaves the
            range of the stored dtype, or the source is damaged.
    """
    new = dict(shapes or {})
    shards = {
        safetensors_name(name): [
            TensorEntry.of(key, entry.dtype, new.get(key, entry.shape))
            for key, entry in file.entries.items()
            if key not in dropped
        ]
        for name, file in source.files.items()
    }
    shards = {name: entries for name, entries in shards.items() if entries}
    metadata = {safetensors_name(name): file.metadata for name, file in source.files.items()}
    with checkpoint_folder(out, sum(entry.nbytes for entries in shards.values() for entry in entries)) as partial:
        written = {}
        for name, entries in shards.items():
            with SafetensorsWriter(partial / name, entries, metadata[name] or {"format": "pt"}) as writer:
                for entry in entries:
                    writer.write(entry.name, _tensor(source, entry, replacement))
            written[name] = sha256_file(partial / name)
        copy_companions(source, partial)
        _write_config(source, partial, config_changes or {})
        for name, text in (documents or {}).items():
            write_text_atomic(partial / name, text)
        if source.index is not None:
            write_index(partial, shards, _index_metadata(source, shards))
    return written


def _tensor(source: Checkpoint, entry: TensorEntry, replacement: Callable[[str], Tensor | None]) -> Tensor:
    """Return a tensor to store: the replaced one, the matrices of all experts joined, or the source's own."""
    stored = source.files[source.file_of(entry.name)].entries[entry.name].shape
    if entry.name in source.stacks:
        parts = {part: replacement(part) for part in source.parts(entry.name)[: entry.shape[0]]}
        tensor = None
        if entry.shape != stored or any(part is not None for part in parts.values()):
            own = [source.read(name) if part is None else part for name, part in parts.items()]
            tensor = source.stacks[entry.name].joined(own)
    else:
        tensor = replacement(entry.name)
    if tensor is not None:
        return _as_stored(tensor, entry)
    if stored != entry.shape:
        wanted = f"a tensor of the new shape {list(entry.shape)} is needed, the checkpoint's is {list(stored)}"
        raise FistaPrunerError(f"{entry.name}: {wanted}")
    return source.files[source.file_of(entry.name)].read(entry.name)


def _index_metadata(source: Checkpoint, shards: Mapping[str, list[TensorEntry]]) -> dict[str, Any]:
    """Copy the metadata of the source's index; the number of parameters follows the new shapes."""
    metadata = read_json_in(source.folder, str(source.index)).get("metadata")
    if not isinstance(metadata, dict):
        return {}
    if type(metadata.get("total_parameters")) is int:
        stored = sum(math.prod(entry.shape) for entry in source.stored)
        written = sum(math.prod(entry.shape) for entries in shards.values() for entry in entries)
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

"""Write checkpoint folders, one tensor in memory at a time; a folder appears whole or not at all.

It is built under another name and renamed when everything is in it; what a killed attempt has left is removed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..runtime.files import (
    copy_atomic,
    disk_errors,
    remove_folder,
    require_space,
    sha256_file,
    sync_folder,
    unfinished,
    write_json_atomic,
    write_text_atomic,
)
from .checkpoint import INDEX, Checkpoint, WeightFile
from .safetensors import TensorEntry, safetensors_writer


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
    """Write ``source`` and its companions to the folder ``out`` with some tensors replaced.

    File names, tensor names, order, dtypes and metadata are the source's; legacy ``.bin`` files become safetensors.

    Args:
        source: the checkpoint to copy.
        out: folder to make; it must not exist.
        replacement: called once for each tensor that is written, or for each matrix of a tensor that the source takes
            apart (:attr:`.Checkpoint.stacks`); returns the tensor to store, in any floating dtype, or None to copy the
            source's unchanged.
        shapes: by tensor name, new shapes of tensors, which ``replacement`` must return.
        dropped: names of tensors that are left out; files without others are left out, too.
        config_changes: changes of ``config.json`` as a JSON merge patch.
        documents: more text files by name, such as a model card; they replace the source's.

    Returns:
        SHA-256 of every weight file, by name.
    """
    shards: dict[str, list[TensorEntry]] = {}
    for stored, file in source.files.items():
        kept = [entry for name, entry in file.entries.items() if name not in dropped]
        new = [TensorEntry.of(each.name, each.dtype, (shapes or {}).get(each.name, each.shape)) for each in kept]
        shards |= {stored: new} if new else {}
    written = {}
    with checkpoint_folder(out, sum(entry.nbytes for entries in shards.values() for entry in entries)) as partial:
        for stored, entries in shards.items():
            name, metadata = safetensors_name(stored), source.files[stored].metadata
            with safetensors_writer(partial / name, entries, metadata or {"format": "pt"}) as write:
                for entry in entries:
                    write(entry.name, _tensor(source, source.files[stored], entry, replacement))
            written[name] = sha256_file(partial / name)
        copy_companions(source, partial)
        config = merge_patch(source.config, config_changes or {})
        if config == source.config:
            copy_atomic(source.folder / "config.json", partial / "config.json")
        else:
            write_json_atomic(partial / "config.json", config)
        for name, text in (documents or {}).items():
            write_text_atomic(partial / name, text)
        if source.index is not None:
            write_index(partial, {safetensors_name(stored): entries for stored, entries in shards.items()})
    return written


def _tensor(
    source: Checkpoint, file: WeightFile, entry: TensorEntry, replacement: Callable[[str], Tensor | None]
) -> Tensor:
    """Return a tensor to store: the replaced one, the matrices of all experts joined, or the source's own."""
    changed, stack = entry.shape != file.entries[entry.name].shape, source.stacks.get(entry.name)
    if stack is None:
        tensor = replacement(entry.name)
    else:
        parts = {part: replacement(part) for part in source.parts(entry.name)[: entry.shape[0]]}
        tensor = None
        if changed or any(part is not None for part in parts.values()):
            tensor = stack.joined([source.read(name) if part is None else part for name, part in parts.items()])
    if tensor is None and not changed:
        return file.read(entry.name)
    if tensor is None or tuple(tensor.shape) != entry.shape:
        found = "missing" if tensor is None else list(tensor.shape)
        raise FistaPrunerError(f"{entry.name}: the new tensor is {found}, {list(entry.shape)} is expected")
    stored = tensor.to(entry.dtype)
    if not stored.dtype.is_floating_point:
        return stored
    if not bool(torch.isfinite(stored).all()):
        raise FistaPrunerError(f"{entry.name}: the new tensor has values that {entry.dtype} cannot hold")
    return stored + 0.0  # so that -0.0, which a mask makes of a negative weight, is stored as other zeros are


def safetensors_name(shard: str) -> str:
    """Turn ``pytorch_model-00001-of-00002.bin`` into ``model-00001-of-00002.safetensors``."""
    return shard.removesuffix(".bin").removeprefix("pytorch_") + ".safetensors" if shard.endswith(".bin") else shard


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


def require_new(out: Path, source: Path | None = None) -> None:
    """Refuse an output folder that exists already, or lies inside its source."""
    with disk_errors(out):
        fault = "exists already: remove it, or write" if out.exists() or out.is_symlink() else ""
        if source is not None and Path(os.path.realpath(out)).is_relative_to(os.path.realpath(source)):
            fault = fault or f"is inside {source}, which it is made from: write"
    if fault:
        raise FistaPrunerError(f"{out} {fault} to another folder")


@contextmanager
def checkpoint_folder(out: Path, nbytes: int = 0) -> Iterator[Path]:
    """Make a folder that appears as ``out`` only when the block ends without an error.

    The block is given the :func:`~fistapruner.runtime.files.unfinished` folder, which is then fsynced and renamed; what
    a killed attempt has left is removed first. Then the disk must have ``nbytes``.
    """
    require_new(out)
    remove_folder(out)
    require_space(out, nbytes)
    partial = unfinished(out)
    with disk_errors(partial):
        partial.mkdir(parents=True)
    try:
        yield partial
        with disk_errors(out):
            sync_folder(partial)
            os.rename(partial, out)
            sync_folder(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_index(folder: Path, files: Mapping[str, Iterable[TensorEntry]]) -> None:
    """Write ``model.safetensors.index.json``: the file of every tensor, and the bytes of all."""
    places = {entry.name: name for name, entries in files.items() for entry in entries}
    total = sum(entry.nbytes for entries in files.values() for entry in entries)
    write_json_atomic(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def copy_companions(source: Checkpoint, folder: Path) -> None:
    """Copy tokenizer, generation settings, templates and licence into ``folder``."""
    for name in source.companions:
        with disk_errors(folder / name):
            (folder / name).parent.mkdir(exist_ok=True)
        copy_atomic(source.folder / name, folder / name)

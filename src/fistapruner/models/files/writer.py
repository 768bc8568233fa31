"""Write a checkpoint like its source, with some tensors replaced, one tensor in memory at a time.

The folder is built as ``OUT.partial`` and renamed when everything is in it, so a folder under the final name is whole.
Beside every finished shard lies a record of its checksum; when a run is killed and comes back, shards whose bytes still
match their record are kept and the others are written again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...errors import FistaPrunerError
from ...runtime.files import (
    PARTIAL,
    copy_atomic,
    disk_errors,
    require_space,
    sha256_file,
    sync_folder,
    write_json_atomic,
    write_text_atomic,
)
from .checkpoint import INDEX, Checkpoint, WeightFile, read_json
from .safetensors import SafetensorsWriter, TensorEntry

SHARD_RECORD = ".written.json"


def write_checkpoint(
    source: Checkpoint,
    out: Path,
    replacement: Callable[[str], Tensor | None],
    *,
    identity: str = "",
    documents: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Write ``source`` to the folder ``out`` with some tensors replaced.

    File names, tensor names, order, dtypes and metadata are the source's; legacy ``.bin`` files become safetensors.
    ``config.json`` and the companions (tokenizer, generation settings, chat templates, licence) are copied.

    Args:
        source: the checkpoint to copy.
        out: folder to make; it must not exist.
        replacement: called once for each tensor that is written; gives the tensor to store, in any floating dtype, or
            None to pass the source's tensor through untouched.
        identity: what decides the replaced tensors (a recipe's fingerprint). Shards of a killed attempt are kept only
            if they were written under the same identity from the same source.
        documents: more text files by name, such as a model card; they replace the source's.

    Returns:
        SHA-256 of every weight file, by name.

    Raises:
        FistaPrunerError: ``out`` exists, the disk is full, a replacement has another shape or leaves the range of the
            stored dtype, the source is damaged.
    """
    if out.exists():
        raise FistaPrunerError(f"{out} exists already: remove it, or write to another folder")
    partial = out.with_name(out.name + PARTIAL)
    with disk_errors(partial):
        partial.mkdir(parents=True, exist_ok=True)
    names = {shard: _safetensors_name(shard) for shard in source.files}
    sums = {new: _kept(partial, new, source.files[shard], identity) for shard, new in names.items()}
    require_space(partial, sum(_nbytes(file) for shard, file in source.files.items() if sums[names[shard]] is None))

    written: dict[str, str] = {}
    for shard, new in names.items():
        written[new] = sums[new] or _write_shard(partial, new, source.files[shard], replacement, identity)
    files = set(written) | _write_companions(source, partial)
    for name, text in (documents or {}).items():
        write_text_atomic(partial / name, text)
        files.add(name)
    if source.index is not None:
        metadata = read_json(source.folder, source.index).get("metadata")
        total = {"total_size": source.nbytes}
        places = {name: names[source.file_of(name)] for name in source.names()}
        index = {"metadata": {**metadata, **total} if isinstance(metadata, dict) else total, "weight_map": places}
        write_json_atomic(partial / INDEX, index)
        files.add(INDEX)

    with disk_errors(out):
        # Records of the shards, and whatever a killed attempt left: nothing of it belongs into a finished checkpoint.
        for path in partial.iterdir():
            if path.is_file() and path.name not in files:
                path.unlink()
        sync_folder(partial)
        os.rename(partial, out)
        sync_folder(out.parent)
    return written


def _write_shard(partial: Path, name: str, file: WeightFile, replacement: Callable[[str], Tensor | None], identity: str) -> str:
    path = partial / name
    with SafetensorsWriter(path, file.entries.values(), file.metadata or {"format": "pt"}) as writer:
        for entry in file.entries.values():
            tensor = replacement(entry.name)
            writer.write(entry.name, file.read(entry.name) if tensor is None else _as_stored(tensor, entry))
    digest = sha256_file(path)
    write_json_atomic(partial / (name + SHARD_RECORD), {"identity": identity, "source": _stamp(file), "sha256": digest})
    return digest


def _kept(partial: Path, name: str, file: WeightFile, identity: str) -> str | None:
    """Checksum of a shard that a killed attempt finished, None if there is none to be trusted."""
    record = partial / (name + SHARD_RECORD)
    try:
        claim = json.loads(record.read_bytes())
        expected = {"identity": identity, "source": _stamp(file), "sha256": sha256_file(partial / name)}
    except (OSError, ValueError):
        return None
    return str(expected["sha256"]) if claim == expected else None


def _stamp(file: WeightFile) -> str:
    """What tells one source file from another that has the same name: size and time of its last change."""
    status = file.path.stat()
    return f"{status.st_size}@{status.st_mtime_ns}"


def _as_stored(tensor: Tensor, entry: TensorEntry) -> Tensor:
    if tuple(tensor.shape) != entry.shape:
        raise FistaPrunerError(f"{entry.name}: the new tensor is {list(tensor.shape)}, the checkpoint's is {list(entry.shape)}")
    stored = tensor.to(entry.dtype)
    if stored.dtype.is_floating_point and not bool(torch.isfinite(stored).all()):
        raise FistaPrunerError(f"{entry.name}: the new tensor has values that {entry.dtype} cannot hold")
    return stored


def _nbytes(file: WeightFile) -> int:
    return sum(entry.nbytes for entry in file.entries.values())


def _safetensors_name(shard: str) -> str:
    """``pytorch_model-00001-of-00002.bin`` becomes ``model-00001-of-00002.safetensors``; other names stay."""
    if not shard.endswith(".bin"):
        return shard
    return shard.removesuffix(".bin").removeprefix("pytorch_") + ".safetensors"


def _write_companions(source: Checkpoint, partial: Path) -> set[str]:
    """Copy everything that is not weights; the names of the files at the top of the folder."""
    for name in source.companions:
        with disk_errors(partial / name):
            (partial / name).parent.mkdir(exist_ok=True)
        copy_atomic(source.folder / name, partial / name)
    config = dict(source.config)
    plain = all(entry.dtype.is_floating_point and entry.dtype.itemsize > 1 for entry in map(source.entry, source.names()))
    if plain and config.pop("quantization_config", None) is not None:
        write_json_atomic(partial / "config.json", config)
    else:
        copy_atomic(source.folder / "config.json", partial / "config.json")
    return {name for name in source.companions if "/" not in name} | {"config.json"}

"""Write checkpoint folders that appear whole or not at all, with their index and companions."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ...errors import FistaPrunerError
from ...runtime.files import (
    PARTIAL,
    claim_folder,
    copy_atomic,
    disk_errors,
    publish_folder,
    remove_folder,
    require_space,
    require_utf8,
    write_json_atomic,
)
from .checkpoint import Checkpoint
from .folder_files import INDEX
from .safetensors import TensorEntry


def require_new(out: Path, source: Path | None = None) -> None:
    """Refuse an output folder that exists already, lies inside its source, or whose path is not UTF-8.

    Raises:
        FistaPrunerError: names the folder and what is wrong with it.
    """
    require_utf8(out)
    with disk_errors(out):
        if out.exists() or out.is_symlink():
            raise FistaPrunerError(f"{out} exists already: remove it, or write to another folder")
        if source is not None and Path(os.path.realpath(out)).is_relative_to(os.path.realpath(source)):
            raise FistaPrunerError(f"{out} is inside {source}, which it is made from: write to another folder")


@contextmanager
def checkpoint_folder(out: Path, nbytes: int = 0) -> Iterator[Path]:
    """Make a folder that appears as ``out`` only when the block ends without an error.

    The folder is built as ``OUT.partial``, then fsynced and renamed; what a killed attempt has left is removed first.

    Args:
        out: the folder to make; it must not exist.
        nbytes: bytes that will be written; the disk's free space is checked first, without what a killed attempt left.

    Yields:
        The temporary folder.

    Raises:
        FistaPrunerError: ``out`` exists, the temporary folder holds files of others, or the disk is full or refuses the
            write.
    """
    require_new(out)
    partial = out.with_name(out.name + PARTIAL)
    claim_folder(partial)
    remove_folder(partial, partial / PARTIAL)
    require_space(out, nbytes)
    claim_folder(partial)
    try:
        yield partial
        publish_folder(partial, out)
    except BaseException:
        with suppress(FistaPrunerError):  # the error that ended the block is reported
            remove_folder(partial, partial / PARTIAL)
        raise


def remove_unfinished(out: Path) -> None:
    """Remove what a killed attempt at the folder ``out`` has left (``OUT.partial``).

    Raises:
        FistaPrunerError: it is a link, or holds files of others, or the disk refuses.
    """
    partial = out.with_name(out.name + PARTIAL)
    if partial.is_dir():
        claim_folder(partial)
        remove_folder(partial, partial / PARTIAL)


def write_index(
    folder: Path, files: Mapping[str, Iterable[TensorEntry]], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write ``model.safetensors.index.json``: the file of every tensor, and the bytes of all.

    Args:
        folder: the checkpoint folder.
        files: tensors of every weight file, by file name.
        metadata: more entries of the index's ``metadata``; ``total_size`` is computed here.

    Raises:
        FistaPrunerError: the disk is full or refuses the write.
    """
    places, total = {}, 0
    for name, entries in files.items():
        for entry in entries:
            places[entry.name] = name
            total += entry.nbytes
    write_json_atomic(folder / INDEX, {"metadata": {**(metadata or {}), "total_size": total}, "weight_map": places})


def copy_companions(source: Checkpoint, folder: Path) -> set[str]:
    """Copy tokenizer, generation settings, templates and licence into ``folder``.

    Returns:
        Names of the files that were copied to the top of the folder.

    Raises:
        FistaPrunerError: the disk is full or refuses the write.
    """
    for name in source.companions:
        with disk_errors(folder / name):
            (folder / name).parent.mkdir(exist_ok=True)
        copy_atomic(source.folder / name, folder / name)
    return {name for name in source.companions if "/" not in name}

"""Write files atomically: under a temporary name, fsynced, renamed, the folder fsynced.

Readers never see a part of a file under its final name, even if the writer is killed. The temporary name is fixed
(``NAME.partial``), so a second attempt replaces the file of a killed one. What the disk or the system refuses is a
:class:`FistaPrunerError` with the path.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import FistaPrunerError
from .show import size

PARTIAL = ".partial"

BYSTANDERS = re.compile(r"\.DS_Store|\._.*|\.nfs.*")
"""Names of files that macOS and NFS leave in any folder: nobody's work."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a pointer of git-lfs begins."""


@contextmanager
def disk_errors(path: str | Path, verb: str = "write") -> Iterator[None]:
    """Turn errors of a disk (full, over quota, read-only, forbidden) into one line with the path."""
    try:
        yield
    except OSError as error:
        said = f"cannot {verb} {path}: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            said = f"the disk is full: cannot write {path}; free some space and run the same command again"
        raise FistaPrunerError(said) from error


def refuse_link(path: Path) -> None:
    """Refuse a link where a file or folder is to be written or removed: it may lead to anybody's."""
    if path.is_symlink():
        raise FistaPrunerError(f"{path} is a link where a run keeps a file or folder of its own: move the link away")


def refuse_lfs_pointer(path: Path) -> None:
    """Refuse the few lines that stand for a file of git-lfs where git has cloned without it."""
    with suppress(OSError), open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            what = "is not the file itself but a pointer of git-lfs to it"
            raise FistaPrunerError(f"{path} {what}: install git-lfs, and call 'git lfs pull' in {path.parent}")


def require_space(path: Path, nbytes: int) -> None:
    """Refuse a file or folder that needs more bytes than are free on its disk."""
    free = shutil.disk_usage(existing_folder(path)).free
    if free < nbytes:
        raise FistaPrunerError(
            f"the disk is full: {path} needs {size(nbytes)} and only {size(free)} are free; "
            f"free {size(nbytes - free)} more and run the same command again"
        )


def open_file(path: Path) -> int:
    """Open a file for reading and writing, made if it is missing and no link; return its descriptor."""
    refuse_link(path)
    with disk_errors(path):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def existing_folder(path: Path) -> Path:
    """Return the nearest folder of ``path`` that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def entries(folder: Path, names: str = ".*") -> list[Path]:
    """List what a folder holds, by regular expression of the whole name, but for :data:`BYSTANDERS`."""
    found = (path for path in folder.glob("*") if path.is_dir() or not BYSTANDERS.fullmatch(path.name))
    return sorted(path for path in found if re.fullmatch(names, path.name))


def sync_folder(folder: Path) -> None:
    """Flush a folder to the disk, where it can be flushed, so that renames inside it survive a power loss."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno == errno.EIO:  # other systems and folders cannot be flushed
            raise


def unfinished(folder: Path) -> Path:
    """Return the name under which a folder is written and removed, which no folder of others has."""
    return folder.with_name(f"{folder.name}.fistapruner{PARTIAL}")


def remove_folder(folder: Path) -> None:
    """Remove a folder at once, and what killed attempts to write or remove it have left."""
    partial = unfinished(folder)
    for path in (folder, partial):
        refuse_link(path)
    with disk_errors(folder):
        if partial.exists():
            shutil.rmtree(partial)
        if folder.exists():
            os.rename(folder, partial)
            shutil.rmtree(partial)


def temporary_folder() -> TemporaryDirectory[str]:
    """Make a folder in the system's place for temporary ones; as a context manager it removes it."""
    return TemporaryDirectory(prefix="fistapruner-")


@contextmanager
def scratch_folder(folder: Path | None) -> Iterator[None]:
    """Make an empty folder for the block, and remove it after it; None makes none."""
    try:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
            with disk_errors(folder):
                folder.mkdir(parents=True)
        yield
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[int]:
    """Open a file (a descriptor) that replaces ``path`` only when the block ends without an error."""
    temporary = path.with_name(path.name + PARTIAL)
    with disk_errors(path):
        temporary.unlink(missing_ok=True)  # it may be a link, or another name of somebody's file
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            try:
                yield descriptor
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        sync_folder(path.parent)


def write_all(descriptor: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of ``data`` at ``offset`` of an open file, in as many calls as needed."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view[: 2**30], offset)
        offset += written
        view = view[written:]


def write_text_atomic(path: Path, text: str) -> None:
    """Write UTF-8 text so that ``path`` holds either the old or the new text, never a part."""
    with atomic_file(path) as descriptor:
        write_all(descriptor, text.encode(), 0)


def write_json_atomic(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        with disk_errors(path, "read"):
            value = json.loads(path.read_text("utf-8"))
        if not isinstance(value, dict):
            raise ValueError("an object is expected")
    except (ValueError, RecursionError) as error:
        raise FistaPrunerError(f"{path} is not valid JSON: {str(error)[:120]}") from None
    return value


def write_sealed_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` and a checksum of it as indented JSON, atomically."""
    write_json_atomic(path, {**content, "sha256": json_sha256(content)})


def read_sealed_json(path: Path) -> dict[str, Any]:
    """Read what :func:`write_sealed_json` has written; raises OSError or ValueError where it cannot be."""
    try:
        content = json.loads(path.read_text("utf-8"))
        if isinstance(content, dict) and content.pop("sha256", None) == json_sha256(content):
            return content
    except RecursionError as error:
        raise ValueError(str(error)) from None
    raise ValueError("its checksum is wrong")


def copy_atomic(source: Path, target: Path) -> None:
    """Copy a file's bytes, atomically."""
    with (
        disk_errors(source, "read"),
        open(source, "rb") as file,
        atomic_file(target) as descriptor,
        open(descriptor, "wb", closefd=False) as out,
    ):
        shutil.copyfileobj(file, out, 2**24)


def sampled_sha256(path: Path) -> str:
    """Hash a file's size, its first and last MiB and 256 evenly spaced blocks of 4 KiB with SHA-256.

    Files up to 4 MiB are read whole; of a larger one a change outside the blocks is not detected.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        places = [(0, 2**20), *((size * number // 256, 4096) for number in range(256)), (size - 2**20, 2**20)]
        for place, length in places if size > 4 * 2**20 else [(0, size)]:
            file.seek(place)
            digest.update(file.read(length))
    return digest.hexdigest()


def json_sha256(content: Mapping[str, Any]) -> str:
    """Hash JSON values with SHA-256, independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Hash a file's bytes with SHA-256, in hexadecimal."""
    with disk_errors(path, "read"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""One process at a time on a run directory, or on a range of its decoder layers.

The holder's host, process id and start time stand in ``RUN/lock`` (``RUN/lock.0-9`` for a run of only those layers),
and the holder keeps the file locked (``flock``). On the same host the kernel drops that lock when the holder dies,
whatever kills it, so a file that nobody keeps locked is stale and is taken over. Between hosts the kernel's word is not
to be relied on (network file systems differ), so a file that names another host is believed until somebody removes it.

Parts that begin at once take turns to prepare the run: they lock ``RUN/lock.preparing``. So do processes that train
together and record that the memory of their GPUs has run out. It is a file, opened for writing, because on NFS no other
lock holds between hosts. It stays until a process holds the whole directory: removed sooner, it could be gone under a
process of another host that waits for it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from ..errors import FistaPrunerError
from ..runtime.files import disk_errors, files_named, open_file

NAME = "lock"

PREPARING = f"{NAME}.preparing"

LOCK_FILE = rf"{NAME}(\.\d+-\d+|\.preparing)?"
"""Names of lock files; any other file is somebody else's."""

TRIES, PAUSE = 10, 0.05
"""How often, and after how many seconds each, a lock of another range is tried before it is believed."""

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
"""What ``flock`` says on file systems that have none; there the process id and start time decide."""


@contextmanager
def hold(folder: Path, layers: tuple[int, int] | None = None) -> Iterator[None]:
    """Hold a run directory while the block runs.

    Args:
        folder: the run directory; it must exist.
        layers: (first, last) decoder layer if only those are worked on: other ranges may be held by others meanwhile.

    Raises:
        FistaPrunerError: another living process holds it, or a range that overlaps; names its host and process id.
    """
    path = folder / (NAME if layers is None else f"{NAME}.{layers[0]}-{layers[1]}")
    descriptor = _take(path)
    try:
        for other in files_named(folder, LOCK_FILE):
            if other == path or (layers is not None and other.name == PREPARING):
                continue
            span = _layers_of(other.name)
            if layers is None or span is None or (span[0] <= layers[1] and layers[0] <= span[1]):
                _remove_stale(other)
        yield
    finally:
        _release(path, descriptor)


def _remove_stale(path: Path) -> None:
    """Remove another's lock file; taking it shows that it is stale.

    Another process may do the same at this moment, so a lock is believed only if it is kept for a while.

    Raises:
        FistaPrunerError: a living process holds it.
    """
    for left in reversed(range(TRIES)):
        try:
            if path.exists():
                _release(path, _take(path))
            return
        except FistaPrunerError:
            if not left:
                raise
            time.sleep(PAUSE)


@contextmanager
def preparing(folder: Path, waits: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Let one part or process of a run at a time decide its settings; the others wait for it.

    Args:
        folder: the run directory.
        waits: called before this process waits for another.
    """
    path = folder / PREPARING
    descriptor = open_file(path)
    try:
        with _locking(path):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waits()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def holders(folder: Path) -> list[dict[str, Any]]:
    """Return records (``host``, ``pid``, ``started``) of the processes that work on a run. Takes no lock."""
    found = []
    for path in files_named(folder, LOCK_FILE):
        with suppress(OSError, ValueError, RecursionError):
            record = json.loads(path.read_bytes())
            if isinstance(record, dict) and _may_live(record):
                found.append(record)
    return found


def _take(path: Path) -> int:
    """Lock a file that no living process holds and write this process into it; its descriptor."""
    while True:
        descriptor = open_file(path)
        try:
            try:
                with _locking(path):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _refusal(path, _read(descriptor)) from None
            if not _same_file(path, descriptor):  # its last holder removed it between our open and our lock
                os.close(descriptor)
                continue
            holder = _read(descriptor)
            if _may_live(holder):
                raise _refusal(path, holder)
            with disk_errors(path):
                # Padded, so that a shorter record replaces a longer one in a single write.
                os.pwrite(descriptor, json.dumps(_me()).ljust(512).encode(), 0)
            return descriptor
        except BaseException:
            with suppress(OSError):
                os.close(descriptor)
            raise


def _release(path: Path, descriptor: int) -> None:
    with suppress(OSError):
        if _same_file(path, descriptor):
            path.unlink()
    with suppress(OSError):
        os.close(descriptor)


def _me() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": platform.node(), "pid": pid, "started": psutil.Process().create_time(), "born": _born(pid)}


def _born(pid: int) -> str | None:
    """Name the boot and the clock tick in which a process began.

    None where it is gone, or the system is not Linux. On Linux ``create_time`` moves when the clock is set.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        after_name = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return f"{boot} {int(after_name[19])}"
    except (OSError, ValueError, IndexError):
        return None


def _read(descriptor: int) -> dict[str, Any]:
    """The record in a lock file; empty where a holder died before it wrote one."""
    try:
        record = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _may_live(holder: dict[str, Any]) -> bool:
    """Return whether a record's process may still be at work, given that its file is not locked here."""
    host, pid, started = holder.get("host"), holder.get("pid"), holder.get("started")
    if not isinstance(host, str) or not isinstance(pid, int) or not isinstance(started, (int, float)):
        return False
    if host != platform.node():
        return True
    if pid == os.getpid():
        return False  # this process died half-way through a release, in an earlier call
    if isinstance(holder.get("born"), str) and (born := _born(pid)) is not None:
        return bool(born == holder["born"])
    try:
        return abs(psutil.Process(pid).create_time() - started) < 1.0
    except (psutil.Error, OverflowError, ValueError):
        return False


def _refusal(path: Path, holder: dict[str, Any]) -> FistaPrunerError:
    if not holder:  # it has locked the file and not yet written its record
        return FistaPrunerError(f"{path.parent} is in use by another process that is just starting: wait for it")
    host, pid = holder.get("host", "an unknown host"), holder.get("pid", "unknown")
    if host == platform.node():
        return FistaPrunerError(
            f"{path.parent} is in use by process {pid} on this machine ({host}): wait for it, or end it and try again"
        )
    return FistaPrunerError(
        f"{path.parent} is in use by process {pid} on host {host}: wait for it; if that process is surely gone, remove "
        f"{path} and try again"
    )


def _layers_of(name: str) -> tuple[int, int] | None:
    match = re.fullmatch(rf"{NAME}\.(\d+)-(\d+)", name)
    return (int(match[1]), int(match[2])) if match else None


def _same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


@contextmanager
def _locking(path: Path) -> Iterator[None]:
    """Go on where the file system has no locks; name the file where the lock fails otherwise.

    Raises:
        BlockingIOError: another process holds it.
        FistaPrunerError: any other fault.
    """
    try:
        yield
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise FistaPrunerError(f"cannot lock {path}: {error.strerror or error}") from error

"""One process at a time on a run directory.

The holder keeps the file ``RUN/lock`` locked (``flock``), and writes its host and process id into it for messages. The
kernel drops the lock when the holder dies, whatever kills it, so a file that nobody keeps locked is stale and is taken
over, whatever name stands in it. File systems without locks cannot refuse a second process.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import FistaPrunerError
from ..runtime.files import disk_errors, open_file

NAME = "lock"

TRIES, PAUSE = 10, 0.05
"""How often, and after how many seconds each, a lock is tried: :func:`holder` takes it for a moment."""

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
"""What ``flock`` says on file systems that have none."""


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a run directory while the block runs.

    Raises:
        FistaPrunerError: another process holds it; names its host and process id.
    """
    path = folder / NAME
    descriptor = _take(path)
    try:
        with disk_errors(path):
            # Padded, so that a shorter record replaces a longer one in a single write.
            os.pwrite(descriptor, json.dumps({"host": platform.node(), "pid": os.getpid()}).ljust(512).encode(), 0)
        yield
    finally:
        with suppress(OSError):
            if _same_file(path, descriptor):
                path.unlink()
        with suppress(OSError):
            os.close(descriptor)


def holder(folder: Path) -> dict[str, Any] | None:
    """Return the record (``host``, ``pid``) of the process that works on a run; None where none does."""
    try:
        with open(folder / NAME, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return {"host": "an unknown host", "pid": "unknown", **_read(folder / NAME)}
    except OSError:  # there is none, or the file system has no locks
        pass
    return None


def _take(path: Path) -> int:
    """Lock a file that no other process keeps locked; its descriptor."""
    for left in reversed(range(TRIES)):
        descriptor = open_file(path)
        try:
            _lock(path, descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same_file(path, descriptor):  # else its last holder removed it between our open and our lock
                return descriptor
        except BlockingIOError:
            if not left:
                os.close(descriptor)
                raise _refusal(path) from None
            time.sleep(PAUSE)
        except FistaPrunerError:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise _refusal(path)


def _lock(path: Path, descriptor: int, operation: int) -> None:
    """Lock an open file, and go on where the file system has no locks.

    Raises:
        BlockingIOError: another process holds it.
        FistaPrunerError: any other fault.
    """
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise FistaPrunerError(f"cannot lock {path}: {error.strerror or error}") from error


def _refusal(path: Path) -> FistaPrunerError:
    found = _read(path)
    if not found:  # it has locked the file and not yet written its record
        return FistaPrunerError(f"{path.parent} is in use by another process that is just starting: wait for it")
    where = f"process {found.get('pid')} on the host {found.get('host')}"
    return FistaPrunerError(f"{path.parent} is in use by {where}: wait for it, or end it and try again")


def _read(path: Path) -> dict[str, Any]:
    """Read the record in a lock file; empty where a holder died before it wrote one."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False

"""One process at a time on a run directory.

The holder keeps the file ``RUN/lock`` locked (``flock``), and writes its host and process id into it for messages. The
kernel drops the lock when the holder dies, whatever kills it, so a file that nobody keeps locked is stale and is taken
over. File systems without locks cannot refuse a second process. The package ``filelock`` does not serve here: some of
its releases empty the file before they have the lock, and it cannot look at a lock without write permission.
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
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"host": platform.node(), "pid": os.getpid()}).encode(), 0)
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _take(path: Path) -> int:
    """Lock the file and return its descriptor."""
    for _ in range(TRIES):
        descriptor = open_file(path)
        with disk_errors(path), suppress(FileNotFoundError):  # its last holder removes it
            if _lock(descriptor, fcntl.LOCK_EX) and os.path.samestat(path.stat(), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)
        time.sleep(PAUSE)
    found = _read(path)
    by = f"process {found['pid']} on the host {found['host']}" if found else "another process that is just starting"
    raise FistaPrunerError(f"{path.parent} is in use by {by}: wait for it, or end it and try again")


def holder(folder: Path) -> dict[str, Any] | None:
    """Return the record (``host``, ``pid``) of the process that works on a run; None where none does."""
    try:
        with open(folder / NAME, "rb") as file:
            if _lock(file.fileno(), fcntl.LOCK_SH):
                return None
    except OSError:
        return None
    return _read(folder / NAME) or {"host": "an unknown host", "pid": "unknown"}


def _lock(descriptor: int, kind: int) -> bool:
    """Lock an open file without waiting; False where another process has it locked."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    return True


def _read(path: Path) -> dict[str, Any]:
    """Read the record in a lock file; empty where its holder has not written it yet."""
    try:
        record = json.loads(path.read_bytes())
        return {name: record[name] for name in ("host", "pid")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}

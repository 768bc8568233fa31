"""What a run says and notes on its way, and who works on it: ``log.txt``, ``times.json``, ``lock``.

No result depends on these files: what is torn or damaged in them is lost and no more.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import platform
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import NonNegativeFloat, TypeAdapter

from ..errors import FistaPrunerError
from ..runtime.files import disk_errors, open_file, refuse_link, write_all, write_json_atomic

if TYPE_CHECKING:
    from .records import LayerEntry

log = logging.getLogger("fistapruner")

TIMES = "times.json"
SECONDS = TypeAdapter(list[NonNegativeFloat])

LOCK = "lock"

TRIES, PAUSE = 10, 0.05
"""How often, and after how many seconds each, a lock is tried: :func:`holder` takes it for a moment."""

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
"""What ``flock`` says on file systems that have none, where no second process can be refused."""


# --- who listens


class Listener:
    """Receive the progress of a run. A subclass overrides the methods that it needs; these do nothing."""

    def say(self, message: str) -> None:
        """Receive a sentence for the user."""

    def tick(self, what: str, done: int, total: int) -> None:
        """Receive progress of a pass through the whole model, such as an evaluation: ``done`` of ``total``."""

    def begin(self, layers: int, done: int) -> None:
        """Receive the beginning of pruning: ``layers`` to prune, ``done`` of them already journaled."""

    def operators(self, index: int, names: str, error: float | None) -> None:
        """Receive a group of operators: begun (``error`` is None), or done with its worst relative error."""

    def layer(self, entry: LayerEntry) -> None:
        """Receive a finished decoder layer."""

    def end(self) -> None:
        """Receive the end of pruning."""


class Logged(Listener):
    """Write progress to the log, and pass it on; call ``after_layer`` when a decoder layer is done."""

    def __init__(self, listener: Listener, after_layer: Callable[[], None] = lambda: None) -> None:
        self._listener = listener
        self._after_layer = after_layer
        self.tick, self.end = listener.tick, listener.end  # type: ignore[method-assign]

    def say(self, message: str) -> None:
        log.info(message)
        self._listener.say(message)

    def begin(self, layers: int, done: int) -> None:
        log.info("%d decoder layers, %d already done", layers, done)
        self._listener.begin(layers, done)

    def operators(self, index: int, names: str, error: float | None) -> None:
        if error is not None:
            log.info("layer %d %s: worst relative error %.5f", index, names, error)
        self._listener.operators(index, names, error)

    def layer(self, entry: LayerEntry) -> None:
        log.info("layer %d done in %s", entry.index, {phase: round(value, 3) for phase, value in entry.seconds.items()})
        for warning in entry.warnings:
            log.warning(warning)
        self._after_layer()
        self._listener.layer(entry)


class _LogFile(logging.FileHandler):
    """A log whose lines are lost where the disk takes none: what stops the run tells why."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing: a traceback for every line would hide it."""


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Write the log to a file inside the block."""
    refuse_link(path)
    with disk_errors(path):
        handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        fault = not isinstance(error, (FistaPrunerError, KeyboardInterrupt))
        log.error("stopped: %s", str(error) or type(error).__name__, exc_info=fault)
        raise
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
        with suppress(OSError):  # a full disk: what ended the block is reported
            handler.close()


# --- how long it takes


class Times:
    """Sum the seconds of this process and of those before it.

    The file is written after every decoder layer, so a process that is killed loses the time of its unfinished layers.
    """

    def __init__(self, folder: Path) -> None:
        self._file, self._before, self._begin = folder / TIMES, 0.0, time.perf_counter()
        with suppress(OSError, ValueError):
            self._before = sum(SECONDS.validate_json(self._file.read_bytes()))

    def note(self) -> None:
        """Record the seconds of the run so far."""
        write_json_atomic(self._file, [self.total()])

    def forget(self) -> None:
        """Forget the seconds of processes before this one: the run is made again."""
        self._before = 0.0
        self._file.unlink(missing_ok=True)

    def total(self) -> float:
        """Return the seconds of all processes of the run, of this one up to now."""
        return self._before + time.perf_counter() - self._begin


@contextmanager
def spent(folder: Path) -> Iterator[Times]:
    """Measure the time of the block, and record it if the block fails. Else the report has the total."""
    times = Times(folder)
    try:
        yield times
    except BaseException:
        with suppress(FistaPrunerError):  # a full disk; the error that ended the block is reported
            times.note()
        raise


# --- the steps of a run that trains


class StepJournal:
    """The journal of training steps, ``RUN/steps.jsonl``, open for appending. Use it as a context manager.

    A line is a JSON object with the key ``step`` (from 1; step 0 has the check before training), a tab and the CRC-32
    of the object's text. A torn or damaged line ends the journal. Lines after the step ``last`` are dropped.
    """

    def __init__(self, path: Path, last: int) -> None:
        self.path = path
        self._end = max((end for line, end in _lines(path) if line["step"] <= last), default=0)
        self._descriptor = open_file(path)
        with disk_errors(path):
            if os.fstat(self._descriptor).st_size > self._end:  # its date is that of the last step
                os.ftruncate(self._descriptor, self._end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def append(self, line: Mapping[str, Any]) -> None:
        """Append a line; it is on the disk after :meth:`sync`."""
        text = json.dumps(line, separators=(",", ":")).encode()
        data = text + b"\t%08x\n" % zlib.crc32(text)
        with disk_errors(self.path):
            write_all(self._descriptor, data, self._end)
        self._end += len(data)

    def sync(self) -> None:
        """Flush the lines to the disk."""
        with disk_errors(self.path):
            os.fsync(self._descriptor)


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a journal of steps, up to the first that is torn or damaged."""
    return [line for line, _ in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the whole lines of a journal, each with the offset behind it."""
    end = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        text, _, check = line.rpartition(b"\t")
        if not text or check != b"%08x\n" % zlib.crc32(text):
            return
        end += len(line)
        yield json.loads(text), end


# --- who works here


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a run directory while the block runs: its lock, with the host and process id for messages.

    The kernel drops the lock when the holder dies, so a file that nobody keeps locked is taken over. The package
    ``filelock`` empties the file before it has the lock.
    """
    path = folder / LOCK
    for _ in range(TRIES):
        descriptor = open_file(path)
        with disk_errors(path), suppress(FileNotFoundError):  # its last holder removes it
            if _lock(descriptor, fcntl.LOCK_EX) and os.path.samestat(path.stat(), os.fstat(descriptor)):
                break
        os.close(descriptor)
        time.sleep(PAUSE)
    else:
        found = holder(folder) or {"pid": "unknown", "host": "unknown"}
        by = f"process {found['pid']} on the host {found['host']}"
        raise FistaPrunerError(f"{folder} is in use by {by}: wait for it, or end it and try again")
    try:
        with disk_errors(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"host": platform.node(), "pid": os.getpid()}).encode(), 0)
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def holder(folder: Path) -> dict[str, Any] | None:
    """Return the record (``host``, ``pid``) of the process that works on a run; None where none does."""
    try:
        with open(folder / LOCK, "rb") as file:
            if _lock(file.fileno(), fcntl.LOCK_SH):
                return None
            record = json.loads(file.read())
            return {name: record[name] for name in ("host", "pid")}
    except OSError:
        return None
    except (ValueError, KeyError, TypeError):  # it is just starting
        return {"host": "unknown", "pid": "unknown"}


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

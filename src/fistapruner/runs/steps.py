"""The journal of training steps: ``RUN/steps.jsonl``, one line a step, appended.

A line is a JSON object with the key ``step`` (from 1; the line of step 0 has the validation before training), and a tab
and the CRC-32 of the object's text behind it. Floats are written with the digits that read back as the same bits. A
torn or damaged line ends the journal: it and all lines after it are made again.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..errors import unreadable
from ..runtime.files import disk_errors, open_file, write_all

SYNC_EVERY = 16
"""Lines after which the file is flushed to the disk."""


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a journal, up to the first that is torn or damaged.

    Raises:
        FistaPrunerError: the file cannot be read.
    """
    return _read(path)[0]


class StepJournal:
    """A journal that is open for appending. Use it as a context manager.

    Args:
        path: the file; it is made if it is missing.
        last: last step to keep; later lines are dropped.
    """

    def __init__(self, path: Path, last: int) -> None:
        self.path = path
        lines, ends = _read(path)
        kept = sum(1 for line in lines if line["step"] <= last)
        self._end = ends[kept - 1] if kept else 0
        self._unsynced = 0
        self._descriptor = open_file(path)

    def __enter__(self) -> Self:
        with disk_errors(self.path):
            if os.fstat(self._descriptor).st_size > self._end:  # its date is that of the last step
                os.ftruncate(self._descriptor, self._end)
        return self

    def append(self, line: Mapping[str, Any]) -> None:
        """Append a line; it is on the disk after :data:`SYNC_EVERY` lines or :meth:`sync`."""
        text = json.dumps(line, separators=(",", ":"))
        data = f"{text}\t{zlib.crc32(text.encode()):08x}\n".encode()
        with disk_errors(self.path):
            write_all(self._descriptor, data, self._end)
        self._end += len(data)
        self._unsynced += 1
        if self._unsynced >= SYNC_EVERY:
            self.sync()

    def sync(self) -> None:
        """Flush the lines to the disk."""
        with disk_errors(self.path):
            os.fsync(self._descriptor)
        self._unsynced = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.sync()
        finally:
            os.close(self._descriptor)


def _read(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Read the whole lines and the offset behind each; steps must follow each other."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise unreadable(path, error) from None
    lines: list[dict[str, Any]] = []
    ends: list[int] = []
    start = 0
    while (end := data.find(b"\n", start)) >= 0:
        line = _line(data[start:end])
        if line is None or line["step"] != (lines[-1]["step"] + 1 if lines else line["step"]):
            break
        lines.append(line)
        ends.append(end + 1)
        start = end + 1
    return lines, ends


def _line(data: bytes) -> dict[str, Any] | None:
    """Parse one line; None where it is damaged."""
    text, _, crc = data.rpartition(b"\t")
    try:
        if f"{zlib.crc32(text):08x}".encode() != crc:
            return None
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and type(line.get("step")) is int else None

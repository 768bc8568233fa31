"""The journal of training steps, ``RUN/steps.jsonl``.

A line is a JSON object with the key ``step`` (from 1; the line of step 0 has the check before training), a tab and the
CRC-32 of the object's text. A torn or damaged line ends the journal: its step and all later ones are taken again.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..runtime.files import disk_errors, open_file, write_all


class StepJournal:
    """A journal that is open for appending. Use it as a context manager.

    Args:
        path: the file; it is made if it is missing.
        last: last step to keep; later lines are dropped.
    """

    def __init__(self, path: Path, last: int) -> None:
        self.path = path
        self._end = max((end for line, end in _lines(path) if line["step"] <= last), default=0)
        self._descriptor = open_file(path)

    def __enter__(self) -> Self:
        with disk_errors(self.path):
            if os.fstat(self._descriptor).st_size > self._end:  # its date is that of the last step
                os.ftruncate(self._descriptor, self._end)
        return self

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.sync()
        finally:
            os.close(self._descriptor)


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a journal of steps, up to the first that is torn or damaged."""
    return [line for line, _ in _lines(path)]


def _lines(path: Path) -> list[tuple[dict[str, Any], int]]:
    """Read the whole lines of a journal, each with the offset behind it."""
    found: list[tuple[dict[str, Any], int]] = []
    end = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        text, _, check = line.rpartition(b"\t")
        if not text or check != b"%08x\n" % zlib.crc32(text):
            break
        end += len(line)
        found.append((json.loads(text), end))
    return found

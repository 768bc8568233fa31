"""Total wall time of a run across interruptions, kept in ``RUN/times.json``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import NonNegativeFloat, TypeAdapter

from ..errors import FistaPrunerError
from ..runtime.files import write_json_atomic

TIMES = "times.json"

SECONDS = TypeAdapter(list[NonNegativeFloat])


class Times:
    """Sum the seconds of this process and of those before it.

    The file is written after every decoder layer, so a process that is killed loses the time of its unfinished layers.
    A damaged file counts as empty: no result depends on it.

    Args:
        folder: the run directory.
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

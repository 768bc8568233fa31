"""Total wall time of a run across interruptions, kept in the run directory."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import FistaPrunerError
from ..runtime.files import write_json_atomic

TIMES = "times.json"


class Times:
    """Sum the seconds of this process and of those before it.

    ``RUN/times.json`` is a list with the seconds of each process. It is written after every decoder layer, so a process
    that is killed loses the time of its unfinished layers. A damaged file counts as empty: no result depends on it.

    Args:
        folder: the run directory.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / TIMES
        self._before = _read(self._file)
        self._begin = time.perf_counter()

    def note(self) -> None:
        """Record the seconds of this process so far."""
        write_json_atomic(self._file, [*self._before, time.perf_counter() - self._begin])

    def forget(self) -> None:
        """Forget the seconds of processes before this one: the run is made again."""
        self._before = []
        self._file.unlink(missing_ok=True)

    def total(self) -> float:
        """Return the seconds of all processes of the run, of this one up to now."""
        return sum(self._before) + time.perf_counter() - self._begin


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


def _read(path: Path) -> list[float]:
    try:
        values = json.loads(path.read_text("utf-8"))
        return [float(value) for value in values if math.isfinite(value) and value >= 0]
    except (OSError, ValueError, TypeError, RecursionError):
        return []

"""Total wall time of a run across interruptions, kept in the run directory.

Parts of a run may work side by side: the total is the sum of their times, not how long somebody waited.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import FistaPrunerError
from ..runtime.files import files_named, write_json_atomic

NAME = "times"

TIMES_FILE = rf"{NAME}(\.\d+-\d+)?\.json"
"""Names of files of times; any other file is somebody else's."""


class Times:
    """Sum the seconds of this process and of those before it.

    ``RUN/times.json`` is a list with the seconds of each process that worked under the same lock
    (``RUN/times.0-9.json`` for a run of layers 0 to 9 only). It is written after every decoder layer, so a process that
    is killed loses the time of its unfinished layers. A damaged file counts as empty: no result depends on it.

    Args:
        folder: the run directory.
        layers: (first, last) decoder layer if only those are worked on.
    """

    def __init__(self, folder: Path, layers: tuple[int, int] | None = None) -> None:
        self._folder = folder
        self._file = folder / (f"{NAME}.json" if layers is None else f"{NAME}.{layers[0]}-{layers[1]}.json")
        self._before = _read(self._file)
        self._begin = time.perf_counter()

    def note(self) -> None:
        """Record the seconds of this process so far."""
        write_json_atomic(self._file, [*self._before, time.perf_counter() - self._begin])

    def noted(self) -> bool:
        """Return whether this process, or one before it, has recorded its seconds."""
        return self._file.exists()

    def forget(self) -> None:
        """Forget the seconds of processes before this one: the run is made again."""
        self._before = []
        forget_times(self._folder)

    def total(self) -> float:
        """Return the seconds of all processes of the run, of this one up to now."""
        others = [path for path in files_named(self._folder, TIMES_FILE) if path != self._file]
        return sum(self._before) + time.perf_counter() - self._begin + sum(sum(_read(path)) for path in others)

    def parts(self) -> int | None:
        """Count the parts of the layers whose seconds are in the total; None where there are not several."""
        count = count_parts(self._folder)
        return count if count > 1 else None


def count_parts(folder: Path) -> int:
    """Count the parts of the layers that processes of their own have worked on (``--only-layers``)."""
    return len([path for path in files_named(folder, TIMES_FILE) if path.name != f"{NAME}.json"])


def forget_times(folder: Path) -> None:
    """Remove what a run directory keeps of times: what they were spent on is gone."""
    for path in files_named(folder, TIMES_FILE):
        path.unlink(missing_ok=True)


@contextmanager
def spent(folder: Path, layers: tuple[int, int] | None = None) -> Iterator[Times]:
    """Measure the time of the block, and record it if the block fails. Else the report has the total.

    A part of the layers that fails before one is done, such as one that is refused, is none.
    """
    times = Times(folder, layers)
    try:
        yield times
    except BaseException:
        with suppress(FistaPrunerError):  # a full disk; the error that ended the block is reported
            if layers is None or times.noted():
                times.note()
        raise


def _read(path: Path) -> list[float]:
    try:
        values = json.loads(path.read_text("utf-8"))
        return [float(value) for value in values if math.isfinite(value) and value >= 0]
    except (OSError, ValueError, TypeError, RecursionError):
        return []

"""Show a run's progress: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..runs.listener import Listener
from ..runs.records import LayerEntry
from ..runtime.formatting import duration

EVERY = 20.0
"""Seconds between two messages about one pass."""


def choose_listener(*, quiet: bool) -> Listener:
    """Choose a silent, plain or live listener. Progress goes to standard error."""
    if quiet:
        return Listener()
    return LiveListener() if sys.stderr.isatty() else PlainListener()


def describe_layer(entry: LayerEntry) -> str:
    """Describe a layer: ``layer 3: error 1.93 % (worst: mlp.down_proj 4.10 %), 5.2 s``."""
    errors = [(operator.relative_error or 0.0, operator.name) for operator in entry.operators]
    if not errors and entry.removals:
        removed = ", ".join(f"{removal.unit} {removal.before} → {removal.after}" for removal in entry.removals)
        return f"layer {entry.index}: {removed}"
    if not errors:
        return f"layer {entry.index}: nothing to prune"
    worst, name = max(errors)
    mean = sum(error for error, _ in errors) / len(errors)
    spent = duration(sum(entry.seconds.values()))
    return f"layer {entry.index}: error {100 * mean:.2f} % (worst: {name} {100 * worst:.2f} %), {spent}"


class _PassListener(Listener):
    """Print the progress of a long pass every :data:`EVERY` seconds.

    Args:
        clock: returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._passing, self._said = "", 0.0

    def tick(self, what: str, done: int, total: int) -> None:
        now = self._clock()
        if what != self._passing:
            self._passing, self._said = what, now
        elif now - self._said >= EVERY and done < total:
            self._said = now
            self.say(f"{what}: {done} of {total}")


class PlainListener(_PassListener):
    """Print one line for each decoder layer, with the time that is left."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self._left = 0
        self._done = 0
        self._begin = clock()

    def say(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    def begin(self, layers: int, done: int) -> None:
        self._left, self._done, self._begin = layers - done, 0, self._clock()
        self.say(f"{layers} decoder layers" + (f", {done} of them already done" if done else ""))

    def layer(self, entry: LayerEntry) -> None:
        self._done += 1
        self._left -= 1
        left = (self._clock() - self._begin) / self._done * self._left
        to_go = f"; {self._left} layer{'s' * (self._left > 1)} and about {duration(left)} left" if self._left else ""
        self.say(describe_layer(entry) + to_go)


class LiveListener(_PassListener):
    """Show a progress bar with the current operator and the mean error so far."""

    def __init__(self) -> None:
        super().__init__()
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("[bold]layers"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self._console,
        )
        self._task: TaskID | None = None
        self._errors: list[float] = []

    def say(self, message: str) -> None:
        self._console.print(message, highlight=False, markup=False)

    def begin(self, layers: int, done: int) -> None:
        self._bar.start()
        self._task = self._bar.add_task("", total=layers, completed=done)

    def operators(self, index: int, names: str, error: float | None) -> None:
        if self._task is not None:
            mean = f", error so far {100 * sum(self._errors) / len(self._errors):.2f} %" if self._errors else ""
            self._bar.update(self._task, description=f"{index}.{names}{mean}")

    def layer(self, entry: LayerEntry) -> None:
        self._errors += [operator.relative_error or 0.0 for operator in entry.operators]
        if self._task is not None:
            self._bar.advance(self._task)
        self._console.print(describe_layer(entry), highlight=False, markup=False)

    def end(self) -> None:
        self._bar.stop()

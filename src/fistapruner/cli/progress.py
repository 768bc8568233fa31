"""Show a run's progress: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import argparse
import sys
import threading
import time
import weakref
from abc import ABC, abstractmethod
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

from ..errors import printable
from ..runs.log import Listener
from ..runs.records import LayerEntry
from ..runtime.show import counted, duration

EVERY = 7.0
"""Seconds after which it is said again what is being done."""

REMINDER = "reminder"
"""Name of the thread that says it."""


def choose_listener(arguments: argparse.Namespace) -> Listener:
    """Choose a silent, plain or live listener. Progress goes to standard error.

    A verb calls it before its other imports, which take seconds. In a terminal a listener says at least every ten
    seconds what is being done, from a thread of its own; elsewhere once for each pass that takes so long.
    """
    quiet = any(getattr(arguments, name, False) for name in ("quiet", "json"))  # not every verb has these
    if quiet:
        return Listener()
    listener = LiveListener() if sys.stderr.isatty() else PlainListener()
    ended = threading.Event()
    weakref.finalize(listener, ended.set)
    reference = weakref.ref(listener)
    threading.Thread(target=_keep_saying, args=(reference, ended), name=REMINDER, daemon=True).start()
    return listener


def _keep_saying(reference: Callable[[], _WorkListener | None], ended: threading.Event) -> None:
    """Let a listener say what is being done, until it is gone or the program ends."""
    while not ended.wait(1.0):
        if (listener := reference()) is not None:
            listener.remind()
        del listener


def describe_layer(entry: LayerEntry) -> str:
    """Describe a layer: ``layer 3: error 1.93 % (worst: mlp.down_proj 4.10 %), 5.2 s``."""
    errors = [(operator.relative_error or 0.0, operator.name) for operator in entry.judged]
    if not errors and entry.removals:
        removed = dict.fromkeys(f"{removal.unit} {removal.before} → {removal.after}" for removal in entry.removals)
        return f"layer {entry.index}: {', '.join(removed)}"
    if not errors:
        return f"layer {entry.index}: nothing to prune"
    worst, name = max(errors)
    mean = sum(error for error, _ in errors) / len(errors)
    spent = duration(sum(entry.seconds.values()))
    return f"layer {entry.index}: error {100 * mean:.2f} % (worst: {name} {100 * worst:.2f} %), {spent}"


class _WorkListener(Listener, ABC):
    """Say what is being done, where nothing else was said for :data:`EVERY` seconds.

    Args:
        clock: returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._work, self._since = "starting", clock()
        self._done, self._said_done = "", ""
        self._said = self._since

    def say(self, message: str) -> None:
        self.work(message)
        self.write(message)
        self.spoken()

    def tick(self, what: str, done: int, total: int) -> None:
        self.work(what, f"{done} of {total}" if total > 1 else "")
        if done < total:
            self.remind()

    def operators(self, index: int, names: str, error: float | None) -> None:
        self.work(f"layer {index}: {names}" if error is None else f"layer {index}")

    def work(self, what: str, done: str = "") -> None:
        """Note what is being done, and how much of it is done."""
        if (what, done) != (self._work, self._done):
            self._work, self._done, self._since, self._said_done = what, done, self._clock(), ""

    def spoken(self) -> None:
        """Note that something was said."""
        self._said = self._clock()

    def remind(self) -> None:
        """Say what is being done, if nothing was said for :data:`EVERY` seconds."""
        with self._lock:
            now = self._clock()
            if now - self._said < EVERY:
                return
            done = self._done
            line = f"{self._work}: {done}" if done else self._work
            if now - self._since >= 1 and (not done or done == self._said_done):  # the time shows that it goes on
                line += f", for {duration(now - self._since)}"
            self._said_done = done
            self.write(line)
            self.spoken()

    @abstractmethod
    def write(self, line: str) -> None:
        """Write a line to standard error."""


class PlainListener(_WorkListener):
    """Print one line for each decoder layer, with the time that is left, and one for each other long pass."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self._left = 0
        self._pruned = 0
        self._told: set[str] = set()
        self._begin = clock()

    def write(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def remind(self) -> None:
        if self._work not in self._told and self._clock() - self._said >= EVERY:
            self._told.add(self._work)
            super().remind()

    def begin(self, layers: int, done: int) -> None:
        self._left, self._pruned, self._begin = layers - done, 0, self._clock()
        self.say(counted(layers, "decoder layer") + (f", {done} of them already done" if done else ""))
        self.work("the first hidden states")

    def layer(self, entry: LayerEntry) -> None:
        if not self._pruned and (spent := sum(entry.seconds.values())):
            self._begin = max(self._begin, self._clock() - spent)  # before it, hidden states went through pruned layers
        self._pruned += 1
        self._left -= 1
        left = (self._clock() - self._begin) / self._pruned * self._left
        to_go = f"; {counted(self._left, 'layer')} and about {duration(left)} left" if self._left else ""
        self.say(describe_layer(entry) + to_go)
        if self._left:
            self.work(f"layer {entry.index + 1}")


class LiveListener(_WorkListener):
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

    def write(self, line: str) -> None:
        self._console.print(printable(line), highlight=False, markup=False)

    def remind(self) -> None:
        if self._task is None:  # the bar shows the time
            super().remind()

    def begin(self, layers: int, done: int) -> None:
        self._errors.clear()
        self._bar.start()
        self._task = self._bar.add_task("", total=layers, completed=done)

    def operators(self, index: int, names: str, error: float | None) -> None:
        if self._task is not None:
            mean = f", error so far {100 * sum(self._errors) / len(self._errors):.2f} %" if self._errors else ""
            self._bar.update(self._task, description=f"{index}.{printable(names)}{mean}")

    def layer(self, entry: LayerEntry) -> None:
        self._errors += [operator.relative_error or 0.0 for operator in entry.judged]
        if self._task is not None:
            self._bar.advance(self._task)
        self.say(describe_layer(entry))

    def end(self) -> None:
        self._bar.stop()
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = None
        self.spoken()

"""Show a run's progress: live lines in a terminal, plain lines elsewhere."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..errors import printable
from ..runs.log import Listener
from ..runs.records import LayerEntry
from ..runtime.machine import leads
from ..runtime.show import counted, duration
from .arguments import write

EVERY = 7.0
"""Seconds of silence after which a plain listener says how far a pass is."""


def choose_listener(arguments: argparse.Namespace) -> Listener:
    """Choose a silent, plain or live listener. Progress goes to standard error.

    A verb calls it before its other imports, which take seconds. A live listener is kept in ``arguments``, so that it
    is closed before anything else is printed.
    """
    quiet = any(getattr(arguments, name, False) for name in ("quiet", "json"))  # not every verb has these
    if quiet:
        return Listener()
    if sys.stderr is None or not (sys.stderr.isatty() and leads()):
        return PlainListener()
    arguments.listener = listener = LiveListener()
    return listener


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


class PlainListener(Listener):
    """Print one line for each decoder layer, with the time that is left, and one for each other long pass."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._said = self._begin = clock()
        self._told: set[str] = set()
        self._left = self._pruned = 0

    def say(self, message: str) -> None:
        write(message, sys.stderr)
        self._said = self._clock()

    def tick(self, what: str, done: int, total: int) -> None:
        if done < total and what not in self._told and self._clock() - self._said >= EVERY:
            self._told.add(what)
            self.say(f"{what}: {done} of {total}" if total > 1 else what)

    def begin(self, layers: int, done: int) -> None:
        self._left, self._pruned, self._begin = layers - done, 0, self._clock()
        self.say(counted(layers, "decoder layer") + (f", {done} of them already done" if done else ""))

    def layer(self, entry: LayerEntry) -> None:
        if not self._pruned and (spent := sum(entry.seconds.values())):
            self._begin = max(self._begin, self._clock() - spent)  # before it, hidden states went through pruned layers
        self._pruned += 1
        self._left -= 1
        left = (self._clock() - self._begin) / self._pruned * self._left
        to_go = f"; {counted(self._left, 'layer')} and about {duration(left)} left" if self._left else ""
        self.say(describe_layer(entry) + to_go)


class LiveListener(Listener):
    """Show live what is being done and for how long, and how many layers are done."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        text = (TextColumn(f"{{task.{name}}}", markup=False) for name in ("description", "fields[done]"))
        left = TextColumn("left"), TimeRemainingColumn()
        self.bar = Progress(
            SpinnerColumn(), *text, BarColumn(), TimeElapsedColumn(), *left, console=self._console, transient=True
        )
        self._work = self.bar.add_task("starting", total=None, done="")
        self._what = ""
        self._layers: TaskID | None = None
        self._errors: list[float] = []
        self.bar.start()

    def say(self, message: str) -> None:
        with suppress(OSError):  # a terminal that was closed
            self._console.print(printable(message), highlight=False, markup=False)
        self.tick(message, 0, 1)

    def tick(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self._what = what
            self.bar.reset(self._work, description=printable(what))
        of = {"total": total, "done": f"{done} of {total}"} if total > 1 else {"total": None, "done": ""}
        self.bar.update(self._work, completed=done, **of)

    def begin(self, layers: int, done: int) -> None:
        self._errors.clear()
        self._layers = self.bar.add_task("layers", total=layers, completed=done, done="")

    def operators(self, index: int, names: str, error: float | None) -> None:
        self.tick(f"layer {index}: {names}", 0, 1)

    def layer(self, entry: LayerEntry) -> None:
        self._errors += [operator.relative_error or 0.0 for operator in entry.judged]
        if self._layers is not None:
            mean = f"error so far {100 * sum(self._errors) / len(self._errors):.2f} %" if self._errors else ""
            self.bar.update(self._layers, advance=1, done=mean)
        self.say(describe_layer(entry))

    def end(self) -> None:
        if self._layers is not None:
            self.bar.remove_task(self._layers)
        self._layers = None

    def close(self) -> None:
        """Take the live lines from the terminal."""
        self.bar.stop()

"""The training loop: steps, checks on what is held out, the best step kept, snapshots.

A step is a pure function of (run, state, number), so a run that was killed goes on with the same bits. Every step
appends a line to the journal. At equal distances the loss of what is held out is checked: the best weights are kept,
the start being the first candidate, so the result is never worse than the start there. After a check that is not
better, training goes back to the best weights with a smaller learning rate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from ..runs.steps import StepJournal
from ..runs.store import Snapshots, snapshot_interval
from ..runtime.show import duration

CHECKS = 8
"""Checks on what is held out, at equal distances."""

BACK_OFF = 0.3
"""Learning-rate factor after a check that is not better."""

SMALLEST = 0.02
"""Share of the first learning rate below which training stops."""

MAX_NOT_FINITE = 3
"""Steps without a finite loss in a row after which training without gradients stops."""


@dataclass(frozen=True)
class Descent:
    """How the learning rate changes, and AdamW's constants.

    Args:
        warm_up: share of the steps over which the learning rate rises from 0.
        fall: how it goes on: ``cosine`` or ``linear`` to 0, or ``constant``.
        goes_back: whether training goes back to the best weights after a check that is not better.
        betas: decay rates of AdamW's moments. With a few hundred steps a second moment over 1,000 steps is never
            reached.
        decay: decoupled weight decay of pruned operators.
    """

    warm_up: float = 0.1
    fall: Literal["cosine", "linear", "constant"] = "cosine"
    goes_back: bool = True
    betas: tuple[float, float] = (0.9, 0.95)
    decay: float = 0.0

    def factor(self, step: int, steps: int) -> float:
        """Return the learning-rate factor of a step, counted from 1."""
        warm = max(1, round(self.warm_up * steps)) if self.warm_up else 0
        if step <= warm:
            return step / warm
        share = (step - warm) / (steps - warm + 1)
        return {"cosine": 0.5 * (1 + math.cos(math.pi * share)), "linear": 1 - share, "constant": 1.0}[self.fall]


OURS = Descent()
"""What was measured to be good for a few hundred steps."""


class Trainable(Protocol):
    """What the loop needs of what is trained."""

    def keep(self) -> None:
        """Remember the present weights as the best so far."""

    def restore(self) -> None:
        """Go back to the best weights, with new moments."""

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that a snapshot holds, by name."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`tensors` returned."""


TakeStep = Callable[[int, float], tuple[float, float]]
"""Takes step (number, factor of the first learning rate); returns its loss, and the size of its gradient."""


@dataclass
class State:
    """The plain values of a training state.

    Args:
        step: steps taken.
        before: held-out loss of the start.
        best: lowest held-out loss so far; ``best_step``: the step that it was measured after, 0 is the start.
        rate: factor of the learning rate, before the schedule.
        stopped: no further steps are taken.
        not_finite: steps in a row whose loss was not finite.
        fault: why training stopped early, a sentence.
    """

    step: int = 0
    before: float = math.nan
    best: float = math.nan
    best_step: int = 0
    rate: float = 1.0
    stopped: bool = False
    not_finite: int = 0
    fault: str | None = None

    def start(self, loss: float, trained: Trainable) -> None:
        """Make the start the first candidate."""
        self.before = self.best = loss
        trained.keep()
        if not math.isfinite(loss):
            self.stop(f"the loss of what is held out is {loss} before training")

    def check(self, loss: float, trained: Trainable, *, goes_back: bool = True) -> bool:
        """Take in the held-out loss of the present step: keep the weights if it is the lowest, else go back."""
        if loss < self.best:
            self.best, self.best_step = loss, self.step
            trained.keep()
            return True
        if goes_back:
            self.rate *= BACK_OFF
            trained.restore()
            self.stopped = self.rate < SMALLEST
        return False

    def stop(self, fault: str) -> str:
        """End training early."""
        self.stopped, self.fault = True, fault
        return fault


def check_due(step: int, steps: int) -> bool:
    """Say whether a check follows a step: after steps ``k * steps // CHECKS``, of few after every one."""
    return ((step + 1) * CHECKS - 1) // steps > (step * CHECKS - 1) // steps


@dataclass
class Loop:
    """One training run, whose steps are journaled and whose states are stored.

    Args:
        states: its snapshots, ``journal``: path of its journal; None stores nothing. ``fingerprint``: its identity.
        trained: what is trained.
        steps: in all.
        step: takes one.
        held_out: returns the held-out loss, and that of each of several tasks.
        tokens: returns the tokens with loss of a step.
        descent: how the learning rate changes.
        patient: how many steps in a row may lack a finite loss.
        say: receives sentences.
        tick: receives (steps done, steps in all).
        after_snapshot: called when a state is on the disk.
        agree: gives all processes of a run the answer of the first to whether a state is due.
    """

    states: Snapshots | None
    journal: Path | None
    fingerprint: str
    trained: Trainable
    steps: int
    step: TakeStep
    held_out: Callable[[], tuple[float, dict[str, float]]]
    tokens: Callable[[int], int]
    descent: Descent = OURS
    patient: int = 1
    say: Callable[[str], None] = lambda sentence: None
    tick: Callable[[int, int], None] = lambda done, total: None
    after_snapshot: Callable[[], None] = lambda: None
    agree: Callable[[bool], bool] = lambda due: due

    def run(self, state: State | None) -> State:
        """Take the steps that are left; the best weights are restored at the end.

        Args:
            state: where training goes on, whose tensors ``trained`` holds; None is the start.
        """
        self.state, self._writing, last = state or State(), 0.0, time.monotonic()
        begun = state is not None
        whole = self.state.step if begun else -1
        with nullcontext() if self.journal is None else StepJournal(self.journal, whole) as self._journal:
            if self.states is not None and self._journal is not None:
                self.states.tidy(whole)
            if begun:
                self.say(f"going on after step {self.state.step} of {self.steps}")
            else:
                self._begin()
            first, begin = self.state.step, time.monotonic()
            while self.state.step < self.steps and not self.state.stopped:
                checked = self._step()
                if checked is not None:
                    done = self.state.step - first
                    self._say_check(*checked, (time.monotonic() - begin) / done * (self.steps - self.state.step))
                self.tick(self.state.step, self.steps)
                late = self.agree(time.monotonic() - last > snapshot_interval(self._writing))
                if checked is not None or self.state.stopped or late:
                    self._snapshot()
                    last = time.monotonic()
        self.trained.restore()
        return self.state

    def _begin(self) -> None:
        begin = time.perf_counter()
        self.say("the loss of what is held out, before training")
        loss, by_task = self.held_out()
        self.state.start(loss, self.trained)
        self._note({"step": 0, "held_out": loss, "kept": True, "by_task": by_task}, begin)
        self.say(self.state.fault or f"held-out loss {loss:.4f}")
        self.tick(0, self.steps)
        self._snapshot()

    def _step(self) -> tuple[float, bool] | None:
        """Take one step and journal it; returns the held-out loss and whether it is the best, where due."""
        begin, state = time.perf_counter(), self.state
        number = state.step + 1
        factor = state.rate * self.descent.factor(number, self.steps)
        loss, size = self.step(number, factor)
        finite = math.isfinite(loss) and math.isfinite(size)
        line: dict[str, Any] = {"step": number, "loss": loss if finite else None, "lr": factor}
        line |= {"size": size if finite else None, "tokens": self.tokens(number)}
        state.step, state.not_finite = number, 0 if finite else state.not_finite + 1
        checked = None
        if state.not_finite >= self.patient:
            what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient is {size}"
            line["fault"] = state.stop(f"the {what} at step {number}, at {factor:.3g} of the first learning rate")
            self.say(line["fault"])
        elif check_due(number, self.steps):
            held_out, by_task = self.held_out()
            checked = held_out, state.check(held_out, self.trained, goes_back=self.descent.goes_back)
            line |= {"held_out": held_out, "kept": checked[1], "by_task": by_task}
        self._note(line, begin)
        return checked

    def _note(self, line: dict[str, Any], begin: float) -> None:
        """Append a line to the journal, with the seconds since ``begin``."""
        if self._journal is not None:
            self._journal.append({**line, "seconds": round(time.perf_counter() - begin, 3)})

    def _say_check(self, held_out: float, kept: bool, left: float) -> None:
        how = "kept" if kept else "not better"
        if self.state.stopped:
            how += f"; the learning rate would fall below {SMALLEST:.0%} of the first, so training ends"
        elif self.state.step < self.steps:
            how += f", about {duration(left)} left"
        step, before = f"step {self.state.step} of {self.steps}", f"(before {self.state.before:.4f})"
        self.say(f"{step}: held-out loss {held_out:.4f} {before}: {how}")

    def _snapshot(self) -> None:
        if self.states is None:
            return
        begin = time.monotonic()
        if self._journal is not None:
            self._journal.sync()
        self.states.write(self.fingerprint, self.state.step, asdict(self.state), self.trained.tensors())
        self._writing = time.monotonic() - begin
        self.after_snapshot()


def descend(trained: Trainable, steps: int, step: TakeStep, held_out: Callable[[], float]) -> State:
    """Train in memory, without a journal, as block reconstruction does; arguments as for :class:`Loop`."""
    return Loop(None, None, "", trained, steps, step, lambda: (held_out(), {}), lambda number: 0).run(None)

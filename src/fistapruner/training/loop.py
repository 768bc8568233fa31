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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..runs.log import Listener, StepJournal
from ..runs.store import LEAST_SECONDS, Snapshots
from ..runtime.show import duration

CHECKS = 8  # on what is held out, at equal distances

BACK_OFF, SMALLEST = 0.3, 0.02  # factor of the rate after a check that is not better; share below which training ends


@dataclass(frozen=True)
class Descent:
    """How the learning rate changes, and AdamW's constants.

    The rate rises from 0 over the ``warm_up`` share of the steps, then falls to 0 or is constant. ``betas`` are for a
    few hundred steps, too few for a second moment over 1,000; ``decay`` is the weight decay of pruned operators.
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


OURS = Descent()  # measured to be good for a few hundred steps


@dataclass
class State:
    """The plain values of a training state."""

    step: int = 0
    before: float = math.nan  # held-out loss at the start
    best: float = math.nan  # the lowest one
    best_step: int = 0
    rate: float = 1.0  # factor of the learning rate, before the schedule
    stopped: bool = False
    fault: str | None = None  # why training stopped early


def check_due(step: int, steps: int) -> bool:
    """Say whether a check follows a step: after steps ``k * steps // CHECKS``, of few after every one."""
    return ((step + 1) * CHECKS - 1) // steps > (step * CHECKS - 1) // steps


@dataclass
class Loop:
    """One training run; it is stored where ``states`` and ``journal`` are given.

    Args:
        trained: what is trained: it can ``keep`` its weights as the best, ``restore`` them, and has ``tensors``.
        step: takes step (number, factor of the first learning rate); returns its loss, and the size of its gradient.
        held_out: returns the held-out loss, and that of each of several tasks.
        agree: gives all processes of a run the answer of the first to whether a state is due.
    """

    trained: Any
    steps: int
    step: Callable[[int, float], tuple[float, float]]
    held_out: Callable[[], tuple[float, dict[str, float]]]
    tokens: Callable[[int], int] = lambda number: 0
    descent: Descent = OURS
    states: Snapshots | None = None
    journal: Path | None = None
    fingerprint: str = ""
    listener: Listener = field(default_factory=Listener)
    what: str = "steps"
    after_snapshot: Callable[[], None] = lambda: None
    agree: Callable[[bool], bool] = lambda due: due

    def run(self, state: State | None = None) -> State:
        """Take the steps after ``state``, whose tensors are loaded; then restore the best weights."""
        whole = -1 if state is None else state.step
        self.state, self._writing = state or State(), 0.0
        with nullcontext() if self.journal is None else StepJournal(self.journal, whole) as self._journal:
            if self.states is not None and self._journal is not None:
                self.states.tidy(whole)
            if state is None:
                self.listener.say("the loss of what is held out, before training")
                self._take(0)
                self._snapshot()
            else:
                self.listener.say(f"going on after step {whole} of {self.steps}")
            self._begun = self.state.step, (last := time.monotonic())
            while self.state.step < self.steps and not self.state.stopped:
                checked = self._take(self.state.step + 1)
                late = self.agree(time.monotonic() - last > max(LEAST_SECONDS, 10 * self._writing))
                if checked or self.state.stopped or late:
                    self._snapshot()
                    last = time.monotonic()
        self.trained.restore()
        return self.state

    def _take(self, number: int) -> bool:
        """Take a step (0 takes none); check, journal and say it; return whether a check was due."""
        begin, state = time.perf_counter(), self.state
        line: dict[str, Any] = {"step": number}
        state.step = number
        if number:
            factor = state.rate * self.descent.factor(number, self.steps)
            loss, size = self.step(number, factor)
            line |= {"loss": loss, "lr": factor, "size": size, "tokens": self.tokens(number)}
            if not (math.isfinite(loss) and math.isfinite(size)):
                what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient is {size}"
                line |= {"loss": None, "size": None}
                state.stopped = True
                line["fault"] = state.fault = f"the {what} at step {number}, at {factor:.3g} of the first learning rate"
        if state.fault is None and (number == 0 or check_due(number, self.steps)):
            held_out, by_task = self.held_out()
            kept = number == 0 or held_out < state.best
            line |= {"held_out": held_out, "kept": kept, "by_task": by_task}
            if kept:
                state.best, state.best_step = held_out, number
                self.trained.keep()
            elif self.descent.goes_back:
                state.rate *= BACK_OFF
                self.trained.restore()
                state.stopped = state.rate < SMALLEST
            if number == 0:
                state.before = held_out
                if not math.isfinite(held_out):
                    state.stopped, state.fault = True, f"the loss of what is held out is {held_out} before training"
        if self._journal is not None:
            self._journal.append({**line, "seconds": round(time.perf_counter() - begin, 3)})
        if state.fault is not None:
            self.listener.say(state.fault)
        elif "held_out" in line:
            self.listener.say(self._checked(line))
        self.listener.tick(self.what, number, self.steps)
        return "held_out" in line

    def _checked(self, line: Mapping[str, Any]) -> str:
        """Say a check and what follows."""
        state, said = self.state, f"held-out loss {line['held_out']:.4f}"
        if state.step:
            how = "kept" if line["kept"] else "not better"
            said = f"step {state.step} of {self.steps}: {said} (before {state.before:.4f}): {how}"
        if state.stopped:
            said += f"; the learning rate would fall below {SMALLEST:.0%} of the first, so training ends"
        elif 0 < state.step < self.steps:
            first, then = self._begun
            each = (time.monotonic() - then) / (state.step - first)
            said += f", about {duration(each * (self.steps - state.step))} left"
        return said

    def _snapshot(self) -> None:
        if self.states is None:
            return
        begin = time.monotonic()
        if self._journal is not None:
            self._journal.sync()
        self.states.write(self.fingerprint, self.state.step, asdict(self.state), self.trained.tensors())
        self._writing = time.monotonic() - begin
        self.after_snapshot()

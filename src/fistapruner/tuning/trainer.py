"""Train a pruned model end to end: steps, checks on held-out windows, snapshots.

A step is a pure function of (run, state, number), so a run that was killed goes on with the same bits. Every step
appends a line to the journal. At equal distances the loss of the held-out windows is checked: the best weights are
kept, the start being the first candidate, so the result is never worse than the start on these windows.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from torch import Tensor

from ..calibration.training_text import TrainingText
from ..models.files.safetensors import LazyTensors
from ..recipes.align_settings import PREFERENCE_LOSSES, AlignRecipe
from ..recipes.training_settings import TrainingRecipe
from ..runs.snapshots import Snapshot, snapshot_interval
from ..runs.steps import StepJournal, read_steps
from ..runs.training_directory import TrainingDirectory
from ..runs.training_records import Check
from ..runtime.formatting import duration
from .adamw import SMALLEST, Patience, Verdict, check_due, schedule
from .trained import Trained

log = logging.getLogger("fistapruner")

MAX_NOT_FINITE = 3
"""Steps without a finite loss in a row after which an optimizer without gradients stops."""


@dataclass(frozen=True)
class StepResult:
    """What a step measured.

    Args:
        loss: of its windows, per token, before the step.
        size: norm of the gradient; of an optimizer without gradients the directional derivative.
    """

    loss: float
    size: float


class Stepper(Protocol):
    """What a trainer needs of an optimizer."""

    def losses(self, windows: list[int]) -> Tensor:
        """Compute the (windows,) fp64 sums of the loss over what each window counts."""

    def step(self, number: int, windows: list[int], factor: float) -> StepResult:
        """Take step ``number`` at ``factor`` times the first learning rate."""


@dataclass
class TrainingState:
    """The plain values of a training state.

    Args:
        step: steps taken.
        before: held-out loss of the start.
        patience: the best loss and step so far, and the factor of the learning rate.
        stopped: no further steps are taken.
        not_finite: steps in a row whose loss was not finite.
        fault: why training stopped early, a sentence.
    """

    step: int = 0
    before: float = math.nan
    patience: Patience = field(default_factory=lambda: Patience.begin(math.nan))
    stopped: bool = False
    not_finite: int = 0
    fault: str | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> TrainingState:
        """Make a state of the values that a snapshot holds."""
        return cls(**{**values, "patience": Patience(**values["patience"])})


def newest_state(run: TrainingDirectory, fingerprint: str) -> Snapshot | None:
    """Find the newest state of a run up to which the journal is whole; None where there is none.

    What was measured before it belongs to the run, too.
    """
    lines = read_steps(run.steps_file)
    return run.states.newest(fingerprint, lines[-1]["step"]) if lines else None


Say = Callable[[str], None]
StepTick = Callable[[int, int], None]


@dataclass
class Trainer:
    """One training run.

    Args:
        run: its directory.
        fingerprint: its identity.
        recipe: all settings, resolved.
        text: the training text.
        order: (steps, windows_per_step) window numbers.
        stepper: the optimizer.
        trained: what it trains.
        snapshot: the state to go on from; None where there is none.
        say: receives sentences.
        tick: receives (steps done, steps in all).
        after_snapshot: called when a state is on the disk.
    """

    run: TrainingDirectory
    fingerprint: str
    recipe: TrainingRecipe
    text: TrainingText
    order: Tensor
    stepper: Stepper
    trained: Trained
    snapshot: Snapshot | None = None
    say: Say = lambda sentence: None
    tick: StepTick = lambda done, total: None
    after_snapshot: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.state = TrainingState()
        self.held_out = self.text.held_out.nonzero().flatten().tolist()
        self.counts, self.loss_tokens = self.text.counts, self.text.loss_tokens
        if isinstance(self.recipe, AlignRecipe) and self.recipe.loss not in PREFERENCE_LOSSES:
            # Of a pair only the chosen answer carries loss.
            self.loss_tokens = self.loss_tokens * self.counts
        self._writing = 0.0  # seconds that the last snapshot took

    def train(self) -> TrainingState:
        """Take the steps that are left; the best weights are restored at the end."""
        lines, snapshot = read_steps(self.run.steps_file), self.snapshot
        newest = max(self.run.states.steps(), default=-1)
        if newest > (whole := lines[-1]["step"] if lines else -1):
            where = f" after step {whole}" if lines else ""
            self.say(f"{self.run.steps_file} is gone or damaged{where}: the state of step {newest} is not used")
        if snapshot is not None:
            self._resume(snapshot)
        begun, steps, last = snapshot is not None, len(self.order), time.monotonic()
        with StepJournal(self.run.steps_file, self.state.step if begun else -1) as journal:
            self.run.states.tidy(self.state.step if begun else -1)
            if not begun:
                self._begin(journal)
            first, begin = self.state.step, time.monotonic()
            while self.state.step < steps and not self.state.stopped:
                check = self._step(journal)
                if check is not None:
                    done = self.state.step - first
                    left = (time.monotonic() - begin) / done * (steps - self.state.step)
                    self._say_check(check, 0.0 if self.state.stopped else left)
                self.tick(self.state.step, steps)
                late = time.monotonic() - last > snapshot_interval(self._writing)
                if check is not None or self.state.stopped or late:
                    journal.sync()
                    self._snapshot()
                    last = time.monotonic()
        self.trained.restore()
        return self.state

    def _resume(self, snapshot: Snapshot) -> None:
        self.state = TrainingState.of(snapshot.values)
        self.trained.load(LazyTensors(snapshot.tensors.entries, snapshot.tensors.read))
        self.say(f"going on after step {self.state.step} of {len(self.order)}")

    def _start(self, held_out: float) -> None:
        """Make the start the first candidate."""
        self.state.before = held_out
        self.state.patience = Patience.begin(held_out, on=self.recipe.patience)
        self.trained.keep()

    def _begin(self, journal: StepJournal) -> None:
        """Check the start, which is the first candidate."""
        begin = time.perf_counter()
        self.say(f"the loss on {self.text.amount(self.held_out)} before training")
        held_out, by_task = self._held_out()
        self._start(held_out)
        line = {"step": 0, "held_out": held_out, "kept": True, "by_task": by_task}
        journal.append({**line, "seconds": round(time.perf_counter() - begin, 3)})
        if math.isfinite(held_out):
            self.say(f"held-out loss {held_out:.4f}")
            self.tick(0, len(self.order))
        else:
            self._stop(f"the loss of the held-out windows is {held_out} before training")
        journal.sync()
        self._snapshot()

    def _step(self, journal: StepJournal) -> Check | None:
        """Take one step, journal it, and check the held-out windows where that is due."""
        begin = time.perf_counter()
        number = self.state.step + 1
        windows = self.order[number - 1].tolist()
        factor = rate_factor(self.state, self.recipe, len(self.order))
        found = self.stepper.step(number, windows, factor)
        finite = math.isfinite(found.loss) and math.isfinite(found.size)
        line: dict[str, Any] = {
            "step": number,
            "loss": found.loss if finite else None,
            "lr": factor,
            "size": found.size if finite else None,
            "tokens": int(self.loss_tokens[windows].sum()),
        }
        self.state.step = number
        self.state.not_finite = 0 if finite else self.state.not_finite + 1
        check = None
        if not finite and (not self.recipe.zeroth_order or self.state.not_finite >= MAX_NOT_FINITE):
            what = f"loss is {found.loss}" if not math.isfinite(found.loss) else f"gradient is {found.size}"
            line["fault"] = self._stop(f"the {what} at step {number}, at {factor:.3g} of the first learning rate")
        elif check_due(number, len(self.order), self.recipe.validation_checks):
            held_out, by_task = self._held_out()
            kept = decide(self.state, self.trained, held_out)
            check = Check(step=number, held_out=held_out, kept=kept, by_task=by_task)
            line |= {"held_out": held_out, "kept": check.kept, "by_task": by_task}
        journal.append({**line, "seconds": round(time.perf_counter() - begin, 3)})
        return check

    def _stop(self, fault: str) -> str:
        self.state.stopped, self.state.fault = True, fault
        self.say(fault)
        return fault

    def _held_out(self) -> tuple[float, dict[str, float]]:
        """Return the held-out loss per token or pair, the mean over tasks, and that of each of several tasks."""
        sums, counts = self.stepper.losses(self.held_out), self.counts[self.held_out]
        tasks = self.text.task[self.held_out]
        by_task = {
            name: float(sums[tasks == number].sum() / counts[tasks == number].sum())
            for number, name in enumerate(self.text.tasks)
            if bool((tasks == number).any())
        }
        return sum(by_task.values()) / len(by_task), by_task if len(by_task) > 1 else {}

    def _say_check(self, check: Check, left: float) -> None:
        kept = "kept" if check.kept else "not better"
        if self.state.stopped:
            kept += f"; the learning rate would fall below {SMALLEST:.0%} of the first, so training ends"
        lines = f", about {duration(left)} left" if left else ""
        self.say(
            f"step {check.step} of {len(self.order)}: held-out loss {check.held_out:.4f} "
            f"(before {self.state.before:.4f}): {kept}{lines}"
        )

    def _snapshot(self) -> None:
        begin = time.monotonic()
        self.run.states.write(self.fingerprint, self.state.step, asdict(self.state), self.trained.tensors())
        self._writing = time.monotonic() - begin
        self.after_snapshot()


def rate_factor(state: TrainingState, recipe: TrainingRecipe, steps: int) -> float:
    """Return the factor of the learning rate of the next of ``steps`` steps."""
    return state.patience.rate * schedule(state.step + 1, steps, recipe.warm_up, recipe.schedule)


def decide(state: TrainingState, trained: Trained, held_out: float) -> bool:
    """Keep the present weights if they are the best so far; else, with patience, go back."""
    verdict = state.patience.check(state.step, held_out)
    if verdict is Verdict.BETTER:
        trained.keep()
    elif verdict is not Verdict.WORSE:
        trained.restore()
        state.stopped = verdict is Verdict.STOP
    return verdict is Verdict.BETTER

"""The course of a training: the start is the first candidate, failure keeps the best weights, damage is made good."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from fistapruner.calibration.training_text import TrainingText
from fistapruner.recipes.recover_settings import RecoverRecipe
from fistapruner.runs.snapshots import Snapshots
from fistapruner.runs.steps import read_steps
from fistapruner.runs.training_directory import RecoverDirectory
from fistapruner.tuning.trainer import StepResult, Trainer, TrainingState, newest_state

STEPS = 8
TEXT = TrainingText(
    tokens=torch.zeros(STEPS + 1, 4, dtype=torch.int64),
    marks=torch.ones(STEPS + 1, 4, dtype=torch.bool),
    held_out=torch.arange(STEPS + 1) == STEPS,
    task=torch.zeros(STEPS + 1, dtype=torch.int64),
    tasks=("text",),
    facts={},
)


Change = Callable[[int, float], float]


class Parabola:
    """Descent on one number, whose loss is its square; ``loss_at`` and ``size_at`` change what a step measures."""

    def __init__(
        self, start: float = 1.0, rate: float = 0.1, loss_at: Change | None = None, size_at: Change | None = None
    ) -> None:
        self.value, self.best, self.rate = start, start, rate
        self.loss_at, self.size_at = (change or (lambda number, value: value) for change in (loss_at, size_at))
        self.taken: list[int] = []

    def losses(self, windows: list[int]) -> Tensor:
        return torch.full((len(windows),), 3 * self.value**2, dtype=torch.float64)

    def step(self, number: int, windows: list[int], factor: float) -> StepResult:
        self.taken.append(number)
        loss = self.loss_at(number, self.value**2)
        size = self.size_at(number, 2 * self.value if math.isfinite(loss) else math.nan)
        if math.isfinite(size):
            self.take(number, size, factor)
        return StepResult(loss, size)

    def take(self, number: int, slope: float, factor: float) -> None:
        self.value -= self.rate * factor * slope

    def keep(self) -> None:
        self.best = self.value

    def restore(self) -> None:
        self.value = self.best

    def tensors(self) -> dict[str, Tensor]:
        return {"state": torch.tensor([self.value, self.best], dtype=torch.float64)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.value, self.best = tensors["state"].tolist()


def train(
    folder: Path,
    stepper: Parabola,
    *,
    text: TrainingText = TEXT,
    checks: int = 4,
    **settings: Any,
) -> tuple[TrainingState, list[str]]:
    """Train as far as the stepper lets it; returns the state, and what was said."""
    folder.mkdir(exist_ok=True)
    said: list[str] = []
    order = torch.arange(STEPS)[:, None]
    recipe = RecoverRecipe(validation_checks=checks, warm_up=0.0, schedule="constant", **settings)
    run = RecoverDirectory(folder)
    settings = {"snapshot": newest_state(run, "this run"), "say": said.append}
    trainer = Trainer(run, "this run", recipe, text, order, stepper, stepper, **settings)  # type: ignore[arg-type]
    return trainer.train(), said


def journal(folder: Path) -> list[dict[str, Any]]:
    """The journal's lines without their times."""
    lines = read_steps(folder / "steps.jsonl")
    return [{key: line[key] for key in line if key != "seconds"} for line in lines]


class Killed(BaseException):
    """Not an error: what a signal does."""


def kill_at(step: int) -> Change:
    def loss_at(number: int, loss: float) -> float:
        if number == step:
            raise Killed
        return loss

    return loss_at


def test_a_descent_keeps_its_last_step(tmp_path: Path) -> None:
    stepper = Parabola()
    state, said = train(tmp_path, stepper)
    assert stepper.value == pytest.approx(0.8**8)
    assert (state.step, state.patience.best_step, state.fault) == (8, 8, None)
    assert state.patience.best == pytest.approx(stepper.value**2)
    assert [line["step"] for line in journal(tmp_path) if "held_out" in line] == [0, 2, 4, 6, 8]
    assert "step 8 of 8" in said[-1]


@pytest.mark.parametrize("settings", [{}, {"patience": False}], ids=["patience", "no patience"])
def test_steps_that_make_it_worse_leave_the_start(tmp_path: Path, settings: dict[str, Any]) -> None:
    stepper = Parabola(rate=1e9)
    state, said = train(tmp_path, stepper, checks=8, **settings)
    assert stepper.value == 1.0
    assert state.patience.best_step == 0
    assert state.fault is None
    assert state.step == (8 if settings else 4)
    assert ["training ends" in line for line in said if "not better" in line] == (
        [False] * 8 if settings else [False] * 3 + [True]
    )


@pytest.mark.parametrize(("writing", "steps"), [(0, [0, *range(1, 9)]), (500, [0, 5, 8])])
def test_snapshots_that_take_long_are_written_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writing: int, steps: list[int]
) -> None:
    """Every step takes 1000 s: more than lies between two snapshots that are written at once."""
    seconds, written, write = 0.0, [], Snapshots.write

    def slow(snapshots: Snapshots, fingerprint: str, step: int, *state: Any) -> None:
        nonlocal seconds
        seconds += writing
        written.append(step)
        write(snapshots, fingerprint, step, *state)

    def slow_step(number: int, loss: float) -> float:
        nonlocal seconds
        seconds += 1000
        return loss

    monkeypatch.setattr(
        "fistapruner.tuning.trainer.time", Mock(monotonic=lambda: seconds, perf_counter=lambda: seconds)
    )
    monkeypatch.setattr(Snapshots, "write", slow)
    stepper, quick = Parabola(loss_at=slow_step), Parabola()
    train(tmp_path / "slow", stepper, checks=1)
    assert written == steps
    train(tmp_path / "quick", quick, checks=1)
    assert stepper.value == quick.value


def test_the_step_is_kept_whose_mean_over_tasks_is_best(tmp_path: Path) -> None:
    """Each task counts alike, whatever its windows: the mean over all tokens would be best at the start."""

    class TwoTasks(Parabola):
        """The loss of the short task falls from 1 to 0 with the square; that of the long one rises from 1 to 1.5."""

        def losses(self, windows: list[int]) -> Tensor:
            loss = {STEPS: self.value**2}
            rising = 1.5 - self.value**2 / 2
            return torch.tensor([3 * loss.get(window, rising) for window in windows], dtype=torch.float64)

    windows = torch.arange(STEPS + 3)
    text = replace(
        TEXT,
        tokens=torch.zeros(STEPS + 3, 4, dtype=torch.int64),
        marks=torch.ones(STEPS + 3, 4, dtype=torch.bool),
        held_out=windows >= STEPS,
        task=(windows > STEPS).long(),
        tasks=("short", "long"),
    )
    stepper = TwoTasks()
    state, _ = train(tmp_path, stepper, text=text)
    assert state.patience.best_step == STEPS
    assert stepper.value == pytest.approx(0.8**STEPS)
    for line in (line for line in journal(tmp_path) if "held_out" in line):
        square = 0.8 ** (2 * line["step"])
        assert line["by_task"] == pytest.approx({"short": square, "long": 1.5 - square / 2})
        assert line["held_out"] == pytest.approx(0.75 + square / 4)
        assert line["kept"]


def infinite_at(step: int) -> Change:
    return lambda number, value: math.inf if number == step else value


@pytest.mark.parametrize(
    ("stepper", "what"), [(Parabola(loss_at=infinite_at(5)), "loss"), (Parabola(size_at=infinite_at(5)), "gradient")]
)
def test_a_loss_that_is_not_finite_ends_training_with_the_best_weights(
    tmp_path: Path, stepper: Parabola, what: str
) -> None:
    state, said = train(tmp_path, stepper)
    assert state.fault == f"the {what} is inf at step 5, at 1 of the first learning rate"
    assert state.fault in said
    assert (state.step, state.patience.best_step, stepper.value) == (5, 4, pytest.approx(0.8**4))
    again = Parabola()  # the fault is part of the run
    repeated, _ = train(tmp_path, again)
    assert (repeated, again.taken, again.value) == (state, [], stepper.value)


def test_a_model_that_is_not_finite_is_not_trained(tmp_path: Path) -> None:
    """Neither at first nor when the same command is given again."""
    for stepper in (Parabola(math.nan), Parabola(math.nan)):
        state, _ = train(tmp_path, stepper)
        assert state.fault == "the loss of the held-out windows is nan before training"
        assert stepper.taken == []


def test_without_gradients_three_losses_in_a_row_that_are_not_finite_end_training(tmp_path: Path) -> None:
    def loss_at(number: int, loss: float) -> float:
        return math.nan if number in (2, 4, 5, 6) else loss

    stepper = Parabola(loss_at=loss_at)
    state, _ = train(tmp_path, stepper, optimizer="mezo")
    assert (state.step, state.patience.best_step) == (6, 4)
    assert stepper.value == pytest.approx(0.8**2)
    lines = journal(tmp_path)
    for path in (tmp_path / "states").glob("00000006.*"):  # the kill came before the last state was written
        path.unlink()
    again = Parabola(loss_at=loss_at)
    repeated, _ = train(tmp_path, again, optimizer="mezo")
    assert (repeated, again.taken, again.value) == (state, [5, 6], stepper.value)
    assert journal(tmp_path) == lines


@pytest.mark.parametrize("states", ["at checks", "at every step"])
@pytest.mark.parametrize("optimizer", ["adamw", "mezo"])
@pytest.mark.parametrize("at", range(1, STEPS + 1))
def test_killed_at_any_step_it_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, at: int, states: str
) -> None:
    whole = Parabola()
    expected, _ = train(tmp_path / "whole", whole, optimizer=optimizer)
    if states == "at every step":  # any time is long after the last
        monkeypatch.setattr("fistapruner.tuning.trainer.snapshot_interval", lambda seconds: -1.0)
    with pytest.raises(Killed):
        train(tmp_path / "killed", Parabola(loss_at=kill_at(at)), optimizer=optimizer)
    stepper = Parabola()
    state, _ = train(tmp_path / "killed", stepper, optimizer=optimizer)
    assert (state, stepper.value) == (expected, whole.value)
    assert journal(tmp_path / "killed") == journal(tmp_path / "whole")
    # Nothing is passed again that a state holds.
    begun = at if states == "at every step" else at - (at - 1) % 2
    assert stepper.taken == list(range(begun, STEPS + 1))


@pytest.mark.parametrize("optimizer", ["adamw", "mezo"])
@pytest.mark.parametrize("damage", ["journal", "newest state", "both states", "journal is gone", "all states"])
def test_damage_is_made_good(tmp_path: Path, optimizer: str, damage: str) -> None:
    """The journal too: what was measured before a snapshot belongs to the run."""
    whole = Parabola()
    expected, _ = train(tmp_path, whole, optimizer=optimizer)
    lines = journal(tmp_path)
    states = sorted((tmp_path / "states").glob("*.safetensors"))
    if damage == "journal":
        data = (tmp_path / "steps.jsonl").read_bytes().splitlines(keepends=True)
        data[7] = data[7].replace(b'"step":7', b'"step":9')
        (tmp_path / "steps.jsonl").write_bytes(b"".join(data))
    elif damage == "journal is gone":
        (tmp_path / "steps.jsonl").unlink()
    else:
        for path in states[-1:] if damage == "newest state" else states:
            path.write_bytes(path.read_bytes()[:-1])
    stepper = Parabola()
    state, said = train(tmp_path, stepper, optimizer=optimizer)
    assert (state, stepper.value) == (expected, whole.value)
    assert journal(tmp_path) == lines
    after = {"journal": " after step 6", "journal is gone": ""}
    sentence = f"{tmp_path / 'steps.jsonl'} is gone or damaged{after.get(damage)}: the state of step 8 is not used"
    assert (sentence in said) == (damage in after)
    left = sorted(path.name for path in (tmp_path / "states").iterdir())
    assert left == ["00000006.json", "00000006.safetensors", "00000008.json", "00000008.safetensors"]

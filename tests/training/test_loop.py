"""The training loop: schedule, checks, the best step kept, a killed run goes on with the same bits."""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny
from fistapruner.papers.mezo import PUBLISHED as MEZO
from fistapruner.papers.spp import PUBLISHED as SPP
from fistapruner.runs.log import read_steps
from fistapruner.runs.store import Snapshots
from fistapruner.training.loop import OURS, Loop, State, check_due


class Point:
    """A number that steps move, and the best so far."""

    def __init__(self, value: float) -> None:
        self.value = self.best = value

    def keep(self) -> None:
        self.best = self.value

    def restore(self) -> None:
        self.value = self.best

    def tensors(self) -> dict[str, Tensor]:
        return {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in ("value", "best")}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.value, self.best = float(tensors["value"]), float(tensors["best"])

    def step(self, number: int, factor: float) -> tuple[float, float]:
        """A step towards 0 that is too long in the middle."""
        slope = 2 * self.value
        self.value -= factor * slope * (1.6 if number in (5, 6, 7) else 0.3)
        return self.value**2, abs(slope)


def test_the_learning_rate_rises_and_falls() -> None:
    factors = [OURS.factor(step, 100) for step in range(1, 101)]
    assert factors[:10] == [pytest.approx(step / 10) for step in range(1, 11)]
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert 0 < factors[-1] < 0.001
    assert {MEZO.factor(step, 50) for step in range(1, 51)} == {1.0}
    linear = [SPP.factor(step, 100) for step in range(4, 101)]
    assert all(a - b == pytest.approx(linear[0] - linear[1]) for a, b in itertools.pairwise(linear))


@pytest.mark.parametrize(("steps", "checks"), [(1, 1), (3, 3), (8, 8), (100, 8), (101, 8)])
def test_there_are_eight_checks_and_the_last_step_has_one(steps: int, checks: int) -> None:
    due = [step for step in range(1, steps + 1) if check_due(step, steps)]
    assert (len(due), due[-1]) == (checks, steps)


def test_the_best_step_is_kept() -> None:
    point, seen = Point(1.0), list[float]()

    def held_out() -> tuple[float, dict[str, float]]:
        seen.append(point.value**2)
        return seen[-1], {}

    state = Loop(point, 12, point.step, held_out).run()
    assert state.best == min(seen) == point.value**2
    assert state.best < state.before == 1.0
    assert state.rate < 1.0  # it went back
    rising = itertools.count(1)
    worse = Loop(Point(1.0), 9, lambda number, factor: (2.0, 1.0), lambda: (next(rising), {})).run()
    assert (worse.best_step, worse.stopped, worse.step) == (0, True, 4)
    stuck = Loop(point, 9, lambda number, factor: (math.nan, 1.0), held_out).run()
    assert (stuck.step, stuck.stopped) == (1, True)


def loop(folder: Path, point: Point, stop_at: int | None = None) -> Loop:
    def step(number: int, factor: float) -> tuple[float, float]:
        if number == stop_at:
            raise KeyboardInterrupt
        return point.step(number, factor)

    stored = {"states": Snapshots(folder / "states"), "journal": folder / "steps.jsonl", "fingerprint": "f"}
    return Loop(point, 20, step, lambda: (point.value**2, {}), **stored)


@pytest.mark.parametrize("stop_at", [1, 4, 9, 20])
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(tmp_path: Path, stop_at: int) -> None:
    whole, folder = Point(1.0), tmp_path / "whole"
    folder.mkdir()
    expected = loop(folder, whole).run(None)
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    with pytest.raises(KeyboardInterrupt):
        loop(stopped, Point(1.0), stop_at).run(None)
    snapshot = Snapshots(stopped / "states").newest("f")
    point = Point(0.0)
    point.load({name: snapshot.tensors.read(name) for name in snapshot.tensors.entries})
    assert loop(stopped, point).run(State(**snapshot.values)) == expected
    assert point.value == whole.value
    lines = [[{**line, "seconds": 0} for line in read_steps(each / "steps.jsonl")] for each in (folder, stopped)]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == [*range(expected.step + 1)]


def test_losses_that_are_no_numbers_end_the_run(tmp_path: Path) -> None:
    said, run = tiny.Said(), loop(tmp_path, Point(1.0))
    run.step, run.listener = lambda number, factor: (math.inf, 1.0), said
    assert (state := run.run(None)).fault == "the loss is inf at step 1, at 0.5 of the first learning rate"
    assert said.sentences[-1] == state.fault
    start = loop(tmp_path, Point(math.nan))
    assert "before training" in str(start.run(None).fault)

"""A run that is killed at any instant goes on with the same command and ends with the same bytes."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from faults.conftest import Runs

RANDOM_KILLS = 50


def test_random_kills(runs: Runs, disk: Path) -> None:
    """SIGKILL at random instants; two thirds of the resumed runs are killed again before they are left in peace."""
    generator = random.Random(0)
    kills = 0
    while kills < RANDOM_KILLS:
        out = disk / "run"
        for _ in range(3):
            kills += runs.run(out, kill_after=generator.uniform(0.0, runs.seconds)).status == -9
        runs.check_resumed(out)
        shutil.rmtree(out)


@pytest.mark.parametrize("first", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_kill_at_every_third_disk_call(runs: Runs, disk: Path, first: int) -> None:
    """From the first, the second or the third: together that is at every call."""
    for at in range(first, runs.calls + 1, 3):
        out = disk / str(at)
        assert runs.run(out, at=at, then="kill").status == -9
        runs.check_resumed(out)
        shutil.rmtree(out)


def test_kills_of_a_run_that_removes_structure(runs: Runs, disk: Path) -> None:
    """Tensors in new shapes, and a changed config: killed at every thirtieth disk call."""
    structure = ("--structure", "mlp=25%,heads=1", "--structure-multiple", "4")
    smaller = Runs(runs.process, (*runs.begin, *structure), disk / "undisturbed")
    smaller.measure()
    for at in range(1, smaller.calls + 1, 30):
        out = disk / str(at)
        assert smaller.run(out, at=at, then="kill").status == -9
        smaller.check_resumed(out)
        shutil.rmtree(out)


def test_kills_of_a_run_with_low_rank_parts(runs: Runs, disk: Path) -> None:
    """A checkpoint and an adapter, of which each names the other: killed at every thirtieth disk call."""
    summed = Runs(runs.process, (*runs.begin, "--low-rank", "2"), disk / "undisturbed")
    summed.measure()
    adapter = [path.read_bytes() for path in sorted((disk / "undisturbed" / "adapter").iterdir())]
    for at in range(1, summed.calls + 1, 30):
        out = disk / str(at)
        assert summed.run(out, at=at, then="kill").status == -9
        summed.check_resumed(out)
        assert [path.read_bytes() for path in sorted((out / "adapter").iterdir())] == adapter
        shutil.rmtree(out)


@pytest.mark.parametrize("then", ["tear", "power"])
def test_torn_writes_and_lost_power(runs: Runs, disk: Path, then: str) -> None:
    """Die half-way through every third write; die at every sixth call and lose what no fsync had made safe."""
    calls = runs.writes[::3] if then == "tear" else range(1, runs.calls + 1, 6)
    for at in calls:
        out = disk / str(at)
        assert runs.run(out, at=at, then=then).status == -9
        runs.check_resumed(out)
        shutil.rmtree(out)


def test_full_disk(runs: Runs, disk: Path) -> None:
    """The disk is full from the k-th call on: one line that says so, and the run goes on when there is room again."""
    for at in range(1, runs.calls + 1, 6):
        out = disk / str(at)
        outcome = runs.run(out, at=at, then="full")
        if outcome.status:  # after the last write there is nothing left to fail
            assert outcome.status == 2, outcome.stderr
            assert "the disk is full" in outcome.stderr.splitlines()[-1]
        runs.check_resumed(out)
        shutil.rmtree(out)


def test_interruption_says_how_to_go_on(runs: Runs, disk: Path) -> None:
    out = disk / "run"
    outcome = runs.run(out, at=2, then="interrupt")
    assert outcome.status == 130, outcome.stderr
    assert "give the same command again" in outcome.stderr.splitlines()[-1]
    outcome = runs.run(out, at=runs.calls // 2, then="interrupt")
    assert outcome.status == 130, outcome.stderr
    assert f"fistapruner resume {out}" in outcome.stderr.splitlines()[-1]
    assert json.loads((out / "run.json").read_text())["status"] == "running"
    runs.check_resumed(out)

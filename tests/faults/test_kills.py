"""A run that is killed at any instant goes on with the same command and ends with the same bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from faults.conftest import Runs

STEP = 12
"""Every how many disk calls a run is tested in every session of tests; the slow tests are at the calls between."""

FIRSTS = [1, *(pytest.param(first, marks=pytest.mark.slow) for first in range(2, STEP + 1))]


@pytest.mark.parametrize("wanted", [20, pytest.param(50, marks=pytest.mark.slow)])
def test_random_kills(runs: Runs, disk: Path, wanted: int) -> None:
    runs.check_random_kills(disk, wanted)


@pytest.mark.parametrize("first", FIRSTS)
def test_kill_at_a_disk_call(runs: Runs, disk: Path, first: int) -> None:
    """With the slow tests, at every one."""
    for at in range(first, runs.calls + 1, STEP):
        shutil.rmtree(runs.check_death(disk, at, "kill"))


def test_kills_of_a_run_that_removes_structure(runs: Runs, disk: Path) -> None:
    """Tensors in new shapes, and a changed config: killed at every sixtieth disk call."""
    structure = ("--structure", "mlp=25%,heads=1", "--set", "structure.multiple=4")
    smaller = Runs(runs.process, (*runs.begin, *structure), disk / "undisturbed")
    smaller.measure()
    for at in range(1, smaller.calls + 1, 60):
        shutil.rmtree(smaller.check_death(disk, at, "kill"))


def test_kills_of_a_run_with_low_rank_parts(runs: Runs, disk: Path) -> None:
    """A checkpoint and an adapter, of which each names the other: killed at every sixtieth disk call."""
    summed = Runs(runs.process, (*runs.begin, "--set", "low_rank=2"), disk / "undisturbed")
    summed.measure()
    adapter = [path.read_bytes() for path in sorted((disk / "undisturbed" / "adapter").iterdir())]
    for at in range(1, summed.calls + 1, 60):
        out = summed.check_death(disk, at, "kill")
        assert [path.read_bytes() for path in sorted((out / "adapter").iterdir())] == adapter
        shutil.rmtree(out)


@pytest.mark.parametrize("first", FIRSTS)
@pytest.mark.parametrize("then", ["tear", "power"])
def test_torn_writes_and_lost_power(runs: Runs, disk: Path, then: str, first: int) -> None:
    """Die half-way through a write; die at a call and lose what no fsync had made safe."""
    calls = runs.writes if then == "tear" else range(1, runs.calls + 1)
    for at in calls[first - 1 :: STEP]:
        shutil.rmtree(runs.check_death(disk, at, then))


@pytest.mark.parametrize("first", FIRSTS)
def test_full_disk(runs: Runs, disk: Path, first: int) -> None:
    """The disk is full from the k-th call on: one line that says so, and the run goes on when there is room again."""
    for at in range(first, runs.calls + 1, STEP):
        runs.check_full_disk(disk, at)


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

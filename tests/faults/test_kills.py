"""A run that is killed at any instant goes on with the same command and ends with the same bytes."""

import json
import shutil
from pathlib import Path

import pytest

from faults.conftest import Runs

slow = pytest.mark.slow
EVERY = [36, pytest.param(1, marks=slow)]
"""Every how many disk calls a run is tested in every session of tests, and in the slow ones."""


@pytest.mark.slow
def test_random_kills(runs: Runs, disk: Path) -> None:
    runs.check_random_kills(disk, 50)


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("then", ["kill", "tear", "power"])
def test_death_at_disk_calls(runs: Runs, disk: Path, then: str, every: int) -> None:
    """Die at a call; half-way through a write; or lose what no fsync had made safe as well."""
    calls = runs.writes if then == "tear" else range(1, runs.calls + 1)
    for at in calls[every // 3 :: max(every // (3 if then == "tear" else 1), 1)]:
        shutil.rmtree(runs.check_death(disk, at, then))


@pytest.mark.parametrize("every", EVERY)
def test_full_disk(runs: Runs, disk: Path, every: int) -> None:
    """The disk is full from the k-th call on: one line that says so, and the run goes on when there is room again."""
    for at in range(1, runs.calls + 1, every):
        runs.check_full_disk(disk, at)


@pytest.mark.parametrize(
    "settings",
    [("--structure", "mlp=25%,heads=1", "--set", "structure.multiple=4"), ("--set", "low_rank=2")],
    ids=["structure", "low rank"],
)
@pytest.mark.parametrize("every", [120, pytest.param(20, marks=slow)])
def test_kills_of_runs_that_write_more(runs: Runs, disk: Path, settings: tuple[str, ...], every: int) -> None:
    """Tensors in new shapes, and a changed config; a checkpoint and an adapter, of which each names the other."""
    more = Runs(runs.process, (*runs.begin, *settings), disk / "undisturbed")
    more.measure()

    def adapter(out: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in out.glob("adapter/*")}

    for at in range(every // 2, more.calls + 1, every):
        out = more.check_death(disk, at, "kill")
        assert adapter(out) == adapter(more.undisturbed)
        shutil.rmtree(out)


def test_interruption_says_how_to_go_on(runs: Runs, disk: Path) -> None:
    out = disk / "run"
    outcome = runs.run(out, at=2, then="interrupt")
    assert outcome.status == 130, outcome.stderr
    assert "give the command again" in outcome.stderr.splitlines()[-1]
    outcome = runs.run(out, at=runs.calls // 2, then="interrupt")
    assert outcome.status == 130, outcome.stderr
    assert f"fistapruner resume {out}" in outcome.stderr.splitlines()[-1]
    assert json.loads((out / "run.json").read_text())["status"] == "running"
    runs.check_resumed(out)

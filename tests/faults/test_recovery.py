"""A recovery that is killed, torn, damaged or starved at any instant goes on and ends with the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.conftest import Runs, digest, recovery, steps
from faults.test_damage import flip, rewrite
from fistapruner.cli import main

slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("recoveries", "kills"),
    [("adamw", 10), ("mezo", 10), *(pytest.param(name, 50, marks=slow) for name in ("adamw", "mezo", "subzero"))],
    indirect=["recoveries"],
)
def test_random_kills(recoveries: Runs, disk: Path, kills: int) -> None:
    recoveries.check_random_kills(disk, kills)


@pytest.mark.parametrize(
    ("then", "every"), [("power", 199), pytest.param("power", 3, marks=slow), pytest.param("kill", 2, marks=slow)]
)
def test_death_at_disk_calls(recoveries: Runs, disk: Path, then: str, every: int) -> None:
    """Die before a call; lose what no fsync had made safe as well."""
    assert recoveries.calls > 2 * every
    for at in range(every, recoveries.calls + 1, every):
        shutil.rmtree(recoveries.check_death(disk, at, then))


@pytest.mark.parametrize("every", [241, pytest.param(3, marks=slow)])
def test_torn_writes(recoveries: Runs, disk: Path, every: int) -> None:
    """Die half-way through a write: of a line of the journal, a state, a block of predictions, the checkpoint."""
    writes = recoveries.writes[every // 2 :: every]
    assert writes
    for at in writes:
        shutil.rmtree(recoveries.check_death(disk, at, "tear"))


@pytest.mark.parametrize("every", [331, pytest.param(5, marks=slow)])
def test_full_disk(recoveries: Runs, disk: Path, every: int) -> None:
    assert recoveries.calls > every
    for at in range(1, recoveries.calls + 1, every):
        recoveries.check_full_disk(disk, at)


def begun(recoveries: Runs, out: Path) -> Path:
    """A run that was killed in the middle of training."""
    assert recoveries.run(out, at=recoveries.calls // 2, then="kill").status == -9
    assert 0 < len(steps(out)) < 7
    return out


def test_interruption_says_how_to_go_on(recoveries: Runs, disk: Path) -> None:
    out = disk / "run"
    outcome = recoveries.run(out, at=2, then="interrupt")
    assert outcome.status == 130, outcome.stderr
    assert (
        outcome.stderr.splitlines()[-1] == "fistapruner: interrupted before the first step; give the same command again"
    )
    outcome = recoveries.run(out, at=recoveries.calls // 2, then="interrupt")
    assert outcome.status == 130, outcome.stderr
    last = steps(out)[-1]["step"]
    assert outcome.stderr.splitlines()[-1].startswith(
        f"fistapruner: interrupted after step {last} of 6; go on with: fistapruner resume {out}"
    )
    assert json.loads((out / "run.json").read_text())["status"] == "running"
    assert recoveries.do(["resume", str(out)]).status == 0
    assert digest(out / "model") == recoveries.expected


def test_status_of_a_run_that_was_killed(recoveries: Runs, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = begun(recoveries, disk / "run")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert main(["status", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["status"], facts["working"]) == ("running", False)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_stopped_between_training_and_writing(recoveries: Runs, disk: Path) -> None:
    """Nothing is trained again."""
    out = Path(shutil.copytree(recoveries.undisturbed, disk / "run"))
    for name in ("report.json", "model.json", "log.txt"):
        (out / name).unlink()
    shutil.rmtree(out / "model")
    assert recoveries.do(["resume", str(out)]).status == 0
    assert digest(out / "model") == recoveries.expected
    assert "held-out" not in (out / "log.txt").read_text()
    recoveries.check_resumed(out)


def newest(suffix: str, position: float) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        name = max(path.name for path in (out / "states").glob(f"*{suffix}"))
        flip(name, position)(out / "states")

    return damage


def drop_newest(out: Path) -> None:
    max((out / "states").glob("*.safetensors")).unlink()


def damage_all_states(out: Path) -> None:
    for path in (out / "states").glob("*.json"):
        path.write_bytes(path.read_bytes()[:-9])


def foreign_state(out: Path) -> None:
    """A state of a run with another seed, whose checksums are right."""
    for path in (out.with_name("other") / "states").iterdir():
        shutil.copy(path, out / "states")


def tear_line(out: Path) -> None:
    (out / "steps.jsonl").write_bytes((out / "steps.jsonl").read_bytes()[:-3])


def write_zeros(out: Path) -> None:
    """What some file systems leave of appended bytes when power fails."""
    data = (out / "steps.jsonl").read_bytes()
    (out / "steps.jsonl").write_bytes(data[:-40] + bytes(400))


def drop_journal(out: Path) -> None:
    (out / "steps.jsonl").unlink()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped bit in a line": flip("steps.jsonl", 0.4),
    "torn line": tear_line,
    "zeros in the journal": write_zeros,
    "journal gone": drop_journal,
    "flipped bit in the newest state": newest(".safetensors", 0.9),
    "flipped bit in the newest state's record": newest(".json", 0.5),
    "newest state gone": drop_newest,
    "all states": damage_all_states,
    "foreign state": foreign_state,
    "damaged log": flip("log.txt", 0.5),
    "damaged times": flip("times.json", 0.0),
}


RARE = ("flipped bit in the newest state's record", "newest state gone", "damaged log", "damaged times")


@pytest.mark.parametrize(
    "damage",
    [pytest.param(damage, id=name, marks=slow if name in RARE else ()) for name, damage in DAMAGES.items()],
)
def test_damage_is_made_good(recoveries: Runs, disk: Path, damage: Callable[[Path], None]) -> None:
    """In a run whose checkpoint is still to be written."""
    if damage is foreign_state:
        other = recoveries.run(disk / "other", "--seed", "5")
        assert other.status == 0, other.stderr
    out = Path(shutil.copytree(recoveries.undisturbed, disk / "run"))
    (out / "report.json").unlink()
    (out / "model.json").unlink()
    shutil.rmtree(out / "model")
    damage(out)
    recoveries.check_resumed(out)


def test_damaged_predictions_are_made_again(recoveries: Runs, disk: Path) -> None:
    out = begun(recoveries, disk / "run")
    blocks = [*(out / "teacher").glob("*.safetensors")]
    assert blocks
    blocks[0].write_bytes(blocks[0].read_bytes()[:-9])
    recoveries.check_resumed(out)


def test_a_run_without_gradients_goes_on(runs: Runs, disk: Path) -> None:
    mezo = recovery(runs, disk, "mezo")
    for kill in (0.4, 0.9):
        out = disk / str(kill)
        assert mezo.run(out, at=int(kill * mezo.calls), then="kill").status == -9
        mezo.check_resumed(out)


def test_damaged_windows_are_refused(recoveries: Runs, disk: Path) -> None:
    out = begun(recoveries, disk / "run")
    flip("windows.safetensors", 0.9)(out)
    outcome = recoveries.do(["resume", str(out)])
    assert outcome.status == 2
    assert "windows.safetensors is gone or damaged" in outcome.stderr.splitlines()[-1]


def test_other_versions_do_not_train_on(recoveries: Runs, disk: Path) -> None:
    out = begun(recoveries, disk / "run")
    rewrite(out, lambda content: content["versions"].update(torch="1.0"))
    outcome = recoveries.run(out)
    assert outcome.status == 2
    assert "began with torch 1.0" in outcome.stderr

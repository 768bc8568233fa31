"""A recovery or alignment that is killed, torn, damaged or starved at any instant ends with the same bytes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from faults.conftest import Runs, digest, steps
from faults.test_damage import cut_to, flip

slow = pytest.mark.slow
QUICK = [("adamw", "power", 199), ("adamw", "tear", 241), ("adamw", "full", 331)]
QUICK += [("mezo", "power", 211), ("align", "power", 233)]
RARE = [(name, then, 5) for name in ("adamw", "mezo", "subzero", "align") for then in ("power", "tear", "full", "kill")]


@pytest.mark.slow
def test_random_kills(trainings: Runs, disk: Path) -> None:
    trainings.check_random_kills(disk, 50)


@pytest.mark.parametrize(
    ("trainings", "then", "every"),
    [*QUICK, *(pytest.param(*calls, marks=slow) for calls in RARE)],
    indirect=["trainings"],
)
def test_death_at_disk_calls(trainings: Runs, disk: Path, then: str, every: int) -> None:
    """Die before a call; lose what no fsync had made safe as well; die in a write; have no room on the disk."""
    calls = trainings.writes if then == "tear" else range(1, trainings.calls + 1)
    assert len(calls) > every // 2
    for at in calls[every // 2 :: every]:
        if then == "full":
            trainings.check_full_disk(disk, at)
        else:
            shutil.rmtree(trainings.check_death(disk, at, then))


def begun(trainings: Runs, out: Path) -> Path:
    """A run that was killed in the middle of training."""
    assert trainings.run(out, at=trainings.calls // 2, then="kill").status == -9
    assert 0 < len(steps(out)) < 7
    return out


def test_interruption_says_how_to_go_on(recoveries: Runs, disk: Path, cli: tiny.Cli) -> None:
    """And ``status`` that nothing works on it."""
    out = disk / "run"
    outcome = recoveries.run(out, at=2, then="interrupt")
    assert outcome.status == 130, outcome.stderr
    assert outcome.stderr.splitlines()[-1].endswith("interrupted; give the command again")
    outcome = recoveries.run(out, at=recoveries.calls // 2, then="interrupt")
    assert outcome.status == 130, outcome.stderr
    assert f"interrupted; go on with: fistapruner resume {out}" in outcome.stderr
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    facts = json.loads(cli("status", out, "--json").out)
    assert (facts["status"], facts["working"]) == ("running", False)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert recoveries.do(["resume", str(out)]).status == 0
    assert digest(out / "model") == recoveries.expected


def newest(suffix: str, position: float) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        name = max(path.name for path in (out / "states").glob(f"*{suffix}"))
        flip(name, position)(out / "states")

    return damage


def foreign_state(out: Path) -> None:
    """A state of a run with another seed, whose checksums are right."""
    for path in (out.with_name("other") / "states").iterdir():
        shutil.copy(path, out / "states")


def write_zeros(out: Path) -> None:
    """What some file systems leave of appended bytes when power fails."""
    cut_to("steps.jsonl", -40, bytes(400))(out)


def damage_all_states(out: Path) -> None:
    for path in (out / "states").glob("*.json"):
        cut_to(path.name, -9)(path.parent)


def drop(name: str) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()

    return damage


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped bit in a line": flip("steps.jsonl", 0.4),
    "zeros in the journal": write_zeros,
    "flipped bit in the newest state": newest(".safetensors", 0.9),
    "all states": damage_all_states,
    "foreign state": foreign_state,
}
OTHERS: dict[str, Callable[[Path], None]] = {
    "journal gone": drop("steps.jsonl"),
    "flipped bit in the newest state's record": newest(".json", 0.5),
    "newest state gone": lambda out: max((out / "states").glob("*.safetensors")).unlink(),
    "damaged log": flip("log.txt", 0.5),
    "damaged times": flip("times.json", 0.0),
}


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(damage, id=name, marks=slow if name in OTHERS else ())
        for name, damage in (DAMAGES | OTHERS).items()
    ],
)
def test_damage_is_made_good(recoveries: Runs, disk: Path, damage: Callable[[Path], None]) -> None:
    """In a run whose checkpoint is still to be written."""
    if damage is foreign_state:
        recoveries.unwritten(disk / "other", "--seed", "5")
    out = recoveries.unwritten(disk / "run")
    damage(out)
    recoveries.check_resumed(out)


def test_stopped_between_training_and_writing(recoveries: Runs, disk: Path) -> None:
    """Nothing is trained again."""
    out = recoveries.unwritten(disk / "run")
    drop("log.txt")(out)
    recoveries.check_resumed(out)
    assert "held-out" not in (out / "log.txt").read_text()


@pytest.mark.parametrize("name", ["teacher", "references.safetensors", "states"])
def test_what_is_lost_in_the_middle_is_made_again(recoveries: Runs, alignments: Runs, disk: Path, name: str) -> None:
    """Predictions of the dense model, and references of an alignment."""
    made = alignments if name == "references.safetensors" else recoveries
    out = begun(made, disk / "run")
    if name == "states":
        drop(name)(out)
    else:
        file = out / name if (out / name).is_file() else next((out / name).glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-9])
    made.check_resumed(out)


def test_changed_pairs_are_not_read_and_damaged_windows_refused(alignments: Runs, disk: Path) -> None:
    """A run keeps the windows that it cut."""
    out = begun(alignments, disk / "run")
    pairs = Path(json.loads((out / "run.json").read_text())["recipe"]["data"]["pairs"])
    before = pairs.read_text()
    try:
        pairs.write_text(before.replace("nice", "bad"))
        outcome = alignments.run(out)
        assert outcome.status == 0, outcome.stderr
    finally:
        pairs.write_text(before)
    alignments.check_resumed(out)
    unfinished = begun(alignments, disk / "unfinished")
    flip("windows.safetensors", 0.9)(unfinished)
    outcome = alignments.do(["resume", str(unfinished)])
    assert outcome.status == 2
    assert "windows.safetensors is gone or damaged" in outcome.stderr.splitlines()[-1]

"""The journal of steps and the snapshots: what is whole is read, what is torn is made again."""

import random
from pathlib import Path

import pytest
import torch

from fistapruner.runs.log import StepJournal, read_steps
from fistapruner.runs.store import Snapshots


def write(path: Path, count: int) -> list[dict[str, object]]:
    lines: list[dict[str, object]] = [{"step": step, "loss": 1 / 3 + step * 1e-17, "g": None} for step in range(count)]
    with StepJournal(path, -1) as journal:
        for line in lines:
            journal.append(line)
    return lines


def test_a_journal_that_is_cut_or_changed_anywhere_gives_its_first_whole_lines(tmp_path: Path) -> None:
    """An unharmed one gives all, to the last bit."""
    assert read_steps(tmp_path / "steps.jsonl") == []
    lines = write(tmp_path / "steps.jsonl", 12)
    assert read_steps(tmp_path / "steps.jsonl") == lines
    data = (tmp_path / "steps.jsonl").read_bytes()
    draw = random.Random(0)
    for _ in range(300):
        place = draw.randrange(len(data))
        damaged = data[:place] if draw.random() < 0.5 else data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        (tmp_path / "steps.jsonl").write_bytes(damaged)
        assert read_steps(tmp_path / "steps.jsonl") == lines[: data[:place].count(b"\n")]


def test_lines_after_the_last_kept_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    lines = write(path, 9)
    with open(path, "ab") as file:
        file.write(b'{"step": 9, "lo')
    with StepJournal(path, 5) as journal:
        journal.append({"step": 6, "loss": 2.0})
    assert read_steps(path) == [*lines[:6], {"step": 6, "loss": 2.0}]


def test_the_newest_whole_snapshot_of_the_run_is_taken(tmp_path: Path) -> None:
    states = Snapshots(tmp_path / "states")
    assert states.newest("run") is None
    for step in (1, 2, 3):
        states.write("run", step, {"best": step / 3}, {"theta": torch.full((3,), float(step)), "empty": torch.ones(0)})
    assert sorted(path.stem for path in states.folder.glob("*.json")) == ["00000002", "00000003"]
    found = states.newest("run")
    assert found.step == 3
    assert found.values == {"best": 1.0}
    assert torch.equal(found.tensors.read("theta"), torch.full((3,), 3.0))
    assert states.newest("another run") is None


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_snapshot_without_one_of_its_files_leaves_the_one_before(tmp_path: Path, suffix: str) -> None:
    """Damaged ones: ``tests/fuzz``."""
    states = Snapshots(tmp_path / "states")
    for step in (7, 8):
        states.write("run", step, {}, {"theta": torch.full((300,), float(step))})
    (states.folder / f"00000008.{suffix}").unlink()
    found = states.newest("run")
    assert found.step == 7


def test_what_a_killed_attempt_left_is_removed(tmp_path: Path) -> None:
    """States of steps that the run has not come to again, and tensors without a record."""
    states = Snapshots(tmp_path / "states")
    states.tidy(-1)  # there is nothing yet
    for step in (3, 5):
        states.write("run", step, {}, {"theta": torch.ones(3)})
    (states.folder / "00000004.safetensors").write_bytes(b"")
    (states.folder / "00000005.safetensors.partial").write_bytes(b"")
    (states.folder / "notes.txt").write_text("mine")
    states.tidy(5)
    names = ["00000003.json", "00000003.safetensors", "00000005.json", "00000005.safetensors", "notes.txt"]
    assert sorted(path.name for path in states.folder.iterdir()) == names
    states.write("run", 4, {}, {"theta": torch.ones(3)})
    assert sorted(path.stem for path in states.folder.glob("*.json")) == ["00000003", "00000004"]

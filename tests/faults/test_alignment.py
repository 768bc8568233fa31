"""An alignment that is killed, torn or damaged at any instant goes on and ends with the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.conftest import Runs, digest, steps
from faults.test_damage import flip

slow = pytest.mark.slow


@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=slow)])
def test_random_kills(alignments: Runs, disk: Path, kills: int) -> None:
    alignments.check_random_kills(disk, kills)


@pytest.mark.parametrize(("then", "every"), [("power", 233), pytest.param("power", 3, marks=slow)])
def test_death_at_disk_calls(alignments: Runs, disk: Path, then: str, every: int) -> None:
    """Die before a call; lose what no fsync had made safe as well."""
    assert alignments.calls > every // 2
    for at in range(every // 2, alignments.calls + 1, every):
        shutil.rmtree(alignments.check_death(disk, at, then))


@pytest.mark.parametrize("every", [101, pytest.param(3, marks=slow)])
def test_torn_writes(alignments: Runs, disk: Path, every: int) -> None:
    writes = alignments.writes[every // 3 :: every]
    assert writes
    for at in writes:
        shutil.rmtree(alignments.check_death(disk, at, "tear"))


def drop(name: str) -> Callable[[Path], None]:
    return lambda out: (out / name).unlink()


@pytest.mark.parametrize(
    "damage",
    [
        flip("references.safetensors", 0.99),
        drop("references.safetensors"),
        lambda out: shutil.rmtree(out / "states"),
    ],
    ids=["references damaged", "references gone", "states gone"],
)
def test_damage_in_the_middle(alignments: Runs, disk: Path, damage: Callable[[Path], None]) -> None:
    """References are computed again; what was computed with them is the same."""
    out = disk / "run"
    assert alignments.run(out, at=alignments.calls // 2, then="kill").status == -9
    assert 0 < len(steps(out)) < 7
    damage(out)
    assert alignments.do(["resume", str(out)]).status == 0
    assert digest(out / "model") == alignments.expected
    alignments.check_resumed(out)


def test_other_settings_are_refused_and_changed_pairs_are_not_read(alignments: Runs, disk: Path) -> None:
    out = disk / "run"
    assert alignments.run(out, at=alignments.calls // 2, then="kill").status == -9
    outcome = alignments.run(out, "--set", "beta=0.2")
    assert outcome.status == 2
    assert "holds a run with beta = 0.1, this one has 0.2" in outcome.stderr
    pairs = Path(json.loads((out / "run.json").read_text())["recipe"]["data"]["pairs"])
    before = pairs.read_text()
    try:
        pairs.write_text(before.replace("nice", "bad"))
        outcome = alignments.run(out)  # which keeps the windows that it cut
        assert outcome.status == 0, outcome.stderr
    finally:
        pairs.write_text(before)
    alignments.check_resumed(out)

"""Layer files and records that are torn, damaged, swapped or of another run are found and made again, never trusted."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults.conftest import Runs


def truncate(layers: Path) -> None:
    file = layers / "0001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip(name: str, position: float) -> Callable[[Path], None]:
    def damage(layers: Path) -> None:
        data = bytearray((layers / name).read_bytes())
        data[int(position * (len(data) - 1))] ^= 4
        (layers / name).write_bytes(data)

    return damage


def swap(suffixes: tuple[str, ...]) -> Callable[[Path], None]:
    def damage(layers: Path) -> None:
        for suffix in suffixes:
            first, second = layers / f"0000{suffix}", layers / f"0001{suffix}"
            first.rename(layers / "aside")
            second.rename(first)
            (layers / "aside").rename(second)

    return damage


def foreign(layers: Path) -> None:
    """A layer of a run with other settings, whose checksums are all right."""
    shutil.copy(layers.parent.with_name("other") / "layers" / "0001.json", layers)
    shutil.copy(layers.parent.with_name("other") / "layers" / "0001.safetensors", layers)


def drop_tensors(layers: Path) -> None:
    (layers / "0000.safetensors").unlink()


def empty_record(layers: Path) -> None:
    (layers / "0000.json").write_bytes(b"")


def deep_record(layers: Path) -> None:
    (layers / "0000.json").write_text("[" * 100_000)


DAMAGES = {
    "truncated tensors": truncate,
    "flipped bit in a header": flip("0000.safetensors", 0.001),
    "flipped bit in a tensor": flip("0001.safetensors", 0.9),
    "flipped bit in a record": flip("0000.json", 0.5),
    "flipped last bit of a record": flip("0000.json", 1.0),
    "swapped tensors": swap((".safetensors",)),
    "swapped records": swap((".json",)),
    "swapped layers": swap((".json", ".safetensors")),
    "foreign layer": foreign,
    "tensors gone": drop_tensors,
    "empty record": empty_record,
    "endless record": deep_record,
    "damaged calibration tokens": flip("../calibration.safetensors", 0.9),
    "damaged report": flip("../report.json", 0.0),
    "damaged log": flip("../log.txt", 0.5),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_made_good(runs: Runs, disk: Path, damage: Callable[[Path], None]) -> None:
    out = disk / "run"
    shutil.copytree(runs.undisturbed, out)
    shutil.rmtree(out / "model")
    if damage is foreign:
        other = runs.run(disk / "other", "--seed", "5")
        assert other.status == 0, other.stderr
    (out / "log.txt").write_text("an older line\n")
    damage(out / "layers")
    runs.check_resumed(out)
    log = (out / "log.txt").read_text()
    if damage not in (DAMAGES["damaged report"], DAMAGES["damaged log"]):
        assert "again" in log


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_folder_in_the_place_of_a_layer_is_named(runs: Runs, disk: Path, suffix: str) -> None:
    out = disk / "run"
    shutil.copytree(runs.undisturbed, out)
    shutil.rmtree(out / "model")
    place = out / "layers" / f"0001{suffix}"
    place.unlink()
    place.mkdir()
    outcome = runs.run(out)
    assert outcome.status == 2
    said = f"fistapruner: cannot write {place}: a folder is in its place: move the folder away"
    assert outcome.stderr.splitlines()[-1] == said
    place.rmdir()
    runs.check_resumed(out)


def test_damaged_run_json_is_refused(runs: Runs, disk: Path) -> None:
    """What a run decided cannot be guessed again; a run whose decisions are damaged is refused, not continued."""
    out = disk / "run"
    shutil.copytree(runs.undisturbed, out)
    shutil.rmtree(out / "model")
    content = json.loads((out / "run.json").read_text())
    content["decision"]["numerics"]["batch_size"] += 1
    (out / "run.json").write_text(json.dumps(content))
    outcome = runs.run(out)
    assert outcome.status == 2
    assert "run.json is damaged" in outcome.stderr


def rewrite(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a run's decisions as if they had been written so, checksum and all."""
    content = json.loads((out / "run.json").read_text())
    del content["sha256"]
    change(content)
    content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (out / "run.json").write_text(json.dumps(content))


def test_run_of_another_format_is_refused(runs: Runs, disk: Path) -> None:
    out = disk / "run"
    shutil.copytree(runs.undisturbed, out)
    rewrite(out, lambda content: content.pop("format"))
    outcome = runs.run(out)
    assert outcome.status == 2
    assert "another release of fistapruner" in outcome.stderr


def test_other_versions_prune_no_more_layers_of_a_run(runs: Runs, disk: Path) -> None:
    """What is pruned already is written again as it was."""
    out = disk / "run"
    shutil.copytree(runs.undisturbed, out)
    shutil.rmtree(out / "model")
    rewrite(out, lambda content: content["versions"].update(torch="1.0"))
    assert runs.run(out).status == 0
    shutil.rmtree(out / "model")
    (out / "layers" / "0000.json").unlink()
    outcome = runs.run(out)
    assert outcome.status == 2
    assert "began with torch 1.0" in outcome.stderr
    assert (out / "layers" / "0001.safetensors").exists()


def test_other_settings_are_refused(runs: Runs, disk: Path) -> None:
    out = disk / "run"
    shutil.copytree(runs.undisturbed, out)
    for flags, named in (
        (("--sparsity", "60%"), 'sparsity = "2:4", this one has "60%"'),
        (("--seed", "7"), "seed = 0, this one has 7"),
    ):
        outcome = runs.run(out, *flags)
        assert outcome.status == 2
        assert f"holds a run with {named}: name another folder ('fistapruner resume {out}' goes on" in outcome.stderr

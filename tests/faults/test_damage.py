"""Layer files and records that are torn, damaged, swapped or of another run are found and made again, never trusted."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.conftest import Runs


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


def cut_to(name: str, end: int | None, then: bytes = b"") -> Callable[[Path], None]:
    def damage(layers: Path) -> None:
        (layers / name).write_bytes((layers / name).read_bytes()[:end] + then)

    return damage


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated tensors": cut_to("0001.safetensors", -1),
    "flipped bit in a tensor": flip("0001.safetensors", 0.9),
    "flipped bit in a record": flip("0000.json", 0.5),
    "swapped tensors": swap((".safetensors",)),
    "swapped records": swap((".json",)),
    "swapped layers": swap((".json", ".safetensors")),
    "foreign layer": foreign,
    "tensors gone": lambda layers: (layers / "0000.safetensors").unlink(),
    "empty record": cut_to("0000.json", 0),
    "endless record": cut_to("0000.json", 0, b"[" * 100_000),
    "damaged calibration tokens": flip("../calibration.safetensors", 0.9),
    "damaged log": flip("../log.txt", 0.5),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_made_good(runs: Runs, disk: Path, damage: Callable[[Path], None]) -> None:
    out = runs.unwritten(disk / "run")
    if damage is foreign:
        runs.unwritten(disk / "other", "--seed", "5")
    (out / "log.txt").write_text("an older line\n")
    damage(out / "layers")
    runs.check_resumed(out)
    log = (out / "log.txt").read_text()
    if damage is not DAMAGES["damaged log"]:
        assert "does not count" in log or "made again" in log

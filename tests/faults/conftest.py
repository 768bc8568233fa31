"""A tiny model, a run of it that nothing happened to, and the warm process that the faulty ones are forked from."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tiny

SETTINGS = ["--method", "sparsegpt", "--dense-target", "0.5", "--residual", "correct", "--sparsity", "2:4"]
SETTINGS += ["--samples", "4", "--seqlen", "16", "--evaluate", "none"]


@dataclass
class Outcome:
    """How a run ended: exit status (negative: the signal that killed it), disk calls it made, which of them were
    writes, what it said."""

    status: int
    calls: int
    writes: list[int]
    stderr: str


@dataclass
class Runs:
    """Starts runs of one tiny model with faults, and knows the checkpoint they must end with."""

    process: subprocess.Popen[str]
    model: Path
    text: Path
    undisturbed: Path
    expected: str = ""
    calls: int = 0
    writes: tuple[int, ...] = ()
    seconds: float = 0.0

    def command(self, out: Path, *more: str) -> list[str]:
        return ["prune", str(self.model), "--out", str(out), "--calibration", str(self.text), *SETTINGS, *more]

    def run(self, out: Path, *more: str, **fault: Any) -> Outcome:
        return self.do(self.command(out, *more), **fault)

    def do(self, command: list[str], **fault: Any) -> Outcome:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"command": command, "fault": fault}) + "\n")
        self.process.stdin.flush()
        return Outcome(**json.loads(self.process.stdout.readline()))

    def check_resumed(self, out: Path, *more: str) -> None:
        """The same command again must end well, with the bytes of the undisturbed run, and leave nothing behind."""
        outcome = self.run(out, *more)
        assert outcome.status == 0, outcome.stderr
        assert digest(out / "model") == self.expected
        assert not [path for path in out.rglob("*") if path.name.endswith(".partial")]
        assert not [*out.glob("lock*"), *out.glob("hidden")]


def digest(folder: Path) -> str:
    """Checksum of all files of a checkpoint, but for what has times in it: the model card, and stages of the
    lineage."""
    parts = [
        f"{path.name} {hashlib.sha256(content(path)).hexdigest()}"
        for path in sorted(folder.iterdir())
        if path.name != "README.md"
    ]
    assert len(parts) >= 4
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def content(path: Path) -> bytes:
    """The bytes of a file; of the record without the command, date and duration of each stage."""
    if path.name != "fistapruner.json":
        return path.read_bytes()
    record = json.loads(path.read_text())
    for stage in record["lineage"]["stages"]:
        del stage["command"], stage["finished"], stage["figures"]["seconds"]
    return json.dumps(record).encode()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder in main memory where the system has one: hundreds of runs would wait minutes for fsync on a real
    disk."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared, prefix="fistapruner-test-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("faults")
    model = tiny.save("llama", folder / "model", shard="60KB", num_hidden_layers=2)
    text = folder / "text.txt"
    text.write_text("\n".join(f"{number} is followed by {number + 1}, as everybody knows." for number in range(200)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    script = str(Path(__file__).with_name("zygote.py"))
    with subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        made = Runs(process, model, text, folder / "undisturbed")
        begin = time.perf_counter()
        outcome = made.run(made.undisturbed)
        made.seconds = time.perf_counter() - begin
        assert outcome.status == 0, outcome.stderr
        made.expected, made.calls, made.writes = (
            digest(made.undisturbed / "model"),
            outcome.calls,
            tuple(outcome.writes),
        )
        yield made
        assert process.stdin is not None
        process.stdin.close()

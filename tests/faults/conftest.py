"""A tiny model, a run of it that nothing happened to, and the warm process that the faulty ones are forked from."""

import hashlib
import json
import os
import random
import shutil
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
from fistapruner.runs.log import read_steps
from fistapruner.runtime.files import unfinished

SETTINGS = ["--method", "sparsegpt", "--set", "dense_target=0.5", "--set", "residual=correct", "--sparsity", "2:4"]
SETTINGS += ["--samples", "4", "--seqlen", "16", "--evaluate", "none"]

ALIGNMENT = ["--steps", "6", "--set", "pairs_per_step=2", "--set", "rank=4", "--evaluate", "none"]
ALIGNMENT += ["--lr", "1e-3", "--loss", "harmonic", "--set", "anchor=0.1"]

RECOVERY = ["--steps", "6", "--tokens", "200", "--evaluate", "none", "--set", "windows_per_step=2"]
RECOVERY += ["--set", "data.seqlen=16", "--set", "data.held_out=0.1", "--set", "rank=4"]


@dataclass
class Outcome:
    """How a run ended: exit status (negative: the signal that killed it), its disk calls, which are writes."""

    status: int
    calls: int
    writes: list[int]
    stderr: str


@dataclass
class Runs:
    """Starts runs of one tiny model with faults, and knows the checkpoint they must end with.

    ``begin`` is the command less ``--out``; ``undisturbed`` the run directory of a run that nothing happened to.
    """

    process: subprocess.Popen[str]
    begin: tuple[str, ...]
    undisturbed: Path
    expected: str = ""
    calls: int = 0
    writes: tuple[int, ...] = ()
    seconds: float = 0.0

    def command(self, out: Path, *more: str) -> list[str]:
        return [*self.begin, "--out", str(out), *more]

    def warm(self) -> None:
        """Let the process do the run itself, so that those that it forks are quick."""
        out = self.undisturbed.with_name("warm")
        self.ask(command=self.command(out), warm=True)
        shutil.rmtree(out)

    def run(self, out: Path, *more: str, **fault: Any) -> Outcome:
        return self.do(self.command(out, *more), **fault)

    def do(self, command: list[str], **fault: Any) -> Outcome:
        return Outcome(**self.ask(command=command, fault=fault))

    def ask(self, **request: Any) -> Any:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def measure(self) -> None:
        """Make the run that nothing happens to."""
        self.warm()
        begin = time.perf_counter()
        outcome = self.run(self.undisturbed)
        self.seconds = time.perf_counter() - begin
        assert outcome.status == 0, outcome.stderr
        self.expected = digest(self.undisturbed / "model")
        self.calls, self.writes = outcome.calls, tuple(outcome.writes)

    def unwritten(self, out: Path, *more: str) -> Path:
        """Make a run that dies when it begins to write its checkpoint; return its folder."""
        assert self.run(out, *more, name=unfinished(out / "model").name, then="kill").status == -9
        return out

    def check_resumed(self, out: Path, *more: str) -> None:
        """The same command again must end well, with the bytes of the undisturbed run, and leave nothing behind."""
        outcome = self.run(out, *more)
        assert outcome.status == 0, outcome.stderr
        assert digest(out / "model") == self.expected
        assert not [path for path in out.rglob("*") if path.name.endswith(".partial")]
        assert {path.name for path in out.iterdir()} == {path.name for path in self.undisturbed.iterdir()}
        assert steps(out) == steps(self.undisturbed)

    def check_death(self, disk: Path, at: int, then: str) -> Path:
        """Die at a disk call; what is resumed must end well. Returns its folder."""
        out = disk / str(at)
        assert self.run(out, at=at, then=then).status == -9
        self.check_resumed(out)
        return out

    def check_random_kills(self, disk: Path, kills: int) -> None:
        """SIGKILL at random instants, up to three times before the run is left in peace."""
        generator = random.Random(kills)
        while kills > 0:
            out = disk / "run"
            for _ in range(3):
                kills -= self.run(out, kill_after=generator.uniform(0.0, self.seconds)).status == -9
            self.check_resumed(out)
            shutil.rmtree(out)

    def check_full_disk(self, disk: Path, at: int) -> None:
        """The disk is full from a call on: one line that says so, and the run goes on when there is room again."""
        out = disk / str(at)
        outcome = self.run(out, at=at, then="full")
        if outcome.status:  # after the last write there is nothing left to fail
            assert outcome.status == 2, outcome.stderr
            assert "the disk is full" in outcome.stderr.splitlines()[-1]
            assert "Traceback" not in outcome.stderr
        self.check_resumed(out)
        shutil.rmtree(out)


def digest(folder: Path) -> str:
    """Checksum of all files of a checkpoint, but for what has times in it: the card, and stages of the lineage."""
    files = [path for path in sorted(folder.iterdir()) if path.name != "README.md"]
    parts = [f"{path.name} {hashlib.sha256(content(path)).hexdigest()}" for path in files]
    assert len(parts) >= 4
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def content(path: Path) -> bytes:
    """The bytes of a file; of the record without the command and date of each stage."""
    if path.name != "fistapruner.json":
        return path.read_bytes()
    record = json.loads(path.read_text())
    for stage in record["lineage"]["stages"]:
        del stage["command"], stage["finished"]
    return json.dumps(record).encode()


def steps(out: Path) -> list[dict[str, Any]]:
    """The journal of a recovery without times; empty for other runs."""
    return [{key: line[key] for key in line if key != "seconds"} for line in read_steps(out / "steps.jsonl")]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder in main memory where the system has one: on a disk, hundreds of runs would wait minutes for fsync."""
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
        assert process.stdout.readline() == "ready\n"
        begin = ("prune", str(model), "--calibration", str(text), *SETTINGS)
        made = Runs(process, begin, folder / "undisturbed")
        made.measure()
        yield made
        process.stdin.close()


@pytest.fixture(scope="session")
def recoveries(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Recoveries of the pruned model by backpropagation."""
    return recovery(runs, tmp_path_factory.mktemp("recoveries"), "adamw")


@pytest.fixture(scope="session")
def alignments(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Alignments of the pruned model, with both references and the anchor."""
    folder = tmp_path_factory.mktemp("alignments")
    lines = [{"prompt": f"{n} is", "chosen": f" before {n + 1}.", "rejected": " nice."} for n in range(30)]
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    begin = ("align", str(runs.undisturbed), "--data", str(pairs), *ALIGNMENT)
    made = Runs(runs.process, begin, folder / "undisturbed")
    made.measure()
    return made


def recovery(runs: Runs, folder: Path, optimizer: str) -> Runs:
    """Recoveries of the pruned model; the first is made."""
    begin = ("recover", str(runs.undisturbed), "--set", f"optimizer={optimizer}", *RECOVERY)
    made = Runs(runs.process, begin, folder / "undisturbed")
    made.measure()
    return made


@pytest.fixture(scope="session", params=["adamw", "mezo", "subzero", "align"])
def trainings(
    runs: Runs,
    alignments: Runs,
    recoveries: Runs,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Runs:
    """Recoveries by backpropagation and by forward passes only, and alignments."""
    made = {"adamw": recoveries, "align": alignments}.get(request.param)
    return made or recovery(runs, tmp_path_factory.mktemp("trainings"), request.param)

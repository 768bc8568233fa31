"""Two processes of torchrun train one model: curves of one process, states together, one sentence where one dies."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from fistapruner.cli import main
from fistapruner.runs.log import read_steps
from fistapruner.runs.records import load_run
from fistapruner.training import masked
from forked import FORKS

COMMON = ("--evaluate", "none", "--set", "execution.threads=1", "--set", "rank=4", "--quiet")
RECOVERY = ("--set", "data.seqlen=16", "--tokens", "300", "--steps", "12", "--set", "windows_per_step=4")
ALIGNMENT = ("--steps", "4", "--set", "pairs_per_step=4", "--lr", "1e-3", "--loss", "geometric", "--set", "anchor=0.1")


def command(bench: tiny.Bench, verb: str, out: Path, *more: str) -> list[str]:
    settings, data = (RECOVERY, bench.text) if verb == "recover" else (ALIGNMENT, bench.pairs)
    return [verb, str(bench.pruned()), *settings, "--data", str(data), *COMMON, *more, "--out", str(out)]


class Pair:
    """Two processes of one run, forked from a server that has imported PyTorch; as torchrun would start them."""

    def __init__(self, arguments: list[str], said: Path, before: Callable[[], None] | None = None) -> None:
        port = tiny.free_port()
        self.files = [said.with_name(f"{said.name}-{rank}") for rank in range(2)]
        self.processes = [
            FORKS.Process(target=process, args=(rank, port, arguments, str(self.files[rank]), before))
            for rank in range(2)
        ]
        for each in self.processes:
            each.start()

    def finish(self) -> list[int | None]:
        """Wait for both; returns their exit codes."""
        for each in self.processes:
            each.join(300)
        return [each.exitcode for each in self.processes]

    def said(self, rank: int) -> str:
        return self.files[rank].read_text()


def process(rank: int, port: int, arguments: list[str], said: str, before: Callable[[], None] | None) -> None:
    """Run the command line as one of two processes; what it says goes to a file."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    if before is not None:
        before()
    sys.exit(main(arguments))


def finish(arguments: list[str], said: Path) -> str:
    """Run a pair to its end; returns what the first process said."""
    pair = Pair(arguments, said)
    assert pair.finish() == [0, 0], pair.said(0)
    return pair.said(0)


def curve(run: Path) -> list[Any]:
    keys = ("step", "loss", "held_out", "size")
    return [[line[key] for key in keys if line.get(key) is not None] for line in read_steps(run / "steps.jsonl")]


def torchrun(arguments: list[str]) -> str:
    """Run a pair to its end by the launcher itself; returns what both said."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fistapruner"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.check_output([sys.executable, "-m", *launcher, *arguments], env=environment, text=True)


@pytest.fixture(scope="module")
def undisturbed(bench: tiny.Bench) -> Path:
    """A recovery by a pair that nothing happened to."""
    out = bench.folder / "undisturbed"
    assert finish(command(bench, "recover", out), bench.folder / "said").count("operators are zero") == 1
    return out


@pytest.mark.parametrize(("verb", "more"), [("recover", ("--parameters", "full")), ("recover", ()), ("align", ())])
def test_two_processes_have_the_curve_of_one(
    bench: tiny.Bench, tmp_path: Path, verb: str, more: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    pair = command(bench, verb, tmp_path / "two", *more)
    if verb == "recover" and not more:
        shutil.copytree(request.getfixturevalue("undisturbed"), tmp_path / "two")
    else:  # one process speaks
        said = torchrun(pair) if verb == "align" else finish(pair, tmp_path / "said")
        assert said.count("operators are zero") == 1
    assert not main(command(bench, verb, tmp_path / "one", *more))
    for one, two in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    before, after = (tiny.tensors(folder / "model") for folder in (bench.pruned(), tmp_path / "two"))
    assert all(bool(((after[name] == 0) == (before[name] == 0)).all()) for name in before if before[name].ndim == 2)
    reports = [load_run(tmp_path / name) for name in ("one", "two")]
    assert reports[0].recovery.trained == reports[1].recovery.trained


def test_a_killed_pair_goes_on(bench: tiny.Bench, tmp_path: Path, undisturbed: Path) -> None:
    out = tmp_path / "out"
    pair = Pair(command(bench, "recover", out), tmp_path / "killed")
    while len(list((out / "states").glob("*.json"))) < 2 and pair.processes[0].is_alive():
        time.sleep(0.01)
    for each in pair.processes:
        each.kill()
    assert pair.finish() == [-signal.SIGKILL, -signal.SIGKILL]
    assert len(curve(out)) >= 1
    for _ in range(2):  # the second time it is finished
        assert "holds the finished run" not in finish(command(bench, "recover", out), tmp_path / "on")
        assert tiny.weights(out) == tiny.weights(undisturbed)
        assert curve(out) == curve(undisturbed)


def second_dies() -> None:
    """Let the second process end at its first step."""
    whole = masked.Masters.step

    def step(self: Any, *given: Any) -> Any:
        return os._exit(9) if os.environ["RANK"] == "1" else whole(self, *given)

    masked.Masters.step = step  # type: ignore[method-assign]


def test_a_process_that_dies_ends_the_others_with_one_sentence(bench: tiny.Bench, tmp_path: Path) -> None:
    pair = Pair(command(bench, "recover", tmp_path / "out"), tmp_path / "said", second_dies)
    assert pair.finish() == [2, 9]
    assert (
        pair.said(0).splitlines()[-1] == "fistapruner: another process of this run has ended: its own message says why"
    )


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--set", "windows_per_step=3"), "windows_per_step is 3: 2 processes need a multiple of 2"),
        (("--set", "optimizer=mezo"), "optimizer mezo trains in one process: leave torchrun out"),
        (("--set", "targets=[nowhere]"), "'nowhere' matches no operator"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    bench: tiny.Bench, tmp_path: Path, more: tuple[str, ...], words: str
) -> None:
    pair = Pair(command(bench, "recover", tmp_path / "out", *more), tmp_path / "said")
    assert all(pair.finish())
    assert words in pair.said(0)

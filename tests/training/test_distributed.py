"""Two processes of torchrun train one model: curves of one process, states together, one sentence where one dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import fistapruner as fp
import tiny
from fistapruner.runs.log import read_steps
from fistapruner.runs.records import load_run

COMMON = ("--evaluate", "none", "--set", "execution.threads=1", "--set", "rank=4", "--quiet")
RECOVERY = ("--set", "data.seqlen=16", "--tokens", "300", "--steps", "12", "--set", "windows_per_step=4")
ALIGNMENT = ("--steps", "4", "--set", "pairs_per_step=4", "--lr", "1e-3", "--loss", "geometric", "--set", "anchor=0.1")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> tiny.Bench:
    return tiny.Bench(tmp_path_factory.mktemp("distributed"))


def command(bench: tiny.Bench, verb: str, out: Path, *more: str) -> list[str]:
    data = bench.folder / "pairs.jsonl"
    lines = [{"prompt": f"After {n} comes", "chosen": f" no {n}!", "rejected": f" {n + 1}."} for n in range(40)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = (*RECOVERY, "--data", str(bench.text)) if verb == "recover" else (*ALIGNMENT, "--data", str(data))
    return [verb, str(bench.pruned()), *settings, *COMMON, *more, "--out", str(out)]


def launch(arguments: list[str], processes: int = 2) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "fistapruner"]
    start = launcher if processes > 1 else ["-m", "fistapruner"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *start, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(arguments: list[str], processes: int = 2) -> str:
    process = launch(arguments, processes)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return out


def curve(run: Path) -> list[Any]:
    keys = ("step", "loss", "held_out", "size")
    return [[line[key] for key in keys if line.get(key) is not None] for line in read_steps(run / "steps.jsonl")]


@pytest.mark.parametrize(("verb", "more"), [("recover", ("--parameters", "full")), ("recover", ()), ("align", ())])
def test_two_processes_have_the_curve_of_one(
    bench: tiny.Bench, tmp_path: Path, verb: str, more: tuple[str, ...]
) -> None:
    said = finish(command(bench, verb, tmp_path / "two", *more))
    assert said.count("operators are zero") == 1  # one process speaks
    finish(command(bench, verb, tmp_path / "one", *more), 1)
    for one, two in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    before, after = (tiny.tensors(folder / "model") for folder in (bench.pruned(), tmp_path / "two"))
    assert all(bool(((after[name] == 0) == (before[name] == 0)).all()) for name in before if before[name].ndim == 2)
    reports = [load_run(tmp_path / name) for name in ("one", "two")]
    assert reports[0].recovery.trained == reports[1].recovery.trained
    assert "holds the finished run" not in finish(command(bench, verb, tmp_path / "two", *more))


def test_a_killed_pair_goes_on(bench: tiny.Bench, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = launch(command(bench, "recover", out))
    while len(list((out / "states").glob("*.json"))) < 2 and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    begun = len(curve(out))
    assert begun >= 1
    finish(command(bench, "recover", out))
    finish(command(bench, "recover", tmp_path / "whole"))
    assert tiny.weights(out) == tiny.weights(tmp_path / "whole")
    assert curve(out) == curve(tmp_path / "whole")


def test_a_process_that_dies_ends_the_others_with_one_sentence(bench: tiny.Bench, tmp_path: Path) -> None:
    dies = (
        "import os, sys, fistapruner.training.masked as masked\n"
        "from fistapruner.cli import main\n"
        "step = masked.Masters.step\n"
        "def stops(self, *given):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        os._exit(9)\n"
        "    return step(self, *given)\n"
        "masked.Masters.step = stops\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    (tmp_path / "dies.py").write_text(dies)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment["MASTER_PORT"] = str(20000 + os.getpid() % 20000)
    processes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "dies.py"), *command(bench, "recover", tmp_path / "out")],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 9]
    assert said[0].splitlines()[-1] == "fistapruner: another process of this run has ended: its own message says why"


def test_what_cannot_be_divided_is_refused(bench: tiny.Bench, tmp_path: Path) -> None:
    for more, words in (
        (("--set", "windows_per_step=3"), "windows_per_step is 3: 2 processes need a multiple of 2"),
        (("--set", "optimizer=mezo"), "optimizer mezo trains in one process: leave torchrun out"),
        (("--set", "targets=[nowhere]"), "'nowhere' matches no operator"),
    ):
        process = launch(command(bench, "recover", tmp_path / "out", *more))
        assert words in process.communicate(timeout=300)[1]
        assert process.returncode


def test_python_is_refused_where_a_launcher_runs_it_for_another_verb(tmp_path: Path) -> None:
    process = launch(["pack", "nothing", str(tmp_path / "out")])
    assert "pack is done by one" in process.communicate(timeout=300)[1]
    assert fp.__version__

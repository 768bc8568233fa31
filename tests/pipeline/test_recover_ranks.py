"""Recovery by several processes: the bytes of one process, whoever did what; errors and kills."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest
import torch

import fistapruner as fp
import tiny
from fistapruner.cli import main
from fistapruner.errors import FistaPrunerError, OtherRankFailed
from fistapruner.models.files.checkpoint import Checkpoint
from fistapruner.models.layerwise import LayerwiseModel
from fistapruner.pipeline.compare import compare
from fistapruner.runs.listener import Listener
from fistapruner.runs.records import Report, load_run
from fistapruner.runs.steps import read_steps
from fistapruner.runs.training_directory import RecoverDirectory
from fistapruner.runtime.ranks import ALONE, Ranks, _check_alike, ranks_of_run
from fistapruner.tuning.states import FileStates, MemoryStates
from fistapruner.tuning.teacher import Teacher

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")

SEQLEN = 16
SETTINGS: dict[str, Any] = {
    "evaluate": None,
    "steps": 3,
    "windows_per_step": 3,  # one process has two passes, the other one
    "validation_checks": 3,
    "rank": 4,
    "data": {"seqlen": SEQLEN, "tokens": 300},
    "execution": {"threads": 1},
}
RUNS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"parameters": "full", "loss": "ce"},
    "mezo": {"optimizer": "mezo", "lr": 1e-3, "validation_checks": 1},
}


def test_memory_that_an_exchange_has_not_is_not_another_process() -> None:
    """So the run goes on with less; any other error of an exchange is one of the connection."""
    ranks = Ranks(0, 2)
    with pytest.raises(torch.OutOfMemoryError, match="Cuda failure 2"), ranks.peers_may_fail():
        raise RuntimeError("NCCL error in: NCCLUtils.cpp:77, Cuda failure 2 'out of memory'")
    with pytest.raises(FistaPrunerError, match="another process of this run has ended"), ranks.peers_may_fail():
        raise RuntimeError("Connection reset by peer")


@pytest.mark.parametrize("part", [{"a": 1}, None, torch.ones(2, 3), torch.ones(1, 2)])
def test_a_rank_that_does_other_work_is_named(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five windows in passes of two, it has the third and the fourth."""
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value, part])
    ranks, own = Ranks(0, 2), torch.tensor([[1.0, 2.0, 5.0], [1.0, 2.0, 5.0]])
    with pytest.raises(FistaPrunerError, match=r"rank 1 has sent .* for figures of 2 windows: .* not do the same work"):
        ranks.windows(own, 5, 2)
    part = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
    assert ranks.windows(own, 5, 2).tolist() == [[1.0, 2.0, 3.0, 4.0, 5.0]] * 2
    part = None
    assert torch.equal(ranks.windows(own[:, :2], 2, 2), own[:, :2])


class Stopping(Listener):
    """Fails when so many steps are done."""

    def __init__(self, steps: int = 2) -> None:
        self.steps = steps

    def tick(self, what: str, done: int, total: int) -> None:
        if what == "recovery steps" and done == self.steps:
            raise FistaPrunerError("enough")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruning run of a Llama with two layers."""
    return tiny.Bench(tmp_path_factory.mktemp("ranks")).pruned()


def decide(out: Path, **changes: Any) -> None:
    """Let a run go on with other uses of memory, which are no part of its identity."""
    run = RecoverDirectory(out)
    record = run.record()
    assert record is not None
    record.decision = record.decision.model_copy(update=changes)
    run.write_record(record)


def failure(rank: int, work: Any) -> dict[str, str]:
    """The error of a piece of work."""
    try:
        work()
    except FistaPrunerError as error:
        return {"kind": type(error).__name__, "message": str(error)}
    return {"kind": "none", "message": ""}


def together(rank: int, pruned: Path, folder: Path) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def recover(name: str, **settings: Any) -> Report:
        return fp.recover(pruned, folder / name, **{**SETTINGS, **settings})

    def change(name: str, **changes: Any) -> None:
        if rank == 0:
            decide(folder / name, **changes)
        torch.distributed.barrier()

    def divided(name: str, steps: int, **changes: Any) -> None:
        """Run one of :data:`RUNS`, after so many steps with trained tensors that the processes divide."""
        own = f"{name}, divided after {steps}"
        stopped = failure(rank, lambda: recover(own, listener=Stopping(steps), **RUNS[name]))
        assert stopped["message"].endswith("enough")
        change(own, **{"shards": 2, **changes})
        with pytest.MonkeyPatch.context() as patched:
            kept = kept_layers(patched)
            recover(own, **RUNS[name])
        assert kept == {rank} or name == "mezo"  # of the two layers each has stepped its own

    def full_disk() -> None:
        """Let the first process fail while the other sends it what it keeps for a snapshot."""

        def write(path: Path, tensors: Mapping[str, Any], metadata: Any = None) -> None:
            next(iter(tensors.values()))
            raise FistaPrunerError("no space left")

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("fistapruner.runs.snapshots.write_tensors", write)
            recover("again", **RUNS["lora"])

    def fails_on_one() -> None:
        with ranks_of_run("cpu") as ranks:
            if not ranks.first:
                raise FistaPrunerError("its disk is full")
            ranks.wait()

    def interrupted_on_one() -> dict[str, str]:
        """Interrupt the second process where it would share its first losses."""

        def windows(*_: Any) -> torch.Tensor:
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            if rank:
                patch.setattr(Ranks, "windows", windows)
            try:
                recover("again")
            except KeyboardInterrupt as interruption:  # not kept: its frames hold the connections
                return {"message": str(interruption), "report": str((folder / "again" / "report.json").exists())}
        return {}

    try:
        reports = {name: recover(name, **settings).model_dump(mode="json") for name, settings in RUNS.items()}
        said = {
            "stopped": failure(rank, lambda: recover("again", listener=Stopping())),
            "on one": failure(rank, fails_on_one),
            "interrupted": interrupted_on_one(),
            "too many": failure(rank, lambda: recover("few", windows_per_step=1)),
        }
        if rank == 0:  # as where it was stopped between training and writing
            (folder / "lora" / "report.json").unlink()
        change("lora", shards=2)
        reports["lora"] = recover("lora").model_dump(mode="json")
        change("again", shards=2)
        said["full disk"] = failure(rank, full_disk)
        change("again", resident=False, states_on_disk=True, hidden_on_disk=True)
        reports["again"] = recover("again").model_dump(mode="json")
        for name in RUNS:
            divided(name, 0)
            divided(name, 2, resident=False, hidden_on_disk=True, keep_graphs=False)
        failure(rank, lambda: recover("left", listener=Stopping(1), **RUNS["full"]))
        change("left", shards=2)
        with ranks_of_run("cpu") as ranks:
            read = [predictions(pruned, folder / f"teacher {windows}", ranks, windows) for windows in (None, 4)]
        torch.save(read, folder / f"{rank}.pt")
        (folder / f"{rank}.json").write_text(json.dumps({"reports": reports, "said": said}))
    finally:
        torch.distributed.destroy_process_group()


def kept_layers(patched: pytest.MonkeyPatch) -> set[int]:
    """Collect the numbers of the layers whose moments a process keeps."""
    kept: set[int] = set()
    put = MemoryStates.put

    def counted(self: MemoryStates, kind: str, index: int, tensors: Any) -> None:
        if kind == "first_moment":
            kept.add(index)
        put(self, kind, index, tensors)

    patched.setattr(MemoryStates, "put", counted)
    return kept


def predictions(pruned: Path, folder: Path, ranks: Ranks, windows: int | None) -> dict[str, torch.Tensor]:
    """The dense model's last hidden states of six steps of two windows, after a block was damaged."""
    tokens = torch.randint(3, tiny.VOCABULARY, (8, SEQLEN), generator=torch.Generator().manual_seed(0))
    order = [4, 1, 3, 6, 7, 2, 5, 4, 1, 3, 6, 7]
    found = {}
    for attempt in range(2):
        dense = LayerwiseModel(Checkpoint.open(pruned.parent / "llama"), torch.device("cpu"))
        settings = {"order": order, "windows_per_step": 2, "held_out": [0], "windows_on_disk": windows}
        teacher = Teacher(dense, tokens, folder, batch_size=1, block_tokens=2 * SEQLEN, ranks=ranks, **settings)
        for step, first in enumerate([-1, *range(0, 12, 2)]):
            numbers = order[first : first + 2] if first >= 0 else [0]
            teacher.step = max(step, 1)
            teacher.require(numbers)
            for window in ranks.mine(numbers, 1):
                values = teacher.predictions([window], torch.ones(1, SEQLEN, dtype=torch.bool)).stored["hidden"]
                found[f"{attempt} {step} {window}"] = values.clone()
        ranks.wait()
        if ranks.first:
            damaged = folder / "00000.safetensors"
            damaged.write_bytes(damaged.read_bytes()[:-4] + b"\0\0\0\0")
        ranks.wait()
    return found


def zeros(model: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(model)
    return {name: checkpoint.read(name) == 0 for name in checkpoint.names() if "_proj" in name}


def test_two_processes_write_the_bytes_of_one(pruned: Path, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(together, (pruned, tmp_path), nprocs=2)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0]["reports"] == found[1]["reports"]
    for name, settings in RUNS.items():
        alone = fp.recover(
            pruned, tmp_path / "alone" / name, **{**SETTINGS, **settings, "execution": {"threads": 1, "batch_size": 1}}
        )
        assert tiny.weights(tmp_path / name) == tiny.weights(tmp_path / "alone" / name) != tiny.weights(pruned)
        lines = [
            [{**line, "seconds": 0.0} for line in read_steps(folder / name / "steps.jsonl")]
            for folder in (tmp_path, tmp_path / "alone")
        ]
        assert lines[0] == lines[1]
        assert found[0]["reports"][name]["fingerprint"] == alone.fingerprint
        for steps in (0, 2):
            own = tmp_path / f"{name}, divided after {steps}"
            assert tiny.weights(own) == tiny.weights(tmp_path / name)
            assert [{**line, "seconds": 0.0} for line in read_steps(own / "steps.jsonl")] == lines[0]
            state = f"states/{lines[0][-1]['step']:08d}.safetensors"
            assert (own / state).read_bytes() == (tmp_path / name / state).read_bytes()
            assert not (own / "trained").exists()
        before, after = zeros(pruned / "model"), zeros(tmp_path / name / "model")
        assert before
        assert all(torch.equal(before[operator], after[operator]) for operator in before)
    # One process fails, and both end; the run goes on with the same bytes.
    first, second = (each["said"] for each in found)
    assert first["stopped"] == {"kind": "FistaPrunerError", "message": "enough"}
    assert second["stopped"] == {"kind": OtherRankFailed.__name__, "message": "rank 0: enough"}
    assert first["full disk"] == {"kind": "FistaPrunerError", "message": "no space left"}
    assert second["full disk"] == {"kind": OtherRankFailed.__name__, "message": "rank 0: no space left"}
    assert second["on one"] == {"kind": "FistaPrunerError", "message": "rank 1: its disk is full"}
    assert first["on one"] == {"kind": OtherRankFailed.__name__, "message": "rank 1: its disk is full"}
    assert first["interrupted"]["message"].startswith("interrupted after step 1 of 3; go on with: fistapruner resume ")
    assert first["interrupted"]["report"] == "False"  # no failed one
    assert second["interrupted"]["message"] == ""
    assert (
        "windows_per_step is 1 for 2 processes, and each needs at least one window of a step: give --windows-per-step 2"
        in first["too many"]["message"]
    )
    assert tiny.weights(tmp_path / "again") == tiny.weights(tmp_path / "lora")
    ours = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for place, windows in enumerate((None, 4)):
        joined = ours[0][place] | ours[1][place]
        theirs = predictions(pruned, tmp_path / "alone" / f"teacher {windows}", ALONE, windows)
        assert len(joined) == len(theirs) == 26
        assert all(torch.equal(joined[key], theirs[key]) for key in theirs)
    # One process goes on where two had begun, too; with files, where these have divided the trained tensors.
    with patch.object(FileStates, "put", autospec=True, side_effect=FileStates.put) as put:
        told = tiny.Said()
        fp.recover(pruned, tmp_path / "left", **SETTINGS, **{"parameters": "full", "loss": "ce"}, listener=told)
    assert put.called
    assert any("this run divides them among 2 processes, and there is one" in said for said in told.sentences)
    assert tiny.weights(tmp_path / "left") == tiny.weights(tmp_path / "full")
    again = fp.recover(pruned, tmp_path / "again", **SETTINGS)
    assert again.fingerprint == found[0]["reports"]["lora"]["fingerprint"]


@pytest.mark.parametrize("what", ["device", "torch"])
def test_ranks_on_other_devices_or_with_other_libraries_are_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first says so: the others would say the same."""
    changes: dict[str, str] = {}
    for rank, kind in ((0, FistaPrunerError), (1, OtherRankFailed)):
        monkeypatch.setattr(Ranks, "gather", lambda _, own: [own, {**own, **changes}])
        changes.clear()
        _check_alike(Ranks(rank, 2), "cpu")
        changes[what] = "another"
        with pytest.raises(FistaPrunerError, match=rf"^rank 1 has {what} another, and rank 0 has .*: all ") as caught:
            _check_alike(Ranks(rank, 2), "cpu")
        assert caught.type is kind


def test_passes_are_shared_in_order() -> None:
    for count in (1, 2, 5):
        for size in (1, 2, 3):
            places = [type(ALONE)(rank, size).mine(range(2 * count - 1), 2) for rank in range(size)]
            assert sorted(window for each in places for window in each) == list(range(2 * count - 1))
            assert [len(each) for each in places] == sorted((len(each) for each in places), reverse=True)


def test_several_processes_are_refused_where_one_does_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, elastic, lines in (("0", "1", 1), ("1", "1", 0), ("1", None, 1)):  # without torchrun it may be alone
        monkeypatch.setenv("RANK", rank)
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        if elastic:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", elastic)
        for words in (
            ["prune", "smollm2", "--out", "x"],
            ["recover", "x", "--merge", "y", "--out", "z"],
        ):
            assert main(words) == 2
            said = capsys.readouterr().err
            assert said.count("\n") == said.count(" has started 2 processes, and ") == lines
    for work in (
        lambda **more: fp.prune("nowhere", "x", **more),
        lambda **more: compare("nowhere", "wanda", ["50%"], "x", settings=more),
    ):
        with pytest.raises(FistaPrunerError, match=r"^recover: WORLD_SIZE is 2, and only a recovery is shared"):
            work(recover={"steps": 1})


def test_a_process_that_waits_for_others_says_so_and_ends_at_sigterm(pruned: Path, tmp_path: Path) -> None:
    """As where ``RANK`` and ``WORLD_SIZE`` are exported, and nobody else has been started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = ["recover", str(pruned), "--out", str(tmp_path / "out"), "--evaluate", "none"]
    command = [sys.executable, "-m", "fistapruner", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **alone}) as process:
        assert process.stderr is not None
        while "waiting for the other processes" not in (line := process.stderr.readline()):
            assert line
        process.send_signal(signal.SIGTERM)
        assert process.stderr.read() == "fistapruner: interrupted\n"
        assert process.wait() == 143
    assert not (tmp_path / "out").exists()


def launch(run: Path, *words: str) -> subprocess.Popen[str]:
    """Start two processes of the command line."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fistapruner"]
    return subprocess.Popen([*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill(run: subprocess.Popen[str], out: Path, victim: int, steps: int) -> None:
    """Kill one of two processes when the journal has so many lines."""
    end = time.monotonic() + 240
    while not (out / "steps.jsonl").exists() or len(read_steps(out / "steps.jsonl")) < steps:
        assert run.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    ranks = [child for child in psutil.Process(run.pid).children() if child.environ().get("RANK") == str(victim)]
    os.kill(ranks[0].pid, signal.SIGKILL)
    assert run.wait(120) != 0
    assert load_run(out).status != "finished"


@pytest.mark.slow
def test_a_killed_process_ends_the_run_which_goes_on_with_the_same_bytes(pruned: Path, tmp_path: Path) -> None:
    settings = ["--steps", "40", "--windows-per-step", "2", "--validation-checks", "4", "--rank", "4", "--threads", "1"]
    words = ["recover", str(pruned), "--evaluate", "none", "--seqlen", str(SEQLEN), "--tokens", "300", *settings]
    whole = launch(tmp_path, *words, "--out", str(tmp_path / "whole"))
    assert whole.wait(300) == 0
    assert (whole.stdout and whole.stdout.read().count("checkpoint ")) == 1  # the first process prints alone
    for victim in range(2):
        out = tmp_path / f"killed {victim}"
        kill(launch(tmp_path, *words, "--out", str(out)), out, victim, steps=15)
        # Once more, with trained tensors that the processes divide.
        decide(out, shards=2)
        kill(launch(tmp_path, "resume", str(out)), out, victim, steps=28)
    assert launch(tmp_path, "resume", str(tmp_path / "killed 0")).wait(300) == 0
    fp.resume(tmp_path / "killed 1")
    for victim in range(2):
        assert tiny.weights(tmp_path / f"killed {victim}") == tiny.weights(tmp_path / "whole")

"""Alignment by two processes: the bytes of one process; a rank without the dense model."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from test_align import SETTINGS, Bench

import fistapruner as fp
import tiny
from fistapruner.models.files.safetensors import SafetensorsFile
from fistapruner.runs.align_directory import AlignDirectory
from fistapruner.runs.listener import Listener

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")

SHARED: dict[str, Any] = {**SETTINGS, "steps": 3, "loss": "harmonic", "anchor": 0.1}


class Stopping(Listener):
    """Fails before the first step."""

    def tick(self, what: str, done: int, total: int) -> None:
        if what == "alignment steps":
            raise fp.FistaPrunerError("enough")


def together(rank: int, pruned: Path, pairs: Path, folder: Path) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        common: dict[str, Any] = {**SHARED, "data": {"pairs": str(pairs)}, "execution": {"threads": 1}}
        fp.align(pruned, folder / "two", **common)
        with suppress(fp.FistaPrunerError):
            fp.align(pruned, folder / "divided", **common, listener=Stopping())
        if rank == 0:  # from the first step on each process keeps the trained tensors of some layers
            run = AlignDirectory(folder / "divided")
            record = run.begun_record()
            record.decision = record.decision.model_copy(update={"shards": 2})
            run.write_record(record)
        torch.distributed.barrier()
        fp.align(pruned, folder / "divided", **common)
        if rank == 1:  # its machine does not see the dense model, which nothing but the figures of the test needs
            hidden, there = folder / "llama", Path.is_dir
            Path.is_dir = lambda path, **more: path != hidden and there(path, **more)  # type: ignore[assignment]
        try:
            fp.align(pruned, folder / "one sees it", **{**common, "loss": "sft", "anchor": 0.0})
        except fp.FistaPrunerError as error:
            (folder / f"{rank}.txt").write_text(str(error))
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_write_the_bytes_of_one(tmp_path: Path) -> None:
    """References, anchor and steps are shared; a pair is never parted. Steps of short pairs are one pass, for one."""
    bench = Bench(tmp_path)
    pruned = bench.pruned()
    long = {"prompt": "After 1 and " + "another 1 and " * 3 + "2 comes", "chosen": " no 3!", "rejected": " 3."}
    with bench.pairs.open("a") as file:
        file.write(json.dumps(long) + "\n")
    torch.multiprocessing.spawn(together, (pruned, bench.pairs, tmp_path), nprocs=2)
    execution = {"threads": 1, "batch_size": 4}
    fp.align(pruned, tmp_path / "one", **SHARED, data={"pairs": str(bench.pairs)}, execution=execution)
    one, two = (tmp_path / name for name in ("one", "two"))
    assert tiny.weights(one) == tiny.weights(two) == tiny.weights(tmp_path / "divided")
    assert (one / "references.safetensors").read_bytes() == (two / "references.safetensors").read_bytes()
    for rank in range(2):
        said = (tmp_path / f"{rank}.txt").read_text()
        assert said.startswith(f"rank 1: the dense model of the run in {tmp_path / 'one sees it'} is not at ")
    names = SafetensorsFile(tmp_path / "one sees it" / "references.safetensors").entries
    assert not any(name.startswith("dense.") for name in names)

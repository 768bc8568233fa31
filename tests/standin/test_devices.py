"""Which GPU a run takes, which precision, and what it says of both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fistapruner
import tiny
from fistapruner.errors import FistaPrunerError
from fistapruner.runtime.devices import choose_device, free_memory_of_gpus, worker_devices
from fistapruner.runtime.numerics import exact_in_fast_products
from fistapruner.runtime.ranks import ranks_of_run
from fistapruner.runtime.transfers import ToDevice, ToHost, page_locked
from standin.gpu import StandIn

SETTINGS = {"method": "magnitude", "calibration": {"source": "python", "samples": 2, "seqlen": 16}}


def test_the_gpu_with_most_free_memory(gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked in another process: this one makes no context on a GPU that it does not use."""
    monkeypatch.setenv("STAND_IN_GPUS", f"{2**30},0")
    free_memory_of_gpus.cache_clear()
    try:
        assert choose_device("cuda") == choose_device("auto") == torch.device("cuda", 1)
        assert worker_devices("auto", 3, 1) == [torch.device("cuda", index) for index in (1, 0, 1)]
    finally:
        free_memory_of_gpus.cache_clear()
    assert choose_device("cuda:0") == torch.device("cuda", 0)
    assert not gpu.touched


def test_the_only_process_of_a_machine_takes_the_gpu_that_a_run_takes(
    gpu: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the one of its number: tensors and sums of several processes are on one GPU."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no network")

    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("STAND_IN_GPUS", f"{2**30},0")
    monkeypatch.setattr(torch.distributed, "rendezvous", fail)
    free_memory_of_gpus.cache_clear()
    try:
        with pytest.raises(FistaPrunerError, match="no network"), ranks_of_run("auto"):
            pass
        assert gpu.touched == {choose_device("auto")} == {torch.device("cuda", 1)}
    finally:
        free_memory_of_gpus.cache_clear()


def test_a_run_on_one_gpu_touches_no_other(gpu: StandIn, tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model", num_hidden_layers=1)
    fistapruner.prune(str(folder), tmp_path / "run", **SETTINGS, execution={"device": "cuda:1"})
    assert gpu.touched == {torch.device("cuda", 1)}


def test_copies_of_one_gpu_touch_no_other(gpu: StandIn) -> None:
    there = ToDevice(page_locked((4,), torch.float32).fill_(2.0), torch.device("cuda", 1)).result()
    assert ToHost(there, torch.float32).result().tolist() == [2.0] * 4
    assert gpu.touched == {torch.device("cuda", 1)}


def test_another_gpu_is_said_on_resume(gpu: StandIn, tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model", num_hidden_layers=2)
    execution = {"device": "cuda:0"}
    fistapruner.prune(str(folder), tmp_path / "run", **SETTINGS, execution=execution, only_layers=(0, 0))
    gpu.name = "another stand-in"
    said = tiny.Said()
    fistapruner.resume(tmp_path / "run", listener=said)
    assert "this run began on stand-in; on another stand-in its last bits may differ" in said.sentences


def test_gpus_before_ampere_take_fp32_for_bf16(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16, num_hidden_layers=1)
    said = tiny.Said()
    with StandIn(capability=(7, 5)):
        fistapruner.prune(str(folder), tmp_path / "run", **SETTINGS, listener=said)
    assert "passes in float32: this device has no matrix units for the checkpoint's bfloat16" in said.sentences


def test_grams_of_fp16_on_tensor_cores() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    found = [exact_in_fast_products(dtype, cuda) for dtype in (torch.float16, torch.bfloat16, torch.float32)]
    assert found == [True, True, False]
    assert not exact_in_fast_products(torch.float16, cpu)


def test_products_outside_of_iterations_are_fp32(gpu: StandIn, tmp_path: Path) -> None:
    """Whatever the program that calls prune has set."""
    matmul = torch.backends.cuda.matmul
    folder = tiny.save("llama", tmp_path / "model", num_hidden_layers=1)
    seen = set()
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"  # type: ignore[attr-defined]
    try:
        fistapruner.prune(
            str(folder),
            tmp_path / "run",
            **SETTINGS,
            execution={"device": "cuda:0"},
            inspect=lambda *_: seen.add(matmul.fp32_precision),  # type: ignore[attr-defined]
        )
        assert matmul.fp32_precision == "tf32"  # type: ignore[attr-defined]
    finally:
        matmul.fp32_precision = before  # type: ignore[attr-defined]
    assert seen == {"ieee"}


def test_a_packed_operator_warns_on_a_gpu(gpu: StandIn) -> None:
    dense = nn.Linear(32, 8)
    x = torch.randn(3, 32)
    packed = fistapruner.SparseLinear.from_dense(dense)
    expected = dense(x)
    packed.bias = nn.Parameter(packed.bias.detach().to("cuda:0"))
    with pytest.warns(UserWarning, match="unpacked on the CPU for every product on cuda:0: .*packed=False"):
        found = packed(x.to("cuda:0"))
    assert torch.allclose(found.cpu(), expected, atol=1e-5)

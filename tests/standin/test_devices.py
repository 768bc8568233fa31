"""Which GPU a run takes, which precision, and what it says of both."""

import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fistapruner
import tiny
from fistapruner.errors import FistaPrunerError
from fistapruner.measure.run import generate_side_by_side
from fistapruner.measure.speed import prompts, time_generation
from fistapruner.models.build import load_whole
from fistapruner.models.source import Permissions
from fistapruner.pruning.workers import prune_one
from fistapruner.runtime.devices import choose_device, worker_devices
from standin.gpu import StandIn

SETTINGS = {"method": "magnitude", "calibration": {"source": "python", "samples": 2, "seqlen": 16}}


def test_a_gpu_that_another_process_has_for_itself_is_named(gpu: StandIn, tmp_path: Path) -> None:
    gpu.taken[0] = -1
    fault = prune_one(0, tmp_path, "cuda:0", Permissions(), tmp_path, os.uname().nodename)
    assert re.search(r"^a worker cannot use device cuda:0: CUDA error: .* unavailable$", fault or "")


def test_the_first_gpu_is_taken_unless_another_is_named(gpu: StandIn) -> None:
    assert choose_device("cuda") == choose_device("auto") == choose_device("cuda:0") == torch.device("cuda", 0)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert worker_devices("auto", 3, 1) == [torch.device("cuda", index) for index in (0, 1, 0)]
    with pytest.raises(FistaPrunerError, match=r"device 'cuda:256': .* PyTorch sees 2 CUDA GPUs"):
        choose_device("cuda:256")  # which torch takes for the first one
    assert not gpu.touched


def test_another_gpu_is_said_on_resume(gpu: StandIn, tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model", num_hidden_layers=2)
    execution = {"device": "cuda:0"}
    tiny.begin(str(folder), tmp_path / "run", **SETTINGS, execution=execution)
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


def test_a_packed_operator_warns_on_a_gpu(gpu: StandIn) -> None:
    dense = nn.Linear(32, 8).bfloat16()
    x = torch.randn(3, 32).bfloat16()
    expected = dense(x)
    packed = fistapruner.SparseLinear.from_dense(dense.to("cuda:0"))
    assert torch.allclose(packed(x), expected, atol=0.02)
    for device in ("cpu", "cuda:0"):
        packed.bias = packed.bias.to(device)
        with pytest.warns(UserWarning, match="unpacked on the CPU for every product on cuda:0: .*packed=False"):
            found = packed(x.to("cuda:0"))
        assert torch.allclose(found.cpu(), expected, atol=0.02)


def test_models_write_on_a_gpu(gpu: StandIn, tmp_path: Path) -> None:
    """Prompts are continued, and decoding is timed."""
    folder = tiny.save("llama", tmp_path / "model", num_hidden_layers=1)
    assert load_whole(folder, torch.device("cuda:0")).device == torch.device("cuda:0")
    models = {"dense": folder, "pruned": folder}
    there, here = (generate_side_by_side(models, torch.device(device)) for device in ("cuda:0", "cpu"))
    assert there == here
    model = tiny.build("llama").to("cuda:0")
    assert time_generation(model, prompts(model, 1, 5, seed=0).to(model.device), 2)

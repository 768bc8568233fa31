"""The stand-in GPU refuses what a GPU refuses, and counts what a GPU would wait for."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from standin.gpu import DeviceTensor, StandIn

CUDA = torch.device("cuda:0")


def test_values_are_those_of_a_cpu(gpu: StandIn) -> None:
    there = torch.arange(6.0, device=CUDA).view(2, 3)
    assert isinstance(there @ there.T, DeviceTensor)
    assert (there @ there.T).device == torch.device("cuda:0")
    assert torch.equal((there @ there.T).cpu(), torch.tensor([[5.0, 14.0], [14.0, 50.0]]))


def test_devices_do_not_mix(gpu: StandIn) -> None:
    there, here, other = torch.ones(3, device=CUDA), torch.ones(3), torch.ones(3, device="cuda:1")
    for one, two in ((there, here), (there, other), (here, there)):
        with pytest.raises(RuntimeError, match="same device"):
            one + two
    assert (there + torch.tensor(1.0)).tolist() == [2.0] * 3  # PyTorch takes a number from the CPU
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(2, device=CUDA, generator=torch.Generator())
    with pytest.raises(TypeError, match=r"Use Tensor\.cpu"):
        there.numpy()
    with pytest.raises(RuntimeError, match="indices should be"):
        here[torch.zeros(1, dtype=torch.long, device=CUDA)]


def test_waits_and_copies_are_counted(gpu: StandIn) -> None:
    there = torch.ones(5).to(CUDA)
    bool((there > 0).all())
    there[there > 0].cpu()
    counted = {what for what, _ in gpu.waits}
    assert counted >= {"to device", "_local_scalar_dense", "index", "to host"}
    assert sum(gpu.moved.values()) == 2 * 20


def test_memory_is_counted_and_limited() -> None:
    with StandIn(memory=4096) as small:
        held = torch.zeros(512, device=CUDA)
        assert small.live[CUDA] == 2048
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(1024, device=CUDA)
        del held
        torch.zeros(1024, device=CUDA)
        assert small.peak[CUDA] == 4096
    assert not torch.cuda.is_available()


def test_sums_in_no_fixed_order_are_counted(gpu: StandIn) -> None:
    query = torch.ones(1, 1, 4, 8, device=CUDA, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        functional.scaled_dot_product_attention(query, query, query).sum().backward()
    assert not gpu.unordered
    functional.scaled_dot_product_attention(query, query, query).sum().backward()
    torch.zeros(2, device=CUDA).index_add_(0, torch.zeros(3, dtype=torch.long, device=CUDA), torch.ones(3, device=CUDA))
    assert {what for what, _ in gpu.unordered} == {"backward of attention", "index_add_"}


def test_started_processes_have_the_same_gpus(gpu: StandIn) -> None:
    program = "import torch; print(torch.cuda.device_count(), torch.ones(2, device='cuda:1').device)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["2", "cuda:1"]

"""Hidden states that wait in main memory or in a file: what is read is what was written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fistapruner.passes.store import HiddenStates
from standin.gpu import StandIn

CUDA = torch.device("cuda:0")
SHAPE = (7, 3, 4)


@pytest.fixture(params=["memory", "file"])
def states(request: pytest.FixtureRequest, gpu: StandIn, tmp_path: Path) -> HiddenStates:
    """A store of 7 windows."""
    return HiddenStates(SHAPE, torch.float32, tmp_path / "states" if request.param == "file" else None)


def batches(size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, SHAPE[0])) for start in range(0, SHAPE[0], size)]


def fill(states: HiddenStates, size: int) -> torch.Tensor:
    """Write batches from the device; return the values."""
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    for start, stop in batches(size):
        out = values[start:stop].to(CUDA)
        states.write(start, out)
        out.zero_()  # a layer may overwrite it
    return values


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_batches_are_what_was_written(gpu: StandIn, states: HiddenStates, size: int) -> None:
    """In order, twice, and by single windows; a batch that was read may be overwritten."""
    values = fill(states, size)
    for start, stop in batches(size) * 2:
        for _ in range(2):
            read = states.read(start, stop, CUDA)
            assert torch.equal(read.cpu(), values[start:stop])
            read.zero_()
    for start in (5, 1, 2, 3, 0, 6):
        assert torch.equal(states.read(start, start + 1, CUDA).cpu(), values[start : start + 1])
        assert torch.equal(states.read(start, start + 1), values[start : start + 1])


def test_a_batch_is_read_before_it_is_overwritten_and_after(gpu: StandIn, states: HiddenStates) -> None:
    """As where a layer's output takes the place of its input."""
    values = fill(states, 2)
    for start, stop in batches(2):
        states.write(start, states.read(start, stop, CUDA).add_(1.0))
    for start, stop in batches(2):
        assert torch.equal(states.read(start, stop, CUDA).cpu(), values[start:stop] + 1)
    states.read(0, 2, CUDA)
    states.write(2, torch.zeros(2, 3, 4, device=CUDA))
    assert not states.read(2, 4, CUDA).any()


def test_single_tokens_are_copied_and_no_others(gpu: StandIn, states: HiddenStates) -> None:
    values, rows = fill(states, 2), torch.tensor([0, 4, 8])
    gpu.moved.clear()
    assert torch.equal(states.tokens(2, 5, rows, CUDA).cpu(), values[2:5].flatten(0, 1)[rows])
    assert sum(count for (what, _), count in gpu.moved.items() if what == "to device") == 3 * 4 * 4


def test_a_closed_file_has_all_batches(gpu: StandIn, tmp_path: Path) -> None:
    states = HiddenStates(SHAPE, torch.float32, tmp_path / "states")
    values = fill(states, 3)
    states.close(keep=True)
    assert (tmp_path / "states").read_bytes() == values.numpy().tobytes()


def test_states_on_the_device_go_to_main_memory(gpu: StandIn) -> None:
    states = HiddenStates(SHAPE, torch.float32, device=CUDA)
    values = fill(states, 3)
    assert torch.equal(states.read(2, 4, torch.device("cpu")), values[2:4])
    assert states.read(2, 4).device == CUDA
    states.to_main_memory()
    assert states.read(2, 4).device == torch.device("cpu")

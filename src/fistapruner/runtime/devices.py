"""Choose the device to compute on, and the number of CPU threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import FistaPrunerError


def choose_device(name: str) -> torch.device:
    """The device a recipe names; ``auto`` takes the GPU with most free memory, or the CPU.

    Raises:
        FistaPrunerError: no such device here.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        free = [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
        return torch.device("cuda", free.index(max(free)))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise FistaPrunerError(f"device {name!r} is not known: auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise FistaPrunerError(f"device {name!r}: PyTorch sees no CUDA GPU on this machine")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise FistaPrunerError(f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA GPUs")
    return device


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Compute on ``count`` CPU threads inside; products are split among threads, so their last bits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

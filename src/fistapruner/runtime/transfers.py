"""Copy between main memory and a GPU while the GPU computes.

Copies go through page-locked buffers, on a stream of their own.

Kernels and copies are queued and run later, so each waits for those whose memory it reads or overwrites:

* A copy to the GPU waits for the kernels before it, which may still use its memory. Kernels after
  :meth:`ToDevice.result` wait for the copy.
* A copy to main memory waits for the kernels before it. The host waits for the copy in :meth:`ToHost.result`.

PyTorch reuses memory that is freed, page-locked or on the GPU, only after the copies that use it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor


def page_locked(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Make a tensor in main memory that a GPU reads and writes by itself, while the host goes on.

    Where the system gives no page-locked memory it is ordinary memory, and the host waits for the copies.
    """
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError:
        return torch.empty(shape, dtype=dtype)


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor to a device; the host does not wait for a GPU.

    Where the system gives no page-locked memory it waits.
    """
    if device.type == "cpu" or values.device.type != "cpu":
        return values.to(device)
    try:
        values = values.pin_memory()
    except RuntimeError:
        return values.to(device)
    return values.to(device, non_blocking=True)


class ToDevice:
    """A copy to a GPU that is under way.

    Args:
        values: in main memory, page-locked; not written to afterwards.
        device: the GPU.
    """

    def __init__(self, values: Tensor, device: torch.device) -> None:
        self._device = device
        self._copy = torch.empty(values.shape, dtype=values.dtype, device=device)
        stream = _copy_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with _on(stream, device):
            self._copy.copy_(values, non_blocking=True)
        self._copy.record_stream(stream)
        self._done = stream.record_event()

    def result(self) -> Tensor:
        """Return the copy; kernels that are launched from now on wait for it."""
        torch.cuda.current_stream(self._device).wait_event(self._done)
        return self._copy


class ToHost:
    """A copy to main memory that is under way; the values may be overwritten meanwhile.

    Args:
        values: on a GPU.
        dtype: of the copy.
    """

    def __init__(self, values: Tensor, dtype: torch.dtype) -> None:
        self._values = values.to(dtype, copy=True, memory_format=torch.contiguous_format)
        self._copy = page_locked(values.shape, dtype)
        stream = _copy_stream(values.device)
        stream.wait_stream(torch.cuda.current_stream(values.device))
        with _on(stream, values.device):
            self._copy.copy_(self._values, non_blocking=True)
        self._values.record_stream(stream)
        self._done = stream.record_event()

    def result(self) -> Tensor:
        """Wait for the copy and return it."""
        self._done.synchronize()
        return self._copy


@contextmanager
def _on(stream: torch.cuda.Stream, device: torch.device) -> Iterator[None]:
    """Queue copies on a stream of ``device``, with no CUDA context on the GPU that was current.

    ``torch.cuda.stream`` alone would make one: at its end it sets the stream of the GPU that was current before.
    """
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield


@lru_cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of the copies to and from ``device``."""
    return torch.cuda.Stream(device)

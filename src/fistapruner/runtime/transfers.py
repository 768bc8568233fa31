"""Copy from main memory to a GPU while the host goes on."""

from __future__ import annotations

from collections.abc import Sequence

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

"""Copy from main memory to a GPU while the host goes on."""

from __future__ import annotations

import torch
from torch import Tensor


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

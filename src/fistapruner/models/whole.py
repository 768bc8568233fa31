"""A whole model in memory, for what is not done layer by layer: generating text, zero-shot tasks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from ..errors import FistaPrunerError
from ..runtime.memory import free_device_memory, free_memory
from ..runtime.numerics import pass_dtype
from .files.checkpoint import Checkpoint

ROOM = 0.75
"""Share of the free memory that a whole model may take: its passes need some, too."""


def whole_fits(checkpoint: Checkpoint, device: torch.device, limit: int | None = None) -> bool:
    """Whether a model can be loaded whole, into :data:`ROOM` of the device's free memory and of ``limit`` bytes."""
    free = free_device_memory(device) if device.type == "cuda" else min(free_memory(), limit or sys.maxsize)
    return whole_bytes(checkpoint, device) <= ROOM * free


def whole_bytes(checkpoint: Checkpoint, device: torch.device) -> int:
    """Bytes of a model's weights once loaded."""
    return checkpoint.nbytes * pass_dtype(checkpoint.dtype, device).itemsize // checkpoint.dtype.itemsize


def require_whole(checkpoint: Checkpoint, device: torch.device, limit: int | None, purpose: str) -> None:
    """Refuse to load a model that does not fit.

    Args:
        checkpoint: of the model.
        device: where it would run.
        limit: bytes that the process may use on the host; None is what is free.
        purpose: what needs it, for the message.

    Raises:
        FistaPrunerError: names the purpose, the bytes and the way out.
    """
    if not whole_fits(checkpoint, device, limit):
        raise FistaPrunerError(
            f"{purpose} needs the whole model on {device}, {whole_bytes(checkpoint, device) / 2**30:.2f} GiB, which is more than "
            f"{ROOM:.0%} of the memory that is free there: take text instead, such as --calibration c4, python or a file"
        )


def load_whole(folder: Path, device: torch.device, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False) -> Any:
    """Load a ``transformers`` model for forward passes.

    Args:
        folder: a Hugging Face folder, dense or packed.
        device: where it runs.
        dtype: its precision; None is that of :func:`~fistapruner.runtime.numerics.pass_dtype`, as for passes layer by layer.
        trust_remote_code: run Python code that comes with the checkpoint.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype or "auto", trust_remote_code=trust_remote_code).to(device)
    if dtype is None and pass_dtype(model.dtype, device) == torch.float32:
        model = model.float()  # only ever wider: ``to`` would round what transformers keeps in fp32, such as rotary frequencies
    return model.eval()

"""Load a whole model into memory, to generate text and for zero-shot tasks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from ..errors import FistaPrunerError, needs_code
from ..runtime.memory import free_device_memory, free_memory
from ..runtime.numerics import pass_dtype
from .files.checkpoint import Checkpoint
from .files.low_rank import LowRankAdapter

ROOM = 0.75
"""Share of the free memory that a whole model may take; the rest is for its forward passes."""


def whole_fits(checkpoint: Checkpoint, device: torch.device, limit: int | None = None) -> bool:
    """Check whether a model fits into :data:`ROOM` of the device's free memory and of ``limit`` bytes."""
    free = free_device_memory(device) if device.type == "cuda" else min(free_memory(), limit or sys.maxsize)
    return whole_bytes(checkpoint, device) <= ROOM * free


def whole_bytes(checkpoint: Checkpoint, device: torch.device) -> int:
    """Count the bytes of a model's weights in the precision of its passes."""
    return checkpoint.nbytes * pass_dtype(checkpoint.dtype, device).itemsize // checkpoint.dtype.itemsize


def require_whole(checkpoint: Checkpoint, device: torch.device, limit: int | None, purpose: str) -> None:
    """Refuse to load a model that does not fit.

    Args:
        checkpoint: of the model.
        device: where it would run.
        limit: bytes that the process may use on the host; None is what is free.
        purpose: what needs the model, for the message.

    Raises:
        FistaPrunerError: names the purpose, the bytes and what to do instead.
    """
    if not whole_fits(checkpoint, device, limit):
        raise FistaPrunerError(
            f"{purpose} needs the whole model on {device}, {whole_bytes(checkpoint, device) / 2**30:.2f} GiB, "
            f"which is more than {ROOM:.0%} of the memory that is free there: "
            "take text instead, such as --calibration c4, python or a file"
        )


def load_whole(
    folder: Path, device: torch.device, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False
) -> Any:
    """Load a ``transformers`` model for forward passes.

    The low-rank part that belongs to a checkpoint is added to its operators.

    Args:
        folder: a Hugging Face folder, dense or packed.
        device: where it runs.
        dtype: precision of weights and passes; None is :func:`~fistapruner.runtime.numerics.pass_dtype`, as for passes
            layer by layer.
        trust_remote_code: run Python code that comes with the checkpoint.

    Raises:
        FistaPrunerError: the checkpoint needs its own code, which was not trusted, or transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype or "auto", trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        fault = FistaPrunerError(f"{folder} cannot be loaded by transformers: {reason}")
        raise needs_code(folder, error) or fault from None
    model = model.to(device)
    if dtype is None and pass_dtype(model.dtype, device) == torch.float32:
        # Only to a wider dtype: ``to`` would round what transformers keeps in fp32, such as rotary frequencies.
        model = model.float()
    if (low_rank := LowRankAdapter.beside(folder)) is not None:
        with torch.no_grad():
            for name in low_rank.operators:
                module = model.get_submodule(name)
                weight = low_rank.added(f"{name}.weight", module.weight, transposed=isinstance(module, Conv1D))
                module.weight.copy_(weight)
    return model.eval()

"""Load a whole model into memory, to generate text and for zero-shot tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import FistaPrunerError, needs_code, one_line
from ..runtime.devices import free_device_memory, free_memory, resident_memory
from ..runtime.numerics import pass_dtype
from ..runtime.show import size
from .architecture import auto_class, read_config
from .files.checkpoint import Checkpoint
from .files.low_rank import LowRankAdapter

ROOM = 0.75
"""Share of the free memory that a whole model may take where the rest of what it needs is not counted."""


def whole_fits(checkpoint: Checkpoint, device: torch.device, limit: int | None) -> bool:
    """Check whether a model fits into :data:`ROOM` of what the process may still take; arguments as below."""
    return whole_bytes(checkpoint, pass_dtype(checkpoint.dtype, device)) <= ROOM * _left(device, limit)


def whole_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Count the bytes of a model's weights in the precision of its passes."""
    return checkpoint.nbytes * dtype.itemsize // checkpoint.dtype.itemsize


def require_tasks_fit(folder: Path, nbytes: int, limit: int) -> None:
    """Refuse zero-shot tasks on a whole model that a limit of main memory does not hold.

    Args:
        folder: the model, for the message.
        nbytes: of its weights in the precision of the passes.
        limit: bytes of main memory that the process may use.

    Raises:
        FistaPrunerError: names the limit and the bytes that are needed.
    """
    needed = resident_memory() + int(nbytes / ROOM)
    if needed > limit:
        raise FistaPrunerError(
            f"memory_limit {size(limit)} is not enough: zero-shot tasks load the whole model {folder}, which needs "
            f"{size(needed)}: raise it, or leave out --tasks"
        )


def require_whole(nbytes: int, device: torch.device, limit: int | None, option: str) -> None:
    """Refuse to load a model that generates text if it does not fit.

    Args:
        nbytes: of its weights, and of what generating needs beside them.
        device: where it would run.
        limit: bytes of main memory that the process may use; None is what is free.
        option: names the text, for the message: ``--calibration`` or ``--data``.

    Raises:
        FistaPrunerError: names the option, the bytes and what to do instead.
    """
    if nbytes > (left := _left(device, limit)):
        raise FistaPrunerError(
            f"{option} self needs the whole model on {device}, {size(nbytes)}, and {size(left)} are left there: "
            f"{other_text(option)}"
        )


def other_text(option: str) -> str:
    """Advise on text that needs no whole model; arguments as for :func:`require_whole`."""
    return f"take text instead, such as {option} c4, python or a file"


def _left(device: torch.device, limit: int | None) -> int:
    """Measure the bytes that this process may still take, within ``limit`` bytes of main memory."""
    if device.type == "cuda":
        return free_device_memory(device)
    return free_memory() if limit is None else max(0, min(free_memory(), limit - resident_memory()))


def load_whole(
    folder: Path, device: torch.device, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False
) -> Any:
    """Load a ``transformers`` model for forward passes.

    The low-rank part that belongs to a checkpoint is added to its operators (that of a packed one by the plug-in of
    transformers).

    Args:
        folder: a Hugging Face folder, dense or packed.
        device: where it runs.
        dtype: precision of weights and passes; None is :func:`~fistapruner.runtime.numerics.pass_dtype` of the stored
            weights, whatever the config says, as for passes layer by layer.
        trust_remote_code: run Python code that comes with the checkpoint.

    Raises:
        FistaPrunerError: the checkpoint needs its own code, which was not trusted, or transformers cannot load it.
    """
    dtype = dtype or pass_dtype(Checkpoint.open(folder, allow_pickle=True).dtype, device)
    try:
        config = read_config(folder, trust_remote_code=trust_remote_code)
        settings = {"config": config, "dtype": dtype, "trust_remote_code": trust_remote_code}
        model = auto_class(config).from_pretrained(str(folder), **settings)
    except (OSError, ValueError) as error:
        reason = one_line(error)
        fault = FistaPrunerError(f"{folder} cannot be loaded by transformers: {reason}")
        raise needs_code(folder, error) or fault from None
    model = model.to(device)
    if (low_rank := LowRankAdapter.beside(folder)) is not None:
        low_rank.add_to(model)
    return model.eval()

"""Read from the environment how many processes a launcher has started. Needs no torch.

``torchrun`` and ``accelerate launch`` are such launchers.
"""

from __future__ import annotations

import os

from ..errors import FistaPrunerError


def launched() -> int:
    """Count the processes that a launcher has started for this run; 1 without one.

    Raises:
        FistaPrunerError: ``WORLD_SIZE`` is no number.
    """
    if not (os.environ.get("RANK") and os.environ.get("WORLD_SIZE")):
        return 1
    return _number("WORLD_SIZE")


def leads() -> bool:
    """Check that this is the first of the processes that a launcher has started, or the only one.

    Raises:
        FistaPrunerError: ``RANK`` or ``WORLD_SIZE`` is no number.
    """
    return launched() == 1 or _number("RANK") == 0


def _number(name: str) -> int:
    value = os.environ[name]
    try:
        return int(value)
    except ValueError:
        raise FistaPrunerError(
            f"environment variable {name} is {value!r}: a launcher of several processes sets it to a number; without "
            "one, unset it"
        ) from None

"""Count processes that a launcher has started, and let new ones import this package. Needs no torch.

``torchrun`` and ``accelerate launch`` are such launchers.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import FistaPrunerError


def launched() -> int:
    """Count the processes that a launcher has started for this run; 1 without one.

    Raises:
        FistaPrunerError: ``RANK``, ``WORLD_SIZE`` or ``MASTER_PORT`` is not what a launcher sets it to.
    """
    if not (os.environ.get("RANK") and os.environ.get("WORLD_SIZE")):
        return 1
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    if not 0 <= rank < size:
        raise FistaPrunerError(
            f"environment variables RANK and WORLD_SIZE are {rank} and {size}: a launcher sets WORLD_SIZE to 1 or more "
            "processes, and RANK to a number from 0 to WORLD_SIZE - 1; without one, unset both"
        )
    if size > 1 and "MASTER_PORT" in os.environ:
        _number("MASTER_PORT")
    return size


def leads() -> bool:
    """Check that this is the first of the processes that a launcher has started, or the only one.

    Raises:
        FistaPrunerError: as of :func:`launched`.
    """
    return launched() == 1 or _number("RANK") == 0


def module_path() -> str:
    """Return the ``PYTHONPATH`` with which a new process imports this package."""
    package = str(Path(__file__).parents[2])
    return os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))


def _number(name: str) -> int:
    value = os.environ[name]
    try:
        return int(value)
    except ValueError:
        raise FistaPrunerError(
            f"environment variable {name} is {value!r}: a launcher of several processes sets it to a number; without "
            "one, unset it"
        ) from None

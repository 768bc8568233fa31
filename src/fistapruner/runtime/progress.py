"""Receive the progress of long work."""

from __future__ import annotations

from collections.abc import Callable

Tick = Callable[[str, int, int], None]
"""Receives progress: (what, steps done, steps in all)."""


def silent(what: str, done: int, total: int) -> None:
    """Receive progress, and show nothing: the :data:`Tick` of work that nobody watches."""

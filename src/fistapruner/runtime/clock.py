"""Measure wall time by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Wall seconds by phase; time in a nested phase is not counted in the outer one.

    On a GPU a phase lasts from the end of the work that was queued before it to the end of its own. The host does not
    wait there: times are read when they are asked for.

    Args:
        device: of the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stack: list[tuple[str, float | torch.cuda.Event]] = []
        self._spans: list[tuple[str, float | torch.cuda.Event, float | torch.cuda.Event]] = []
        self._seconds: dict[str, float] = {}

    @property
    def seconds(self) -> dict[str, float]:
        """Return the seconds of every phase, in the order in which phases ended first."""
        for name, begin, end in self._spans:
            self._seconds[name] = self._seconds.get(name, 0.0) + _seconds_between(begin, end)
        self._spans.clear()
        return self._seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside the block to phase ``name``."""
        now = self._now()
        if self._stack:
            outer, since = self._stack[-1]
            self._spans.append((outer, since, now))
        self._stack.append((name, now))
        try:
            yield
        finally:
            now = self._now()
            inner, since = self._stack.pop()
            self._spans.append((inner, since, now))
            if self._stack:
                self._stack[-1] = (self._stack[-1][0], now)

    def _now(self) -> float | torch.cuda.Event:
        """Return the time, or on a GPU a mark behind the work that is queued."""
        if self._device.type != "cuda":
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(torch.cuda.current_stream(self._device))
        return mark


def _seconds_between(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    """Return the seconds between two times of a clock."""
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    assert not isinstance(begin, float)
    assert not isinstance(end, float)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000

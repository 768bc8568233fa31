"""Show people what is done: numbers and tables as text, progress, and time by phase."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MOST_DECIMALS = 6
"""Decimals that a value gets at most for the sake of its error."""

Tick = Callable[[str, int, int], None]
"""Receives progress: (what, steps done, steps in all)."""


def silent(what: str, done: int, total: int) -> None:
    """Receive progress, and show nothing: the :data:`Tick` of work that nobody watches."""


class Clock:
    """Wall seconds by phase on a device; time in a nested phase is not counted in the outer one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._running: list[str] = []
        self._since = 0.0
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside the block to phase ``name``; a GPU's work is waited for."""
        self._change([*self._running, name])
        try:
            yield
        finally:
            self._change(self._running[:-1])

    def _change(self, running: list[str]) -> None:
        """Book the time since the last change, and go on with other phases."""
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        for name in self._running[-1:]:
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._running, self._since = running, now


def shell_line(*words: object) -> str:
    """Write a command of ``fistapruner`` for a shell, to be pasted."""
    return shlex.join(["fistapruner", *map(str, words)])


def size(count: float | None) -> str:
    """Format bytes: ``512 B``, ``1.4 GiB``."""
    if count is None:
        return "–"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{significant(value)} {unit}"
        value /= 1024
    return f"{significant(value)} TiB"


def duration(seconds: float | None) -> str:
    """Format seconds: ``840 ms``, ``12.3 s``, ``4 min 05 s``, ``3 h 20 min``."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 59.95:
        return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def significant(value: float | None, digits: int = 3) -> str:
    """Format a number with ``digits`` significant digits, without an exponent where that is short."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -4 or exponent > 6:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def percent(share: float | None, digits: int = 3) -> str:
    """Format a share as a percentage: ``50.0 %``."""
    if share is None or not math.isfinite(share):
        return "–"
    return f"{significant(100 * share, digits)} %"


def count(value: int | None) -> str:
    """Format a whole number with separators: ``134,515,008``."""
    return "–" if value is None else f"{value:,}"


def counted(number: int, noun: str) -> str:
    """Write how many of something there are: ``1 layer``, ``1,024 layers``."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def span(values: Iterable[int]) -> str:
    """Format whole numbers as smallest and largest, ``1,024 to 1,280``; as one if they are equal."""
    *_, last = ordered = sorted(values)
    return count(last) if ordered[0] == last else f"{count(ordered[0])} to {count(last)}"


def short_count(value: int) -> str:
    """Format a whole number with a unit: ``135M``."""
    for unit, base in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= base:
            return f"{significant(value / base)}{unit}"
    return str(value)


def with_error(value: float | None, error: float | None, digits: int = 2) -> str:
    """Format a value with its error: ``25.32 ± 0.41``; without an unknown error.

    A small error gets up to :data:`MOST_DECIMALS` in place of ``digits``, so that it is not shown as nothing.
    """
    if value is None or not math.isfinite(value):
        return significant(value)
    known = error is not None and math.isfinite(error)
    if known and error:
        digits = next((more for more in range(digits, MOST_DECIMALS + 1) if round(error, more)), digits)
    text = f"{value:z,.{digits}f}"
    return f"{text} ± {error:,.{digits}f}" if known else text


def percent_with_error(share: float | None, error: float | None) -> str:
    """Format a share in percent, without the sign, with its error: ``52.0 ± 1.0``."""
    value, spread = (None if part is None else 100 * part for part in (share, error))
    return with_error(value, spread, 1)


def p_value(value: float) -> str:
    """Format a p-value: ``p = 0.034``, ``p < 0.001``."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def align_columns(rows: Iterable[Sequence[str]], right: Collection[int] = ()) -> str:
    """Align the cells of a text table, two spaces between columns, those in ``right`` flush right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def finite(value: Any) -> Any:
    """Put None in the place of NaN and infinity, which JSON does not have, in lists and mappings too."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

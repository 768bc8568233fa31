"""What is measured on the dense model is measured with less where a GPU's memory runs out."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from fistapruner.errors import FistaPrunerError
from fistapruner.papers.bypass import Bypass
from fistapruner.pruning import settle
from fistapruner.pruning.run import prune

LEARNED = {"remove": "mlp=25%", "multiple": 4, "method": "bypass", "steps": 2}

MEASUREMENTS: dict[str, tuple[Any, str, dict[str, Any], int]] = {
    "learn which channels stay": (Bypass, "first", {"structure": LEARNED}, 8),
    "measure sensitivity": (settle, "decide", {"allocation": "error"}, 4),
}
"""By name: the function that runs out of memory, settings that need it, and the windows in one pass."""


class Held:
    """Something large."""


class MeasuredError(Exception):
    """A measurement would now be made."""


def running_out(times: int) -> Callable[..., Any]:
    """Run out of memory so often; what was held then must be gone before the next attempt."""
    held: list[weakref.ref[Held]] = []

    def wrapped(*arguments: Any, **more: Any) -> Any:
        assert all(each() is None for each in held)
        if len(held) == times:
            raise MeasuredError
        large: Any = Held()
        large.circle = large  # it waits for the garbage collector
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    return wrapped


@pytest.mark.parametrize("what", MEASUREMENTS)
def test_one_window_at_a_time_where_memory_runs_out(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was tried is free before. A run that begins with one window at a time tries once; the error is one line."""
    place, name, settings, most = MEASUREMENTS[what]
    model = str(tiny.save("llama", tmp_path / "model"))
    settings |= {"method": "wanda", "calibration": {"source": "python", "samples": 4, "seqlen": 32}}

    def attempts(times: int, error: type[Exception], message: str | None, **execution: int) -> list[str]:
        monkeypatch.setattr(place, name, running_out(times))
        says = tiny.Said()
        with pytest.raises(error, match=message):
            prune(model, tmp_path / str(times), **settings, listener=says, execution={"threads": 1, **execution})
        return [line for line in says.sentences if "ran out" in line]

    assert attempts(1, MeasuredError, None) == [f"the memory of cpu ran out with {most} windows at a time"]
    message = f"^the memory of cpu is not enough to {what}: free some of it, shorten --seqlen, or take --"
    # The sequences of a step of bypass are not calibration windows.
    assert len(attempts(9, FistaPrunerError, message, batch_size=1)) == (2 if most == 8 else 1)

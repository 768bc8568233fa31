"""The budgets of memory that a plan has to keep, in main memory and in a GPU's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from ..errors import FistaPrunerError
from ..models.whole import other_text
from ..runtime.devices import free_memory_of_gpus, worker_devices
from ..runtime.formatting import size
from ..runtime.memory import free_device_memory, free_memory, release_device_memory, resident_memory
from ..settings.settings import Recipe
from ..settings.training_settings import TrainingRecipe
from .sizes import GENERATING, MEASURING

RESERVE = 0.9
"""Share of the free memory that a run without --memory-limit may use."""

DEVICE_RESERVE = 2**29
"""Bytes of a GPU's free memory reserved in each process for CUDA context, workspaces and fragments."""

MEMORY, TIME, DISK, DEVICE = "peak memory", "pruning, one worker", "disk", "peak GPU memory"

UNMEASURED = "--allocation uniform --weighting none --permutation none --reconstruct 0"
"""Flags with which nothing is measured on the dense model."""

Settings = TypeVar("Settings")
"""The settings that a plan chooses: :class:`~.sizes.Choice`, or those of another verb."""


@dataclass(frozen=True)
class MemoryBudget(Generic[Settings]):
    """Budget of a run in main memory or in a GPU's, and its predicted use.

    Args:
        given: the budget, in messages.
        limit: bytes.
        sharing: processes that each need the bytes of the stages, but for :data:`~.sizes.GENERATING`.
        stages: peak bytes of every stage, as a function of the choice.
        even: the smallest settings, in messages.
        kind: kind of memory, in messages.
        quantity: row of the report.
        suffix: added to names of stages.
        more, lighter: advice in messages.
        option: names the text, in messages.
        parent: bytes of the process that starts the sharing ones, beside them.
    """

    given: str
    limit: int
    sharing: int
    stages: Callable[[Settings], dict[str, int]]
    even: str
    kind: str = "memory"
    quantity: str = MEMORY
    suffix: str = ""
    more: str = "give more"
    lighter: str = "shorten --seqlen, or choose a lighter --method"
    option: str = "--calibration"
    parent: int = 0

    def worst(self, choice: Settings) -> str:
        """Return the stage that needs most."""
        stages = self.stages(choice)
        return max(stages, key=lambda name: stages[name])

    def peak(self, choice: Settings) -> int:
        """Return the peak bytes of all stages."""
        return max(self.stages(choice).values())

    def load(self, choice: Settings) -> tuple[float, str]:
        """Return the stage that takes the largest share of its budget, after that share."""
        together = self._together(choice)
        return max((each / max(1, self.limit), name) for name, each in together.items())

    def holds(self, choice: Settings) -> bool:
        """Check whether a run with ``choice`` fits."""
        return self.load(choice)[0] <= 1

    def refusal(self, choice: Settings) -> FistaPrunerError:
        """Make the error that ``choice`` does not fit."""
        _, worst = self.load(choice)
        needs = f"{self.given} is not enough: {worst} needs {size(self.stages(choice)[worst])}"
        if worst == GENERATING:
            return FistaPrunerError(f"{needs}; {self.more}, or {other_text(self.option)}")
        shared = f" in each of {self.sharing} workers" if self.sharing > 1 else ""
        beside = f" beside the {size(self.parent)} of the process that starts the workers" if self.parent else ""
        fewer = "take fewer --workers, " if self.sharing > 1 else ""
        without = f", or measure nothing with {UNMEASURED}" if worst == MEASURING else ""
        advice = f"{fewer}{self.lighter}{without}"
        return FistaPrunerError(f"{needs}{shared}{beside}, even with {self.even}; {self.more}, {advice}")

    def _together(self, choice: Settings) -> dict[str, int]:
        """Compute what each stage needs in all processes."""
        stages = self.stages(choice)
        return {
            name: each if name == GENERATING else each * self.sharing + self.parent for name, each in stages.items()
        }


@dataclass(frozen=True)
class Resources:
    """Memory that a run may take.

    Args:
        limit: bytes of main memory for all workers together.
        device: device of the layers.
        free: free bytes of each GPU with workers; empty on a CPU.
        places: the device of each worker.
    """

    limit: int
    device: torch.device
    free: Mapping[torch.device, int]
    places: tuple[torch.device, ...]

    @classmethod
    def of_this_machine(cls, recipe: Recipe | TrainingRecipe, device: torch.device, workers: int) -> Resources:
        """Measure the free memory of this machine."""
        execution = recipe.execution
        limit = execution.memory_limit or int((free_memory() + resident_memory()) * RESERVE)
        release_device_memory()
        alone = device.type != "cuda" or workers <= 1
        places = [device] if alone else worker_devices(execution.device, workers, execution.threads)
        if device.type != "cuda":
            return cls(limit, device, {}, tuple(places))
        others = {place for place in places if place != device}
        free = {place: free_memory_of_gpus(torch.cuda.device_count())[place.index] for place in others}
        free[device] = free_device_memory(device)
        return cls(limit, device, free, tuple(places))


def fewest_windows(count: int) -> tuple[str, str]:
    """Say the fewest windows in one pass, 1 or as given, and advise fewer."""
    if count == 1:
        return "one window at a time", ""
    return f"{count} windows at a time (--batch-size)", "lower --batch-size, "


@contextmanager
def room_for(device: torch.device, what: str) -> Iterator[None]:
    """Turn a GPU's out-of-memory error inside the block into one line with advice.

    Args:
        device: the GPU.
        what: the work inside the block, such as ``one window``.

    Raises:
        FistaPrunerError: the GPU has no room for ``what``.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise FistaPrunerError(
            f"the {size(free_device_memory(device))} that are free on {device} are not enough for {what} through one "
            "decoder layer: free some of it, shorten --seqlen, lower --batch-size, or choose --device cpu"
        ) from None

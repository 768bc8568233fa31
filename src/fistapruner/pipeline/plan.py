"""What a run will need, before it begins: memory, disk and time; and what is chosen so that it fits.

Memory and disk are counted (:mod:`fistapruner.pipeline.sizes`), time is measured on the first batch of calibration windows
(:mod:`fistapruner.pipeline.probe`). The predictions are kept and stand beside the measurements in the report.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
from torch import Tensor

from ..errors import FistaPrunerError
from ..models.layout import Layout
from ..models.skeleton import Skeleton
from ..recipe import Recipe
from ..reporting.schema import LayerEntry, PlanRow, Totals
from ..sparsity import Sparsity
from .probe import measure_time
from .sizes import Choice, Sizes

GIB = 2**30

RESERVE = 0.9
"""Share of the free memory that a run without --memory-limit plans with."""

MEMORY, TIME, DISK, DEVICE = "peak memory", "pruning, one worker", "disk", "peak GPU memory"


@dataclass(frozen=True)
class Plan:
    """A plan that fits.

    Args:
        choice: what was chosen.
        stages: bytes of main memory (of the device, for the work on a GPU) at the peak of each stage.
        rows: the predictions, for the report.
        says: sentences on what was chosen, and why.
    """

    choice: Choice
    stages: Mapping[str, int]
    rows: tuple[PlanRow, ...]
    says: tuple[str, ...]


def make_plan(
    skeleton: Skeleton,
    layout: Layout,
    recipe: Recipe,
    sparsity: Mapping[str, Sparsity],
    tokens: Tensor,
    batch_size: int,
    out: Path,
    workers: int = 1,
) -> Plan:
    """Plan a run.

    Args:
        skeleton: the model.
        layout: operators to prune.
        recipe: settings; ``execution.memory_limit`` is what all workers together may use.
        sparsity: pattern of every operator, by full name.
        tokens: (samples, seqlen) calibration tokens; only their number matters for memory.
        batch_size: windows in one forward pass, if they fit.
        out: the run directory, whose disk is asked for its free space.
        workers: processes of this machine that work at once: on layers, or with ``propagate=pruned`` on parts of a group.

    Raises:
        FistaPrunerError: no choice fits the memory, or the disk is too small; names the stage and the bytes.
    """
    limit = recipe.execution.memory_limit or int(free_memory() * RESERVE)
    given = f"--memory-limit {limit / GIB:.2f} GiB" if recipe.execution.memory_limit else f"the {limit / GIB:.2f} GiB that are free"
    model = Sizes.measure(skeleton, layout, recipe, sparsity, tokens)
    sequential = recipe.propagate == "pruned"  # parts are what may be spread then, so groups are always cut
    solvers, workers = (workers, 1) if sequential and workers > 1 else (0, workers)
    choices = [Choice(batch_size, on_disk=workers > 1, by_operator=sequential), Choice(batch_size, on_disk=True, by_operator=sequential)]
    size = batch_size
    while size > 1:
        size = size // 2
        choices.append(Choice(size, on_disk=True, by_operator=sequential))
    choices.append(Choice(1, on_disk=True, by_operator=True))
    if recipe.execution.batch_size:
        choices = [choice for choice in choices if choice.batch_size == batch_size] + [Choice(batch_size, on_disk=True, by_operator=True)]
    chosen, stages = choices[-1], model.stages(choices[-1], solvers)
    for choice in choices:
        stages = model.stages(choice, solvers)
        if max(stages.values()) * workers <= limit:
            chosen = choice
            break
    else:
        stage = max(stages, key=lambda name: stages[name])
        shared = f" in each of {workers} workers" if workers > 1 else ""
        raise FistaPrunerError(
            f"{given} is not enough: {stage} needs {stages[stage] / GIB:.2f} GiB{shared}, even with hidden states on disk and "
            "one window at a time; give more, shorten --seqlen, or choose a lighter --method"
        )
    says = []
    if chosen != choices[0]:
        changed = ["hidden states go to disk"] if chosen.on_disk and not choices[0].on_disk else []
        changed += [f"{chosen.batch_size} windows at a time instead of {batch_size}"] if chosen.batch_size != batch_size else []
        changed += ["groups are solved in parts"] if chosen.by_operator and not sequential else []
        says.append(f"to fit {given}: {', '.join(changed)}")
    disk = model.disk(chosen, workers)
    place = _existing(out)
    if (free := shutil.disk_usage(place).free) < disk:
        raise FistaPrunerError(f"{out} needs {disk / GIB:.2f} GiB of disk and {place} has {free / GIB:.2f} GiB free")
    seconds = measure_time(skeleton, layout, recipe, sparsity, tokens, chosen.batch_size)
    cuda = skeleton.device.type == "cuda"
    rows = [
        PlanRow(quantity=DEVICE if cuda else MEMORY, unit="bytes", planned=max(stages.values())),
        PlanRow(quantity=DISK, unit="bytes", planned=disk),
    ]
    if seconds is not None:
        rows.append(PlanRow(quantity=TIME, unit="seconds", planned=seconds))
    worst = max(stages, key=lambda name: stages[name])
    duration = "" if seconds is None else f", about {seconds / workers / 60:.1f} min"
    says.append(f"plan: {max(stages.values()) / GIB:.2f} GiB of memory at its peak ({worst}), {disk / GIB:.2f} GiB of disk{duration}")
    return Plan(chosen, stages, tuple(rows), tuple(says))


def check_plan(rows: list[PlanRow], totals: Totals, layers: list[LayerEntry], disk: int) -> list[PlanRow]:
    """Put what was measured beside what was planned."""
    peaks = [layer.peak_memory for layer in layers if layer.peak_memory] + [totals.peak_memory or 0]
    measured = {
        MEMORY: float(max(peaks)),
        DEVICE: None if totals.peak_device_memory is None else float(totals.peak_device_memory),
        DISK: float(disk),
        TIME: sum(sum(layer.seconds.values()) for layer in layers),
    }
    return [row.model_copy(update={"actual": measured.get(row.quantity)}) for row in rows]


def free_memory() -> int:
    """Bytes this process can still get: of the machine, or of its control group where that is less."""
    free = psutil.virtual_memory().available
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            free = min(free, int(limit) - used)
    except (OSError, ValueError):
        pass  # no control group (v2) here
    return max(free, 0) + psutil.Process().memory_info().rss


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path

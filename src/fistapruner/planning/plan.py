"""Plan a run before it begins: predict memory, disk and time, and choose settings that fit.

Memory and disk are counted (:mod:`fistapruner.planning.sizes`); time is measured on the first batch of calibration
windows (:mod:`fistapruner.planning.time_probe`). The report shows predictions beside measurements.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ..core import Constraint
from ..errors import FistaPrunerError
from ..models.layerwise import LayerwiseModel
from ..models.layout import Layout
from ..papers.bypass import LENGTH, MASKS, SEQUENCES
from ..runs.layer_records import LayerEntry
from ..runs.records import PlanRow, Totals
from ..runtime.files import existing_folder
from ..runtime.formatting import count, duration, percent, size
from ..settings.settings import Recipe
from ..structure.smaller import Widths
from .budget import DEVICE, DEVICE_RESERVE, DISK, MEMORY, TIME, MemoryBudget, Resources, fewest_windows, room_for
from .measured_sizes import low_rank_weights, measure_sizes
from .phases import measure_phases, with_phases
from .sizes import Choice, Sizes
from .time_probe import Beside, measure_time


@dataclass(frozen=True)
class Plan:
    """A plan that fits.

    Args:
        choice: the chosen settings.
        stages: peak bytes of each stage, of main memory; on a GPU those of the GPU, then those of main memory with
            ``(main memory)`` in their names.
        rows: the predictions, for the report.
        says: sentences on the choice and its reasons.
    """

    choice: Choice
    stages: Mapping[str, int]
    rows: tuple[PlanRow, ...]
    says: tuple[str, ...]


def make_plan(
    model: LayerwiseModel,
    layout: Layout,
    recipe: Recipe,
    sparsity: Mapping[str, Constraint],
    tokens: Tensor,
    batch_size: int,
    out: Path,
    workers: int = 1,
    widths: Widths | None = None,
    *,
    drawn: bool = False,
    after: tuple[int, int] = (0, 0),
) -> Plan:
    """Plan a run.

    Args:
        model: the model.
        layout: operators to prune.
        recipe: settings; ``execution.memory_limit`` is for all workers together, in main memory. Of a GPU, all free
            memory may be used.
        sparsity: pattern of every operator, by full name.
        tokens: (windows, seqlen) token ids of the first batch; of the others only their number matters.
        batch_size: windows in one forward pass, if they fit.
        out: the run directory; its disk must have the free space.
        workers: parallel processes on this machine; with ``propagate=pruned`` there is one.
        widths: whose channels are removed; ``layout`` has the shapes afterwards.
        drawn: whether the calibration windows are there already, so that the model generates none.
        after: tokens that are evaluated and tokens that continue sample prompts after the run, of all models.

    Raises:
        FistaPrunerError: no choice fits the memory (main or the GPU's), or the disk is too small; names the stage and
            the bytes.
    """
    with room_for(model.device, "one window"):
        needs = measure_sizes(model, layout, recipe, sparsity, tokens, widths, drawn=drawn)
    resources = Resources.of_this_machine(recipe, model.device, workers)
    fitted = fit(needs, recipe, resources, batch_size, workers)
    chosen = fitted.choice
    # The machines of a Ray cluster have their own memory; its workers' files are here.
    writing = max(fitted.workers, min(recipe.execution.workers or 1, len(model)))
    disk = needs.disk(chosen, writing if _in_files(recipe) else 1)
    place = existing_folder(out)
    if (free := shutil.disk_usage(place).free) < disk:
        raise FistaPrunerError(f"{out} needs {size(disk)} of disk and {place} has {size(free)} free")
    with room_for(model.device, f"{chosen.batch_size} windows at a time"):
        seconds = measure_time(
            model,
            layout,
            recipe,
            sparsity,
            tokens,
            chosen.batch_size,
            on_device=chosen.on_device,
            widths=widths,
            beside=(beside := Beside()),
        )
        phases = {}
        if seconds is not None:
            phases = measure_phases(model, recipe, tokens.shape[1], beside, drawn=drawn, after=after)
    found = written(fitted, disk, seconds, phases)
    if recipe.structure.method == "bypass" and widths is not None and any(widths.units):
        passed = SEQUENCES * min(LENGTH, tokens.shape[1])
        said = (
            f"learning which channels stay comes on top: {count(recipe.structure.steps)} steps of {MASKS} x "
            f"{count(passed)} tokens through the whole model; the run says how long they take before the first"
        )
        found = replace(found, says=(*found.says, said))
    if not recipe.low_rank:
        return found
    more, weights = low_rank_weights(layout, recipe, sparsity), sum(map(layout.weights, range(len(model))))
    nbytes = more * min(model.dtype.itemsize, model.checkpoint.dtype.itemsize)
    share = percent(more / weights)
    said = f"low-rank parts: {count(more)} additional weights, {share} of the operators' ({size(nbytes)})"
    return replace(found, says=(*found.says, said))


@dataclass(frozen=True)
class Fitted:
    """A choice that fits, and the budgets that it fits.

    Args:
        choice: the chosen settings.
        workers: processes that prune a layer each.
        budgets: of the GPU, if there is one, and of main memory.
        changed: sentence on the changed settings; None where none changed.
    """

    choice: Choice
    workers: int
    budgets: tuple[MemoryBudget[Choice], ...]
    changed: str | None


def fit(needs: Sizes, recipe: Recipe, resources: Resources, batch_size: int, workers: int = 1) -> Fitted:
    """Choose settings of a run that fit into memory.

    Args:
        needs: sizes of the parts of memory.
        recipe: settings.
        resources: memory that the run may use.
        batch_size: windows in one forward pass, if they fit.
        workers: parallel processes on this machine.

    Raises:
        FistaPrunerError: no choice fits; names the stage and the bytes.
    """
    workers = 1 if recipe.propagate == "pruned" else workers
    budgets = [_host_budget(needs, recipe, resources.limit, workers)]
    if needs.cuda:
        budgets.append(_device_budget(needs, recipe, resources, workers))
    choices = _choices(batch_size, recipe, needs.cuda)
    chosen = next((choice for choice in choices if all(budget.holds(choice) for budget in budgets)), None)
    if chosen is None:
        raise next(budget for budget in budgets if not budget.holds(choices[-1])).refusal(choices[-1])
    sentence = None
    asked = next(choice for choice in choices if not choice.on_device)
    if chosen != asked and not chosen.on_device:
        changed = ["hidden states go to disk"] if chosen.on_disk and not asked.on_disk else []
        changed += (
            [f"{chosen.batch_size} windows at a time instead of {batch_size}"]
            if chosen.batch_size != batch_size
            else []
        )
        given = " and ".join(budget.given for budget in budgets if not budget.holds(asked))
        sentence = f"to fit {given}: {', '.join(changed)}"
    return Fitted(chosen, workers, tuple(reversed(budgets)), sentence)


def written(fitted: Fitted, disk: int, seconds: float | None, phases: Mapping[str, float] | None = None) -> Plan:
    """Make a plan's sentences and rows of the report.

    Args:
        fitted: the choice.
        disk: bytes of disk that the run needs.
        seconds: estimated time with one worker; None where it was not estimated.
        phases: estimated times of what is not pruning (:mod:`.phases`).
    """
    chosen, budgets = fitted.choice, fitted.budgets
    rows = [PlanRow(quantity=budget.quantity, unit="bytes", planned=budget.peak(chosen)) for budget in budgets]
    rows.append(PlanRow(quantity=DISK, unit="bytes", planned=disk))
    if seconds is not None:
        rows.append(PlanRow(quantity=TIME, unit="seconds", planned=seconds))
    rows += [PlanRow(quantity=name, unit="seconds", planned=value) for name, value in (phases or {}).items()]
    time = "" if seconds is None else f", about {duration(seconds / fitted.workers)} of pruning"
    peaks = ", ".join(
        f"{size(budget.peak(chosen))} of {budget.kind} at its peak ({budget.worst(chosen)})" for budget in budgets
    )
    says = [] if fitted.changed is None else [fitted.changed]
    says.append(f"plan: {peaks}, {size(disk)} of disk{time}")
    if phases and seconds is not None:
        whole = sum(phases.values()) + seconds / fitted.workers
        parts = ", ".join(f"{name} {duration(value)}" for name, value in phases.items())
        says.append(f"about {duration(whole)} in all: beside the pruning, {parts}")
    if len(budgets) > 1:
        place = "in files" if chosen.on_disk else "in the GPU's memory" if chosen.on_device else "in main memory"
        says.append(f"hidden states between decoder layers: {place}")
    stages = {f"{stage}{budget.suffix}": size for budget in budgets for stage, size in budget.stages(chosen).items()}
    return Plan(chosen, stages, tuple(rows), tuple(says))


def check_plan(
    rows: list[PlanRow],
    totals: Totals,
    layers: list[LayerEntry],
    disk: int,
    seconds: Mapping[str, float | None] | None = None,
) -> list[PlanRow]:
    """Add measured values to the rows of a plan.

    Args:
        rows: the predictions.
        totals, layers: what the run measured.
        disk: bytes of the run directory.
        seconds: times by quantity; None has that of pruning, the sum over the layers.
    """
    peaks = [layer.peak_memory for layer in layers if layer.peak_memory] + [totals.peak_memory or 0]
    measured: dict[str, float | None] = {
        MEMORY: float(max(peaks)),
        DEVICE: None if totals.peak_device_memory is None else float(totals.peak_device_memory),
        DISK: float(disk),
        TIME: sum(sum(layer.seconds.values()) for layer in layers),
        **(seconds or {}),
    }
    rows = [row.model_copy(update={"actual": measured.get(row.quantity)}) for row in rows]
    return with_phases(rows, totals.time_split)


def _host_budget(needs: Sizes, recipe: Recipe, limit: int, workers: int) -> MemoryBudget[Choice]:
    """Make the budget of main memory, for a run on a CPU or beside a GPU."""
    given = f"--memory-limit {size(limit)}" if recipe.execution.memory_limit else f"the {size(limit)} that are free"
    parent = needs.base if _in_files(recipe) else 0
    windows, lower = fewest_windows(recipe.execution.batch_size or 1)
    stages = needs.host_stages if needs.cuda else needs.stages
    return MemoryBudget(
        f"{given} of main memory" if needs.cuda and not recipe.execution.memory_limit else given,
        limit,
        workers,
        stages,
        even=f"hidden states on disk and {windows}",
        kind="main memory" if needs.cuda else MemoryBudget.kind,
        suffix=" (main memory)" if needs.cuda else "",
        lighter=f"{lower}{MemoryBudget.lighter}",
        parent=parent,
    )


def _device_budget(needs: Sizes, recipe: Recipe, resources: Resources, workers: int) -> MemoryBudget[Choice]:
    """Make the budget of the GPU with least free memory for each worker, or of this process's GPU."""
    shares = Counter(resources.places if workers > 1 else [resources.device])
    free = {place: max(0, resources.free[place] - DEVICE_RESERVE * shares[place]) for place in shares}
    least = min(free, key=lambda place: free[place] / shares[place])
    windows, lower = fewest_windows(recipe.execution.batch_size or 1)
    return MemoryBudget(
        f"the {size(free[least])} that are free on {least}",
        free[least],
        shares[least],
        needs.stages,
        kind="GPU memory",
        quantity=DEVICE,
        even=windows,
        more="free some of it",
        lighter=f"{lower}{MemoryBudget.lighter}",
    )


def _in_files(recipe: Recipe) -> bool:
    """Whether the workers of an executor hand hidden states to each other in files, be it to one worker."""
    return recipe.execution.executor != "serial" and recipe.propagate == "dense"


def _choices(batch_size: int, recipe: Recipe, cuda: bool) -> list[Choice]:
    """List the possible choices, the preferred ones first, the one that needs least memory last.

    On a CPU all of them save main memory. With a GPU, hidden states stay there where that costs nothing else; files
    save main memory; small batches save the GPU's.
    """
    in_files = _in_files(recipe)
    sizes = [batch_size]
    while sizes[-1] > 1 and not recipe.execution.batch_size:
        sizes.append(sizes[-1] // 2)
    if cuda:
        places = (True,) if in_files else (False, True)
        resident = [] if in_files else [Choice(batch_size, on_device=True)]
        return resident + [Choice(size, on_disk=place) for size in sizes for place in places]
    return [Choice(batch_size, on_disk=in_files), *(Choice(size, on_disk=True) for size in sizes)]

"""Bound what a pruning run needs before it begins: memory, disk, and the time of one layer.

The bound on memory adds the largest decoder layer, the hidden states between layers, the Gram matrices and what the
method needs beside them, and a batch of measured forward passes, with a margin. Shapes come from the checkpoint's
headers; a forward pass of one window and a small solve of every shape are measured. Where memory does not hold all of
it, hidden states go to files, then fewer windows pass at once; a run that cannot fit is refused before it works.

The time is that of one decoder layer, pruned on one batch of windows, for all layers.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .allocate.fisher import HEAD_TOKENS, WIDE
from .allocate.measure import differentiates, needs_measuring, permutes, weighs_rows, windows_measured
from .core import Constraint, LayerProblem
from .errors import FistaPrunerError
from .models.build import require_whole, whole_bytes
from .models.layers import Call
from .models.links import named_size
from .models.operators import Operator
from .papers.bypass import LENGTH, SEQUENCES
from .passes.store import scratch_factory
from .passes.stream import embed
from .pruning.context import LayerContext, LayerStreams
from .pruning.drift import dense_windows, drift_sources, kept_width
from .pruning.layer import prune_layer
from .pruning.workers import default_threads, local_workers
from .runtime.devices import cpu_threads, free_device_memory, free_memory, peak_bytes, resident_memory, worker_devices
from .runtime.files import existing_folder
from .runtime.numerics import ordered_attention, windows_at_once
from .runtime.show import align_columns, counted, duration, size
from .solvers.base import Method
from .solvers.low_rank import solve_low_rank
from .structure.units import HEADS
from .text import SELF, calibration_length
from .text.generate import generation_bytes
from .training.plan import MASTER_BYTES, RESERVE
from .training.reconstruct import passes

DEVICE_RESERVE = 2**29
"""Bytes of a GPU's free memory that each process leaves to CUDA's context, workspaces and fragments."""

RETAINED = 96 * 2**20
"""Freed memory that the C library keeps: twice its largest block threshold (32 MiB), and fragments."""

MARGIN = 1 / 12
"""Share added to the counted bytes, for small temporaries and fragments."""

REMOVAL = 11
"""Choosing the channels of an (m, n) operator takes at most so many fp32 matrices (n, n + m) (measured)."""

RECONSTRUCTION = MASTER_BYTES + 1
"""Bytes of a reconstructed number, with its mask."""

PROBE = 256
"""Inputs of the small solve: enough that terms linear in the size are small against n^2."""

TIMED_STEPS = 4
"""Steps of block reconstruction that are timed."""

GENERATING, MEASURING = "generating text with the whole model", "measuring the dense model"


@dataclass(frozen=True)
class Choice:
    """Settings that a plan may change to make a run fit: hidden states in files, or in the GPU's memory."""

    batch_size: int
    on_disk: bool = False
    on_device: bool = False


@dataclass(frozen=True)
class Plan:
    """What a run will need at most.

    Args:
        memory: peak bytes of main memory of one process, by stage; ``device_memory``: of a GPU, empty on a CPU.
        disk: peak bytes of the run directory.
        notes: sentences on the model, and on settings that were changed to fit.
        seconds: to prune all layers with one process; None where it was not timed.
    """

    choice: Choice
    memory: Mapping[str, int]
    device_memory: Mapping[str, int]
    disk: int
    workers: int = 1
    notes: tuple[str, ...] = ()
    seconds: float | None = None

    @property
    def says(self) -> list[str]:
        """Say the plan in sentences."""
        kinds = {"GPU memory": self.device_memory, "main memory" if self.device_memory else "memory": self.memory}
        worst = {kind: max(found, key=found.__getitem__) for kind, found in kinds.items() if found}
        peaks = [f"{size(kinds[kind][stage])} of {kind} ({stage})" for kind, stage in worst.items()]
        each = " in each worker" if self.workers > 1 else ""
        said = [*self.notes, f"plan: at most {' and '.join(peaks)}{each}, {size(self.disk)} of disk"]
        if self.device_memory:
            place = "files" if self.choice.on_disk else "the GPU's memory" if self.choice.on_device else "main memory"
            said.append(f"hidden states between decoder layers: in {place}")
        if self.seconds is not None:
            said.append(
                f"about {duration(self.seconds / self.workers)} of pruning; what is done before and after, such as "
                "measuring the dense model and evaluating, comes on top"
            )
        return said

    def __str__(self) -> str:
        stages = [*self.device_memory.items(), *self.memory.items()]
        rows = [("", size(nbytes), name) for name, nbytes in sorted(stages, key=lambda stage: -stage[1])]
        return "\n".join([*self.says, align_columns(rows, right=(1,))])

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {**asdict(self), "says": self.says}


def make_plan(context: LayerContext, out: Path, *, drawn: bool = False, timed: bool = False) -> Plan:
    """Plan a run.

    Of the recipe, ``execution.memory_limit`` is for all workers together, in main memory; of a GPU, all free memory may
    be used.

    Args:
        drawn: the calibration windows are there already, so that the model generates none.
        timed: prune one layer on one batch of random tokens, for the time.
    """
    model, recipe, execution = context.model, context.recipe, context.recipe.execution
    device, workers = model.device, 1
    if recipe.propagate == "dense":
        workers = min(local_workers(execution), len(model))
    try:
        with cpu_threads(default_threads(execution)):
            bound = Bound(context)
            choice, changed = fit(bound, workers)
            # The machines of a Ray cluster have their own memory; its workers' files are here.
            writing = max(workers, min(execution.workers or 1, len(model))) if bound.in_files else 1
            disk, place = bound.disk(choice, writing), existing_folder(out)
            if (free := shutil.disk_usage(place).free) < disk:
                raise FistaPrunerError(f"{out} needs {size(disk)} of disk and {place} has {size(free)} free")
            seconds = bound.seconds(choice) if timed else None
    except torch.OutOfMemoryError:
        raise FistaPrunerError(
            f"the {size(free_device_memory(device))} that are free on {device} are not enough for one window through "
            "one decoder layer: free some of it, shorten --seqlen, or choose --device cpu"
        ) from None
    memory, on_gpu = (bound.host(choice), bound.stages(choice)) if bound.cuda else (bound.stages(choice), {})
    if SELF in recipe.calibration.sources.values() and not drawn:  # in this process alone
        whole = whole_bytes(model.checkpoint, model.dtype) + generation_bytes(model, bound.samples, bound.seqlen)
        instead = "take --calibration c4, python or a file"
        require_whole(whole, device, execution.memory_limit, "--calibration self", instead)
        (on_gpu or memory)[GENERATING] = whole if on_gpu else bound.base + whole
    return Plan(choice, memory, on_gpu, disk, workers, changed, seconds)


class Group(NamedTuple):
    """Bytes of a group of operators: of its sums (Gram, weight, drift), and of solving it with them."""

    name: str
    sums: int
    solving: int
    routed: bool


class Bound:
    """Bound the bytes of a run where its layers are computed, in main memory beside a GPU, and on disk.

    The largest layer, the largest pass and the largest group count together, wherever each of them is in the model.
    """

    def __init__(self, context: LayerContext) -> None:
        model, layout, recipe, widths = context.model, context.layout, context.recipe, context.widths
        self.context, self.model, self.layout, self.recipe = context, model, layout, recipe
        self.samples, self.seqlen = recipe.calibration.samples, calibration_length(recipe.calibration, model)
        self.cuda, checkpoint, layers = model.device.type == "cuda", model.checkpoint, range(len(model))
        # The workers of an executor hand hidden states to each other in files, be it to one worker.
        self.in_files = recipe.execution.executor != "serial" and recipe.propagate == "dense"
        self.base = resident_memory() + RETAINED + 8 * self.samples * self.seqlen
        sources = [model.layer_sources(index) for index in layers]
        self.layer = max(map(model.pass_bytes, sources))
        self.ends = model.pass_bytes(set(checkpoint.names()).difference(*sources))
        self.largest = max(entry.nbytes for entry in checkpoint.stored)
        itemsize, stored = model.dtype.itemsize, checkpoint.dtype.itemsize
        self.window = self.seqlen * model.width * itemsize
        weights = [layout.weights(index) for index in layers]  # what a layer's file has, at most
        if widths.units:
            weights = [model.pass_bytes(names) // itemsize for names in sources]
        low_rank = recipe.low_rank * sum(operator.rows + operator.columns for _, operator in layout.operators())
        self.done = stored * (max(weights) + low_rank)
        self.saved = checkpoint.nbytes + checkpoint.companion_bytes + stored * (sum(weights) + 2 * low_rank)
        self.metric = 4 * model.width ** (2 if model.width <= WIDE else 1) if recipe.reconstruct else 0
        # Stores of hidden states of all windows inside a layer, of the dense pass's windows, and of both together.
        self.inside = 1 + bool(recipe.reconstruct and recipe.dense_share < 1)
        self.dense = 2 * (recipe.propagate == "pruned" and recipe.dense_share > 0) + recipe.corrects_drift
        self.kept = self.entering = self.inputs = self.together = self.sums = self.forward = self.backward = 0
        self.groups, self.widest = list[Group](), (0, 0)
        for index in layers:
            self._count_layer(index)
        tokens = torch.randint(model.vocabulary, (1, self.seqlen), generator=torch.Generator().manual_seed(0))
        with model.embeddings_and_head(head=False):
            hidden, calls = model.embed(tokens)
        self.heaviest = max(layers, key=layout.weights)
        for index in {self.heaviest, self.widest[1]}:
            self._measure_pass(index, hidden, calls[index])

    def _count_layer(self, index: int) -> None:
        """Count what the groups of a layer need, and the values of a window that are stored inside of it."""
        recipe, layout, groups = self.recipe, self.layout, self.layout.layers[index]
        units, solved = self.context.widths.channels(index), self.context.solved(index)
        told = drift_sources(self.context, index, same=recipe.propagate == "dense")
        cut = [groups[number] for number in self.context.fitted(index)]
        found = [self._cut(group) for group in (*cut, *((unit.consumer,) for unit in units))]
        found += [self._solve(index, groups[number], told.get(number)) for number in solved]
        self.groups += found
        self.sums = max(self.sums, sum(group.sums for group in found))
        if not recipe.error_correction:  # one pass gathers the sums of all groups
            self.together = max(self.together, sum(group.sums for group in found if not group.routed))
        values = self.seqlen * self.model.dtype.itemsize
        operators = [*layout.in_layer(index), *(unit.consumer for unit in units)]
        inputs = max((operator.columns for operator in operators), default=0)
        mixtures = {operator.experts: operator.columns for operator in operators if operator.experts}
        self.widest = max(self.widest, (inputs, index))
        self.kept = max(self.kept, values * sum(kept_width(groups[number], told[number]) for number in told))
        self.entering = max(self.entering, values * (inputs + sum(mixtures.values())))
        drift = 2 * 4 * self.seqlen * self.model.width * recipe.corrects_drift
        self.inputs = max(self.inputs, 4 * self.seqlen * inputs * (3 if told else 1) + drift)

    def _cut(self, group: Sequence[Operator]) -> Group:
        """Count what choosing channels of operators on one input takes, with the sums of both halves."""
        n, rows, name = group[0].columns, sum(operator.rows for operator in group), group[0].name.rpartition(".")[2]
        return Group(name, 4 * n * (2 * n + rows), REMOVAL * 4 * n * (n + rows), bool(group[0].experts))

    def _solve(self, index: int, group: Sequence[Operator], drift_from: str | None) -> Group:
        """Count what solving a group takes; small solves are measured."""
        n, rows, recipe = group[0].columns, sum(operator.rows for operator in group), self.recipe
        gram, weight, drifts = 4 * n * n, 4 * rows * n, drift_from is not None
        sums = gram + weight + {None: 0, "inputs": 2 * gram, "outputs": weight + gram}[drift_from]
        solving = weight * (1 + drifts) * (1 + weighs_rows(recipe))
        solving += max(
            solve_bytes(operator.rows, n, pattern, recipe.method, str(self.model.device), drifts, recipe.low_rank)
            for operator in group
            for pattern in [self.context.sparsity[self.layout.full_name(index, operator)]]
        )
        name = "+".join(operator.name.rpartition(".")[2] for operator in group)
        return Group(name, sums, max(solving, sums + weight), bool(group[0].experts))

    def _measure_pass(self, index: int, hidden: Tensor, call: Call) -> None:
        """Measure one window through a layer: forwards, and back where the recipe asks for it."""

        def there_and_back() -> None:
            with torch.enable_grad(), ordered_attention(self.model.device):
                entering = hidden.detach().requires_grad_()
                torch.autograd.grad(self.model.run(index, entering, call).float().sum(), entering)

        with self.model.layer(index), torch.no_grad():
            self.forward = max(self.forward, peak_bytes(lambda: self.model.run(index, hidden, call)))
            if differentiates(self.recipe):
                self.backward = max(self.backward, peak_bytes(there_and_back))

    def stages(self, choice: Choice) -> dict[str, int]:
        """Bound the peak bytes of every stage of a run: of main memory on a CPU, or of the GPU."""
        recipe, batch = self.recipe, min(choice.batch_size, self.samples)
        base, largest, done = (0, 0, 0) if self.cuda else (self.base, self.largest, self.done)
        states = self._states(choice, 1) if choice.on_device or not (self.cuda or choice.on_disk) else 0
        passing = batch * (self.forward + 2 * self.window + self.inputs)
        if self.cuda and not choice.on_device:
            passing += batch * self._copied()
        loaded, logits = self.layer + done + states + self.together, 4 * 4 * min(self.seqlen, HEAD_TOKENS)
        first = batch * 2 * self.window + (self.samples * self.window if states else 0)
        ends = max(self.ends, largest) + largest + max(first, logits * self.model.vocabulary)
        found = {"embeddings and head": ends, "passing a layer": loaded + passing}
        for name, sums, solving, _ in self.groups:
            found[f"pruning {name}"] = max(found.get(f"pruning {name}", 0), loaded + max(sums + passing, solving))
        if recipe.reconstruct:
            trained = RECONSTRUCTION * self.layout.weights(self.heaviest) + self.layer + 3 * self.metric
            found["block reconstruction"] = loaded + trained + self.backward + 4 * self.window
        if self.context.widths.units:
            # The smaller layer is proven beside the dense one; bypass learns on longer batches.
            windows = max(batch, -(-SEQUENCES * LENGTH // self.seqlen) * (recipe.structure.method == "bypass"))
            found["removing structure"] = 4 * self.layer + windows * passing // batch
            if recipe.structure.method == "goa":  # attention probabilities, three temporaries, two problems
                heads = named_size(self.model.config.get_text_config(), HEADS) or 1
                comparing = passing + 4 * 4 * self.seqlen**2 * heads + 2 * self.sums
                found["removing structure"] = max(found["removing structure"], loaded + comparing, loaded + ends)
        if needs_measuring(recipe):
            passed = self.layer + min(batch, 4) * max(self.backward, self.forward + self.inputs)
            passed += self.sums + 3 * max((group.sums for group in self.groups), default=0) * permutes(recipe)
            found[MEASURING] = (0 if self.cuda else self._measured(choice)) + max(passed, ends)
        return {name: base + round((1 + MARGIN) * nbytes) for name, nbytes in found.items()}

    def host(self, choice: Choice) -> dict[str, int]:
        """Bound the peak bytes of main memory of every stage of a run on GPUs."""
        states = 0 if choice.on_device or choice.on_disk else self._states(choice, 1)
        moving = min(choice.batch_size, self.samples) * (2 * self.window + self.inputs + 2 * self._copied())
        done = self.done * (2 if self.recipe.reconstruct else 1) + self.metric
        pruning = max(min(2 * self.largest, self.layer), done + moving)
        found = {"the embeddings (main memory)": 2 * self.largest, "pruning a layer (main memory)": states + pruning}
        if needs_measuring(self.recipe):
            read = max(moving, 2 * self.largest)
            found[f"{MEASURING} (main memory)"] = self._measured(choice) + read
        return {name: self.base + round((1 + MARGIN) * nbytes) for name, nbytes in found.items()}

    def disk(self, choice: Choice, workers: int) -> int:
        """Bound the peak bytes of the run directory, where so many workers write hidden states."""
        files = max(self._states(choice, workers), self._measured_states()) if choice.on_disk else 0
        return self.saved + self.metric * len(self.model) + files

    def _states(self, choice: Choice, workers: int) -> int:
        """Count the bytes of the hidden states that so many layers at a time read and write."""
        batch = min(choice.batch_size, self.samples)
        beside = dense_windows(self.recipe, self.layout, self.samples, self.seqlen, batch)
        whole = (1 + workers + self.inside * workers) * self.window + self.entering * workers
        return whole * self.samples + (self.dense * self.window + self.kept) * workers * beside

    def _copied(self) -> int:
        """Count the bytes of a window on the way between main memory and a GPU: read ahead, and written last."""
        return 3 * (2 + bool(self.dense)) * self.window + 2 * self.kept + self.entering

    def _measured_states(self) -> int:
        """Count the hidden states while the dense model is measured: those of all layers for the way back."""
        stores = (len(self.model) + 1 if self.backward else 1) if needs_measuring(self.recipe) else 0
        return stores * windows_measured(self.samples) * self.window

    def _measured(self, choice: Choice) -> int:
        """Count what measuring the dense model keeps in main memory: hidden states, and metrics of all layers."""
        metrics = self.metric * len(self.model) * (1 if self.recipe.workload is None else 2)
        states = 0 if choice.on_disk else self._measured_states()
        return windows_measured(self.samples) * self.window + states + metrics

    def seconds(self, choice: Choice) -> float:
        """Estimate the seconds to prune all layers: the heaviest is pruned on one batch of random tokens.

        Its passes are scaled to all windows, a few steps of block reconstruction to all, and both to all layers.
        """
        model, recipe, steps = self.model, self.recipe, min(self.recipe.reconstruct, TIMED_STEPS)
        shape = min(choice.batch_size, self.samples), self.seqlen
        tokens = torch.randint(model.vocabulary, shape, generator=torch.Generator().manual_seed(0))
        store = scratch_factory(None, model.dtype, model.device if choice.on_device else torch.device("cpu"))
        names = ("dense", "pruned", "dense-out", "pruned-out")
        dense, pruned, dense_out, pruned_out = (store(name, (*shape, model.width)) for name in names)
        calls = embed(model, tokens, len(tokens), dense)
        pruned.write(0, dense.read(0, len(tokens)))
        streams = LayerStreams(dense, dense_out=dense_out)
        if recipe.propagate == "pruned":
            streams = LayerStreams(dense, pruned, dense_out, pruned_out)
            streams = streams if recipe.dense_share else LayerStreams(None, pruned, pruned_out=pruned_out)
        timed = recipe.model_copy(update={"reconstruct": steps})
        context = replace(self.context, recipe=timed, calls=calls, scratch=store)
        seconds = dict(prune_layer(context, self.heaviest, streams).entry.seconds)
        passing = sum(seconds.pop(phase, 0.0) for phase in ("capture", "gram")) * self.samples / len(tokens)
        if steps:
            seconds["reconstruct"] *= passes(recipe.reconstruct, self.samples) / passes(steps, len(tokens))
        weights = [self.layout.weights(index) for index in range(len(model))]
        return passing * len(model) + sum(seconds.values()) * sum(weights) / max(weights)


def fit(bound: Bound, workers: int) -> tuple[Choice, tuple[str, ...]]:
    """Choose settings of a run that fit into this machine's memory.

    Hidden states stay on a GPU where that costs nothing else; then main memory holds them; then files; then fewer
    windows pass at once, down to one. Returns the choice, and a sentence on what it changes.
    """
    execution, device = bound.recipe.execution, bound.model.device
    batch_size = execution.batch_size or windows_at_once(bound.seqlen, device)
    sizes = [batch_size]
    while sizes[-1] > 1 and not execution.batch_size:
        sizes.append(sizes[-1] // 2)
    places = (True,) if bound.in_files else (False, True)
    asked = Choice(batch_size, on_disk=bound.in_files)
    if bound.cuda:  # files save main memory, small batches the GPU's
        resident = [] if bound.in_files else [Choice(batch_size, on_device=True)]
        choices = resident + [Choice(count, on_disk=place) for count in sizes for place in places]
    else:
        choices = [asked, *(Choice(count, on_disk=True) for count in sizes)]
    nbytes = execution.memory_limit or int((free_memory() + resident_memory()) * RESERVE)
    given = f"memory_limit {size(nbytes)}" if execution.memory_limit else f"the {size(nbytes)} that are free"
    # Of each memory its name, bytes, the processes that share it (this one beside workers), and the stages of one.
    limits = [(given, nbytes, workers + bound.in_files, bound.host if bound.cuda else bound.stages)]
    if bound.cuda:
        torch.cuda.empty_cache()
        apart = worker_devices(execution.device, workers, execution.threads) if bound.in_files else []
        sharing = 1 + apart.count(device)
        free = max(0, free_device_memory(device) - DEVICE_RESERVE * sharing)
        limits.append((f"the {size(free)} that are free on {device}", free, sharing, bound.stages))

    def short(choice: Choice) -> list[tuple[str, int, dict[str, int]]]:
        """Return the memory that is not enough, its processes, and their stages."""
        needs = [(name, limit, sharing, stages(choice)) for name, limit, sharing, stages in limits]
        return [
            (name, sharing, found) for name, limit, sharing, found in needs if sharing * max(found.values()) > limit
        ]

    chosen = next((choice for choice in choices if not short(choice)), None)
    if chosen is None:
        given, sharing, stages = short(choices[-1])[0]
        needs = f"{max(stages, key=stages.__getitem__)} needs {size(max(stages.values()))}"
        each = f" in each of {sharing} processes (fewer: workers)" if sharing > 1 else ""
        raise FistaPrunerError(
            f"{given} is not enough: {needs}{each}, even with hidden states on disk and "
            f"{counted(choices[-1].batch_size, 'window')} at a time; give more, lower batch_size, shorten --seqlen, "
            "or choose a lighter --method"
        )
    changed = ["hidden states go to disk"] if chosen.on_disk and not asked.on_disk else []
    changed += [f"{chosen.batch_size} windows at a time instead of {batch_size}"] * (chosen.batch_size != batch_size)
    names = " and ".join(name for name, *_ in short(asked))
    return chosen, (f"to fit {names}: {', '.join(changed)}",) if changed else ()


@lru_cache(maxsize=1024)
def solve_bytes(
    rows: int,
    inputs: int,
    pattern: Constraint,
    steps: tuple[Method, ...],
    device: str = "cpu",
    drift: bool = False,
    rank: int = 0,
) -> int:
    """Estimate the peak bytes of solving an operator: weight, Gram, drift and all of the method chain.

    All large tensors of a solver are (m, n) or (n, n), so the peak is quadratic in the size: a small problem of the
    same proportions is solved, once in a process for its arguments, and its peak scaled. On a GPU some steps are
    computed differently. ``rank``: of the low-rank part beside the zeros, 0 is none.
    """
    small = min(inputs, PROBE)
    scale = inputs / small
    few, ranks = max(1, round(rows / scale)), max(1, round(rank / scale)) if rank else 0
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(2 * small, small, generator=generator)
    weight = torch.randn(few, small, generator=generator)
    drifts = (torch.randn(few, small, generator=generator), torch.ones(few)) if drift else (None, None)
    problem = LayerProblem(weight, activations.T @ activations / len(activations), *drifts).to(torch.device(device))
    held = 4 * (small * small + few * small * (1 + drift))
    rank = min(ranks, small, few)
    peak = peak_bytes(lambda: solve_low_rank(problem, pattern, steps, rank))
    return int((held + peak) * scale**2)

"""What a run will need, before it begins: memory, disk and time; and what is chosen so that it fits.

Memory is a sum of things whose sizes are known (embeddings, one decoder layer, hidden states, Grams) and of two that are
found by doing them once, small: a forward pass of one window, and the solve of each group of operators
(:mod:`fistapruner.pipeline.footprint`). Time is measured on the first batch of calibration windows. Both predictions are
kept and stand beside the measurements in the report.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from ..allocation.decide import differentiates, needs_measuring, permutes, weighs_rows, windows_looked_at
from ..allocation.sensitivity import HEAD_TOKENS
from ..errors import FistaPrunerError
from ..models.hidden import HiddenStates, scratch_factory
from ..models.layout import Group, Layout
from ..models.skeleton import Call, Skeleton
from ..problem import LayerProblem
from ..recipe import Recipe
from ..reporting.schema import LayerEntry, PlanRow, Totals
from ..solvers import solve
from ..sparsity import Sparsity
from .capture import Calls
from .footprint import peak_bytes, solve_bytes
from .layer import Streams, prune_layer
from .parts import cut

GIB = 2**30

RESERVE = 0.9
"""Share of the free memory that a run without --memory-limit plans with."""

WORTH_A_PROBE = 2e10
"""Multiplications of one pass of the calibration tokens through the model, below which no time is estimated: it is seconds."""

MEMORY, TIME, DISK, DEVICE = "peak memory", "pruning, one worker", "disk", "peak GPU memory"


@dataclass(frozen=True)
class Choice:
    """What a plan may change to make a run fit.

    Args:
        batch_size: windows in one forward pass.
        on_disk: hidden states in files instead of memory.
        by_operator: groups of operators are solved in parts (:mod:`~fistapruner.pipeline.parts`) instead of stacked.
    """

    batch_size: int
    on_disk: bool = False
    by_operator: bool = False


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
    seconds = _measure_time(skeleton, layout, recipe, sparsity, tokens, chosen)
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


RETAINED = 96 * 2**20
"""Freed memory that the C library keeps: twice its largest threshold for handing blocks back (32 MiB), and pieces between blocks."""


UNCOUNTED = 1 / 12
"""Share that is added to what was counted, for small temporaries and pieces between blocks: the peak of 7B shapes was 7 % above
the count without it (``benchmarks/memory.py large``)."""


@dataclass(frozen=True)
class Sizes:
    """The sizes, in bytes, that the memory of a run is made of: see :meth:`measure`."""

    base: int
    ends: int
    largest: int
    checkpoint: int
    pruned: int
    layer: int
    stored: int
    """Bytes of a weight in the checkpoint, or in the passes where that is less."""

    together: bool
    """Without error correction one pass serves all groups, and their sums are in memory together."""

    window: int
    forward: int
    groups: tuple[tuple[str, int, int, int, int], ...]
    """Of each group: names, Gram, stacked weight in fp32, solve stacked, solve of its largest part."""

    float_input: int
    float_residual: int
    """Beside the inputs of a window, what residual correction needs of it in fp32: the drift and its length. 0 without."""

    kept: int
    samples: int
    streams: int
    """Stores of hidden states into and out of a layer."""

    inside: int
    """Stores that a layer needs while it is pruned: what replay keeps, what operators add to, what block matching aims at where that is
    in no other."""

    layers: int
    backward: int
    """Of a forward and backward pass of one window through a decoder layer; 0 where nothing is measured on the dense model."""

    matching: int
    """Block matching of one layer: fp32 weights, their gradients, Adam's two moments, the best so far, masks, what a pass uses; a
    forward and backward pass of one window; the metric. 0 without."""

    logits: int
    measured: bool
    reordered: bool
    weighted: bool
    cuda: bool

    @classmethod
    def measure(cls, skeleton: Skeleton, layout: Layout, recipe: Recipe, sparsity: Mapping[str, Sparsity], tokens: Tensor) -> Sizes:
        """From the checkpoint's headers, one window through one decoder layer, and a small solve of each group."""
        samples, seqlen = tokens.shape
        checkpoint = skeleton.checkpoint
        itemsize = skeleton.dtype.itemsize
        stored = min(itemsize, checkpoint.dtype.itemsize)
        in_layers = [{skeleton.source(name) for name in skeleton.layer_parameters(index)} for index in range(len(skeleton))]
        outside = set(checkpoint.names()).difference(*in_layers)

        def size(names: set[str]) -> int:
            return sum(math.prod(checkpoint.entry(name).shape) for name in names) * itemsize

        with skeleton.ends(head=False):
            hidden, calls = skeleton.embed(tokens[:1])
        with skeleton.layer(0):
            with torch.no_grad():
                forward = peak_bytes(lambda: skeleton.run(0, hidden, calls[0]))
            backward = peak_bytes(lambda: _differentiate(skeleton, hidden, calls[0])) if differentiates(recipe) or recipe.match else 0
        index = max(range(len(skeleton)), key=lambda index: size(in_layers[index]))
        groups = layout.layers[index]
        rows = tuple(_group_bytes(group, [sparsity[layout.full_name(index, operator)] for operator in group], recipe) for group in groups)
        operators = sum(weight for _, _, weight, _, _ in rows)
        drifting = groups[1:] if recipe.propagate == "dense" else groups
        keeps = recipe.dense_share > 0 and (recipe.error_correction or recipe.propagate == "pruned")
        return cls(
            base=psutil.Process().memory_info().rss + RETAINED if skeleton.device.type == "cpu" else 0,
            ends=size(outside),
            largest=max(checkpoint.entry(name).nbytes for name in checkpoint.names()),
            checkpoint=checkpoint.nbytes,
            pruned=sum(operator.rows * operator.columns for _, operator in layout.operators()) * stored,
            layer=size(in_layers[index]),
            stored=stored,
            together=not recipe.error_correction,
            window=seqlen * skeleton.width * itemsize,
            forward=forward,
            groups=rows,
            float_input=4 * seqlen * max(operator.columns for group in groups for operator in group) if groups else 0,
            float_residual=2 * 4 * seqlen * skeleton.width * recipe.corrects_drift,
            kept=sum(seqlen * group[0].columns * itemsize for group in drifting) if keeps else 0,
            samples=samples,
            streams=2 if recipe.propagate == "dense" or not recipe.dense_share else 4,
            inside=1 + recipe.corrects_drift + bool(recipe.match and recipe.dense_share < 1),
            layers=len(skeleton),
            backward=backward if differentiates(recipe) else 0,
            matching=backward + (5 * 4 + 1 + itemsize) * operators // 4 + 3 * 4 * skeleton.width**2 if recipe.match else 0,
            logits=4 * 4 * min(seqlen, HEAD_TOKENS) * int(skeleton.config.get_text_config().vocab_size),
            measured=needs_measuring(recipe),
            reordered=permutes(recipe),
            weighted=weighs_rows(recipe),
            cuda=skeleton.device.type == "cuda",
        )

    def stages(self, choice: Choice, solvers: int = 0) -> dict[str, int]:
        """Bytes at the peak of every stage of a run, by what the stage is called in messages.

        Args:
            choice: how the run is carried out.
            solvers: processes beside this one that solve parts.
        """
        in_memory = 0 if choice.on_disk or self.cuda else self.samples
        states = (self.streams + self.inside) * self.window * in_memory
        batch = min(choice.batch_size, self.samples)
        passing = batch * (self.forward + 2 * self.window)
        found = {
            "the embeddings": self.base + self.ends + self.largest,
            "the first hidden states": self.base + self.ends + self.window * in_memory + batch * 2 * self.window,
            "writing the checkpoint": self.base + 2 * self.largest,
        }
        drifts = self.kept > 0
        # Of each group: Gram, weight and what drifting inputs add (problem.py).
        all_sums = [gram + weight + (2 * gram if weight > gram else weight) * drifts for _, gram, weight, _, _ in self.groups]
        done = 0  # weights of the groups that are solved, in main memory as the checkpoint will hold them
        for number, (names, gram, weight, stacked, alone) in enumerate(self.groups):
            waiting = sum(all_sums[number + 1 :]) if self.together else 0
            loaded = self.base + self.layer + states + self.kept * in_memory + waiting + done
            done += 0 if self.cuda else weight * self.stored // 4
            sums = all_sums[number]
            gather = passing + sums + batch * (self.float_input * (3 if drifts else 1) + self.float_residual)
            found[f"a pass up to {names}"] = loaded + gather
            found[f"the problem of {names}"] = loaded + sums + weight * (drifts and weight > gram) + weight // 2  # a block in fp64
            apart = choice.by_operator and alone < stacked
            # The solution is gathered beside the weight, fp32 and a mask of bytes; its errors are computed in blocks of rows.
            solving = gram + 9 * weight // 4 + (solvers * (self.base + alone) or max(alone - gram, weight // 2)) if apart else stacked
            found[f"solving {names}"] = loaded + solving + (weight if drifts else 0) * (2 if self.weighted else 1) + weight * self.weighted
        if self.matching:
            found["block matching"] = self.base + self.layer + states + done + self.matching + 4 * self.window
        if self.measured:
            windows = windows_looked_at(self.samples)
            states = 0 if choice.on_disk or self.cuda else self._states_measured() * windows * self.window
            passed = self.layer + min(choice.batch_size, 4) * max(self.backward, self.forward + self.float_input)
            sums = sum(gram * bool(self.backward) + weight for _, gram, weight, _, _ in self.groups)
            if self.reordered:  # scores of the largest operator, twice, and the rows that are looked at
                sums += 3 * max(weight for _, _, weight, _, _ in self.groups)
            head = self.ends + self.logits if self.backward else 0
            found["measuring the dense model"] = self.base + states + windows * self.window + max(passed + sums, head)
        return {name: round(size + UNCOUNTED * (size - self.base)) for name, size in found.items()}

    def _states_measured(self) -> int:
        """Layers whose hidden states are kept while the dense model is measured: all of them for a backward pass."""
        return (self.layers + 1 if self.backward else 2) if self.measured else 0

    def disk(self, choice: Choice, workers: int) -> int:
        """Bytes that the run directory takes at its largest."""
        states = ((self.streams + workers - 1 + self.inside * workers) * self.window + self.kept * workers) * self.samples
        measuring = self._states_measured() * windows_looked_at(self.samples) * self.window
        return self.checkpoint + self.pruned + (max(states, measuring) if choice.on_disk else 0)


def _differentiate(skeleton: Skeleton, hidden: Tensor, call: Call) -> None:
    with torch.enable_grad():
        entering = hidden.detach().requires_grad_()
        torch.autograd.grad(skeleton.run(0, entering, call).float().sum(), entering)


def _group_bytes(group: Group, patterns: list[Sparsity], recipe: Recipe) -> tuple[str, int, int, int, int]:
    n = group[0].columns
    rows = [operator.rows for operator in group]
    stacked = solve_bytes(rows, n, patterns, recipe.steps)
    parts = cut(rows, n, patterns, recipe.steps)
    largest = max(parts, key=lambda part: part.stop - part.start)
    alone = stacked if len(parts) == 1 else solve_bytes([largest.stop - largest.start], n, [largest.sparsity], recipe.steps)
    names = "+".join(operator.name.rpartition(".")[2] for operator in group)
    return names, 4 * n * n, 4 * sum(rows) * n, stacked, alone


def _measure_time(
    skeleton: Skeleton, layout: Layout, recipe: Recipe, sparsity: Mapping[str, Sparsity], tokens: Tensor, choice: Choice
) -> float | None:
    """Seconds to prune all layers, from the first batch of windows in layer 0; None where that is not worth measuring.

    Passes are measured as they are, with magnitude pruning instead of the method. The method is timed on the first rows of
    each group's problem, twice as many the second time, so that what does not grow with the rows is told from what does.
    """
    index = next(index for index, groups in enumerate(layout.layers) if groups)
    weights = sum(operator.rows * operator.columns for group in layout.layers[index] for operator in group)
    if weights * len(layout.layers) * tokens.numel() < WORTH_A_PROBE:
        return None
    batch = tokens[: choice.batch_size]
    solving = 0.0

    def time_solve(number: int, problem: LayerProblem) -> None:
        nonlocal solving
        pattern = sparsity[problem.names[0]]
        few = max(32, problem.shape[0] // 16)
        if 2 * few >= problem.shape[0]:
            solving += _seconds(problem, [sparsity[name] for name in problem.names], recipe)
            return
        once, twice = (_seconds(problem.slice(0, count), [pattern], recipe) for count in (few, 2 * few))
        solving += once + max(twice - once, 0.0) * (problem.shape[0] - few) / few

    with skeleton.ends(head=False):
        calls = Calls.of(skeleton, len(batch), tokens.shape[1], len(batch))
        states = HiddenStates((len(batch), tokens.shape[1], skeleton.width), skeleton.dtype)
        states.write(0, skeleton.embed(batch)[0])
    onward = HiddenStates((len(batch), tokens.shape[1], skeleton.width), skeleton.dtype)
    streams = Streams(states, None, onward, None)
    if recipe.propagate == "pruned":
        shape = (len(batch), tokens.shape[1], skeleton.width)
        drifted, drifted_on = HiddenStates(shape, skeleton.dtype), HiddenStates(shape, skeleton.dtype)
        drifted.write(0, states.read(0, len(batch)))
        streams = Streams(states, drifted, onward, drifted_on) if recipe.dense_share else Streams(None, drifted, None, drifted_on)
    cheap = recipe.model_copy(update={"method": Recipe.build({"method": "magnitude"}).steps, "match": 0})
    scratch = scratch_factory(None, skeleton.dtype)
    result = prune_layer(skeleton, layout, index, cheap, sparsity, streams, calls, scratch, inspect=time_solve)
    seconds = result.entry.seconds
    passing = (seconds.get("capture", 0.0) + seconds.get("gram", 0.0)) * len(tokens) / len(batch)
    fixed = sum(value for phase, value in seconds.items() if phase not in ("capture", "gram"))
    return (passing + fixed + solving) * len(layout.layers)


def _seconds(problem: LayerProblem, patterns: list[Sparsity], recipe: Recipe) -> float:
    begin = time.perf_counter()
    solve(problem, patterns, recipe.steps)
    return time.perf_counter() - begin


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path

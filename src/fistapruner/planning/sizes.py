"""The bytes that a run's memory and disk are made of.

Memory is a sum of things whose sizes are known (embeddings, one decoder layer, hidden states, Grams) and of two that are
found by doing them once, small: a forward pass of one window, and the solve of each group of operators
(:mod:`fistapruner.planning.footprint`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..activations.replay import kept_projections
from ..constraints import Constraint
from ..models.discovery import Group, Layout
from ..models.layerwise import Call, LayerwiseModel
from ..problem import DriftFrom
from ..pruning.drift import dense_windows, drift_sources, kept_width
from ..pruning.partition import cut
from ..recipes.settings import Recipe
from ..runtime.memory import resident_memory
from ..sensitivity.decision import differentiates, needs_measuring, permutes, weighs_rows, windows_measured
from ..sensitivity.fisher import HEAD_TOKENS, WIDE
from .footprint import peak_bytes, solve_bytes


@dataclass(frozen=True)
class Choice:
    """What a plan may change to make a run fit.

    Args:
        batch_size: windows in one forward pass.
        on_disk: hidden states in files instead of memory.
        by_operator: groups of operators are solved in parts (:mod:`~fistapruner.pruning.partition`) instead of stacked.
    """

    batch_size: int
    on_disk: bool = False
    by_operator: bool = False


RETAINED = 96 * 2**20
"""Freed memory that the C library keeps: twice its largest threshold for handing blocks back (32 MiB), and pieces between blocks."""

UNCOUNTED = 1 / 12
"""Share that is added to what was counted, for small temporaries and pieces between blocks: the peak of 7B shapes was 7 % above
the count without it (``benchmarks/memory.py large``)."""


class GroupSizes(NamedTuple):
    """Of a group of operators, in bytes: its Gram, its stacked weight in fp32, a solve of it stacked, and one of its largest part."""

    names: str
    gram: int
    weight: int
    drift_from: DriftFrom | None
    stacked: int
    alone: int

    def sums(self, partly: bool) -> int:
        """Gram, weight and what drifting inputs add (problem.py), perhaps told by a part of the windows."""
        drift = {None: 0, "inputs": 2 * self.gram, "outputs": self.weight + self.gram * partly}[self.drift_from]
        return self.gram + self.weight + drift


@dataclass(frozen=True)
class Sizes:
    """The sizes, in bytes, that the memory of a run is made of: see :meth:`measure`."""

    base: int
    """Main memory that the process takes before the run."""

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
    groups: tuple[GroupSizes, ...]

    float_input: int
    float_residual: int
    """Beside the inputs of a window, what residual correction needs of it in fp32: the drift and its length. 0 without."""

    kept: int
    """Dense inputs or outputs of all groups, of a window."""

    entering: int
    """Of a window, the largest inputs that replay keeps of a child's last operator."""

    samples: int
    streams: int
    """Stores of hidden states of all windows into and out of a layer."""

    dense: int
    """Stores of the dense pass's windows: hidden states into and out of a layer beside pruned ones, what operators add to."""

    inside: int
    """Stores that a layer needs while it is pruned: what replay keeps, what block matching aims at where that is in no other."""

    layers: int
    backward: int
    """Of a forward and backward pass of one window through a decoder layer; 0 where nothing is measured on the dense model."""

    matching: int
    """Block matching of one layer: fp32 weights, their gradients, Adam's two moments, the best so far, masks, what a pass uses; a
    forward and backward pass of one window; the metric. 0 without."""

    metric: int
    """How block matching weighs the output errors of one layer, as it waits in main memory. 0 without."""

    logits: int
    measured: bool
    reordered: bool
    weighted: bool
    cuda: bool
    dense_windows: Callable[..., int]
    """Windows that the dense model runs on, by how many there are and how many are in a batch (:func:`~.drift.dense_windows`)."""

    @classmethod
    def measure(cls, model: LayerwiseModel, layout: Layout, recipe: Recipe, sparsity: Mapping[str, Constraint], tokens: Tensor) -> Sizes:
        """From the checkpoint's headers, one window through one decoder layer, and a small solve of each group."""
        samples, seqlen = tokens.shape
        checkpoint = model.checkpoint
        itemsize = model.dtype.itemsize
        stored = min(itemsize, checkpoint.dtype.itemsize)
        in_layers = [{model.source(name) for name in model.layer_parameters(index)} for index in range(len(model))]
        outside = set(checkpoint.names()).difference(*in_layers)

        def size(names: set[str]) -> int:
            return sum(math.prod(checkpoint.entry(name).shape) for name in names) * itemsize

        with model.embeddings_and_head(head=False):
            hidden, calls = model.embed(tokens[:1])
        with model.layer(0):
            with torch.no_grad():
                forward = peak_bytes(lambda: model.run(0, hidden, calls[0]))
            backward = peak_bytes(lambda: _differentiate(model, hidden, calls[0])) if differentiates(recipe) or recipe.reconstruct else 0
        index = max(range(len(model)), key=layout.weights)  # where solving takes most
        groups = layout.layers[index]
        told = drift_sources(recipe, layout, index, same=recipe.propagate == "dense")
        kept = [kept_width(groups[number], source) for number, source in told.items()]
        rows = tuple(
            _group_sizes(group, [sparsity[layout.full_name(index, operator)] for operator in group], recipe, told.get(number), model.device)
            for number, group in enumerate(groups)
        )
        operators = sum(group.weight for group in rows)
        passes = recipe.propagate == "pruned" and not recipe.reconstruct  # after the last group
        widths = {operator.name: operator.columns for group in groups[: len(groups) - (not passes)] for operator in group}
        endings = kept_projections(layout, index, model.device).values() if recipe.error_correction else ()
        return cls(
            base=resident_memory() + RETAINED,
            ends=size(outside),
            largest=max(checkpoint.entry(name).nbytes for name in checkpoint.names()),
            checkpoint=checkpoint.nbytes,
            pruned=sum(map(layout.weights, range(len(model)))) * stored,
            layer=max(size(names) for names in in_layers),
            stored=stored,
            together=not recipe.error_correction,
            window=seqlen * model.width * itemsize,
            forward=forward,
            groups=rows,
            float_input=4 * seqlen * max(operator.columns for group in groups for operator in group),
            float_residual=2 * 4 * seqlen * model.width * recipe.corrects_drift,
            kept=sum(kept) * seqlen * itemsize,
            entering=max((seqlen * widths[ending.operator] * itemsize for ending in endings if ending.operator in widths), default=0),
            samples=samples,
            streams=2,
            dense=recipe.corrects_drift + (0 if recipe.propagate == "dense" or not recipe.dense_share else 2),
            inside=1 + bool(recipe.reconstruct and recipe.dense_share < 1),
            layers=len(model),
            backward=backward if differentiates(recipe) else 0,
            matching=backward + (5 * 4 + 1 + itemsize) * operators // 4 + 3 * 4 * model.width**2 if recipe.reconstruct else 0,
            metric=4 * model.width * (model.width if model.width <= WIDE else 1) if recipe.reconstruct else 0,
            logits=4 * 4 * min(seqlen, HEAD_TOKENS) * int(model.config.get_text_config().vocab_size),
            measured=needs_measuring(recipe),
            reordered=permutes(recipe),
            weighted=weighs_rows(recipe),
            cuda=model.device.type == "cuda",
            dense_windows=partial(dense_windows, recipe, layout, seqlen=seqlen),
        )

    def stages(self, choice: Choice, solvers: int = 0) -> dict[str, int]:
        """Bytes at the peak of every stage of a run, by what the stage is called in messages: of main memory, or of the GPU that works.

        Args:
            choice: how the run is carried out.
            solvers: processes beside this one that solve parts on the same device.
        """
        base, largest = (0, 0) if self.cuda else (self.base, self.largest)
        batch = min(choice.batch_size, self.samples)
        beside = self.dense_windows(self.samples, batch_size=batch)
        partly = beside < self.samples
        first, states, kept = (0, 0, 0) if self.cuda else self._waiting(choice)
        passing = batch * (self.forward + 2 * self.window)
        found = {
            "the embeddings": base + self.ends + largest,
            "the first hidden states": base + self.ends + first + batch * 2 * self.window,
            "writing the checkpoint": base + 2 * largest,
        }
        if self.cuda:
            del found["writing the checkpoint"]
        drifts = self.kept > 0
        done = 0  # weights of the groups that are solved, in main memory as the checkpoint will hold them
        for number, group in enumerate(self.groups):
            names, gram, weight, source, stacked, alone = group
            waiting = sum(later.sums(partly) for later in self.groups[number + 1 :]) if self.together else 0
            loaded = base + self.layer + states + kept + waiting + done
            done += 0 if self.cuda else weight * self.stored // 4
            gather = passing + group.sums(partly) + batch * (self.float_input * (3 if drifts else 1) + self.float_residual)
            found[f"a pass up to {names}"] = loaded + gather
            found[f"the problem of {names}"] = loaded + group.sums(partly) + weight * (source == "inputs") + weight // 2  # a block in fp64
            apart = choice.by_operator and alone < stacked
            # The solution is gathered beside the weight, fp32 and a mask of bytes; its errors are computed in blocks of rows.
            solving = gram + 9 * weight // 4 + (solvers * (base + alone) or max(alone - gram, weight // 2)) if apart else stacked
            found[f"solving {names}"] = loaded + solving + (weight if drifts else 0) * (2 if self.weighted else 1) + weight * self.weighted
        if self.matching:
            found["block matching"] = base + self.layer + states + done + self.matching + 4 * self.window
        if self.measured:
            states = 0 if self.cuda else self._states_in_memory(choice)
            passed = self.layer + min(choice.batch_size, 4) * max(self.backward, self.forward + self.float_input)
            sums = sum(group.gram * bool(self.backward) + group.weight for group in self.groups)
            if self.reordered:  # scores of the largest operator, twice, and the rows that are looked at
                sums += 3 * max(group.weight for group in self.groups)
            head = self.ends + self.logits if self.backward else 0
            found["measuring the dense model"] = base + states + max(passed + sums, head)
        return {name: round(size + UNCOUNTED * (size - base)) for name, size in found.items()}

    def host_stages(self, choice: Choice, solvers: int = 0) -> dict[str, int]:
        """Bytes of main memory at the peak of every stage of a run whose work is on GPUs, by what the stage is called in messages.

        A tensor of the checkpoint or a batch of windows is here on its way to the GPU and back; hidden states are kept here, and so are
        the weights of the operators that are solved until their layer is done.

        Args:
            choice: how the run is carried out.
            solvers: processes beside this one that solve parts, on any device.
        """
        first, states, kept = self._waiting(choice)
        moving = min(choice.batch_size, self.samples) * (2 * self.window + self.float_input)
        loading = min(2 * self.largest, self.layer)
        done = sum(group.weight for group in self.groups) * self.stored // 4
        part = max(group.gram + 3 * group.weight for group in self.groups)  # of a group: weight, drift, solution
        solving = part + solvers * (self.base + part) if solvers else 0
        found = {
            "the embeddings": 2 * self.largest,
            "the first hidden states": first + moving,
            "pruning a layer": states + kept + max(loading, done + max(moving, solving)),
            "writing the checkpoint": 2 * self.largest,
        }
        if self.matching:
            found["block matching"] = states + 2 * done + self.metric + moving
        if self.measured:
            metrics = self.metric * self.layers
            found["measuring the dense model"] = self._states_in_memory(choice) + metrics + max(moving, 2 * self.largest)
        return {name: round(self.base + (1 + UNCOUNTED) * size) for name, size in found.items()}

    def _waiting(self, choice: Choice) -> tuple[int, int, int]:
        """Bytes of all windows in main memory: of the first hidden states, of all stores of them, of what a layer keeps beside."""
        if choice.on_disk:
            return 0, 0, 0
        beside = self.dense_windows(self.samples, batch_size=min(choice.batch_size, self.samples))
        states = ((self.streams + self.inside) * self.samples + self.dense * beside) * self.window
        return self.window * self.samples, states, self.kept * beside + self.entering * self.samples

    def _states_in_memory(self, choice: Choice) -> int:
        """Bytes in main memory while the dense model is measured: of hidden states, and of the gradient or what takes its place."""
        return (1 + (0 if choice.on_disk else self._states_measured())) * windows_measured(self.samples) * self.window

    def _states_measured(self) -> int:
        """Layers whose hidden states are kept while the dense model is measured: all of them for a backward pass."""
        return (self.layers + 1 if self.backward else 1) if self.measured else 0

    def disk(self, choice: Choice, workers: int) -> int:
        """Bytes that the run directory takes at its largest."""
        whole = (self.streams + workers - 1 + self.inside * workers) * self.window + self.entering * workers
        beside = self.dense_windows(self.samples, batch_size=min(choice.batch_size, self.samples))
        states = whole * self.samples + (self.dense * self.window + self.kept) * workers * beside
        measuring = self._states_measured() * windows_measured(self.samples) * self.window
        return self.checkpoint + self.pruned + (max(states, measuring) if choice.on_disk else 0)


def _differentiate(model: LayerwiseModel, hidden: Tensor, call: Call) -> None:
    with torch.enable_grad():
        entering = hidden.detach().requires_grad_()
        torch.autograd.grad(model.run(0, entering, call).float().sum(), entering)


def _group_sizes(
    group: Group, patterns: list[Constraint], recipe: Recipe, drift_from: DriftFrom | None, device: torch.device
) -> GroupSizes:
    n = group[0].columns
    rows = [operator.rows for operator in group]
    stacked = solve_bytes(rows, n, patterns, recipe.steps, device)
    parts = cut(rows, n, patterns, recipe.steps)
    largest = max(parts, key=lambda part: part.stop - part.start)
    alone = stacked if len(parts) == 1 else solve_bytes([largest.stop - largest.start], n, [largest.sparsity], recipe.steps, device)
    names = "+".join(operator.name.rpartition(".")[2] for operator in group)
    return GroupSizes(names, 4 * n * n, 4 * sum(rows) * n, drift_from, stacked, alone)

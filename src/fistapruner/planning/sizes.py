"""Count the bytes of a run's memory and disk.

Memory is a sum of known sizes (embeddings, one decoder layer, hidden states, Grams) and of two measured ones: a
forward pass of one window, and a small solve of each group of operators; see
:mod:`fistapruner.planning.measured_sizes`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..allocate.measure import (
    windows_measured,
)
from ..core.sums import DriftFrom


@dataclass(frozen=True)
class Choice:
    """Settings that a plan may change to make a run fit.

    Args:
        batch_size: windows in one forward pass.
        on_disk: hidden states in files instead of memory.
        on_device: hidden states in the GPU's memory.
    """

    batch_size: int
    on_disk: bool = False
    on_device: bool = False


RETAINED = 96 * 2**20
"""Freed memory that the C library keeps: twice its largest block threshold (32 MiB), and fragments."""

UNCOUNTED = 1 / 12
"""Share added to the counted bytes, for small temporaries and fragments.

Measured: the peak of 7B shapes is 7 % above the count without it (``benchmarks/memory.py large``).
"""


STREAMS = 2
"""Number of stores of hidden states of all windows: input and output of a layer."""

GENERATING = "generating text with the whole model"
"""Name of a stage of the process that starts the workers, before there are any."""

MEASURING = "measuring the dense model"
"""Name of the stage that allocation, weighting and permutation need."""


class GroupSizes(NamedTuple):
    """Sizes of a group of operators in bytes.

    Args:
        names: of the operators, for messages.
        gram: of the Gram.
        weight: of the stacked fp32 weight.
        drift_from: what is recorded of drifting inputs; None where they do not drift.
        solving: peak of solving its largest operator, with its Gram and drift; 0 where it only loses inputs.
        routed: it belongs to an expert: the sums of one expert are in memory at a time.
    """

    names: str
    gram: int
    weight: int
    drift_from: DriftFrom | None
    solving: int
    routed: bool = False

    def sums(self, partly: bool) -> int:
        """Sum Gram, weight and sums of drift (problem.py); ``partly``: drift is measured on some windows."""
        drift = {None: 0, "inputs": 2 * self.gram, "outputs": self.weight + self.gram * partly}[self.drift_from]
        return self.gram + self.weight + drift


@dataclass(frozen=True)
class Sizes:
    """Sizes, in bytes, of the parts of a run's memory; see :func:`~.measured_sizes.measure_sizes`."""

    base: int
    """Main memory of the process before the run, with the calibration tokens."""

    ends: int
    largest: int
    checkpoint: int
    pruned: int
    layer: int
    ahead: int
    """Main memory of a layer that is read ahead for a GPU; see :attr:`.LayerwiseModel.ahead_bytes`."""

    stored: int
    """Bytes of one weight, in the checkpoint or the passes, whichever is less."""

    together: bool
    """Whether sums of all groups are in memory at once: without error correction, one pass gathers them."""

    window: int
    forward: int
    groups: tuple[GroupSizes, ...]

    float_input: int
    float_residual: int
    """Residual drift of a window and its norms, in fp32; 0 without residual correction."""

    kept: int
    """Stored dense inputs or outputs of all groups, of one window."""

    entering: int
    """Largest inputs of an output projection that replay stores, and those of experts, of one window."""

    samples: int
    dense: int
    """Number of stores of the dense pass's windows: input and output of a layer, residual drift."""

    inside: int
    """Number of stores while a layer is pruned: replay, targets of block reconstruction that no other holds."""

    layers: int
    backward: int
    """Peak of a forward and backward pass of one window through a layer; 0 where none is needed."""

    reconstruction: int
    """Block reconstruction of one layer; 0 without.

    The sum of fp32 weights, gradients, Adam's two moments, best weights, masks and the weights of a pass; of a
    forward and backward pass of one window; and of the metric.
    """

    removal: int
    """Peak of choosing the channels that are removed, and of the weights that remain; 0 without."""

    proving: int
    """Copies of a layer's tensors, beside it, that prove that channels can be removed; 0 without."""

    renumbered: int
    """Experts of one layer that stay when others are removed, or lose channels, as the journal gets them.

    Those that are solved are left out.
    """

    learning: int
    """Peak of a pass through a layer whose weights are masked, beside the layer (bypass); 0 without."""

    comparing: int
    """Peak of comparing the heads of a layer, beside the layer (goa); 0 without.

    Of one window: the pass, and its attention probabilities with three temporaries of their size, in fp32. And the
    problem of the operator that reads the heads.
    """

    metric: int
    """Metric of one layer's output errors in block reconstruction, in main memory; 0 without."""

    logits: int
    text: int
    """The whole model and what generating text takes beside its weights; 0 where it generates none."""

    text_weights: int
    """Its weights alone, which go through main memory on their way to a GPU."""

    measured: bool
    texts: int
    """Metrics that measuring the dense model holds at once: those of a task, and their sum, for a workload."""

    reordered: bool
    weighted: bool
    cuda: bool
    dense_windows: Callable[..., int]
    """Number of windows of the dense model, from samples and batch size (:func:`~.drift.dense_windows`)."""

    others: tuple[Sizes, ...] = ()
    """Sizes of other decoder layers that may need more: the dense ones of a mixture."""

    def stages(self, choice: Choice) -> dict[str, int]:
        """Compute the peak bytes of every stage of a run, by the stage's name in messages.

        The bytes are of main memory on a CPU, or of the GPU.

        Args:
            choice: settings of the run.
        """
        base, largest = (0, 0) if self.cuda else (self.base, self.largest)
        batch = min(choice.batch_size, self.samples)
        beside = self.dense_windows(self.samples, batch_size=batch)
        partly = beside < self.samples
        here = not self.cuda or choice.on_device
        first, states, kept = self._waiting(choice) if here else (0, 0, 0)
        passing = batch * (self.forward + 2 * self.window) + self._copied(choice)
        found = {
            "the embeddings": base + self.ends + largest,
            "the first hidden states": base + self.ends + first + batch * 2 * self.window,
            "writing the checkpoint": base + 2 * largest,
        }
        if self.cuda:
            del found["writing the checkpoint"]
        if self.text:
            found[GENERATING] = base + self.text
        drifts = self.kept > 0
        # Solved weights and experts with other numbers are in main memory, in the checkpoint's dtype.
        done = 0 if self.cuda else self.renumbered
        for number, group in enumerate(self.groups):
            names, _, weight, source, solving, routed = group
            later = [other for other in self.groups[number + 1 :] if not (other.routed or routed)]
            waiting = sum(other.sums(partly) for other in later) if self.together else 0
            loaded = base + self.layer + states + kept + waiting + done
            done += 0 if self.cuda else weight * self.stored // 4
            gather = (
                passing + group.sums(partly) + batch * (self.float_input * (3 if drifts else 1) + self.float_residual)
            )
            found[f"a pass up to {names}"] = loaded + gather
            found[f"the problem of {names}"] = loaded + group.sums(partly) + weight * (source == "inputs") + weight // 2
            held = weight * (1 + (source is not None))  # of the whole group; its operators are solved one by one
            if solving:
                found[f"solving {names}"] = loaded + solving + held * (1 + self.weighted)
        if self.renumbered:
            found["cutting experts"] = base + self.layer + states + kept + done + passing
        if self.removal:
            found["removing channels"] = base + self.layer + states + kept + done + self.removal
        if self.proving:
            found["proving the smaller layer"] = base + self.layer + self.proving + self.forward + 2 * self.window
        if self.comparing:
            comparing = max(self.comparing + 2 * self.window, self.ends + largest)
            found["comparing heads"] = base + self.layer + states + kept + done + comparing
        if self.reconstruction:
            found["block reconstruction"] = base + self.layer + states + done + self.reconstruction + 4 * self.window
        if self.learning:
            layer = self.layer + self.learning
            found["learning which channels stay"] = base + max(layer, self.ends + largest + self.logits)
        if self.measured:
            states = 0 if self.cuda else self._states_in_memory(choice) + self.metric * self.layers * self.texts
            passed = self.layer + min(choice.batch_size, 4) * max(self.backward, self.forward + self.float_input)
            sums = sum(group.gram * bool(self.backward or self.reordered) + group.weight for group in self.groups)
            if self.reordered:  # scores of the largest operator, twice, and its sampled rows
                sums += 3 * max(group.weight for group in self.groups)
            head = self.ends + self.logits if self.backward else 0
            found[MEASURING] = base + states + max(passed + sums, head)
        found = {name: round(size + UNCOUNTED * (size - base)) for name, size in found.items()}
        return _larger([found, *(other.stages(choice) for other in self.others)])

    def host_stages(self, choice: Choice) -> dict[str, int]:
        """Compute the peak bytes of main memory of every stage of a run on GPUs, by the stage's name.

        Main memory holds a tensor of the checkpoint or batches of windows on the way to or from the GPU, the hidden
        states, the next layer's weights, and the solved weights until their layer is done.

        Args:
            choice: settings of the run.
        """
        first, states, kept = (0, 0, 0) if choice.on_device else self._waiting(choice)
        moving = min(choice.batch_size, self.samples) * (2 * self.window + self.float_input)
        moving += 2 * self._copied(choice)
        loading = min(2 * self.largest, self.layer)
        done = sum(group.weight for group in self.groups) * self.stored // 4 + self.renumbered
        found = {
            "the embeddings": 2 * self.largest,
            "the first hidden states": first + moving,
            "pruning a layer": states + kept + self.ahead + max(loading, done + moving),
            "writing the checkpoint": 2 * self.largest,
        }
        if self.text:
            found[GENERATING] = self.text_weights
        if self.reconstruction:
            found["block reconstruction"] = states + 2 * done + self.metric + moving
        if self.measured:
            metrics = self.metric * self.layers * self.texts
            found[MEASURING] = self._states_in_memory(choice) + metrics + self.ahead + max(moving, 2 * self.largest)
        found = {name: round(self.base + (1 + UNCOUNTED) * size) for name, size in found.items()}
        return _larger([found, *(other.host_stages(choice) for other in self.others)])

    def _copied(self, choice: Choice) -> int:
        """Count the bytes of batches on the way between main memory and a GPU: read ahead, and written last."""
        if not self.cuda or choice.on_device:
            return 0
        stores = 3 * (STREAMS + bool(self.dense)) * self.window + 2 * self.kept + self.entering
        return min(choice.batch_size, self.samples) * stores

    def _waiting(self, choice: Choice) -> tuple[int, int, int]:
        """Count bytes of stores in memory: first hidden states, all hidden states, others of a layer."""
        if choice.on_disk:
            return 0, 0, 0
        beside = self.dense_windows(self.samples, batch_size=min(choice.batch_size, self.samples))
        states = ((STREAMS + self.inside) * self.samples + self.dense * beside) * self.window
        return self.window * self.samples, states, self.kept * beside + self.entering * self.samples

    def _states_in_memory(self, choice: Choice) -> int:
        """Count the bytes of hidden states and gradient in memory while the dense model is measured."""
        return (1 + (0 if choice.on_disk else self._states_measured())) * windows_measured(self.samples) * self.window

    def _states_measured(self) -> int:
        """Count the stores while the dense model is measured: of all layers for a backward pass."""
        return (self.layers + 1 if self.backward else 1) if self.measured else 0

    def disk(self, choice: Choice, workers: int) -> int:
        """Compute the peak bytes of the run directory."""
        whole = (STREAMS + workers - 1 + self.inside * workers) * self.window + self.entering * workers
        beside = self.dense_windows(self.samples, batch_size=min(choice.batch_size, self.samples))
        states = whole * self.samples + (self.dense * self.window + self.kept) * workers * beside
        measuring = self._states_measured() * windows_measured(self.samples) * self.window
        stays = self.checkpoint + self.pruned + self.metric * self.layers
        here = stays + (max(states, measuring) if choice.on_disk else 0)
        return max([here, *(other.disk(choice, workers) for other in self.others)])


def _larger(stages: Sequence[dict[str, int]]) -> dict[str, int]:
    """Return the larger bytes of every stage."""
    names = dict.fromkeys(name for each in stages for name in each)
    return {name: max(each.get(name, 0) for each in stages) for name in names}

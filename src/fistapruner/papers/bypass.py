"""Bypass-BP: learn which heads and channels stay, by a policy gradient of forward passes.

Gao, Liu, Zhang, Du and Xia, "Bypass Back-propagation: Optimization-based Structural Pruning for LLMs via Policy
Gradient", ACL 2025, arXiv 2406.10576, after their program. A unit u (a key/value group, an MLP channel) has a
probability s_u to stay. A step draws K masks m_k, and computes the losses l_k of the dense model with what they drop
set to zero. With a moving mean b of the losses

    s  <-  project( s - rate sum_k (l_k - b) (m_k - s) / sqrt(s (1 - s)) / (K - 1) ),

where ``project`` meets the budget. In the mean this is plain descent along the gradient of the expected loss times
sqrt(s (1 - s)): the program's Adam object only carries the rate. Then the units with the largest s stay.

Differs from the program in:

1. The text is the run's calibration windows, cut into sequences of 128 tokens; the program draws from C4.
2. It takes 15,000 steps, which is 30 million tokens. Here their number is a setting, and the rate grows as it falls.
3. The first s come from the windows that sensitivity is measured on, 8 at most; the program takes 128.
4. The projection is bisected to rounding; the program stops at 1e-3 or after 20 halvings.
5. Every layer has a budget of its own, and keeps as many units as the others; the program has one for all layers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import FistaPrunerError
from ..models.layers import LayerwiseModel
from ..models.safetensors import SafetensorsFile, write_tensors
from ..passes.store import Store
from ..passes.stream import Watched, embed, forward_variants, run_layer
from ..runs.log import Listener
from ..runtime.numerics import seeded
from ..runtime.show import duration
from ..structure.units import Units

SEQUENCES, LENGTH, MASKS = 8, 128, 2  # of a step: sequences, their tokens, masks K
RATE, STEPS, MAX_RATE = 2e-3, 15_000, 0.05  # the paper's for LLaMA-2-7B; the largest of difference 2
MEMORY, SMALL, EVERY = 0.2, 1e-7, 20  # a step's weight in b; keeps s (1 - s) from 0; steps between saved states
Budgets = Sequence[tuple[slice, int]]  # places of units, all of them in order, and how many of these may stay


def project(keep: Tensor, budget: float) -> Tensor:
    """Return ``clip(keep - v, 0, 1)``, (units,) fp64, with the smallest v >= 0 that meets the budget."""
    low, high = 0.0, float(keep.max())
    if float(keep.clamp(0, 1).sum()) <= budget:
        return keep.clamp(0, 1)
    for _ in range(64):  # difference 4
        middle = (low + high) / 2
        low, high = (middle, high) if float((keep - middle).clamp(0, 1).sum()) > budget else (low, middle)
    return (keep - high).clamp(0, 1)


def policy_gradient(keep: Tensor, masks: Sequence[Tensor], losses: Sequence[float], baseline: float) -> Tensor:
    """Estimate the gradient of the expected loss, times ``K / (K - 1) sqrt(s (1 - s))``: (units,) fp64."""
    root, found = ((keep + SMALL) * (1 - keep + SMALL)).sqrt(), torch.zeros_like(keep)
    for mask, loss in zip(masks, losses, strict=True):
        found += (loss - baseline) * (mask - keep) / root
    return found / (len(masks) - 1)


def descend(
    keep: Tensor, baseline: float, masks: Sequence[Tensor], losses: Sequence[float], rate: float, budgets: Budgets
) -> tuple[Tensor, float]:
    """Take a step, and return the new probabilities s and baseline b, which takes in the losses first.

    With a loss that is not finite nothing changes. ``baseline`` is NaN at first.
    """
    if not all(map(math.isfinite, losses)):
        return keep, baseline
    mean = sum(losses) / len(losses)
    baseline = mean if math.isnan(baseline) else (1 - MEMORY) * baseline + MEMORY * mean
    moved = keep - rate * policy_gradient(keep, masks, losses, baseline)
    return torch.cat([project(moved[places], count) for places, count in budgets]), baseline


@dataclass
class Bypass:
    """Learn which units of the dense model stay, on (samples, seqlen) calibration tokens."""

    model: LayerwiseModel
    units: Units
    tokens: Tensor
    steps: int
    seed: int
    store: Store
    listener: Listener
    batch_size: int = SEQUENCES

    def __post_init__(self) -> None:
        found = [(index, unit) for index, layer in enumerate(self.units) for unit in layer]
        kinds = list(dict.fromkeys(unit.kind for _, unit in found))
        found.sort(key=lambda place: kinds.index(place[1].kind))
        ends = accumulate(unit.before for _, unit in found)  # slots: decoder layer, unit, its places among all
        self.slots = [(at, unit, slice(end - unit.before, end)) for (at, unit), end in zip(found, ends, strict=True)]
        self.count, self._calls = self.slots[-1][2].stop, None  # type: int, Any

    def learn(self, file: Path, windows: int, notes: dict[str, str]) -> dict[tuple[int, str], Tensor]:
        """Return probabilities to stay by layer and consumer; go on from the state of this run in ``file``."""
        baseline, done = math.nan, 0
        try:
            state = SafetensorsFile(file)
            if state.metadata["identity"] != notes["identity"]:
                raise KeyError("identity")
            keep, baseline, done = state.read("keep"), float(state.read("baseline")), int(state.metadata["step"])
            self.listener.say(f"bypass: {done} of {self.steps} steps were taken before")
        except (FistaPrunerError, OSError, KeyError, ValueError):
            keep = self.first(windows)
        budgets = [(places, unit.after) for _, unit, places in self.slots]  # difference 5
        length = min(LENGTH, self.tokens.shape[1])
        pieces = self.tokens[:, : self.tokens.shape[1] // length * length].reshape(-1, length)  # difference 1
        for step in range(done, self.steps):
            started, random = time.perf_counter(), seeded(self.seed, "bypass masks", step)
            masks = list((torch.rand(MASKS, self.count, generator=random, dtype=torch.float64) < keep).double())
            numbers = []
            for place in range(step * SEQUENCES, (step + 1) * SEQUENCES):  # all come once before one comes again
                random = seeded(self.seed, "bypass text", place // len(pieces))
                numbers.append(int(torch.randperm(len(pieces), generator=random)[place % len(pieces)]))
            losses = self.losses(pieces[numbers], masks)
            rate = min(RATE * STEPS / self.steps, MAX_RATE) / 2 * (1 + math.cos(math.pi * step / self.steps))
            keep, baseline = descend(keep, baseline, masks, losses, rate, budgets)
            if not any(map(math.isfinite, losses)):
                raise FistaPrunerError("structure: the model's loss is NaN or infinite: take dtype float32")
            if step == done:
                left = duration((time.perf_counter() - started) * (self.steps - step))
                self.listener.say(f"bypass: {self.steps - step} steps of {MASKS} forward passes take about {left}")
            self.listener.tick("steps of bypass", step + 1, self.steps)
            if step + 1 == self.steps or (step + 1) % EVERY == 0:
                tensors = {"keep": keep, "baseline": torch.tensor([baseline], dtype=torch.float64)}
                write_tensors(file, tensors, {**notes, "step": str(step + 1)})
        return {(index, unit.name): keep[places].float() for index, unit, places in self.slots}

    def _masked(self, at: int, layer: nn.Module, mask: Tensor) -> dict[str, Tensor]:
        """Return the consumers' weights in loaded layer ``at``, with what ``mask`` drops set to zero."""
        found = {}
        for _, unit, places in (slot for slot in self.slots if slot[0] == at):
            weight = layer.get_parameter(f"{unit.name}.weight").detach()
            factors = mask[places].to(weight.device, weight.dtype).repeat_interleave(unit.columns)
            found[f"{unit.name}.weight"] = weight * (factors[:, None] if unit.consumer.transposed else factors)
        return found

    def losses(self, tokens: Tensor, masks: Sequence[Tensor]) -> list[float]:
        """Compute the mean loss on (windows, seqlen) tokens with each of some masks."""

        def masked(index: int, layer: nn.Module) -> Any:
            return (self._masked(index, layer, mask) for mask in masks)

        size, found, calls = min(len(tokens), self.batch_size), [], self._calls
        states, self._calls = forward_variants(self.model, tokens, size, self.store, masked, calls=calls)
        with self.model.embeddings_and_head(), torch.no_grad():
            for state in states:
                total = 0.0
                for window, ids in enumerate(tokens[:, None]):
                    logits = self.model.logits(state.read(window, window + 1, self.model.device), ids)[0, :-1].float()
                    total += float(functional.cross_entropy(logits, ids[0, 1:].to(logits.device), reduction="sum"))
                found.append(total / (len(tokens) * (tokens.shape[1] - 1)))
                state.close()
        return found

    def first(self, windows: int) -> Tensor:
        """Make the first probabilities from what a unit adds to the outputs, each layer fed by masked ones.

        ``s = clip(sigmoid(z) + share - mean(sigmoid(z)), 0, 1)``, with z the mean over outputs of ``|W_ij| sqrt(H_jj)``
        (summed over the columns of a group), standardised within the layer (difference 3).
        """
        model, tokens, keep = self.model, self.tokens[:windows], torch.zeros(self.count, dtype=torch.float64)
        states = self.store("bypass", (*tokens.shape, model.width))
        calls, mask = embed(model, tokens, min(4, len(tokens), self.batch_size), states), torch.ones_like(keep)
        for index in range(len(model)):
            readers: Any = [(place, (unit.consumer,)) for place, (at, unit, _) in enumerate(self.slots) if at == index]
            energy = {place: torch.zeros(reader.columns, dtype=torch.float64) for place, (reader,) in readers}

            def add(place: int, _: int, inputs: Tensor, energy: dict[int, Tensor] = energy) -> None:
                energy[place] += inputs.reshape(-1, inputs.shape[-1]).double().square().sum(0).cpu()

            with model.layer(index) as layer:
                # To the layer's end: a pass without output stops at the last group, and these are not in order.
                run_layer(model, index, states, calls, output=lambda *_: None, watched=Watched(readers, add))
                for place, (reader,) in readers:
                    _, unit, places = self.slots[place]
                    weight = reader.weight(layer).detach().double().cpu()
                    metric = weight.abs().mean(0) * (energy[place] / tokens.numel()).sqrt()
                    metric = metric.view(-1, unit.columns).sum(1)
                    z = (metric - metric.mean()) / metric.std() if float(metric.std()) > 0 else torch.zeros_like(metric)
                    odds = torch.sigmoid(z) + unit.after / unit.before - torch.sigmoid(z).mean()
                    keep[places] = project(odds.clamp(0, 1), unit.after)
                    left = metric.argsort(descending=True, stable=True)[: unit.after]
                    mask[places] = torch.zeros_like(metric).index_fill(0, left, 1.0)
                run_layer(model, index, states, calls, output=states, values=self._masked(index, layer, mask))
        states.close()
        return keep

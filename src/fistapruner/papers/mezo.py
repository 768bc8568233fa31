"""MeZO: fine-tuning with forward passes only (Malladi et al., NeurIPS 2023, arXiv 2305.17333).

Its algorithm 1:

    z = standard normal, drawn from a seed      g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)
    theta <- theta - rate g z

A step is two forward passes. z is drawn again from its seed whenever it is needed, so the peak memory is that of
inference. The loss needs no gradient: the accuracy on pairs works, too (the paper's section 3.3). All parameters are
trained: those of the decoder layers, embeddings, final norm and head; pruned weights keep their zeros.

Differences from the published code (princeton-nlp/MeZO):

1. theta + eps z is made for one decoder layer at a time, beside the weights, and dropped. The program moves the weights
   in place three times a step, which drifts by rounding.
2. The seed of a draw is a hash of (seed, step, tensor name), so tensors can be drawn in any order.
3. z is masked where a weight is pruned.
4. A step on weights of 16 bits is rounded at random, upwards as often as its value asks for: a plain rounding would
   lose most of it, since steps are smaller than a weight's last bit. Random bits come from the seed.
5. No weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..models.layers import Call, LayerwiseModel
from ..models.operators import Layout
from ..models.safetensors import LazyTensors, SafetensorsFile, write_tensors
from ..runtime.numerics import seeded
from ..training.loop import Descent
from ..training.loss import Objective
from ..training.masked import changes

EPS = 1e-3
"""Size of the perturbation (the program's default)."""

RATE = 1e-6
"""Learning rate (the program's for full parameters)."""

PUBLISHED = Descent(warm_up=0.0, fall="constant", goes_back=False)
"""The program's schedule: the learning rate stays."""

PIECE = 2**22
"""Entries of a tensor that are drawn at once, in whole rows: more would take memory."""

Draw = Callable[[int, str, Tensor, int, int], Tensor]
"""Draws the fp32 direction of (step, tensor name, tensor) in the rows from start to stop, with mean square 1."""


def standard_normal(seed: int) -> Draw:
    """Return MeZO's directions."""

    def draw(step: int, name: str, weight: Tensor, start: int, stop: int) -> Tensor:
        generator = seeded(seed, "direction", step, name, start, device=weight.device)
        return torch.randn((stop - start, *weight.shape[1:]), generator=generator, device=weight.device)

    return draw


def pieces(weight: Tensor) -> Iterator[tuple[int, int]]:
    """Cut a tensor into rows of about :data:`PIECE` entries."""
    rows = max(1, PIECE // max(1, weight[0].numel()))
    for start in range(0, len(weight), rows):
        yield start, min(start + rows, len(weight))


class ForwardOnly:
    """All weights of a resident model, trained in place by two losses a step.

    Args:
        model: the pruned model, resident.
        layout: its pruned operators.
        draw: the directions.
        best: file that holds the best weights.
        rate: first learning rate; ``seed``: of the run.
    """

    def __init__(self, model: LayerwiseModel, layout: Layout, draw: Draw, best: Path, rate: float, seed: int) -> None:
        self.model, self.draw, self.best, self.seed = model, draw, best, seed
        pruned = {f"{name}.weight" for name, _ in layout.operators()}
        self.weights = {name: each for name, each in model.model.named_parameters() if each.is_floating_point()}
        self.pruned = pruned & set(self.weights)
        self.rates, self.run = dict.fromkeys(self.weights, rate), model.run

    def of_layer(self, index: int) -> dict[str, str]:
        """Return the names of a decoder layer's weights inside it, by their names in the model."""
        prefix = f"{self.model.layers_name}.{index}."
        return {name: name.removeprefix(prefix) for name in self.weights if name.startswith(prefix)}

    def along(self, step: int, name: str, size: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the rows of a tensor, piece by piece, and their fp32 values at theta + size z."""
        weight = self.weights[name]
        for start, stop in pieces(weight):
            rows, drawn = weight.data[start:stop], self.draw(step, name, weight, start, stop)
            if name in self.pruned:
                drawn.mul_(rows != 0)
            yield rows, torch.add(rows.float(), drawn, alpha=size)

    def moved(self, step: int, name: str, eps: float) -> Tensor:
        """Return theta + eps z of a tensor, in its dtype."""
        dtype = self.weights[name].dtype
        return torch.cat([value.to(dtype) for _, value in self.along(step, name, eps)])

    @contextmanager
    def ends_moved(self, step: int, eps: float) -> Iterator[None]:
        """Move embeddings, final norm and head for the block."""
        prefix = f"{self.model.layers_name}."
        before = {}
        for name in (name for name in self.weights if not name.startswith(prefix)):
            before[name] = self.weights[name].data
            self.weights[name].data = self.moved(step, name, eps)
        try:
            yield
        finally:
            for name, value in before.items():
                self.weights[name].data = value

    @torch.no_grad()
    def loss(self, objective: Objective, windows: list[int], step: int, eps: float) -> float:
        """Compute the mean loss of windows at theta + eps z."""

        def run(index: int, hidden: Tensor, call: Call) -> Tensor:
            values = {inside: self.moved(step, name, eps) for name, inside in self.of_layer(index).items()}
            return self.model.run(index, hidden, call, values)

        with self.ends_moved(step, eps):
            return float(objective.losses(windows, run).sum()) / max(1.0, float(objective.text.counts[windows].sum()))

    @torch.no_grad()
    def step(self, objective: Objective, windows: list[int], number: int, factor: float) -> tuple[float, float]:
        """Take a step; returns the mean of both losses, and the slope g."""
        ahead, behind = (self.loss(objective, windows, number, eps) for eps in (EPS, -EPS))
        slope = (ahead - behind) / (2 * EPS)
        if math.isfinite(slope):
            for name in self.weights:
                for place, (rows, value) in enumerate(self.along(number, name, -self.rates[name] * factor * slope)):
                    rounded = self._rounded(value, rows.dtype, number, name, place)
                    rows.copy_(torch.where(rounded == 0, rows, rounded) if name in self.pruned else rounded)
        return (ahead + behind) / 2, slope

    def _rounded(self, value: Tensor, dtype: torch.dtype, step: int, name: str, place: int) -> Tensor:
        """Round fp32 values at random to their neighbours in ``dtype``."""
        if dtype == torch.float32:
            return value
        near = value.to(dtype).float()
        towards = torch.where(value > near, torch.inf, -torch.inf).to(dtype)
        other = torch.nextafter(near.to(dtype), towards).float()
        chance = ((value - near) / (other - near)).abs().nan_to_num_(0.0)
        generator = seeded(self.seed, "rounding", step, name, place, device=value.device)
        drawn = torch.rand(value.shape, generator=generator, device=value.device)
        return torch.where(drawn < chance, other, near).to(dtype)

    def keep(self) -> None:
        """Write the present weights to the file of the best."""
        self.best.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(self.best, self.tensors())

    def restore(self) -> None:
        """Read the best weights."""
        file = SafetensorsFile(self.best)
        self.load(LazyTensors(file.entries, file.read))

    def tensors(self) -> dict[str, Tensor]:
        """Return all weights, by name."""
        return {name: each.detach() for name, each in self.weights.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over weights."""
        for name, weight in self.weights.items():
            weight.copy_(tensors[name])

    def result(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the changed tensors, as :func:`.changes`."""
        weights = self.weights.items()
        return changes(self.model, ((self.model.source(n), each.detach(), n in self.pruned) for n, each in weights))

    @property
    def numbers(self) -> int:
        """Count the trained numbers."""
        return sum(
            int((each != 0).sum()) if name in self.pruned else each.numel() for name, each in self.weights.items()
        )

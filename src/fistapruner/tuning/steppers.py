"""One optimizer step: by backpropagation through the decoder layers, or by forward passes only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .objective import Objective
from .trained import Trained
from .trainer import StepResult
from .zeroth_order import ZerothOrder


class _Losses:
    """Losses of windows, with the values that are trained.

    Args:
        trained: what is trained.
        objective: the loss.
    """

    def __init__(self, trained: Trained, objective: Objective) -> None:
        self.trained = trained
        self.objective = objective

    def losses(self, windows: list[int]) -> Tensor:
        return self.objective.losses(windows, lambda index, layer: [self.trained.values(index, layer)])[0]


class FirstOrder(_Losses):
    """AdamW steps by backpropagation; each layer takes its step as soon as its gradient is complete."""

    def step(self, number: int, windows: list[int], factor: float) -> StepResult:
        self.objective.begin_step(number)
        norms: list[list[Tensor]] = []

        def update(index: int, layer: nn.Module, gradients: dict[str, Tensor]) -> None:
            norms.append(self.trained.step(index, layer, gradients, factor))

        loss = self.objective.gradient(windows, self.trained.values, update, self.trained.chain)
        return StepResult(loss, math.sqrt(sum(_squares(norms))))


def _squares(norms: Sequence[Sequence[Tensor]]) -> list[float]:
    """Return the sum of squares of each layer's norms, with one wait of the host for the device."""
    together = [norm for layer in norms for norm in layer]
    values = iter(torch.stack(together).tolist() if together else [])
    squares = []
    for layer in norms:
        total = 0.0
        for _ in layer:  # one after the other: sum() of Python 3.12 gives other last bits
            total += next(values) ** 2
        squares.append(total)
    return squares


class ForwardOnly(_Losses):
    """Steps without gradients: two losses a step, along a random direction."""

    def __init__(self, trained: Trained, objective: Objective) -> None:
        super().__init__(trained, objective)
        self._moves = ZerothOrder(trained)

    def take(self, number: int, slope: float | None, factor: float) -> None:
        self._moves.take(number, slope, factor)

    def step(self, number: int, windows: list[int], factor: float) -> StepResult:
        self.objective.begin_step(number)
        sums = self.objective.losses(windows, self._moves.variants(number)).sum(1)
        both = sums / self.objective.counts(windows).sum().clamp_min(1)
        slope = self._moves.slope(both)
        self.take(number, slope, factor)
        return StepResult(float(both.mean()), math.nan if slope is None else slope)

"""One optimizer step: by backpropagation through the decoder layers, or by forward passes only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .objective import Objective
from .trained import Trained
from .trainer import StepResult
from .zeroth_order import ZerothOrder


class _State:
    """The state of the trained tensors, which steps of all kinds share.

    Args:
        trained: what is trained.
    """

    def __init__(self, trained: Trained) -> None:
        self.trained = trained

    def digest(self) -> int:
        return self.trained.digest()

    def keep(self) -> None:
        self.trained.keep()

    def restore(self) -> None:
        self.trained.restore()

    def tensors(self) -> Mapping[str, Tensor]:
        return self.trained.tensors()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.trained.load(tensors)


class _Passes(_State):
    """Losses of windows, for steps that have passes.

    Args:
        trained: what is trained.
        objective: the loss.
    """

    def __init__(self, trained: Trained, objective: Objective) -> None:
        super().__init__(trained)
        self.objective = objective

    def losses(self, windows: list[int]) -> Tensor:
        return self.objective.losses(windows, lambda index, layer: [self.trained.values(index, layer)])[0]


class FirstOrder(_Passes):
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


class Replayed(_State):
    """Steps without gradients that are taken again from their slopes alone (:mod:`.zeroth_order`)."""

    def __init__(self, trained: Trained) -> None:
        super().__init__(trained)
        self.moves = ZerothOrder(trained)

    def replay(self, number: int, size: float | None, factor: float) -> None:
        for index in range(len(self.trained)):
            with self.trained.model.layer(index) as layer:
                self.moves.update(index, layer, number, size, factor)


class ForwardOnly(_Passes):
    """Steps without gradients: two losses a step, along a random direction."""

    def __init__(self, trained: Trained, objective: Objective) -> None:
        super().__init__(trained, objective)
        self._replayed = Replayed(trained)

    def replay(self, number: int, size: float | None, factor: float) -> None:
        self._replayed.replay(number, size, factor)

    def step(self, number: int, windows: list[int], factor: float) -> StepResult:
        self.objective.begin_step(number)
        sums = self.objective.losses(windows, self._replayed.moves.variants(number)).sum(1)
        both = sums / self.objective.counts(windows).sum().clamp_min(1)
        slope = self._replayed.moves.slope(both)
        self.replay(number, slope, factor)
        return StepResult(float(both.mean()), math.nan if slope is None else slope)

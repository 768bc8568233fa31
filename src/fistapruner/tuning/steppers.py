"""One optimizer step: by backpropagation through the decoder layers, or by forward passes only."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from .objective import Objective
from .trained import Trained
from .trainer import StepResult


class FirstOrder:
    """AdamW steps by backpropagation; each layer takes its step as soon as its gradient is complete.

    Args:
        objective: the loss.
        trained: what is trained.
    """

    def __init__(self, objective: Objective, trained: Trained) -> None:
        self.objective, self.trained = objective, trained

    def losses(self, windows: list[int]) -> Tensor:
        return self.objective.losses(windows, lambda index, layer: [self.trained.values(index, layer)])[0]

    def step(self, number: int, windows: list[int], factor: float) -> StepResult:
        squares: list[float] = []

        def update(index: int, layer: nn.Module, gradients: dict[str, Tensor]) -> None:
            squares.append(self.trained.update(index, layer, gradients, factor))

        loss = self.objective.gradient(windows, self.trained.values, update)
        return StepResult(loss, math.sqrt(sum(squares)))

    def replay(self, number: int, size: float, factor: float) -> None:
        raise NotImplementedError("steps by backpropagation cannot be taken again without passes")

    def keep(self) -> None:
        self.trained.keep()

    def restore(self) -> None:
        self.trained.restore()

    def tensors(self) -> dict[str, Tensor]:
        return self.trained.tensors()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.trained.load(tensors)

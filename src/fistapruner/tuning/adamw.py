"""AdamW on one tensor, the schedule of the learning rate, and the rule of the validation checks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import torch
from torch import Tensor

WARM_UP = 0.1
"""Default share of the steps over which the learning rate rises from 0."""

CHECKS = 8
"""Default number of validation checks, at equal distances."""

BACK_OFF = 0.3
"""Learning-rate factor after a validation check without improvement; training restarts from the best weights."""

SMALLEST = 0.02
"""Share of the first learning rate below which training stops."""

ADAM_EPSILON = 1e-8
"""Added to the square root of the second moment, as in torch."""


@torch.no_grad()
def adamw_step(
    value: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    step: int,
    rate: float,
    betas: tuple[float, float],
    decay: float = 0.0,
) -> None:
    """Take one step of AdamW (Loshchilov & Hutter 2019) in place.

    The operations are those of ``torch.optim.AdamW`` with ``foreach=False, fused=False``, element by element, so the
    bits are the same on survivors alone and on the dense tensor with masked gradients. The fused optimizer rounds
    otherwise.

    Args:
        value: trained tensor.
        gradient: of the loss with respect to it.
        first: first moment, zeros before step 1.
        second: second moment, zeros before step 1.
        step: number of this step since the moments were zero, from 1.
        rate: learning rate.
        betas: decay rates of the moments.
        decay: decoupled weight decay.
    """
    if decay:
        value.mul_(1 - rate * decay)
    first.lerp_(gradient, 1 - betas[0])
    second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    correction = (1 - betas[1] ** step) ** 0.5
    value.addcdiv_(first, (second.sqrt() / correction).add_(ADAM_EPSILON), value=-(rate / (1 - betas[0] ** step)))


def schedule(
    step: int, steps: int, warm_up: float = WARM_UP, kind: Literal["cosine", "linear", "constant"] = "cosine"
) -> float:
    """Return the learning-rate factor of a step: linear warm-up, then a fall towards 0.

    Args:
        step: number of the step, from 1.
        steps: number of all steps.
        warm_up: share of the steps in which the factor rises.
        kind: cosine, linear, or constant (no fall).
    """
    warm = max(1, round(warm_up * steps))
    if step <= warm:
        return step / warm
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm + 1)))
    return 1 - (step - warm) / (steps - warm + 1) if kind == "linear" else 1.0


def check_due(step: int, steps: int, checks: int) -> bool:
    """Say whether a validation check follows a step: there are so many, at equal distances.

    They are after the steps ``k * steps // checks``; with fewer steps than checks, after every step.
    """
    return ((step + 1) * checks - 1) // steps > (step * checks - 1) // steps


class Verdict(Enum):
    """What follows a validation check."""

    BETTER = "better"
    """Remember the weights: they are the best so far."""

    WORSE = "worse"
    """Go on."""

    BACK = "back"
    """Go back to the best weights, with new moments and a smaller rate."""

    STOP = "stop"
    """Go back to the best weights and end."""


@dataclass
class Patience:
    """The rule of the validation checks: better is remembered, not better goes back with a smaller rate.

    Args:
        first: first learning rate (or 1, for a factor).
        rate: learning rate now, before the schedule.
        best: lowest validation loss so far; of the start at first.
        best_step: the step that it was measured after; 0 is the start.
        on: False never goes back and never stops, but remembers the best step all the same.
    """

    first: float
    rate: float
    best: float
    best_step: int = 0
    on: bool = True

    @classmethod
    def begin(cls, loss: float, rate: float = 1.0, *, on: bool = True) -> Patience:
        """Begin with the validation loss of the start and the first learning rate."""
        return cls(rate, rate, loss, on=on)

    def check(self, step: int, loss: float) -> Verdict:
        """Take in the validation loss after ``step``. A loss that is not a number is not better."""
        if loss < self.best:
            self.best, self.best_step = loss, step
            return Verdict.BETTER
        if not self.on:
            return Verdict.WORSE
        self.rate *= BACK_OFF
        return Verdict.STOP if self.rate < SMALLEST * self.first else Verdict.BACK

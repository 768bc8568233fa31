"""Draw windows from several tasks: model-agnostic multitask fine-tuning (MAMF).

Wang, Yu, Li, Zhao & Ji 2022, "Model-Agnostic Multitask Fine-tuning for Few-shot Vision-Language Transfer Learning",
arXiv 2203.04904. A round draws n of N uniformly without replacement and takes the same number of tokens from each, so
that the mixture is uniform over what is drawn and not over examples. It is missed by all of K rounds with probability
``(1 - n/N)^K``, which is at most 1e-3 for ``K = ceil(ln 1e-3 / ln(1 - n/N))``.

1. Differs from the paper in what is drawn: there n of the N classes of a data set, which make a classification task;
   here rounds draw tasks, not classes. A task is a text that the user names.
2. Differs from the published program, which rounds K to the nearest: this breaks its own bound, for N = 10 with n = 3
   and 8. Here it is rounded up.
3. Differs from the published program, which trains on one task after the other in a round, each with new optimizer
   state: here the windows of a round alternate between its tasks, and the optimizer goes on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..runtime.numerics import seeded

MISSED = 1e-3
"""Probability with which a task may be missed by all rounds."""


@dataclass(frozen=True)
class Mixture:
    """A uniform mixture of tasks.

    Args:
        tasks: number of tasks, N.
        per_round: tasks of a round, n; None is all.
        seed: draws the tasks.
    """

    tasks: int
    per_round: int | None = None
    seed: int = 0

    @property
    def rounds(self) -> int:
        """Number of rounds, ``ceil(ln 1e-3 / ln(1 - n/N))``; one where a round has all tasks."""
        if self.per_round is None or self.per_round >= self.tasks:
            return 1
        # log1p is exact for small n/N; the margin keeps an exact quotient from being rounded up.
        return math.ceil(math.log(MISSED) / math.log1p(-self.per_round / self.tasks) - 1e-9)

    @property
    def least(self) -> int:
        """Return the smallest number of windows that can be drawn."""
        return self.rounds * min(self.per_round or self.tasks, self.tasks)

    def draw(self, windows: int, more: str = "more windows") -> Tensor:
        """Draw the task of each window.

        Rounds have the same number of windows, and so have the tasks of a round, to within one window.

        Args:
            windows: in all.
            more: what to take where they are too few, for the error.

        Returns:
            (windows,) int64 numbers of tasks.
        """
        rounds, per_round = self.rounds, min(self.per_round or self.tasks, self.tasks)
        if windows < self.least:
            raise FistaPrunerError(
                f"a mixture of {self.tasks} tasks, {per_round} a round, needs {self.least} windows for its {rounds} "
                f"round{'s' if rounds > 1 else ''}, and there are {windows}: take {more}"
                + (f", or per_round {self.tasks}" if per_round < self.tasks <= windows else "")
            )
        parts = []
        for number in range(rounds):
            size = windows * (number + 1) // rounds - windows * number // rounds
            chosen = torch.randperm(self.tasks, generator=seeded(self.seed, "tasks", number))[:per_round]
            parts.append(shuffled(chosen, size, self.seed, "round", number))
        return torch.cat(parts)


def shuffled(numbers: Tensor, count: int, seed: int, *purpose: str | int) -> Tensor:
    """Draw ``count`` of the numbers: all once in a random order, then all again in another, and so on."""
    turns = -(-count // max(len(numbers), 1))
    orders = [
        numbers[torch.randperm(len(numbers), generator=seeded(seed, *purpose, turn))] for turn in range(max(turns, 1))
    ]
    return torch.cat(orders)[:count]

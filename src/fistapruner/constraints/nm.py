"""n:m sparsity: keep at most n of every m consecutive inputs of a row (2:4: sparse tensor cores)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from .base import Constraint, Grouped, Scope
from .selection import keep_n_of_m
from .thresholds import GroupThreshold, Threshold
from .unstructured import Unstructured


@dataclass(frozen=True)
class NM(Grouped):
    """Keep the ``n`` best of every ``m`` consecutive inputs of a row: ``NM(2, 4)`` is 2:4.

    Args:
        n: weights kept in every group, 1 <= n < m.
        m: group length along the inputs.
    """

    n: int
    m: int

    forms: ClassVar[tuple[str, ...]] = ("a pattern (2:4)",)
    exchanges: ClassVar[Literal["row", "group"] | None] = "group"

    def __post_init__(self) -> None:
        if not (isinstance(self.n, int) and isinstance(self.m, int) and 1 <= self.n < self.m):
            raise FistaPrunerError(f"pattern {self.n}:{self.m} is not n:m with 1 <= n < m, such as 2:4 or 4:8")

    @classmethod
    def parse(cls, text: str) -> Self | None:
        match = re.fullmatch(r"(\d+)\s*:\s*(\d+)", text)
        return cls(int(match[1]), int(match[2])) if match else None

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def neighbours(self, reach: float) -> tuple[Constraint, ...]:
        sparsest = max(1, self.n - max(1, round(reach * self.m)))
        return (Unstructured(0.0), *(NM(kept, self.m) for kept in range(self.m - 1, sparsest - 1, -1)))

    def project(self, scores: Tensor, scope: Scope = "operator") -> Tensor:
        self.check(scores.shape[1])
        return keep_n_of_m(scores, self.n, self.m)

    def satisfies(self, weight: Tensor) -> bool:
        rows, columns = weight.shape
        if columns % self.m:
            return False
        count = torch.uint8 if self.m < 256 else torch.int64
        return bool(((weight.reshape(rows, -1, self.m) != 0).sum(-1, dtype=count) <= self.n).all())

    def rows_independent(self, scope: Scope = "operator") -> bool:
        return True

    def threshold(self, rows: int, columns: int) -> Threshold:
        return GroupThreshold(self.n, self.m)


def patterns_met(weight: Tensor, longest: int) -> list[NM]:
    """Find the sparsest n:m pattern that a weight has for each m of 2, 4, 8 up to ``longest``.

    Args:
        weight: (rows, columns), not empty.
        longest: at most 128.
    """
    nonzero, m, found = (weight != 0).to(torch.uint8), 1, []
    while m < longest and nonzero.shape[1] % 2 == 0:
        nonzero, m = nonzero[:, ::2] + nonzero[:, 1::2], 2 * m
        if (most := max(1, int(nonzero.max()))) < m:
            found.append(NM(most, m))
    return found

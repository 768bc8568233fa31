"""Constraints that the package does not have, each as its file would be: what a newcomer writes to add one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fistapruner.core import Constraint
from fistapruner.core.constraints import CONSTRAINTS, Scope


@dataclass(frozen=True)
class SharedNM(Constraint):
    """n:m with one mask for every block of ``v`` rows, written ``shared v:n:m``."""

    v: int
    n: int
    m: int

    forms: ClassVar[tuple[str, ...]] = ("a shared pattern (shared 4:2:4)",)

    @classmethod
    def parse(cls, text: str) -> SharedNM | None:
        match = re.fullmatch(r"shared (\d+):(\d+):(\d+)", text)
        return cls(*map(int, match.groups())) if match else None

    def __str__(self) -> str:
        return f"shared {self.v}:{self.n}:{self.m}"

    @property
    def fraction(self) -> float:
        return 1.0 - self.n / self.m

    @property
    def group_length(self) -> int:
        return self.m

    @property
    def group_rows(self) -> int:
        return self.v

    def zeros(self, rows: int, columns: int) -> int:
        return rows * columns // self.m * (self.m - self.n)

    def project(self, scores: Tensor, scope: Scope = "operator") -> Tensor:
        self.check(scores.shape[1])
        masks = []
        for block in torch.nan_to_num(scores, nan=-torch.inf).split(self.v):
            groups = block.sum(0).view(-1, self.m)
            kept = torch.zeros_like(groups, dtype=torch.bool)
            kept.scatter_(1, groups.sort(dim=1, descending=True, stable=True).indices[:, : self.n], True)
            masks.append(kept.view(1, -1).expand(len(block), -1))
        return torch.cat(masks)

    def satisfies(self, weight: Tensor) -> bool:
        used = torch.stack([(block != 0).any(0) for block in weight.split(self.v)])
        return weight.shape[1] % self.m == 0 and bool((used.view(len(used), -1, self.m).sum(-1) <= self.n).all())


@dataclass(frozen=True)
class WholeColumns(Constraint):
    """A share of the inputs is not used by any output, written ``columns 50%``."""

    percent: float

    forms: ClassVar[tuple[str, ...]] = ("whole columns (columns 50%)",)

    @classmethod
    def parse(cls, text: str) -> WholeColumns | None:
        match = re.fullmatch(r"columns ([\d.]+)%", text)
        return cls(float(match[1])) if match else None

    def __str__(self) -> str:
        return f"columns {self.percent}%"

    @property
    def fraction(self) -> float:
        return self.percent / 100.0

    def zeros(self, rows: int, columns: int) -> int:
        return rows * round(self.fraction * columns)

    def project(self, scores: Tensor, scope: Scope = "operator") -> Tensor:
        sums = torch.nan_to_num(scores, nan=-torch.inf).sum(0)
        kept = torch.zeros_like(sums, dtype=torch.bool)
        count = len(sums) - round(self.fraction * len(sums))
        kept[sums.sort(descending=True, stable=True).indices[:count]] = True
        return kept.expand(scores.shape)

    def satisfies(self, weight: Tensor) -> bool:
        return int((weight == 0).all(0).sum()) >= round(self.fraction * weight.shape[1])


TOYS: dict[str, type[Constraint]] = {"shared n:m": SharedNM, "whole columns": WholeColumns}

EXAMPLES = {
    "unstructured": ("0%", "0.3", "50%", "95%", "0.123456789"),
    "n:m": ("1:2", "2:4", "3:4", "4:8", "3:5"),
    "v:n:m": ("4:2:8", "64:2:8", "3:1:5"),
    "shared n:m": ("shared 4:2:4", "shared 3:1:2", "shared 8:4:8"),
    "whole columns": ("columns 50.0%", "columns 12.5%"),
}
"""Texts of every constraint; tests/constraints/test_every_constraint.py says which one has none."""


@contextmanager
def registered() -> Iterator[None]:
    """Register the toys, one line each."""
    CONSTRAINTS.update(TOYS)
    try:
        yield
    finally:
        for name in TOYS:
            del CONSTRAINTS[name]


def every_constraint() -> list[Constraint]:
    """Build the examples of every constraint: those of the package, then the toys."""
    with registered():
        found = [kind.parse(text) for name, kind in CONSTRAINTS.items() for text in EXAMPLES.get(name, ())]
    assert all(found)
    return [constraint for constraint in found if constraint is not None]

"""V:N:M sparsity (VENOM): n of every m inputs of a row, within 2n inputs that v rows share."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from .base import Grouped, Scope
from .selection import keep_n_of_m
from .thresholds import SharedThreshold, Threshold


@dataclass(frozen=True)
class VNM(Grouped):
    """Keep n of every m inputs of a row, within 2n of them that v rows share: ``VNM(64, 2, 8)`` is 64:2:8.

    A block of v rows and m inputs is 2n dense columns in which every row is n:2n, so sparse tensor cores multiply it
    as 2:4 where n is 2 (VENOM: Castro et al. 2023, arXiv 2310.02065). The inputs with the largest sums of scores are
    shared; that they keep the largest sum altogether is not promised. The last block may have fewer rows.

    Args:
        v: rows that share inputs.
        n: weights kept in every group of a row.
        m: group length along the inputs, more than 2n.
    """

    v: int
    n: int
    m: int

    forms: ClassVar[tuple[str, ...]] = ("a pattern with shared inputs (64:2:8)",)

    def __post_init__(self) -> None:
        if not (self.v >= 1 and self.n >= 1 and self.m > 2 * self.n):
            raise FistaPrunerError(
                f"pattern {self} is not v:n:m with v >= 1, n >= 1 and m > 2n, such as 64:2:8: {2 * self.n} of every "
                "m inputs are shared by v rows"
            )

    @classmethod
    def parse(cls, text: str) -> Self | None:
        match = re.fullmatch(r"(\d+)\s*:\s*(\d+)\s*:\s*(\d+)", text)
        return cls(int(match[1]), int(match[2]), int(match[3])) if match else None

    def __str__(self) -> str:
        return f"{self.v}:{self.n}:{self.m}"

    def project(self, scores: Tensor, scope: Scope = "operator") -> Tensor:
        self.check(scores.shape[1])
        lowest = torch.finfo(scores.dtype).min
        shared = torch.nan_to_num(scores, nan=-math.inf).split(self.v)
        sums = torch.stack([torch.nan_to_num(block.sum(0), nan=-math.inf) for block in shared])
        inputs = keep_n_of_m(sums, 2 * self.n, self.m).repeat_interleave(self.v, 0)[: len(scores)]
        return keep_n_of_m(scores.nan_to_num(nan=lowest, neginf=lowest).masked_fill(~inputs, -math.inf), self.n, self.m)

    def satisfies(self, weight: Tensor) -> bool:
        if weight.shape[1] % self.m:
            return False
        kept = weight != 0
        used = torch.stack([block.any(0) for block in kept.split(self.v)])
        fit = [
            (part.reshape(len(part), -1, self.m).sum(-1) <= most).all()
            for part, most in ((kept, self.n), (used, 2 * self.n))
        ]
        return bool(torch.stack(fit).all())  # the host waits for a GPU once

    @property
    def group_rows(self) -> int:
        return self.v

    def threshold(self, rows: int, columns: int) -> Threshold:
        return SharedThreshold(self.v, self.n, self.m)

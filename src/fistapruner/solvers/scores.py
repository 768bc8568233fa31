"""Solvers that score weights and do not update the others: magnitude and Wanda."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core import Constraint, LayerProblem
from .base import Method, Solution


@dataclass(frozen=True)
class Magnitude(Method):
    """Drop the smallest ``|W|`` of the operator; kept weights are not updated and no data is used."""

    name: ClassVar[str] = "magnitude"
    takes_start: ClassVar[bool] = False

    def solve(self, problem: LayerProblem, constraint: Constraint, start: Solution | None = None) -> Solution:
        mask = constraint.project(problem.weight.abs())
        return Solution(problem.weight * mask, mask)


@dataclass(frozen=True)
class Wanda(Method):
    """Drop the lowest ``|W_ij| sqrt(H_jj)`` of each row; others stay as they are (Sun et al. 2023, eq. 1)."""

    name: ClassVar[str] = "wanda"
    takes_start: ClassVar[bool] = False

    def solve(self, problem: LayerProblem, constraint: Constraint, start: Solution | None = None) -> Solution:
        scores = problem.weight.abs().mul_(problem.gram.diagonal().clamp_min(0).sqrt())
        mask = constraint.project(scores, scope="row")
        return Solution(problem.weight * mask, mask)

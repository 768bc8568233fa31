"""Magnitude pruning: drop the weights nearest to zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch

from ..constraints import Constraint
from ..problem import LayerProblem
from .base import Method, Solution, project_operators


class Magnitude(Method):
    """Drop the smallest ``|W|`` of each operator; kept weights are not updated and no data is used."""

    name: ClassVar[str] = "magnitude"
    takes_start: ClassVar[bool] = False
    refit_helps: ClassVar[bool] = True
    takes: ClassVar[Literal["nothing", "norms", "Gram"]] = "nothing"

    def solve(self, problem: LayerProblem, sparsity: Sequence[Constraint], start: Solution | None = None) -> Solution:
        scores = problem.weight.abs()
        mask = project_operators(scores, problem.rows, sparsity)
        return Solution(torch.mul(problem.weight, mask, out=scores), mask)

    def rows_independent(self, sparsity: Constraint) -> bool:
        return sparsity.rows_independent()

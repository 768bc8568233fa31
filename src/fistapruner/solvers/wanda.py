"""Wanda: score weights by magnitude times input norm and compare them within each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch

from ..constraints import Constraint
from ..problem import LayerProblem
from .base import Method, Solution, project_operators


class Wanda(Method):
    """Drop the lowest ``|W_ij| sqrt(H_jj)`` of each row; kept weights are not updated (Sun et al., eq. 1)."""

    name: ClassVar[str] = "wanda"
    takes_start: ClassVar[bool] = False
    refit_helps: ClassVar[bool] = True
    takes: ClassVar[Literal["nothing", "norms", "Gram"]] = "norms"

    def solve(self, problem: LayerProblem, sparsity: Sequence[Constraint], start: Solution | None = None) -> Solution:
        scores = problem.weight.abs().mul_(problem.gram.diagonal().clamp_min(0).sqrt())
        mask = project_operators(scores, problem.rows, sparsity, scope="row")
        return Solution(torch.mul(problem.weight, mask, out=scores), mask)

    def rows_independent(self, sparsity: Constraint) -> bool:
        return sparsity.rows_independent("row")

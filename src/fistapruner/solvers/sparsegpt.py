"""SparseGPT: prune column by column; the columns to the right compensate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core import Constraint, LayerProblem, Ridge
from ..core.linalg import damped_cholesky
from .base import Method, Solution

PANEL = 16
"""Columns whose updates are applied to the rest of their block at once."""


@dataclass(frozen=True)
class SparseGPT(Method):
    """Optimal brain surgeon, one column at a time, all rows at once.

    Algorithm 1 of Frantar & Alistarh 2023. With U the upper Cholesky factor of the inverse of the damped Gram, removing
    a weight of column j costs ``w^2 / U_jj^2``. Masks are chosen for each block of columns (unstructured) or each group
    of m columns (n:m), when they are reached. The error ``e = (w - q) / U_jj`` of a finished column is subtracted from
    the columns to its right as ``e U_j``.

    It starts from the least-squares weights C, from where f grows with the same Gram. Published SparseGPT reproduces
    ``W X*``; the problem has no drift then, and C is W.

    Args:
        damping: added to the diagonal of H, as a share of its mean (the paper's 1 %).
        block: columns whose mask is chosen together (the paper's 128).
    """

    name: ClassVar[str] = "sparsegpt"
    takes_start: ClassVar[bool] = False

    damping: float = 0.01
    block: int = 128

    def solve(self, problem: LayerProblem, constraint: Constraint, start: Solution | None = None) -> Solution:
        centre, gram, warnings = problem.regularised(Ridge(mean=self.damping))
        upper, raised = problem.cached((self.name, self.damping), lambda: _factor(gram, problem.name))
        columns = centre.T.contiguous()  # (n, m): a column of weights is then one contiguous row
        keep = torch.ones_like(columns, dtype=torch.bool)
        # Groups end at the boundaries of blocks and of the panels inside them.
        unit = constraint.group_length
        panel = unit * max(1, PANEL // unit)
        width = unit * max(1, self.block // unit)
        span = unit if unit > 1 else width  # columns whose mask is chosen at once
        inverse_diagonal = upper.diagonal().reciprocal()
        for begin in range(0, len(columns), width):
            end = min(begin + width, len(columns))
            errors = torch.empty_like(columns[begin:end])
            for left in range(begin, end, panel):
                right = min(left + panel, end)
                for j in range(left, right):
                    if j % span == 0:
                        chosen = slice(j, min(j + span, len(columns)))
                        scores = (columns[chosen] * inverse_diagonal[chosen, None]).square()
                        keep[chosen] = constraint.project_columns(scores.T, j).T
                    error = columns[j].masked_fill(keep[j], 0.0) * inverse_diagonal[j]
                    columns[j].masked_fill_(~keep[j], 0.0)
                    errors[j - begin] = error
                    if j + 1 < right:
                        columns[j + 1 : right].addr_(upper[j, j + 1 : right], error, alpha=-1.0)
                if right < end:
                    done = slice(left - begin, right - begin)
                    columns[right:end].addmm_(upper[left:right, right:end].T, errors[done], alpha=-1.0)
            if end < len(columns):
                columns[end:].addmm_(upper[begin:end, end:].T, errors, alpha=-1.0)
        weight, mask = columns.T.contiguous(), keep.T.contiguous()
        return Solution(weight, mask, ({"damping": self.damping},), (*warnings, *raised))


def _factor(gram: Tensor, name: str) -> tuple[Tensor, tuple[str, ...]]:
    """Factorise the inverse of a Gram as ``U^T U``, U (n, n) upper; returns U and warnings."""
    # Reversed order: flip(H) = L L^T gives H = R R^T with R = flip(L) upper, so H^-1 = U^T U for U = R^-1.
    factor, _, warnings = damped_cholesky(gram.flip(0, 1), 0.0, name)
    upper = factor.flip(0, 1)
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True), tuple(warnings)

"""SparseGPT: prune column by column; the columns to the right compensate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..constraints import Constraint
from ..problem import LayerProblem
from .base import Method, Solution
from .conditioning import alive_gram, damped_cholesky, dead_inputs, invert_lower, once


class SparseGPT(Method):
    """Optimal brain surgeon, one column at a time, all rows at once.

    Algorithm 1 of Frantar & Alistarh 2023. With U the upper Cholesky factor of the inverse of the damped Gram, removing
    a weight of column j costs ``w^2 / U_jj^2``. Masks are chosen for each block of columns (unstructured) or each group
    of m columns (n:m), when they are reached. The error ``e = (w - q) / U_jj`` of a finished column is subtracted from
    the columns to its right as ``e U_j``.

    The published method reproduces ``W X*`` (``dense_target=pruned``). For another target the least-squares weights
    ``W + a R (H + dI)^-1`` replace W: f is lowest there, and grows from there with the same Gram.
    """

    name: ClassVar[str] = "sparsegpt"
    refit_helps: ClassVar[bool] = True
    takes_start: ClassVar[bool] = False

    damping: float = Field(
        0.01, ge=0.0, description="Added to the diagonal of H, as a share of its mean (the paper's 1 %)."
    )
    block: int = Field(128, ge=1, description="Columns whose mask is chosen together (the paper's 128).")

    def supports(self, constraint: Constraint) -> bool:
        return constraint.columnwise

    def solve(self, problem: LayerProblem, sparsity: Sequence[Constraint], start: Solution | None = None) -> Solution:
        upper, damping, warnings = once(
            problem.gram, (self.name, self.damping), lambda: self._factor(problem), lambda found: not found[2]
        )
        weight = problem.weight
        if problem.drift_gradient is not None:
            weight = weight + (problem.drift_gradient @ upper.T) @ upper
        weight = weight.masked_fill(dead_inputs(problem.gram), 0.0)

        columns = weight.T.contiguous()  # (n, m): a column of weights is then one contiguous row
        keep = torch.ones_like(columns, dtype=torch.bool)
        starts = problem.starts
        # Groups of all operators must end at the boundaries of blocks and of the panels inside them.
        unit = math.lcm(*(pattern.group_length for pattern in sparsity))
        panel = unit * max(1, 16 // unit)
        width = unit * max(1, self.block // unit)
        # Masks are chosen for each group if there are groups, else for the whole block.
        spans = [pattern.group_length if pattern.group_length > 1 else width for pattern in sparsity]
        inverse_diagonal = upper.diagonal().reciprocal()
        for begin in range(0, len(columns), width):
            end = min(begin + width, len(columns))
            errors = torch.empty_like(columns[begin:end])
            for left in range(begin, end, panel):
                right = min(left + panel, end)
                for j in range(left, right):
                    for first, size, pattern, span in zip(starts, problem.rows, sparsity, spans, strict=True):
                        if j % span == 0:
                            chosen = slice(j, min(j + span, len(columns))), slice(first, first + size)
                            scores = (columns[chosen] * inverse_diagonal[chosen[0], None]).square()
                            keep[chosen] = pattern.project_columns(scores.T, j).T
                    error = columns[j].masked_fill(keep[j], 0.0) * inverse_diagonal[j]
                    columns[j].masked_fill_(~keep[j], 0.0)
                    errors[j - begin] = error
                    if j + 1 < right:
                        columns[j + 1 : right].addr_(upper[j, j + 1 : right], error, alpha=-1.0)
                if right < end:
                    columns[right:end].addmm_(
                        upper[left:right, right:end].T, errors[left - begin : right - begin], alpha=-1.0
                    )
            if end < len(columns):
                columns[end:].addmm_(upper[begin:end, end:].T, errors, alpha=-1.0)
        stats = tuple({"damping": damping} for _ in problem.rows)
        return Solution(columns.T.contiguous(), keep.T.contiguous(), stats, tuple(warnings))

    def _factor(self, problem: LayerProblem) -> tuple[Tensor, float, list[str]]:
        """Factorise the inverse of the damped Gram: U (n, n), the damping that was enough, and warnings."""
        # Reversed order: flip(H) = L L^T gives H = R R^T with R = flip(L) upper, so H^-1 = U^T U for U = R^-1.
        gram = alive_gram(problem.gram)
        factor, damping, warnings = damped_cholesky(gram.flip(0, 1), self.damping, problem.label)
        if factor.device.type == "cpu":
            upper = factor.flip(0, 1)
            upper = torch.linalg.solve_triangular(upper, torch.eye(len(upper), dtype=upper.dtype), upper=True)
        else:
            invert_lower(factor)
            upper = factor.flip(0, 1)
        return upper, damping, warnings

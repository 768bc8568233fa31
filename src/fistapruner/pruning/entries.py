"""Make the report's entry of a solved operator."""

from __future__ import annotations

import torch

from ..core import LayerProblem
from ..models.operators import Operator
from ..runs.layer_records import OperatorEntry
from ..solvers.base import Solution


def operator_entry(
    problem: LayerProblem, solution: Solution, error: float, operator: Operator, number: int, pattern: str
) -> OperatorEntry:
    """Make the entry of an operator.

    Args:
        problem: the solved problem, without row weights.
        solution: weights rounded as in the checkpoint.
        error: its relative error.
        operator: which was solved.
        number: of its group in the decoder layer.
        pattern: its sparsity, as text.
    """
    weight = solution.weight
    zeros = weight.numel() - int(torch.count_nonzero(weight))  # summing booleans would convert them to int64
    return OperatorEntry(
        name=operator.name,
        shape=(operator.rows, operator.columns),
        sparsity=pattern,
        zeros=zeros,
        density=1.0 - zeros / weight.numel(),
        relative_error=error,
        dense_error=problem.dense_error(),
        group=number,
        steps=solution.stats[0]["steps"],
    )

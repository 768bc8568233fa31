"""Make the report's entries of solved operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..models.layout import Group
from ..problem import LayerProblem
from ..runs.layer_records import OperatorEntry
from ..solvers.base import Solution


def operator_entries(
    problem: LayerProblem, solution: Solution, errors: Sequence[float], group: Group, number: int, patterns: list[str]
) -> list[OperatorEntry]:
    """Make the entry of each operator of a group.

    Args:
        problem: the solved problem, without row weights.
        solution: weights rounded as in the checkpoint.
        errors: relative error of each operator.
        group: the operators.
        number: of the group in its decoder layer.
        patterns: sparsity of each operator, as text.
    """
    entries = []
    parts = solution.weight.split([operator.rows for operator in group])
    dense_errors: Sequence[float | None] = problem.dense_errors() or [None] * len(group)
    for operator, pattern, part, error, dense_error, stats in zip(
        group, patterns, parts, errors, dense_errors, solution.stats, strict=True
    ):
        zeros = part.numel() - int(torch.count_nonzero(part))  # summing booleans would convert them to int64
        entries.append(
            OperatorEntry(
                name=operator.name,
                shape=(operator.rows, operator.columns),
                sparsity=pattern,
                zeros=zeros,
                density=1.0 - zeros / part.numel(),
                relative_error=error,
                dense_error=dense_error,
                group=number,
                steps=stats["steps"],
            )
        )
    return entries

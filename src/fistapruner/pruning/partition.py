"""Cut a group of operators into parts that are solved independently.

A part is an operator or, where every step of the method treats rows independently, a block of its rows. The cut
depends on shapes and recipe only, not on the number of devices, so neither do the results.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from ..constraints import Constraint
from ..problem import LayerProblem
from ..solvers import solve
from ..solvers.base import Method, Solution, Stats
from ..solvers.conditioning import shared_gram

ROWS = 1024
"""Rows of a block, at most: enough for fast products, few enough for many workers."""


@dataclass(frozen=True)
class Part:
    """Rows ``start`` to ``stop`` of a group's stacked operators, within one operator, and their pattern."""

    operator: int
    start: int
    stop: int
    sparsity: Constraint


def cut(
    rows: Sequence[int], columns: int, sparsity: Sequence[Constraint], steps: Sequence[Method], block: int = ROWS
) -> list[Part]:
    """Cut a group of operators into parts that are solved independently.

    Args:
        rows: outputs of each operator.
        columns: inputs.
        sparsity: pattern of each operator.
        steps: the method chain.
        block: most rows of a part, where the method treats rows independently.
    """
    parts: list[Part] = []
    begin = 0
    for operator, (size, pattern) in enumerate(zip(rows, sparsity, strict=True)):
        some_left = pattern.zeros(size, columns) <= size * (columns - 1)
        independent = some_left and all(step.rows_independent(pattern) for step in steps)
        blocks = -(-size // block) if independent else 1
        edges = [size * block // blocks for block in range(blocks + 1)]
        for start, stop in pairwise(edges):
            part = pattern.rows_block(size, columns, start, stop) if blocks > 1 else pattern
            parts.append(Part(operator, begin + start, begin + stop, part))
        begin += size
    return parts


def solve_in_parts(
    problem: LayerProblem, sparsity: Sequence[Constraint], steps: Sequence[Method], block: int = ROWS
) -> Solution:
    """Solve a group part by part, in less memory than stacked; arguments as for :func:`cut`."""
    parts = cut(problem.rows, problem.shape[1], sparsity, steps, block)
    with shared_gram(problem.gram):
        return join(problem, parts, (solve_part(part_of(problem, part), part.sparsity, steps) for part in parts))


def solve_part(problem: LayerProblem, sparsity: Constraint, steps: Sequence[Method]) -> Solution:
    """Solve one part."""
    return solve(problem, [sparsity], list(steps))


def part_of(problem: LayerProblem, part: Part) -> LayerProblem:
    """Make the problem of a part, with tensors aligned as from a file: alignment changes last bits."""
    sliced = problem.slice(part.start, part.stop, (problem.names[part.operator],))
    return replace(
        sliced,
        **{name: tensor if tensor.data_ptr() % 64 == 0 else tensor.clone() for name, tensor in rows_of(sliced).items()},
    )


def rows_of(problem: LayerProblem) -> dict[str, Any]:
    """Return the tensors of a problem that have its rows, by argument name."""
    tensors = {
        "weight": problem.weight,
        "drift": problem.drift,
        "drift_energy": problem.drift_energy,
        "energy": problem.energy,
        "importance": problem.importance,
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def join(problem: LayerProblem, parts: Sequence[Part], solutions: Iterable[Solution]) -> Solution:
    """Join the solutions of the parts of a group."""
    weight, mask = torch.empty_like(problem.weight), torch.empty_like(problem.weight, dtype=torch.bool)
    stats: list[list[tuple[float, Stats]]] = [[] for _ in problem.rows]
    warnings: dict[str, None] = {}
    energies = torch.cat(problem.output_energies)
    for part, solution in zip(parts, solutions, strict=True):
        weight[part.start : part.stop], mask[part.start : part.stop] = solution.weight, solution.mask
        stats[part.operator].append((float(energies[part.start : part.stop].sum()), solution.stats[0]))
        warnings |= dict.fromkeys(solution.warnings)
    return Solution(weight, mask, tuple(_join_stats(operator) for operator in stats), tuple(warnings))


def _join_stats(parts: list[tuple[float, Stats]]) -> Stats:
    """Join the statistics of an operator's blocks of rows, each with its dense output energy."""
    if len(parts) == 1:
        return parts[0][1]
    whole = max(sum(energy for energy, _ in parts), 1e-300)

    def merge(key: str, values: list[Any]) -> Any:
        if key == "relative_error":
            return sum(energy * value for (energy, _), value in zip(parts, values, strict=True)) / whole
        if key == "seconds" or (isinstance(values[0], int) and not isinstance(values[0], bool)):
            return sum(values)  # counts, such as rows
        return max(values) if isinstance(values[0], float) else values[0]

    chains = [stats["steps"] for _, stats in parts]
    steps = []
    for same in zip(*chains, strict=True):
        known = {key: None for step in same for key in step}  # a block without zeros has fewer
        steps.append({key: merge(key, [step[key] for step in same if key in step]) for key in known})
    return {"relative_error": steps[-1]["relative_error"], "steps": steps}

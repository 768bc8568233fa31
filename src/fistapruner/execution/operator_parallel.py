"""Solve the parts of a group of operators on several workers.

With ``propagate=pruned`` decoder layers are pruned in order, but the parts of a group of operators
(:mod:`fistapruner.pruning.partition`) are independent. A job names three files in ``RUN/hidden``: the Gram of the
group, the part's rows of the other tensors, and the solution.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..constraints import Constraint, parse_sparsity
from ..models.files.safetensors import SafetensorsFile, write_tensors
from ..problem import LayerProblem
from ..pruning.partition import cut, join, part_of, rows_of, solve_in_parts, solve_part
from ..runtime.memory import release_device_memory
from ..solvers.base import Method, Solution
from .pool import Event, NoRoom, PartJob, Pool, run_jobs

log = logging.getLogger("fistapruner")

GRAM = "gram"
"""Name of the file with a group's Gram."""


class ParallelSolver:
    """Solve groups of operators on the workers of a pool.

    The result is that of :func:`~fistapruner.pruning.partition.solve_in_parts`, which solves a group in this process
    where the GPUs of all workers have too little memory.

    Args:
        pool: the workers; the caller closes it.
        folder: ``RUN/hidden``.
        known: the recipe's method chain, which the workers solve by; any other chain is solved in this process.
    """

    def __init__(self, pool: Pool, folder: Path, known: Sequence[Method]) -> None:
        self._pool = pool
        self._folder = folder
        self._known = tuple(known)

    def __call__(self, problem: LayerProblem, sparsity: Sequence[Constraint], steps: Sequence[Method]) -> Solution:
        """Solve a group.

        Raises:
            FistaPrunerError: bad data, or a worker that dies repeatedly at the same part.
        """
        parts = cut(problem.rows, problem.shape[1], sparsity, steps)
        if len(parts) == 1 or tuple(steps) != self._known:
            return solve_in_parts(problem, sparsity, steps)
        jobs = [
            PartJob(
                problem=f"part-{number}",
                solution=f"solution-{number}",
                name=problem.names[part.operator],
                sparsity=str(part.sparsity),
                target=problem.target,
                tokens=problem.tokens,
            )
            for number, part in enumerate(parts)
        ]
        write_tensors(self._folder / GRAM, {"gram": problem.gram})
        for part, job in zip(parts, jobs, strict=True):
            write_tensors(self._folder / job.problem, rows_of(part_of(problem, part)))
        release_device_memory()  # what the passes have freed, for the workers that share this process's GPU
        try:
            run_jobs(self._pool, _PartSchedule(jobs))
        except NoRoom:
            log.warning("the GPU memory of all workers ran out at %s, which this process solves", problem.label)
            solution = solve_in_parts(problem, sparsity, steps)
        else:
            solution = join(problem, parts, (_read_solution(self._folder / job.solution) for job in jobs))
        for name in [GRAM, *(name for job in jobs for name in (job.problem, job.solution))]:
            (self._folder / name).unlink(missing_ok=True)
        return solution


class _PartSchedule:
    """Schedule parts in any order; they are independent."""

    def __init__(self, jobs: Sequence[PartJob]) -> None:
        self._queue = list(jobs)
        self._left = len(jobs)

    def unfinished(self) -> bool:
        return self._left > 0

    def take(self) -> PartJob | None:
        return self._queue.pop(0) if self._queue else None

    def put_back(self, job: PartJob) -> None:
        self._queue.insert(0, job)

    def progress(self, job: PartJob, event: Event) -> None:
        """Ignore the event: parts report only their end."""

    def done(self, job: PartJob) -> None:
        self._left -= 1


def do_part(job: PartJob, folder: Path, steps: Sequence[Method], device: torch.device) -> None:
    """Solve a part in a worker.

    Args:
        job: the part.
        folder: ``RUN/hidden``.
        steps: the method chain.
        device: device of the solve.

    Raises:
        FistaPrunerError: bad data, or a full disk.
    """
    file = SafetensorsFile(folder / job.problem)
    tensors: dict[str, Any] = {name: file.read(name) for name in file.entries}
    gram = SafetensorsFile(folder / GRAM).read("gram")
    problem = LayerProblem(gram=gram, target=job.target, names=(job.name,), tokens=job.tokens, **tensors).to(device)
    solution = solve_part(problem, parse_sparsity(job.sparsity), steps)
    record = {"stats": solution.stats[0], "warnings": solution.warnings}
    tensors = {"weight": solution.weight, "mask": solution.mask}
    write_tensors(folder / job.solution, tensors, {"record": json.dumps(record)})


def _read_solution(path: Path) -> Solution:
    """Read the solution of a part."""
    file = SafetensorsFile(path)
    record = json.loads(file.metadata["record"])
    return Solution(file.read("weight"), file.read("mask"), (record["stats"],), tuple(record["warnings"]))

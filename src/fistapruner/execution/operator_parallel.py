"""The parts of a group of operators, solved side by side by the workers of an executor.

With ``propagate=pruned`` decoder layers are done one after the other, but the parts of a group
(:mod:`fistapruner.pruning.partition`) know nothing of each other. A job names two files in ``RUN/hidden``, the Gram of the
group and the part's rows of everything else, and a third for the solution.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..constraints.patterns import Sparsity, parse_sparsity
from ..errors import FistaPrunerError
from ..models.files.safetensors import SafetensorsFile, SafetensorsWriter, TensorEntry
from ..problem import LayerProblem
from ..pruning.partition import cut, join, part_of, rows_of, solve_apart, solve_part
from ..solvers.base import Method, Solution
from .layer_parallel import GRAM, PartJob, Pool, count_death


class SideBySide:
    """Solves the parts of groups on the workers of a pool; as a function, it is :func:`~.parts.solve_apart`.

    Args:
        pool: the workers; the caller closes it.
        folder: ``RUN/hidden``.
    """

    def __init__(self, pool: Pool, folder: Path) -> None:
        self._pool = pool
        self._folder = folder

    def __call__(self, problem: LayerProblem, sparsity: Sequence[Sparsity], steps: Sequence[Method]) -> Solution:
        """Solve a group.

        Raises:
            FistaPrunerError: bad data, or a worker that dies of the same part again and again.
        """
        parts = cut(problem.rows, problem.shape[1], sparsity, steps)
        if len(parts) == 1:
            return solve_apart(problem, sparsity, steps)
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
        _write(self._folder / GRAM, {"gram": problem.gram})
        for part, job in zip(parts, jobs, strict=True):
            _write(self._folder / job.problem, rows_of(part_of(problem, part)))
        self._run(jobs)
        solution = join(problem, parts, (_read_solution(self._folder / job.solution, problem.weight.device) for job in jobs))
        for name in [GRAM, *(name for job in jobs for name in (job.problem, job.solution))]:
            (self._folder / name).unlink()
        return solution

    def _run(self, jobs: list[PartJob]) -> None:
        queue, running = list(jobs), dict[int, PartJob]()
        attempts = Counter[str]()
        left = len(jobs)
        while left:
            for worker in range(self._pool.size):
                if worker not in running and queue:
                    running[worker] = queue.pop(0)
                    self._pool.start(worker, running[worker])
            for worker, event in self._pool.wait():
                match event["event"]:
                    case "done":
                        del running[worker]
                        left -= 1
                    case "lost":
                        job = running.pop(worker, None)
                        count_death(attempts, "an idle worker" if job is None else f"{job.name}, {job.problem}", event["message"])
                        if job is not None:
                            queue.insert(0, job)
                        self._pool.revive(worker)
                    case "failed":
                        raise FistaPrunerError(event["message"])
                    case _:
                        raise RuntimeError(f"a worker broke:\n{event['message']}")


def do_part(job: PartJob, folder: Path, steps: Sequence[Method], device: torch.device) -> None:
    """Solve a part in a worker.

    Args:
        job: which.
        folder: ``RUN/hidden``.
        steps: the method chain.
        device: where.

    Raises:
        FistaPrunerError: bad data, or a full disk.
    """
    file = SafetensorsFile(folder / job.problem)
    tensors: dict[str, Any] = {name: file.read(name) for name in file.entries}
    gram = SafetensorsFile(folder / GRAM).read("gram")
    problem = LayerProblem(gram=gram, target=job.target, names=(job.name,), tokens=job.tokens, **tensors).to(device)
    solution = solve_part(problem, parse_sparsity(job.sparsity), steps)
    record = {"stats": solution.stats[0], "warnings": solution.warnings}
    _write(folder / job.solution, {"weight": solution.weight, "mask": solution.mask}, {"record": json.dumps(record)})


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    entries = [TensorEntry.of(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    with SafetensorsWriter(path, entries, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def _read_solution(path: Path, device: torch.device) -> Solution:
    file = SafetensorsFile(path)
    record = json.loads(file.metadata["record"])
    return Solution(file.read("weight").to(device), file.read("mask").to(device), (record["stats"],), tuple(record["warnings"]))

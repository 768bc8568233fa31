"""Run jobs on a pool of workers: jobs, events and the loop.

A job carries indices and file names, never tensors; what it makes is written by the worker itself. So whatever dies
loses only the jobs that were running. A :class:`Pool` starts jobs and reports events (processes of this machine, a
Ray cluster); a :class:`Schedule` knows which job may start next and what follows from its end.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from ..errors import FistaPrunerError

log = logging.getLogger("fistapruner")

ATTEMPTS = 3
"""Attempts at one job before the run stops, since a job may kill its worker every time."""

Event = dict[str, Any]
"""What a worker reports: ``{"event": name, ...}``, with the names

``operators`` (``names``, ``error``): the solve of some operators begins (``error`` None) or ended;
``passed``: the decoder layer's dense output is written;
``done``: the job is finished and its result is on disk;
``failed`` (``message``): an error of the user's input;  ``broken`` (``message``): an error of this program;
``lost`` (``message``): the worker died;
``short``: the memory of the worker's GPU ran out; it is ready for smaller jobs.
"""


class NoRoom(FistaPrunerError):
    """The memory of every worker's GPU has run out."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}: the GPU memory of all workers ran out: give the same prune command again with fewer --workers"
        )


@dataclass(frozen=True)
class LayerJob:
    """Prune one decoder layer, or pass hidden states through it.

    Args:
        index: which layer.
        prune: False only passes the dense hidden states on (the layer is journaled already).
        source: name in ``RUN/hidden`` of the dense hidden states that enter it.
        target: name for those that leave it; None if they are not needed or already written.
    """

    index: int
    prune: bool
    source: str
    target: str | None

    def __str__(self) -> str:
        return f"layer {self.index}"


@dataclass(frozen=True)
class PartJob:
    """Solve one part of a group of operators.

    Args:
        problem: file in ``RUN/hidden`` of the part's rows; the Gram is in a file beside it.
        solution: file to write there.
        name: of the operator.
        sparsity: pattern of these rows.
        target: share of the dense output in the target.
        tokens: calibration tokens behind the means.
    """

    problem: str
    solution: str
    name: str
    sparsity: str
    target: float
    tokens: int | None

    def __str__(self) -> str:
        return f"{self.name}, {self.problem}"


J = TypeVar("J", LayerJob, PartJob)


class Pool(Protocol):
    """Workers that have opened the run directory."""

    size: int

    def start(self, worker: int, job: LayerJob | PartJob) -> None:
        """Give an idle worker, 0 to ``size`` - 1, a job."""

    def wait(self) -> list[tuple[int, Event]]:
        """Wait for the next events: (worker, event)."""

    def revive(self, worker: int) -> None:
        """Start a dead worker again."""

    def close(self) -> None:
        """End all workers at once."""


class Schedule(Protocol[J]):
    """The order of jobs, and what follows from their events."""

    def unfinished(self) -> bool:
        """Return whether jobs are left, waiting or running."""

    def take(self) -> J | None:
        """Remove and return the next job that can start now; None if there is none."""

    def put_back(self, job: J) -> None:
        """Queue a job again, first in line, because its worker died or ran out of memory."""

    def progress(self, job: J, event: Event) -> None:
        """Note an event of a running job."""

    def done(self, job: J) -> None:
        """Note that a job is finished."""


def run_jobs(pool: Pool, schedule: Schedule[J]) -> None:
    """Run all jobs of ``schedule`` on the workers of ``pool``; jobs of dead workers run again.

    A worker whose GPU's memory runs out gets no more of them; the others do its job.

    Args:
        pool: the workers; the caller closes it.
        schedule: the jobs.

    Raises:
        NoRoom: the memory of every worker's GPU ran out.
        FistaPrunerError: a worker reports an error of the user's input, or dies of the same job :data:`ATTEMPTS` times.
        RuntimeError: a worker reports an error of this program.
    """
    running: dict[int, J] = {}
    deaths = Counter[str]()
    short = set[int]()
    while schedule.unfinished():
        for worker in range(pool.size):
            if worker not in running and worker not in short and (job := schedule.take()) is not None:
                running[worker] = job
                pool.start(worker, job)
        for worker, event in pool.wait():
            current = running.get(worker)
            what = "an idle worker" if current is None else str(current)
            match event["event"]:
                case "lost":
                    deaths[what] += 1
                    if deaths[what] == ATTEMPTS:
                        raise FistaPrunerError(
                            f"{what}: its worker died {ATTEMPTS} times ({event['message']}): "
                            "if memory ran out, give the same prune command again with fewer --workers"
                        )
                    log.warning("a worker died (%s) at %s, which is done again", event["message"], what)
                    if current is not None:
                        schedule.put_back(running.pop(worker))
                    pool.revive(worker)
                case "short":
                    schedule.put_back(running.pop(worker))
                    short.add(worker)
                    if len(short) == pool.size:
                        raise NoRoom(what)
                    log.warning("the GPU memory of a worker ran out at %s, which another worker does", what)
                case "failed":
                    raise FistaPrunerError(event["message"])
                case "broken":
                    raise RuntimeError(f"{what}: a worker broke:\n{event['message']}")
                case "done":
                    schedule.done(running.pop(worker))
                case _:
                    if current is not None:
                        schedule.progress(current, event)

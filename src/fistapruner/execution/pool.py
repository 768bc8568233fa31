"""Run jobs on a pool of workers: jobs, events and the loop.

A job carries indices and file names, never tensors; what it makes is written by the worker itself. So whatever dies
loses only the jobs that were running. A :class:`Pool` starts jobs and reports events (processes of this machine, a
Ray cluster); a :class:`Schedule` knows which job may start next and what follows from its end.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol

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
``lost`` (``message``): the worker died.
"""


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


class Pool(Protocol):
    """Workers that have opened the run directory."""

    size: int

    def start(self, worker: int, job: LayerJob) -> None:
        """Give an idle worker, 0 to ``size`` - 1, a job."""

    def wait(self) -> list[tuple[int, Event]]:
        """Wait for the next events: (worker, event)."""

    def revive(self, worker: int) -> None:
        """Start a dead worker again."""

    def close(self) -> None:
        """End all workers at once."""


class Schedule(Protocol):
    """The order of jobs, and what follows from their events."""

    def unfinished(self) -> bool:
        """Return whether jobs are left, waiting or running."""

    def take(self) -> LayerJob | None:
        """Remove and return the next job that can start now; None if there is none."""

    def put_back(self, job: LayerJob) -> None:
        """Queue a job again, first in line, because its worker died."""

    def progress(self, job: LayerJob, event: Event) -> None:
        """Note an event of a running job."""

    def done(self, job: LayerJob) -> None:
        """Note that a job is finished."""


def run_jobs(pool: Pool, schedule: Schedule) -> None:
    """Run all jobs of ``schedule`` on the workers of ``pool``; jobs of dead workers run again.

    Args:
        pool: the workers; the caller closes it.
        schedule: the jobs.

    Raises:
        FistaPrunerError: a worker reports an error of the user's input, or dies of the same job :data:`ATTEMPTS` times.
        RuntimeError: a worker reports an error of this program.
    """
    running: dict[int, LayerJob] = {}
    deaths = Counter[str]()
    while schedule.unfinished():
        for worker in range(pool.size):
            if worker not in running and (job := schedule.take()) is not None:
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
                case "failed":
                    raise FistaPrunerError(event["message"])
                case "broken":
                    raise RuntimeError(f"{what}: a worker broke:\n{event['message']}")
                case "done":
                    schedule.done(running.pop(worker))
                case _:
                    if current is not None:
                        schedule.progress(current, event)

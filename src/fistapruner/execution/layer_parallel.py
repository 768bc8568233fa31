"""Decoder layers on several workers at once, when every layer is fed by the dense model.

The dense model's hidden states pass through all layers once, from worker to worker: the job of layer i begins with the
layer's dense pass, which gives the input of layer i + 1 as a by-product; as soon as that file is written the next worker
starts on it, while the first one goes on to solve. Jobs carry indices and file names, never tensors, and what they make is
journaled by the worker itself, so that whatever dies loses only the layers in flight.

An executor is a :class:`Pool`: it starts jobs and reports events. Everything else (order, files, retries) is here, once.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ..errors import FistaPrunerError
from ..runs.listener import Listener
from .context import RunContext

log = logging.getLogger("fistapruner")

ATTEMPTS = 3
"""Times a job is tried before the run stops; a worker that dies of the job itself would die of it for ever."""

IDLE = -1
"""Stands for the layer of a worker that has none."""

Event = dict[str, Any]
"""What a worker reports: ``{"event": name, ...}``, with the names

``operators`` (``names``, ``error``): operators of the layer are worked on or done;
``passed``: the layer's dense output is written;
``done``: the layer is journaled (or passed, for a job that does not prune);
``failed`` (``message``): the user's error;  ``broken`` (``message``): the program's;
``lost`` (``message``): the worker is gone.
"""


@dataclass(frozen=True)
class Job:
    """RunContext on one decoder layer.

    Args:
        index: which layer.
        prune: False only passes the dense hidden states on (the layer is journaled already).
        source: name in ``RUN/hidden`` of the dense hidden states that enter it.
        target: name for those that leave it; None if nobody needs them, or they are there.
    """

    index: int
    prune: bool
    source: str
    target: str | None

    def to_json(self) -> dict[str, Any]:
        """The job as JSON values."""
        return asdict(self)


GRAM = "gram"
"""Name of the file of a group's Gram."""


@dataclass(frozen=True)
class PartJob:
    """The solve of one part, as JSON values.

    Args:
        problem: file in ``RUN/hidden`` of the part's rows; the Gram is in the file :data:`GRAM` beside it.
        solution: file to write there.
        name: of the operator.
        sparsity: pattern of these rows.
        target: share of the dense target.
        tokens: calibration tokens behind the means.
    """

    problem: str
    solution: str
    name: str
    sparsity: str
    target: float
    tokens: int | None

    def to_json(self) -> dict[str, Any]:
        """The job as JSON values."""
        return asdict(self)


class Pool(Protocol):
    """Workers that have opened the run directory."""

    size: int

    def start(self, worker: int, job: Job | PartJob) -> None:
        """Give an idle worker, 0 to ``size`` - 1, a job."""

    def wait(self) -> list[tuple[int, Event]]:
        """Wait for the next events: (worker, event)."""

    def revive(self, worker: int) -> None:
        """Start a worker again that was lost."""

    def close(self) -> None:
        """End all workers, at once."""


def dispatch(work: RunContext, todo: Collection[int], pool: Pool, listener: Listener) -> None:
    """Prune the decoder layers in ``todo`` on the workers of ``pool``.

    At most ``pool.size + 1`` files of hidden states exist at a time.

    Args:
        work: the opened run; ``propagate`` is ``dense``.
        todo: indices of layers that are not journaled yet.
        pool: the workers; the caller closes it.
        listener: told of progress.

    Raises:
        FistaPrunerError: a worker reports the user's error, or dies of the same layer again and again.
    """
    last = max(todo)
    work.embed(_file(0), on_disk=True)[0].close(keep=True)
    queue = list(range(last + 1))
    passed, finished = {0}, set[int]()
    running: dict[int, Job] = {}
    attempts = Counter[str]()
    while len(finished) <= last:
        for worker in range(pool.size):
            if worker not in running and queue and queue[0] in passed:
                index = queue.pop(0)
                onward = index < last and index + 1 not in passed
                running[worker] = Job(index, index in todo, _file(index), _file(index + 1) if onward else None)
                pool.start(worker, running[worker])
        for worker, event in pool.wait():
            index = running[worker].index if worker in running else IDLE
            match event["event"]:
                case "operators":
                    listener.operators(index, event["names"], event["error"])
                case "passed":
                    passed.add(index + 1)
                case "done":
                    del running[worker]
                    finished.add(index)
                    for number in (index, index + 1):  # an input is read by its layer, and maybe by the one before it
                        if number in finished and (number == 0 or number - 1 in finished):
                            (work.hidden / _file(number)).unlink(missing_ok=True)
                    if index in todo:
                        entry = work.run.finished(index, work.fingerprint)
                        if entry is None:
                            raise FistaPrunerError(f"layer {index} was done by a worker, but {work.run.folder} does not show it")
                        listener.layer(entry)
                case "lost":
                    running.pop(worker, None)
                    count_death(attempts, f"layer {index}" if index != IDLE else "an idle worker", event["message"])
                    if index != IDLE:
                        queue.insert(0, index)
                    pool.revive(worker)
                case "failed":
                    raise FistaPrunerError(event["message"])
                case _:
                    raise RuntimeError(f"layer {index}: a worker broke:\n{event['message']}")


def count_death(attempts: Counter[str], what: str, message: str) -> None:
    """Note that a worker died at ``what``, which will be done again.

    Raises:
        FistaPrunerError: it was the last attempt.
    """
    attempts[what] += 1
    if attempts[what] == ATTEMPTS:
        raise FistaPrunerError(f"{what}: its worker died {ATTEMPTS} times ({message}): use fewer --workers if memory ran out, then resume")
    log.warning("a worker died (%s) at %s, which is done again", message, what)


def _file(index: int) -> str:
    """Name of the dense hidden states that enter decoder layer ``index``."""
    return f"dense-{index}"

"""Prune decoder layers in parallel, each on the hidden states of the dense model.

The dense model's hidden states pass through all layers once. The job of layer i begins with the layer's dense pass,
which also writes the input of layer i + 1. When that file is complete, the next worker starts on it, while the first
one solves.
"""

from __future__ import annotations

from collections.abc import Collection

from ..errors import FistaPrunerError
from ..runs.listener import Listener
from ..runtime.memory import release_device_memory
from .context import RunContext
from .pool import Event, LayerJob, Pool, run_jobs


def prune_layers_in_parallel(context: RunContext, todo: Collection[int], pool: Pool, listener: Listener) -> None:
    """Prune the decoder layers in ``todo`` on the workers of ``pool``.

    At most ``pool.size + 1`` files of hidden states exist at a time.

    Args:
        context: the opened run; ``propagate`` is ``dense``.
        todo: indices of layers that are not journaled yet.
        pool: the workers; the caller closes it.
        listener: receives progress.

    Raises:
        FistaPrunerError: a worker reports an error of the user's input, or dies repeatedly at the same layer.
    """
    context.embed(_file(0), on_disk=True)[0].close(keep=True)
    release_device_memory()  # that of the embeddings, for the worker that shares this process's GPU
    run_jobs(pool, _LayerSchedule(context, todo, listener))


class _LayerSchedule:
    """Schedule decoder layers in order, each when its input is written; remove files that are read."""

    def __init__(self, context: RunContext, todo: Collection[int], listener: Listener) -> None:
        self._context, self._todo, self._listener = context, todo, listener
        self._last = max(todo)
        self._queue = list(range(self._last + 1))
        self._written, self._finished = {0}, set[int]()

    def unfinished(self) -> bool:
        return len(self._finished) <= self._last

    def take(self) -> LayerJob | None:
        if not self._queue or self._queue[0] not in self._written:
            return None
        index = self._queue.pop(0)
        onward = index < self._last and index + 1 not in self._written
        return LayerJob(index, index in self._todo, _file(index), _file(index + 1) if onward else None)

    def put_back(self, job: LayerJob) -> None:
        self._queue.insert(0, job.index)

    def progress(self, job: LayerJob, event: Event) -> None:
        if event["event"] == "passed":
            self._written.add(job.index + 1)
        else:
            self._listener.operators(job.index, event["names"], event["error"])

    def done(self, job: LayerJob) -> None:
        index = job.index
        self._finished.add(index)
        for number in (index, index + 1):  # a file is read by its own layer, and may still be written by the one before
            if number in self._finished and (number == 0 or number - 1 in self._finished):
                (self._context.hidden / _file(number)).unlink(missing_ok=True)
        if index in self._todo:
            entry = self._context.run.journal.finished(index, self._context.fingerprint)
            if entry is None:
                raise FistaPrunerError(
                    f"layer {index} was done by a worker, but {self._context.run.folder} does not hold it"
                )
            self._listener.layer(entry)


def _file(index: int) -> str:
    """Return the name of the file of dense hidden states that enter decoder layer ``index``."""
    return f"dense-{index}"

"""Run workers as actors of a Ray cluster, placed by GPUs and cores. Needs the extra ``ray``.

Every node must see the run directory and the model under the same path (a shared file system) and have fistapruner
installed. A node that does not see the run directory fails at once with a message.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import FistaPrunerError, MissingExtraError, one_line
from ..models.source import Permissions
from ..runtime.launcher import module_path
from ..settings.execution_settings import Execution
from .context import RunContext
from .pool import Event, LayerJob

ENDS = ("done", "failed", "broken", "lost", "short")
"""Events that end a job."""

REACH_SECONDS = 10.0
"""Timeout of the connection to a cluster's head, in seconds."""


def require_ray(address: str | None) -> None:
    """Refuse ``--executor ray`` where Ray is not installed or a cluster cannot be reached.

    Ray itself would wait for minutes, and a signal would not end it.

    Args:
        address: ``HOST:PORT`` of the cluster's head, ``auto`` for the one that ``RAY_ADDRESS`` names or that is on this
            machine, or None to start one.

    Raises:
        MissingExtraError: names the extra.
        FistaPrunerError: names the address and the fault.
    """
    if head := cluster_head(address):
        _require_cluster(head, "--address" if address != "auto" else "RAY_ADDRESS")
    if find_spec("ray") is None:
        raise MissingExtraError("ray", "ray", "--executor ray")


def cluster_head(address: str | None) -> str | None:
    """Return the address of a cluster, which ``auto`` has in ``RAY_ADDRESS``; None is this machine."""
    found = os.environ.get("RAY_ADDRESS") if address == "auto" else address
    return None if found in ("", "auto", "local") else found


def _require_cluster(address: str, name: str) -> None:
    """Refuse an address, given by what is called ``name``, where nothing listens."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise FistaPrunerError(
            f"{name} {address!r} is not HOST:PORT of a Ray cluster's head, such as 10.0.0.5:6379, or auto"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise FistaPrunerError(f"Ray cluster {address!r} cannot be reached: {error}") from None


def room_for_workers(nodes: Iterable[Mapping[str, Any]], threads: int, *, cuda: bool) -> int:
    """Count the workers that a cluster has room for: Ray waits forever for a place that no node has.

    Args:
        nodes: as ``ray.nodes()`` describes them.
        threads: cores of a worker, all on one node.
        cuda: every worker needs a GPU of its node, too.
    """
    resources = [node.get("Resources", {}) for node in nodes if node.get("Alive")]
    cores = [int(found.get("CPU", 0) // threads) for found in resources]
    gpus = [int(found.get("GPU", 0)) for found in resources]
    return sum(map(min, cores, gpus) if cuda else cores)


class RayPool:
    """A pool of Ray actors (see :class:`~fistapruner.execution.pool.Pool`).

    Args:
        context: the opened run.
        execution: ``address`` of the cluster (None starts one on this machine), ``workers``, ``device``.
        jobs: number of parallel jobs; no more workers are started.

    Raises:
        MissingExtraError: Ray is not installed.
        FistaPrunerError: the cluster cannot be reached, or has no room for a worker.
    """

    def __init__(self, context: RunContext, execution: Execution, jobs: int) -> None:
        require_ray(execution.address)
        import ray

        self._ray = ray
        self._started = not ray.is_initialized()
        if self._started:
            address = execution.address or "local"  # without one Ray would look for a cluster
            try:
                ray.init(
                    address=address,
                    include_dashboard=False if execution.address is None else None,
                    log_to_driver=False,
                )
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise FistaPrunerError(f"Ray cluster {address!r} cannot be reached: {one_line(error)}") from None
        threads = context.numerics.threads
        resources = ray.cluster_resources()
        cuda = execution.device != "cpu" and resources.get("GPU", 0) >= 1
        room = room_for_workers(ray.nodes(), threads, cuda=cuda)
        if room < 1:
            self.close()
            raise FistaPrunerError(
                f"the Ray cluster has {resources.get('CPU', 0):g} cores, and no node has the {threads} that a worker "
                f"needs{' beside its GPU' if cuda else ''}: set --threads"
            )
        self.size = min(execution.workers or room, room, jobs)
        variables = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": module_path()}
        self._options = {"num_cpus": threads, "num_gpus": 1 if cuda else 0, "runtime_env": {"env_vars": variables}}
        self._arguments = (
            str(context.run.folder.absolute()),
            "cuda" if cuda else "cpu",
            context.permissions,
            context.model.checkpoint.folder,
        )
        self._actor = ray.remote(max_restarts=0)(Actor)
        self._actors: list[Any] = [None] * self.size
        self._streams: dict[Any, int] = {}  # event stream of a running job to its worker
        for worker in range(self.size):
            self.revive(worker)

    def start(self, worker: int, job: LayerJob) -> None:
        """Give an idle worker a job."""
        self._streams[self._actors[worker].run.remote(asdict(job))] = worker

    def wait(self) -> list[tuple[int, Event]]:
        """Wait for the next events."""
        from ray.exceptions import RayError

        ready, _ = self._ray.wait(list(self._streams), num_returns=1)
        events: list[tuple[int, Event]] = []
        for stream in ready:
            worker = self._streams[stream]
            try:
                event: Event = self._ray.get(next(stream))
            except (RayError, StopIteration) as error:
                event = {"event": "lost", "message": one_line(error)}
            if event["event"] in ENDS:
                del self._streams[stream]
            events.append((worker, event))
        return events

    def revive(self, worker: int) -> None:
        """Start a worker, or start it again, on any node with room."""
        self._actors[worker] = self._actor.options(**self._options).remote(*self._arguments)

    def close(self) -> None:
        """End all workers, and the cluster if it was started here."""
        for actor in getattr(self, "_actors", []):
            self._ray.kill(actor)
        if self._started:
            self._ray.shutdown()


class Actor:
    """A :class:`~fistapruner.execution.worker.Worker` on some node of the cluster."""

    def __init__(self, folder: str, device: str, permissions: Permissions, model: Path) -> None:
        from .worker import Worker

        self.fault: Event | None = None
        host = os.uname().nodename
        if not (Path(folder) / "run.json").exists():
            message = (
                f"the Ray worker on host {host} does not see {folder}: put --out on a file system that all nodes share"
            )
            self.fault = {"event": "failed", "message": message}
            return
        try:
            self.worker = Worker(Path(folder), device, permissions, model, shared=True)
        except FistaPrunerError as error:
            self.fault = {"event": "failed", "message": f"Ray worker on host {host}: {error}"}

    def run(self, job: dict[str, Any]) -> Iterator[Event]:
        """Run a job; yield its events while it runs."""
        if self.fault is not None:
            yield self.fault
            return
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        threading.Thread(target=self.worker.run, args=(job, events.put), daemon=True).start()
        while True:
            event = events.get()
            yield event
            if event["event"] in ENDS:
                return

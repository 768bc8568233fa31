"""Prune the decoder layers of a run in this process, in other processes, or on a Ray cluster.

A layer is computed by one process on the run's number of threads, so the result does not depend on who prunes it.
With ``propagate=pruned`` the input of a layer is the output of the pruned layer before it: this process prunes them in
order. With ``propagate=dense`` layers are independent once their inputs are known: this process passes the hidden
states of the dense model from layer to layer into files, and workers prune the layers that these files enter. A task
carries an index, never tensors, and journals its layer itself: what dies loses the layers it was working on.

A Ray cluster's nodes must see the run directory and the model under the same path (a shared file system) and have
fistapruner installed. Ray itself runs the task of a lost worker or node again.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..core import LayerProblem
from ..errors import FistaPrunerError, MissingExtraError, one_line
from ..models.source import Permissions
from ..passes.store import HiddenStates
from ..runs.log import Listener
from ..runtime.devices import available_cores, cpu_threads, release_device_memory, usable_threads, worker_devices
from ..runtime.machine import module_path
from ..runtime.numerics import exact_products
from ..settings.base import Execution
from .context import LayerEvents, LayerStreams
from .opened import RunContext

log = logging.getLogger("fistapruner")

Inspect = Callable[[int, int, LayerProblem], None]
"""Receives (layer, group, problem) before each solve; it must not change the problem's tensors."""

ATTEMPTS = 3
"""Attempts at one layer before the run stops, since a layer may kill its worker every time."""

REACH_SECONDS = 10.0
"""Timeout of the connection to a cluster's head, in seconds."""


def prune_layers(
    context: RunContext,
    todo: Collection[int],
    execution: Execution,
    listener: Listener,
    inspect: Inspect | None = None,
) -> None:
    """Prune the decoder layers in ``todo``; each layer is journaled when it is done.

    Args:
        context: the opened run.
        todo: indices of layers that are not journaled yet.
        execution: executor, workers, device.
        listener: receives progress.
        inspect: receives each problem before it is solved; it makes the run serial.

    Raises:
        FistaPrunerError: the executor is not available, or bad data.
    """
    executor, pruned = execution.executor, context.recipe.propagate == "pruned"
    if executor != "serial" and pruned and todo:
        listener.say(f"propagate=pruned: layers wait for each other, so executor {executor} runs them one by one")
    with cpu_threads(context.numerics.threads):
        if executor == "serial" or pruned or inspect is not None or len(todo) <= 1:
            prune_serially(context, todo, listener, inspect)
            return
        release_device_memory()  # for the workers that share this process's GPU
        pool = (ProcessPool if executor == "process" else RayPool)(context, execution, len(todo))
        try:
            listener.say(f"{pool.size} {pool.kind} of {context.numerics.threads} threads")
            prune_in_parallel(context, todo, pool, listener)
        finally:
            pool.close()


def default_threads(execution: Execution) -> int:
    """Choose the CPU threads of each worker: an equal share of the cores. Recorded once for a run."""
    if execution.threads:
        return execution.threads
    if execution.executor == "serial":
        return usable_threads()
    return max(1, available_cores() // len(worker_devices(execution.device, execution.workers, None)))


def local_workers(execution: Execution) -> int:
    """Count the worker processes on this machine; those of a cluster have their own machines."""
    devices = worker_devices(execution.device, execution.workers, execution.threads)
    if execution.executor == "process":
        return len(devices)
    if execution.executor == "serial" or cluster_head(execution.address):
        return 1
    room = available_cores() // default_threads(execution)  # as Ray places them
    room = min(room, torch.cuda.device_count()) if devices[0].type == "cuda" else room
    return max(1, min(execution.workers or room, room))


def prune_serially(
    context: RunContext, todo: Collection[int], listener: Listener, inspect: Inspect | None = None
) -> None:
    """Prune layers in this process, in order; hidden states run through the others, as journaled.

    Arguments as for :func:`prune_layers`.
    """
    if not todo:
        return
    last, recipe = max(todo), context.recipe
    stream, calls = context.embed()
    samples = context.dense_windows()
    dense: HiddenStates | None = stream
    pruned: HiddenStates | None = None
    if samples < stream.samples:
        dense, pruned = context.store("dense-0", samples=samples), stream
        for start, stop in calls.batches(samples):
            dense.write(start, stream.read(start, stop))
    for index in range(last + 1):
        dense_on = index < last and (recipe.propagate == "dense" or recipe.dense_share > 0.0)
        pruned_on = index < last and recipe.propagate == "pruned"
        streams = LayerStreams(
            dense,
            pruned,
            context.store(f"dense-{index + 1}", samples=samples) if dense_on else None,
            context.store(f"pruned-{index + 1}") if pruned_on else None,
        )
        if index in todo:
            events = LayerEvents(operators=partial(listener.operators, index))
            if inspect is not None:
                events = replace(events, problem=partial(inspect, index))
            listener.layer(context.prune(index, streams, calls, events))
        else:
            listener.tick(f"layer {index}, already pruned", 0, 1)
            context.advance(index, streams, calls)
        for store in (dense, pruned):
            if store is not None:
                store.close()
        dense, pruned = streams.dense_out, streams.pruned_out


def prune_in_parallel(
    context: RunContext, todo: Collection[int], pool: ProcessPool | RayPool, listener: Listener
) -> None:
    """Prune layers on the workers of ``pool``, while this process passes the dense hidden states on.

    At most ``pool.size + 2`` files of hidden states exist at a time.

    Args:
        context: the opened run; ``propagate`` is ``dense``.
        todo: indices of layers that are not journaled yet.
        pool: the workers; the caller closes it.
        listener: receives progress.

    Raises:
        FistaPrunerError: a worker reports an error of the user's input, or dies repeatedly at the same layer.
    """
    running: dict[Future[str | None], int] = {}
    deaths = Counter[int]()
    last, (states, calls) = max(todo), context.embed(_file(0), on_disk=True)
    for index in range(last + 1):
        states.sync()  # other hosts may read the file
        while len(running) >= pool.size:
            _collect(context, pool, running, deaths, listener)
        if index in todo:
            running[pool.submit(index)] = index
        if index < last:
            onward = context.store(_file(index + 1), on_disk=True)
            context.advance(index, LayerStreams(states, None, onward, None), calls)
            states.close(keep=index in todo)
            states = onward
    states.close(keep=True)
    while running:
        _collect(context, pool, running, deaths, listener)


def _collect(
    context: RunContext,
    pool: ProcessPool | RayPool,
    running: dict[Future[str | None], int],
    deaths: Counter[int],
    listener: Listener,
) -> None:
    """Wait for the next layers; those of dead workers are done again."""
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        index = running.pop(future)
        try:
            fault = future.result()
        except BrokenProcessPool as error:  # all its workers are gone
            lost = sorted([index, *running.values()])
            running.clear()
            log.warning("a worker died (%s) at layers %s, which are done again", one_line(error), lost)
            deaths.update(lost)
            worst, count = deaths.most_common(1)[0]
            if count >= ATTEMPTS:
                raise FistaPrunerError(
                    f"layer {worst}: its worker died {ATTEMPTS} times: if memory ran out, give the same prune command "
                    "again with fewer workers"
                ) from None
            pool.revive()
            running |= {pool.submit(index): index for index in lost}
            return
        except Exception as error:
            if type(error).__module__ != "ray.exceptions" or "Task" in type(error).__name__:
                raise  # of this program
            raise FistaPrunerError(f"layer {index}: Ray lost its worker {ATTEMPTS} times: {one_line(error)}") from None
        if fault is not None:
            raise FistaPrunerError(fault)
        entry = context.run.journal.finished(index, context.fingerprint)
        if entry is None:
            raise FistaPrunerError(f"layer {index} was done by a worker, but {context.run.folder} does not hold it")
        (context.hidden / _file(index)).unlink(missing_ok=True)
        listener.layer(entry)


def _file(index: int) -> str:
    """Return the name of the file of dense hidden states that enter decoder layer ``index``."""
    return f"dense-{index}"


@lru_cache(maxsize=1)
def _opened(folder: Path, device: str, permissions: Permissions, model: Path) -> RunContext:
    """Open the run in a worker, once."""
    if not (folder / "run.json").exists():
        raise FistaPrunerError(
            f"the worker on host {os.uname().nodename} does not see {folder}: put --out on a file system that all "
            "nodes share"
        )
    try:
        torch.empty(1, device=device)
    except RuntimeError as error:  # such as a GPU that the run's own process has for itself
        raise FistaPrunerError(f"a worker cannot use device {device}: {str(error).splitlines()[0]}") from None
    return RunContext.open(folder, torch.device(device), permissions, model)


def prune_one(index: int, *place: Any) -> str | None:
    """Prune decoder layer ``index`` of a run, and journal it; returns a fault of the user's input.

    Args:
        index: which layer; its dense hidden states are in the run directory.
        place: run directory, device, permissions, the dense model's folder.
    """
    try:
        context = _opened(*place)
        torch.set_num_threads(context.numerics.threads)
        states = context.store(_file(index), on_disk=True)
        try:
            with exact_products():
                context.prune(index, LayerStreams(states, None, None, None), context.calls(), LayerEvents())
        finally:
            states.close(keep=True)
    except FistaPrunerError as error:
        return str(error)
    return None


def _place(context: RunContext, device: str) -> tuple[Path, str, Permissions, Path]:
    """Return how a worker on ``device`` opens the run."""
    return context.run.folder.absolute(), device, context.permissions, context.model.checkpoint.folder


class ProcessPool:
    """Processes of this machine: one for each GPU, or for each group of CPU cores.

    Args:
        context: the opened run.
        execution: ``workers`` and ``device``.
        most: no more workers are started.
    """

    kind = "worker processes"

    def __init__(self, context: RunContext, execution: Execution, most: int) -> None:
        self._devices = worker_devices(execution.device, execution.workers, context.numerics.threads)[:most]
        self.size, self._context = len(self._devices), context
        self.revive()

    def submit(self, index: int) -> Future[str | None]:
        """Let a worker do :func:`prune_one` of a layer."""
        try:
            return self._executor.submit(_prune_here, index)
        except (BrokenProcessPool, OSError) as error:  # a worker died before, or dies while another one starts
            broken = Future[str | None]()
            broken.set_exception(BrokenProcessPool(one_line(error)))
            return broken

    def revive(self) -> None:
        """Start the workers, also again after some have died."""
        spawned = multiprocessing.get_context("spawn")  # a fork would share this process's threads and GPU
        places = spawned.SimpleQueue()
        for device in self._devices:
            places.put(_place(self._context, str(device)))
        self._executor = ProcessPoolExecutor(self.size, spawned, _begin, (places,))

    def close(self) -> None:
        """End all workers at once; journaled layers stay."""
        for process in list((self._executor._processes or {}).values()):
            process.kill()
        self._executor.shutdown(cancel_futures=True)


_HERE: list[tuple[Any, ...]] = []
"""In a worker process, how it opens the run."""


def _begin(places: Any) -> None:
    """Begin a worker process: it takes one of the devices, and ends when the process that started it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of the terminal; the parent handles it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _HERE.append(places.get())


def _end_with_parent() -> None:
    """End this process when the process that started it is gone, so that it never writes into a later run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _prune_here(index: int) -> str | None:
    """Do :func:`prune_one` in a worker process."""
    return prune_one(index, *_HERE[0])


class RayPool:
    """Tasks of a Ray cluster, placed by GPUs and cores. Needs the extra ``ray``.

    Args:
        context: the opened run.
        execution: ``address`` of the cluster (None starts one on this machine), ``workers``, ``device``.
        most: no more tasks run at a time.

    Raises:
        MissingExtraError: Ray is not installed.
        FistaPrunerError: the cluster cannot be reached, or has no room for a worker.
    """

    kind = "Ray workers"

    def __init__(self, context: RunContext, execution: Execution, most: int) -> None:
        require_ray(execution.address)
        import ray

        self._ray, self._started = ray, not ray.is_initialized()
        if self._started:
            address = execution.address or "local"  # without one Ray would look for a cluster
            dashboard = False if execution.address is None else None
            try:
                ray.init(address=address, include_dashboard=dashboard, log_to_driver=False)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise FistaPrunerError(f"Ray cluster {address!r} cannot be reached: {one_line(error)}") from None
        threads, resources = context.numerics.threads, ray.cluster_resources()
        cuda = execution.device != "cpu" and resources.get("GPU", 0) >= 1
        room = room_for_workers(ray.nodes(), threads, cuda=cuda)
        if room < 1:
            self.close()
            raise FistaPrunerError(
                f"the Ray cluster has {resources.get('CPU', 0):g} cores, and no node has the {threads} that a worker "
                f"needs{' beside its GPU' if cuda else ''}: set threads"
            )
        self.size = min(execution.workers or room, room, most)
        variables = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": module_path()}
        options = {"num_cpus": threads, "num_gpus": int(cuda), "max_retries": ATTEMPTS - 1}
        self._task = ray.remote(prune_one).options(**options, runtime_env={"env_vars": variables})
        self._place = _place(context, "cuda" if cuda else "cpu")

    def submit(self, index: int) -> Future[str | None]:
        future: Future[str | None] = self._task.remote(index, *self._place).future()
        return future

    def revive(self) -> None:
        """Ray does."""

    def close(self) -> None:
        if self._started:
            self._ray.shutdown()


def require_ray(address: str | None) -> None:
    """Refuse ``executor ray`` where Ray is not installed or a cluster cannot be reached.

    Ray itself would wait for minutes, and a signal would not end it.

    Args:
        address: ``HOST:PORT`` of the cluster's head, ``auto`` for the one that ``RAY_ADDRESS`` names or that is on this
            machine, or None to start one.

    Raises:
        MissingExtraError: names the extra.
        FistaPrunerError: names the address and the fault.
    """
    if head := cluster_head(address):
        host, _, port = head.rpartition(":")
        if not host or "/" in host or not port.isdigit():
            name = "address" if address != "auto" else "RAY_ADDRESS"
            raise FistaPrunerError(
                f"{name} {head!r} is not HOST:PORT of a Ray cluster's head, such as 10.0.0.5:6379, or auto"
            )
        try:
            socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise FistaPrunerError(f"Ray cluster {head!r} cannot be reached: {error}") from None
    if find_spec("ray") is None:
        raise MissingExtraError("ray", "ray", "executor ray")


def cluster_head(address: str | None) -> str | None:
    """Return the address of a cluster, which ``auto`` has in ``RAY_ADDRESS``; None is this machine."""
    found = os.environ.get("RAY_ADDRESS") if address == "auto" else address
    return None if found in ("", "auto", "local") else found


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

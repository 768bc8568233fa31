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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..allocate.measure import weighs_rows
from ..errors import FistaPrunerError, MissingExtraError, one_line
from ..models.source import Permissions
from ..passes.store import HiddenStates
from ..runs.log import Listener
from ..runs.records import LayerEntry
from ..runtime.devices import available_cores, cpu_threads, peak_memory, usable_threads, worker_devices
from ..runtime.machine import now
from ..runtime.numerics import exact_products
from ..settings.base import Execution
from .context import LayerMeasures, LayerStreams, RunContext
from .drift import dense_windows
from .layer import Inspect, prune_layer

log = logging.getLogger("fistapruner")

Submit = Callable[[int], "Future[str | None]"]
"""Lets a worker do :func:`prune_one` of a layer."""

ATTEMPTS = 3
"""Attempts without a new layer before the run stops, since a layer may kill its worker every time."""

REACH_SECONDS = 10.0
"""Timeout of the connection to a cluster's head, in seconds."""


def prune_layers(
    context: RunContext, todo: Collection[int], execution: Execution, listener: Listener, inspect: Inspect | None = None
) -> None:
    """Prune the decoder layers in ``todo``; each layer is journaled when it is done.

    ``inspect``, which receives each problem before it is solved, makes the run serial.
    """
    executor, pruned = execution.executor, context.recipe.propagate == "pruned"
    if executor != "serial" and pruned:
        listener.say(f"propagate=pruned: layers wait for each other, so executor {executor} runs them one by one")
    with cpu_threads(context.numerics.threads):
        if executor == "serial" or pruned or inspect is not None or len(todo) <= 1:
            _prune_serially(context, todo, listener, inspect)
        else:
            torch.cuda.empty_cache()  # for the workers that share this process's GPU
            _prune_in_parallel(context, set(todo), execution, listener)


def default_threads(execution: Execution) -> int:
    """Choose the CPU threads of each worker: an equal share of the cores. Recorded once for a run."""
    if execution.threads:
        return execution.threads
    if execution.executor == "serial":
        return usable_threads()
    return max(1, available_cores() // len(worker_devices(execution.device, execution.workers, None)))


def local_workers(execution: Execution) -> int:
    """Count the worker processes on this machine; those of a cluster have their own machines."""
    if execution.executor == "serial" or cluster_head(execution.address):
        return 1
    return len(worker_devices(execution.device, execution.workers, execution.threads))


def _prune_journaled(
    context: RunContext, index: int, streams: LayerStreams, listener: Listener, inspect: Inspect | None = None
) -> LayerEntry:
    """Prune decoder layer ``index`` and journal it; arguments as for :func:`prune_layer`."""
    run, recipe = context.run, context.recipe
    number = f"{index:04d}"
    names = [name for group in context.layout.layers[index] for name in context.names(index, group)]
    learned = recipe.structure.method == "bypass" and context.widths.channels(index)
    measures = LayerMeasures(
        metric=run.measured("output", [number])[number] if recipe.reconstruct else None,
        importance=run.measured("rows", names) if weighs_rows(recipe) else None,
        scores=run.measured("scores", names) if learned else {},
    )

    def work() -> LayerEntry:
        context.record_calls()
        result = prune_layer(context, index, streams, measures, listener, inspect)
        entry = result.entry
        entry.warnings += context.warnings
        entry.peak_memory, entry.finished = peak_memory(), now()
        run.journal.write(context.fingerprint, result.weights, entry)
        return entry

    context.warnings.clear()  # of layers that were already pruned
    return context.fitting(f"layer {index}", work, streams)


def _prune_serially(context: RunContext, todo: Collection[int], listener: Listener, inspect: Inspect | None) -> None:
    """Prune layers in this process, in order; hidden states run through the others, as journaled."""
    last, recipe, (samples, seqlen) = max(todo), context.recipe, context.tokens.shape
    dense: HiddenStates | None = context.embed("embedded")
    pruned: HiddenStates | None = None
    beside = dense_windows(recipe, context.layout, samples, seqlen, context.numerics.batch_size)
    if beside < samples:
        dense, pruned = context.store("dense-0", samples=beside), dense
        for start, stop in context.calls.batches(beside):
            dense.write(start, pruned.read(start, stop))
    for index in range(last + 1):
        dense_on = index < last and (recipe.propagate == "dense" or recipe.dense_share > 0.0)
        pruned_on = index < last and recipe.propagate == "pruned"
        streams = LayerStreams(
            dense,
            pruned,
            context.store(f"dense-{index + 1}", samples=beside) if dense_on else None,
            context.store(f"pruned-{index + 1}") if pruned_on else None,
        )
        if index in todo:
            listener.layer(_prune_journaled(context, index, streams, listener, inspect))
        else:
            listener.tick(f"layer {index}, already pruned", 0, 1)
            context.advance(index, streams)
        for store in (dense, pruned):
            if store is not None:
                store.close()
        dense, pruned = streams.dense_out, streams.pruned_out


def _prune_in_parallel(context: RunContext, todo: set[int], execution: Execution, listener: Listener) -> None:
    """Prune layers on workers; what workers that die have not journaled is done again."""
    attempts, workers = 0, _processes if execution.executor == "process" else _ray_tasks
    while todo:
        try:
            with workers(context, execution, len(todo)) as (size, submit):
                listener.say(f"{size} worker processes of {context.numerics.threads} threads")
                _send_layers(context, todo, size, submit, listener)
            return
        except (BrokenProcessPool, BrokenPipeError) as error:  # all workers are gone
            left = {index for index in todo if context.run.journal.finished(index, context.fingerprint) is None}
            attempts = attempts + 1 if left == todo else 1
            if attempts == ATTEMPTS:
                raise FistaPrunerError(
                    f"layer {min(left)}: workers died {ATTEMPTS} times: if memory ran out, give the same prune command "
                    "again with fewer workers"
                ) from None
            log.warning("a worker died (%s): the layers %s are done again", one_line(error), sorted(left))
            todo = left
            for file in context.run.hidden.iterdir():
                file.unlink()


def _send_layers(context: RunContext, todo: set[int], size: int, submit: Submit, listener: Listener) -> None:
    """Pass the dense hidden states from layer to layer into files ``dense-INDEX``, which workers read.

    At most ``size + 2`` files exist at a time. A worker that died raises BrokenProcessPool.
    """
    running: dict[Future[str | None], int] = {}

    def collect() -> None:
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            index = running.pop(future)
            if (fault := future.result()) is not None:
                raise FistaPrunerError(fault)
            entry = context.run.journal.finished(index, context.fingerprint)
            assert entry is not None
            (context.run.hidden / f"dense-{index}").unlink(missing_ok=True)
            listener.layer(entry)

    last, states = max(todo), context.embed("dense-0", on_disk=True)
    for index in range(last + 1):
        states.sync()  # other hosts may read the file
        while len(running) >= size:
            collect()
        if index in todo:
            running[submit(index)] = index
        if index < last:
            onward = context.store(f"dense-{index + 1}", on_disk=True)
            context.advance(index, LayerStreams(states, dense_out=onward))
            states.close(keep=index in todo)
            states = onward
    states.close(keep=True)
    while running:
        collect()


def prune_one(index: int, folder: Path, device: str, permissions: Permissions, model: Path, host: str) -> str | None:
    """Prune and journal decoder layer ``index`` in a worker; return a fault of the user's input.

    The layer's dense hidden states are in ``folder``, the run directory; machine ``host`` has started the run.
    """
    try:
        context = _opened(folder, device, permissions, model)
        torch.set_num_threads(context.numerics.threads)
        states = context.store(f"dense-{index}", on_disk=True)
        try:
            with exact_products():
                _prune_journaled(context, index, LayerStreams(states), Listener())
        finally:
            states.close(keep=True)
    except FistaPrunerError as error:
        here = os.uname().nodename
        return str(error) if here == host else f"on host {here}, which must share files with {host}: {error}"
    return None


@lru_cache(maxsize=1)
def _opened(folder: Path, device: str, permissions: Permissions, model: Path) -> RunContext:
    """Open the run in a worker, once."""
    try:
        torch.empty(1, device=device)
    except RuntimeError as error:  # such as a GPU that the run's own process has for itself
        raise FistaPrunerError(f"a worker cannot use device {device}: {str(error).splitlines()[0]}") from None
    return RunContext.open(folder, torch.device(device), permissions, model)


def _place(context: RunContext, device: str) -> tuple[Path, str, Permissions, Path, str]:
    """Return the arguments of :func:`prune_one` for a worker on ``device``."""
    model = context.model.checkpoint.folder
    return context.run.folder.absolute(), device, context.permissions, model, os.uname().nodename


@contextmanager
def _processes(context: RunContext, execution: Execution, most: int) -> Iterator[tuple[int, Submit]]:
    """Start at most ``most`` processes here: one for each GPU, or for each group of CPU cores."""
    devices = worker_devices(execution.device, execution.workers, context.numerics.threads)[:most]
    spawned = multiprocessing.get_context("spawn")  # a fork would share this process's threads and GPU
    places = spawned.SimpleQueue()
    for device in devices:
        places.put(_place(context, str(device)))
    pool = ProcessPoolExecutor(len(devices), spawned, _begin, (places,))
    try:
        yield len(devices), lambda index: pool.submit(_prune_here, index)
    finally:
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(cancel_futures=True)


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


@contextmanager
def _ray_tasks(context: RunContext, execution: Execution, most: int) -> Iterator[tuple[int, Submit]]:
    """Place tasks on a Ray cluster, at most ``most`` at a time; without an address one starts here."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    started = not ray.is_initialized()
    if started:  # without an address Ray would look for a cluster
        dashboard = False if execution.address is None else None
        ray.init(address=execution.address or "local", include_dashboard=dashboard, log_to_driver=False)
    try:
        threads = context.numerics.threads
        cuda = execution.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1
        room = room_for_workers(ray.nodes(), threads, cuda=cuda)
        if room < 1:
            gpu = " beside its GPU" if cuda else ""
            raise FistaPrunerError(f"no node of the Ray cluster has the {threads} cores that a worker needs{gpu}")
        paths = filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])  # of this package first
        variables = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(paths)}
        options = {"num_cpus": threads, "num_gpus": int(cuda), "max_retries": ATTEMPTS - 1}
        task = ray.remote(prune_one).options(**options, runtime_env={"env_vars": variables})
        place = _place(context, "cuda" if cuda else "cpu")
        yield min(execution.workers or room, room, most), lambda index: task.remote(index, *place).future()
    except RayTaskError:  # of this program
        raise
    except RayError as error:
        raise FistaPrunerError(f"Ray lost a worker {ATTEMPTS} times: {one_line(error)}") from None
    finally:
        if started:
            ray.shutdown()


def require_ray(address: str | None) -> None:
    """Refuse ``executor ray`` where Ray is not installed or a cluster cannot be reached.

    Ray itself would wait for minutes, and a signal would not end it.
    """
    if head := cluster_head(address):
        host, _, port = head.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
        except (OSError, OverflowError, ValueError) as error:
            raise FistaPrunerError(f"Ray cluster {head!r}, HOST:PORT or auto, cannot be reached: {error}") from None
    if find_spec("ray") is None:
        raise MissingExtraError("ray", "ray", "executor ray")


def cluster_head(address: str | None) -> str | None:
    """Return the address of a cluster, which ``auto`` has in ``RAY_ADDRESS``; None is this machine."""
    found = os.environ.get("RAY_ADDRESS") if address == "auto" else address
    return None if found in ("", "auto", "local") else found


def room_for_workers(nodes: Iterable[Mapping[str, Any]], threads: int, *, cuda: bool) -> int:
    """Count the workers that a cluster has room for: Ray waits forever for a place that no node has.

    A worker has all its ``threads`` on one of the ``nodes`` (as of ``ray.nodes()``), and with ``cuda`` a GPU there.
    """
    resources = [node.get("Resources", {}) for node in nodes if node.get("Alive")]
    cores = [int(found.get("CPU", 0) // threads) for found in resources]
    gpus = [int(found.get("GPU", 0)) for found in resources]
    return sum(map(min, cores, gpus) if cuda else cores)

"""Choose who prunes which decoder layer: this process, worker processes or a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from ..core import LayerProblem
from ..runs.listener import Listener
from ..runtime.devices import (
    available_cores,
    cpu_threads,
    device_title,
    gpus_of_other_models,
    usable_threads,
    worker_devices,
)
from ..runtime.memory import release_device_memory
from ..settings.execution_settings import Execution
from .context import RunContext
from .layer_parallel import prune_layers_in_parallel
from .pool import Pool
from .process_pool import ProcessPool
from .ray_pool import RayPool, cluster_head
from .serial import prune_serially


def prune_layers(
    context: RunContext,
    todo: Collection[int],
    execution: Execution,
    listener: Listener,
    inspect: Callable[[int, int, LayerProblem], None] | None = None,
) -> None:
    """Prune the decoder layers in ``todo`` with an executor; each layer is journaled when it is done.

    The result does not depend on the executor: with any of them, a layer is computed by one process on
    ``context.numerics.threads`` threads. With ``propagate=pruned`` the input of a layer is the output of the pruned
    layer before it, so this process prunes them in order.

    Args:
        context: the opened run.
        todo: indices of layers that are not journaled yet.
        execution: executor, workers, device.
        listener: receives progress.
        inspect: receives (layer, group, problem) before each solve; it makes the run serial.

    Raises:
        FistaPrunerError: the executor is not available, or bad data.
    """
    if not todo:
        return
    executor = execution.executor
    if executor != "serial" and context.recipe.propagate == "pruned":
        listener.say(f"propagate=pruned: layers wait for each other, so executor {executor} runs them one by one")
    if inspect is not None or len(todo) == 1 or context.recipe.propagate == "pruned":
        executor = "serial"
    with cpu_threads(context.numerics.threads):
        if executor == "serial":
            prune_serially(context, todo, listener, inspect)
            return
        pool = _pool(context, execution, len(todo), listener)
        try:
            prune_layers_in_parallel(context, todo, pool, listener)
        finally:
            pool.close()


def _pool(context: RunContext, execution: Execution, jobs: int, listener: Listener) -> Pool:
    """Start the workers of an executor, at most one for each of ``jobs``."""
    count = context.numerics.threads
    release_device_memory()  # for the workers that share this process's GPU
    if execution.executor == "process":
        devices = worker_devices(execution.device, execution.workers, count)[:jobs]
        listener.say(
            f"{len(devices)} worker processes of {count} threads on "
            f"{', '.join(sorted({str(device) for device in devices}))}"
        )
        here = devices[0]
        if here.type == "cuda" and ":" not in execution.device and (apart := gpus_of_other_models(here)):
            listener.say(
                f"no worker on {', '.join(f'{gpu} ({title})' for gpu, title in apart.items())}: "
                f"their last bits may differ from those of {here} ({device_title(here)})"
            )
        return ProcessPool(context, devices)
    pool = RayPool(context, execution, jobs)
    listener.say(f"{pool.size} Ray workers of {count} threads")
    return pool


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


def default_threads(execution: Execution) -> int:
    """Choose the CPU threads of each worker: an equal share of the cores. Recorded once for a run."""
    if execution.threads:
        return execution.threads
    if execution.executor == "serial":
        return usable_threads()
    return max(1, available_cores() // len(worker_devices(execution.device, execution.workers, None)))

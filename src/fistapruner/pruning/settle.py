"""Settle a pruning run: check its input, plan, draw text, measure, and write ``run.json``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..allocate.fisher import DensePasses
from ..allocate.measure import (
    Decision,
    check_allocation,
    decide,
    measured_by,
    needs_measuring,
    permutes,
    windows_measured,
)
from ..core import Constraint, parse_sparsity
from ..errors import FistaPrunerError
from ..measure.data import load_windows
from ..measure.run import shared_text
from ..models.experts import GROUPED_BYTES
from ..models.layers import LayerwiseModel
from ..models.operators import Layout, discover
from ..models.record import read_pruning_record, recorded_claims, refuse_low_rank
from ..models.source import ModelSource, Permissions
from ..papers.bypass import SEQUENCES, Bypass
from ..passes.store import Store, scratch_factory
from ..passes.stream import check_model
from ..planning import make_plan
from ..runs.directory import PruneDirectory
from ..runs.lineage import Dense, dense_behind, lineage_of
from ..runs.log import Listener
from ..runs.records import CalibrationFacts, Lineage, ModelFacts
from ..runs.settled import (
    EvaluationRequest,
    Numerics,
    PruneDecision,
    PruneRecord,
    absolute,
    fingerprint,
    refuse_overlap,
    stamps,
    text_sha256,
)
from ..runtime.devices import cpu_threads
from ..runtime.files import scratch_folder, sha256_file
from ..runtime.machine import describe_machine, now, versions
from ..runtime.numerics import dtype_name
from ..runtime.show import count, span
from ..settings.base import Execution
from ..settings.parse import matches
from ..settings.prune import Recipe
from ..settings.train import TrainingRecipe
from ..structure.smaller import Widths, removed_weights, resized, unread_tensors
from ..structure.trial import plan_widths
from ..structure.units import EXPERT, layer_weights
from ..text import calibration_length, calibration_tokens
from ..text.generate import load_writer
from ..text.sources import check_source
from .context import LayerContext, open_model
from .workers import default_threads

if TYPE_CHECKING:
    from ..training.recovery import Recovery
    from ..training.recovery import Request as TrainingRequest


@dataclass(frozen=True)
class Request:
    """What a command asks of a pruning run.

    Args:
        model: as the user named it; ``source``: its folder.
        command: shell line that reproduces the run.
        drawn: calibration windows that were drawn before with the same settings, and how.
    """

    model: str
    recipe: Recipe
    source: ModelSource
    command: str | None = None
    evaluation: EvaluationRequest | None = None
    drawn: tuple[Tensor, dict[str, Any]] | None = None


@dataclass(frozen=True)
class Inputs:
    """The opened model and what a run does to its operators.

    Args:
        source: the dense model's folder; ``layout``: operators to prune, in the shapes that they have.
        context: the model, and what is done to these.
        warnings: what a smaller model loses; ``notes``: what is removed, and these.
    """

    source: ModelSource
    layout: Layout
    context: LayerContext
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def model(self) -> LayerwiseModel:
        """The dense model."""
        return self.context.model


# --- the input, checked before any long work


def check_sources(recipe: Recipe) -> None:
    """Refuse calibration text that is not there or needs a missing extra; check the allocation."""
    check_allocation(recipe)
    for source in recipe.calibration.sources.values():
        check_source(source)


def open_operators(source: ModelSource, recipe: Recipe, dtype: str | None = None) -> Inputs:
    """Open a model, and decide patterns and widths of its operators.

    ``dtype``: precision of passes that the run has decided on before.
    """
    refuse_low_rank(source.folder, "prune")
    model = open_model(source, recipe, dtype=dtype)
    layout = discover(model).select(recipe)
    smaller, widths = change_widths(model, layout, recipe, source.permissions)
    sparsity = choose_patterns(recipe, smaller)
    scratch = scratch_factory(None, model.dtype)
    context = LayerContext(model, smaller, recipe, sparsity, widths, scratch=scratch)
    if not widths.units:
        return Inputs(source, layout, context)
    warnings = tuple(_losses(model, recipe, widths))
    return Inputs(source, layout, context, warnings, (_removed(model, widths), *warnings))


def choose_patterns(recipe: Recipe, layout: Layout) -> dict[str, Constraint]:
    """Decide the pattern of every operator, as the recipe says it."""
    operators = layout.operators()
    chosen: dict[str, Constraint] = {name: recipe.sparsity for name, _ in operators}
    for pattern, sparsity in recipe.allocation.items() if isinstance(recipe.allocation, Mapping) else ():
        names = [name for name in chosen if matches(name, pattern)]
        if not names:
            raise FistaPrunerError(
                f"allocation: {pattern!r} matches none of the {len(operators)} operators that targets and ignore "
                f"choose; the first one is called {operators[0][0]!r}"
            )
        chosen.update((name, parse_sparsity(sparsity)) for name in names)
    for name, operator in operators:
        chosen[name].check(operator.columns, name)
        if not recipe.low_rank or not chosen[name].zeros(operator.rows, operator.columns):
            continue
        rows, columns, rank, fault = operator.rows, operator.columns, recipe.low_rank, None
        if operator.experts:
            fault = f"PEFT has no LoRA for {name}: leave such operators dense with ignore [re:experts]"
        elif rank > (most := min(rows, columns)):
            fault = f"{name} is {rows} x {columns}: its low-rank part has a rank from 0 to {most}, not {rank}"
        if fault is not None:
            raise FistaPrunerError(f"low_rank {rank}: {fault}")
    return chosen


def change_widths(
    model: LayerwiseModel, layout: Layout, recipe: Recipe, permissions: Permissions
) -> tuple[Layout, Widths]:
    """Decide the widths of the result: the operators in new shapes, and whose channels are removed."""
    structure, fault = recipe.structure, None
    if structure.remove is None:
        return layout, Widths()
    widths = plan_widths(model, layout, structure, trust_remote_code=permissions.trust_remote_code)
    units = [(index, unit) for index in range(len(model)) for unit in widths.channels(index)]
    if structure.method in ("goa", "bypass") and any(unit.kind == EXPERT for _, unit in units):
        fault = "does not rate channels of experts"
    elif structure.method == "goa":  # it fits whole operators before it removes channels
        zeros = [str(pattern) for pattern in recipe.patterns if pattern.fraction]
        fitted = {layout.full_name(index, name) for index, unit in units for name in unit.producers}
        if left_out := sorted(fitted.difference(name for name, _ in layout.operators())):
            fault = f"also fits {left_out[0]}, which targets and ignore leave out"
        elif zeros:
            fault = f"has no zeros ({zeros[0]}) beside it: take --sparsity 0%, and prune its result in a second run"
    if fault is not None:
        raise FistaPrunerError(f"structure: {structure.method} {fault}; or take structure.method obs")
    if measured_by(recipe) == "error":  # errors are measured before channels are removed
        choose_patterns(recipe, layout)
    return resized(layout, widths), widths


def _removed(model: LayerwiseModel, widths: Widths) -> str:
    """Say in one sentence what is removed from a model."""
    before, gone = layer_weights(model), removed_weights(model, widths)
    removed = dict.fromkeys((unit.reader is None, unit.kind, unit.before, unit.after) for unit in chain(*widths.units))
    found = sorted(removed, key=lambda each: each[0])  # experts last
    stay = " and ".join(f"{after} of {count(whole)} {kind}" for _, kind, whole, after in found)
    return (
        f"structure: {stay} stay in every {'mixture' if found[0][0] else 'decoder layer that has them'}, "
        f"{before - gone} of the layers' {before} parameters ({gone / before:.1%} fewer; "
        f"{gone / model.parameter_count():.1%} of the whole model's)"
    )


def _losses(model: LayerwiseModel, recipe: Recipe, widths: Widths) -> Iterator[str]:
    """Warn of what a smaller model loses: zeros, unread layers, grouped products of experts."""
    checkpoint = model.checkpoint
    claims, _ = recorded_claims(read_pruning_record(checkpoint.folder), checkpoint)
    zeros = any(claim.get("sparsity", "0%") != "0%" for claim in claims.values())
    if zeros and not any(pattern.fraction for pattern in recipe.patterns):
        yield (
            f"{checkpoint.folder} has zeros already, and structure does not keep them where it fits weights anew or "
            "removes inputs: give a --sparsity too, and all operators get new ones"
        )
    if unread := unread_tensors(model, widths):
        yield (
            f"the result leaves out {count(len(unread))} tensors that {type(model.model).__name__} does not read, "
            f"since the new config would not fit them: {', '.join(unread[:3])}"
        )
    multiple = GROUPED_BYTES // checkpoint.dtype.itemsize
    experts = {unit.after for unit in chain(*widths.units) if unit.kind == EXPERT}
    if refused := sorted(width for width in experts if width % multiple):
        yield (
            f"experts with {span(refused)} channels, which are no multiple of {multiple}, do not run in transformers "
            "as it loads them: keep such a multiple, or load the result with experts_implementation='eager'"
        )


def _check_inputs(run: PruneDirectory, request: Request, listener: Listener, dtype: str | None) -> Inputs:
    """Check everything that can be checked before any long work."""
    recipe, source = request.recipe, request.source
    refuse_overlap(source.folder, run.folder)
    listener.say(f"model {request.model}: {source.folder}")
    listener.tick("opening and checking the model", 0, 1)
    inputs = open_operators(source, recipe, dtype)
    model = inputs.model
    if recipe.dtype == "auto" and model.dtype != model.checkpoint.dtype:
        stored, used = dtype_name(model.checkpoint.dtype), dtype_name(model.dtype)
        listener.say(f"passes in {used}: this device has no matrix units for the checkpoint's {stored}")
    check_model(model)
    for sentence in inputs.notes:
        listener.say(sentence)
    if not inputs.context.widths.units and not any(pattern.fraction for pattern in recipe.patterns):
        listener.say("sparsity 0% and no structure: no weight becomes zero")
    shape = recipe.calibration.samples, calibration_length(recipe.calibration, model)
    if request.drawn is not None and request.drawn[0].shape != shape:
        raise FistaPrunerError(
            f"tokens has the shape {tuple(request.drawn[0].shape)}, and the recipe's (samples, seqlen) are {shape}"
        )
    if request.evaluation is not None:  # a fault in the text shows now
        text = load_windows(request.evaluation.data, source.tokenizer(), shape[1], request.evaluation.windows)
        model.check_tokens(text.tokens)
        if shared := shared_text(recipe.calibration.sources.values(), request.evaluation.data):
            listener.say(shared)
            return replace(inputs, warnings=(*inputs.warnings, shared))
    return inputs


# --- the decisions


def settle(
    run: PruneDirectory, request: Request, before: PruneRecord | None, listener: Listener
) -> tuple[PruneRecord, LayerwiseModel]:
    """Check the input, decide what all processes of the run will use, and record it.

    Args:
        before: what the run had settled, where its calibration tokens or measurements are damaged: its plan is kept.

    Returns:
        The record, and the opened model.
    """
    recipe, settled = request.recipe, before.decision if before else None
    inputs = _check_inputs(run, request, listener, settled.numerics.dtype if settled else None)
    model, folder = inputs.model, inputs.source.folder.absolute()
    lineage = lineage_of(folder)
    text, seqlen = text_sha256(recipe), calibration_length(recipe.calibration, model)
    drawing = _drawing(recipe, model, seqlen, text)
    drawn = request.drawn or run.drawn(drawing)  # writing text takes long: a stopped attempt has left it
    if settled is not None:
        numerics, on_disk, on_device = settled.numerics, settled.on_disk, settled.on_device
    else:
        listener.tick("planning", 0, 1)
        plan = make_plan(inputs.context, run.folder, drawn=drawn is not None)
        for sentence in plan.says:
            listener.say(sentence)
        numerics = numerics_of(model, recipe.execution, plan.choice.batch_size)
        on_disk, on_device = plan.choice.on_disk, plan.choice.on_device
    with cpu_threads(numerics.threads):
        begin = time.perf_counter()
        listener.say(
            f"calibration: {recipe.calibration.samples} windows of {seqlen} tokens from {recipe.calibration.name}"
        )
        tokens, how = drawn or _draw_windows(recipe, inputs, seqlen, listener)
        model.check_tokens(tokens)
        run.write_tokens(tokens, drawing, how)
        seconds = {"calibration": time.perf_counter() - begin}
        identity, begin = fingerprint(recipe, model.checkpoint, tokens, numerics), time.perf_counter()
        states = run.hidden / "sensitivity" if on_disk else None
        with scratch_folder(states):
            store = scratch_factory(states, model.dtype)
            measured = _measure(run, inputs, tokens, numerics.batch_size, store, identity, listener)
        if measured is not None:
            seconds["sensitivity"] = time.perf_counter() - begin
    sizes = {"samples": tokens.shape[0], "seqlen": seqlen, "tokens": tokens.numel()}
    stamped = tuple(stamps(model.checkpoint))
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
            sparsity=dict((measured.sparsity if measured else None) or inputs.context.sparsity),
            on_disk=on_disk,
            on_device=on_device,
            calibration_sha256=text,
            metrics_sha256=sha256_file(run.metrics_file) if run.metrics_file.is_file() else None,
            seconds=seconds,
            structure=inputs.context.widths.record() if inputs.context.widths.units else None,
        ),
    )
    run.write_record(record, recipe.to_yaml())
    return record, model


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
    run: PruneDirectory, inputs: Inputs, tokens: Tensor, batch: int, store: Store, identity: str, listener: Listener
) -> Decision | None:
    """Measure on the dense model what the recipe needs, and store it; None where it needs nothing."""
    run.metrics_file.unlink(missing_ok=True)
    model, recipe, widths = inputs.model, inputs.context.recipe, inputs.context.widths
    scores, found = dict[str, Tensor](), Decision()
    try:
        if recipe.structure.method == "bypass":
            steps, seed = recipe.structure.steps, recipe.seed
            learning = Bypass(model, widths.units, tokens, steps, seed, store, listener, SEQUENCES)
            learned = learning.learn(run.bypass_file, windows_measured(len(tokens)), {"identity": identity})
            scores = {inputs.layout.full_name(index, name): each for (index, name), each in learned.items()}
        if needs_measuring(recipe):
            listener.say("measuring sensitivity on the dense model")
            passes = DensePasses(store, min(4, batch), listener.tick)
            sparsity, smaller = inputs.context.sparsity, inputs.context.layout
            found = decide(recipe, inputs.layout, model, tokens, sparsity, passes, smaller)
        elif not scores:
            return None
    except torch.OutOfMemoryError:
        raise FistaPrunerError(
            f"the memory of {model.device} is not enough to measure the dense model: free some of it, lower "
            "batch_size, shorten --seqlen, or take allocation uniform, weighting none and structure.method obs, which "
            "need no such passes"
        ) from None
    if found.metrics or found.importance or found.orders or scores:
        run.write_metrics(found.metrics or [], found.importance or {}, found.orders, scores)
    if permutes(recipe) and found.permuted:
        before, after = (sum(shares[i] for shares in found.permuted.values()) / len(found.permuted) for i in (0, 1))
        listener.say(
            f"channels of {len(found.permuted)} operators reordered or rotated: of their weights' importance the "
            f"pattern now loses {1 - after:.1%} instead of {1 - before:.1%}"
        )
    return found


def common_fields(
    request: Request | TrainingRequest,
    inputs: Inputs | Recovery,
    recipe: Recipe | TrainingRecipe,
    threads: int,
    lineage: Lineage | None,
) -> dict[str, Any]:
    """Collect the fields of a record that runs of all verbs fill in alike."""
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

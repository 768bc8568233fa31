"""Check the input of a pruning run before any long work: model, operators, patterns, widths, texts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..allocate.measure import check_allocation, measured_by
from ..core import Constraint, parse_sparsity
from ..errors import FistaPrunerError, explain
from ..measure.data import load_windows
from ..measure.run import shared_text
from ..models.experts import GROUPED_BYTES
from ..models.layers import LayerwiseModel
from ..models.operators import Layout, discover
from ..models.record import read_pruning_record, recorded_claims, refuse_low_rank
from ..models.source import UNTRUSTED, ModelSource, Permissions
from ..papers.goa import attention_probabilities
from ..passes.stream import check_model
from ..runs.directory import PruneDirectory
from ..runs.log import Listener
from ..runs.records import CalibrationFacts
from ..runs.settled import EvaluationRequest, refuse_overlap
from ..runtime.numerics import dtype_name
from ..runtime.show import count, span
from ..settings.parse import matches
from ..settings.prune import Recipe
from ..solvers.low_rank import check_rank
from ..structure.smaller import Widths, removed_weights, resized, unread_tensors
from ..structure.trial import plan_widths
from ..structure.units import EXPERT, GROUPS, layer_weights
from ..text import calibration_length
from ..text.sources import check_source
from .opened import open_model
from .workers import require_ray

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Model types of whose ``out_proj`` PEFT refuses a LoRA (its ``_check_lora_target_modules_mamba``)."""


@dataclass(frozen=True)
class Request:
    """What a command asks of a pruning run.

    Args:
        model: as the user named it.
        recipe: all settings.
        permissions: what the model's files may do.
        command: shell line that reproduces the run; None where there is none.
        evaluation: the text to evaluate on after the run.
        drawn: calibration windows that were drawn before with the same settings, and how.
        found: the model where it was found before; None finds it.
    """

    model: str
    recipe: Recipe
    permissions: Permissions = UNTRUSTED
    command: str | None = None
    evaluation: EvaluationRequest | None = None
    drawn: tuple[Tensor, dict[str, Any]] | None = None
    found: ModelSource | None = None

    @property
    def source(self) -> ModelSource:
        """The model's folder."""
        return self.found or self.permissions.find(self.model)


@dataclass(frozen=True)
class Inputs:
    """The opened model and what a run does to its operators.

    Args:
        source: the dense model's folder; ``model``: the model.
        layout: operators to prune; ``smaller``: the same in the shapes that they are to have.
        widths: whose channels are removed; None where none are.
        sparsity: the recipe's pattern of every operator, by full name.
        warnings: what a smaller model loses; ``notes``: what is removed, and these.
    """

    source: ModelSource
    model: LayerwiseModel
    layout: Layout
    smaller: Layout
    widths: Widths | None
    sparsity: Mapping[str, Constraint]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def check_tokens(tokens: Any) -> None:
    """Refuse what are no calibration windows.

    Raises:
        FistaPrunerError: says what they are.
    """
    if tokens is None:
        return
    try:
        ids, how = tokens
        CalibrationFacts.model_validate(dict(how))
        json.dumps(dict(how))
        if ids.ndim != 2 or ids.dtype not in INTEGERS:
            raise ValueError(f"a tensor {tuple(ids.shape)} of {ids.dtype}")
    except (ValueError, TypeError, AttributeError) as error:
        raise FistaPrunerError(
            f"tokens: {explain(error)}: two things are expected, a tensor (samples, seqlen) of whole numbers, and a "
            "mapping with the source that they were drawn from"
        ) from None


def check_sources(recipe: Recipe) -> None:
    """Refuse calibration text that is not there or needs a missing extra; check the allocation.

    Raises:
        FistaPrunerError: names the source.
        MissingExtraError: names the package and the extra.
    """
    check_allocation(recipe)
    for source in recipe.calibration.sources.values():
        check_source(source)


def open_operators(source: ModelSource, recipe: Recipe, dtype: str | None = None) -> Inputs:
    """Open a model, and decide patterns and widths of its operators.

    Args:
        source: the model's folder.
        recipe: all settings, resolved.
        dtype: precision of passes that the run has decided on before.

    Raises:
        FistaPrunerError: a low-rank part, which pruning would leave out, or operators that cannot be pruned so.
    """
    refuse_low_rank(source.folder, "prune")
    model = open_model(source, recipe, dtype=dtype)
    layout = discover(model).select(recipe)
    smaller, widths = change_widths(model, layout, recipe, source.permissions)
    sparsity = choose_patterns(recipe, smaller, model.config.model_type)
    warnings = () if widths is None else say_losses(model, recipe, widths)
    notes = () if widths is None else (say_widths(model, widths), *warnings)
    return Inputs(source, model, layout, smaller, widths, sparsity, warnings, notes)


def check_inputs(run: PruneDirectory, request: Request, listener: Listener, dtype: str | None = None) -> Inputs:
    """Check everything that can be checked before any long work.

    Args:
        run: the run directory.
        request: what to do.
        listener: receives progress.
        dtype: as for :func:`open_operators`.

    Raises:
        FistaPrunerError: bad input, named.
    """
    recipe, source = request.recipe, request.source
    if recipe.execution.executor == "ray":
        require_ray(recipe.execution.address)
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
    if inputs.widths is None and not any(pattern.fraction for pattern in recipe.patterns):
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


def choose_patterns(recipe: Recipe, layout: Layout, model_type: str = "") -> dict[str, Constraint]:
    """Decide the pattern of every operator, as the recipe says it.

    Args:
        recipe: settings.
        layout: the operators.
        model_type: as the model's config has it, by which PEFT refuses some low-rank parts.

    Raises:
        FistaPrunerError: a pattern that matches nothing, or does not divide an operator's inputs; or an operator that
            cannot have the low-rank part.
    """
    operators = layout.operators()
    chosen: dict[str, Constraint] = dict.fromkeys((name for name, _ in operators), recipe.pattern)
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
    if recipe.low_rank:
        _check_low_rank(recipe.low_rank, layout, chosen, model_type)
    return chosen


def _check_low_rank(rank: int, layout: Layout, sparsity: Mapping[str, Constraint], model_type: str) -> None:
    """Refuse operators that cannot have a low-rank part.

    Raises:
        FistaPrunerError: names the first of them.
    """
    for name, operator in layout.operators():
        if not sparsity[name].zeros(operator.rows, operator.columns):
            continue
        refused = "experts" if operator.experts else ""
        if model_type in MAMBA and name.endswith(".out_proj"):
            refused = "out_proj"
        if refused:
            raise FistaPrunerError(
                f"low_rank {rank}: PEFT has no LoRA for {name}: leave such operators dense with ignore [re:{refused}], "
                "or prune without low_rank"
            )
        check_rank(rank, operator.rows, operator.columns, name)
    if not any(sparsity[name].fraction for name, _ in layout.operators()):
        raise FistaPrunerError(
            f"low_rank {rank} with sparsity 0%: operators without zeros have no low-rank part; give a --sparsity"
        )


def change_widths(
    model: LayerwiseModel, layout: Layout, recipe: Recipe, permissions: Permissions
) -> tuple[Layout, Widths | None]:
    """Decide the widths of the result, where the recipe removes channels.

    Returns:
        The operators in their new shapes, and whose channels are removed; the layout itself and None where none are.

    Raises:
        FistaPrunerError: channels that cannot be removed, an amount that removes none or all of them, widths that the
            pattern does not divide, or a method that cannot choose them.
    """
    structure = recipe.structure
    if structure.remove is None:
        return layout, None
    zeros = next((pattern for pattern in recipe.patterns if pattern.fraction), None)
    if structure.method == "goa" and zeros is not None:
        raise FistaPrunerError(
            f"structure: goa fits whole operators before it removes channels, and has no zeros ({zeros}) beside it: "
            "take --sparsity 0%, and prune its result in a second run"
        )
    widths = plan_widths(model, layout, structure, trust_remote_code=permissions.trust_remote_code)
    units = [(index, unit) for index in range(len(model)) for unit in widths.channels(index)]
    if structure.method in ("goa", "bypass") and any(unit.kind == EXPERT for _, unit in units):
        raise FistaPrunerError(
            f"structure: {structure.method} does not rate channels of experts: take structure.method obs, energy, "
            "flap or magnitude"
        )
    if structure.method == "goa":
        selected = {name for name, _ in layout.operators()}
        for index, unit in units:
            for name in (layout.full_name(index, name) for name in unit.producers):
                if name not in selected:
                    raise FistaPrunerError(
                        f"structure: targets and ignore leave out {name}, whose outputs are to be removed, and goa "
                        "fits and rates it too: leave it in targets, or take structure.method obs"
                    )
            if unit.kind == GROUPS and index == 0:  # an attention without probabilities is refused now
                with model.layer(0):
                    next(attention_probabilities(model, 0, unit, [model.probe()[0]]))
    if measured_by(recipe) == "error":  # errors are measured before channels are removed
        choose_patterns(recipe, layout)
    return resized(layout, widths), widths


def say_widths(model: LayerwiseModel, widths: Widths) -> str:
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


def say_losses(model: LayerwiseModel, recipe: Recipe, widths: Widths) -> tuple[str, ...]:
    """Warn of what a smaller model loses: zeros, unread layers, grouped products of experts."""
    unread = unread_tensors(model, widths)
    left_out = (
        f"the result leaves out {count(len(unread))} tensors that {type(model.model).__name__} does not read, "
        f"since the new config would not fit them: {', '.join(unread[:3])}",
    )
    return (*_lost_zeros(model, recipe), *(left_out if unread else ()), *_unaligned(model, widths))


def _lost_zeros(model: LayerwiseModel, recipe: Recipe) -> tuple[str, ...]:
    """Warn that removing channels of a pruned model does not keep its zeros; empty where it gets new ones."""
    folder = model.checkpoint.folder
    claims, _ = recorded_claims(read_pruning_record(folder), model.checkpoint)
    zeros = any(claim.get("sparsity", "0%") != "0%" for claim in claims.values())
    if not zeros or any(pattern.fraction for pattern in recipe.patterns):
        return ()
    return (
        f"{folder} has zeros already, and structure does not keep them where it fits weights anew or removes inputs: "
        "give a --sparsity too, and all operators get new ones",
    )


def _unaligned(model: LayerwiseModel, widths: Widths) -> tuple[str, ...]:
    """Warn of widths of experts that grouped products, the default of transformers, refuse; empty without."""
    size = model.checkpoint.dtype.itemsize
    found = {unit.after for units in widths.units for unit in units if unit.kind == EXPERT}
    if not (refused := sorted(width for width in found if width * size % GROUPED_BYTES)):
        return ()
    return (
        f"experts with {span(refused)} channels, which are no multiple of {GROUPED_BYTES // size}, do not run in "
        "transformers as it loads them: keep such a multiple, or load the result with experts_implementation='eager'",
    )

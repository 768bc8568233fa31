"""Decide the widths of a result whose structure is removed, and say what that means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain

import torch

from ..allocate.measure import measured_by
from ..core import Constraint, parse_sparsity
from ..core.constraints import counted_sparsity
from ..errors import FistaPrunerError
from ..models.experts import GROUPED_BYTES
from ..models.files.record import MIN_ZEROS, read_pruning_record, recorded_claims
from ..models.layerwise import LayerwiseModel
from ..models.layout import Layout
from ..models.source import Permissions
from ..papers.goa import attention_probabilities
from ..runtime.formatting import count, span
from ..settings.settings import Recipe
from ..structure.smaller import Widths, removed_weights, resized, unread_tensors
from ..structure.trial import plan_widths
from ..structure.units import EXPERT, GROUPS, layer_weights
from .patterns import patterns_of

NOT_IN_EXPERTS = "does not rate channels of experts: take --structure-method obs, energy, flap or magnitude"


def change_widths(
    model: LayerwiseModel, layout: Layout, recipe: Recipe, permissions: Permissions
) -> tuple[Layout, Widths | None]:
    """Decide the widths of the result, where the recipe removes channels.

    Returns:
        The operators in their new shapes, and whose channels are removed; the layout itself and None where none are.

    Raises:
        FistaPrunerError: channels that cannot be removed, an amount that removes none or all of them, widths that the
            pattern does not divide, or goa without the operators that write the channels.
    """
    if recipe.structure.remove is None:
        return layout, None
    zeros = next((pattern for pattern in recipe.patterns if pattern.fraction), None)
    if recipe.structure.method == "goa" and zeros is not None:
        whose = "sparsity" if zeros is recipe.pattern else "allocation"
        without = "take --sparsity 0%" if zeros is recipe.pattern else "leave the allocation out"
        raise FistaPrunerError(
            f"structure: goa fits whole operators before it removes channels, and has no zeros beside it ({whose} "
            f"{zeros}): {without}, and prune its result in a second run"
        )
    widths = plan_widths(model, layout, recipe.structure, trust_remote_code=permissions.trust_remote_code)
    if recipe.structure.method == "goa":
        _check_goa(model, layout, widths)
    if recipe.structure.method == "bypass" and any(unit.kind == EXPERT for units in widths.units for unit in units):
        raise FistaPrunerError(f"structure: bypass {NOT_IN_EXPERTS}")
    patterns = patterns_of(recipe, layout) if measured_by(recipe) == "error" else {}
    for name, operator in layout.operators() if patterns else ():
        if operator.columns % patterns[name].group_length:
            raise FistaPrunerError(
                f"allocation {recipe.allocation!r} measures errors before structure is removed, and pattern "
                f"{patterns[name]} does not fit {name}: its {operator.columns} inputs are not a multiple of "
                f"{patterns[name].group_length}; take --allocation uniform"
            )
    return resized(layout, widths), widths


def _check_goa(model: LayerwiseModel, layout: Layout, widths: Widths) -> None:
    """Refuse what goa cannot rate: experts, operators left out, heads without probabilities."""
    selected = {name for name, _ in layout.operators()}
    for index, unit in ((i, unit) for i in range(len(model)) for unit in widths.channels(i)):
        left_out = [whole for name in unit.producers if (whole := layout.full_name(index, name)) not in selected]
        if unit.kind == EXPERT:
            raise FistaPrunerError(f"structure: goa {NOT_IN_EXPERTS}")
        if left_out:
            raise FistaPrunerError(
                f"structure: targets and ignore leave out {left_out[0]}, whose outputs are to be removed, and goa fits "
                "and rates it too: leave it in --targets, or take --structure-method obs"
            )
        if unit.kind == GROUPS and index == 0:
            with model.layer(0):
                next(attention_probabilities(model, 0, unit, [model.probe()[0]]))


def say_widths(model: LayerwiseModel, widths: Widths) -> str:
    """Say in one sentence what is removed from a model."""
    before = layer_weights(model)
    gone = removed_weights(model, widths)
    removed = dict.fromkeys((unit.reader is None, unit.kind, unit.before, unit.after) for unit in chain(*widths.units))
    found = sorted(removed, key=lambda each: each[0])  # experts last
    *others, last = (f"{after} of {count(whole)} {kind}" for _, kind, whole, after in found)
    stay, where = f"{', '.join(others)} and {last}" if others else last, "mixture" if found[0][0] else "decoder layer"
    channels = [frozenset(unit.kind for unit in widths.channels(index)) for index in range(len(model))]
    where += "" if len(set(channels)) < 2 else " that has them"
    return (
        f"structure: {stay} stay in every {where}, {before - gone} of the layers' {before} parameters "
        f"({gone / before:.1%} fewer; {gone / model.parameter_count():.1%} of the whole model's)"
    )


def say_warnings(
    model: LayerwiseModel, layout: Layout, recipe: Recipe, sparsity: Mapping[str, Constraint], widths: Widths
) -> tuple[str, ...]:
    """Warn of what a smaller model loses, and of widths that do not run everywhere; empty without.

    Args:
        model: the model, which may be pruned already.
        layout: its operators.
        recipe: all settings, resolved.
        sparsity: the new pattern of every operator, by full name.
        widths: whose channels are removed.
    """
    lost = _lost_zeros(model, layout, recipe, sparsity, widths)
    return (*lost, *_unread(model, widths), *_unaligned(model, widths))


def _lost_zeros(
    model: LayerwiseModel, layout: Layout, recipe: Recipe, sparsity: Mapping[str, Constraint], widths: Widths
) -> tuple[str, ...]:
    """Warn that removing channels does not keep the zeros of a model; empty where it gets new ones.

    Without a record of zeros, the first operator that is concerned is read.
    """
    settings = recipe.structure
    goa = settings.method == "goa"
    places = [(index, unit) for index in range(len(model)) for unit in widths.channels(index)]
    # By name, the inputs or outputs that stay or go together.
    changed = {layout.full_name(index, unit.name): ("inputs", unit.columns) for index, unit in places}
    changed |= {
        layout.full_name(index, name): ("outputs", cut.block)
        for index, unit in places
        for name, cut in unit.producers.items()
    }
    changed = {name: block for name, block in changed.items() if name not in sparsity or not sparsity[name].fraction}
    for name, pattern in _earlier_patterns(model, list(changed)).items():
        side, block = changed[name]
        fitted = goa or (side == "inputs" and settings.compensation == "refit")
        length = pattern.group_length if side == "inputs" else 1
        holds = pattern.supports_allocation or (block % length == 0 and (length > 1 or side == "outputs"))
        if pattern.fraction and (fitted or not holds):
            why = "their weights are fitted anew" if fitted else f"it is one of the {side} that they had"
            instead = (
                "prune the result in a second run" if goa else "give a --sparsity too, and all operators get new ones"
            )
            return (
                f"{model.checkpoint.folder} has zeros already, and structure {settings.remove} does not keep "
                f"{'them' if fitted else 'their pattern'} in operators such as {name} ({pattern}), since {why}; "
                f"{instead}",
            )
    return ()


def _unread(model: LayerwiseModel, widths: Widths) -> tuple[str, ...]:
    """Warn that the result leaves out tensors of layers that the model does not read; empty without."""
    names = unread_tensors(model, widths)
    if not names:
        return ()
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"the result leaves out tensors of layers that {type(model.model).__name__} does not read, such as those of "
        f"multi-token prediction, since the new config would not fit them: {shown}",
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


def _earlier_patterns(model: LayerwiseModel, names: Sequence[str]) -> dict[str, Constraint]:
    """Return the patterns that a pruned model's operators have, as its record says it, or one of them has."""
    folder, found = model.checkpoint.folder, {}
    try:
        claims, _ = recorded_claims(read_pruning_record(folder), model.checkpoint, folder)
    except FistaPrunerError:  # the report says so: the lineage is in the same file
        claims = {}
    for name in names if claims else ():
        claim = claims.get(model.source(f"{name}.weight"), {})
        with suppress(FistaPrunerError):
            found[name] = parse_sparsity(str(claim.get("sparsity", "0%")))
    for name in () if claims else names[:1]:
        weight = model.checkpoint.read(model.source(f"{name}.weight"))
        zeros = weight.numel() - int(torch.count_nonzero(weight))
        if MIN_ZEROS * weight.numel() <= zeros < weight.numel():
            found[name] = parse_sparsity(counted_sparsity(zeros, weight.numel()))
    return found

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
from ..recipes.settings import Recipe
from ..runtime.formatting import count, span
from ..structured.experts import EXPERTS
from ..structured.proof import plan_widths
from ..structured.smaller_model import Widths, removed_weights, resized, unread_tensors
from ..structured.units import EXPERT, layer_weights
from ..structured.widths import step_of
from .patterns import patterns_of


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
    selected = {name for name, _ in layout.operators()}
    for index, units in enumerate(widths.units) if recipe.structure.method == "goa" else ():
        for name in chain.from_iterable(unit.producers for unit in units):
            if (whole := layout.full_name(index, name)) not in selected:
                raise FistaPrunerError(
                    f"structure: targets and ignore leave out {whole}, whose outputs are to be removed, and goa fits "
                    "and rates it too: leave it in --targets, or take --structure-method obs"
                )
    patterns, free = patterns_of(recipe, layout), recipe.structure.widths == "free"
    for index, units in enumerate(widths.units):
        for unit in units:
            pattern = patterns[layout.full_name(index, unit.consumer)]
            inputs, length = step_of(unit, recipe.structure) * unit.columns, pattern.group_length
            if free and inputs % length:  # else a width that is measured, after long work, may not fit the pattern
                raise FistaPrunerError(
                    f"structure: free widths change the inputs of {unit.consumer.name} in steps of {inputs}, and "
                    f"pattern {pattern} needs steps of a multiple of {length}: change --structure-multiple or the "
                    "amount"
                )
            if measured_by(recipe) == "error" and unit.consumer.columns % length:
                raise FistaPrunerError(
                    f"allocation {recipe.allocation!r} measures errors before structure is removed, and pattern "
                    f"{pattern} does not fit {layout.full_name(index, unit.consumer)}: its {unit.consumer.columns} "
                    f"inputs are not a multiple of {length}; take --allocation uniform"
                )
    return resized(layout, widths), widths


def say_widths(model: LayerwiseModel, widths: Widths) -> str:
    """Say in one sentence what is removed from a model."""
    before = layer_weights(model)
    gone = removed_weights(model, widths)
    free = "quantization_config" in widths.config  # a layer may lose nothing
    found = []
    for kind, whole in dict.fromkeys((unit.kind, unit.before) for layer in widths.units for unit in layer):
        kept = [[unit.after for unit in layer if unit.kind == kind] or [whole] * free for layer in widths.units]
        found.append(f"{span(chain.from_iterable(kept))} of {count(whole)} {kind}")
    mixtures = dict.fromkeys(f"{unit.after} of {unit.before} {EXPERTS}" for units in widths.experts for unit in units)
    *others, last = *found, *mixtures
    stay, where = f"{', '.join(others)} and {last}" if others else last, "decoder layer" if found else "mixture"
    alike = len({frozenset(unit.kind for unit in layer) for layer in widths.units}) < 2
    where += "" if free or alike else " that has them"
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
    places = [(index, unit) for index, units in enumerate(widths.units) for unit in units]
    # By name, the inputs or outputs that stay or go together.
    changed = {layout.full_name(index, unit.consumer): ("inputs", unit.columns) for index, unit in places}
    changed |= {
        layout.full_name(index, name): ("outputs", rows)
        for index, unit in places
        for name, rows in zip(unit.producers, unit.rows, strict=True)
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

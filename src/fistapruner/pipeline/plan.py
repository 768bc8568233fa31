"""Plan a pruning run: its patterns, its window length, and what it will need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch

from ..calibration import window_length
from ..calibration.packing import PURPOSE
from ..calibration.windows import check_source
from ..constraints import Constraint, parse_sparsity
from ..errors import FistaPrunerError, out_path
from ..execution.context import open_model
from ..execution.executors import count_jobs, default_threads
from ..execution.ray_pool import cluster_head
from ..models.discovery import Layout, discover
from ..models.files.low_rank import refuse_low_rank
from ..models.files.record import MIN_ZEROS, read_pruning_record, recorded_claims
from ..models.layerwise import LayerwiseModel
from ..models.source import Permissions
from ..planning.plan import Plan, make_plan
from ..recipes.execution_settings import Execution
from ..recipes.patterns import matches
from ..recipes.settings import Recipe
from ..runs.directory import refuse_out
from ..runtime.devices import available_cores, cpu_threads, worker_devices
from ..runtime.formatting import count, span
from ..runtime.numerics import undisturbed, windows_at_once
from ..sensitivity.decision import check_allocation, measured_by
from ..solvers import check_constraint
from ..solvers.low_rank import check_rank
from ..structured.experts import EXPERTS
from ..structured.proof import plan_widths
from ..structured.units import Widths, layer_weights, removed_weights, resized, unread_tensors
from ..structured.widths import step_of

MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Model types of whose ``out_proj`` PEFT refuses a LoRA (its ``_check_lora_target_modules_mamba``)."""


def allocate(recipe: Recipe, layout: Layout, model_type: str = "") -> dict[str, Constraint]:
    """Decide the pattern of every operator, as the recipe says it.

    Args:
        recipe: settings.
        layout: the operators.
        model_type: as the model's config has it, by which PEFT refuses some low-rank parts.

    Raises:
        FistaPrunerError: a pattern that matches nothing, or does not divide an operator's inputs; or an operator that
            cannot have the low-rank part.
    """
    chosen = _patterns(recipe, layout)
    for name, operator in layout.operators():
        check_constraint(chosen[name], operator.columns, recipe.steps, name)
    if recipe.low_rank:
        _check_low_rank(recipe.low_rank, layout, chosen, model_type)
    return chosen


def _patterns(recipe: Recipe, layout: Layout) -> dict[str, Constraint]:
    """Read the pattern of every operator, by full name.

    Raises:
        FistaPrunerError: a pattern of names that matches nothing.
    """
    operators = layout.operators()
    chosen: dict[str, Constraint] = dict.fromkeys((name for name, _ in operators), recipe.pattern)
    if isinstance(recipe.allocation, Mapping):
        for pattern, sparsity in recipe.allocation.items():
            names = [name for name in chosen if matches(name, pattern)]
            if not names:
                raise FistaPrunerError(
                    f"allocation: {pattern!r} matches no operator; the first one is called {operators[0][0]!r}"
                )
            chosen.update((name, parse_sparsity(sparsity)) for name in names)
    return chosen


def _check_low_rank(rank: int, layout: Layout, sparsity: Mapping[str, Constraint], model_type: str) -> None:
    """Refuse operators that cannot have a low-rank part.

    Raises:
        FistaPrunerError: names the first of them.
    """
    for name, operator in layout.operators():
        if not sparsity[name].zeros(operator.rows, operator.columns):
            continue
        if operator.experts:
            raise FistaPrunerError(
                f"low_rank {rank}: {name} is part of an expert, which PEFT's LoRA does not reach: leave experts "
                "dense with --ignore re:experts, or prune without --low-rank"
            )
        if model_type in MAMBA and name.endswith(".out_proj"):
            raise FistaPrunerError(
                f"low_rank {rank}: {name} is of a {model_type} model, and PEFT refuses a LoRA of its out_proj: leave "
                "these dense with --ignore re:out_proj, or prune without --low-rank"
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
            pattern does not divide, or goa without the operators that write the channels.
    """
    if recipe.structure.remove is None:
        return layout, None
    zeros = recipe.pattern.fraction > 0 or isinstance(recipe.allocation, Mapping)
    if recipe.structure.method == "goa" and zeros:
        raise FistaPrunerError(
            f"structure: goa fits whole operators before it removes channels, and has no zeros beside it (sparsity "
            f"{recipe.pattern}): take --sparsity 0%, and prune its result in a second run"
        )
    widths = plan_widths(model, layout, recipe.structure, trust_remote_code=permissions.trust_remote_code)
    selected = {name for name, _ in layout.operators()}
    for index, units in enumerate(widths.units) if recipe.structure.method == "goa" else ():
        for name in chain.from_iterable(unit.producers for unit in units):
            if (whole := f"{layout.prefix}.{index}.{name}") not in selected:
                raise FistaPrunerError(
                    f"structure: targets and ignore leave out {whole}, whose outputs are to be removed, and goa fits "
                    "and rates it too: leave it in --targets, or take --structure-method obs"
                )
    patterns, free = _patterns(recipe, layout), recipe.structure.widths == "free"
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
    found = []
    for kind, whole in dict.fromkeys((unit.kind, unit.before) for layer in widths.units for unit in layer):
        kept = [[unit.after for unit in layer if unit.kind == kind] or [whole] for layer in widths.units]
        found.append(f"{span(chain.from_iterable(kept))} of {count(whole)} {kind}")
    mixtures = dict.fromkeys(f"{unit.after} of {unit.before} {EXPERTS}" for units in widths.experts for unit in units)
    stay, where = " and ".join([*found, *mixtures]), "decoder layer" if found else "mixture"
    return (
        f"structure: {stay} stay in every {where}, {before - gone} of the layers' {before} parameters "
        f"({gone / before:.1%} fewer)"
    )


def say_lost_zeros(
    model: LayerwiseModel, layout: Layout, recipe: Recipe, sparsity: Mapping[str, Constraint], widths: Widths
) -> tuple[str, ...]:
    """Warn that removing channels does not keep the zeros of a model; empty where it gets new ones.

    Without a record of zeros, the first operator that is concerned is read.

    Args:
        model: the model, which may be pruned already.
        layout: its operators.
        recipe: all settings, resolved.
        sparsity: the new pattern of every operator, by full name.
        widths: whose channels are removed.
    """
    settings = recipe.structure
    goa = settings.method == "goa"
    fitted = goa or settings.compensation == "refit"
    changed = {  # by name, the inputs that stay or go together
        f"{layout.prefix}.{index}.{name}": unit.columns
        for index, units in enumerate(widths.units)
        for unit in units
        for name in (unit.consumer.name, *(unit.producers if goa else ()))
    }
    changed = {name: block for name, block in changed.items() if name not in sparsity or not sparsity[name].fraction}
    for name, pattern in _earlier_patterns(model, list(changed)).items():
        length = pattern.group_length
        holds = pattern.zeros_suffice or (length > 1 and changed[name] % length == 0)
        if pattern.fraction and (fitted or not holds):
            why = "their weights are fitted anew" if fitted else "it is one of the inputs that they had"
            instead = (
                "prune the result in a second run" if goa else "give a --sparsity too, and all operators get new ones"
            )
            return (
                f"{model.checkpoint.folder} has zeros already, and structure {settings.remove} does not keep "
                f"{'them' if fitted else 'their pattern'} in operators such as {name} ({pattern}), since {why}; "
                f"{instead}",
            )
    return ()


def say_unread(model: LayerwiseModel, widths: Widths) -> tuple[str, ...]:
    """Warn that the result leaves out tensors of layers that the model does not read; empty without."""
    names = unread_tensors(model, widths)
    if not names:
        return ()
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"the result leaves out tensors of layers that {type(model.model).__name__} does not read, such as those of "
        f"multi-token prediction, since the new config would not fit them: {shown}",
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
        share = 1 - int(torch.count_nonzero(weight)) / max(weight.numel(), 1)
        if MIN_ZEROS <= share < 1:
            found[name] = parse_sparsity(f"{share:.1%}")
    return found


@undisturbed()
def plan_model(
    model: str | Path,
    recipe: Recipe,
    out: str | Path = ".",
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Plan:
    """Predict what a run will need, without starting it.

    Args:
        model: as for :func:`fistapruner.prune`.
        recipe: all settings.
        out: the run directory to be.
        allow_pickle: read legacy ``.bin`` weights.
        trust_remote_code: run Python code that comes with the checkpoint.

    Raises:
        FistaPrunerError: bad input, or a run that would not fit.
    """
    refuse_out(out_path(out))
    check_allocation(recipe)
    check_sources(recipe)
    source = Permissions(allow_pickle, trust_remote_code).find(model)
    refuse_low_rank(source.folder, "prune")
    recipe = recipe.resolved(family=source.family)
    opened = open_model(source, recipe)
    layout, widths = change_widths(opened, discover(opened).select(recipe), recipe, source.permissions)
    sparsity = allocate(recipe, layout, opened.config.model_type)
    plan = plan_run(opened, layout, recipe, sparsity, out_path(out), widths)
    if recipe.recover is not None:
        later = "recovery is not in this plan: 'fistapruner plan RUN --recover' predicts it once RUN is pruned"
        plan = replace(plan, says=(*plan.says, later))
    if widths is None:
        return plan
    lost = say_lost_zeros(opened, layout, recipe, sparsity, widths)
    return replace(plan, says=(say_widths(opened, widths), *lost, *say_unread(opened, widths), *plan.says))


def check_sources(recipe: Recipe) -> None:
    """Refuse text of calibration and recovery that is not there or needs a missing extra.

    Raises:
        FistaPrunerError: names the source.
        MissingExtraError: names the package and the extra.
    """
    for source in recipe.calibration.sources.values():
        check_source(source)
    for source in () if recipe.recover is None else recipe.recover.data.texts:
        check_source(source, PURPOSE)


def plan_run(
    model: LayerwiseModel,
    layout: Layout,
    recipe: Recipe,
    sparsity: Mapping[str, Constraint],
    out: Path,
    widths: Widths | None = None,
    *,
    drawn: bool = False,
) -> Plan:
    """Plan a run with the executor, workers and threads of its recipe.

    A batch of random token ids is used instead of the calibration windows, which may take long to draw. ``drawn``:
    they are there already, so the model generates none.
    """
    execution, seqlen = recipe.execution, window_length(recipe.calibration.seqlen, model)
    batch_size = execution.batch_size or windows_at_once(seqlen, model.device)
    shape = min(batch_size, recipe.calibration.samples), seqlen
    tokens = torch.randint(model.vocabulary, shape, generator=torch.Generator().manual_seed(recipe.seed))
    workers = min(local_workers(execution), max(1, count_jobs(layout, sparsity, recipe, range(len(model)))))
    with cpu_threads(default_threads(execution)):
        return make_plan(model, layout, recipe, sparsity, tokens, batch_size, out, workers, widths, drawn=drawn)


def local_workers(execution: Execution) -> int:
    """Count the worker processes on this machine; those of a cluster have their own machines."""
    devices = worker_devices(execution.device, execution.workers, execution.threads)
    if execution.executor == "process":
        return len(devices)
    if execution.executor == "serial" or cluster_head(execution.address):
        return 1
    room = available_cores() // default_threads(execution)  # as Ray places them
    room = min(room, torch.cuda.device_count()) if devices[0].type == "cuda" else room
    return max(1, min(execution.workers or room, room))

"""Check the input of a recovery run: what the recipe leaves open, and the training texts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ..calibration.mixtures import Mixture
from ..calibration.packing import PURPOSE
from ..calibration.training_text import training_text
from ..calibration.windows import SELF, check_source, window_length
from ..errors import FistaPrunerError
from ..execution.context import open_model
from ..execution.executors import default_threads
from ..models.discovery import discover
from ..models.source import ModelSource
from ..planning.training_plan import plan_training
from ..planning.training_task import Task
from ..recipes.recover_settings import RecoverRecipe
from ..recipes.settings import Recipe
from ..runs.decision import PruneRecord, TrainingRecord
from ..runs.directory import RunDirectory
from ..runs.listener import Listener
from ..runs.prune_directory import PruneDirectory
from ..runs.records import Report
from ..runs.training_directory import RecoverDirectory, TrainingDirectory
from ..runs.training_runs import input_run
from ..runtime.devices import cpu_threads
from ..runtime.files import folder_bytes
from ..runtime.launcher import launched
from ..runtime.memory import release_memory
from .begun import refuse_other_settings
from .patterns import allocate
from .training_inputs import (
    TRAINING_SEQLEN,
    TrainingInputs,
    TrainingRequest,
    asked,
    check_precision,
    check_training_inputs,
    check_vectors,
    named_dense,
)

SEQLEN = "data.seqlen"
"""How messages call the tokens in a window."""

TRAINED_BY: Any = {
    **dict.fromkeys(("sparsity", "allocation", "targets", "ignore", "low_rank", "structure"), True),
    "calibration": {"source", "tasks"},
    "recover": True,
    "execution": True,
}
"""Settings of a pruning run that decide what :func:`check_trained` returns, as pydantic's ``include``."""


def check_inputs(
    run: TrainingDirectory, request: TrainingRequest[RecoverRecipe], listener: Listener
) -> TrainingInputs[RecoverRecipe]:
    """Check everything that can be checked before any long work.

    Raises:
        FistaPrunerError: bad input, named.
    """
    for text in request.recipe.data.texts:
        check_source(text, PURPOSE)
    inputs = check_training_inputs(run, request, listener, resolve, (request.recipe.data.seqlen, SEQLEN))
    if inputs.recipe.loss != "auto":
        return inputs
    if inputs.dense is None:
        named, _ = named_dense(input_run(request.model), inputs.source)
        dense = "the dense model is not known" if named is None else f"the dense model is not found, which was {named}"
        inputs.warn(listener, f"{dense}: the loss is that of the text (ce); better give --dense MODEL")
    loss = "ce" if inputs.dense is None else "kl"
    return replace(inputs, recipe=inputs.recipe.model_copy(update={"loss": loss}))


def check_following(recipe: Recipe, dense: ModelSource) -> None:
    """Check, before a model is pruned, precision, vectors and text of the recovery that follows.

    Args:
        recipe: of the pruning run, with the section ``recover``.
        dense: the model.

    Raises:
        FistaPrunerError: float16 on a CPU, no vector to train, too few steps for the tasks, or a text that cannot be
            read or is too short for the windows.
    """
    training = _on_text(recipe)
    model = open_model(dense, training)
    check_precision(model)
    with _flags_of_recovery():
        check_vectors(model, training)
    seqlen, data = window_length(training.data.seqlen, model, TRAINING_SEQLEN, SEQLEN), training.data
    check_mixture(training, seqlen)
    read = {name: text for name, text in data.tasks.items() if text != SELF}
    if read or data.source not in (None, SELF):
        with _flags_of_recovery():
            training_text(data.model_copy(update={"tasks": read}), dense.tokenizer(), seqlen)


def refuse_processes(recipe: Recipe) -> None:
    """Refuse several processes that prune and then recover: they share no pruning.

    Raises:
        FistaPrunerError: says how many a launcher has started, and what to do.
    """
    if recipe.recover is not None and (count := launched()) > 1:
        raise FistaPrunerError(
            f"recover: WORLD_SIZE is {count}, and only a recovery is shared by processes: prune with one process and "
            "without recover, then recover the result with all; where there are no others, unset RANK and WORLD_SIZE"
        )


def recovery_recipe(recipe: Recipe) -> RecoverRecipe:
    """Return the recipe of the recovery that follows a pruning run, with the run's execution."""
    alone = {"executor": "serial", "workers": None, "address": None, "batch_size": None}
    training: RecoverRecipe = recipe.recover
    return training.model_copy(update={"execution": recipe.execution.model_copy(update=alone)})


def recovers(begun: TrainingRecord, pruned: Report) -> bool:
    """Check that a recovery began with the result of this pruning."""
    stages = begun.lineage.stages if begun.lineage else []
    return bool(stages) and stages[-1].fingerprint == pruned.fingerprint


def refuse_other_recovery(run: PruneDirectory, pruned: PruneRecord, recipe: Recipe) -> None:
    """Refuse to ask for another recovery of a pruning run than the one that has begun with its result.

    Args:
        run: directory of the pruning run; ``pruned``: its record.
        recipe: that is asked for now.

    Raises:
        FistaPrunerError: names the first setting that differs.
    """
    following = RecoverDirectory(run.recovered)
    begun = None if recipe.recover is None else following.record()
    if begun is not None and recovers(begun, pruned):
        advice = f"remove {following.folder}, or name another --out"
        refuse_other_settings(following, begun.decision.asked, asked(recovery_recipe(recipe)), "--recover:", advice)


def _on_text(recipe: Recipe) -> RecoverRecipe:
    """Return the recipe of the recovery that follows, with the calibration text where it names none."""
    training, calibration = recovery_recipe(recipe), recipe.calibration
    if training.data.source is not None or training.data.tasks:
        return training
    text = {"source": calibration.source, "tasks": calibration.tasks}
    return training.model_copy(update={"data": training.data.model_copy(update=text)})


def check_trained(recipe: Recipe, dense: ModelSource, run: PruneDirectory) -> Task | None:
    """Check, before a model is pruned, which operators the recovery that follows trains.

    They are those that get zeros; of a model that loses channels, heads or experts, all.

    Args:
        recipe: of the pruning run, with the section ``recover``.
        dense: the model.
        run: the pruning run.

    Returns:
        What :func:`check_fits` plans: the recovery of the dense model, whose shapes are those of the pruned one; None
        where that loses some.

    Raises:
        FistaPrunerError: the pattern sets nothing to zero, a pattern of names matches no operator, or none is left.
    """
    training = _on_text(recipe)
    model = open_model(dense, training)
    layout = discover(model)
    if recipe.structure.remove is not None:
        with _flags_of_recovery():
            layout.select(training, "train")
        return None
    layout = layout.select(recipe)
    sparsity = allocate(recipe, layout, model.config.model_type)
    zeros = {name: sparsity[name].zeros(operator.rows, operator.columns) for name, operator in layout.operators()}
    survivors = {name: operator.rows * operator.columns - zeros[name] for name, operator in layout.operators()}
    checkpoint, journaled = model.checkpoint, sum(map(layout.weights, range(len(model))))
    before = checkpoint.nbytes + journaled * min(model.dtype.itemsize, checkpoint.dtype.itemsize)
    layout = layout.only({name for name, count in zeros.items() if count})
    if not any(layout.layers):
        raise FistaPrunerError(
            f"recover with sparsity {recipe.sparsity}: no operator has zeros to keep; give another --sparsity, or "
            "leave out --recover"
        )
    with _flags_of_recovery():
        layout = layout.select(training, "train")
    loss = "kl" if training.loss == "auto" else training.loss
    training = training.model_copy(update={"loss": loss})
    teacher, generator = None if loss == "ce" else model, model if training.generates_text else None
    seqlen = window_length(training.data.seqlen, model, TRAINING_SEQLEN, SEQLEN)
    task = Task.of_recovery(model, layout, teacher, training, survivors, seqlen, run.recovered, generator)
    written = folder_bytes(run.journal.folder) if run.journal.folder.is_dir() else 0
    return replace(task, before=0 if run.model.is_dir() else max(0, before - written))


def check_fits(task: Task | None, listener: Listener) -> None:
    """Check, before a model is pruned, that the recovery that follows fits.

    Args:
        task: from :func:`check_trained`.
        listener: receives progress.

    Raises:
        FistaPrunerError: memory or disk are too small.
    """
    if task is None:
        return
    listener.tick("planning the recovery", 0, 1)
    with _flags_of_recovery(), cpu_threads(default_threads(task.recipe.execution)):
        plan_training(task)
    release_memory()  # what the measurement has freed


@contextmanager
def _flags_of_recovery() -> Iterator[None]:
    """Say of flags in an error whose they are: those of pruning may be called alike."""
    try:
        yield
    except FistaPrunerError as error:
        whose = " (these are flags of 'fistapruner recover', and settings of recover in a --recipe)"
        raise FistaPrunerError(f"recover: {error}{whose if ' --' in str(error) else ''}") from None


def check_mixture(recipe: RecoverRecipe, seqlen: int) -> None:
    """Refuse too few steps or tokens for the tasks of a uniform mixture, in windows of ``seqlen`` tokens.

    Raises:
        FistaPrunerError: names the windows that it needs, and the steps or tokens that make them.
    """
    data = recipe.data
    if len(data.tasks) > 1 and data.mixture == "uniform":
        windows = min(recipe.steps_of(seqlen) * recipe.windows_per_step, recipe.windows_of(seqlen))
        mixture = Mixture(len(data.tasks), data.per_round, data.seed)
        steps = -(-mixture.least // recipe.windows_per_step)
        more = [f"at least {steps} steps"] if recipe.steps is not None and recipe.steps < steps else []
        if recipe.steps is None:
            more = [f"at least {steps * recipe.windows_per_step * seqlen} tokens"]
        elif -(-data.tokens // seqlen) < mixture.least:
            more.append(f"at least {mixture.least * seqlen} tokens")
        mixture.draw(windows, " and ".join(more))


def known_text(origin: RunDirectory | None) -> dict[str, Any] | None:
    """Return the settings of the text that the input's run names; None where it names none."""
    record = origin.record() if origin is not None else None
    if record is None or record.calibration is None or record.kind == "align":  # pairs are no text
        return None
    tasks = {name: str(task.source) for name, task in record.calibration.tasks.items()}
    return {"tasks": tasks} if len(tasks) > 1 else {"source": next(iter(tasks.values()), record.calibration.source)}


def resolve(recipe: RecoverRecipe, origin: RunDirectory | None) -> RecoverRecipe:
    """Return the recipe with ``auto`` resolved, but for the loss, and the text named.

    Raises:
        FistaPrunerError: the text is not said and the input is no run that names one.
    """
    data = recipe.data
    if data.source is None and not data.tasks:
        known = known_text(origin)
        if origin is None or known is None:
            raise FistaPrunerError("say what to train on with --data: self, python, c4, or a text file")
        data = data.model_copy(update=known)
        try:
            for text in data.texts:
                check_source(text, PURPOSE)
        except FistaPrunerError as error:
            raise FistaPrunerError(
                f"the text of the run in {origin.folder}: {error}; name it where it is, or another, with --data"
            ) from None
    return recipe.model_copy(update={"data": data}).with_absolute_files()

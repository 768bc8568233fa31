"""Check the input of a recovery run: what the recipe leaves open, and the training texts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..calibration.packing import PURPOSE
from ..calibration.windows import check_source
from ..errors import FistaPrunerError
from ..papers.mamf import Mixture
from ..recipes.recover_settings import RecoverRecipe
from ..runs.directory import RunDirectory
from ..runs.listener import Listener
from ..runs.training_directory import TrainingDirectory
from ..runs.training_runs import input_run
from .training_inputs import (
    TrainingInputs,
    TrainingRequest,
    check_training_inputs,
    named_dense,
)

SEQLEN = "data.seqlen"
"""How messages call the tokens in a window."""


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

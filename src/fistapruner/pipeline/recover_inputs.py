"""Check the input of a recovery run: what the recipe leaves open, and the training texts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..calibration import SELF
from ..calibration.packing import PURPOSE
from ..calibration.training_text import training_text
from ..calibration.windows import check_source, window_length
from ..errors import FistaPrunerError
from ..execution.context import open_model
from ..models.source import ModelSource
from ..recipes.recover_settings import RecoverRecipe
from ..recipes.settings import Recipe
from ..runs.directory import RunDirectory
from ..runs.listener import Listener
from ..runs.training_directory import TrainingDirectory
from .training_inputs import TRAINING_SEQLEN, Inputs, TrainingRequest, check_training_inputs

SEQLEN = "data.seqlen"
"""How messages call the tokens in a window."""


def check_inputs(
    run: TrainingDirectory, request: TrainingRequest[RecoverRecipe], listener: Listener
) -> Inputs[RecoverRecipe]:
    """Check everything that can be checked before any long work.

    Raises:
        FistaPrunerError: bad input, named.
    """
    inputs = check_training_inputs(run, request, listener, resolve, (request.recipe.data.seqlen, SEQLEN))
    if inputs.recipe.loss != "auto":
        return inputs
    if inputs.dense is None:
        inputs.warn(
            listener, "the dense model is not known, so the loss is that of the text (ce): better give --dense MODEL"
        )
    loss = "ce" if inputs.dense is None else "kl"
    return replace(inputs, recipe=inputs.recipe.model_copy(update={"loss": loss}))


def check_following(recipe: Recipe, dense: ModelSource) -> None:
    """Check, before a model is pruned, what the recovery that follows trains, and its text.

    Args:
        recipe: of the pruning run, with the section ``recover``.
        dense: the model.

    Raises:
        FistaPrunerError: a text that cannot be read, or is too short for the windows.
    """
    following, calibration = recipe.recover, recipe.calibration
    data = following.data
    if data.source is None and not data.tasks:
        data = data.model_copy(update={"source": calibration.source, "tasks": calibration.tasks})
    for text in data.texts:
        check_source(text, PURPOSE)
    model = open_model(dense, following)
    seqlen = window_length(following.data.seqlen, model, TRAINING_SEQLEN, SEQLEN)
    if SELF not in (data.source, *data.tasks.values()):
        training_text(data, dense.tokenizer(), seqlen)


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
        if known is None:
            raise FistaPrunerError("say what to train on with --data: self, python, c4, or a text file")
        data = data.model_copy(update=known)
    for text in data.texts:
        check_source(text, PURPOSE)
    return recipe.model_copy(update={"data": data}).with_absolute_files()

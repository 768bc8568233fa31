"""Recover a pruned model: train it, with every zero kept, to win back what pruning lost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..execution.training_context import RecoverContext
from ..models.source import Permissions
from ..recipes.recover_settings import RecoverRecipe
from ..runs.arguments import checked_arguments
from ..runs.listener import Listener
from ..runs.records import Report
from ..runs.training_directory import RecoverDirectory
from .prepare_recover import make_text, prepare
from .training import TrainingVerb, train
from .training_inputs import TrainingRequest

RECOVER = TrainingVerb(RecoverRecipe, RecoverDirectory, RecoverContext, prepare, make_text, "the text has changed")
"""What recovery does in its own way."""


@checked_arguments
def recover(
    model: str | Path,
    out: str | Path,
    *,
    recipe: RecoverRecipe | Mapping[str, Any] | str | Path | None = None,
    dense: str | Path | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    listener: Listener | None = None,
    command: str | None = None,
    evaluate: str | Path | None = "auto",
    evaluate_windows: int | None = None,
    **settings: Any,
) -> Report:
    """Train a pruned model, with every zero kept, to win back what pruning lost.

    Args:
        model: run directory of ``fistapruner.prune`` or of this function, or a pruned checkpoint.
        out: the run directory. One that holds an unfinished run of the same recipe is continued.
        recipe: all settings: a RecoverRecipe, a mapping, or the name of a shipped recipe or of a YAML file; None is the
            default recipe.
        dense: the dense model; None takes the one that the run or the checkpoint's record names.
        allow_pickle: read legacy ``.bin`` weights.
        trust_remote_code: run Python code that comes with the checkpoint.
        listener: receives progress.
        command: shell line that reproduces the run, for the report; None leaves it out.
        evaluate: text for the perplexity, as ``fistapruner.evaluate`` takes it; ``auto`` is that of the input's
            run, or ``python`` where a checkpoint goes in that is of no run; None evaluates nothing.
        evaluate_windows: only its first so many windows.
        **settings: single settings over the recipe, as in a recipe file: ``parameters="full"``, ``lr=1e-3``,
            ``data={"tokens": "500k"}``.

    Returns:
        The report, as in ``out/report.json``; the checkpoint is in ``out/model``.

    Raises:
        FistaPrunerError: bad input, named; before any long work where that can be known.
    """
    request = TrainingRequest.of(
        model,
        RecoverRecipe.of(recipe).changed(settings),
        dense=dense,
        permissions=Permissions(allow_pickle, trust_remote_code),
        command=command,
        evaluate=evaluate,
        evaluate_windows=evaluate_windows,
    )
    return train(RECOVER, out, request, listener)

"""Plan a run that trains without starting it: one plan for each form."""

from __future__ import annotations

from pathlib import Path

from ..errors import out_path
from ..execution.executors import default_threads
from ..models.source import Permissions
from ..planning.training_plan import FormPlan, plan_forms
from ..planning.training_task import Task
from ..recipes.align_settings import AlignRecipe
from ..recipes.recover_settings import RecoverRecipe
from ..runs.align_directory import AlignDirectory
from ..runs.directory import refuse_out
from ..runs.listener import Listener
from ..runs.training_directory import RecoverDirectory
from ..runs.training_runs import input_run
from ..runtime.devices import cpu_threads
from . import prepare_align, prepare_recover, recover_inputs
from .training_inputs import R, TrainingRequest

STAND_IN = "python"
"""Text that a plan takes where none is named: only its number of tokens matters."""


def plan_recovery_of(
    model: str | Path,
    recipe: RecoverRecipe,
    out: str | Path = ".",
    *,
    dense: str | Path | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> tuple[FormPlan, list[FormPlan]]:
    """Predict what recovering a pruned model will need, without starting it.

    Args:
        model: run directory, or a pruned checkpoint.
        recipe: all settings.
        out: folder whose disk must have the space.
        dense: the dense model; None takes what the input says.
        allow_pickle: read legacy ``.bin`` weights.
        trust_remote_code: run Python code that comes with the checkpoint.

    Returns:
        The plan of the recipe's own form, and those of all forms; those that do not fit say why.

    Raises:
        FistaPrunerError: bad input.
    """
    folder = out_path(out)
    refuse_out(folder)
    if (
        recipe.data.source is None
        and not recipe.data.tasks
        and recover_inputs.known_text(input_run(str(model))) is None
    ):
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": STAND_IN})})
    request = _request(model, recipe, dense, Permissions(allow_pickle, trust_remote_code))
    run = RecoverDirectory(folder / "run")  # of a run in that folder
    return _plan(prepare_recover.task_of(run.folder, recover_inputs.check_inputs(run, request, Listener())))


def plan_alignment_of(
    model: str | Path,
    recipe: AlignRecipe,
    out: str | Path = ".",
    *,
    dense: str | Path | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> tuple[FormPlan, list[FormPlan]]:
    """Predict what aligning a pruned model will need, without starting it.

    Args and errors are those of :func:`plan_recovery_of`; the recipe must name its pairs.

    Returns:
        The plan of the recipe's own form, and those of all forms; those that do not fit say why.
    """
    folder = out_path(out)
    refuse_out(folder)
    recipe.refuse_idle()
    pairs, _ = prepare_align.check_pairs(recipe)
    request = _request(model, recipe, dense, Permissions(allow_pickle, trust_remote_code))
    run = AlignDirectory(folder / "run")  # of a run in that folder
    inputs = prepare_align.check_inputs(run, request, Listener())
    return _plan(prepare_align.task_of(run.folder, inputs, prepare_align.cut_pairs(inputs, pairs, Listener())))


def _request(model: str | Path, recipe: R, dense: str | Path | None, permissions: Permissions) -> TrainingRequest[R]:
    """Ask for a run that evaluates nothing."""
    return TrainingRequest(str(model), recipe, None if dense is None else str(dense), permissions, evaluates=False)


def _plan(task: Task) -> tuple[FormPlan, list[FormPlan]]:
    """Plan the task with each form."""
    with cpu_threads(default_threads(task.recipe.execution)):
        forms = plan_forms(task)
    return next(form for form in forms if form.parameters == task.recipe.parameters), forms

"""Rebuild a model from the journal of a run without gradients, and from nothing but its input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import FistaPrunerError
from ..execution.training import open_model
from ..models.discovery import discover
from ..models.files.checkpoint import PRUNING_RECORD
from ..models.files.folder import require_new
from ..models.files.writer import write_checkpoint
from ..models.source import Permissions
from ..recipes.align_settings import AlignRecipe
from ..recipes.recover_settings import RecoverRecipe
from ..recipes.training_settings import TrainingRecipe
from ..runs.identity import stamps
from ..runs.steps import read_steps
from ..runtime.devices import cpu_threads, device_title
from ..tuning.adamw import Patience
from ..tuning.steppers import Replayed
from ..tuning.trained import Trained
from ..tuning.trainer import TrainingState, take_again
from .finish_training import replacements
from .training_inputs import find_input


def replay(
    model: str | Path,
    journal: str | Path,
    out: str | Path,
    *,
    device: str = "auto",
    say: Callable[[str], None] = lambda sentence: None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Rebuild the result of a run with ``mezo`` or ``subzero`` from its ``steps.jsonl``, without passes.

    Args:
        model: the checkpoint that the run began with.
        journal: its ``steps.jsonl``.
        out: folder to make; it must not exist.
        device: to draw random numbers on, of the kind that the run had; auto, cpu, cuda or cuda:N.
        say: receives progress.
        allow_pickle: read legacy ``.bin`` weights.
        trust_remote_code: run Python code that comes with the checkpoint.

    Returns:
        ``out``.

    Raises:
        FistaPrunerError: no journal of such a run, another checkpoint, or a device that draws other random numbers.
    """
    source, out, journal = (
        find_input(str(model), Permissions(allow_pickle, trust_remote_code)),
        Path(out),
        Path(journal),
    )
    require_new(out, source.folder)
    lines = read_steps(journal)
    about: dict[str, Any] = lines[0].get("run", {}) if lines else {}
    if not about:
        raise FistaPrunerError(f"{journal} is not the journal of a recovery or alignment run (steps.jsonl)")
    kind = AlignRecipe if "pairs_per_step" in about["recipe"] else RecoverRecipe
    recipe: TrainingRecipe = kind.build(about["recipe"], str(journal))
    if not recipe.zeroth_order:
        raise FistaPrunerError(
            f"{journal} is of a run with {recipe.optimizer}: only mezo and subzero can be replayed without passes"
        )
    recipe = recipe.model_copy(update={"execution": recipe.execution.model_copy(update={"device": device})})
    opened = open_model(source, recipe, about["dtype"])
    if (here := device_title(opened.device)) != about["device"]:
        flag = "cpu" if about["device"] == "cpu" else "cuda"
        raise FistaPrunerError(
            f"the run of {journal} was made on {about['device']}, and {recipe.optimizer} draws other random numbers on "
            f"{here}: replay it there (--device {flag})"
        )
    if [list(stamp) for stamp in stamps(opened.checkpoint)] != about["weights"]:
        raise FistaPrunerError(f"{source.folder} is not the checkpoint that {journal} began with")
    if about["torch"] != torch.__version__:
        say(f"the run was made with torch {about['torch']}, this is {torch.__version__}: its random numbers may differ")
    trained = Trained(opened, discover(opened).only(about["operators"]), recipe)
    stepper, state = Replayed(trained), TrainingState()
    state.patience = Patience.begin(lines[0]["held_out"], on=recipe.patience)
    stepper.keep()
    record = source.folder / PRUNING_RECORD
    documents = {PRUNING_RECORD: record.read_text("utf-8")} if record.is_file() else {}
    # A journal of an earlier version does not say the threads; frames of subzero and products depend on them.
    with cpu_threads(about.get("threads") or torch.get_num_threads()):
        with opened.resident(layers=True):
            for line in lines[1:]:
                take_again(state, line, stepper, recipe, about["steps"])
            stepper.restore()
        say(f"{state.step} steps taken again, those up to step {state.patience.best_step} are kept")
        write_checkpoint(opened.checkpoint, out, replacements(opened, trained), documents=documents, resume=False)
    return out

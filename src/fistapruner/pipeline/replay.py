"""Rebuild a model from the journal of a run without gradients, and from nothing but its input."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..errors import FistaPrunerError, out_path
from ..execution.context import open_model
from ..models.discovery import discover
from ..models.files.folder import require_new
from ..models.files.record import read_pruning_record
from ..models.files.writer import write_checkpoint
from ..models.layerwise import LayerwiseModel
from ..models.source import ModelSource, Permissions
from ..models.whole import whole_bytes
from ..recipes.align_settings import AlignRecipe
from ..recipes.recover_settings import RecoverRecipe
from ..recipes.training_settings import TrainingRecipe
from ..reporting.model_card import plain_card
from ..runs.identity import stamps
from ..runs.labels import TRAINED
from ..runs.lineage import record_with_stage
from ..runs.records import Stage, StageFigures
from ..runs.steps import read_steps
from ..runtime.devices import cpu_threads, device_title
from ..runtime.files import existing_folder
from ..runtime.machine import now, versions
from ..runtime.memory import free_device_memory, free_memory
from ..tuning.adamw import Patience
from ..tuning.trained import Trained
from ..tuning.trainer import TrainingState, take_again
from ..tuning.zeroth_order import ZerothOrder
from .finish_training import replacements
from .result import check_zeros, model_documents, stored_weights
from .training_inputs import find_input


def replay(
    model: str | Path,
    journal: str | Path,
    out: str | Path,
    *,
    device: str = "auto",
    say: Callable[[str], None] = lambda sentence: None,
    command: str | None = None,
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
        command: shell line for the lineage.
        allow_pickle: read legacy ``.bin`` weights.
        trust_remote_code: run Python code that comes with the checkpoint.

    Returns:
        ``out``.

    Raises:
        FistaPrunerError: no whole journal of such a run, another checkpoint, a device that draws other random numbers,
            or written zeros that are not those of the checkpoint.
    """
    source, out, journal = (
        find_input(str(model), Permissions(allow_pickle, trust_remote_code), verb="recover --replay"),
        out_path(out),
        Path(journal),
    )
    require_new(out, source.folder)
    if not journal.is_file():
        what = "is a folder" if journal.is_dir() else "does not exist"
        raise FistaPrunerError(f"--replay {journal} {what}: give the steps.jsonl of a run")
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
    opened = open_model(source, recipe, dtype=about["dtype"])
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
    layout = discover(opened).only(about["operators"])
    fits = _fits(opened, Trained(opened, layout, recipe))
    states: AbstractContextManager[str | None] = nullcontext()
    if not fits:
        states = TemporaryDirectory(prefix="trained-", dir=existing_folder(out))
    with cpu_threads(about["threads"]), states as folder:  # frames of subzero and products depend on the threads
        trained = Trained(opened, layout, recipe, None if folder is None else Path(folder))
        stepper, state = ZerothOrder(trained), TrainingState()
        state.patience = Patience.begin(lines[0]["held_out"], on=recipe.patience)
        trained.keep()
        with opened.resident(layers=fits):
            for line in lines[1:]:
                take_again(state, line, stepper, trained, recipe, about["steps"])
            trained.restore()
        if state.step < about["steps"] and not state.stopped:
            more = len(journal.read_bytes().splitlines()) > len(lines)
            why = f"line {len(lines) + 1} is damaged" if more else "the run was not finished"
            raise FistaPrunerError(f"{journal} ends after step {state.step} of {about['steps']}: {why}")
        say(f"{state.step} steps taken again, those up to step {state.patience.best_step} are kept")
        stage = Stage(
            kind="align" if kind is AlignRecipe else "recover",
            command=command,
            finished=now(),
            settings=about["recipe"],
            versions=versions(),
            figures=StageFigures(tokens=sum(line.get("tokens", 0) for line in lines)),
        )
        documents = _documents(source, stage, state)
        write_checkpoint(opened.checkpoint, out, replacements(opened, trained), documents=documents, resume=False)
    check_zeros(out, opened.checkpoint, stored_weights(opened, layout))
    return out


def _fits(model: LayerwiseModel, trained: Trained) -> bool:
    """Check whether memory holds all weights, the trained numbers and the best of them."""
    numbers = 0
    for index in range(len(trained)):
        with model.layer(index) as layer:
            numbers += trained.describe(index, layer)[0]
    free = free_device_memory(model.device) if model.device.type == "cuda" else free_memory()
    return whole_bytes(model.checkpoint, model.dtype) + 2 * 4 * numbers <= free


def _documents(source: ModelSource, stage: Stage, state: TrainingState) -> dict[str, str]:
    """Describe the result: its card, and the record of the input with one more stage."""
    done = TRAINED[stage.kind]
    text = (
        f"took the {state.step} steps of the run that {done} this model again, from its journal, and kept those up to "
        f"step {state.patience.best_step}, with every zero"
    )
    card = plain_card(source.license(), f"A pruned and {done} model", text, stage.settings)
    return model_documents(card, record_with_stage(read_pruning_record(source.folder), stage))

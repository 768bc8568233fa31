"""Check the input of a recovery run: the pruned model, its zeros, the dense model, settings and texts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..activations.stream import check_model
from ..calibration import SELF
from ..calibration.packing import PURPOSE
from ..calibration.training_text import training_text
from ..calibration.windows import check_source, window_length
from ..errors import FistaPrunerError
from ..evaluation.data import load_windows
from ..evaluation.inspection import inspect_checkpoint
from ..execution.recovery import open_model
from ..models.discovery import Layout, discover
from ..models.files.record import read_pruning_record
from ..models.layerwise import LayerwiseModel
from ..models.source import UNTRUSTED, ModelSource, Permissions
from ..recipes.recover_settings import RecoverRecipe, TrainingData
from ..recipes.settings import Recipe
from ..runs.decision import EvaluationRequest
from ..runs.directory import RunDirectory
from ..runs.identity import changed_files
from ..runs.lineage import read_lineage
from ..runs.listener import Listener
from ..runs.recover_directory import RecoverDirectory, dense_of, input_run
from ..runtime.ranks import ALONE, Ranks
from ..sparse.pack import is_packed
from .prepare import refuse_overlap

TRAINING_SEQLEN = 1024
"""Longest training window by default."""


@dataclass(frozen=True)
class RecoverRequest:
    """What a command asks of a recovery run.

    Args:
        model: run directory or checkpoint, as the user named it.
        recipe: all settings, as asked.
        dense: the dense model, as the user named it; None takes what the input says.
        permissions: what the models' files may do.
        command: shell line that reproduces the run; None is that of this process.
        evaluation: the text to evaluate on after the run; None takes that of the input's run, where there is one.
        evaluates: evaluate at all.
        ranks: the processes that share the work.
    """

    model: str
    recipe: RecoverRecipe
    dense: str | None = None
    permissions: Permissions = UNTRUSTED
    command: str | None = None
    evaluation: EvaluationRequest | None = None
    evaluates: bool = True
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class Inputs:
    """The checked input of a recovery run.

    Args:
        source: the pruned model's folder; ``model``: the model; ``layout``: the operators to train.
        claims: sparsity of each of these, by full name, as the input's record has it or as it was found;
            ``survivors``: its weights that are not zero.
        dense: the dense model; None where it is not known.
        recipe: all settings, resolved.
        tokenizer: of the model; ``seqlen``: tokens in a window.
        evaluation: the text to evaluate on.
        warnings: for the report.
    """

    source: ModelSource
    model: LayerwiseModel
    layout: Layout
    claims: dict[str, str]
    survivors: dict[str, int]
    dense: LayerwiseModel | None
    dense_source: ModelSource | None
    recipe: RecoverRecipe
    tokenizer: Any
    seqlen: int
    evaluation: EvaluationRequest | None
    warnings: list[str]


def check_inputs(run: RecoverDirectory, request: RecoverRequest, listener: Listener) -> Inputs:
    """Check everything that can be checked before any long work.

    Raises:
        FistaPrunerError: bad input, named.
    """
    permissions, origin = request.permissions, input_run(request.model)
    source = find_input(request.model, permissions)
    refuse_overlap(source.folder, run.folder)
    listener.say(f"model {request.model}: {source.folder}")
    dense_source = _find_dense(request, origin, source)
    recipe = resolve(request.recipe, origin, dense_source is not None)
    model = open_model(source, recipe)
    _check_precision(model)
    layout, claims, survivors = _operators(source.folder, model, recipe)
    _say_rank(recipe, layout, listener)
    check_model(model)
    dense, warnings = None, []
    if recipe.loss != "ce":
        assert dense_source is not None
        refuse_overlap(dense_source.folder, run.folder)
        dense = open_model(dense_source, recipe)
        _check_dense(dense, model)
    elif request.recipe.loss == "auto":
        warnings.append("the dense model is not known, so the loss is that of the text (ce): better give --dense MODEL")
        listener.say(warnings[0])
    tokenizer, seqlen = source.tokenizer(), window_length(recipe.data.seqlen, model, TRAINING_SEQLEN, "data.seqlen")
    evaluation = request.evaluation or (_evaluation_of(origin) if request.evaluates else None)
    if evaluation is not None:  # a fault in the text shows now
        cut = load_windows(evaluation.data, tokenizer, evaluation.seqlen or seqlen, evaluation.windows)
        model.check_tokens(cut.tokens)
    return Inputs(
        source,
        model,
        layout,
        claims,
        survivors,
        dense,
        dense_source,
        recipe,
        tokenizer,
        seqlen,
        evaluation,
        warnings,
    )


def check_following(recipe: Recipe, dense: ModelSource) -> None:
    """Check, before a model is pruned, the text of the recovery that follows.

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
    for text in data.tasks.values() if data.tasks else (data.source,):
        check_source(str(text), PURPOSE)
    model = open_model(dense, following)
    seqlen = window_length(following.data.seqlen, model, TRAINING_SEQLEN, "data.seqlen")
    if SELF not in (data.source, *data.tasks.values()):
        training_text(data, dense.tokenizer(), seqlen)


def find_input(model: str, permissions: Permissions) -> ModelSource:
    """Find the pruned checkpoint of a run, or any other model.

    Raises:
        FistaPrunerError: an unfinished run, a packed folder, or no such model.
    """
    folder = Path(model)
    if (folder / "run.json").is_file() and not (folder / "config.json").exists():
        run = RunDirectory(folder)
        if not run.model.is_dir():
            raise FistaPrunerError(f"{folder} has no finished checkpoint: go on with 'fistapruner resume {folder}'")
        folder = run.model
    if is_packed(folder):
        raise FistaPrunerError(f"{folder} is packed: unpack it first with 'fistapruner unpack {folder} --out DIR'")
    return permissions.find(folder if folder.is_dir() else model)


def _find_dense(request: RecoverRequest, origin: RunDirectory | None, source: ModelSource) -> ModelSource | None:
    """Find the dense model: as the user says it, else as the input's run or lineage names it.

    Raises:
        FistaPrunerError: the loss needs it and it is not found, or it has changed since.
    """
    permissions, recipe = request.permissions, request.recipe
    if recipe.loss == "ce":
        return None
    if request.dense is not None:
        try:
            return permissions.find(request.dense)
        except FistaPrunerError as error:
            raise FistaPrunerError(f"--dense: {error}") from None
    named: str | Path | None = None
    if origin is not None:
        named = dense_of(origin)
    if named is None:
        lineage, _ = read_lineage(read_pruning_record(source.folder), source.folder)
        named = None if lineage is None else lineage.source.source
    try:
        found = None if named is None else permissions.find(named)
    except FistaPrunerError as error:
        if recipe.loss == "auto":
            return None
        raise FistaPrunerError(f"the dense model: {error}; say where it is with --dense") from None
    if found is not None and origin is not None and (why := _changed_dense(origin, found)) is not None:
        raise FistaPrunerError(f"{why}; name the right one with --dense, or take --loss ce")
    if found is None and recipe.loss != "auto":
        raise FistaPrunerError(
            f"--loss {recipe.loss} needs the dense model, which {source.folder} does not name: give --dense MODEL"
        )
    return found


def _changed_dense(run: RunDirectory, dense: ModelSource) -> str | None:
    """Say that the dense model of the input's run has changed since; None where that is not known."""
    record = run.record()
    noted: tuple[tuple[str, str], ...] = record.decision.stamps if record is not None else ()
    if record is not None and record.kind == "recover":
        recovered = RecoverDirectory(run.folder).record()
        assert recovered is not None
        noted = recovered.decision.dense_stamps
    return changed_files(noted, dense) if noted else None


def resolve(recipe: RecoverRecipe, origin: RunDirectory | None, dense: bool) -> RecoverRecipe:
    """Return the recipe with ``auto`` resolved and the text named.

    Raises:
        FistaPrunerError: the text is not said and the input is no run that names one.
    """
    data = recipe.data
    if data.source is None and not data.tasks:
        known = origin.record() if origin is not None else None
        if known is None or known.calibration is None:
            raise FistaPrunerError("say what to train on with --data: self, python, c4, or a text file")
        tasks = known.calibration.tasks or {}
        said: dict[str, Any] = {"tasks": {name: str(task.source) for name, task in tasks.items()}}
        data = data.model_copy(update=said if len(tasks) > 1 else {"source": known.calibration.source})
    for text in data.tasks.values() if data.tasks else (data.source,):
        check_source(str(text), PURPOSE)
    chosen = {
        "data": _with_absolute_files(data),
        "parameters": "lora" if recipe.parameters == "auto" else recipe.parameters,
        "loss": ("kl" if dense else "ce") if recipe.loss == "auto" else recipe.loss,
    }
    return recipe.model_copy(update=chosen)


def asked(recipe: RecoverRecipe) -> dict[str, Any]:
    """Return all settings as a user asked for them, with absolute paths; ``execution`` is left out."""
    recipe = recipe.model_copy(update={"data": _with_absolute_files(recipe.data)})
    return recipe.model_dump(mode="json", exclude={"execution"})


def _with_absolute_files(data: TrainingData) -> TrainingData:
    def absolute_file(text: str) -> str:
        return os.path.abspath(text) if Path(text).suffix else text

    tasks = {name: absolute_file(text) for name, text in data.tasks.items()}
    return data.model_copy(update={"source": data.source and absolute_file(data.source), "tasks": tasks})


def _operators(
    folder: Path, model: LayerwiseModel, recipe: RecoverRecipe
) -> tuple[Layout, dict[str, str], dict[str, int]]:
    """Find the operators to train and check the claims about their zeros; count their other weights.

    Raises:
        FistaPrunerError: a claim does not hold, or no operator has zeros.
    """
    found = inspect_checkpoint(folder)
    if found.violations:
        raise FistaPrunerError(
            f"{folder} is not what its record claims: {found.violations[0]}; 'fistapruner inspect {folder}' shows all"
        )
    pruned = {operator.name: operator for operator in found.pruned}
    layout = discover(model)
    claims, survivors = {}, {}
    for name, _ in layout.operators():
        operator = pruned.get(model.source(f"{name}.weight"))
        if operator is not None:
            claims[name] = operator.claim or operator.pattern or f"{operator.sparsity:.4%}"
            survivors[name] = operator.weights - operator.zeros
    if not claims:
        raise FistaPrunerError(f"{folder}: no operator has zeros to keep; prune it first")
    layout = layout.only(claims).select(recipe, "train")
    names = {name for name, _ in layout.operators()}
    return layout, {name: claim for name, claim in claims.items() if name in names}, survivors


def _check_precision(model: LayerwiseModel) -> None:
    """Refuse passes that lose range and gain nothing.

    Raises:
        FistaPrunerError: float16 on a CPU.
    """
    if model.device.type == "cpu" and model.dtype == torch.float16:
        most = torch.finfo(torch.float16).max
        raise FistaPrunerError(
            f"dtype float16: it holds no values above {most:,.0f}, and passes on a CPU are no faster in it than in "
            "float32: take float32 or bfloat16"
        )


def _say_rank(recipe: RecoverRecipe, layout: Layout, listener: Listener) -> None:
    sizes = {name: min(operator.rows, operator.columns) for name, operator in layout.operators()}
    smaller = [name for name, size in sizes.items() if size < recipe.rank]
    if recipe.parameters in ("lora", "hira", "spp") and smaller:
        listener.say(
            f"{len(smaller)} of {len(sizes)} operators have no rank {recipe.rank}: that of {smaller[0]} is "
            f"{sizes[smaller[0]]}, which it takes"
        )


def _check_dense(dense: LayerwiseModel, model: LayerwiseModel) -> None:
    """Refuse a dense model whose predictions cannot be compared.

    Raises:
        FistaPrunerError: another vocabulary; both sizes are named.
    """
    theirs, ours = dense.vocabulary, model.vocabulary
    if theirs != ours:
        raise FistaPrunerError(
            f"the dense model {dense.checkpoint.folder} predicts {theirs} tokens, {model.checkpoint.folder} {ours}: "
            "--dense must name the model that was pruned"
        )
    check_model(dense)


def _evaluation_of(origin: RunDirectory | None) -> EvaluationRequest | None:
    """Take the text that the input's run was evaluated on, so that figures can be compared."""
    record = origin.record() if origin is not None else None
    if record is None or record.decision.evaluation is None:
        return None
    seqlen = record.decision.evaluation.seqlen or (record.calibration.seqlen if record.calibration else None)
    return record.decision.evaluation.model_copy(update={"seqlen": seqlen})

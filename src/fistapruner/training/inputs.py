"""Check the input of a run that trains: the pruned model with its zeros, and the dense model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from ..core.constraints import counted_sparsity
from ..errors import A_MODEL, FistaPrunerError, path_text
from ..execution.context import open_model
from ..measure.data import check_data, load_windows
from ..measure.inspection import inspect_checkpoint
from ..models.discovery import discover
from ..models.files.low_rank import LowRankAdapter, refuse_low_rank
from ..models.files.record import lost_structure, read_pruning_record
from ..models.layerwise import LayerwiseModel
from ..models.layout import Layout
from ..models.source import UNTRUSTED, ModelSource, Permissions
from ..models.tokenizer import pad_with_known_token
from ..packed.checkpoint import is_packed
from ..passes.check import check_model
from ..pipeline.begun import evaluation_on
from ..runs.decision import EvaluationRequest
from ..runs.directory import RunDirectory, checkpoint_of
from ..runs.identity import changed_files
from ..runs.lineage import dense_name, lineage_of
from ..runs.listener import Listener
from ..runs.training_directory import TrainingDirectory
from ..runs.training_runs import dense_of, input_run
from ..runtime.formatting import shell_line
from ..runtime.numerics import dtype_name, pass_dtype
from ..settings.training_settings import TrainingRecipe
from ..text.sources import PYTHON
from ..text.windows import window_length
from .masked import has_vectors

TRAINING_SEQLEN = 1024
"""Longest training window by default."""

R = TypeVar("R", bound=TrainingRecipe)


@dataclass(frozen=True)
class TrainingRequest(Generic[R]):
    """What a command asks of a run that trains.

    Args:
        model: run directory or checkpoint, as the user named it.
        recipe: all settings, as asked.
        dense: the dense model, as the user named it; None takes what the input says.
        permissions: what the models' files may do.
        command: shell line that reproduces the run; None where there is none.
        evaluation: the text to evaluate on after the run; None takes that of :func:`evaluation_of`.
        evaluates: evaluate at all.
        evaluation_windows: of the text of the input's run, only its first so many windows; None takes as many as it.
    """

    model: str
    recipe: R
    dense: str | None = None
    permissions: Permissions = UNTRUSTED
    command: str | None = None
    evaluation: EvaluationRequest | None = None
    evaluates: bool = True
    evaluation_windows: int | None = None

    @classmethod
    def of(
        cls,
        model: str | Path,
        recipe: R,
        *,
        dense: str | Path | None,
        permissions: Permissions,
        command: str | None,
        evaluate: str | Path | None,
        evaluate_windows: int | None,
    ) -> TrainingRequest[R]:
        """Make a request of the arguments of a verb's public function."""
        return cls(
            path_text("model", model, A_MODEL),
            recipe,
            None if dense is None else path_text("dense", dense, A_MODEL),
            permissions,
            command,
            None if evaluate == "auto" else evaluation_on(evaluate, evaluate_windows),
            evaluate == "auto",
            evaluate_windows,
        )

    def evaluation_beside(self, known: EvaluationRequest | None) -> EvaluationRequest | None:
        """Return the text to evaluate on, where ``known`` is that of the input's run or of the begun run."""
        found = self.evaluation or (known if self.evaluates else None)
        if found is not None and self.evaluation_windows is not None:
            found = found.model_copy(update={"windows": self.evaluation_windows})
        return found


@dataclass(frozen=True)
class TrainingInputs(Generic[R]):
    """The checked input of a run that trains.

    Args:
        source: the pruned model's folder; ``model``: the model; ``layout``: the operators to train.
        claims: sparsity of each of these, by full name, as the input's record has it or as it was found.
        zeros: of all pruned operators, those that are not trained among them.
        low_rank: the low-rank part that belongs to the model; None where it has none.
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
    zeros: int
    low_rank: LowRankAdapter | None
    dense: LayerwiseModel | None
    dense_source: ModelSource | None
    recipe: R
    tokenizer: Any
    seqlen: int
    evaluation: EvaluationRequest | None
    warnings: list[str]

    def warn(self, listener: Listener, sentence: str) -> None:
        """Say a sentence, and keep it for the report."""
        listener.say(sentence)
        self.warnings.append(sentence)


def check_training_inputs(
    run: TrainingDirectory,
    request: TrainingRequest[R],
    listener: Listener,
    resolve: Callable[[R, RunDirectory | None], R],
    seqlen: tuple[int | None, str],
) -> TrainingInputs[R]:
    """Check everything that can be checked before any long work.

    Args:
        run: the run directory.
        request: what to do.
        listener: receives progress.
        resolve: resolves what the recipe leaves open, from (recipe, the input's run).
        seqlen: tokens in a window, None where they are not said, and how messages call them.

    Raises:
        FistaPrunerError: bad input, named.
    """
    permissions, origin = request.permissions, input_run(request.model)
    evaluation = request.evaluation_beside(evaluation_of(origin) if request.evaluates else None)
    if evaluation is not None:
        check_data(evaluation.data)
    source = find_input(request.model, permissions, verb=run.verb)
    listener.say(f"model {request.model}: {source.folder}")
    listener.tick("opening and checking the model", 0, 1)
    recipe = resolve(request.recipe, origin)
    resolved = replace(request, recipe=recipe)
    dense_source = _find_dense(resolved, origin, source)
    model = open_model(source, recipe)
    if model.dtype == torch.float16:  # which does not hold small gradients
        model = open_model(source, recipe, dtype=dtype_name(pass_dtype(torch.bfloat16, model.device)))
    check_vectors(model, recipe)
    layout, claims, zeros = _operators(source, model, recipe, listener)
    low_rank = LowRankAdapter.beside(source.folder)
    if recipe.zeroth_order and low_rank is not None:
        raise FistaPrunerError(
            f"{source.folder} has a low-rank part: {recipe.optimizer} trains all weights in place, and cannot keep it; "
            "take optimizer adamw"
        )
    check_model(model)
    dense = None
    if dense_source is not None:
        if request.dense is not None:
            refuse_itself(request.dense, dense_source, source)
        refuse_low_rank(dense_source.folder, "--dense")
        dense = open_model(dense_source, recipe, dtype=dtype_name(model.dtype))
        _check_dense(dense, model, resolved)
    tokenizer, length = source.tokenizer(), window_length(seqlen[0], model, TRAINING_SEQLEN, seqlen[1])
    pad_with_known_token(tokenizer, model.embedded_tokens)
    if evaluation is not None:  # a fault in the text shows now
        evaluated = evaluation.seqlen or evaluated_length(origin) or length
        evaluation = evaluation.model_copy(update={"seqlen": evaluated})
        cut = load_windows(evaluation.data, tokenizer, evaluated, evaluation.windows)
        model.check_tokens(cut.tokens)
    return TrainingInputs(
        source=source,
        model=model,
        layout=layout,
        claims=claims,
        zeros=zeros,
        low_rank=low_rank,
        dense=dense,
        dense_source=dense_source,
        recipe=recipe,
        tokenizer=tokenizer,
        seqlen=length,
        evaluation=evaluation,
        warnings=[],
    )


def find_input(model: str, permissions: Permissions, *, verb: str = "recover") -> ModelSource:
    """Find the pruned checkpoint of a run, or any other model.

    Args:
        model: run directory or checkpoint, as the user named it.
        permissions: what the model's files may do.
        verb: that uses it; all but ``recover`` leave out low-rank parts.

    Raises:
        FistaPrunerError: an unfinished run, a damaged checkpoint of one, a packed folder, a low-rank part that the verb
            would leave out, or no such model.
    """
    folder = checkpoint_of(model)
    if is_packed(folder):
        raise FistaPrunerError(f"{folder} is packed: unpack it first with '{shell_line('unpack', folder, 'DIR')}'")
    found = permissions.find(folder if folder.is_dir() else model)
    if verb != "recover":
        refuse_low_rank(found.folder, verb)
    return found


def _find_dense(request: TrainingRequest[Any], origin: RunDirectory | None, source: ModelSource) -> ModelSource | None:
    """Find the dense model: as the user says it, else as the input's run or lineage names it.

    Raises:
        FistaPrunerError: the loss or the text needs it and it is not found, or it has changed since.
    """
    permissions, need = request.permissions, request.recipe.dense_for
    if request.dense is not None:  # also where only the measurements after training need it
        try:
            return permissions.find(request.dense)
        except FistaPrunerError as error:
            raise FistaPrunerError(f"--dense: {error}") from None
    if need is None:
        return None
    named, noted = named_dense(origin, source)
    try:
        found = None if named is None else permissions.find(named)
    except FistaPrunerError as error:
        if not need:
            return None
        raise FistaPrunerError(f"the dense model: {error}; say where it is with --dense") from None
    if found is not None and noted and (why := changed_files(noted, found)) is not None:
        raise FistaPrunerError(f"{why}; name the right one with --dense{request.recipe.without_dense}")
    if found is None and need:
        raise FistaPrunerError(f"{need} needs the dense model, which {source.folder} does not name: give --dense MODEL")
    return found


def named_dense(
    origin: RunDirectory | None, source: ModelSource
) -> tuple[str | Path | None, tuple[tuple[str, str], ...]]:
    """Return the folder or name that the input's run or lineage has of the dense model, and its stamps."""
    known = None if origin is None else dense_of(origin)
    return (dense_name(lineage_of(source.folder)[0]), ()) if known is None else (known.folder, known.stamps)


def refuse_itself(name: str, dense: ModelSource, source: ModelSource) -> None:
    """Refuse a dense model, called ``name`` by the user, that is the model that is trained.

    Raises:
        FistaPrunerError: names it.
    """
    if dense.folder.resolve() == source.folder.resolve():
        raise FistaPrunerError(f"--dense {name} is the model that is trained: name the one that was pruned")


def asked(recipe: TrainingRecipe) -> dict[str, Any]:
    """Return all settings as a user asked for them, with absolute paths; ``execution`` is left out."""
    return recipe.with_absolute_files().model_dump(mode="json", exclude={"execution"})


def _operators(
    source: ModelSource, model: LayerwiseModel, recipe: TrainingRecipe, listener: Listener
) -> tuple[Layout, dict[str, str], int]:
    """Find the operators to train, and check the claims about their zeros; count all zeros.

    They are those with zeros; of a model that lost channels, heads or experts, all.

    Raises:
        FistaPrunerError: a claim does not hold, or no operator has zeros.
    """
    folder = source.folder
    found = inspect_checkpoint(
        folder,
        allow_pickle=source.allow_pickle,
        stacks=model.checkpoint.stacks.values(),
        all_patterns=False,
        parameters=model.parameter_names,
        progress=lambda _, done, total: listener.tick("tensors whose zeros were checked", done, total),
    )
    listener.tick("opening and checking the model", 0, 1)
    if found.violations:
        raise FistaPrunerError(
            f"{folder} is not what its record claims: {found.violations[0]}; "
            f"'{shell_line('inspect', folder)}' shows all"
        )
    inspected = {operator.name: operator for operator in found.operators}
    pruned = {operator.name for operator in found.pruned}
    layout = discover(model)
    smaller = lost_structure(read_pruning_record(folder))
    claims = {}
    for name, _ in layout.operators():
        operator = inspected.get(model.source(f"{name}.weight"))
        if operator is not None and operator.name in pruned:
            claims[name] = operator.claim or operator.pattern or counted_sparsity(operator.zeros, operator.weights)
        elif smaller:
            claims[name] = "0%"
    if not claims:
        raise FistaPrunerError(
            f"{folder}: no operator has zeros to keep; prune it first (its fistapruner.json does not say either that "
            "channels, heads or experts were removed)"
        )
    layout = layout.only(claims).select(recipe, "train")
    names = {name for name, _ in layout.operators()}
    zeros = sum(operator.zeros for operator in found.pruned)
    return layout, {name: claim for name, claim in claims.items() if name in names}, zeros


def check_vectors(model: LayerwiseModel, recipe: TrainingRecipe) -> None:
    """Refuse to train nothing but vectors that a model does not have.

    Raises:
        FistaPrunerError: names the vectors and the model.
    """
    if recipe.parameters == "norms" and not has_vectors(model.layers, recipe.also):
        raise FistaPrunerError(
            f"also {','.join(recipe.also)}: the decoder layers of {model.checkpoint.folder} have no "
            f"{' and no '.join(recipe.also)}, and parameters norms trains nothing else"
        )


def _check_dense(dense: LayerwiseModel, model: LayerwiseModel, request: TrainingRequest[Any]) -> None:
    """Refuse a dense model whose predictions cannot be compared.

    Raises:
        FistaPrunerError: another vocabulary; both sizes are named.
    """
    theirs, ours = dense.vocabulary, model.vocabulary
    if theirs != ours:
        right = "name the model that was pruned with --dense"
        without = request.recipe.without_dense
        if request.dense is not None:
            right, without = "--dense must name the model that was pruned", without and f"{without} without --dense"
        raise FistaPrunerError(
            f"the dense model {dense.checkpoint.folder} predicts {theirs} tokens, {model.checkpoint.folder} {ours}: "
            f"{right}{without}; where tokens were added since, no dense model fits"
        )
    check_model(dense)


def evaluation_of(origin: RunDirectory | None) -> EvaluationRequest | None:
    """Take the text that the input's run was evaluated on, so that figures can be compared.

    Without a run it is ``python``, as ``prune`` has it by default.
    """
    if origin is None:
        return EvaluationRequest(data=PYTHON)
    record = origin.record()
    if record is None or record.decision.evaluation is None:
        return None
    return record.decision.evaluation.model_copy(update={"seqlen": evaluated_length(origin)})


def evaluated_length(origin: RunDirectory | None) -> int | None:
    """Return the length of the windows that the input's run was evaluated on, or was calibrated on."""
    record = origin.record() if origin is not None else None
    if record is None:
        return None
    evaluation, calibration = record.decision.evaluation, record.calibration
    if evaluation is not None and evaluation.seqlen is not None:
        return evaluation.seqlen
    return None if calibration is None else calibration.seqlen

"""Settle a run that trains: check models and text, plan, and write every decision to ``run.json``.

From then on the run can be resumed, and everything that its steps depend on is in its folder or named there with a
checksum.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from ..core.constraints import counted_sparsity
from ..errors import FistaPrunerError
from ..measure.data import check_data, evaluation_documents, load_windows
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
from ..pruning.opened import open_model
from ..pruning.settle import common_fields, numerics_of
from ..pruning.workers import default_threads
from ..runs.directory import TrainingDirectory, checkpoint_of
from ..runs.lineage import dense_name, dense_of, input_run, lineage_of
from ..runs.listener import Listener
from ..runs.records import CalibrationFacts, Recovery
from ..runs.settled import (
    EvaluationRequest,
    TrainingDecision,
    TrainingRecord,
    absolute,
    changed_files,
    evaluation_on,
    fingerprint,
    stamps,
)
from ..runtime.devices import cpu_threads
from ..runtime.files import sha256_file
from ..runtime.numerics import dtype_name, pass_dtype
from ..runtime.show import shell_line
from ..settings.train import TrainingRecipe
from ..text.sources import PYTHON
from ..text.training import TrainingText, shared_documents
from ..text.windows import window_length
from .masked import vectors
from .plan import Plan, plan_training

if TYPE_CHECKING:
    from .opened import Training

TRAINING_SEQLEN = 1024
"""Longest training window by default."""

R = TypeVar("R", bound=TrainingRecipe)


@dataclass(frozen=True)
class Request(Generic[R]):
    """What a command asks of a run that trains; its fields are arguments of :func:`fistapruner.recover`."""

    model: str
    recipe: R
    dense: str | None = None
    permissions: Permissions = UNTRUSTED
    command: str | None = None
    evaluate: str | Path | None = "auto"
    evaluate_windows: int | None = None

    def evaluation(self, decided: TrainingDecision | None) -> EvaluationRequest | None:
        """Return the text to evaluate on: as asked, of the begun run, or of the input's run; or None."""
        origin = input_run(self.model)
        record = None if origin is None else origin.record()
        if self.evaluate != "auto":
            found = evaluation_on(self.evaluate, self.evaluate_windows)
        elif decided is not None:
            found = decided.evaluation
        else:
            found = EvaluationRequest(data=PYTHON) if record is None else record.decision.evaluation
        if found is None:
            return None
        seqlen = found.seqlen
        if record is not None and seqlen is None:  # as the input was evaluated, or calibrated
            seqlen = record.decision.evaluation.seqlen if record.decision.evaluation else None
            seqlen = seqlen or (record.calibration.seqlen if record.calibration else None)
        return found.model_copy(update={"windows": self.evaluate_windows or found.windows, "seqlen": seqlen})


@dataclass
class Inputs(Generic[R]):
    """The checked input of a run that trains.

    Args:
        source: the pruned model's folder; ``model``: the model; ``layout``: the operators to train.
        claims: sparsity of each of these, by full name, as the input's record has it or as it was found.
        zeros: of all pruned operators, those that are not trained among them.
        low_rank: the low-rank part that belongs to the model; None where it has none.
        dense_source, dense: the dense model; None where it is not known.
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
    dense_source: ModelSource | None
    dense: LayerwiseModel | None
    recipe: R
    tokenizer: Any
    seqlen: int
    evaluation: EvaluationRequest | None
    warnings: list[str]


def settle(kind: type[Training], run: TrainingDirectory, request: Request[Any], listener: Listener) -> None:
    """Check the input, plan, cut the text, and write ``recipe.yaml`` and ``run.json``.

    Args:
        kind: what the verb does in its own way.
        run: the run directory.
        request: what to do.
        listener: receives progress.

    Raises:
        FistaPrunerError: bad input, named; or the run does not fit.
    """
    inputs = check_inputs(kind, request, listener)
    listener.tick("planning", 0, 1)
    text, plan = plan_of(kind, inputs, run.folder, listener)
    if plan.refusal:
        raise FistaPrunerError(plan.refusal)
    listener.say(str(plan))
    text = kind.cut(run, inputs, text, listener)
    if inputs.evaluation is not None:
        name = inputs.evaluation.data
        if warning := shared_documents(text.documents, evaluation_documents(name), name):
            listener.say(warning)
            inputs.warnings.append(warning)
    _record(kind, run, request, inputs, text, plan)


def check_inputs(kind: type[Training], request: Request[Any], listener: Listener) -> Inputs[Any]:
    """Check everything that can be checked before any long work.

    Raises:
        FistaPrunerError: bad input, named.
    """
    evaluation = request.evaluation(None)
    if evaluation is not None:
        check_data(evaluation.data)
    kind.check_text(request.recipe)
    source = find_input(request.model, request.permissions, kind.verb)
    listener.say(f"model {request.model}: {source.folder}")
    listener.tick("opening and checking the model", 0, 1)
    recipe = kind.resolved(request, source)
    model = open_model(source, recipe)
    if model.dtype == torch.float16:  # which does not hold small gradients
        model = open_model(source, recipe, dtype=dtype_name(pass_dtype(torch.bfloat16, model.device)))
    if recipe.parameters == "norms" and not any(vectors(layer, recipe.also) for layer in model.layers):
        raise FistaPrunerError(
            f"also {','.join(recipe.also)}: the decoder layers of {source.folder} have no "
            f"{' and no '.join(recipe.also)}, and parameters norms trains nothing else"
        )
    layout, claims, zeros = _operators(source, model, recipe, listener)
    low_rank = LowRankAdapter.beside(source.folder)
    if recipe.zeroth_order and low_rank is not None:
        raise FistaPrunerError(f"{source.folder} has a low-rank part: {recipe.optimizer} cannot keep it; take adamw")
    check_model(model)
    dense_source = _find_dense(request, recipe, source)
    dense = None if dense_source is None else _open_dense(dense_source, source, model, recipe)
    tokenizer = source.tokenizer()
    pad_with_known_token(tokenizer, model.embedded_tokens)
    seqlen = window_length(getattr(recipe.data, kind.window), model, TRAINING_SEQLEN, f"data.{kind.window}")
    if evaluation is not None:  # a fault in the text shows now
        evaluation = evaluation.model_copy(update={"seqlen": evaluation.seqlen or seqlen})
        cut = load_windows(evaluation.data, tokenizer, evaluation.seqlen or seqlen, evaluation.windows)
        model.check_tokens(cut.tokens)
    inputs = Inputs(
        source, model, layout, claims, zeros, low_rank, dense_source, dense, recipe, tokenizer, seqlen, evaluation, []
    )
    kind.check(inputs, request, listener)
    return inputs


def plan_of(
    kind: type[Training], inputs: Inputs[Any], out: Path, listener: Listener
) -> tuple[TrainingText | None, Plan]:
    """Plan the run; the text comes with it where the plan depends on it."""
    text, sizes = kind.sizes(inputs, listener)
    with cpu_threads(default_threads(inputs.recipe.execution)):
        return text, plan_training(inputs.model, inputs.layout, inputs.recipe, out, **sizes)


def find_input(model: str, permissions: Permissions, verb: str) -> ModelSource:
    """Find the pruned checkpoint of a run, or any other model.

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


def named_dense(model: str, source: ModelSource) -> tuple[str | Path | None, tuple[tuple[str, str], ...]]:
    """Return the folder or name that the input's run or lineage has of the dense model, and its stamps."""
    origin = input_run(model)
    known = None if origin is None else dense_of(origin)
    return (dense_name(lineage_of(source.folder)[0]), ()) if known is None else (known.folder, known.stamps)


def _find_dense(request: Request[Any], recipe: TrainingRecipe, source: ModelSource) -> ModelSource | None:
    """Find the dense model as the user, or the input's run or lineage, names it; None where none does.

    Raises:
        FistaPrunerError: the loss or the text needs it and it is not found, or it has changed since.
    """
    need = recipe.dense_for
    named, noted = (request.dense, ()) if request.dense is not None else named_dense(request.model, source)
    if request.dense is None and need is None:
        return None
    try:
        found = None if named is None else request.permissions.find(named)
    except FistaPrunerError as error:
        if request.dense is None and not need:
            return None
        raise FistaPrunerError(f"--dense: {error}") from None
    if found is not None and noted and (why := changed_files(noted, found)) is not None:
        raise FistaPrunerError(f"{why}; name the right one with --dense")
    if found is None and need:
        raise FistaPrunerError(f"{need} needs the dense model, which {source.folder} does not name: give --dense MODEL")
    return found


def _open_dense(
    found: ModelSource, source: ModelSource, model: LayerwiseModel, recipe: TrainingRecipe
) -> LayerwiseModel:
    """Open the dense model.

    Raises:
        FistaPrunerError: it is the model that is trained, has a low-rank part or another vocabulary.
    """
    if found.folder.resolve() == source.folder.resolve():
        raise FistaPrunerError(f"--dense {found.folder} is the model that is trained: name the one that was pruned")
    refuse_low_rank(found.folder, "--dense")
    dense = open_model(found, recipe, dtype=dtype_name(model.dtype))
    if dense.vocabulary != model.vocabulary:
        raise FistaPrunerError(
            f"the dense model {found.folder} predicts {dense.vocabulary} tokens, {source.folder} {model.vocabulary}: "
            "name the model that was pruned with --dense; where tokens were added since, no dense model fits"
        )
    check_model(dense)
    return dense


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
        progress=lambda _, done, total: listener.tick("tensors whose zeros were checked", done, total),
    )
    if found.violations:
        raise FistaPrunerError(
            f"{folder} is not what its record claims: {found.violations[0]}; "
            f"'{shell_line('inspect', folder)}' shows all"
        )
    inspected = {operator.name: operator for operator in found.operators}
    pruned = {operator.name for operator in found.pruned}
    layout, smaller, claims = discover(model), lost_structure(read_pruning_record(folder)), {}
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


def _record(
    kind: type[Training],
    run: TrainingDirectory,
    request: Request[Any],
    inputs: Inputs[Any],
    text: TrainingText,
    plan: Plan,
) -> None:
    """Write ``recipe.yaml`` and ``run.json``."""
    recipe: TrainingRecipe = inputs.recipe
    numerics = numerics_of(inputs.model, recipe.execution, plan.batch_size)
    decision = TrainingDecision(
        model=absolute(request.model),
        folder=inputs.source.folder.absolute(),
        stamps=tuple(stamps(inputs.model.checkpoint)),
        numerics=numerics,
        evaluation=inputs.evaluation,
        asked=asked(request.recipe),
        dense=inputs.dense_source and inputs.dense_source.folder.absolute(),
        dense_stamps=tuple(stamps(inputs.dense.checkpoint)) if inputs.dense else (),
        checkpointing=plan.checkpointing,
        operators=inputs.claims,
        zeros=inputs.zeros,
        low_rank=None if inputs.low_rank is None else inputs.low_rank.sampled,
        windows_sha256=sha256_file(run.windows_file),
        steps=plan.steps,
    )
    sides = {
        side: [task[side]["documents"] for task in text.facts["tasks"].values()] for side in ("trained", "held_out")
    }
    documents = {side: None if None in counts else sum(counts) for side, counts in sides.items()}
    recovery = Recovery(
        parameters=recipe.parameters,
        optimizer=recipe.optimizer,
        loss=recipe.loss,
        asked_steps=plan.steps,
        windows=len(text.windows("trained")),
        held_out_windows=len(text.windows("held_out")),
        documents=documents["trained"],
        held_out_documents=documents["held_out"],
    )
    windows = {"samples": len(text.tokens), "seqlen": text.tokens.shape[1], "tokens": text.tokens.numel()}
    how = "; ".join(dict.fromkeys(task["how"] for task in text.facts["tasks"].values()))
    facts = {"source": ", ".join(text.tasks), **text.facts, **windows, "how": how}
    run.write_recipe(recipe.to_yaml())
    run.write_record(
        TrainingRecord(
            kind=run.verb,
            **common_fields(request, inputs, recipe, numerics.threads),
            fingerprint=identity(recipe, inputs.model, text, decision),
            calibration=CalibrationFacts.model_validate(facts),
            recovery=recovery,
            decision=decision,
        )
    )


def asked(recipe: TrainingRecipe) -> dict[str, Any]:
    """Return all settings as a user asked for them, with absolute paths; ``execution`` is left out."""
    return recipe.with_absolute_files().model_dump(mode="json", exclude={"execution"})


def identity(recipe: TrainingRecipe, model: LayerwiseModel, text: TrainingText, decision: TrainingDecision) -> str:
    """Hash what decides the run's result."""
    more = [list(decision.dense_stamps), sorted(decision.operators), decision.windows_sha256, decision.steps]
    low_rank = [] if decision.low_rank is None else [decision.low_rank]
    return fingerprint(recipe, model.checkpoint, text.tokens, decision.numerics, *more, *low_rank)

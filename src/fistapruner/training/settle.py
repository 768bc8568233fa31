"""Settle a run that trains: check models and text, plan, and write every decision to ``run.json``.

From then on the run can be resumed, and everything that its steps depend on is in its folder or named there with a
checksum.
"""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.constraints import counted_sparsity
from ..errors import FistaPrunerError
from ..measure.data import check_data, evaluation_documents, load_windows
from ..measure.inspection import inspect_checkpoint
from ..models.layers import LayerwiseModel
from ..models.low_rank import LowRankAdapter
from ..models.operators import Layout, discover
from ..models.record import lost_structure, read_pruning_record, refuse_low_rank
from ..models.source import UNTRUSTED, ModelSource, Permissions, pad_with_known_token
from ..packed.checkpoint import is_packed
from ..passes.stream import check_model
from ..pruning.context import open_model
from ..pruning.settle import common_fields, numerics_of
from ..pruning.workers import default_threads
from ..runs.directory import TrainingDirectory, checkpoint_of
from ..runs.lineage import dense_name, dense_of, input_run, lineage_of
from ..runs.log import Listener
from ..runs.records import CalibrationFacts
from ..runs.records import Recovery as RecoveryFacts
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
from .plan import Plan, plan_training

if TYPE_CHECKING:
    from .recovery import Recovery

TRAINING_SEQLEN = 1024
"""Longest training window by default."""


@dataclass(frozen=True)
class Request:
    """What a command asks of a run that trains; its fields are arguments of :func:`fistapruner.recover`."""

    model: str
    recipe: Any
    dense: str | None = None
    permissions: Permissions = UNTRUSTED
    command: str | None = None
    evaluate: str | Path | None = "auto"
    evaluate_windows: int | None = None

    def evaluation(self, decided: TrainingDecision | None = None) -> EvaluationRequest | None:
        """Return the text to evaluate on: as asked, of the begun run, or of the input's run; or None."""
        origin = input_run(self.model)
        record = None if origin is None else origin.record()
        before = None if record is None else record.decision.evaluation
        if self.evaluate != "auto":
            found = evaluation_on(self.evaluate, self.evaluate_windows)
        else:
            found = before if record else EvaluationRequest(data=PYTHON)
            found = decided.evaluation if decided is not None else found
        if found is None:
            return None
        seqlen = found.seqlen or (before.seqlen if before else None)  # as the input was evaluated, or calibrated
        if seqlen is None and record is not None and record.calibration is not None:
            seqlen = record.calibration.seqlen
        return found.model_copy(update={"windows": self.evaluate_windows or found.windows, "seqlen": seqlen})


@dataclass
class Inputs:
    """The checked input of a run that trains, and its plan.

    Args:
        source: the pruned model's folder; ``model``: the model; ``layout``: the operators to train.
        claims: sparsity of each of these, by full name, as the input's record has it or as it was found.
        zeros: of all pruned operators, those that are not trained among them.
        dense_source, dense: the dense model; None where it is not known.
        recipe: all settings, resolved.
        tokenizer: of the model; ``seqlen``: tokens in a window.
        evaluation: the text to evaluate on.
        warnings: for the report.
        text: the training text, where it is cut before the plan.
    """

    source: ModelSource
    model: LayerwiseModel
    layout: Layout
    claims: dict[str, str]
    zeros: int
    dense_source: ModelSource | None
    dense: LayerwiseModel | None
    recipe: Any
    tokenizer: Any
    seqlen: int
    evaluation: EvaluationRequest | None
    warnings: list[str] = field(default_factory=list)
    text: TrainingText | None = None


def settle(kind: type[Recovery], run: TrainingDirectory, request: Request, listener: Listener) -> None:
    """Check the input, plan, cut the text, and write ``recipe.yaml`` and ``run.json``.

    Raises:
        FistaPrunerError: bad input, named; or the run does not fit.
    """
    inputs, plan = check_inputs(kind, request, run.folder, listener)
    if plan.refusal:
        raise FistaPrunerError(plan.refusal)
    listener.say(str(plan))
    text = inputs.text or kind.cut(inputs, listener)
    run.write_text(text)
    if inputs.evaluation is not None:
        name = inputs.evaluation.data
        if warning := shared_documents(text.documents, evaluation_documents(name), name):
            listener.say(warning)
            inputs.warnings.append(warning)
    _record(run, request, inputs, text, plan)


def check_inputs(kind: type[Recovery], request: Request, out: Path, listener: Listener) -> tuple[Inputs, Plan]:
    """Check everything that can be checked before any long work, and plan.

    Raises:
        FistaPrunerError: bad input, named.
    """
    evaluation = request.evaluation()
    if evaluation is not None:
        check_data(evaluation.data)
    kind.check_text(request.recipe)
    keeps_low_rank = kind.verb == "recover" and not request.recipe.zeroth_order
    source = find_input(request.model, request.permissions, None if keeps_low_rank else kind.verb)
    listener.say(f"model {request.model}: {source.folder}")
    listener.tick("opening and checking the model", 0, 1)
    recipe = kind.resolved(request).with_absolute_files()
    model = open_model(source, recipe)
    if model.dtype == torch.float16:  # which does not hold small gradients
        model = open_model(source, recipe, dtype=dtype_name(pass_dtype(torch.bfloat16, model.device)))
    layout, claims, zeros = _operators(source, model, recipe, listener)
    check_model(model)
    dense_source, dense = _dense(request, recipe, source, model)
    tokenizer = source.tokenizer()
    pad_with_known_token(tokenizer, model.embedded_tokens)
    seqlen = window_length(getattr(recipe.data, kind.window), model, TRAINING_SEQLEN, f"data.{kind.window}")
    if evaluation is not None:  # a fault in the text shows now
        evaluation = evaluation.model_copy(update={"seqlen": evaluation.seqlen or seqlen})
        cut = load_windows(evaluation.data, tokenizer, evaluation.seqlen or seqlen, evaluation.windows)
        model.check_tokens(cut.tokens)
    inputs = Inputs(source, model, layout, claims, zeros, dense_source, dense, recipe, tokenizer, seqlen, evaluation)
    sizes = kind.check(inputs, request, listener)
    listener.tick("planning", 0, 1)
    with cpu_threads(default_threads(recipe.execution)):
        return inputs, plan_training(model, layout, inputs.recipe, out, **sizes)


def find_input(model: str, permissions: Permissions, drops_low_rank: str | None) -> ModelSource:
    """Find the pruned checkpoint of a run, or any other model.

    Raises:
        FistaPrunerError: an unfinished run, a damaged checkpoint of one, a packed folder, no such model, or a low-rank
            part, which ``drops_low_rank`` would leave out.
    """
    folder = checkpoint_of(model)
    if is_packed(folder):
        raise FistaPrunerError(f"{folder} is packed: unpack it first with '{shell_line('unpack', folder, 'DIR')}'")
    found = permissions.find(folder if folder.is_dir() else model)
    if drops_low_rank is not None:
        refuse_low_rank(found.folder, drops_low_rank)
    return found


def named_dense(model: str, source: ModelSource) -> tuple[str | Path | None, tuple[tuple[str, str], ...]]:
    """Return the folder or name that the input's run or lineage has of the dense model, and its stamps."""
    origin = input_run(model)
    known = dense_of(origin)
    return (dense_name(lineage_of(source.folder)), ()) if known is None else (known.folder, known.stamps)


def _dense(
    request: Request, recipe: TrainingRecipe, source: ModelSource, model: LayerwiseModel
) -> tuple[ModelSource | None, LayerwiseModel | None]:
    """Find and open the dense model that the user, the input's run or its lineage names.

    Raises:
        FistaPrunerError: it is needed and not found; it has changed, has a low-rank part or another vocabulary, or is
            the model that is trained.
    """
    need, found = recipe.dense_for, None
    named, noted = named_dense(request.model, source) if request.dense is None else (request.dense, ())
    with suppress(FistaPrunerError) if request.dense is None else nullcontext():
        found = request.permissions.find(named) if named and (need is not None or request.dense) else None
    if found is None:
        if need:
            where = "does not name" if named is None else f"names as {named}, where it is not"
            raise FistaPrunerError(f"{need} needs the dense model, which {source.folder} {where}: give --dense MODEL")
        return None, None
    refuse_low_rank(found.folder, "--dense")
    dense = open_model(found, recipe, dtype=dtype_name(model.dtype))
    fault = changed_files(noted, found) if noted else None
    if found.folder.resolve() == source.folder.resolve():
        fault = f"{found.folder} is the model that is trained"
    elif dense.vocabulary != model.vocabulary:
        fault = f"{found.folder} predicts {dense.vocabulary} tokens, {source.folder} {model.vocabulary}"
    if fault:
        raise FistaPrunerError(f"the dense model {fault}: name the model that was pruned with --dense")
    check_model(dense)
    return found, dense


def _operators(
    source: ModelSource, model: LayerwiseModel, recipe: TrainingRecipe, listener: Listener
) -> tuple[Layout, dict[str, str], int]:
    """Find the operators to train, and check the claims about their zeros; count all zeros.

    They are those with zeros; of a model that lost channels, heads or experts, all.
    """
    folder = source.folder
    found = inspect_checkpoint(
        folder,
        allow_pickle=source.allow_pickle,
        progress=lambda _, done, total: listener.tick("tensors whose zeros were checked", done, total),
    )
    fault = None
    if found.violations:
        fault = f"is not what its record claims: {found.violations[0]}; '{shell_line('inspect', folder)}' shows all"
    pruned = {operator.name: operator for operator in found.pruned}
    layout, smaller, claims = discover(model), lost_structure(read_pruning_record(folder)), {}
    for name, _ in layout.operators():
        if (operator := pruned.get(model.source(f"{name}.weight"))) is not None:
            claims[name] = operator.claim or operator.pattern or counted_sparsity(operator.zeros, operator.weights)
        elif smaller:
            claims[name] = "0%"
    if fault is None and not claims:
        fault = "has no operator with zeros to keep; prune it first"
    if fault is not None:
        raise FistaPrunerError(f"{folder} {fault}")
    layout = layout.only(claims).select(recipe, "train")
    names = {name for name, _ in layout.operators()}
    zeros = sum(operator.zeros for operator in found.pruned)
    return layout, {name: claim for name, claim in claims.items() if name in names}, zeros


def _record(run: TrainingDirectory, request: Request, inputs: Inputs, text: TrainingText, plan: Plan) -> None:
    """Write ``recipe.yaml`` and ``run.json``."""
    recipe: TrainingRecipe = inputs.recipe
    numerics = numerics_of(inputs.model, recipe.execution, plan.batch_size)
    low_rank = LowRankAdapter.beside(inputs.source.folder)
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
        low_rank=None if low_rank is None else low_rank.sampled,
        windows_sha256=sha256_file(run.text_file),
        steps=plan.steps,
    )
    tasks = text.facts["tasks"].values()
    read = {side: [task[side]["documents"] for task in tasks] for side in ("trained", "held_out")}
    documents = {side: None if None in counts else sum(counts) for side, counts in read.items()}
    recovery = RecoveryFacts(
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
    how = "; ".join(dict.fromkeys(task["how"] for task in tasks))
    facts = {"source": ", ".join(text.tasks), **text.facts, **windows, "how": how}
    run.write_recipe(recipe.to_yaml())
    run.write_record(
        TrainingRecord(
            kind=run.verb,
            **common_fields(request, inputs, recipe, numerics.threads, lineage_of(inputs.source.folder)),
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

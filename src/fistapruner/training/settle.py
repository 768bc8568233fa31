"""Settle a run that trains: check models and text, plan, and write every decision to ``run.json``.

From then on the run can be resumed, and everything that its steps depend on is in its folder or named there with a
checksum.
"""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.constraints import counted_sparsity
from ..errors import FistaPrunerError
from ..measure.data import check_data, load_windows
from ..measure.inspection import inspect_checkpoint
from ..measure.run import shared_text
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
from ..runs import settled
from ..runs.directory import TrainingDirectory, checkpoint_of
from ..runs.lineage import dense_name, dense_of, input_run, lineage_of
from ..runs.log import Listener
from ..runs.records import CalibrationFacts
from ..runs.records import Recovery as RecoveryFacts
from ..runtime.devices import cpu_threads
from ..runtime.files import sha256_file
from ..runtime.numerics import dtype_name, pass_dtype
from ..runtime.show import shell_line
from ..settings.train import TrainingRecipe
from ..text.sources import PYTHON
from ..text.training import TrainingText
from ..text.windows import window_length
from .plan import plan_training

if TYPE_CHECKING:
    from .recovery import Recovery

TRAINING_SEQLEN = 1024
"""Longest training window by default."""


@dataclass(frozen=True)
class Request:
    """What a command asks of a run that trains: arguments of :func:`fistapruner.recover`."""

    verb: type[Recovery]
    run: TrainingDirectory
    model: str
    recipe: Any
    dense: str | None = None
    permissions: Permissions = UNTRUSTED
    command: str | None = None
    evaluate: str | Path | None = "auto"
    evaluate_windows: int | None = None

    @property
    def origin(self) -> settled.RunRecord | None:
        """The record of the run that made the model; None where it is of none."""
        run = input_run(self.model)
        return None if run is None else run.record()

    @property
    def asked(self) -> dict[str, Any]:
        """All settings as a user asked for them, with absolute paths."""
        settings: dict[str, Any] = self.recipe.with_absolute_files().model_dump(mode="json")
        return settings

    def evaluation(self, begun: settled.TrainingRecord | None = None) -> settled.EvaluationRequest | None:
        """Return the text to evaluate on: as asked, of the begun run, or of the input's run; or None."""
        origin = self.origin
        before = origin.decision.evaluation if origin else None
        if self.evaluate != "auto":
            found = settled.evaluation_on(self.evaluate, self.evaluate_windows)
        elif begun is not None:
            found = begun.decision.evaluation
        else:
            found = before if origin else settled.EvaluationRequest(data=PYTHON)
        if found is None:
            return None
        seqlen = found.seqlen or (before.seqlen if before else None)  # as the input was evaluated, or calibrated
        if seqlen is None and origin is not None and origin.calibration is not None:
            seqlen = origin.calibration.seqlen
        return found.model_copy(update={"windows": self.evaluate_windows or found.windows, "seqlen": seqlen})


def find_input(model: str, permissions: Permissions, drops_low_rank: str | None) -> ModelSource:
    """Find the pruned checkpoint of a run, or any other model.

    A packed one is refused, and one with a low-rank part, which ``drops_low_rank`` would leave out.
    """
    folder = checkpoint_of(model)
    if is_packed(folder):
        raise FistaPrunerError(f"{folder} is packed: unpack it first with '{shell_line('unpack', folder, 'DIR')}'")
    found = permissions.find(folder if folder.is_dir() else model)
    if drops_low_rank is not None:
        refuse_low_rank(found.folder, drops_low_rank)
    return found


class Settling:
    """A run that trains on its way to ``run.json``: what a command asks is checked, and the run planned.

    Nothing is written yet. ``dense`` is None where the dense model is not known, or not found under the name ``named``;
    ``claims`` is the sparsity of the operators to train, by full name, and ``zeros`` counts those of all operators.
    """

    def __init__(self, request: Request, listener: Listener) -> None:
        verb, self.request, self.listener = request.verb, request, listener
        self.evaluation, self.warnings = request.evaluation(), list[str]()
        self.text: TrainingText | None = None
        if self.evaluation is not None:
            check_data(self.evaluation.data)
        self.recipe = recipe = verb.resolved(request).with_absolute_files()
        keeps_low_rank = recipe.verb == "recover" and not recipe.zeroth_order
        self.source = find_input(request.model, request.permissions, None if keeps_low_rank else recipe.verb)
        if not getattr(recipe.data, verb.texts):
            raise FistaPrunerError(f"say what to train on with --data: {verb.choices}")
        listener.say(f"model {request.model}: {self.source.folder}")
        listener.tick("opening and checking the model", 0, 1)
        self.model = model = open_model(self.source, recipe)
        if model.dtype == torch.float16:  # which does not hold small gradients
            dtype = dtype_name(pass_dtype(torch.bfloat16, model.device))
            self.model = model = open_model(self.source, recipe, dtype=dtype)
        layout = self._operators()
        check_model(model)
        self._find_dense()
        self.tokenizer = self.source.tokenizer()
        pad_with_known_token(self.tokenizer, model.embedded_tokens)
        given = getattr(recipe.data, verb.window)
        self.seqlen = window_length(given, model, TRAINING_SEQLEN, f"data.{verb.window}")
        if (found := self.evaluation) is not None:  # a fault in the text shows now
            length = found.seqlen or self.seqlen
            self.evaluation = found.model_copy(update={"seqlen": length})
            model.check_tokens(load_windows(found.data, self.tokenizer, length, found.windows).tokens)
        sizes = verb.check(self)
        listener.tick("planning", 0, 1)
        with cpu_threads(default_threads(recipe.execution)):
            self.plan = plan_training(model, layout, self.recipe, request.run.folder, **sizes)

    def warn(self, sentence: str) -> None:
        """Say a warning, now and in the report."""
        self.listener.say(sentence)
        self.warnings.append(sentence)

    def _operators(self) -> Layout:
        """Find the operators to train, which have zeros; of a model that lost channels, heads or experts, all."""
        folder, model, tick = self.source.folder, self.model, self.listener.tick
        found = inspect_checkpoint(
            folder,
            allow_pickle=self.source.allow_pickle,
            progress=lambda _, done, total: tick("tensors whose zeros were checked", done, total),
        )
        pruned = {operator.name: operator for operator in found.pruned}
        layout, smaller, claims = discover(model), lost_structure(read_pruning_record(folder)), dict[str, str]()
        for name, _ in layout.operators():
            if (each := pruned.get(model.source(f"{name}.weight"))) is not None:
                claims[name] = each.claim or each.pattern or counted_sparsity(each.zeros, each.weights)
            elif smaller:
                claims[name] = "0%"
        fault = None if claims else "has no operator with zeros to keep; prune it first"
        if found.violations:
            fault = f"is not what its record claims: {found.violations[0]}; '{shell_line('inspect', folder)}' shows all"
        if fault is not None:
            raise FistaPrunerError(f"{folder} {fault}")
        layout = layout.only(claims).select(self.recipe, "train")
        self.claims = {name: claims[name] for name, _ in layout.operators()}
        self.zeros = sum(operator.zeros for operator in found.pruned)
        return layout

    def _find_dense(self) -> None:
        """Find and open the dense model that the user, the input's run or its lineage names."""
        request, need, folder = self.request, self.recipe.dense_for, self.source.folder
        self.dense_source: ModelSource | None = None
        self.dense: LayerwiseModel | None = None
        known = None if request.dense else dense_of(input_run(request.model))
        self.named = request.dense or (str(known.folder) if known else dense_name(lineage_of(folder)))
        if self.named and (need is not None or request.dense):
            with suppress(FistaPrunerError) if request.dense is None else nullcontext():
                self.dense_source = request.permissions.find(self.named)
        if self.dense_source is None:
            if need:
                where = "does not name" if self.named is None else f"names as {self.named}, where it is not"
                raise FistaPrunerError(f"{need} needs the dense model, which {folder} {where}: give --dense MODEL")
            return
        found = self.dense_source
        refuse_low_rank(found.folder, "--dense")
        self.dense = dense = open_model(found, self.recipe, dtype=dtype_name(self.model.dtype))
        fault = settled.changed_files(known.stamps, found) if known and known.stamps else None
        if found.folder.resolve() == folder.resolve():
            fault = f"{found.folder} is the model that is trained"
        elif dense.vocabulary != self.model.vocabulary:
            fault = f"{found.folder} predicts {dense.vocabulary} tokens, {folder} {self.model.vocabulary}"
        if fault:
            raise FistaPrunerError(f"the dense model {fault}: name the model that was pruned with --dense")
        check_model(dense)

    def write(self) -> None:
        """Cut the text, and write it, ``recipe.yaml`` and ``run.json``; a run that does not fit is refused."""
        if self.plan.refusal:
            raise FistaPrunerError(self.plan.refusal)
        self.listener.say(str(self.plan))
        request, run, recipe, model = self.request, self.request.run, self.recipe, self.model
        text = self.text or request.verb.cut(self)
        run.write_text(text)
        if self.evaluation is not None and not len(text.test):  # pairs are no documents
            sources = [task["source"] for task in text.facts["tasks"].values()]
            if warning := shared_text(sources, self.evaluation.data, training=True):
                self.warn(warning)
        numerics = numerics_of(model, recipe.execution, self.plan.batch_size)
        low_rank = LowRankAdapter.beside(self.source.folder)
        decision = settled.TrainingDecision(
            model=settled.absolute(request.model),
            folder=self.source.folder.absolute(),
            stamps=tuple(settled.stamps(model.checkpoint)),
            numerics=numerics,
            evaluation=self.evaluation,
            asked=request.asked,
            dense=self.dense_source and self.dense_source.folder.absolute(),
            dense_stamps=tuple(settled.stamps(self.dense.checkpoint)) if self.dense else (),
            checkpointing=self.plan.checkpointing,
            operators=self.claims,
            zeros=self.zeros,
            low_rank=None if low_rank is None else low_rank.sampled,
            windows_sha256=sha256_file(run.text_file),
            steps=self.plan.steps,
        )
        run.write_record(
            settled.TrainingRecord(
                kind=run.verb,
                **common_fields(request, self, recipe, numerics.threads, lineage_of(self.source.folder)),
                fingerprint=identity(recipe, model, text, decision),
                **_facts(recipe, text, self.plan.steps),
                decision=decision,
            ),
            recipe.to_yaml(),
        )


def _facts(recipe: Any, text: TrainingText, steps: int) -> dict[str, Any]:
    """Describe the text and what is trained, for the report."""
    tasks = text.facts["tasks"].values()
    read = {side: [task[side]["documents"] for task in tasks] for side in ("trained", "held_out")}
    documents = {side: None if None in counts else sum(counts) for side, counts in read.items()}
    windows = {"samples": len(text.tokens), "seqlen": text.tokens.shape[1], "tokens": text.tokens.numel()}
    how = "; ".join(dict.fromkeys(task["how"] for task in tasks))
    recovery = RecoveryFacts(
        parameters=recipe.parameters,
        optimizer=recipe.optimizer,
        loss=recipe.loss,
        asked_steps=steps,
        windows=len(text.windows("trained")),
        held_out_windows=len(text.windows("held_out")),
        documents=documents["trained"],
        held_out_documents=documents["held_out"],
    )
    facts = {"source": ", ".join(text.tasks), **text.facts, **windows, "how": how}
    return {"calibration": CalibrationFacts.model_validate(facts), "recovery": recovery}


def identity(
    recipe: TrainingRecipe, model: LayerwiseModel, text: TrainingText, decision: settled.TrainingDecision
) -> str:
    """Hash what decides the run's result."""
    more = [list(decision.dense_stamps), sorted(decision.operators), decision.windows_sha256, decision.steps]
    low_rank = [] if decision.low_rank is None else [decision.low_rank]
    return settled.fingerprint(recipe, model.checkpoint, text.tokens, decision.numerics, *more, *low_rank)

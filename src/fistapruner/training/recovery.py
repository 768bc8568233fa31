"""A run that trains: what a command asks is settled and planned, then the run is opened and trained.

Everything that the steps depend on is in the run's folder, or named there with a checksum, once ``run.json`` is
written. What :class:`Recovery` says of text and loss is of ``recover``;
:class:`~fistapruner.training.alignment.Alignment` says what ``align`` does in another way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.constraints import counted_sparsity
from ..errors import FistaPrunerError
from ..measure.data import check_data, load_windows
from ..measure.inspection import inspect_checkpoint
from ..measure.run import shared_text
from ..models.layers import LayerwiseModel
from ..models.low_rank import LowRankAdapter
from ..models.operators import discover
from ..models.record import lost_structure, read_pruning_record, refuse_low_rank
from ..models.source import UNTRUSTED, ModelSource, Permissions, pad_with_known_token
from ..packed.checkpoint import refuse_packed
from ..papers.mamf import Mixture
from ..papers.mezo import RATE, ForwardOnly, standard_normal
from ..papers.subzero import subspace_normal
from ..passes.stream import check_model
from ..pruning.context import open_model
from ..pruning.settle import common_fields, numerics_of
from ..pruning.workers import default_threads
from ..runs import settled
from ..runs.directory import TrainingDirectory, checkpoint_of
from ..runs.lineage import dense_name, dense_of, input_run, lineage_of
from ..runs.log import Listener, read_steps
from ..runs.records import CalibrationFacts, Report
from ..runs.records import Recovery as RecoveryFacts
from ..runtime.devices import cpu_threads, release_memory
from ..runtime.files import sha256_file
from ..runtime.numerics import dtype_name, pass_dtype
from ..runtime.show import count, shell_line
from ..settings.align import PREFERENCE_LOSSES
from ..settings.train import RecoverRecipe
from ..text.generate import load_writer
from ..text.sources import PYTHON, check_source
from ..text.training import MAX_HELD_OUT_WINDOWS, PURPOSE, TrainingText, order, training_text
from ..text.windows import window_length
from .distributed import ShardedSnapshots, World
from .loop import Loop, State
from .loss import Objective, Teacher
from .masked import Trained, descent_of
from .plan import Plan, plan_training

TRAINING_SEQLEN = 1024  # longest window by default


@dataclass(frozen=True)
class Request:
    """What a command asks of a run that trains: arguments of :func:`fistapruner.recover`."""

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
    def asked(self) -> Any:
        """All settings as a user asked for them, with absolute paths."""
        return self.recipe.with_absolute_files().model_dump(mode="json")

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
    """Find a run's checkpoint or any model that is not packed; ``drops_low_rank`` refuses a low-rank part."""
    folder = checkpoint_of(model)
    refuse_packed(folder)
    found = permissions.find(folder if folder.is_dir() else model)
    if drops_low_rank is not None:
        refuse_low_rank(found.folder, drops_low_rank)
    return found


class Recovery:
    """A run of ``recover``: settled and written, then opened and trained.

    Attributes:
        model: the pruned model that goes in; ``layout``: its operators that are trained.
        source, dense_source, dense: of a run that is settled, the files of both models, and the opened dense model;
            None where it is not known, or not found as ``named``.
        claims: sparsity of the operators to train; ``zeros`` counts those of all; ``passes``: arguments of objectives.
    """

    settings: ClassVar[type[Any]] = RecoverRecipe
    texts: ClassVar[str] = "source"  # name in ``data`` of what is trained on
    choices: ClassVar[str] = "self, python, c4, or a text file"
    window: ClassVar[str] = "seqlen"  # name in ``data`` of the tokens in a window
    progress: ClassVar[str] = "recovery steps"

    def __init__(self, request: Request, listener: Listener, world: World | None = None) -> None:
        self.request, self.listener, self.world = request, listener, world or World()
        self.run, self.recipe, self.permissions = request.run, request.recipe, request.permissions
        self.text: Any = None
        self.warnings = list[str]()

    # --- what a verb does in its own way

    def resolved(self) -> Any:
        """Return the recipe with its text, checked: that of the input's run where the user names none."""
        recipe, data = self.recipe, self.recipe.data
        origin = None if data.sources else self.request.origin
        if origin is not None and origin.calibration is not None and origin.kind != "align":  # pairs are no text
            tasks = {name: str(task.source) for name, task in origin.calibration.tasks.items()}
            single = next(iter(tasks.values()), origin.calibration.source)
            data = data.model_copy(update={"source": tasks if len(tasks) > 1 else single})
        for text in data.sources.values():
            check_source(text, f"{PURPOSE} source")
        return recipe.model_copy(update={"data": data})

    def check(self) -> dict[str, int]:
        """Check and resolve what is left, with the models open; return the sizes that the plan needs."""
        recipe, seqlen = self.recipe, self.seqlen
        if recipe.loss == "auto":
            if self.dense is None:
                why = "is not known" if self.named is None else f"is not found, which was {self.named}"
                self.warn(f"the dense model {why}: the loss is that of the text (ce); better give --dense")
            self.recipe = recipe = recipe.model_copy(update={"loss": "ce" if self.dense is None else "kl"})
        steps, windows, a_step = recipe.steps_of(seqlen), recipe.windows_of(seqlen), recipe.windows_per_step
        if (tasks := len(recipe.data.sources)) > 1:
            mixture = Mixture(tasks, recipe.data.per_round)
            enough = f"at least {-(-mixture.least // a_step)} steps and {mixture.least * seqlen} tokens"
            mixture.draw(min(steps * a_step, windows), enough)
        stored = 0 if recipe.loss == "ce" else windows + MAX_HELD_OUT_WINDOWS
        return {"seqlen": seqlen, "steps": steps, "stored": stored, "held_out": MAX_HELD_OUT_WINDOWS}

    def cut(self) -> TrainingText:
        """Read or generate the text, hold documents out, and cut windows; it may take long."""
        recipe, data, seqlen, say = self.recipe, self.recipe.data, self.seqlen, self.listener.say
        windows = recipe.windows_of(seqlen)

        def load_model() -> Any:
            source, model = self.dense_source or self.source, self.dense or self.model
            most = windows + MAX_HELD_OUT_WINDOWS
            return load_writer(source, model, most, seqlen, recipe.execution.memory_limit, "--data")

        tokens = count(min(data.tokens, windows * seqlen))
        say(f"training text: {tokens} tokens in windows of {seqlen} from {', '.join(data.sources.values())}")
        with cpu_threads(default_threads(recipe.execution)):
            made = training_text(data, self.tokenizer, seqlen, load_model, say, windows)
        self.model.check_tokens(made.tokens)
        release_memory()  # documents
        return made

    def order(self) -> Tensor:
        """Draw the (steps, windows) numbers of the windows of every step."""
        return order(self.text, self.decision.steps, self.recipe.windows_per_step, self.recipe.data)

    def objective(self, run: Any, windows: Tensor) -> Objective:
        """Make the loss that is trained; ``run`` runs a decoder layer, ``windows`` are those of every step."""
        share, teacher = {"kl": 1.0, "ce": 0.0, "mix": 0.5}[self.recipe.loss], None
        if share:
            teacher = self.teacher([*self.text.windows("held_out"), *windows.flatten().tolist()])
        return Objective(self.model, run, self.text, share, teacher, **self.passes)

    def describe(self, trained: Trained | ForwardOnly, report: Report | None) -> None:
        """Measure the trained model, in all processes; the first has a report to add figures to."""

    # --- settled: checked, planned and written

    def settle(self) -> Plan:
        """Check what a command asks, and plan the run; nothing is written yet."""
        request, listener = self.request, self.listener
        self.evaluation = request.evaluation()
        if self.evaluation is not None:
            check_data(self.evaluation.data)
        self.recipe = recipe = self.resolved().with_absolute_files()
        keeps_low_rank = recipe.verb == "recover" and not recipe.zeroth_order
        self.source = find_input(request.model, self.permissions, None if keeps_low_rank else recipe.verb)
        if not getattr(recipe.data, self.texts):
            raise FistaPrunerError(f"say what to train on with --data: {self.choices}")
        listener.say(f"model {request.model}: {self.source.folder}")
        listener.tick("opening and checking the model", 0, 1)
        self.model = open_model(self.source, recipe)
        if self.model.dtype == torch.float16:  # which does not hold small gradients
            dtype = dtype_name(pass_dtype(torch.bfloat16, self.model.device))
            self.model = open_model(self.source, recipe, dtype=dtype)
        self._find_operators()
        check_model(self.model)
        self._find_dense()
        self.tokenizer = self.source.tokenizer()
        pad_with_known_token(self.tokenizer, self.model.embedded_tokens)
        given = getattr(recipe.data, self.window)
        self.seqlen = window_length(given, self.model, TRAINING_SEQLEN, f"data.{self.window}")
        if (found := self.evaluation) is not None:  # a fault in the text shows now
            length = found.seqlen or self.seqlen
            self.evaluation = found.model_copy(update={"seqlen": length})
            self.model.check_tokens(load_windows(found.data, self.tokenizer, length, found.windows).tokens)
        sizes = self.check()
        listener.tick("planning", 0, 1)
        with cpu_threads(default_threads(recipe.execution)):
            self.plan = plan_training(self.model, self.layout, self.recipe, self.run.folder, **sizes)
        return self.plan

    def warn(self, sentence: str) -> None:
        """Say a warning, now and in the report."""
        self.listener.say(sentence)
        self.warnings.append(sentence)

    def _find_operators(self) -> None:
        """Find the operators to train, which have zeros; of a model that lost channels, heads or experts, all."""
        folder, model, tick = self.source.folder, self.model, self.listener.tick
        found = inspect_checkpoint(
            folder,
            allow_pickle=self.source.permissions.allow_pickle,
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
        self.layout = layout.only(claims).select(self.recipe, "train")
        self.claims = {name: claims[name] for name, _ in self.layout.operators()}
        self.zeros = sum(operator.zeros for operator in found.pruned)

    def _find_dense(self) -> None:
        """Find and open the dense model that the user, the input's run or its lineage names."""
        request, need, folder = self.request, self.recipe.dense_for, self.source.folder
        self.dense_source: ModelSource | None = None
        self.dense: LayerwiseModel | None = None
        known = None if request.dense else dense_of(input_run(request.model))
        self.named = request.dense or (str(known.folder) if known else dense_name(lineage_of(folder)))
        if self.named and (need is not None or request.dense):
            with suppress(FistaPrunerError) if request.dense is None else nullcontext():
                self.dense_source = self.permissions.find(self.named)
        fault = None
        if (found := self.dense_source) is not None:
            refuse_low_rank(found.folder, "--dense")
            self.dense = dense = open_model(found, self.recipe, dtype=dtype_name(self.model.dtype))
            fault = settled.changed_files(known.stamps, found) if known and known.stamps else None
            if found.folder.resolve() == folder.resolve():
                fault = f"{found.folder} is the model that is trained"
            elif dense.vocabulary != self.model.vocabulary:
                fault = f"{found.folder} predicts {dense.vocabulary} tokens, {folder} {self.model.vocabulary}"
            fault = fault and f"the dense model {fault}"
        elif need:
            where = "does not name" if self.named is None else f"names as {self.named}, where it is not"
            fault = f"{need} needs the dense model, which {folder} {where}"
        if fault:
            raise FistaPrunerError(f"{fault}: name the model that was pruned with --dense")
        if self.dense is not None:
            check_model(self.dense)

    def write(self) -> None:
        """Cut the text, and write it, ``recipe.yaml`` and ``run.json``; a run that does not fit is refused."""
        self.plan.check()
        self.listener.say(str(self.plan))
        request, run, recipe, model = self.request, self.run, self.recipe, self.model
        text = self.text or self.cut()
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
                kind=recipe.verb,
                **common_fields(request, self, recipe, numerics.threads, lineage_of(self.source.folder)),
                fingerprint=identity(recipe, model, text, decision),
                **_facts(recipe, text, self.plan.steps),
                decision=decision,
            ),
            recipe.to_yaml(),
        )

    # --- opened and trained

    def open(self) -> None:
        """Open the settled run, whose models and windows must be as they were."""
        run, request = self.run, self.request
        record, self.text = run.begun_record(), run.text()
        self.decision = decision = record.decision
        self.passes: Any = {"batch_size": decision.numerics.batch_size, "checkpointing": decision.checkpointing}
        recipe = self.settings.build(record.recipe, str(run.run_file))
        self.recipe = recipe = recipe.model_copy(update={"execution": request.recipe.execution})
        same = self.text and sha256_file(run.text_file) == decision.windows_sha256
        self._require_same(run.text_file, same)
        self.model = self.opened(decision.folder)
        self.low_rank = LowRankAdapter.beside(decision.folder)
        self.fingerprint = identity(recipe, self.model, self.text, decision)
        same = decision.low_rank == (None if self.low_rank is None else self.low_rank.sampled)
        self._require_same(decision.folder, same and record.fingerprint == self.fingerprint)
        self.layout = discover(self.model).only(decision.operators)

    def _require_same(self, what: Any, same: Any) -> None:
        """Refuse to go on where ``what`` is not the same as when the run began."""
        if not same:
            raise FistaPrunerError(
                f"{what} is gone or damaged, or not what the run in {self.run.folder} began with: name another --out"
            )

    def opened(self, folder: Path, stamps: tuple[tuple[str, str], ...] | None = None) -> LayerwiseModel:
        """Open a model with the precision of the run's passes; with ``stamps``, it must have the same files."""
        self._require_same(folder, folder.is_dir())
        model = open_model(self.permissions.at(folder), self.recipe, dtype=self.decision.numerics.dtype)
        self._require_same(folder, stamps is None or stamps == tuple(settled.stamps(model.checkpoint)))
        return model

    def open_dense(self) -> LayerwiseModel:
        """Open the dense model, which must be the one that the run began with."""
        assert self.decision.dense is not None
        return self.opened(self.decision.dense, self.decision.dense_stamps)

    @contextmanager
    def trained(self, after_snapshot: Callable[[], None] = lambda: None) -> Iterator[tuple[Any, State]]:
        """Train, or go on training, and keep the model loaded for the block.

        Yields what holds the best weights, and where training ended; ``after_snapshot`` follows every snapshot.
        """
        check_model(self.model)
        with cpu_threads(self.decision.numerics.threads), ExitStack() as loaded:
            if self.low_rank is not None:  # of what is trained, it is added to the masters
                operators = {name for name, _ in self.layout.operators()} if self.recipe.parameters != "norms" else ()
                self.model.low_rank = self.low_rank.without(operators)
            loaded.enter_context(self.model.embeddings_and_head())
            trained = self._trainable(loaded)
            states = self.run.states if self.world.size == 1 else ShardedSnapshots(self.run.states.folder, self.world)
            lines = read_steps(self.run.steps_file)
            values = states.restore(self.fingerprint, lines[-1]["step"] if lines else -1, trained)
            state = None if values is None else State(**values)
            if state is not None and (state.stopped or state.step == self.decision.steps):
                trained.restore()
            else:
                windows = self.order()
                objective = self.objective(trained.run, windows)
                loop = self._loop(trained, objective, windows)
                loop.states, loop.after_snapshot = states, after_snapshot
                with objective.resident():
                    state = loop.run(state)
            yield trained, state

    def _trainable(self, loaded: ExitStack) -> Trained | ForwardOnly:
        """Load the decoder layers and make what is trained, at its start."""
        recipe = self.recipe

        def load(index: int) -> None:
            loaded.enter_context(self.model.layer(index))

        if not recipe.zeroth_order:
            shard = partial(self.world.shard, dtype=self.model.dtype)
            return Trained(self.model, self.layout, recipe, self.low_rank, load, shard)
        for index in range(len(self.model)):
            load(index)
        draw = (subspace_normal if recipe.optimizer == "subzero" else standard_normal)(recipe.seed)
        rate, best = RATE if recipe.lr == "auto" else recipe.lr, self.run.states.folder / "best.safetensors"
        return ForwardOnly(self.model, self.layout, draw, best, rate, recipe.seed)

    def _loop(self, trained: Any, objective: Objective, windows: Tensor) -> Loop:
        """Make the loop over (steps, windows) numbers of windows."""
        world, text, zeroth, held_out = self.world, self.text, self.recipe.zeroth_order, self.text.windows("held_out")
        carry = windows if self.recipe.loss in PREFERENCE_LOSSES else windows[:, :: text.together]  # chosen answers

        def step(number: int, factor: float) -> tuple[float, float]:
            chosen = windows[number - 1].tolist()
            if zeroth:
                found: tuple[float, float] = trained.step(objective, chosen, number, factor)
                return found
            count = max(1.0, float(text.counts[chosen].sum())) / world.size
            loss = objective.backward(world.part(chosen, text.together), count)
            return sum(world.gathered(loss)) / world.size, trained.step(factor)

        def check() -> tuple[float, dict[str, float]]:
            """Return the mean loss per token or pair over tasks, and that of each of several tasks."""
            own = world.part(held_out, text.together)
            sums, counts = world.together(held_out, own, objective.losses(own)), text.counts[held_out]
            places = {name: text.task[held_out] == number for number, name in enumerate(text.tasks)}
            found = {n: float(sums[at].sum() / counts[at].sum()) for n, at in places.items() if bool(at.any())}
            return sum(found.values()) / len(found), found if len(found) > 1 else {}

        return Loop(
            trained=trained,
            steps=len(windows),
            step=step,
            held_out=check,
            tokens=lambda number: int(text.loss_tokens[carry[number - 1]].sum()),
            descent=descent_of(self.recipe),
            journal=self.run.steps_file if world.rank == 0 else None,
            fingerprint=self.fingerprint,
            listener=self.listener,
            what=self.progress,
            agree=world.tell,
        )

    def teacher(self, windows: Sequence[int]) -> Teacher:
        """Return the dense model's predictions of some windows, cached."""
        dense = self.open_dense()
        check_model(dense)
        batch_size, tick = self.decision.numerics.batch_size, self.listener.tick
        teacher = Teacher(dense, self.text.tokens, self.run.teacher, batch_size, windows, self.fingerprint, tick)
        if self.world.rank == 0:
            for block in teacher.blocks:  # those that are not there yet are made
                teacher.hidden(block[0])
        self.world.tell()
        return teacher


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


def identity(recipe: Any, model: LayerwiseModel, text: TrainingText, decision: settled.TrainingDecision) -> str:
    """Hash what decides the run's result."""
    more = [list(decision.dense_stamps), sorted(decision.operators), decision.windows_sha256, decision.steps]
    more += [] if decision.low_rank is None else [decision.low_rank]
    return settled.fingerprint(recipe, model.checkpoint, text.tokens, decision.numerics, *more)

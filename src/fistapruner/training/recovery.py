"""A run that trains, opened from its folder, and what ``recover`` does in its own way: text and loss.

:class:`~fistapruner.training.alignment.Alignment` says what ``align`` does in another way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Self

from torch import Tensor

from ..errors import FistaPrunerError
from ..models.layers import LayerwiseModel
from ..models.low_rank import LowRankAdapter
from ..models.operators import Layout, discover
from ..models.source import Permissions
from ..papers.mamf import Mixture
from ..papers.mezo import RATE, ForwardOnly, standard_normal
from ..papers.subzero import subspace_normal
from ..passes.stream import check_model
from ..pruning.context import open_model
from ..pruning.workers import default_threads
from ..runs.directory import RecoverDirectory, TrainingDirectory
from ..runs.lineage import input_run
from ..runs.log import Listener, read_steps
from ..runs.records import Report
from ..runs.settled import TrainingDecision, stamps
from ..runs.store import Snapshots
from ..runtime.devices import cpu_threads, release_memory
from ..runtime.files import sha256_file
from ..runtime.show import count
from ..settings.base import Execution
from ..settings.train import RecoverRecipe
from ..text.generate import load_writer
from ..text.sources import check_source
from ..text.training import MAX_HELD_OUT_WINDOWS, PURPOSE, TrainingText, order, training_text
from .distributed import ShardedSnapshots, World, restored
from .loop import Loop, State
from .loss import Objective, TokenLoss
from .masked import Trained, descent_of
from .settle import Inputs, Request, identity, named_dense
from .teacher import Teacher

MAX_NOT_FINITE = 3
"""Steps without a finite loss in a row after which training without gradients stops."""


@dataclass
class Recovery:
    """An opened run of ``recover``.

    Args:
        run: its directory; ``fingerprint``: its identity.
        recipe: all settings, resolved; ``decision``: what the run has decided beside them.
        model: the pruned model that goes in; ``layout``: the operators that are trained; ``text``: the training text.
        permissions: what the models' files may do.
        low_rank: the low-rank part that belongs to the model; None where it has none.
        world: the processes that train together.
    """

    verb: ClassVar[str] = "recover"
    settings: ClassVar[type[Any]] = RecoverRecipe
    directory: ClassVar[type[TrainingDirectory]] = RecoverDirectory
    window: ClassVar[str] = "seqlen"
    """Setting in ``data`` of the tokens in a window."""
    progress: ClassVar[str] = "recovery steps"

    run: Any
    recipe: Any
    decision: TrainingDecision
    fingerprint: str
    model: LayerwiseModel
    layout: Layout
    text: Any
    permissions: Permissions
    low_rank: LowRankAdapter | None = None
    world: World = field(default_factory=World)

    # --- what a verb does in its own way, before the run is settled

    @staticmethod
    def check_text(recipe: Any) -> None:
        """Refuse text that is not there or has a fault, before a model is opened."""
        for text in recipe.data.texts:
            check_source(text, f"{PURPOSE} source")

    @staticmethod
    def resolved(request: Request) -> Any:
        """Return the recipe with its text named: that of the input's run where the user names none.

        Raises:
            FistaPrunerError: the text is not said, and the input is no run that names one.
        """
        recipe, data = request.recipe, request.recipe.data
        if not data.texts:
            origin = input_run(request.model)
            record = None if origin is None else origin.record()
            if record is None or record.calibration is None or record.kind == "align":  # pairs are no text
                raise FistaPrunerError("say what to train on with --data: self, python, c4, or a text file")
            tasks = {name: str(task.source) for name, task in record.calibration.tasks.items()}
            single = next(iter(tasks.values()), record.calibration.source)
            data = data.model_copy(update={"source": tasks if len(tasks) > 1 else single})
            recipe = recipe.model_copy(update={"data": data})
            Recovery.check_text(recipe)
        return recipe

    @staticmethod
    def check(inputs: Inputs, request: Request, listener: Listener) -> dict[str, int]:
        """Check and resolve what is left, with the models opened.

        Returns:
            Sizes that the plan needs (:func:`.plan.plan_training`).
        """
        recipe, seqlen, held_out = inputs.recipe, inputs.seqlen, MAX_HELD_OUT_WINDOWS
        if recipe.loss == "auto" and inputs.dense is None:
            named = named_dense(request.model, inputs.source)[0]
            why = "is not known" if named is None else f"is not found, which was {named}"
            inputs.warnings.append(f"the dense model {why}: the loss is that of the text (ce); better give --dense")
            listener.say(inputs.warnings[-1])
        if recipe.loss == "auto":
            recipe = recipe.model_copy(update={"loss": "ce" if inputs.dense is None else "kl"})
            inputs.recipe = recipe
        check_mixture(recipe, seqlen)
        stored = 0 if recipe.loss == "ce" else recipe.windows_of(seqlen) + held_out
        return {"seqlen": seqlen, "steps": recipe.steps_of(seqlen), "stored": stored, "held_out": held_out}

    @staticmethod
    def cut(inputs: Inputs, listener: Listener) -> TrainingText:
        """Read or generate the text, hold documents out, and cut windows; it may take long."""
        recipe, data, generator = inputs.recipe, inputs.recipe.data, inputs.dense or inputs.model
        windows = recipe.windows_of(inputs.seqlen)

        def load_model() -> Any:
            source, samples = inputs.dense_source or inputs.source, windows + MAX_HELD_OUT_WINDOWS
            return load_writer(source, generator, samples, inputs.seqlen, recipe.execution.memory_limit, "--data")

        tokens, texts = min(data.tokens, windows * inputs.seqlen), ", ".join(data.texts)
        listener.say(f"training text: {count(tokens)} tokens in windows of {inputs.seqlen} from {texts}")
        with cpu_threads(default_threads(recipe.execution)):
            made = training_text(data, inputs.tokenizer, inputs.seqlen, load_model, listener.say, windows)
        inputs.model.check_tokens(made.tokens)
        release_memory()  # documents
        return made

    # --- of the opened run

    def order(self) -> Tensor:
        """Draw the (steps, windows) numbers of the windows of every step."""
        return order(self.text, self.decision.steps, self.recipe.windows_per_step, self.recipe.data)

    def objective(self, run: Any, windows: Tensor, listener: Listener) -> Objective:
        """Make the loss that is trained; ``run`` runs a decoder layer, ``windows`` are those of every step."""
        share, teacher = {"kl": 1.0, "ce": 0.0, "mix": 0.5}[self.recipe.loss], None
        if share:
            teacher = self.teacher([*self.text.windows("held_out"), *windows.flatten().tolist()], listener)
        return Objective(self.model, run, self.text, TokenLoss(share), teacher, **self.passes)

    def measured(self, trained: Trained | ForwardOnly, listener: Listener) -> Any:
        """Measure the trained model, in all processes, for :meth:`describe`."""
        return None

    def describe(self, measured: Any, report: Report, listener: Listener) -> None:
        """Add what :meth:`measured` returned to the report."""

    # --- what both verbs do

    @classmethod
    def open(cls, run: TrainingDirectory, execution: Execution, permissions: Permissions, world: World) -> Self:
        """Open a run that was settled; ``execution`` says how the work is carried out now.

        Raises:
            FistaPrunerError: its models or windows are gone or have changed.
        """
        record = run.begun_record()
        decision, recipe = record.decision, cls.settings.build(record.recipe, str(run.run_file))
        recipe, text = recipe.model_copy(update={"execution": execution}), run.text()
        require_same(run, run.text_file, text and sha256_file(run.text_file) == decision.windows_sha256)
        require_same(run, decision.folder, decision.folder.is_dir())
        model = open_model(permissions.at(decision.folder), recipe, dtype=decision.numerics.dtype)
        low_rank = LowRankAdapter.beside(decision.folder)
        assert text is not None
        same = decision.low_rank == (None if low_rank is None else low_rank.sampled)
        require_same(run, decision.folder, same and record.fingerprint == identity(recipe, model, text, decision))
        layout = discover(model).only(decision.operators)
        return cls(run, recipe, decision, str(record.fingerprint), model, layout, text, permissions, low_rank, world)

    @contextmanager
    def trained(self, listener: Listener, after_snapshot: Callable[[], None]) -> Iterator[tuple[Any, State]]:
        """Train, or go on training, and keep the model loaded for the block.

        Yields:
            What holds the best weights (:class:`.Trained` or :class:`~fistapruner.papers.mezo.ForwardOnly`), and where
            training ended; ``after_snapshot`` is called when a state is on the disk.
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
            values = restored(states, self.fingerprint, lines[-1]["step"] if lines else -1, trained)
            state = None if values is None else State(**values)
            if state is not None and (state.stopped or state.step == self.decision.steps):
                trained.restore()
            else:
                state = self._train(trained, states, state, listener, after_snapshot)
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

    def _train(
        self, trained: Any, states: Snapshots, state: State | None, listener: Listener, after: Callable[[], None]
    ) -> State:
        """Take the steps that are left."""
        windows, world, text, zeroth = self.order(), self.world, self.text, self.recipe.zeroth_order
        objective, held_out = self.objective(self.runner(trained), windows, listener), text.windows("held_out")

        def step(number: int, factor: float) -> tuple[float, float]:
            chosen = windows[number - 1].tolist()
            if zeroth:
                found: tuple[float, float] = trained.step(objective, chosen, number, factor)
                return found
            count = max(1.0, float(objective.counts(chosen).sum())) / world.size
            loss = objective.backward(world.part(chosen, objective.together), count)
            return world.mean(loss), trained.step(factor)

        def check() -> tuple[float, dict[str, float]]:
            """Return the mean loss per token or pair over tasks, and that of each of several tasks."""
            own = world.part(held_out, objective.together)
            sums, counts = world.together(held_out, own, objective.losses(own)), objective.counts(held_out)
            places = {name: text.task[held_out] == number for number, name in enumerate(text.tasks)}
            found = {n: float(sums[at].sum() / counts[at].sum()) for n, at in places.items() if bool(at.any())}
            return sum(found.values()) / len(found), found if len(found) > 1 else {}

        loop = Loop(
            trained=trained,
            steps=len(windows),
            step=step,
            held_out=check,
            tokens=lambda number: int(objective.loss_tokens(windows[number - 1].tolist())),
            descent=descent_of(self.recipe),
            patient=MAX_NOT_FINITE if zeroth else 1,
            states=states,
            journal=self.run.steps_file if world.rank == 0 else None,
            fingerprint=self.fingerprint,
            listener=listener,
            what=self.progress,
            after_snapshot=after,
            agree=world.tell,
        )
        with objective.resident():
            return loop.run(state)

    def runner(self, trained: Trained | ForwardOnly) -> Any:
        """Return what runs a decoder layer of the model that is trained."""
        return self.model.run if isinstance(trained, ForwardOnly) else trained.run

    @property
    def passes(self) -> dict[str, Any]:
        """Arguments of an objective: windows in one pass, and whether decoder layers run twice."""
        return {"batch_size": self.decision.numerics.batch_size, "checkpointing": self.decision.checkpointing}

    def teacher(self, windows: Sequence[int], listener: Listener) -> Teacher:
        """Return the dense model's predictions of some windows, cached."""
        batch_size, dense, tokens = self.decision.numerics.batch_size, self.open_dense(), self.text.tokens
        check_model(dense)
        how: dict[str, Any] = {
            "batch_size": batch_size,
            "identity": self.fingerprint,
            "windows": windows,
            "tick": listener.tick,
        }
        teacher = Teacher(dense, tokens, self.run.teacher, **how)
        if self.world.rank == 0:
            teacher.prepare()
        self.world.tell()
        return teacher

    def open_dense(self) -> LayerwiseModel:
        """Open the dense model, which must be the one that the run began with."""
        folder = self.decision.dense
        assert folder is not None
        require_same(self.run, folder, folder.is_dir())
        dense = open_model(self.permissions.at(folder), self.recipe, dtype=self.decision.numerics.dtype)
        require_same(self.run, folder, tuple(stamps(dense.checkpoint)) == self.decision.dense_stamps)
        return dense


def require_same(run: TrainingDirectory, what: Any, same: Any) -> None:
    """Refuse to go on with other files than a run began with.

    Raises:
        FistaPrunerError: ``what`` is not the same.
    """
    if not same:
        raise FistaPrunerError(
            f"{what} is gone or damaged, or not what the run in {run.folder} began with: name another --out"
        )


def check_mixture(recipe: RecoverRecipe, seqlen: int) -> None:
    """Refuse too few steps or tokens for the tasks of a mixture, in windows of ``seqlen`` tokens.

    Raises:
        FistaPrunerError: names the windows that it needs, and the steps or tokens that make them.
    """
    data = recipe.data
    if len(data.tasks) > 1:
        windows = min(recipe.steps_of(seqlen) * recipe.windows_per_step, recipe.windows_of(seqlen))
        mixture = Mixture(len(data.tasks), data.per_round, data.seed)
        steps = -(-mixture.least // recipe.windows_per_step)
        more = [f"at least {steps} steps"] if recipe.steps is not None and recipe.steps < steps else []
        if recipe.steps is None:
            more = [f"at least {steps * recipe.windows_per_step * seqlen} tokens"]
        elif -(-data.tokens // seqlen) < mixture.least:
            more.append(f"at least {mixture.least * seqlen} tokens")
        mixture.draw(windows, " and ".join(more))

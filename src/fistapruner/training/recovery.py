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
from ..runs.directory import TrainingDirectory
from ..runs.log import Listener, read_steps
from ..runs.records import Report
from ..runs.settled import TrainingDecision, stamps
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
from .loss import Objective, Teacher, TokenLoss
from .masked import Trained, descent_of
from .settle import Request, Settling, identity


@dataclass
class Recovery:
    """An opened run of ``recover``: its directory, settings, text, and the pruned ``model`` that goes in.

    ``layout`` are the operators that are trained, ``world`` the processes that train together.
    """

    settings: ClassVar[type[Any]] = RecoverRecipe
    texts: ClassVar[str] = "source"
    """Name in ``data`` of what is trained on; ``window`` is that of the tokens in a window."""
    choices: ClassVar[str] = "self, python, c4, or a text file"
    window: ClassVar[str] = "seqlen"
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
    def resolved(request: Request) -> Any:
        """Return the recipe with its text, checked: that of the input's run where the user names none."""
        recipe, data = request.recipe, request.recipe.data
        origin = None if data.source else request.origin
        if origin is not None and origin.calibration is not None and origin.kind != "align":  # pairs are no text
            tasks = {name: str(task.source) for name, task in origin.calibration.tasks.items()}
            single = next(iter(tasks.values()), origin.calibration.source)
            data = data.model_copy(update={"source": tasks if len(tasks) > 1 else single})
        for text in data.sources.values():
            check_source(text, f"{PURPOSE} source")
        return recipe.model_copy(update={"data": data})

    @staticmethod
    def check(settling: Settling) -> dict[str, int]:
        """Check and resolve what is left, with the models open; return the sizes that the plan needs."""
        recipe, seqlen, dense = settling.recipe, settling.seqlen, settling.dense
        if recipe.loss == "auto":
            if dense is None:
                why = "is not known" if settling.named is None else f"is not found, which was {settling.named}"
                settling.warn(f"the dense model {why}: the loss is that of the text (ce); better give --dense")
            settling.recipe = recipe = recipe.model_copy(update={"loss": "ce" if dense is None else "kl"})
        steps, windows, a_step = recipe.steps_of(seqlen), recipe.windows_of(seqlen), recipe.windows_per_step
        if (tasks := len(recipe.data.sources)) > 1:
            mixture = Mixture(tasks, recipe.data.per_round)
            enough = f"at least {-(-mixture.least // a_step)} steps and {mixture.least * seqlen} tokens"
            mixture.draw(min(steps * a_step, windows), enough)
        stored = 0 if recipe.loss == "ce" else windows + MAX_HELD_OUT_WINDOWS
        return {"seqlen": seqlen, "steps": steps, "stored": stored, "held_out": MAX_HELD_OUT_WINDOWS}

    @staticmethod
    def cut(settling: Settling) -> TrainingText:
        """Read or generate the text, hold documents out, and cut windows; it may take long."""
        recipe, data, seqlen, say = settling.recipe, settling.recipe.data, settling.seqlen, settling.listener.say
        windows = recipe.windows_of(seqlen)

        def load_model() -> Any:
            source, model = settling.dense_source or settling.source, settling.dense or settling.model
            limit = recipe.execution.memory_limit
            return load_writer(source, model, windows + MAX_HELD_OUT_WINDOWS, seqlen, limit, "--data")

        tokens = count(min(data.tokens, windows * seqlen))
        say(f"training text: {tokens} tokens in windows of {seqlen} from {', '.join(data.sources.values())}")
        with cpu_threads(default_threads(recipe.execution)):
            made = training_text(data, settling.tokenizer, seqlen, load_model, say, windows)
        settling.model.check_tokens(made.tokens)
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

    def describe(self, trained: Trained | ForwardOnly, report: Report | None, listener: Listener) -> None:
        """Measure the trained model, in all processes; the first has a report to add figures to."""

    # --- what both verbs do

    @classmethod
    def open(cls, run: TrainingDirectory, execution: Execution, permissions: Permissions, world: World) -> Self:
        """Open a run that was settled, whose models and windows must be as they were.

        ``execution`` says how the work is carried out now.
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

        Yields what holds the best weights, and where training ended; ``after_snapshot`` is called when a state is on
        the disk.
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
                windows = self.order()
                objective = self.objective(self.runner(trained), windows, listener)
                loop = self._loop(trained, objective, windows)
                loop.states, loop.listener, loop.after_snapshot = states, listener, after_snapshot
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

        return Loop(
            trained=trained,
            steps=len(windows),
            step=step,
            held_out=check,
            tokens=lambda number: int(objective.loss_tokens(windows[number - 1].tolist())),
            descent=descent_of(self.recipe),
            journal=self.run.steps_file if world.rank == 0 else None,
            fingerprint=self.fingerprint,
            what=self.progress,
            agree=world.tell,
        )

    def runner(self, trained: Trained | ForwardOnly) -> Any:
        """Return what runs a decoder layer of the model that is trained."""
        return self.model.run if isinstance(trained, ForwardOnly) else trained.run

    @property
    def passes(self) -> dict[str, Any]:
        """Arguments of an objective: windows in one pass, and whether decoder layers run twice."""
        return {"batch_size": self.decision.numerics.batch_size, "checkpointing": self.decision.checkpointing}

    def teacher(self, windows: Sequence[int], listener: Listener) -> Teacher:
        """Return the dense model's predictions of some windows, cached."""
        dense = self.open_dense()
        check_model(dense)
        batch_size, tick = self.decision.numerics.batch_size, listener.tick
        teacher = Teacher(dense, self.text.tokens, self.run.teacher, batch_size, windows, self.fingerprint, tick)
        if self.world.rank == 0:
            for block in teacher.blocks:  # those that are not there yet are made
                teacher.hidden(block[0])
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
    """Refuse to go on where ``what`` is not the same as when the run began."""
    if not same:
        raise FistaPrunerError(
            f"{what} is gone or damaged, or not what the run in {run.folder} began with: name another --out"
        )

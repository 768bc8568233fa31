"""A run that trains, opened from its folder, and what a verb does in its own way.

:class:`~fistapruner.training.recovery.Recovery` and :class:`~fistapruner.training.alignment.Alignment` are the verbs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Self

from torch import Tensor

from ..errors import FistaPrunerError
from ..models.discovery import discover
from ..models.files.low_rank import LowRankAdapter
from ..models.files.safetensors import LazyTensors
from ..models.layerwise import LayerwiseModel
from ..models.layout import Layout
from ..models.source import ModelSource, Permissions
from ..papers.mezo import RATE, ForwardOnly, standard_normal
from ..papers.subzero import subspace_normal
from ..passes.check import check_model
from ..pruning.opened import open_model
from ..runs.directory import TrainingDirectory
from ..runs.listener import Listener
from ..runs.records import Report
from ..runs.settled import TrainingDecision, stamps
from ..runs.steps import read_steps
from ..runtime.devices import cpu_threads
from ..runtime.files import sha256_file
from ..settings.execution import Execution
from ..text.training import TrainingText
from .distributed import ShardedSnapshots, World
from .loop import MAX_NOT_FINITE, Loop, State
from .masked import Trained, descent_of
from .objective import Objective
from .settle import Inputs, Request, identity
from .teacher import Teacher

STEPS = {"recover": "recovery steps", "align": "alignment steps"}
"""Names of the progress of either verb."""


@dataclass
class Training(ABC):
    """An opened run that trains.

    Args:
        run: its directory.
        recipe: all settings, resolved; ``decision``: what the run has decided beside them.
        fingerprint: its identity.
        model: the pruned model that goes in; ``layout``: the operators that are trained.
        text: the training text.
        permissions: what the models' files may do.
        low_rank: the low-rank part that belongs to the model; None where it has none.
        world: the processes that train together.
    """

    verb: ClassVar[str]
    settings: ClassVar[type[Any]]
    directory: ClassVar[type[TrainingDirectory]]
    window: ClassVar[str]
    """Setting in ``data`` of the tokens in a window."""

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

    # --- before the run is settled

    @staticmethod
    @abstractmethod
    def check_text(recipe: Any) -> None:
        """Refuse text that is not there or has a fault, before a model is opened."""

    @staticmethod
    @abstractmethod
    def resolved(request: Request[Any], source: ModelSource) -> Any:
        """Return the recipe of a request with its text named and its paths absolute."""

    @staticmethod
    @abstractmethod
    def check(inputs: Inputs[Any], request: Request[Any], listener: Listener) -> None:
        """Check and resolve what is left, with the models opened."""

    @staticmethod
    @abstractmethod
    def sizes(inputs: Inputs[Any], listener: Listener) -> tuple[TrainingText | None, dict[str, int]]:
        """Return the text, where the plan depends on it, and the plan's sizes (:func:`.plan.plan_training`)."""

    @staticmethod
    @abstractmethod
    def cut(run: TrainingDirectory, inputs: Inputs[Any], text: TrainingText | None, listener: Listener) -> TrainingText:
        """Store the text in the run directory, and return it."""

    # --- of the opened run

    @abstractmethod
    def order(self) -> Tensor:
        """Draw the (steps, windows) numbers of the windows of every step."""

    @abstractmethod
    def objective(self, run: Any, windows: Tensor, listener: Listener) -> Objective:
        """Make the loss that is trained; ``run`` runs a decoder layer, ``windows`` are those of every step."""

    def measured(self, trained: Trained | ForwardOnly, listener: Listener) -> Any:
        """Measure the trained model, in all processes, for :meth:`describe`."""
        return None

    def describe(self, measured: Any, report: Report, listener: Listener) -> None:
        """Add what :meth:`measured` returned to the report."""
        return

    @classmethod
    def open(cls, run: TrainingDirectory, execution: Execution, permissions: Permissions, world: World) -> Self:
        """Open a run that was settled.

        Args:
            run: its directory.
            execution: how the work is carried out now.
            permissions: what the models' files may do.
            world: the processes that train together.

        Raises:
            FistaPrunerError: its models or windows are gone or have changed.
        """
        record = run.begun_record()
        decision, recipe = record.decision, cls.settings.build(record.recipe, str(run.run_file))
        recipe = recipe.model_copy(update={"execution": execution})
        text = run.text()
        if text is None or sha256_file(run.windows_file) != decision.windows_sha256:
            raise FistaPrunerError(f"{run.windows_file} is gone or damaged: name another --out")
        if not decision.folder.is_dir():
            raise FistaPrunerError(
                f"{decision.folder}, the model of the run in {run.folder}, is gone: name another --out"
            )
        model = open_model(permissions.at(decision.folder), recipe, dtype=decision.numerics.dtype)
        low_rank = LowRankAdapter.beside(decision.folder)
        same = decision.low_rank == (None if low_rank is None else low_rank.sampled)
        if not same or record.fingerprint != identity(recipe, model, text, decision):
            raise FistaPrunerError(
                f"{run.folder}: the model is not the one that the run began with; name another --out"
            )
        layout = discover(model).only(decision.operators)
        return cls(run, recipe, decision, record.fingerprint, model, layout, text, permissions, low_rank, world)

    @contextmanager
    def trained(self, listener: Listener, after_snapshot: Callable[[], None]) -> Iterator[tuple[Any, State]]:
        """Train, or go on training, and keep the model loaded for the block.

        Args:
            listener: receives progress.
            after_snapshot: called when a state is on the disk.

        Yields:
            What holds the best weights (:class:`.Trained` or :class:`~fistapruner.papers.mezo.ForwardOnly`), and where
            training ended.

        Raises:
            FistaPrunerError: the dense model is gone or has changed, or the disk is full.
        """
        check_model(self.model)
        with cpu_threads(self.decision.numerics.threads), ExitStack() as loaded:
            if self.low_rank is not None and not self.recipe.zeroth_order:
                operators = {name for name, _ in self.layout.operators()} if self.recipe.parameters != "norms" else ()
                self.model.low_rank = self.low_rank.without(operators)
            loaded.enter_context(self.model.resident(layers=False))
            trained = self._trainable(loaded)
            state = self._newest(trained)
            if state is None or not (state.stopped or state.step == self.decision.steps):
                state = self._train(trained, state, listener, after_snapshot)
            else:
                trained.restore()
            yield trained, state

    def _trainable(self, loaded: ExitStack) -> Trained | ForwardOnly:
        """Load the decoder layers and make what is trained, at its start."""
        recipe = self.recipe
        if recipe.zeroth_order:
            for index in range(len(self.model)):
                loaded.enter_context(self.model.layer(index))
            draw = (subspace_normal if recipe.optimizer == "subzero" else standard_normal)(recipe.seed)
            rate, best = RATE if recipe.lr == "auto" else recipe.lr, self.run.states.folder / "best.safetensors"
            return ForwardOnly(self.model, self.layout, draw, best, rate, recipe.seed)
        shard = None if self.world.size == 1 else partial(self.world.shard, dtype=self.model.dtype)
        return Trained(self.model, self.layout, recipe, self.low_rank, loaded, shard)

    def _newest(self, trained: Any) -> State | None:
        """Load the newest state of the run up to which the journal is whole; None where there is none."""
        lines = read_steps(self.run.steps_file)
        if self.world.size > 1:
            states = ShardedSnapshots(self.run.states.folder, self.world)
            values = states.restore(self.fingerprint, lines[-1]["step"] if lines else -1, trained)
            return None if values is None else State(**values)
        snapshot = self.run.states.newest(self.fingerprint, lines[-1]["step"]) if lines else None
        if snapshot is None:
            return None
        trained.load(LazyTensors(snapshot.tensors.entries, snapshot.tensors.read))
        return State(**snapshot.values)

    def _train(
        self, trained: Any, state: State | None, listener: Listener, after_snapshot: Callable[[], None]
    ) -> State:
        windows, world = self.order(), self.world
        objective = self.objective(self.runner(trained), windows, listener)
        held_out = self.text.held_out.nonzero().flatten().tolist()

        def step(number: int, factor: float) -> tuple[float, float]:
            chosen = windows[number - 1].tolist()
            if isinstance(trained, ForwardOnly):
                return trained.step(objective, chosen, number, factor)
            count = max(1.0, float(objective.counts(chosen).sum())) / world.size
            loss = objective.backward(world.part(chosen, objective.together), count)
            return world.mean(loss), trained.step(factor)

        def check() -> tuple[float, dict[str, float]]:
            own = world.part(held_out, objective.together)
            losses = world.together(held_out, own, objective.losses(own))
            return by_task(self.text, held_out, losses, objective.counts(held_out))

        states = self.run.states
        loop = Loop(
            states if world.size == 1 else ShardedSnapshots(states.folder, world),
            self.run.steps_file if world.rank == 0 else None,
            self.fingerprint,
            trained,
            len(windows),
            step,
            check,
            lambda number: int(objective.loss_tokens(windows[number - 1].tolist())),
            descent_of(self.recipe),
            MAX_NOT_FINITE if self.recipe.zeroth_order else 1,
            listener.say,
            lambda done, total: listener.tick(STEPS[self.verb], done, total),
            after_snapshot,
            world.tell,
        )
        with objective.resident(shared=not isinstance(trained, ForwardOnly)):
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
        teacher = Teacher(
            self.open_dense(),
            self.text.tokens,
            self.run.teacher,
            batch_size=self.decision.numerics.batch_size,
            identity=self.fingerprint,
            windows=windows,
            tick=listener.tick,
        )
        check_model(teacher.dense)
        if self.world.rank == 0:
            teacher.prepare()
        self.world.tell()
        return teacher

    def open_dense(self) -> LayerwiseModel:
        """Open the dense model.

        Raises:
            FistaPrunerError: it is gone, or not the one that the run began with.
        """
        folder = self.decision.dense
        assert folder is not None
        if not folder.is_dir():
            raise FistaPrunerError(
                f"{folder}, the dense model of the run in {self.run.folder}, is gone: name another --out"
            )
        dense = open_model(self.permissions.at(folder), self.recipe, dtype=self.decision.numerics.dtype)
        if tuple(stamps(dense.checkpoint)) != self.decision.dense_stamps:
            raise FistaPrunerError(f"{folder} is not the dense model that the run began with")
        return dense


def by_task(text: TrainingText, windows: Sequence[int], sums: Tensor, counts: Tensor) -> tuple[float, dict[str, float]]:
    """Return the mean loss per token or pair over tasks, and that of each of several tasks."""
    tasks = text.task[list(windows)]
    found = {
        name: float(sums[tasks == number].sum() / counts[tasks == number].sum())
        for number, name in enumerate(text.tasks)
        if bool((tasks == number).any())
    }
    return sum(found.values()) / len(found), found if len(found) > 1 else {}

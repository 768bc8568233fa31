"""The context of a run that trains, opened from the run directory alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..activations.store import Store, scratch_factory
from ..calibration.training_text import TrainingText, order
from ..errors import FistaPrunerError
from ..models.discovery import discover
from ..models.files.low_rank import LowRankAdapter
from ..models.files.safetensors import LazyTensors
from ..models.layerwise import LayerwiseModel
from ..models.layout import Layout
from ..models.source import UNTRUSTED, Permissions
from ..recipes.execution_settings import Execution
from ..recipes.training_settings import TrainingRecipe
from ..runs.decision import TrainingDecision
from ..runs.identity import fingerprint, stamps
from ..runs.listener import Listener
from ..runs.snapshots import Snapshot
from ..runs.training_directory import TrainingDirectory
from ..runtime.devices import cpu_threads
from ..runtime.files import sha256_file
from ..runtime.memory import release_failed_memory
from ..tuning.losses import TokenLoss
from ..tuning.objective import Objective
from ..tuning.steppers import FirstOrder, ForwardOnly
from ..tuning.teacher import Teacher
from ..tuning.trained import Trained
from ..tuning.trainer import Trainer, TrainingState, newest_state
from .context import open_model


@dataclass
class TrainingContext:
    """An opened run that trains.

    Args:
        run: its directory.
        recipe: all settings, resolved.
        fingerprint: its identity.
        model: the pruned model that goes in.
        layout: the operators that are trained.
        text: the training text.
        decision: what the run has decided.
        permissions: what the models' files may do.
        low_rank: the low-rank part that belongs to the model; None where it has none.

    Attributes:
        progress: name of the steps.
    """

    progress: ClassVar[str]

    run: TrainingDirectory
    recipe: Any
    fingerprint: str
    model: LayerwiseModel
    layout: Layout
    text: TrainingText
    decision: TrainingDecision
    permissions: Permissions = UNTRUSTED
    low_rank: LowRankAdapter | None = None

    @classmethod
    def open(
        cls,
        run: TrainingDirectory,
        settings: type[TrainingRecipe],
        execution: Execution,
        permissions: Permissions = UNTRUSTED,
    ) -> Self:
        """Open a run that has been prepared.

        Args:
            run: its directory.
            settings: kind of its recipe.
            execution: how the work is carried out now; a run may go on in another way than it began.
            permissions: what the models' files may do.

        Raises:
            FistaPrunerError: not a prepared run, or its models or windows are gone or have changed.
        """
        record = run.begun_record()
        decision, recipe = record.decision, settings.build(record.recipe, str(run.run_file))
        recipe = recipe.model_copy(update={"execution": execution})
        text = run.text()
        if text is None or sha256_file(run.windows_file) != decision.windows_sha256:
            raise FistaPrunerError(f"{run.windows_file} is gone or damaged: name another --out")
        model = open_model(permissions.at(decision.folder), recipe, dtype=decision.numerics.dtype)
        low_rank = LowRankAdapter.beside(decision.folder)
        same = decision.low_rank == (None if low_rank is None else low_rank.sampled)
        if not same or record.fingerprint != identity(recipe, model, text, decision):
            raise FistaPrunerError(
                f"{run.folder}: the model is not the one that the run began with; name another --out"
            )
        layout = discover(model).only(decision.operators)
        return cls(run, recipe, record.fingerprint, model, layout, text, decision, permissions, low_rank)

    @property
    def trained(self) -> Trained:
        """The tensors to train, at their start."""
        return Trained(self.model, self.layout, self.recipe, self.low_rank)

    def train(self, listener: Listener, after_snapshot: Callable[[], None]) -> tuple[Trained, TrainingState]:
        """Train, or go on training.

        Where the GPU's memory runs out with the graphs of all layers kept, training goes on from the last snapshot
        without them, which changes no bit.

        Args:
            listener: receives progress.
            after_snapshot: called when a state is on the disk.

        Returns:
            What holds the best weights, and where training ended.

        Raises:
            FistaPrunerError: the dense model is gone or has changed, the disk is full, or the GPU's memory runs out.
        """
        while True:
            trained, snapshot = self.trained, newest_state(self.run, self.fingerprint)
            try:
                state = self._ended(trained, snapshot) or self._train(trained, snapshot, listener, after_snapshot)
            except torch.OutOfMemoryError:
                pass
            else:
                return trained, state
            del trained
            release_failed_memory()
            self._reduce_plan(listener)

    def _reduce_plan(self, listener: Listener) -> None:
        """Take less of the GPU's memory from now on, also in a run that is resumed.

        Raises:
            FistaPrunerError: nothing is left that needs less.
        """
        ran_out = f"the memory of {self.model.device} ran out in training"
        if not self.decision.keep_graphs:
            raise FistaPrunerError(
                f"{ran_out}: free some of it and resume {self.run.folder}; or begin another run, whose plan takes what "
                "is free then, with shorter windows, or with --device cpu"
            )
        sentence = f"{ran_out}, which goes on from the last state: decoder layers run twice for a gradient"
        self.decision = self.decision.model_copy(update={"keep_graphs": False})
        record = self.run.begun_record()
        kept = {"decision": self.decision, "warnings": [*record.warnings, sentence]}
        self.run.write_record(record.model_copy(update=kept))
        listener.say(sentence)

    def _ended(self, trained: Trained, snapshot: Snapshot | None) -> TrainingState | None:
        """Leave the best weights of a run without further steps in ``trained``: it needs no dense model.

        Returns:
            Where training ended; None where it has not.
        """
        state = None if snapshot is None else TrainingState.of(snapshot.values)
        if snapshot is None or state is None or not (state.stopped or state.step == self.decision.steps):
            return None
        self.run.states.tidy(snapshot.step)  # a kill while the last one was written may have left more
        trained.load(LazyTensors(snapshot.tensors.entries, snapshot.tensors.read))
        trained.restore()
        return state

    def _train(
        self, trained: Trained, snapshot: Snapshot | None, listener: Listener, after_snapshot: Callable[[], None]
    ) -> TrainingState:
        """Do what :meth:`train` does, once, and leave the best weights in ``trained``."""
        windows = self._order()
        with self.passes() as store:
            objective = self._objective(windows, store, listener)
            trainer = Trainer(
                self.run,
                self.fingerprint,
                self.recipe,
                self.text,
                windows,
                (ForwardOnly if self.recipe.zeroth_order else FirstOrder)(trained, objective),
                trained,
                snapshot,
                say=listener.say,
                tick=lambda done, total: listener.tick(self.progress, done, total),
                after_snapshot=after_snapshot,
            )
            with objective.resident():
                return trainer.train()

    @contextmanager
    def passes(self) -> Iterator[Store]:
        """Give the stores and threads of the run's passes for the block."""
        with cpu_threads(self.decision.numerics.threads):
            yield scratch_factory(None, self.model.dtype, self.model.device)

    def _objective(self, windows: Tensor, store: Store, listener: Listener) -> Objective:
        """Make the loss that is trained; ``windows`` are those of every step."""
        return Objective(
            self.model,
            self.text,
            TokenLoss.named(str(self.recipe.loss), self.recipe.mix),
            self._teacher(windows, listener),
            self.decision.numerics.batch_size,
            store,
            keep_graphs=self.decision.keep_graphs,
        )

    def _order(self) -> Tensor:
        return order(self.text, self.decision.steps, self.recipe.windows_per_step, self.recipe.data)

    def _teacher(self, windows: Tensor, listener: Listener) -> Teacher | None:
        """The dense model's predictions, cached; None where the loss does not need them."""
        if self.recipe.loss == "ce" or self.decision.dense is None:
            return None
        return self.teacher_of(windows, self.text.held_out.nonzero().flatten().tolist(), listener)

    def teacher_of(self, windows: Tensor, held_out: list[int], listener: Listener) -> Teacher:
        """Return the dense model's predictions of the (steps, windows) of the steps and of those held out."""
        return Teacher(
            self.open_dense(),
            self.text.tokens,
            self.run.teacher,
            batch_size=self.decision.numerics.batch_size,
            kind=self.recipe.teacher,
            identity=self.fingerprint,
            order=windows.flatten().tolist(),
            windows_per_step=windows.shape[1],
            held_out=held_out,
            windows_on_disk=self.decision.teacher_windows,
            tick=listener.tick,
        )

    def open_dense(self) -> LayerwiseModel:
        """Open the dense model.

        Raises:
            FistaPrunerError: it is gone, or not the one that the run began with.
        """
        assert self.decision.dense is not None
        if not self.decision.dense.is_dir():
            raise FistaPrunerError(
                f"the dense model of the run in {self.run.folder} is not at {self.decision.dense} any more; give the "
                "command of the run again and say where it is with --dense"
            )
        dense = open_model(self.permissions.at(self.decision.dense), self.recipe, dtype=self.decision.numerics.dtype)
        if tuple(stamps(dense.checkpoint)) != self.decision.dense_stamps:
            raise FistaPrunerError(f"{self.decision.dense} is not the dense model that the run began with")
        return dense


class RecoverContext(TrainingContext):
    """An opened recovery run."""

    progress: ClassVar[str] = "recovery steps"


def identity(recipe: TrainingRecipe, model: LayerwiseModel, text: TrainingText, decision: TrainingDecision) -> str:
    """Hash what decides the run's result."""
    more = [
        list(decision.dense_stamps),
        sorted(decision.operators),
        decision.windows_sha256,
        decision.steps,
        decision.teacher_windows is not None,  # in rounds windows pass one by one, however many fit
        *([] if decision.low_rank is None else [decision.low_rank]),
    ]
    return fingerprint(recipe, model.checkpoint, text.tokens, decision.numerics, *more)

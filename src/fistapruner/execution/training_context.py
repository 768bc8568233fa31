"""The context of a run that trains, opened from the run directory alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
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
from ..runs.lock import preparing
from ..runs.snapshots import Snapshot
from ..runs.training_directory import TrainingDirectory
from ..runtime.devices import cpu_threads, device_title
from ..runtime.files import scratch_folder, sha256_file
from ..runtime.memory import release_failed_memory
from ..runtime.ranks import ALONE, Ranks
from ..tuning.losses import TokenLoss
from ..tuning.objective import Objective
from ..tuning.steppers import FirstOrder, ForwardOnly
from ..tuning.teacher import Teacher
from ..tuning.trained import BEST, STEPS, Trained
from ..tuning.trainer import Trainer, TrainingState, newest_state
from .context import open_model

SMALLER: tuple[tuple[str, dict[str, bool]], ...] = (
    ("decoder layers run twice for a gradient", {"keep_graphs": False}),
    ("one decoder layer is in memory at a time", {"resident": False}),
    ("trained tensors and hidden states are in files", {"states_on_disk": True, "hidden_on_disk": True}),
)
"""What a run does, one after the other, where the GPU's memory runs out. None of it changes a bit of the result.

Several processes divide the trained tensors among them before they read layers one after the other.
"""


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
        ranks: the processes that train together.
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
    ranks: Ranks = ALONE
    low_rank: LowRankAdapter | None = None

    @classmethod
    def open(
        cls,
        run: TrainingDirectory,
        settings: type[TrainingRecipe],
        execution: Execution,
        permissions: Permissions = UNTRUSTED,
        ranks: Ranks = ALONE,
    ) -> Self:
        """Open a run that has been prepared.

        Args:
            run: its directory.
            settings: kind of its recipe.
            execution: how the work is carried out now; a run may go on in another way than it began.
            permissions: what the models' files may do.
            ranks: the processes that train together.

        Raises:
            FistaPrunerError: not a prepared run, its models or windows are gone or have changed, or a step has fewer
                passes than there are processes.
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
        passes = -(-recipe.step_windows // decision.numerics.batch_size)
        if passes < ranks.size:
            raise FistaPrunerError(
                f"{run.folder}: a step has {passes} passes of {decision.numerics.batch_size} windows, and {ranks.size} "
                f"processes share them: start at most {passes}"
            )
        layout = discover(model).only(decision.operators)
        return cls(run, recipe, record.fingerprint, model, layout, text, decision, permissions, ranks, low_rank)

    @property
    def trained(self) -> Trained:
        """The tensors to train, at their start."""
        return self.trained_by(self.ranks if self._divided else ALONE, in_files=self._in_files)

    def trained_by(self, ranks: Ranks = ALONE, *, in_files: bool = False) -> Trained:
        """Return the tensors to train, at their start, as processes keep them that divide them; or one alone."""
        folder = self.own(self.run.trained) if in_files else None
        return Trained(self.model, self.layout, self.recipe, folder, self.low_rank, ranks)

    @property
    def _in_files(self) -> bool:
        """Whether trained tensors are in files: as planned, or since fewer processes than planned divide them."""
        return self.decision.states_on_disk or self.ranks.size < self.decision.shards

    @property
    def _divided(self) -> bool:
        """Whether the processes divide the trained tensors, which one does not hold in its memory."""
        return self.ranks.size > 1 and (self._in_files or self.decision.shards > 1)

    def train(self, listener: Listener, after_snapshot: Callable[[], None]) -> tuple[Trained, TrainingState]:
        """Train, or go on training.

        Where the GPU's memory runs out, training goes on from the last snapshot with what needs less (:data:`SMALLER`).
        Several processes end; when they are started again, they go on with it.

        Args:
            listener: receives progress.
            after_snapshot: called when a state is on the disk.

        Returns:
            What holds the best weights, and where training ended.

        Raises:
            FistaPrunerError: the dense model is gone or has changed, the disk is full, or the GPU's memory runs out and
                nothing is left that needs less.
        """
        if self._in_files and not self.decision.states_on_disk:
            listener.say(
                f"trained tensors are in files: the plan of this run divides them among {self.decision.shards} "
                f"processes, and there {'is one' if self.ranks.size == 1 else f'are {self.ranks.size}'}"
            )
        self._remove_leftovers()
        while True:
            trained, snapshot = self.trained, newest_state(self.run, self.fingerprint)
            try:
                state = self._ended(trained, snapshot) or self._train(trained, snapshot, listener, after_snapshot)
            except torch.OutOfMemoryError:
                pass
            else:
                if self._divided and self.ranks.first:
                    del trained
                    trained = self._best(state.step)
                return trained, state
            del trained
            release_failed_memory()
            sentence = self._reduce_plan(listener)
            if self.ranks.size > 1:
                raise FistaPrunerError(f"{sentence}; give the same command again")

    def _remove_leftovers(self) -> None:
        """Remove scratch files that another number of processes has left in the run."""
        if not self.ranks.first:
            return
        for folder in (self.run.trained, self.run.hidden):
            own = {folder / str(rank) for rank in range(self.ranks.size)} if self.ranks.size > 1 else set()
            for path in set(folder.iterdir()) - own if folder.is_dir() else ():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def _reduce_plan(self, listener: Listener) -> str:
        """Take less of the GPU's memory from now on, also in a run that is resumed.

        Of several processes the one whose memory has run out records it, as the others may not hear of it.

        Returns:
            A sentence on it.

        Raises:
            FistaPrunerError: nothing is left that needs less.
        """
        ran_out = f"the memory of {self.model.device} ran out in training"
        shards: dict[str, Any] = {"shards": max(self.decision.shards, self.ranks.size)}
        divided = ("each process keeps its share of the trained tensors", shards)
        for what, changes in (SMALLER[0], *([] if self._divided else [divided]), *SMALLER[1:]):
            smaller = self.decision.model_copy(update=changes)
            if smaller == self.decision:
                continue
            sentence = f"{ran_out}, which goes on from the last state: {what}"
            with preparing(self.run.folder) if self.ranks.size > 1 else nullcontext():
                record = self.run.begun_record()
                if record.decision == self.decision:  # no other process has recorded it yet
                    kept = {"decision": smaller, "warnings": [*record.warnings, sentence]}
                    self.run.write_record(record.model_copy(update=kept))
            self.decision = smaller
            listener.say(sentence)
            return sentence
        raise FistaPrunerError(
            f"{ran_out}, even with one decoder layer in memory at a time, and trained tensors and hidden states in "
            f"files: free some of it and resume {self.run.folder}; or begin another run, whose plan takes what is free "
            "then, with shorter windows, or with --device cpu"
        )

    def _ended(self, trained: Trained, snapshot: Snapshot | None) -> TrainingState | None:
        """Leave the best weights of a run without further steps in ``trained``: it needs no dense model.

        Returns:
            Where training ended; None where it has not.
        """
        state = None if snapshot is None else TrainingState.of(snapshot.values)
        ended = state is not None and (state.stopped or state.step == self.decision.steps)
        if not all(self.ranks.gather(ended)) or snapshot is None:
            return None
        if self.ranks.first:
            self.run.states.tidy(snapshot.step)  # a kill while the last one was written may have left more
        trained.load(LazyTensors(snapshot.tensors.entries, snapshot.tensors.read))
        trained.restore()
        return state

    def _best(self, step: int) -> Trained:
        """Read the best weights of all layers from the last state, into files: other processes have kept most.

        Args:
            step: where training ended.

        Raises:
            FistaPrunerError: the state is damaged.
        """
        snapshot = newest_state(self.run, self.fingerprint)
        if snapshot is None or snapshot.step != step:
            raise FistaPrunerError(f"{self.run.states.folder} is gone or damaged; give the same command again")
        best = {name: entry for name, entry in snapshot.tensors.entries.items() if name.startswith((BEST, STEPS))}
        trained = self.trained_by(ALONE, in_files=True)
        trained.load(LazyTensors(best, snapshot.tensors.read))
        trained.restore()
        return trained

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
                about=self._about(),
                say=listener.say,
                tick=lambda done, total: listener.tick(self.progress, done, total),
                after_snapshot=after_snapshot,
                ranks=self.ranks,
            )
            with objective.resident(layers=self.decision.resident):
                return trainer.train()

    @property
    def keeps_graphs(self) -> bool:
        """Whether no layer runs twice; processes that divide trained tensors need one layer after the other."""
        return self.decision.keep_graphs and not self._divided

    @contextmanager
    def passes(self) -> Iterator[Store]:
        """Give the stores and threads of the run's passes for the block."""
        hidden = self.own(self.run.hidden) if self.decision.hidden_on_disk else None
        with cpu_threads(self.decision.numerics.threads), scratch_folder(hidden):
            yield scratch_factory(hidden, self.model.dtype, self.model.device)

    def _objective(self, windows: Tensor, store: Store, listener: Listener) -> Objective:
        """Make the loss that is trained; ``windows`` are those of every step."""
        return Objective(
            self.model,
            self.text,
            TokenLoss.named(str(self.recipe.loss), self.recipe.mix),
            self._teacher(windows, listener),
            self.decision.numerics.batch_size,
            store,
            keep_graphs=self.keeps_graphs,
            ranks=self.ranks,
        )

    def own(self, folder: Path) -> Path:
        """Return the part of a scratch folder that is this process's."""
        return folder if self.ranks.size == 1 else folder / str(self.ranks.rank)

    def _order(self) -> Tensor:
        return order(self.text, self.decision.steps, self.recipe.windows_per_step, self.recipe.data)

    def _about(self) -> dict[str, Any]:
        """Describe the run for the journal, so that steps without gradients can be taken again from it alone."""
        numerics = self.decision.numerics
        return {
            "recipe": self.recipe.model_dump(mode="json", exclude={"execution"}),
            "steps": self.decision.steps,
            "operators": sorted(self.decision.operators),
            "weights": stamps(self.model.checkpoint),
            "device": device_title(self.model.device),
            "dtype": numerics.dtype,
            "threads": numerics.threads,
            "torch": torch.__version__,
        }

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
            ranks=self.ranks,
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

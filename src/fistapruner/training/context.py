"""A run that trains, opened from its run directory alone: models, text, loss, state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..execution.context import open_model
from ..models.discovery import discover
from ..models.files.low_rank import LowRankAdapter
from ..models.files.safetensors import LazyTensors
from ..models.layerwise import LayerwiseModel
from ..models.layout import Layout
from ..models.source import UNTRUSTED, Permissions
from ..papers.mezo import RATE, ForwardOnly, standard_normal
from ..papers.mrpo import (
    Preference,
    PreferenceLoss,
    fixed_weights,
    held_out_weights,
    pair_weights,
    reference_margins,
    virtual_reference,
)
from ..papers.subzero import subspace_normal
from ..passes.check import check_model
from ..runs.align_directory import AlignDirectory
from ..runs.decision import TrainingDecision
from ..runs.identity import fingerprint, stamps
from ..runs.listener import Listener
from ..runs.snapshots import Snapshots
from ..runs.steps import read_steps
from ..runs.training_directory import TrainingDirectory
from ..runtime.devices import cpu_threads
from ..runtime.files import sha256_file
from ..settings.align_settings import PREFERENCE_LOSSES, AlignRecipe
from ..settings.execution_settings import Execution
from ..settings.training_settings import TrainingRecipe
from ..text.pairs import Pairs, pair_order
from ..text.training import TrainingText, order
from .distributed import ShardedSnapshots, World
from .loop import MAX_NOT_FINITE, Loop, State
from .loss import TokenLoss
from .masked import Trained, descent_of
from .objective import DIVERGENCE, LIKELIHOOD, AnswerObjective, Objective, PairObjective, PairTerms
from .references import ReferenceModel, reference_log_probabilities
from .teacher import Teacher

STEPS = {"recover": "recovery steps", "align": "alignment steps"}
"""Names of the progress of either verb."""


@dataclass(frozen=True)
class ReferenceMixture:
    """The references of a loss of pairs, combined.

    Args:
        names: of the references.
        references: (K, pairs, 2) their log-probabilities; ``weights``: (K, pairs).
        mixed: (pairs, 2) of the one reference that they are combined to.
    """

    names: tuple[str, ...]
    references: Tensor
    weights: Tensor
    mixed: Tensor


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
        world: the processes that train together.
    """

    run: TrainingDirectory
    recipe: Any
    fingerprint: str
    model: LayerwiseModel
    layout: Layout
    text: TrainingText
    decision: TrainingDecision
    permissions: Permissions = UNTRUSTED
    low_rank: LowRankAdapter | None = None
    world: World = field(default_factory=World)

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
        if not decision.folder.is_dir():
            raise FistaPrunerError(
                f"the model of the run in {run.folder} is not at {decision.folder} any more: name another --out"
            )
        model = open_model(permissions.at(decision.folder), recipe, dtype=decision.numerics.dtype)
        low_rank = LowRankAdapter.beside(decision.folder)
        same = decision.low_rank == (None if low_rank is None else low_rank.sampled)
        if not same or record.fingerprint != identity(recipe, model, text, decision):
            raise FistaPrunerError(
                f"{run.folder}: the model is not the one that the run began with; name another --out"
            )
        layout = discover(model).only(decision.operators)
        return cls(run, recipe, record.fingerprint, model, layout, text, decision, permissions, low_rank)

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
            ended = state is not None and (state.stopped or state.step == self.decision.steps)
            if state is None or not ended:
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

    @property
    def _states(self) -> Snapshots:
        folder = self.run.states.folder
        return self.run.states if self.world.size == 1 else ShardedSnapshots(folder, self.world)

    def _newest(self, trained: Trained | ForwardOnly) -> State | None:
        """Load the newest state of the run up to which the journal is whole; None where there is none."""
        lines, states = read_steps(self.run.steps_file), self._states
        if isinstance(states, ShardedSnapshots) and not isinstance(trained, ForwardOnly):
            values = states.restore(self.fingerprint, lines[-1]["step"] if lines else -1, trained)
            return None if values is None else State(**values)
        snapshot = self.run.states.newest(self.fingerprint, lines[-1]["step"]) if lines else None
        if snapshot is None:
            return None
        trained.load(LazyTensors(snapshot.tensors.entries, snapshot.tensors.read))
        return State(**snapshot.values)

    def _train(
        self,
        trained: Trained | ForwardOnly,
        state: State | None,
        listener: Listener,
        after_snapshot: Callable[[], None],
    ) -> State:
        windows = self._order()
        objective = self._objective(trained, windows, listener)
        held_out, world = self.text.held_out.nonzero().flatten().tolist(), self.world

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

        loop = Loop(
            self._states,
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
            lambda done, total: listener.tick(STEPS[self.run.verb], done, total),
            after_snapshot,
            world.tell,
        )
        with objective.resident(shared=not isinstance(trained, ForwardOnly)):
            return loop.run(state)

    def _objective(self, trained: Trained | ForwardOnly, windows: Tensor, listener: Listener) -> Objective:
        """Make the loss that is trained; ``windows`` are those of every step."""
        loss, teacher = TokenLoss.named(str(self.recipe.loss), self.recipe.mix), None
        if loss.share:
            teacher = self._teacher(
                [*self.text.held_out.nonzero().flatten().tolist(), *windows.flatten().tolist()], listener
            )
        return Objective(self.model, self._run(trained), self.text, loss, teacher, **self._passes)

    def _run(self, trained: Trained | ForwardOnly) -> Any:
        return self.model.run if isinstance(trained, ForwardOnly) else trained.run

    @property
    def _passes(self) -> dict[str, Any]:
        return {"batch_size": self.decision.numerics.batch_size, "checkpointing": self.decision.checkpointing}

    def _order(self) -> Tensor:
        return order(self.text, self.decision.steps, self.recipe.windows_per_step, self.recipe.data)

    def _teacher(self, windows: Sequence[int], listener: Listener) -> Teacher:
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
        assert self.decision.dense is not None
        if not self.decision.dense.is_dir():
            raise FistaPrunerError(
                f"the dense model of the run in {self.run.folder} is not at {self.decision.dense} any more: name "
                "another --out, and the model with --dense"
            )
        dense = open_model(self.permissions.at(self.decision.dense), self.recipe, dtype=self.decision.numerics.dtype)
        if tuple(stamps(dense.checkpoint)) != self.decision.dense_stamps:
            raise FistaPrunerError(f"{self.decision.dense} is not the dense model that the run began with")
        return dense


class AlignContext(TrainingContext):
    """An opened alignment run."""

    run: AlignDirectory
    recipe: AlignRecipe
    text: Pairs

    def _order(self) -> Tensor:
        return pair_order(self.text, self.decision.steps, self.recipe.pairs_per_step, self.recipe.data.seed)

    def _objective(self, trained: Trained | ForwardOnly, windows: Tensor, listener: Listener) -> Objective:
        recipe, preference, teacher = self.recipe, None, None
        if recipe.loss in PREFERENCE_LOSSES:
            mixture = self.mixture(self.references(listener))
            kind = cast(PreferenceLoss, recipe.loss)
            margins, weights = reference_margins(kind, mixture.references, mixture.weights, self._clip())
            preference = Preference(margins, weights, recipe.beta, recipe.label_smoothing)
        if anchor := recipe.resolved_anchor:
            teacher = self._teacher(
                [*self.text.windows("held_out")[::2], *windows[:, ::2].flatten().tolist()], listener
            )
        loss = DIVERGENCE if anchor else LIKELIHOOD
        objective = PairObjective(self.model, self._run(trained), self.text, loss, teacher, **self._passes)
        objective.terms = PairTerms(preference, float(recipe.loss == "sft"), anchor, recipe.loss == "accuracy")
        return objective

    def references(self, listener: Listener) -> dict[str, Tensor]:
        """Return the (pairs, 2) log-probabilities of the models, from the cache where it has them.

        Of a reference of the loss they are those of the steps, held out and of the test; of other models those of the
        test. Others are NaN. A dense model that is no reference of the loss, and is not known or not found, has none.
        """
        recipe, dense = self.recipe, self.decision.dense
        tokens = hashlib.sha256()
        for part in (self.text.tokens, self.text.marks):
            tokens.update(part.reshape(-1).numpy().data)  # without a copy
        files = {"pruned": stamps(self.model.checkpoint)}
        if dense is not None:
            files["dense"] = list(self.decision.dense_stamps)
        others = {
            name: open_model(self.permissions.at(Path(name)), recipe, dtype=self.decision.numerics.dtype)
            for name in recipe.resolved_references
            if name not in ("pruned", "dense")
        }
        files |= {name: stamps(model.checkpoint) for name, model in others.items()}
        there = dense is not None and dense.is_dir()

        def opened(name: str) -> LayerwiseModel | None:
            if name == "pruned":  # as it goes in, whatever the present state of the training is
                return open_model(self.permissions.at(self.decision.folder), recipe, dtype=self.decision.numerics.dtype)
            if name in others:
                return others[name]
            return self.open_dense() if name in recipe.resolved_references or there else None

        def reference(name: str) -> ReferenceModel:
            windows = self.text.windows("test")
            if name in recipe.resolved_references:
                windows = sorted({*self._order().flatten().tolist(), *self.text.windows("held_out"), *windows})
            made_from = json.dumps([files[name], tokens.hexdigest(), str(self.model.dtype), windows])
            return ReferenceModel(lambda: opened(name), windows, hashlib.sha256(made_from.encode()).hexdigest())

        models = {name: reference(name) for name in files}
        batch_size = self.decision.numerics.batch_size
        found = None
        if self.world.rank == 0:
            path = self.run.references_file
            found = reference_log_probabilities(path, models, self.text, batch_size, listener.say)
        told: dict[str, Tensor] = self.world.tell(found)
        return told

    def mixture(self, references: Mapping[str, Tensor]) -> ReferenceMixture:
        """Combine the references of the loss; a loss without any is told against the model that went in."""
        recipe = self.recipe
        names = recipe.resolved_references or ("pruned",)
        stacked = torch.stack([references[name] for name in names])
        if recipe.weights == "per-pair":
            weights = pair_weights(stacked)
        elif recipe.weights == "fixed":
            shares = recipe.resolved_shares or [1.0] * len(names)
            weights = fixed_weights(torch.tensor(shares, dtype=torch.float64), stacked.shape[1])
        else:
            held_out = stacked[:, [window // 2 for window in self.text.windows("held_out")[::2]]]
            rule = held_out_weights(held_out, "accuracy" if recipe.weights == "held-out" else "margin")
            weights = fixed_weights(rule, stacked.shape[1])
        kind = cast(PreferenceLoss, recipe.loss if recipe.loss in PREFERENCE_LOSSES else "dpo")
        return ReferenceMixture(names, stacked, weights, virtual_reference(kind, stacked, weights, self._clip()))

    @property
    def trained_pairs(self) -> list[int]:
        """Numbers of the pairs that the steps train on."""
        return sorted({window // 2 for window in self._order().flatten().tolist()})

    def test_log_probabilities(self, trained: Trained | ForwardOnly) -> Tensor:
        """Compute the (test pairs, 2) log-probabilities under the trained model."""
        objective = AnswerObjective(self.model, self._run(trained), self.text, LIKELIHOOD, None, **self._passes)
        windows = self.text.windows("test")
        own = self.world.part(windows, 2)
        return self.world.together(windows, own, objective.log_probabilities(own).flatten()).view(-1, 2)

    def _clip(self) -> float | None:
        return None if self.recipe.clip == "none" else float(self.recipe.clip)


def by_task(text: TrainingText, windows: Sequence[int], sums: Tensor, counts: Tensor) -> tuple[float, dict[str, float]]:
    """Return the mean loss per token or pair over tasks, and that of each of several tasks."""
    tasks = text.task[list(windows)]
    found = {
        name: float(sums[tasks == number].sum() / counts[tasks == number].sum())
        for number, name in enumerate(text.tasks)
        if bool((tasks == number).any())
    }
    return sum(found.values()) / len(found), found if len(found) > 1 else {}


def identity(recipe: TrainingRecipe, model: LayerwiseModel, text: TrainingText, decision: TrainingDecision) -> str:
    """Hash what decides the run's result."""
    more = [
        list(decision.dense_stamps),
        sorted(decision.operators),
        decision.windows_sha256,
        decision.steps,
        *([] if decision.low_rank is None else [decision.low_rank]),
    ]
    return fingerprint(recipe, model.checkpoint, text.tokens, decision.numerics, *more)

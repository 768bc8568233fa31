"""The context of an alignment run, opened from the run directory alone."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor

from ..activations.store import Store
from ..calibration.pairs import Pairs, pair_order
from ..errors import FistaPrunerError
from ..models.layerwise import LayerwiseModel
from ..recipes.align_settings import PREFERENCE_LOSSES, AlignRecipe
from ..runs.align_directory import AlignDirectory
from ..runs.identity import stamps
from ..runs.listener import Listener
from ..tuning.objective import Objective
from ..tuning.pair_objective import DIVERGENCE, LIKELIHOOD, AnswerObjective, PairObjective, Preference
from ..tuning.preference import (
    PreferenceLoss,
    fixed_weights,
    held_out_weights,
    pair_weights,
    reference_margins,
    virtual_reference,
)
from ..tuning.references import (
    ReferenceModel,
    answer_log_probabilities,
    log_probabilities_by_parts,
    reference_log_probabilities,
)
from ..tuning.trained import Trained
from .context import open_model
from .training_context import TrainingContext

START_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.1}
"""Most nats a token by which the model at step 0 may differ from what the reference ``pruned`` has cached.

Passes of other windows round otherwise: in bfloat16 0.025 nats a token were seen.
"""

CHECKED_PAIRS = 8
"""Held-out pairs on which that is checked."""


def reference_windows(name: str, recipe: AlignRecipe, pairs: Pairs, order: Tensor) -> list[int]:
    """List the windows whose log-probabilities under a model a run needs.

    Of a reference of the loss they are those of the steps (``order``), held out and of the test; of another model those
    of the test, and of the check of the start.
    """
    held_out, test = pairs.windows("held_out"), pairs.windows("test")
    if name in recipe.resolved_references:
        return sorted({*order.flatten().tolist(), *held_out, *test})
    return sorted([*held_out[: 2 * CHECKED_PAIRS], *test])


@dataclass(frozen=True)
class ReferenceMixture:
    """The references of a loss, combined.

    Args:
        names: of the references.
        references: (K, pairs, 2) their log-probabilities; ``weights``: (K, pairs).
        mixed: (pairs, 2) of the one reference that they are combined to.
    """

    names: tuple[str, ...]
    references: Tensor
    weights: Tensor
    mixed: Tensor


class AlignContext(TrainingContext):
    """An opened alignment run."""

    progress: ClassVar[str] = "alignment steps"

    run: AlignDirectory
    recipe: AlignRecipe
    text: Pairs

    def _order(self) -> Tensor:
        return pair_order(self.text, self.decision.steps, self.recipe.pairs_per_step, self.recipe.data.seed)

    def _objective(self, windows: Tensor, store: Store, listener: Listener) -> Objective:
        recipe = self.recipe
        references = self.references(store, listener)
        mixture, preference = self.mixture(references), None
        if recipe.loss in PREFERENCE_LOSSES:
            kind = cast(PreferenceLoss, recipe.loss)
            margins, weights = reference_margins(kind, mixture.references, mixture.weights, self._clip())
            preference = Preference(margins, weights, recipe.beta, recipe.label_smoothing)
        anchor, teacher = recipe.resolved_anchor, None
        if anchor:
            chosen = self.text.windows("held_out")[::2]
            teacher = self.teacher_of(windows[:, ::2], chosen, listener)
        if not (self.run.states.folder.is_dir() and any(self.run.states.folder.iterdir())):
            self._check_start(references["pruned"], store)
        return PairObjective(
            self.model,
            self.text,
            DIVERGENCE if anchor else LIKELIHOOD,
            teacher,
            self.decision.numerics.batch_size,
            store,
            keep_graphs=self.decision.keep_graphs,
            preference=preference,
            likelihood=float(recipe.loss == "sft"),
            anchor=anchor,
        )

    def references(self, store: Store, listener: Listener) -> dict[str, Tensor]:
        """Return the (pairs, 2) log-probabilities of the models, from the cache where it has them.

        Those that the run does not need are NaN (:func:`reference_windows`). A dense model that is no reference of the
        loss, and is not known or not found, has none.

        Raises:
            FistaPrunerError: the disk refuses.
        """
        recipe, order = self.recipe, self._order()
        tokens = hashlib.sha256()
        for part in (self.text.tokens, self.text.marks):
            tokens.update(part.reshape(-1).numpy().data)  # without a copy
        files, dense = {"pruned": stamps(self.model.checkpoint)}, self.decision.dense
        if dense is not None:
            files["dense"] = list(self.decision.dense_stamps)
        others = {
            name: open_model(self.permissions.at(Path(name)), recipe, dtype=self.decision.numerics.dtype)
            for name in recipe.resolved_references
            if name not in ("pruned", "dense")
        }
        files |= {name: stamps(model.checkpoint) for name, model in others.items()}
        there = dense is not None and dense.is_dir()

        def reference(name: str) -> ReferenceModel:
            used = name in recipe.resolved_references

            def opened() -> LayerwiseModel | None:
                if name == "pruned":
                    return self.model
                if name in others:
                    return others[name]
                return self.open_dense() if used or there else None

            identity = {
                "its weights": hashlib.sha256(json.dumps(files[name]).encode()).hexdigest(),
                "the tokens": tokens.hexdigest(),
                "its precision": str(self.model.dtype),
            }
            return ReferenceModel(opened, reference_windows(name, recipe, self.text, order), identity)

        return reference_log_probabilities(
            self.run.references_file,
            {name: reference(name) for name in files},
            self.text,
            self.decision.numerics.batch_size,
            store,
            listener.say,
            self._at_once,
            listener.tick,
        )

    def mixture(self, references: dict[str, Tensor]) -> ReferenceMixture:
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

    def test_log_probabilities(self, trained: Trained) -> Tensor:
        """Compute the (test pairs, 2) log-probabilities under the trained model."""
        windows = self.text.windows("test")
        found = torch.zeros(len(self.text.tokens) // 2, 2, dtype=torch.float64)
        with self.passes() as store:
            objective = self._answers(store)
            with objective.resident():
                for pairs, sums in log_probabilities_by_parts(
                    objective, windows, lambda index, layer: [trained.values(index, layer)], self._at_once
                ):
                    found[pairs] = sums
        return found[[window // 2 for window in windows[::2]]]

    @property
    def _at_once(self) -> int:
        """Windows whose log-probabilities are computed together; hidden states of fewer may be kept at once."""
        return max(len(self.text.windows("held_out")), self.recipe.step_windows)

    def _answers(self, store: Store) -> AnswerObjective:
        return AnswerObjective(self.model, self.text, LIKELIHOOD, None, self.decision.numerics.batch_size, store)

    def _clip(self) -> float | None:
        clip = self.recipe.clip
        return None if clip == "none" else float(clip)

    def _check_start(self, cached: Tensor, store: Store) -> None:
        """Compare the model before training with what the reference ``pruned`` has cached.

        Raises:
            FistaPrunerError: it is another one: wrong model, template or precision.
        """
        windows = self.text.windows("held_out")[: 2 * CHECKED_PAIRS]
        trained = self.trained
        own = answer_log_probabilities(
            self._answers(store), windows, lambda index, layer: [trained.values(index, layer)]
        )[0]
        tokens = self.text.marks[windows].sum(1).view(-1, 2)
        worst = float(((own - cached[[window // 2 for window in windows[::2]]]).abs() / tokens).max())
        if not worst <= START_TOLERANCE.get(self.model.dtype, 0.1):
            raise FistaPrunerError(
                f"{self.run.references_file}: the model before training is {worst:.2g} nats a token from what "
                "it holds of it (a fault in training)"
            )

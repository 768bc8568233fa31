"""What ``align`` does in its own way: preference pairs, reference models, preferences of the result."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..measure.logits import accuracy_error, preference_figures
from ..measure.run import add_warning
from ..models.layerwise import LayerwiseModel
from ..models.source import ModelSource
from ..papers.mezo import ForwardOnly
from ..papers.mrpo import (
    Preference,
    PreferenceLoss,
    accuracy,
    fixed_weights,
    held_out_weights,
    margins_of,
    pair_weights,
    reference_margins,
    virtual_reference,
)
from ..passes.check import check_model
from ..pruning.opened import open_model
from ..runs.directory import AlignDirectory, TrainingDirectory
from ..runs.listener import Listener
from ..runs.records import Alignment as Figures
from ..runs.records import Report
from ..runs.settled import stamps
from ..runtime.numerics import mean_and_error
from ..settings.align import PREFERENCE_LOSSES, AlignRecipe
from ..text.pairs import Pairs, pair_order, read_pairs, tokenise_pairs
from ..text.training import TrainingText
from .masked import Trained
from .objective import DIVERGENCE, LIKELIHOOD, AnswerObjective, Objective, PairObjective, PairTerms
from .opened import Training
from .references import ReferenceModel, reference_log_probabilities
from .settle import Inputs, Request, find_input

LOWEST_REWARD = -1.0
"""Mean reward of the chosen answers below which a warning says that they have become less likely."""

RESULT = "aligned"


class Alignment(Training):
    """An opened run of ``align``."""

    verb: ClassVar[str] = "align"
    settings: ClassVar[type[Any]] = AlignRecipe
    directory: ClassVar[type[TrainingDirectory]] = AlignDirectory
    window: ClassVar[str] = "max_length"
    run: AlignDirectory
    recipe: AlignRecipe
    text: Pairs

    @staticmethod
    def check_text(recipe: AlignRecipe) -> None:
        """See :class:`.Training`."""
        if recipe.data.pairs is None:
            raise FistaPrunerError("say what to train on with --data: a .jsonl file of preference pairs")
        read_pairs(recipe.data.pairs)

    @staticmethod
    def resolved(request: Request[AlignRecipe], source: ModelSource) -> AlignRecipe:
        """See :class:`.Training`."""
        recipe = request.recipe
        changes = {
            "references": recipe.resolved_references,
            "anchor": recipe.resolved_anchor,
        }
        return recipe.with_absolute_files().model_copy(update=changes)

    @staticmethod
    def check(inputs: Inputs[AlignRecipe], request: Request[AlignRecipe], listener: Listener) -> None:
        """Find the other reference models.

        Raises:
            FistaPrunerError: no model, or one of another tokenizer or vocabulary.
        """
        names = []
        for name in inputs.recipe.references:
            if name in ("pruned", "dense"):
                names.append(name)
                continue
            source = find_input(name, request.permissions, "align references")
            model = open_model(source, inputs.recipe)
            tokens = source.tokenizer().get_vocab(), model.vocabulary
            if tokens != (inputs.source.tokenizer().get_vocab(), inputs.model.vocabulary):
                raise FistaPrunerError(
                    f"references {name}: its tokens are not those of {inputs.source.folder}; name models that share "
                    "its tokenizer"
                )
            check_model(model)
            names.append(str(source.folder.absolute()))
        inputs.recipe = inputs.recipe.model_copy(update={"references": tuple(names)})

    @staticmethod
    def sizes(inputs: Inputs[AlignRecipe], listener: Listener) -> tuple[TrainingText, dict[str, int]]:
        """Tokenise and split the pairs.

        Raises:
            FistaPrunerError: the tokenizer refuses a text, or too few pairs are left.
        """
        recipe = inputs.recipe

        def warn(sentence: str) -> None:
            listener.say(sentence)
            inputs.warnings.append(sentence)

        pairs = read_pairs(str(recipe.data.pairs))
        text = tokenise_pairs(pairs, recipe.data, inputs.tokenizer, inputs.seqlen, warn)
        trained, held_out, test = (len(text.windows(side)) // 2 for side in ("trained", "held_out", "test"))
        listener.say(f"{trained} pairs to train on, {held_out} held out, {test} to test")
        inputs.model.check_tokens(text.tokens)
        text.facts["source"] = Path(str(recipe.data.pairs)).name
        return text, {
            "seqlen": text.tokens.shape[1],
            "steps": recipe.steps or math.ceil(trained * recipe.epochs / recipe.pairs_per_step),
            "stored": len(text.tokens) if recipe.resolved_anchor > 0 else 0,
            "held_out": 2 * held_out,
            "together": 2,
        }

    @staticmethod
    def cut(
        run: TrainingDirectory, inputs: Inputs[AlignRecipe], text: TrainingText | None, listener: Listener
    ) -> TrainingText:
        """See :class:`.Training`."""
        assert text is not None
        run.write_text(text, json.dumps(inputs.recipe.data.model_dump(mode="json")))
        return text

    def order(self) -> Tensor:
        """See :class:`.Training`."""
        return pair_order(self.text, self.decision.steps, self.recipe.pairs_per_step, self.recipe.data.seed)

    def objective(self, run: Any, windows: Tensor, listener: Listener) -> Objective:
        """See :class:`.Training`."""
        recipe, preference, teacher = self.recipe, None, None
        if recipe.loss in PREFERENCE_LOSSES:
            _, stacked, weights = self.weighed(self.references(listener))
            margins, weights = reference_margins(cast(PreferenceLoss, recipe.loss), stacked, weights, self._clip)
            preference = Preference(margins, weights, recipe.beta)
        if anchor := recipe.resolved_anchor:
            chosen = [*self.text.windows("held_out")[::2], *windows[:, ::2].flatten().tolist()]
            teacher = self.teacher(chosen, listener)
        loss = DIVERGENCE if anchor else LIKELIHOOD
        objective = PairObjective(self.model, run, self.text, loss, teacher, **self.passes)
        objective.terms = PairTerms(preference, float(recipe.loss == "sft"), anchor, recipe.loss == "accuracy")
        return objective

    def references(self, listener: Listener) -> dict[str, Tensor]:
        """Return the (pairs, 2) log-probabilities of the models, from the cache where it has them.

        Of a reference of the loss they are those of the steps, held out and of the test; of other models those of the
        test. Others are NaN. A dense model that is no reference of the loss, and is not known or not found, has none.
        """
        recipe, dense, dtype = self.recipe, self.decision.dense, self.decision.numerics.dtype
        tokens = hashlib.sha256()
        for part in (self.text.tokens, self.text.marks):
            tokens.update(part.reshape(-1).numpy().data)  # without a copy
        test = self.text.windows("test")
        used = sorted({*self.order().flatten().tolist(), *self.text.windows("held_out"), *test})

        def opened(name: str) -> LayerwiseModel | None:
            if name == "dense":
                needed = name in recipe.resolved_references or (dense is not None and dense.is_dir())
                return self.open_dense() if needed else None
            folder = self.decision.folder if name == "pruned" else Path(name)
            return open_model(self.permissions.at(folder), recipe, dtype=dtype)

        def reference(name: str) -> ReferenceModel:
            windows = used if name in recipe.resolved_references else test
            files: Any = list(self.decision.dense_stamps)
            if name != "dense":
                model = self.model if name == "pruned" else opened(name)
                files = None if model is None else stamps(model.checkpoint)
            made_from = json.dumps([files, tokens.hexdigest(), dtype, windows])
            return ReferenceModel(lambda: opened(name), windows, hashlib.sha256(made_from.encode()).hexdigest())

        found, names = None, dict.fromkeys(("pruned", *recipe.resolved_references, *(("dense",) if dense else ())))
        if self.world.rank == 0:
            path, batch_size = self.run.references_file, self.decision.numerics.batch_size
            models = {name: reference(name) for name in names}
            found = reference_log_probabilities(path, models, self.text, batch_size, listener.say)
        told: dict[str, Tensor] = self.world.tell(found)
        return told

    def weighed(self, references: Mapping[str, Tensor]) -> tuple[tuple[str, ...], Tensor, Tensor]:
        """Return the references of the loss: names, (K, pairs, 2) log-probabilities, and (K, pairs) weights.

        A loss without any is told against the model that went in.
        """
        recipe, names = self.recipe, self.recipe.resolved_references or ("pruned",)
        stacked = torch.stack([references[name] for name in names])
        if recipe.weights == "per-pair":
            return names, stacked, pair_weights(stacked)
        if recipe.weights == "fixed":
            shares = torch.ones(len(names), dtype=torch.float64)
        else:
            held_out = stacked[:, [window // 2 for window in self.text.windows("held_out")[::2]]]
            shares = held_out_weights(held_out, "accuracy" if recipe.weights == "held-out" else "margin")
        return names, stacked, fixed_weights(shares, stacked.shape[1])

    @property
    def _clip(self) -> float | None:
        return None if self.recipe.clip == "none" else float(self.recipe.clip)

    def measured(self, trained: Trained | ForwardOnly, listener: Listener) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute (test pairs, 2) log-probabilities of the trained model, and those of the other models."""
        windows = self.text.windows("test")
        listener.say(f"log-probabilities of {len(windows) // 2} test pairs under the aligned model")
        objective = AnswerObjective(self.model, self.runner(trained), self.text, LIKELIHOOD, None, **self.passes)
        own = self.world.part(windows, 2)
        found = self.world.together(windows, own, objective.log_probabilities(own).flatten()).view(-1, 2)
        return found, self.references(listener)

    def describe(self, measured: tuple[Tensor, dict[str, Tensor]], report: Report, listener: Listener) -> None:
        """Add to the report what the trained model prefers on the test pairs."""
        (own, references), text, recipe = measured, self.text, self.recipe
        if self.decision.dense is not None and "dense" not in references:
            gone = f"no preferences of the dense model, which is not at {self.decision.dense} any more"
            add_warning(report, gone, listener)
        windows = text.windows("test")
        places = [window // 2 for window in windows[::2]]
        names, stacked, weights = self.weighed(references)
        kind = cast(PreferenceLoss, recipe.loss if recipe.loss in PREFERENCE_LOSSES else "dpo")
        mixed = virtual_reference(kind, stacked, weights, self._clip)
        models: dict[str, Tensor] = {
            name: references[name][places] for name in ("dense", "pruned") if name in references
        }
        rewards = recipe.beta * (own - mixed[places])
        margins = margins_of(rewards)
        trained = sorted({window // 2 for window in self.order().flatten().tolist()})
        shares = weights[:, trained].mean(1).tolist()
        (margin, margin_error), (chosen, chosen_error), (rejected, rejected_error) = (
            mean_and_error(values) for values in (margins, rewards[:, 0], rewards[:, 1])
        )
        report.alignment = Figures(
            pairs=len(text.windows("trained")) // 2,
            held_out_pairs=len(text.windows("held_out")) // 2,
            test_pairs=len(places),
            left_out=next(iter(text.facts["tasks"].values()))["too_long"],
            references=dict(zip(names, shares, strict=True)) if recipe.resolved_references else {},
            test=preference_figures({**models, RESULT: own}, text.marks[windows].sum(1).view(-1, 2), RESULT),
            reward_accuracy=float(accuracy(margins)),
            reward_accuracy_error=accuracy_error(margins),
            margin=margin,
            margin_error=margin_error,
            chosen_reward=chosen,
            chosen_reward_error=chosen_error,
            rejected_reward=rejected,
            rejected_reward_error=rejected_error,
        )
        if chosen < LOWEST_REWARD:
            report.warnings.append(
                f"the mean reward of the chosen answers is {chosen:.2f}: they have become much less likely than they "
                "were; try a lower --lr, fewer --steps, a larger --set beta, or --set anchor=0.1"
            )

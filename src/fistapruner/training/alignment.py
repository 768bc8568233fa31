"""What ``align`` does in its own way: preference pairs, reference models, preferences of the result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..measure.logits import accuracy_error, preference_figures
from ..models.safetensors import SafetensorsFile, write_tensors
from ..papers import mrpo
from ..papers.mezo import ForwardOnly
from ..passes.stream import check_model
from ..pruning.context import open_model
from ..runs.records import Alignment as Figures
from ..runs.records import Report
from ..runtime.numerics import mean_and_error
from ..settings.align import PREFERENCE_LOSSES, AlignRecipe
from ..text.examples import read_pairs
from ..text.training import Pairs, pair_order, tokenise_pairs
from .loss import Objective, PairObjective
from .masked import Trained
from .recovery import Recovery, find_input

LOWEST_REWARD = -1.0  # mean reward of the chosen answers below which a warning says that they are less likely


class Alignment(Recovery):
    """A run of ``align``; what is not said here is as in :class:`.Recovery`."""

    settings: ClassVar[type[Any]] = AlignRecipe
    texts: ClassVar[str] = "pairs"
    choices: ClassVar[str] = "a .jsonl file of preference pairs"
    window: ClassVar[str] = "max_length"
    progress: ClassVar[str] = "alignment steps"
    recipe: AlignRecipe
    text: Pairs

    def resolved(self) -> AlignRecipe:
        recipe = self.recipe
        if recipe.data.pairs is not None:
            read_pairs(recipe.data.pairs)
        names = ("references", "anchor")
        return recipe.model_copy(update={name: getattr(recipe, f"resolved_{name}") for name in names})

    def check(self) -> dict[str, int]:
        """Find the other reference models, tokenise and split the pairs; see :class:`.Recovery`."""
        names, recipe, model = list(self.recipe.references), self.recipe, self.model
        for place, name in enumerate(names):
            if name not in ("pruned", "dense"):
                source = find_input(name, self.permissions, "align references")
                other = open_model(source, recipe)
                tokens = self.source.tokenizer().get_vocab(), model.vocabulary
                if tokens != (source.tokenizer().get_vocab(), other.vocabulary):
                    raise FistaPrunerError(
                        f"references {name}: its tokens are not those of {self.source.folder}; name models that "
                        "share its tokenizer"
                    )
                check_model(other)
                names[place] = str(source.folder.absolute())
        self.recipe = recipe = recipe.model_copy(update={"references": tuple(names)})
        pairs = read_pairs(str(recipe.data.pairs))
        text = self.text = tokenise_pairs(pairs, recipe.data, self.tokenizer, self.seqlen, self.warn)
        trained, held_out, test = (len(text.windows(side)) // 2 for side in ("trained", "held_out", "test"))
        self.listener.say(f"{trained} pairs to train on, {held_out} held out, {test} to test")
        model.check_tokens(text.tokens)
        text.facts["source"] = Path(str(recipe.data.pairs)).name
        return {
            "seqlen": text.tokens.shape[1],
            "steps": recipe.steps or math.ceil(trained * recipe.epochs / recipe.pairs_per_step),
            "stored": len(text.tokens) if recipe.resolved_anchor > 0 else 0,
            "held_out": 2 * held_out,
            "together": 2,
        }

    def order(self) -> Tensor:
        return pair_order(self.text, self.decision.steps, self.recipe.pairs_per_step, self.recipe.data.seed)

    def objective(self, run: Any, windows: Tensor) -> Objective:
        recipe, references, teacher = self.recipe, None, None
        if recipe.loss in PREFERENCE_LOSSES:
            _, stacked, weights = self._weighed(self.references())
            loss: Any = recipe.loss
            references = mrpo.reference_margins(loss, stacked, weights)
        if anchor := recipe.resolved_anchor:
            chosen = [*self.text.windows("held_out")[::2], *windows[:, ::2].flatten().tolist()]
            teacher = self.teacher(chosen)
        terms: dict[str, Any] = {"references": references, "beta": recipe.beta, "anchor": anchor}
        terms |= {"likelihood": float(recipe.loss == "sft"), "accuracy": recipe.loss == "accuracy"}
        return PairObjective(self.model, run, self.text, 0.0, teacher, **terms, **self.passes)

    def references(self) -> dict[str, Tensor]:
        """Return the (pairs, 2) log-probabilities of the models, computed once and then read from a file.

        A reference enters a preference loss as these two numbers a pair. Of a reference of the loss they are those of
        the steps, held out and of the test; of the other models those of the test. Others are NaN.
        """
        found: dict[str, Tensor] = {}
        if self.world.rank == 0:
            path = self.run.references_file
            with suppress(FistaPrunerError, OSError):
                file = SafetensorsFile(path)
                found = {name: file.read(name).clone() for name in file.entries}
                found = found if file.metadata.get("made_from") == self.fingerprint else {}
            if not found:
                known = ("dense",) if self.decision.dense else ()
                names = dict.fromkeys(("pruned", *self.recipe.resolved_references, *known))
                found = {name: self._reference(name) for name in names}
                write_tensors(path, found, {"made_from": self.fingerprint})
        told: dict[str, Tensor] = self.world.tell(found)
        return told

    def _reference(self, name: str) -> Tensor:
        """Compute the (pairs, 2) log-probabilities of one model."""
        windows = self.text.windows("test")
        if name in self.recipe.resolved_references:
            windows = sorted({*self.order().flatten().tolist(), *self.text.windows("held_out"), *windows})
        self.listener.say(f"log-probabilities of {len(windows) // 2} pairs under the {name} model")
        folder = self.decision.folder if name == "pruned" else Path(name)
        model = self.open_dense() if name == "dense" else self.opened(folder)
        values = torch.full((len(self.text.tokens) // 2, 2), torch.nan, dtype=torch.float64)
        with model.resident():
            objective = Objective(model, model.run, self.text, 0.0, None, self.decision.numerics.batch_size)
            values[[window // 2 for window in windows[::2]]] = -objective.losses(windows).view(-1, 2)
        return values

    def _weighed(self, references: Mapping[str, Tensor]) -> tuple[tuple[str, ...], Tensor, Tensor]:
        """Return names, (K, pairs, 2) log-probabilities and (K, pairs) weights of references, or the input."""
        recipe, names = self.recipe, self.recipe.resolved_references or ("pruned",)
        stacked = torch.stack([references[name] for name in names])
        weights = mrpo.weigh(stacked, recipe.weights, [n // 2 for n in self.text.windows("held_out")[::2]])
        if recipe.loss == "harmonic" and recipe.clip != "none":
            stacked = mrpo.clipped(stacked, recipe.clip)
        return names, stacked, weights

    def describe(self, trained: Trained | ForwardOnly, report: Report | None) -> None:
        """Add to the report what the trained model prefers on the test pairs."""
        text, recipe, windows = self.text, self.recipe, self.text.windows("test")
        self.listener.say(f"log-probabilities of {len(windows) // 2} test pairs under the aligned model")
        objective = Objective(self.model, trained.run, text, 0.0, None, **self.passes)
        part = self.world.part(windows, 2)
        own = -self.world.together(windows, part, objective.losses(part)).view(-1, 2)
        references = self.references()
        if report is None:
            return
        places = [window // 2 for window in windows[::2]]
        names, stacked, weights = self._weighed(references)
        kind: Any = recipe.loss if recipe.loss in PREFERENCE_LOSSES else "dpo"
        mixed = mrpo.virtual_reference(kind, stacked, weights)
        models: dict[str, Tensor] = {n: references[n][places] for n in ("dense", "pruned") if n in references}
        rewards = recipe.beta * (own - mixed[places])
        margins = mrpo.margins_of(rewards)
        used = sorted({window // 2 for window in self.order().flatten().tolist()})
        shares = weights[:, used].mean(1).tolist()
        figures = {"margin": margins, "chosen_reward": rewards[:, 0], "rejected_reward": rewards[:, 1]}
        means = {name: mean_and_error(values) for name, values in figures.items()}
        report.alignment = Figures(
            pairs=len(text.windows("trained")) // 2,
            held_out_pairs=len(text.windows("held_out")) // 2,
            test_pairs=len(places),
            left_out=next(iter(text.facts["tasks"].values()))["too_long"],
            references=dict(zip(names, shares, strict=True)) if recipe.resolved_references else {},
            test=preference_figures({**models, "aligned": own}, text.marks[windows].sum(1).view(-1, 2), "aligned"),
            reward_accuracy=float(mrpo.accuracy(margins)),
            reward_accuracy_error=accuracy_error(margins),
            **{name: mean for name, (mean, _) in means.items()},
            **{f"{name}_error": error for name, (_, error) in means.items()},
        )
        if (chosen := means["chosen_reward"][0]) < LOWEST_REWARD:
            report.warnings.append(
                f"the mean reward of the chosen answers is {chosen:.2f}: they have become much less likely than they "
                "were; try a lower --lr, fewer --steps, a larger --set beta, or --set anchor=0.1"
            )

"""Define the settings of an alignment run: pairs, loss, and references."""

from __future__ import annotations

import math
import os
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from ..errors import FistaPrunerError
from .base import PATHS_TOO, Seed, Settings, word_or_number
from .training_settings import TrainingRecipe, words

PREFERENCE_LOSSES = ("dpo", "multi-dpo", "harmonic", "geometric")
"""Losses that compare the answers of a pair; they have references."""


Clip = Annotated[Literal["none"] | float, word_or_number("none", "none or a number is expected")]


class PairData(Settings):
    """Set the pairs that a run trains on."""

    pairs: Annotated[str | None, PATHS_TOO] = Field(
        None,
        description="Preference pairs: a .jsonl file as TRL reads it, with chosen, rejected and perhaps prompt, each a "
        "text or a list of messages.",
    )
    max_length: int | None = Field(
        None,
        ge=8,
        description="Tokens of prompt and answer; what is longer is cut at its end. Without it 1024, or the model's "
        "maximum length if that is shorter.",
    )
    held_out: float = Field(
        0.1,
        gt=0.0,
        le=0.4,
        description="Share of the prompts that is held out from training, to choose the step that is kept; at most "
        "512 prompts.",
    )
    test: float = Field(
        0.1, gt=0.0, le=0.4, description="Share of the prompts that the result is measured on, and nothing else."
    )
    seed: Seed = Field(0, description="Seed of the order of the pairs.")


class AlignRecipe(TrainingRecipe):
    """Hold all settings of an alignment run."""

    verb: ClassVar[str] = "align"
    rate_share: ClassVar[float] = 0.05

    loss: Literal["dpo", "multi-dpo", "harmonic", "geometric", "sft", "accuracy", "none"] = Field(
        "dpo",
        description="dpo (one reference), multi-dpo (the mean of dpo over references), harmonic (dpo with the harmonic "
        "mean of the references; MRPO), geometric (with their geometric mean), sft (cross-entropy of the chosen "
        "answers), accuracy (the share of pairs whose rejected answer is as likely; mezo and subzero only, as it has "
        "no gradient), or none (the anchor alone: distillation).",
    )
    references: Annotated[tuple[str, ...], BeforeValidator(words)] = Field(
        (),
        description="Reference models of the loss: pruned (the model that goes in), dense, and other models or runs "
        "with the same tokenizer; two or more but for dpo. Without it pruned for dpo, and pruned,dense for the losses "
        "of several references.",
    )
    weights: Literal["fixed", "held-out", "held-out-margin", "per-pair"] = Field(
        "fixed",
        description="How much each of several references counts: fixed, held-out (in proportion to its accuracy on "
        "the held-out pairs), held-out-margin (to its mean margin there), or per-pair (to its margin on the very pair "
        "that the loss uses; MRPO).",
    )
    shares: Annotated[tuple[float, ...], BeforeValidator(words)] = Field(
        (),
        description="The fixed weights, one for each reference in their order, such as 0.3,0.7; without it they are "
        "equal.",
    )
    clip: Clip = Field(
        0.1,
        description="Trust region of harmonic: how far other references may be from the first, which is "
        "pruned where it is one, as a share of its log-probabilities, or none.",
    )
    beta: float = Field(0.1, gt=0.0, description="β of DPO: larger values keep the model closer to the references.")
    label_smoothing: float = Field(
        0.0, ge=0.0, lt=0.5, description="Assumed share of pairs whose answers are swapped (conservative DPO)."
    )
    anchor: float | None = Field(
        None,
        ge=0.0,
        description="Factor of the divergence from the dense model's predictions of the chosen answers, added to the "
        "loss. Without it 0, and 1 for the loss none.",
    )
    data: PairData = Field(PairData(), description="Preference pairs.")
    steps: int | None = Field(None, ge=1, description="Optimizer steps; without it all training pairs, epochs times.")
    epochs: int = Field(1, ge=1, description="How often all training pairs are passed.")
    pairs_per_step: int = Field(16, ge=1, description="Pairs of one optimizer step.")

    @model_validator(mode="after")
    def _consistent(self) -> AlignRecipe:
        given, several = len(self.references), self.loss in ("multi-dpo", "harmonic", "geometric")
        twice = {name for name in self.references if self.references.count(name) > 1}
        if twice:
            raise ValueError(f"references: {twice.pop()} is named twice")
        if self.loss == "dpo" and given > 1:
            raise ValueError(
                "references: dpo has one reference; for several take loss multi-dpo, harmonic or geometric"
            )
        if several and given == 1:
            raise ValueError(f"references: {self.loss} has several references; for one take loss dpo")
        if self.loss == "accuracy" and not self.zeroth_order:
            raise ValueError("loss: accuracy has no gradient; take optimizer mezo or subzero")
        if self.loss in ("sft", "accuracy", "none") and given:
            raise ValueError(f"references: the loss {self.loss} has none")
        if self.loss == "none" and self.anchor == 0:
            raise ValueError("anchor: it is 0, and the loss none is the anchor alone")
        if not several and self.weights != "fixed":
            raise ValueError(f"weights: the loss {self.loss} has no several references to weigh")
        if self.shares:
            if not several or self.weights != "fixed":
                raise ValueError("shares: they are the fixed weights of several references")
            if len(self.shares) != len(self.resolved_references):
                names = ",".join(self.references or self.resolved_references)
                raise ValueError(f"shares: one number for each of {names} is expected")
            if not all(share > 0 for share in self.shares) or not math.isclose(sum(self.shares), 1, rel_tol=1e-6):
                raise ValueError("shares: numbers above 0 with the sum 1 are expected")
        if self.data.held_out + self.data.test > 0.5:
            raise ValueError("data.held_out and data.test: at most half of the prompts may be kept from training")
        if (size := self.execution.batch_size) is not None and size % 2:
            raise ValueError(
                f"execution.batch_size is {size}: both answers of a pair are in one pass, so it must be even"
            )
        return self

    def refuse_idle(self) -> None:
        """Refuse settings that have no effect with this loss.

        It is no part of the validation, as all rows of a comparison share their settings.

        Raises:
            FistaPrunerError: names the first of them.
        """
        fields = type(self).model_fields
        if self.loss != "harmonic" and self.clip != fields["clip"].default:
            raise FistaPrunerError(f"clip {self.clip}: it is a setting of harmonic, and the loss is {self.loss}")
        if self.label_smoothing and self.loss not in PREFERENCE_LOSSES:
            raise FistaPrunerError(
                f"label_smoothing {self.label_smoothing:g}: it is a setting of {', '.join(PREFERENCE_LOSSES)}, and the "
                f"loss is {self.loss}"
            )

    @property
    def resolved_references(self) -> tuple[str, ...]:
        """Names of the references of the loss, the pruned model first where it is one; of others their places."""
        if self.loss in ("sft", "accuracy", "none"):
            return ()
        default = ("pruned",) if self.loss == "dpo" else ("pruned", "dense")
        return tuple(sorted(self.references or default, key=lambda name: name != "pruned"))

    @property
    def resolved_shares(self) -> tuple[float, ...]:
        """The fixed weights in the order of ``resolved_references``; empty where they are equal."""
        given = dict(zip(self.references or self.resolved_references, self.shares, strict=False))
        return tuple(given[name] for name in self.resolved_references) if given else ()

    @property
    def resolved_anchor(self) -> float:
        """Factor of the divergence from the dense model."""
        if self.anchor is None:
            return 1.0 if self.loss == "none" else 0.0
        return self.anchor

    @property
    def step_windows(self) -> int:
        return 2 * self.pairs_per_step

    @property
    def dense_for(self) -> str | None:
        if "dense" in self.resolved_references:
            return "--references dense" if self.loss == "dpo" else f"--loss {self.loss}"
        if self.resolved_anchor > 0:
            return "--loss none" if self.loss == "none" else "--anchor"
        return ""

    def with_absolute_files(self) -> AlignRecipe:
        pairs = self.data.pairs and os.path.abspath(self.data.pairs)
        references = tuple(os.path.abspath(name) if os.path.isdir(name) else name for name in self.references)
        data = self.data.model_copy(update={"pairs": pairs})
        return self.model_copy(update={"data": data, "references": references})

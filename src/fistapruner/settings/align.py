"""Define the settings of an alignment run: pairs, loss, and references."""

from __future__ import annotations

import os
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from .base import SEVERAL, Seed, Settings
from .train import TrainingRecipe

PREFERENCE_LOSSES = ("dpo", *SEVERAL)
"""Losses that compare the answers of a pair; they have references."""


def _words(value: Any) -> Any:
    return tuple(word.strip() for word in value.split(",")) if isinstance(value, str) else value


class PairData(Settings):
    """Set the pairs that a run trains on."""

    pairs: str | None = Field(
        None,
        description="Preference pairs: a .jsonl file as TRL reads it; with chosen, rejected and perhaps prompt, each a "
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
        "512 prompts. A tenth of all measures the result.",
    )
    seed: Seed = Field(0, exclude=True)


class AlignRecipe(TrainingRecipe):
    """Hold all settings of an alignment run."""

    verb: ClassVar[str] = "align"
    rate_share: ClassVar[float] = 0.05

    loss: Literal["dpo", "multi-dpo", "harmonic", "geometric", "sft", "accuracy", "none"] = Field(
        "dpo",
        description="dpo, multi-dpo, harmonic, geometric, sft, accuracy or none; multi-dpo is the mean of dpo over "
        "references, harmonic and geometric are dpo with a mean of the references (MRPO), sft the cross-entropy of the "
        "chosen answers, accuracy the share of pairs whose rejected answer is as likely, and none distillation alone.",
    )
    references: Annotated[tuple[str, ...], BeforeValidator(_words)] = Field(
        (),
        description="Reference models of the loss: pruned (the model that goes in), dense, and other models or runs "
        "with the same tokenizer. Without it pruned for dpo, and pruned,dense for the losses of several references.",
    )
    weights: Literal["fixed", "held-out", "held-out-margin", "per-pair"] = Field(
        "fixed",
        description="How much each of several references counts: fixed (all the same), held-out (in proportion to its "
        "accuracy on the held-out pairs), held-out-margin (to its mean margin there), or per-pair (to its margin on "
        "the very pair that the loss uses; MRPO).",
    )
    clip: Literal["none"] | float = Field(
        0.1,
        description="Trust region of harmonic: how far other references may be from the first, which is "
        "pruned where it is one, as a share of its log-probabilities, or none.",
    )
    beta: float = Field(0.1, gt=0.0, description="β of DPO: larger values keep the model closer to the references.")
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
    def _number_of_references(self) -> AlignRecipe:
        given, several = len(set(self.references)), self.loss in SEVERAL
        if self.references and (given < len(self.references) or (given > 1) != several):
            right = "two or more different ones for" if several else "one for"
            raise ValueError(f"references {','.join(self.references)}: {right} the loss {self.loss}")
        return self

    @property
    def resolved_references(self) -> tuple[str, ...]:
        """Names of the references of the loss, the pruned model first where it is one; of others their places."""
        if self.loss not in PREFERENCE_LOSSES:
            return ()
        default = ("pruned",) if self.loss == "dpo" else ("pruned", "dense")
        return tuple(sorted(self.references or default, key=lambda name: name != "pruned"))

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
            return "reference dense" if self.loss == "dpo" else f"--loss {self.loss}"
        if self.resolved_anchor > 0:
            return "--loss none" if self.loss == "none" else "anchor"
        return ""

    def with_absolute_files(self) -> AlignRecipe:
        pairs = self.data.pairs and os.path.abspath(self.data.pairs)
        references = tuple(os.path.abspath(name) if os.path.isdir(name) else name for name in self.references)
        data = self.data.model_copy(update={"pairs": pairs})
        return self.model_copy(update={"data": data, "references": references})

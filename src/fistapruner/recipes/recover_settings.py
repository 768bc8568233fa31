"""Define the settings of a recovery run: what is trained, how, on which text, against which loss."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from .base import RunRecipe, Settings
from .loading import parse_count
from .patterns import check_pattern
from .settings import Execution, Seed

PARAMETERS = ("lora", "full", "spp", "hira", "norms")
"""What is trained: how an operator's effective weight is made from trained tensors."""


def _count(value: Any) -> Any:
    return parse_count(value) if isinstance(value, str) else value


def _number(value: Any) -> Any:
    """Read a number from the text of a command line; other text stays, for validation to name."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _rate(value: Any) -> Any:
    value = _number(value)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value != "auto" and not (number and 0 < value < math.inf):
        raise ValueError("auto or a number above 0 is expected")
    return value


def _words(value: Any) -> Any:
    """Split ``norms,biases``; ``none`` is no word."""
    if isinstance(value, str):
        return tuple(word.strip() for word in value.split(",") if word.strip() not in ("", "none"))
    return value


Count = Annotated[int, BeforeValidator(_count)]


class TrainingData(Settings):
    """Set the text that a run trains on."""

    source: str | None = Field(
        None,
        description="Training text: a calibration source (self, python, c4, wikitext2, ptb), a .txt or .parquet "
        "file, or a .jsonl file whose lines have text, prompt and completion, or messages. Without it the calibration "
        "source of the run that pruned the model.",
    )
    tasks: dict[str, str] = Field(
        {},
        description="Several texts by name instead of one source: a task mixture.",
    )
    seqlen: int | None = Field(
        None,
        ge=8,
        description="Tokens in a window; without it 1024, or the model's maximum length if that is shorter.",
    )
    tokens: Count = Field(
        256_000,
        ge=1,
        description="Tokens to train on, such as 500k or 2M. A text with fewer is repeated in another order.",
    )
    held_out: float = Field(
        0.05,
        gt=0.0,
        le=0.5,
        description="Share of the documents that is held out from training, to choose the step that is kept; at most "
        "what fills 16 windows.",
    )
    mixture: Literal["uniform", "pooled"] = Field(
        "uniform",
        description="How windows of several tasks are drawn: uniform (rounds of per_round tasks, the same number of "
        "tokens from each; MAMF), or pooled (all windows in one heap).",
    )
    per_round: int | None = Field(
        None,
        ge=1,
        description="Tasks in a round of the uniform mixture; without it all.",
    )
    seed: Seed = Field(
        0,
        description="Seed of the split, the windows and their order.",
    )


class RecoverRecipe(RunRecipe):
    """Hold all settings of a recovery run."""

    parameters: Literal["auto", "lora", "full", "spp", "hira", "norms"] = Field(
        "auto",
        description="What is trained: lora (a masked low-rank change, merged exactly), full (every surviving weight), "
        "spp and hira (surviving weights are rescaled), or norms (norms and biases only). auto is lora.",
    )
    optimizer: Literal["adamw", "mezo", "subzero"] = Field(
        "adamw",
        description="adamw (backpropagation), or mezo and subzero (forward passes only: thousands of steps; for "
        "machines and objectives without gradients).",
    )
    rank: int = Field(16, ge=1, description="Rank of lora, hira and spp.")
    scale: float = Field(2.0, gt=0.0, description="Factor of the low-rank change of lora and spp.")
    also: Annotated[tuple[Literal["norms", "biases"], ...], BeforeValidator(_words)] = Field(
        ("norms", "biases"),
        description="Vectors that are trained beside the operators: norms, biases, or none.",
    )
    loss: Literal["auto", "kl", "ce", "mix"] = Field(
        "auto",
        description="kl (divergence from the dense model's predictions), ce (cross-entropy of the text), or mix. auto "
        "is kl where the dense model is known, else ce.",
    )
    mix: float = Field(0.5, ge=0.0, le=1.0, description="Share of kl in the loss mix.")
    teacher: Literal["hidden", "top128"] = Field(
        "hidden",
        description="How the dense model's predictions are stored: its last hidden states (exact), or the 128 most "
        "likely tokens and the rest as one bucket (less disk for wide models).",
    )
    data: TrainingData = Field(TrainingData(), description="Training text.")
    steps: int | None = Field(
        None, ge=1, description="Optimizer steps; without it tokens / (windows_per_step * seqlen)."
    )
    windows_per_step: int = Field(4, ge=1, description="Windows of one optimizer step.")
    lr: Annotated[Literal["auto"] | float, BeforeValidator(_rate)] = Field(
        "auto",
        description="First learning rate; auto is measured for each form (docs/recovery.md).",
    )
    lr_unit: Literal["auto", "share", "absolute"] = Field(
        "auto",
        description="Unit of lr: share (of the root mean square of a tensor's surviving weights) or absolute. auto is "
        "share for full and norms, absolute for the others.",
    )
    betas: Annotated[tuple[float, float], BeforeValidator(_words)] = Field(
        (0.9, 0.95), description="Decay rates of AdamW's moments."
    )
    decay: float = Field(0.0, ge=0.0, description="Decoupled weight decay of AdamW.")
    warm_up: float = Field(
        0.1, ge=0.0, lt=1.0, description="Share of the steps in which the learning rate rises from 0."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How the learning rate falls after the warm-up."
    )
    eps: float = Field(1e-3, gt=0.0, description="Size of the perturbation of mezo and subzero.")
    refresh: int = Field(1000, ge=1, description="Steps after which subzero draws new subspaces.")
    subspace: int = Field(24, ge=1, description="Rank of subzero's subspaces.")
    validation_checks: int = Field(
        8, ge=1, description="Checks on the held-out windows, at equal distances; the best step is kept."
    )
    patience: bool = Field(
        True,
        description="After a check without improvement, go back to the best weights with a smaller learning rate.",
    )
    targets: tuple[str, ...] = Field(
        (), description="Operators to train, by name or re: pattern; without it all that have zeros."
    )
    ignore: tuple[str, ...] = Field((), description="Operators to leave as they are, by name or re: pattern.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Precision of the forward and backward passes; auto is the checkpoint's own, or float32 on CPUs "
        "without matrix units for it.",
    )
    seed: Seed = Field(0, description="Seed of the start values and of everything random that is not data.")
    execution: Execution = Field(Execution(), description="How the work is carried out; not part of a run's identity.")

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @field_validator("targets", "ignore", mode="after")
    @classmethod
    def _patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            check_pattern(pattern)
        return value

    @field_validator("betas", mode="after")
    @classmethod
    def _below_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0.0 <= beta < 1.0 for beta in value):
            raise ValueError("two numbers from 0 to below 1 are expected")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> RecoverRecipe:
        if self.execution.executor != "serial":
            raise ValueError(f"execution.executor {self.execution.executor}: recovery has its own way to many devices")
        tasks = self.data.tasks
        if tasks and self.data.source is not None:
            raise ValueError("data: give either one source or tasks, not both")
        if self.data.per_round is not None and self.data.per_round > max(1, len(tasks)):
            raise ValueError(f"data.per_round is {self.data.per_round}: there are {len(tasks)} tasks")
        if self.parameters == "norms" and not self.also:
            raise ValueError("parameters: norms trains norms and biases, and also: none leaves nothing to train")
        return self

    @property
    def zeroth_order(self) -> bool:
        """Whether the optimizer needs forward passes only."""
        return self.optimizer != "adamw"

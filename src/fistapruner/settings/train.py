"""Define the settings of runs that train: what is trained, how fast, the text and the loss."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from .base import RunRecipe, Seed, Texts, TrainExecution
from .parse import Patterns, parse_count


def _count(value: Any) -> Any:
    return parse_count(value) if isinstance(value, str) else value


Count = Annotated[int, BeforeValidator(_count), Field(lt=2**63)]


class TrainingRecipe(RunRecipe):
    """Hold the settings that all runs which train have.

    Attributes:
        rate_share: first learning rates of ``lr: auto``, as a share of those that were measured for recovery.
    """

    rate_share: ClassVar[float] = 1.0
    text: ClassVar[str] = "data"

    if TYPE_CHECKING:
        loss: str  # each recipe has its own

    parameters: Literal["lora", "full", "spp", "norms"] = Field(
        "lora",
        description="What is trained: lora, full, spp or norms. lora is a masked low-rank change, merged exactly, full "
        "every surviving weight, spp rescales surviving weights, norms is norms and biases only. mezo and subzero "
        "train all weights.",
    )
    optimizer: Literal["adamw", "mezo", "subzero"] = Field(
        "adamw",
        description="adamw (backpropagation), or mezo and subzero (forward passes only, with the memory of inference: "
        "thousands of steps).",
    )
    rank: int = Field(16, ge=1, description="Rank of lora and spp.")
    scale: float = Field(2.0, gt=0.0, description="Factor of the low-rank change of lora and spp.")
    lr: Literal["auto"] | Annotated[float, Field(gt=0.0)] = Field(
        "auto",
        description="First learning rate; absolute for lora, spp, mezo and subzero, a share of a tensor's root mean "
        "square for full and norms. auto was measured for lora and full (docs/results.md), is the size of the first "
        "step for spp, and MeZO's for mezo and subzero; with adamw an alignment takes a twentieth of it.",
    )
    as_published: bool = Field(
        False,
        description="With spp the schedule and the constants of the published program; mezo and subzero have theirs.",
    )
    targets: Patterns = Field(
        (),
        description="Operators to train: the last dotted parts of a full name (down_proj, mlp.down_proj), or re: and a "
        "regular expression that is found anywhere in it; without it all that have zeros, or all of a model that lost "
        "channels, heads or experts.",
    )
    ignore: Patterns = Field((), description="Operators to leave as they are, by names as targets takes them.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Precision of the forward and backward passes; auto is the checkpoint's own (of float16 "
        "bfloat16), or float32 on devices without matrix units for it.",
    )
    seed: Seed = Field(0, description="Seed of everything random, such as the order of the data.")
    execution: TrainExecution = Field(
        TrainExecution(), description="How the work is carried out; not part of a run's identity."
    )

    @model_validator(mode="before")
    @classmethod
    def _all_weights(cls, values: Any) -> Any:
        """Take full for mezo and subzero where nothing else is said: they train all weights."""
        if isinstance(values, dict) and values.get("optimizer", "adamw") != "adamw":
            return {"parameters": "full", **values}
        return values

    @property
    @abstractmethod
    def step_windows(self) -> int:
        """Windows of one optimizer step."""

    @property
    @abstractmethod
    def dense_for(self) -> str | None:
        """The setting that needs the dense model; empty: used if it is known; None: used if it is given."""

    @abstractmethod
    def with_absolute_files(self) -> Self:
        """Return the recipe with the paths of files made absolute."""

    @property
    def zeroth_order(self) -> bool:
        """Whether the optimizer needs forward passes only."""
        return self.optimizer != "adamw"


class TrainingData(Texts):
    """Set the text that a run trains on."""

    source: str | dict[str, str] | None = Field(
        None,
        description="Text: self, python, c4, wikitext2, ptb or a file; a .jsonl file has lines with text, "
        "prompt and completion, messages, or instruction, input and output (Alpaca). Several by name, "
        "{sql: a.jsonl, chat: b.jsonl}, are a mixture in the manner of MAMF, drawn in rounds that take the same number "
        "of tokens from each. Without it the calibration text of the run that pruned the model.",
    )
    seqlen: int | None = Field(
        None, ge=8, description="Tokens in a window; without it 1024, or the model's maximum length if that is shorter."
    )
    tokens: Count = Field(
        256_000,
        ge=1,
        description="Different tokens to train on at most: 256000, 500k, 2M; whatever the steps. A text with fewer "
        "than the steps take is repeated in another order. With steps, self generates no more than they take.",
    )
    held_out: float = Field(
        0.05,
        gt=0.0,
        le=0.5,
        description="Share of the documents that is held out from training, to choose the step that is kept; at most "
        "what fills 16 windows.",
    )
    per_round: int | None = Field(None, ge=1, description="Texts in a round of the mixture; without it all.")
    seed: Seed = Field(0, exclude=True)


class RecoverRecipe(TrainingRecipe):
    """Hold all settings of a recovery run."""

    verb: ClassVar[str] = "recover"

    loss: Literal["auto", "kl", "ce", "mix"] = Field(
        "auto",
        description="auto, kl, ce or mix; kl is the divergence from the dense model's predictions, ce the "
        "cross-entropy of the text, mix half of each. auto is kl where the dense model is known, else ce.",
    )
    data: TrainingData = Field(TrainingData(), description="Training text.")
    steps: int | None = Field(
        None,
        ge=1,
        description="Optimizer steps; without it tokens / (windows_per_step * seqlen). More steps repeat the text: for "
        "more of it raise tokens, too.",
    )
    windows_per_step: int = Field(1, ge=1, description="Windows of one optimizer step.")

    @property
    def step_windows(self) -> int:
        return self.windows_per_step

    def steps_of(self, seqlen: int) -> int:
        """Return the optimizer steps: as asked, or those that the tokens make in windows of ``seqlen``."""
        return self.steps or max(1, round(self.data.tokens / (self.windows_per_step * seqlen)))

    def windows_of(self, seqlen: int) -> int:
        """Return the windows to train on, at most: what the tokens make.

        Of text that is generated they are no more than given steps take.
        """
        windows = math.ceil(self.data.tokens / seqlen)
        if self.steps is not None and self.generates_text:
            windows = min(windows, self.steps * self.windows_per_step)
        return windows

    @property
    def dense_for(self) -> str | None:
        if self.loss in ("kl", "mix"):
            return f"--loss {self.loss}"
        if self.generates_text:
            return "--data self"
        return "" if self.loss == "auto" else None

    def with_absolute_files(self) -> RecoverRecipe:
        return self.model_copy(update={"data": self.data.with_absolute_files()})

    @property
    def generates_text(self) -> bool:
        """Whether the dense model generates text to train on."""
        return "self" in self.data.sources.values()

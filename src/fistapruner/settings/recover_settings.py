"""Define the settings of a recovery run: what is trained, how, on which text, against which loss."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from .base import PATHS_TOO, Seed, Settings, absolute_file
from .training_settings import Count, TrainingRecipe


class TrainingData(Settings):
    """Set the text that a run trains on."""

    source: Annotated[str | None, PATHS_TOO] = Field(
        None,
        description="Training text: a calibration source (self, python, c4, wikitext2, ptb), a .txt, .raw, .md or "
        ".parquet file, or a .jsonl file whose lines have text, prompt and completion, messages, or instruction, "
        "input and output (Alpaca). Without it the "
        "calibration source of the run that pruned the model.",
    )
    tasks: Annotated[dict[str, str], PATHS_TOO] = Field(
        {},
        description="Several texts by name instead of one source: a mixture in the manner of MAMF, drawn in rounds "
        "that take the same number of tokens from each task.",
    )
    seqlen: int | None = Field(
        None,
        ge=8,
        description="Tokens in a window; without it 1024, or the model's maximum length if that is shorter.",
    )
    tokens: Count = Field(
        256_000,
        ge=1,
        description="Different tokens to train on at most, such as 500k or 2M, whatever the steps. A text with fewer "
        "than the steps take is repeated in another order. With steps, self generates no more than they take.",
    )
    held_out: float = Field(
        0.05,
        gt=0.0,
        le=0.5,
        description="Share of the documents that is held out from training, to choose the step that is kept; at most "
        "what fills 16 windows.",
    )
    per_round: int | None = Field(
        None,
        ge=1,
        description="Tasks in a round of the mixture; without it all.",
    )
    seed: Seed = Field(
        0,
        description="Seed of the split, the windows and their order.",
    )

    @property
    def texts(self) -> list[str]:
        """Texts to train on: of all tasks, or the one source; none where it is not said."""
        return list(self.tasks.values()) or ([] if self.source is None else [self.source])


class RecoverRecipe(TrainingRecipe):
    """Hold all settings of a recovery run."""

    verb: ClassVar[str] = "recover"

    loss: Literal["auto", "kl", "ce", "mix"] = Field(
        "auto",
        description="kl (divergence from the dense model's predictions), ce (cross-entropy of the text), or mix. auto "
        "is kl where the dense model is known, else ce.",
    )
    mix: float = Field(0.5, ge=0.0, le=1.0, description="Share of kl in the loss mix.")
    data: TrainingData = Field(TrainingData(), description="Training text.")
    steps: int | None = Field(
        None,
        ge=1,
        description="Optimizer steps; without it tokens / (windows_per_step * seqlen). More steps repeat the text: for "
        "more of it raise tokens, too.",
    )
    windows_per_step: int = Field(1, ge=1, description="Windows of one optimizer step.")

    @model_validator(mode="after")
    def _consistent(self) -> RecoverRecipe:
        tasks = self.data.tasks
        if tasks and self.data.source is not None:
            raise ValueError("data: give either one source or tasks, not both")
        if self.data.per_round is not None and self.data.per_round > max(1, len(tasks)):
            raise ValueError(f"data.per_round is {self.data.per_round}: there are {len(tasks)} tasks")
        if self.loss != "mix" and self.mix != type(self).model_fields["mix"].default:
            raise ValueError(f"mix is {self.mix:g}: it is a setting of the loss mix, and the loss is {self.loss}")
        return self

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
        data = self.data
        tasks = {name: absolute_file(text) for name, text in data.tasks.items()}
        changes = {"source": data.source and absolute_file(data.source), "tasks": tasks}
        return self.model_copy(update={"data": data.model_copy(update=changes)})

    @property
    def generates_text(self) -> bool:
        """Whether the dense model generates text to train on."""
        return "self" in (self.data.source, *self.data.tasks.values())

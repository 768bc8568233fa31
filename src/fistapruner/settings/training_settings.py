"""Define the settings that runs which train share: what is trained, how fast, which step is kept."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from .base import RunRecipe, Seed, word_or_number
from .execution_settings import Execution
from .loading import parse_count
from .patterns import Patterns


def _count(value: Any) -> Any:
    return parse_count(value) if isinstance(value, str) else value


def words(value: Any) -> Any:
    """Split ``norms,biases``; ``none`` is no word."""
    if isinstance(value, str):
        return tuple(word.strip() for word in value.split(",") if word.strip() not in ("", "none"))
    return value


def _vectors(value: Any) -> Any:
    found = words(value)
    if not isinstance(found, (tuple, list)) or not all(name in ("norms", "biases") for name in found):
        raise ValueError("norms, biases, both with a comma between them, or none is expected")
    return found


Rate = Annotated[
    Literal["auto"] | float,
    word_or_number("auto", "auto or a number above 0 is expected", lambda rate: rate > 0),
]

Count = Annotated[int, BeforeValidator(_count), Field(lt=2**63)]


class TrainingRecipe(RunRecipe):
    """Hold the settings that all runs which train have.

    Attributes:
        rate_share: first learning rates of ``lr: auto``, as a share of those that were measured for recovery.
    """

    rate_share: ClassVar[float] = 1.0

    if TYPE_CHECKING:
        loss: str  # each recipe has its own

    parameters: Literal["lora", "full", "spp", "norms"] = Field(
        "lora",
        description="What is trained: lora (a masked low-rank change, merged exactly), full (every surviving weight), "
        "spp (surviving weights are rescaled), or norms (norms and biases only). mezo and subzero train all weights.",
    )
    optimizer: Literal["adamw", "mezo", "subzero"] = Field(
        "adamw",
        description="adamw (backpropagation), or mezo and subzero (forward passes only, with the memory of inference: "
        "thousands of steps).",
    )
    rank: int = Field(16, ge=1, description="Rank of lora and spp.")
    scale: float = Field(2.0, gt=0.0, description="Factor of the low-rank change of lora and spp.")
    also: Annotated[tuple[Literal["norms", "biases"], ...], BeforeValidator(_vectors)] = Field(
        ("norms", "biases"),
        description="Vectors that are trained beside the operators: norms, biases, or none.",
    )
    lr: Rate = Field(
        "auto",
        description="First learning rate: absolute for lora, spp, mezo and subzero, a share of a tensor's root mean "
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
    seed: Seed = Field(
        0,
        description="Seed of the start values and of everything random that is not data; as a flag also that of the "
        "data: of a text its split, windows and their order, of pairs their order.",
    )
    execution: Execution = Field(Execution(), description="How the work is carried out; not part of a run's identity.")

    @model_validator(mode="before")
    @classmethod
    def _all_weights(cls, values: Any) -> Any:
        """Take full for mezo and subzero where nothing else is said: they train all weights."""
        if isinstance(values, dict) and values.get("optimizer", "adamw") != "adamw":
            return {"parameters": "full", **values}
        return values

    @model_validator(mode="after")
    def _in_this_process(self) -> TrainingRecipe:
        if self.execution.executor != "serial":
            raise ValueError(f"execution.executor {self.execution.executor}: training has its own way to many devices")
        return self

    @model_validator(mode="after")
    def _trains_something(self) -> TrainingRecipe:
        if self.zeroth_order and self.parameters != "full":
            raise ValueError(f"parameters: {self.optimizer} trains all weights (full), not {self.parameters}")
        if self.as_published and self.parameters != "spp":
            raise ValueError("as_published: it is a setting of parameters spp")
        if self.parameters == "norms" and not self.also:
            raise ValueError("parameters: norms trains norms and biases, and also: none leaves nothing to train")
        return self

    @property
    @abstractmethod
    def step_windows(self) -> int:
        """Windows of one optimizer step."""

    @property
    @abstractmethod
    def dense_for(self) -> str | None:
        """The flag that needs the dense model; empty: used if it is known; None: used if it is given."""

    @abstractmethod
    def with_absolute_files(self) -> Self:
        """Return the recipe with the paths of files made absolute."""

    @property
    def zeroth_order(self) -> bool:
        """Whether the optimizer needs forward passes only."""
        return self.optimizer != "adamw"

"""Base of all settings and recipes, and the one table of settings that need each other."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import FistaPrunerError, at_home, explain, refuse_yes_no
from .parse import Size, load_recipe_settings, merge_settings, parse_yaml

MAX_SEED = 2**63 - 1
"""Largest seed that torch's random generators accept."""

SEVERAL = ("multi-dpo", "harmonic", "geometric")
"""Losses of an alignment with several references."""

TOGETHER: tuple[tuple[str, tuple[Any, ...], str, tuple[Any, ...]], ...] = (
    ("execution.workers", (), "execution.executor", ("process", "ray")),
    ("execution.address", (), "execution.executor", ("ray",)),
    ("residual", ("correct",), "error_correction", (True,)),
    ("low_rank", (), "structure.remove", (None,)),
    ("structure.method", (), "structure.remove", ()),
    ("structure.compensate", (), "structure.remove", ()),
    ("structure.multiple", (), "structure.remove", ()),
    ("structure.steps", (), "structure.method", ("bypass",)),
    ("optimizer", ("mezo", "subzero"), "parameters", ("full",)),
    ("as_published", (), "parameters", ("spp",)),
    ("loss", ("accuracy",), "optimizer", ("mezo", "subzero")),
    ("references", (), "loss", ("dpo", *SEVERAL)),
    ("weights", (), "loss", SEVERAL),
    ("clip", (), "loss", ("harmonic",)),
)
"""Which settings go together: a setting, values of it, another setting that it needs, and the values that this needs.

No values are all but the default. A recipe that lacks a setting has no use for its row.
"""


Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


class Settings(BaseModel):
    """Base of all sections: frozen; refuses unknown keys, infinite numbers, and yes or no for a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    _at_home = field_validator("*", mode="before")(classmethod(lambda cls, value: at_home(value)))
    _no_yes_or_no = field_validator("*", mode="before")(classmethod(refuse_yes_no))


class Texts(Settings):
    """Base of the section with the texts of a run, one or several by name; ``seed`` is the recipe's."""

    source: str | dict[str, str] | None = None
    seed: Seed = 0

    @property
    def tasks(self) -> dict[str, str]:
        """Several texts by name; empty where there is one."""
        return self.source if isinstance(self.source, dict) else {}

    @property
    def sources(self) -> dict[str, str]:
        """The texts by name; one is called as it is, and none is there where it is not said."""
        return self.tasks or ({} if self.source is None else {str(self.source): str(self.source)})

    def with_absolute_files(self) -> Self:
        """Return these settings with the absolute path of every file; known names of texts have no suffix."""
        files = {name: os.path.abspath(text) if Path(text).suffix else text for name, text in self.sources.items()}
        return self.model_copy(update={"source": files if self.tasks else next(iter(files.values()), None)})


class RunRecipe(Settings):
    """Base of the recipes.

    Attributes:
        verb: whose settings they are.
        text: the section with the texts, whose seed is the recipe's.
    """

    verb: ClassVar[str] = "prune"
    text: ClassVar[str] = ""

    # Defaults are written as users write them; validation turns them into constraints and methods.
    model_config = ConfigDict(validate_default=True)

    if not TYPE_CHECKING:  # type checkers and editors know the settings by pydantic's own signature

        def __init__(self, **settings: Any) -> None:
            try:
                super().__init__(**settings)
            except ValidationError as error:
                raise FistaPrunerError(f"{type(self).__name__}: {explain(error, type(self))}") from None

        __init__.__pydantic_base_init__ = True  # as pydantic marks its own: model_validate does not call it

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        """Refuse settings that need another value of another setting (:data:`TOGETHER`)."""
        for name, values, other, needed in TOGETHER:
            value, default = self._setting(name)
            found, without = self._setting(other)
            asked = value in values if values else value != default
            if asked and (found not in needed if needed else found == without):
                right = " or ".join("none" if each is None else str(each) for each in needed)
                is_now = "none" if found is None else found
                raise ValueError(f"{name} {value} needs {f'{other} {right}'.strip()}, and that is {is_now}")
        return self

    def _setting(self, path: str) -> tuple[Any, Any]:
        """Return a setting's value and default; both None where the recipe has none of this name."""
        holder: Any = self
        section, _, name = path.rpartition(".")
        holder = getattr(self, section, None) if section else self
        field = None if holder is None else type(holder).model_fields.get(name)
        return (None, None) if field is None else (getattr(holder, name), field.default)

    @model_validator(mode="after")
    def _one_seed(self) -> Self:
        """Give the texts the seed of the recipe."""
        if not self.text:
            return self
        texts = getattr(self, self.text)
        if "seed" in texts.model_fields_set and texts.seed != self.seed:  # type: ignore[attr-defined]
            raise ValueError(f"{self.text}.seed is no setting of its own: seed is that of the text, too")
        texts = texts.model_copy(update={"seed": self.seed})  # type: ignore[attr-defined]
        texts.model_fields_set.discard("seed")
        self.__dict__[self.text] = texts
        return self

    def identity(self) -> dict[str, Any]:
        """Return the settings that determine the resulting weights."""
        return self.model_dump(mode="json", exclude={"execution"})

    def fingerprint(self) -> str:
        """Return a hash of everything that determines the resulting weights."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """Return the recipe as YAML with every setting."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))

    @classmethod
    def from_yaml(cls, text: str, origin: str = "recipe") -> Self:
        """Read a recipe."""
        return cls.build(parse_yaml(text, origin), origin)

    @classmethod
    def of(cls, recipe: Self | Mapping[str, Any] | str | Path | None) -> Self:
        """Return the recipe that a function of the API was given; None is the default one."""
        if recipe is None:
            return cls()
        if isinstance(recipe, cls):
            return recipe
        if isinstance(recipe, (str, Path)):
            return cls.build(load_recipe_settings(str(recipe), cls.verb), f"recipe {recipe}")
        if isinstance(recipe, Mapping):
            return cls.build(dict(recipe))
        expected = f"{cls.__name__}, a mapping of settings or the name of a recipe is expected"
        raise FistaPrunerError(f"recipe is of the class {type(recipe).__name__}, and {expected}")

    def changed(self, settings: dict[str, Any]) -> Self:
        """Return the recipe with some settings changed."""
        return self.build(merge_settings(self.model_dump(mode="json", exclude_unset=True), settings))

    @classmethod
    def build(cls, settings: dict[str, Any], origin: str = "recipe") -> Self:
        """Validate a mapping of settings."""
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            raise FistaPrunerError(f"{origin}: {explain(error, cls)}") from None


MAX_WORKERS = 4096
"""Most workers, and most threads of each: more than any machine has cores."""


class Execution(Settings):
    """Set how the work is carried out. Never part of a run's identity."""

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N; auto takes a CUDA GPU if there is one.")
    batch_size: int | None = Field(
        None,
        ge=1,
        lt=2**31,
        description="Windows of text in one pass, two of them for a pair of an alignment; without it chosen by device "
        "and memory.",
    )
    memory_limit: Size = Field(
        None,
        description="Main memory that the run may use, in bytes or as 8GiB; without it 90 % of what the machine has "
        "free. A GPU's memory is limited by what it has free.",
    )
    executor: Literal["serial", "process", "ray"] = Field(
        "serial",
        description="Who prunes the decoder layers: this process (serial), processes of this machine (process), "
        "or a Ray cluster (ray).",
    )
    workers: int | None = Field(
        None,
        ge=1,
        le=MAX_WORKERS,
        description="Worker processes of process and ray; without it one for each GPU or group of cores. They prune "
        "different layers, which needs propagate dense.",
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=MAX_WORKERS,
        description="CPU threads of each worker; without it the machine's cores are shared out. The last bits of "
        "the weights depend on it.",
    )
    address: str | None = Field(
        None,
        description="HOST:PORT of the head of a Ray cluster, or auto for the one in RAY_ADDRESS or on this machine; "
        "without it one is started here.",
    )


class TrainExecution(Execution):
    """Set how a run that trains is carried out: in this process, or in those of torchrun."""

    executor: Literal["serial"] = Field("serial", exclude=True)
    workers: None = Field(None, exclude=True)
    address: None = Field(None, exclude=True)
    offload: bool = Field(
        False,
        description="With torchrun: keep weights and optimizer state in main memory while a GPU does not need them.",
    )

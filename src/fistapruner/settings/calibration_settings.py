"""Define the settings of the calibration text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from .base import PATHS_TOO, Seed, Settings, absolute_file


class Calibration(Settings):
    """Set where the calibration tokens come from."""

    source: Annotated[str | None, PATHS_TOO] = Field(
        "self",
        description="Calibration text: self (text that the model generates), python (the language reference "
        "that comes with every Python), a .txt, .raw, .md, .jsonl or .parquet file, or a data set of the "
        "extra 'data': c4, wikitext2, ptb.",
    )
    tasks: Annotated[dict[str, str], PATHS_TOO] = Field(
        {},
        description="Several calibration texts by name instead of one source; each gives the same number of windows.",
    )
    samples: int = Field(
        128,
        ge=1,
        lt=2**31,
        description="Number of calibration windows. 128 is the papers' choice.",
    )
    seqlen: int | None = Field(
        None,
        ge=8,
        description="Tokens in a window; without it the model's maximum length, at most 2048, or 1024 for self on a "
        "CPU.",
    )
    seed: Seed = Field(
        0,
        description="Seed that draws the windows, and generates the text of self.",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if value.get("tasks"):
            if value.get("source") is not None:
                raise ValueError("give either one source or tasks, not both")
            return {**value, "source": None}
        return {key: inner for key, inner in value.items() if key != "source" or inner is not None}

    @model_validator(mode="after")
    def _a_window_each(self) -> Calibration:
        if self.samples < len(self.tasks):
            raise ValueError(f"samples is {self.samples}, and each of the {len(self.tasks)} tasks needs a window")
        return self

    @property
    def sources(self) -> dict[str, str]:
        """The sources by name; a single one is called as it is."""
        return self.tasks if self.source is None else {self.source: self.source}

    @property
    def name(self) -> str:
        """The source, or the names of the tasks."""
        return ", ".join(self.sources)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files among the sources; known names have no suffix."""
        return tuple(Path(source) for source in self.sources.values() if Path(source).suffix)

    def with_absolute_files(self) -> Calibration:
        """Return these settings with the absolute path of every file."""
        paths = {name: absolute_file(text) for name, text in self.sources.items()}
        return self.model_copy(update={"tasks": paths} if self.tasks else {"source": paths[self.name]})

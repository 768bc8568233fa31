"""Name the flag of every setting of a recipe."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic.fields import FieldInfo

from .base import Settings
from .settings import Recipe
from .structure_settings import Structure
from .training_settings import TrainingRecipe

FLAGS = {
    "calibration.source": "--calibration",
    "data.source": "--data",
    "data.pairs": "--data",
    "structure.remove": "--structure",
    **{f"structure.{name}": f"--structure-{name}" for name in Structure.model_fields if name != "remove"},
    "structure.widths": "--widths",
}
"""Flags that are not called as their setting."""

SAME_FLAG = {
    "calibration.seed": "seed",
    "calibration.tasks": "calibration.source",
    "data.seed": "seed",
    "data.tasks": "data.source",
}
"""Settings that take their value from the flag of another setting."""

NOT_FOR_TRAINING = ("execution.executor", "execution.workers", "execution.address")
"""Settings of execution that runs which train have no use for."""


def settings(recipe: type[Settings] = Recipe) -> Iterator[tuple[str, FieldInfo]]:
    """Yield every setting of a recipe with its path, such as ``calibration.samples``."""
    for name, field in recipe.model_fields.items():
        if not isinstance(field.default, Settings):
            yield name, field
            continue
        for key, inner in type(field.default).model_fields.items():
            if not issubclass(recipe, TrainingRecipe) or f"{name}.{key}" not in NOT_FOR_TRAINING:
                yield f"{name}.{key}", inner


def flag_of(path: str) -> str:
    """Return the flag of a setting."""
    return FLAGS.get(path, "--" + path.rpartition(".")[2].replace("_", "-"))

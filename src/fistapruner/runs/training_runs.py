"""Find runs that train, and the dense model behind any run."""

from __future__ import annotations

from pathlib import Path

from .align_directory import AlignDirectory
from .directory import RunDirectory
from .training_directory import RecoverDirectory, TrainingDirectory

DIRECTORIES: dict[str, type[TrainingDirectory]] = {each.verb: each for each in (RecoverDirectory, AlignDirectory)}
"""Run directories of the verbs that train, by the verb."""


def training_run(folder: Path, verb: str) -> TrainingDirectory:
    """Return the run directory of a verb that trains."""
    return DIRECTORIES[verb](folder)


def input_run(model: str) -> RunDirectory | None:
    """Return the run directory that the input is, or is the ``model`` folder of; None for any other."""
    for folder in (Path(model), Path(model).parent if Path(model).name == "model" else None):
        if folder is not None and (folder / "run.json").is_file():
            return RunDirectory(folder)
    return None


def dense_of(run: RunDirectory) -> Path | None:
    """Return the folder of the dense model that a run's result goes back to; None where no run names it."""
    if (record := run.record()) is None:
        return None
    if record.kind == "prune":
        return record.decision.folder
    trained = training_run(run.folder, record.kind).record()
    assert trained is not None
    if trained.decision.dense is not None:
        return trained.decision.dense
    origin = input_run(trained.decision.model)  # the loss did not need the dense model
    return None if origin is None else dense_of(origin)

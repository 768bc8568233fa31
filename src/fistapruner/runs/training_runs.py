"""Find runs that train, and the dense model behind any run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import FistaPrunerError, with_name
from ..models.source import SMALL_MODEL, resolve_model
from .align_directory import AlignDirectory
from .directory import RunDirectory
from .lineage import dense_name
from .records import Lineage
from .training_directory import RecoverDirectory, TrainingDirectory

DIRECTORIES: dict[str, type[TrainingDirectory]] = {each.verb: each for each in (RecoverDirectory, AlignDirectory)}
"""Run directories of the verbs that train, by the verb."""


def input_run(model: str) -> RunDirectory | None:
    """Return the run directory that the input is, or is the ``model`` folder of; None for any other."""
    path = with_name(Path(model))  # "." inside of the folder
    for folder in (path, path.parent if path.name == "model" else None):
        if folder is not None and (folder / "run.json").is_file():
            return RunDirectory(folder)
    return None


@dataclass(frozen=True)
class Dense:
    """The dense model that a run's result goes back to.

    Args:
        folder: where it was, which may be gone.
        stamps: checksums of its config and weight files then; empty where no run has noted them.
    """

    folder: Path
    stamps: tuple[tuple[str, str], ...] = ()


def dense_of(run: RunDirectory) -> Dense | None:
    """Find the dense model that a run's result goes back to; None where that is not known.

    It is the model before the first run of the lineage: a run of what another run made goes back to that run's own. Of
    a pruning run whose input is no run's any more, such as a copy, the lineage names it.
    """
    if (record := run.record()) is None:
        return None
    if record.kind == "prune":
        decision = record.decision
        if record.lineage is None or not record.lineage.stages:
            return Dense(decision.folder, decision.stamps)
        origin = input_run(str(decision.folder))
        return (None if origin is None else dense_of(origin)) or _named(record.lineage)
    trained = DIRECTORIES[record.kind](run.folder).record()
    assert trained is not None
    if trained.decision.dense is not None:
        return Dense(trained.decision.dense, trained.decision.dense_stamps)
    origin = input_run(trained.decision.model)  # the loss did not need the dense model
    return None if origin is None else dense_of(origin)


def _named(lineage: Lineage | None) -> Dense | None:
    """Find the dense model that a lineage names, where it is on this machine; nothing is downloaded."""
    name = dense_name(lineage)
    if name is None or not (name == SMALL_MODEL or Path(name).exists()):
        return None
    try:
        return Dense(resolve_model(name).absolute())
    except FistaPrunerError:
        return None

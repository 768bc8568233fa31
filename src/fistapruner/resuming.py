"""Continue a run of any verb."""

from __future__ import annotations

from pathlib import Path

from .errors import FistaPrunerError, out_path
from .models.source import Permissions
from .pruning.run import resume_pruning
from .runs.directory import PruneDirectory, RunDirectory
from .runs.log import Listener
from .runs.records import Report
from .runtime.machine import launched
from .training.run import ALIGN, RECOVER, resume_training


def resume(
    out: str | Path,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    listener: Listener | None = None,
) -> Report:
    """Continue a run as it was begun: its model, recipe and evaluation are recorded in the run directory.

    What the model's files may do is not recorded: it is said with every command.

    Args:
        out: the run directory.
        allow_pickle: read legacy ``.bin`` weights.
        trust_remote_code: run Python code that comes with the checkpoint.
        listener: receives progress.

    Raises:
        FistaPrunerError: not a run, a run that was stopped before anything was decided, or a pruning run and several
            processes of ``torchrun``.
    """
    out = out_path(out)
    record = RunDirectory(out).record()
    permissions, listener = Permissions(allow_pickle, trust_remote_code), listener or Listener()
    if record is None:
        if not out.exists():
            raise FistaPrunerError(f"{out} does not exist")
        again = "give its command again, and if that is refused with a new --out"
        raise FistaPrunerError(f"{out} is not a run that can be resumed (it has no run.json): {again}")
    if record.kind == "recover":
        return resume_training(RECOVER, out, permissions, listener)
    if record.kind == "align":
        return resume_training(ALIGN, out, permissions, listener)
    run = PruneDirectory(out)
    if (count := launched()) > 1:
        raise FistaPrunerError(f"{out} is a pruning run, which {count} processes of torchrun cannot share")
    return resume_pruning(run, permissions, listener)

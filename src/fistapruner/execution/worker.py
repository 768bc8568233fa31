"""A worker opens the run directory, then prunes the decoder layers, or solves the parts of groups, it is given.

As a program (``python -m fistapruner.execution.worker``) it reads one JSON job a line and writes one JSON event a line
(:mod:`fistapruner.execution.pool`). It is a plain program rather than a child of :mod:`multiprocessing`, so it needs
nothing of the script that started the run.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..activations.store import HiddenStates
from ..activations.stream import Calls
from ..errors import FistaPrunerError
from ..models.source import Permissions
from ..pruning.context import LayerEvents, LayerStreams
from .context import RunContext
from .operator_parallel import do_part
from .pool import Event, Job, PartJob

PR_SET_PDEATHSIG = 1


class Worker:
    """One worker process, with the run opened.

    Args:
        folder: the run directory.
        part: subfolder of ``RUN/hidden`` with this run's hidden states.
        device: where to work.
        shared: other hosts read what is written here, so it is flushed before it is announced.
        permissions: what the model's files may do, as the command that started the run says.

    Raises:
        FistaPrunerError: the run directory cannot be opened.
    """

    def __init__(self, folder: Path, part: str, device: str, permissions: Permissions, *, shared: bool = False) -> None:
        self.work = RunContext.open(folder, torch.device(device), part, permissions)
        torch.set_num_threads(self.work.numerics.threads)
        self.shared = shared

    @cached_property
    def calls(self) -> Calls:
        """The arguments that decoder layers are called with."""
        return self.work.calls()

    def run(self, job: dict[str, Any], tell: Callable[[Event], None]) -> None:
        """Do a job and report every outcome, faults too, as an event.

        Args:
            job: a :class:`Job` or a :class:`PartJob` as JSON values.
            tell: receives the events.
        """
        torch.set_num_threads(self.work.numerics.threads)
        try:
            if "solution" in job:
                do_part(PartJob(**job), self.work.hidden, self.work.recipe.steps, self.work.model.device)
            else:
                self._do_layer(Job(**job), tell)
            tell({"event": "done"})
        except FistaPrunerError as error:
            tell({"event": "failed", "message": str(error)})
        except Exception:
            tell({"event": "broken", "message": traceback.format_exc()})

    def _do_layer(self, job: Job, tell: Callable[[Event], None]) -> None:
        source = self._open(job.source)
        target = None if job.target is None else self._open(job.target)

        def passed() -> None:
            if target is not None:
                if self.shared:
                    target.sync()
                tell({"event": "passed"})

        streams = LayerStreams(source, None, target, None)
        try:
            if job.prune:

                def progress(names: str, error: float | None) -> None:
                    tell({"event": "operators", "names": names, "error": error})

                self.work.prune(job.index, streams, self.calls, LayerEvents(operators=progress, passed=passed))
            else:
                self.work.advance(job.index, streams, self.calls)
                passed()
        finally:
            source.close(keep=True)
            if target is not None:
                target.close(keep=True)

    def _open(self, name: str) -> HiddenStates:
        return self.work.store(name, on_disk=True)


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent dies, so that it never writes into a later run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the parent decides what follows
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(arguments: list[str]) -> None:
    """Serve jobs from standard input until it ends.

    Args:
        arguments: run directory, part, device, process id of the parent, then the names of what is permitted.
    """
    die_with_parent()
    folder, part, device, parent, *permitted = arguments
    if os.getppid() != int(parent):
        return
    # Events have standard output to themselves; whatever a library prints goes to standard error.
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def tell(event: Event) -> None:
        events.write(json.dumps(event) + "\n")

    try:
        worker = Worker(Path(folder), part, device, Permissions(**dict.fromkeys(permitted, True)))
    except FistaPrunerError as error:
        tell({"event": "failed", "message": str(error)})
        return
    for line in sys.stdin:
        worker.run(json.loads(line), tell)


if __name__ == "__main__":
    main(sys.argv[1:])

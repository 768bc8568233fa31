"""Run a worker: open the run directory, then prune decoder layers.

As a program (``python -m fistapruner.execution.worker``) it reads one JSON job a line and writes one JSON event a line
(:mod:`fistapruner.execution.pool`). It is not a child of :mod:`multiprocessing`, so it does not import the script that
started the run.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..errors import FistaPrunerError
from ..models.source import Permissions
from ..passes.store import HiddenStates
from ..passes.stream import Calls
from ..pruning.context import LayerEvents, LayerStreams
from ..runtime.devices import first_line
from ..runtime.numerics import exact_products
from .context import RunContext
from .pool import Event, LayerJob

PR_SET_PDEATHSIG = 1


class Worker:
    """A worker with an opened run.

    Args:
        folder: the run directory.
        device: device of the passes and solves.
        shared: other hosts read the files that are written, so they are flushed before an event names them.
        permissions: permissions for the model's files, given with the command that started the run.
        model: the dense model's folder, where the process that started this one has opened it.

    Raises:
        FistaPrunerError: the device or the run directory cannot be opened.
    """

    def __init__(
        self,
        folder: Path,
        device: str,
        permissions: Permissions,
        model: Path | None = None,
        *,
        shared: bool = False,
    ) -> None:
        try:
            torch.empty(1, device=device)
        except RuntimeError as error:  # such as a GPU that the run's own process has for itself
            raise FistaPrunerError(f"a worker cannot use device {device}: {first_line(error)}") from None
        self.context = RunContext.open(folder, torch.device(device), permissions, model)
        torch.set_num_threads(self.context.numerics.threads)
        self.shared = shared

    @cached_property
    def calls(self) -> Calls:
        """Record the arguments of the decoder layers, once."""
        return self.context.calls()

    def run(self, job: dict[str, Any], tell: Callable[[Event], None]) -> None:
        """Run a job and report every outcome, errors too, as an event.

        Args:
            job: a :class:`LayerJob` as JSON values.
            tell: receives the events.
        """
        torch.set_num_threads(self.context.numerics.threads)
        tell(self._run(job, tell))

    def _run(self, job: dict[str, Any], tell: Callable[[Event], None]) -> Event:
        """Run a job and return the event of its end."""
        try:
            with exact_products():
                self._do_layer(LayerJob(**job), tell)
            return {"event": "done"}
        except FistaPrunerError as error:
            return {"event": "failed", "message": str(error)}
        except Exception:
            return {"event": "broken", "message": traceback.format_exc()}

    def _do_layer(self, job: LayerJob, tell: Callable[[Event], None]) -> None:
        """Prune one decoder layer, or run hidden states through it."""
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

                self.context.prune(job.index, streams, self.calls, LayerEvents(operators=progress, passed=passed))
            else:
                self.context.advance(job.index, streams, self.calls)
                passed()
        finally:
            source.close(keep=True)
            if target is not None:
                target.close(keep=True)

    def _open(self, name: str) -> HiddenStates:
        """Open a store of hidden states in the run directory."""
        return self.context.store(name, on_disk=True)


def die_with_parent() -> None:
    """Let this process die with its parent, so that it never writes into a later run.

    Linux kills it at once; elsewhere it ends by itself within a second.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of the terminal; the parent handles it
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_end_after, args=(os.getppid(),), daemon=True).start()


def _end_after(parent: int) -> None:
    """End this process once it has another parent."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main(arguments: list[str]) -> None:
    """Run jobs from standard input until it ends.

    Args:
        arguments: run directory, device, the model's folder, process id of the parent, then names of permissions.
    """
    die_with_parent()
    folder, device, model, parent, *permitted = arguments
    if os.getppid() != int(parent):
        return
    # Only events go to standard output; what libraries print goes to standard error.
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def tell(event: Event) -> None:
        events.write(json.dumps(event) + "\n")

    try:
        worker = Worker(Path(folder), device, Permissions(**dict.fromkeys(permitted, True)), Path(model))
    except FistaPrunerError as error:
        tell({"event": "failed", "message": str(error)})
        return
    for line in sys.stdin:
        worker.run(json.loads(line), tell)


if __name__ == "__main__":
    main(sys.argv[1:])

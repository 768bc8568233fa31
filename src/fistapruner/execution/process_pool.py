"""Run workers as processes of this machine: one for each GPU, or for each group of CPU cores."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict

import torch

from ..runtime.launcher import module_path
from .context import RunContext
from .pool import Event, LayerJob


class ProcessPool:
    """A pool of local worker processes (see :class:`~fistapruner.execution.pool.Pool`).

    Args:
        context: the opened run.
        devices: the device of each worker.
    """

    def __init__(self, context: RunContext, devices: list[torch.device]) -> None:
        self.size = len(devices)
        self._context = context
        self._devices = devices
        self._selector = selectors.DefaultSelector()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._unread: dict[int, bytes] = {}
        for worker in range(self.size):
            self.revive(worker)

    def start(self, worker: int, job: LayerJob) -> None:
        """Give an idle worker a job."""
        pipe = self._processes[worker].stdin
        assert pipe is not None
        with suppress(BrokenPipeError):  # the worker died while idle; wait() sees its closed output
            pipe.write(json.dumps(asdict(job)).encode() + b"\n")
            pipe.flush()

    def wait(self) -> list[tuple[int, Event]]:
        """Wait for the next events."""
        events: list[tuple[int, Event]] = []
        for key, _ in self._selector.select():
            worker: int = key.data
            data = os.read(key.fd, 65536)
            if not data:
                self._selector.unregister(key.fileobj)
                status = self._processes[worker].wait()
                events.append((worker, {"event": "lost", "message": _describe(status)}))
                continue
            *lines, self._unread[worker] = (self._unread[worker] + data).split(b"\n")
            events += [(worker, json.loads(line)) for line in lines]
        return events

    def revive(self, worker: int) -> None:
        """Start a worker, or start it again."""
        context = self._context
        environment = {**os.environ, "PYTHONPATH": module_path(), "OMP_NUM_THREADS": str(context.numerics.threads)}
        # -P: nothing is imported from the current folder, which may be one that was downloaded
        program = [sys.executable, "-P", "-m", "fistapruner.execution.worker"]
        place = [
            str(context.run.folder),
            str(self._devices[worker]),
            str(context.model.checkpoint.folder),
        ]
        permitted = [name for name, allowed in context.permissions.keywords().items() if allowed]
        # In a group of its own, so that Ctrl-C does not reach it while it imports; it dies with this process.
        process = subprocess.Popen(
            [*program, *place, str(os.getpid()), *permitted],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            process_group=0,
        )
        assert process.stdout is not None
        self._processes[worker] = process
        self._unread[worker] = b""
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)

    def close(self) -> None:
        """Kill all workers; journaled layers stay."""
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):
                        pipe.close()
        self._selector.close()


def _describe(status: int) -> str:
    """Describe how a process ended."""
    if status == -signal.SIGKILL:
        return "killed, as by the system when memory runs out"
    return f"signal {-status}" if status < 0 else f"exit status {status}"

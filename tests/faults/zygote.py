"""A warm process that forks one child for each run of the command line, and lets a fault happen to it.

Importing PyTorch takes seconds; a fork takes milliseconds, so that hundreds of killed runs fit a test. Started as a
script, it reads one JSON request a line and answers with one: {"status": exit status or -signal, "calls": disk calls
the run made, "writes": which of them were writes, "stderr": what it said}. A request with "warm" is run here, without
a fork: what it imports, and what a plan measures once in a process, its successors find done. Its answer is null.

Faults, all optional:
    {"kill_after": seconds}      SIGKILL at that instant
    {"name": path, "then": what}  at the first call that changes a path with this in it, or
    {"at": k, "then": what}      at the k-th call that changes the disk:
        kill                     die before it
        tear                     die half-way through it: half of the bytes are written
        power                    die, and lose half of every file that no fsync had made safe
        full                     no space is left on the device from then on
        interrupt                Ctrl-C
"""

import errno
import gc
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

CHANGES = ("open", "pwrite", "fsync", "replace", "rename", "unlink", "mkdir")
"""The calls that :mod:`fistapruner` changes the disk with."""


class Disk:
    """Counts the calls that change the disk, and lets the k-th go wrong."""

    def __init__(self, fault: dict[str, Any]) -> None:
        self.calls = 0
        self.writes: list[int] = []
        self.at = fault.get("at", -1)
        self.name, self.then = fault.get("name"), fault.get("then", "")
        self.unsafe: dict[int, int] = {}  # inode -> our own descriptor of a file with unsynced bytes
        self.real = {name: getattr(os, name) for name in CHANGES}
        for name in CHANGES:
            setattr(os, name, self.patched(name))

    def patched(self, name: str) -> Callable[..., Any]:
        real = self.real[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **kwargs)
            self.calls += 1
            if name == "pwrite":
                self.writes.append(self.calls)
            named = self.name is not None and self.name in str(args[0])
            if named or self.calls == self.at or (self.then == "full" and self.calls > self.at > 0):
                self.fail(name, args)
            result = real(*args, **kwargs)
            if name == "pwrite":
                inode = os.fstat(args[0]).st_ino
                if inode not in self.unsafe:
                    self.unsafe[inode] = os.dup(args[0])
            elif name == "fsync":
                kept = self.unsafe.pop(os.fstat(args[0]).st_ino, None)
                if kept is not None:
                    os.close(kept)
            return result

        return call

    def fail(self, name: str, args: tuple[Any, ...]) -> None:
        if self.then == "full":
            if name in ("open", "pwrite", "mkdir"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return
        if self.then == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
            return
        if self.then == "tear" and name == "pwrite":
            self.real["pwrite"](args[0], bytes(args[1])[: len(args[1]) // 2], args[2])
        if self.then == "power":
            for descriptor in self.unsafe.values():
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)


def child(request: dict[str, Any], count: int, stderr: int) -> None:
    """Run the command line in this forked process; never returns."""
    os.dup2(stderr, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have background jobs ignore it
    status = 70
    disk = Disk(request.get("fault") or {})
    try:
        from fistapruner.cli import main

        status = main(request["command"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os.write(count, json.dumps([disk.calls, disk.writes]).encode())
        os._exit(status)


def warm(command: list[str]) -> None:
    """Run the command line in this process."""
    from fistapruner.cli import main

    assert main(command) == 0
    gc.collect()
    gc.freeze()  # a child need not look through what is here for garbage


def serve_one(request: dict[str, Any]) -> dict[str, Any] | None:
    """Fork, wait or kill, answer."""
    if request.get("warm"):
        warm(request["command"])
        return None
    fault = request.get("fault") or {}
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as said:
        pid = os.fork()
        if not pid:
            os.close(reading)
            child(request, writing, said.fileno())
        os.close(writing)
        if "kill_after" in fault:
            time.sleep(fault["kill_after"])
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        calls, writes = json.loads(os.read(reading, 65536) or "[-1, []]")
        os.close(reading)
        said.seek(0)
        return {"status": status, "calls": calls, "writes": writes, "stderr": said.read().decode("utf-8", "replace")}


def serve() -> None:
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import fistapruner.pruning.run
    import fistapruner.training.run  # noqa: F401

    torch.set_num_threads(1)  # a fork does not bring threads along
    # Drawing report.html takes longer than the rest of a tiny run, and happens after everything a fault could spoil: as
    # if the extra were not installed.
    sys.modules["matplotlib"] = None  # type: ignore[assignment]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    print("ready", flush=True, file=answers)
    for line in sys.stdin:
        print(json.dumps(serve_one(json.loads(line))), flush=True, file=answers)


if __name__ == "__main__":
    serve()

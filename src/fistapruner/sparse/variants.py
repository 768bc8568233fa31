"""Compare the speed of several forms of a model.

They are measured in interleaved rounds, each in a process of its own: other load on the machine slows all of them
alike, and the memory of each is its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..errors import FistaPrunerError, one_line
from ..models.architecture import auto_class, read_config, refuse_own_code
from ..models.files.checkpoint import Checkpoint
from ..runtime.devices import usable_threads
from ..runtime.launcher import module_path
from ..runtime.memory import free_memory, peak_memory, reset_peak_memory
from ..runtime.progress import Tick, silent
from .llama_cpp import LlamaCpp
from .load import load
from .packed_checkpoint import is_packed, low_rank_part
from .speed import WARM_UP_TOKENS, Run, Speed, prompts, time_generation

SPEED_OF_OWN_CODE = "the speed of such models is not measured"
"""Why a model with Python code of its own is refused."""


@dataclass(frozen=True)
class Variant:
    """One form of a model, for :func:`compare`.

    Args:
        name: what to call it.
        folder: packed or ordinary model folder, or a GGUF file, which llama.cpp runs.
        dtype: precision, as torch calls it; None takes the checkpoint's.
        fill: replace zeros of matrices by small numbers: this has the speed of the dense model, since the speed of a
            dense product does not depend on its numbers.
    """

    name: str
    folder: Path
    dtype: str | None = None
    fill: bool = False

    @property
    def is_gguf(self) -> bool:
        """Whether it is a GGUF file, not a folder."""
        return self.folder.is_file()


def compare(
    variants: Sequence[Variant],
    *,
    batch: int = 1,
    prompt: int = 128,
    tokens: int = 128,
    runs: int = 3,
    threads: int | None = None,
    tick: Tick = silent,
) -> list[Speed]:
    """Measure several variants on the CPU in interleaved rounds, each in a process of its own.

    If they do not all fit into memory at once, they run one after the other.

    Args:
        variants: what to measure.
        batch: sequences per forward pass.
        prompt: prompt tokens.
        tokens: new tokens in a run.
        runs: rounds.
        threads: CPU threads; None takes torch's default, at most the cores that this process may use.
        tick: called with progress: (what, steps done, steps in all).

    Raises:
        FistaPrunerError: a variant cannot be loaded, or its process was killed.
    """
    threads = threads or usable_threads()
    sizes = {
        variant.name: variant.folder.stat().st_size if variant.is_gguf else weight_bytes(variant.folder)
        for variant in variants
    }
    # fp32 copies double a bf16 file, and loading holds a tensor twice.
    together = 2.5 * sum(sizes.values()) < free_memory()
    done: dict[str, list[Run]] = {variant.name: [] for variant in variants}
    peaks: dict[str, int] = {}
    for group in [list(variants)] if together else [[variant] for variant in variants]:
        workers = {variant.name: Worker(variant, batch, prompt, tokens, threads) for variant in group}
        try:
            for number, worker in enumerate(workers.values()):
                tick("forms of the model loaded", number, len(workers))
                worker.receive()  # loaded and warm
            for number in range(runs):
                for place, (name, worker) in enumerate(workers.items()):
                    tick(f"round {number + 1} of {runs}, forms timed", place, len(workers))
                    worker.send("run")
                    done[name].append(Run(**worker.receive()))
            for name, worker in workers.items():
                worker.send("peak")
                peaks[name] = worker.receive()["peak"]
        finally:
            for worker in workers.values():
                worker.close()
    setting: dict[str, Any] = {"batch": batch, "prompt": prompt, "tokens": tokens, "threads": threads, "device": "cpu"}
    return [
        Speed.of(name, done[name], peak_memory=peaks[name], file_size=0 if variant.fill else sizes[name], **setting)
        for variant in variants
        for name in [variant.name]
    ]


class Worker:
    """A process that holds one variant and generates on request.

    It is not a child of :mod:`multiprocessing`, so it does not import the script that measures.
    """

    def __init__(self, variant: Variant, batch: int, prompt: int, tokens: int, threads: int) -> None:
        self.name = variant.name
        self._pipe, other = Pipe()
        with other:
            # -P: nothing is imported from the current folder, which may be one that was downloaded.
            program = [sys.executable, "-P", "-c", f"from {__name__} import main; main({other.fileno()})"]
            # In a group of its own, so that Ctrl-C does not reach it while it imports.
            self._process = subprocess.Popen(
                program,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": module_path()},
                pass_fds=(other.fileno(),),
                process_group=0,
            )
        self.send((variant, batch, prompt, tokens, threads))

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def send(self, request: object) -> None:
        """Send a request: what to measure, then ``"run"`` or ``"peak"``.

        Raises:
            FistaPrunerError: the process has ended.
        """
        try:
            self._pipe.send(request)
        except OSError:
            raise self._ended() from None

    def receive(self) -> dict[str, Any]:
        """Wait for the answer.

        Raises:
            FistaPrunerError: the process has ended, or says what went wrong.
        """
        try:
            answer: dict[str, Any] = self._pipe.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if "error" in answer:
            raise FistaPrunerError(f"{self.name}: {answer['error']}")
        return answer

    def _ended(self) -> FistaPrunerError:
        return FistaPrunerError(
            f"the process that measures {self.name!r} ended early: there may be too little memory for it"
        )

    def close(self) -> None:
        """End the process, also in the midst of a run."""
        self._pipe.close()
        self._process.terminate()
        self._process.wait()


def main(pipe: int) -> None:
    """Serve the variant that comes first through a pipe, as a :class:`Worker`'s process.

    It ignores Ctrl-C: the process that asks ends this one.

    Args:
        pipe: its file descriptor.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of several processes at once, they would be mixed
    with Connection(pipe) as connection:
        variant, batch, prompt, tokens, threads = connection.recv()
        serve(variant, batch, prompt, tokens, threads, connection)


def serve(variant: Variant, batch: int, prompt: int, tokens: int, threads: int, pipe: Connection) -> None:
    """Load a variant and answer requests through a pipe, in a process of its own.

    ``"run"`` is answered by the fields of a :class:`Run`, ``"peak"`` by the peak memory; ``None``, or the other side
    closing the pipe, ends it. An error is sent as one line.
    """
    torch.set_num_threads(threads)
    try:
        generate = prepare(variant, batch, prompt, tokens, threads)
        generate(WARM_UP_TOKENS)
        reset_peak_memory(torch.device("cpu"))
        pipe.send({})
        while (word := pipe.recv()) is not None:
            pipe.send(asdict(generate(tokens)) if word == "run" else {"peak": peak_memory()})
    except (EOFError, BrokenPipeError, ConnectionResetError):  # nobody listens: another variant cannot be loaded
        return
    except FistaPrunerError as error:
        pipe.send({"error": str(error)})
    except Exception as error:  # of a model's own code
        pipe.send({"error": f"{type(error).__name__}: {one_line(error, 300)}"})


def prepare(variant: Variant, batch: int, prompt: int, tokens: int, threads: int) -> Callable[[int], Run]:
    """Load a variant and draw its prompt; returns what decodes a number of new tokens and times it."""
    if variant.is_gguf:
        return LlamaCpp(variant.folder, prompt, tokens, threads).time
    model = load_variant(variant)
    ids = prompts(model, batch, prompt, seed=0)
    return lambda count: time_generation(model, ids, count)


def load_variant(variant: Variant) -> Any:
    """Load the model of a variant onto the CPU."""
    dtype = getattr(torch, variant.dtype) if variant.dtype else None
    refuse_own_code(variant.folder, SPEED_OF_OWN_CODE)
    if is_packed(variant.folder):
        model = load(variant.folder, dtype=dtype)
    else:
        settings = {"local_files_only": True, "trust_remote_code": False}
        config = read_config(variant.folder)
        model = auto_class(config).from_pretrained(
            str(variant.folder), config=config, dtype=dtype or "auto", **settings
        )
    if variant.fill:
        fill_zeros(model)
    return model.eval()


def fill_zeros(model: nn.Module) -> None:
    """Replace the zeros of all matrices by small numbers, in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # experts of mixtures are in tensors of three dimensions
                parameter.masked_fill_(parameter == 0, 1e-3)


def weight_bytes(folder: Path) -> int:
    """Count the bytes of the weight files that are loaded, not of the same weights in another form.

    Those of a low-rank part are counted.

    Raises:
        FistaPrunerError: a file is missing or damaged.
    """
    low_rank = low_rank_part(folder)
    return Checkpoint.open(folder, allow_pickle=True).file_bytes + (0 if low_rank is None else low_rank.file_bytes)

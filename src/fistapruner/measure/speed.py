"""Measure decoding speed, time to the first token and peak memory of forms of a model.

Greedy decoding with a cache, one token at a time, as in a chat. Forms are measured in interleaved rounds, each in a
process of its own: other load on the machine slows all of them alike, and the memory of each is its own.
"""

from __future__ import annotations

import inspect
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FistaPrunerError, one_line
from ..models.architecture import auto_class, read_config, refuse_own_code
from ..models.files.checkpoint import Checkpoint
from ..models.files.gguf import check_gguf
from ..packed.checkpoint import is_packed, low_rank_part
from ..packed.load import load
from ..runtime.devices import usable_threads
from ..runtime.launcher import module_path
from ..runtime.memory import free_memory, peak_memory, reset_peak_memory
from ..runtime.progress import Tick, silent

WARM_UP_TOKENS = 4
"""Tokens decoded before the clock starts: the first calls choose kernels and fill caches."""

SPEED_OF_OWN_CODE = "the speed of such models is not measured"
"""Why a model with Python code of its own is refused."""

EMBEDDING = "token_embd.weight"
"""The tensor of a GGUF file that has a row for every token."""


@dataclass(frozen=True)
class Run:
    """One timed generation.

    Args:
        first_token: seconds from the prompt to the first token.
        tokens_per_second: new tokens of the whole batch per second, without the first one.
    """

    first_token: float
    tokens_per_second: float


@dataclass(frozen=True)
class Speed:
    """Measured speed of one form of a model: medians over runs, and ranges.

    Sizes are bytes, times are seconds. ``perplexity`` and ``kl``, the divergence from the dense model in nats a token,
    are of the text that its run was evaluated on; None where they were not measured.
    """

    variant: str
    tokens_per_second: float
    tokens_per_second_range: tuple[float, float]
    first_token: float
    first_token_range: tuple[float, float]
    peak_memory: int
    file_size: int
    batch: int
    prompt: int
    tokens: int
    runs: int
    threads: int
    device: str
    perplexity: float | None = None
    kl: float | None = None

    @classmethod
    def of(cls, variant: str, runs: Sequence[Run], **setting: Any) -> Speed:
        """Summarise timed runs by median and range; ``setting`` gives all other fields."""
        rates, firsts = [run.tokens_per_second for run in runs], [run.first_token for run in runs]
        return cls(
            variant=variant,
            tokens_per_second=statistics.median(rates),
            tokens_per_second_range=(min(rates), max(rates)),
            first_token=statistics.median(firsts),
            first_token_range=(min(firsts), max(firsts)),
            runs=len(runs),
            **setting,
        )

    def judged(self, perplexity: float, kl: float) -> Speed:
        """Return the same speed with its quality."""
        return replace(self, perplexity=perplexity, kl=kl)

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary, for a report."""
        return asdict(self)


@dataclass(frozen=True)
class Variant:
    """One form of a model, for :func:`compare`.

    Args:
        name: what to call it.
        folder: packed or ordinary model folder, or a GGUF file, which llama.cpp runs.
        dtype: precision, as torch calls it; None takes the checkpoint's.
    """

    name: str
    folder: Path
    dtype: str | None = None

    @property
    def is_gguf(self) -> bool:
        """Whether it is a GGUF file, not a folder."""
        return self.folder.is_file()


def time_generation(model: Any, prompt: Tensor, tokens: int) -> Run:
    """Decode greedily and time it.

    Args:
        model: causal language model in evaluation mode.
        prompt: (batch, seqlen) token ids.
        tokens: new tokens, at least 2.
    """

    def now() -> float:
        if prompt.device.type == "cuda":
            torch.cuda.synchronize(prompt.device)
        return time.perf_counter()

    names = inspect.signature(model.forward).parameters
    key = next((name for name in ("cache", "past_key_values") if name in names), None)  # renamed in transformers 5
    if key is None:
        raise FistaPrunerError(
            f"{type(model).__name__} takes no cache of keys and values: its decoding is not measured"
        )
    # Logits of the last token only, as in generate().
    last = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
    with torch.inference_mode():
        begin = now()
        out = model(input_ids=prompt, use_cache=True, **last)
        token = out.logits[:, -1:].argmax(-1)
        first = now()
        for _ in range(tokens - 1):
            out = model(input_ids=token, use_cache=True, **{key: getattr(out, key)})
            token = out.logits[:, -1:].argmax(-1)
        end = now()
    return Run(first - begin, prompt.shape[0] * (tokens - 1) / (end - first))


def prompts(model: Any, batch: int, length: int, seed: int) -> Tensor:
    """Draw (batch, length) random token ids from a model's vocabulary."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


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
    """Measure several variants on the CPU in interleaved rounds (``runs``), each in a process of its own.

    If they do not all fit into memory at once, they run one after the other. ``threads`` None takes torch's default, at
    most the cores that this process may use. ``tick`` is called with (what, steps done, steps in all).

    Raises:
        FistaPrunerError: a variant cannot be loaded, or its process was killed.
    """
    threads = threads or usable_threads()
    sizes = [one.folder.stat().st_size if one.is_gguf else weight_bytes(one.folder) for one in variants]
    together = 2.5 * sum(sizes) < free_memory()  # fp32 copies double a bf16 file, and loading holds a tensor twice
    done: dict[str, list[Run]] = {variant.name: [] for variant in variants}
    peaks: dict[str, int] = {}
    for group in [list(variants)] if together else [[variant] for variant in variants]:
        workers = [Worker(variant, batch, prompt, tokens, threads) for variant in group]
        try:
            for place, worker in enumerate(workers):
                tick("forms of the model loaded", place, len(workers))
                worker.receive()  # loaded and warm
            for number in range(runs):
                for place, worker in enumerate(workers):
                    tick(f"round {number + 1} of {runs}, forms timed", place, len(workers))
                    run, peaks[worker.name] = worker.run()
                    done[worker.name].append(run)
        finally:
            for worker in workers:
                worker.close()
    setting: dict[str, Any] = {"batch": batch, "prompt": prompt, "tokens": tokens, "threads": threads, "device": "cpu"}
    return [
        Speed.of(one.name, done[one.name], peak_memory=peaks[one.name], file_size=size, **setting)
        for one, size in zip(variants, sizes, strict=True)
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
        self._pipe.send((variant, batch, prompt, tokens, threads))

    def run(self) -> tuple[Run, int]:
        """Generate once; return the times, and the peak memory until then."""
        with self._alive():
            self._pipe.send(None)
        answer: tuple[Run, int] = self.receive()
        return answer

    def receive(self) -> Any:
        """Wait for the answer.

        Raises:
            FistaPrunerError: the process has ended, or says what went wrong.
        """
        with self._alive():
            answer = self._pipe.recv()
        if isinstance(answer, str):
            raise FistaPrunerError(f"{self.name}: {answer}")
        return answer

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):
            raise FistaPrunerError(
                f"the process that measures {self.name!r} ended early: there may be too little memory for it"
            ) from None

    def close(self) -> None:
        """End the process, also in the midst of a run."""
        self._pipe.close()
        self._process.terminate()
        self._process.wait()


def main(pipe: int) -> None:
    """Serve the variant that comes first through a pipe, as a :class:`Worker`'s process.

    Every request is answered by a :class:`Run` and the peak memory; an error by one line. The process ignores Ctrl-C:
    the one that asks ends it.

    Args:
        pipe: its file descriptor.
    """
    from transformers.utils import logging

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of several processes at once, they would be mixed
    with Connection(pipe) as connection, suppress(EOFError, BrokenPipeError, ConnectionResetError):  # nobody listens
        variant, batch, prompt, tokens, threads = connection.recv()
        torch.set_num_threads(threads)
        try:
            if variant.is_gguf:
                generate = _in_llama_cpp(variant.folder, prompt, tokens, threads)
            else:
                model = load_variant(variant)
                generate = partial(time_generation, model, prompts(model, batch, prompt, seed=0))
            generate(WARM_UP_TOKENS)
            reset_peak_memory(torch.device("cpu"))
            connection.send(None)
            while True:
                connection.recv()
                connection.send((generate(tokens), peak_memory()))
        except FistaPrunerError as error:
            connection.send(str(error))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except Exception as error:  # of a model's code
            connection.send(f"{type(error).__name__}: {one_line(error, 300)}")


def load_variant(variant: Variant) -> Any:
    """Load the model of a variant onto the CPU."""
    refuse_own_code(variant.folder, SPEED_OF_OWN_CODE)
    if is_packed(variant.folder):
        return load(variant.folder, dtype=variant.dtype)
    settings = {"local_files_only": True, "trust_remote_code": False, "dtype": variant.dtype or "auto"}
    config = read_config(variant.folder)
    return auto_class(config).from_pretrained(str(variant.folder), config=config, **settings).eval()


def weight_bytes(folder: Path) -> int:
    """Count the bytes of the weight files that are loaded, not of the same weights in another form.

    Those of a low-rank part are counted.

    Raises:
        FistaPrunerError: a file is missing or damaged.
    """
    low_rank = low_rank_part(folder)
    return Checkpoint.open(folder, allow_pickle=True).file_bytes + (0 if low_rank is None else low_rank.file_bytes)


def _in_llama_cpp(file: Path, prompt: int, tokens: int, threads: int) -> Callable[[int], Run]:
    """Load a GGUF file in llama.cpp; returns what decodes greedily and gives llama.cpp's own times.

    Raises:
        FistaPrunerError: llama.cpp cannot load the file, or refuses to write.
    """
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx = prompt + max(tokens, WARM_UP_TOKENS)
    settings.n_parallel, settings.n_gpu_layers, settings.verbosity = 1, 0, -1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    vocabulary = check_gguf(file)[EMBEDDING].shape[0]
    ids = torch.randint(0, vocabulary, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    try:
        server = xllamacpp.Server(settings)
    except RuntimeError as error:
        raise FistaPrunerError(f"llama.cpp cannot load {file}: {one_line(error)}") from None

    def generate(count: int) -> Run:
        request = {"prompt": ids, "n_predict": count, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
        answer = server.handle_completions(request)
        if "timings" not in answer:
            raise FistaPrunerError(f"llama.cpp has written nothing: {str(answer.get('error', answer))[:300]}")
        timings = answer["timings"]
        # Its clock for new tokens starts at the first of them.
        return Run(timings["prompt_ms"] / 1000, 1000 * (timings["predicted_n"] - 1) / timings["predicted_ms"])

    return generate

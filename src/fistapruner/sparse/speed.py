"""How fast a model decodes, how long its first token takes, and how much memory it needs.

Greedy decoding with a cache, one token at a time: the work of a chat. Several models are compared in interleaved rounds,
each in a process of its own, so that a machine that is busy for a while slows all of them alike and no model's memory is
counted for another.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FistaPrunerError
from ..runtime.memory import free_memory, peak_memory, reset_peak_memory

WARM_UP_TOKENS = 4
"""Tokens decoded before the clock starts: the first calls choose kernels and fill caches."""


@dataclass(frozen=True)
class Run:
    """One timed generation.

    Args:
        first_token: seconds from the prompt to the first token.
        tokens_per_second: new tokens of the whole batch in a second, the first one not counted.
    """

    first_token: float
    tokens_per_second: float


@dataclass(frozen=True)
class Speed:
    """What a speed measurement of one model found.

    Args:
        variant: what was measured: ``dense float32``, ``packed``, …
        tokens_per_second: median over runs.
        tokens_per_second_range: slowest and fastest run.
        first_token: median seconds to the first token.
        first_token_range: shortest and longest.
        peak_memory: largest resident memory of the process (on CUDA: of the device) during the runs, in bytes.
        file_size: bytes of the weight files, 0 where there are none.
        batch: sequences at once.
        prompt: prompt tokens.
        tokens: new tokens in a run.
        runs: number of runs.
        threads: CPU threads.
        device: ``cpu``, ``cuda``.
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

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary, for a report."""
        return asdict(self)


def time_generation(model: Any, prompt: Tensor, tokens: int) -> Run:
    """Decode greedily and time it.

    Args:
        model: causal language model in evaluation mode.
        prompt: (batch, seqlen) token ids.
        tokens: new tokens, at least 2.

    Raises:
        FistaPrunerError: fewer than two tokens.
    """
    if tokens < 2:
        raise FistaPrunerError(f"tokens {tokens} is too few to time decoding: at least 2")
    names = inspect.signature(model.forward).parameters
    cache_name = "cache" if "cache" in names else "past_key_values"
    last = {"logits_to_keep": 1} if "logits_to_keep" in names else {}  # the head sees one token, as in generate()
    with torch.inference_mode():
        _wait(prompt.device)
        begin = time.perf_counter()
        out = model(input_ids=prompt, use_cache=True, **last)
        token = out.logits[:, -1:].argmax(-1)
        _wait(prompt.device)
        first = time.perf_counter()
        for _ in range(tokens - 1):
            out = model(input_ids=token, use_cache=True, **{cache_name: getattr(out, cache_name)})
            token = out.logits[:, -1:].argmax(-1)
        _wait(prompt.device)
        end = time.perf_counter()
    return Run(first - begin, prompt.shape[0] * (tokens - 1) / (end - first))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_speed(
    model: Any,
    *,
    variant: str = "model",
    batch: int = 1,
    prompt: int = 128,
    tokens: int = 128,
    runs: int = 3,
    file_size: int = 0,
    seed: int = 0,
) -> Speed:
    """Speed of a model that is in memory already.

    Args:
        model: causal language model on its device.
        variant: what to call it in the result.
        batch: sequences at once.
        prompt: tokens in each prompt, drawn at random: speed does not depend on them.
        tokens: new tokens in a run.
        runs: timed runs, after a short warm-up.
        file_size: bytes of the weight files, passed through.
        seed: draws the prompts.
    """
    model.eval()
    device = next(model.parameters()).device
    ids = prompts(model, batch, prompt, seed).to(device)
    time_generation(model, ids, WARM_UP_TOKENS)
    reset_peak_memory(device)
    done = [time_generation(model, ids, tokens) for _ in range(runs)]
    return summarise(variant, done, _peak(device), file_size, batch, prompt, tokens, device)


def summarise(
    variant: str,
    runs: Sequence[Run],
    peak: int,
    file_size: int,
    batch: int,
    prompt: int,
    tokens: int,
    device: torch.device,
    threads: int | None = None,
) -> Speed:
    """Median and range of some runs."""
    rates, firsts = [run.tokens_per_second for run in runs], [run.first_token for run in runs]
    return Speed(
        variant,
        statistics.median(rates),
        (min(rates), max(rates)),
        statistics.median(firsts),
        (min(firsts), max(firsts)),
        peak,
        file_size,
        batch,
        prompt,
        tokens,
        len(runs),
        threads or torch.get_num_threads(),
        device.type,
    )


def prompts(model: Any, batch: int, length: int, seed: int) -> Tensor:
    """(batch, length) random token ids of a model's vocabulary."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def _peak(device: torch.device) -> int:
    """Most bytes held since the last reset: of a GPU's memory, or on a CPU of this process."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else peak_memory()


@dataclass(frozen=True)
class Variant:
    """One way to hold a model, for :func:`compare`.

    Args:
        name: what to call it.
        folder: packed or ordinary model folder.
        dtype: precision, as torch calls it; None takes the checkpoint's.
        fill: replace zeros of matrices by small numbers, for the speed of the dense model when only the pruned one is
            there; the speed of a dense product does not depend on its numbers.
    """

    name: str
    folder: Path
    dtype: str | None = None
    fill: bool = False


def compare(
    variants: Sequence[Variant], *, batch: int = 1, prompt: int = 128, tokens: int = 128, runs: int = 3, threads: int | None = None
) -> list[Speed]:
    """Measure several variants on the CPU in interleaved rounds, each in a process of its own.

    Where all of them do not fit into memory together, they run one after the other.

    Args:
        variants: what to measure.
        batch: sequences at once.
        prompt: prompt tokens.
        tokens: new tokens in a run.
        runs: rounds.
        threads: CPU threads; None takes torch's default.

    Raises:
        FistaPrunerError: a variant cannot be loaded, or its process was killed.
    """
    sizes = {variant.name: weight_bytes(variant.folder) for variant in variants}
    # fp32 copies double a bf16 file, and loading holds a tensor twice.
    together = 2.5 * sum(sizes.values()) < free_memory()
    done: dict[str, list[Run]] = {variant.name: [] for variant in variants}
    peaks: dict[str, int] = {}
    for group in [list(variants)] if together else [[variant] for variant in variants]:
        workers = {variant.name: _Worker(variant, batch, prompt, tokens, threads) for variant in group}
        try:
            for worker in workers.values():
                worker.receive()  # loaded and warm
            for _ in range(runs):
                for name, worker in workers.items():
                    worker.send("run")
                    done[name].append(Run(**worker.receive()))
            for name, worker in workers.items():
                worker.send("peak")
                peaks[name] = worker.receive()["peak"]
        finally:
            for worker in workers.values():
                worker.close()
    device = torch.device("cpu")
    return [
        summarise(name, done[name], peaks[name], sizes[name] if not variant.fill else 0, batch, prompt, tokens, device, threads)
        for variant in variants
        for name in [variant.name]
    ]


class _Worker:
    """A process that holds one variant and generates when it is told to."""

    def __init__(self, variant: Variant, batch: int, prompt: int, tokens: int, threads: int | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = variant.name
        self._pipe, other = context.Pipe()
        arguments = (variant, batch, prompt, tokens, threads or torch.get_num_threads(), other)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        other.close()

    def send(self, word: str) -> None:
        self._pipe.send(word)

    def receive(self) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = self._pipe.recv()
        except EOFError:
            raise FistaPrunerError(f"the process that measures {self.name!r} ended early; there may be too little memory for it") from None
        if "error" in answer:
            raise FistaPrunerError(f"{self.name}: {answer['error']}")
        return answer

    def close(self) -> None:
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()


def _serve(variant: Variant, batch: int, prompt: int, tokens: int, threads: int, pipe: Connection) -> None:
    torch.set_num_threads(threads)
    try:
        model = load_variant(variant)
        ids = prompts(model, batch, prompt, seed=0)
        time_generation(model, ids, WARM_UP_TOKENS)
        reset_peak_memory(ids.device)
        pipe.send({})
        while (word := pipe.recv()) is not None:
            pipe.send(asdict(time_generation(model, ids, tokens)) if word == "run" else {"peak": _peak(ids.device)})
    except EOFError:
        return
    except FistaPrunerError as error:
        pipe.send({"error": str(error)})
    except (OSError, ValueError, RuntimeError, LookupError) as error:
        pipe.send({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})


def load_variant(variant: Variant) -> Any:
    """The model of a variant, on the CPU."""
    from transformers import AutoModelForCausalLM

    from .load import load
    from .pack import is_packed

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    dtype = getattr(torch, variant.dtype) if variant.dtype else None
    if is_packed(variant.folder):
        model = load(variant.folder, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(str(variant.folder), dtype=dtype or "auto", local_files_only=True)
    if variant.fill:
        fill_zeros(model)
    return model.eval()


def fill_zeros(model: nn.Module) -> None:
    """Replace the zeros of all matrices by small numbers, in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.masked_fill_(parameter == 0, 1e-3)


def weight_bytes(folder: Path) -> int:
    """Bytes of a folder's weight files."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def sentence(speeds: Mapping[str, Speed]) -> str:
    """What the comparison says, in one plain sentence.

    Args:
        speeds: by variant; those whose name starts with ``dense`` or ``pruned`` are dense products, with ``packed`` sparse.
    """
    dense = max((speed for name, speed in speeds.items() if not name.startswith("packed")), key=lambda speed: speed.tokens_per_second)
    packed = max((speed for name, speed in speeds.items() if name.startswith("packed")), key=lambda speed: speed.tokens_per_second)
    ratio = packed.tokens_per_second / dense.tokens_per_second
    overlap = packed.tokens_per_second_range[0] <= dense.tokens_per_second_range[1] and ratio > 1
    verdict = "faster" if ratio > 1 else "slower"
    doubt = ", within the spread of the runs" if overlap else ""
    memory = packed.peak_memory / dense.peak_memory
    return (
        f"On this machine the fastest packed form ({packed.variant}) decodes {max(ratio, 1 / ratio):.2f} times {verdict} than the fastest "
        f"dense one ({dense.variant}){doubt}, with {memory:.2f} times its peak memory."
    )

"""Measure decoding speed, time to the first token and peak memory of forms of a model.

Greedy decoding with a cache, one token at a time, as in a chat. Forms are measured in interleaved rounds, each in a
process of its own: other load on the machine slows all of them alike, and the memory of each is its own.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FistaPrunerError, one_line
from ..models.build import auto_class, read_config, refuse_own_code
from ..models.checkpoint import Checkpoint
from ..models.gguf import check_gguf
from ..packed.checkpoint import is_packed, low_rank_part
from ..packed.load import load
from ..runtime.devices import usable_threads
from ..runtime.memory import free_memory, peak_memory, reset_peak_memory
from ..runtime.progress import Tick, silent

WARM_UP_TOKENS = 4
"""Tokens decoded before the clock starts: the first calls choose kernels and fill caches."""

SPEED_OF_OWN_CODE = "the speed of such models is not measured"
"""Why a model with Python code of its own is refused."""


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

    @property
    def nbytes(self) -> int:
        """Return the bytes of its weight files."""
        return self.folder.stat().st_size if self.is_gguf else weight_bytes(self.folder)


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
    most the cores that this process may use. ``tick`` is called with (what, steps done, steps in all). A script that
    calls this needs ``if __name__ == "__main__":``, as for :mod:`multiprocessing`.

    Raises:
        FistaPrunerError: a variant cannot be loaded, or its process was killed.
    """
    threads = threads or usable_threads()
    together = 2.5 * sum(one.nbytes for one in variants) < free_memory()  # fp32 copies double a bf16 file
    found: dict[int, list[tuple[Run, int]]] = {number: [] for number in range(len(variants))}
    for group in [list(found)] if together else [[number] for number in found]:
        with ExitStack() as stack:
            workers = {number: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for number in group}
            for place, (number, worker) in enumerate(workers.items()):
                tick("forms of the model loaded", place, len(workers))
                _answer(variants[number], worker.submit(_load, variants[number], batch, prompt, tokens, threads))
            for round_number in range(1, runs + 1):
                for place, (number, worker) in enumerate(workers.items()):
                    tick(f"round {round_number} of {runs}, forms timed", place, len(workers))
                    found[number].append(_answer(variants[number], worker.submit(_generate, tokens)))
    return [
        Speed.of(
            one.name,
            [run for run, _ in found[number]],
            peak_memory=found[number][-1][1],
            file_size=one.nbytes,
            batch=batch,
            prompt=prompt,
            tokens=tokens,
            threads=threads,
            device="cpu",
        )
        for number, one in enumerate(variants)
    ]


def _answer(variant: Variant, work: Future[Any]) -> Any:
    """Wait for the process of a variant.

    Raises:
        FistaPrunerError: names the variant, and what went wrong.
    """
    try:
        return work.result()
    except BrokenProcessPool:
        raise FistaPrunerError(
            f"the process that measures {variant.name!r} ended early: there may be too little memory for it"
        ) from None
    except Exception as error:  # of a model's code
        said = str(error) if isinstance(error, FistaPrunerError) else f"{type(error).__name__}: {one_line(error, 300)}"
        raise FistaPrunerError(f"{variant.name}: {said}") from None


_LOADED: list[Callable[[int], Run]] = []
"""In the process of a variant: what generates so many tokens with it."""


def _load(variant: Variant, batch: int, prompt: int, tokens: int, threads: int) -> None:
    """Load a variant into this process, and warm it up."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of several processes at once, they would be mixed
    torch.set_num_threads(threads)
    if variant.is_gguf:
        generate = _in_llama_cpp(variant.folder, prompt, tokens, threads)
    else:
        model = load_variant(variant)
        generate = partial(time_generation, model, prompts(model, batch, prompt, seed=0))
    generate(WARM_UP_TOKENS)
    reset_peak_memory(torch.device("cpu"))
    _LOADED.append(generate)


def _generate(tokens: int) -> tuple[Run, int]:
    """Generate with the variant of this process; return the times, and the peak memory until then."""
    return _LOADED[0](tokens), peak_memory()


def load_variant(variant: Variant) -> Any:
    """Load the model of a variant onto the CPU."""
    refuse_own_code(variant.folder, SPEED_OF_OWN_CODE)
    if is_packed(variant.folder):
        return load(variant.folder, dtype=variant.dtype)
    settings = {"local_files_only": True, "trust_remote_code": False, "dtype": variant.dtype or "auto"}
    config = read_config(variant.folder)
    return auto_class(config).from_pretrained(str(variant.folder), config=config, **settings).eval()


def weight_bytes(folder: Path) -> int:
    """Count the bytes of the weight files that are loaded, a low-rank part's among them.

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
    vocabulary = check_gguf(file)["token_embd.weight"].shape[0]
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

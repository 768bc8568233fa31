"""Measure decoding speed, time to the first token and peak memory of one model.

Greedy decoding with a cache, one token at a time, as in a chat. :mod:`.variants` compares several models.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import FistaPrunerError

WARM_UP_TOKENS = 4
"""Tokens decoded before the clock starts: the first calls choose kernels and fill caches."""


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
    """Measured speed of one model, and its quality where that is known.

    Args:
        variant: what was measured: ``dense float32``, ``packed``, …
        tokens_per_second: median over runs.
        tokens_per_second_range: slowest and fastest run.
        first_token: median seconds to the first token.
        first_token_range: shortest and longest.
        peak_memory: largest resident memory of the process during the runs, in bytes.
        file_size: bytes of the weight files, 0 where there are none.
        batch: sequences per forward pass.
        prompt: prompt tokens.
        tokens: new tokens in a run.
        runs: number of runs.
        threads: CPU threads.
        device: ``cpu``, ``cuda``.
        perplexity: on the text that its run was evaluated on; None where it was not measured.
        kl: divergence from the dense model on that text, in nats a token.
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


def time_generation(model: Any, prompt: Tensor, tokens: int) -> Run:
    """Decode greedily and time it.

    Args:
        model: causal language model in evaluation mode.
        prompt: (batch, seqlen) token ids.
        tokens: new tokens, at least 2.

    Raises:
        FistaPrunerError: fewer than two tokens, or the model takes no cache.
    """
    from transformers import DynamicCache

    if tokens < 2:
        raise FistaPrunerError(f"tokens {tokens} is too few to time decoding: at least 2")
    key, cache = cache_argument(model), None
    # Logits of the last token only, as in generate().
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with torch.inference_mode():
        _wait(prompt.device)
        begin = time.perf_counter()
        out = model(input_ids=prompt, use_cache=True, **last)
        if not hasattr(out, key):  # RecurrentGemma does not return its cache, but fills the one that it is given
            cache = DynamicCache(config=model.config)
            begin = time.perf_counter()
            out = model(input_ids=prompt, use_cache=True, **{key: cache}, **last)
        token = out.logits[:, -1:].argmax(-1)
        _wait(prompt.device)
        first = time.perf_counter()
        for _ in range(tokens - 1):
            out = model(input_ids=token, use_cache=True, **{key: getattr(out, key, cache)})
            token = out.logits[:, -1:].argmax(-1)
        _wait(prompt.device)
        end = time.perf_counter()
    return Run(first - begin, prompt.shape[0] * (tokens - 1) / (end - first))


def cache_argument(model: Any) -> str:
    """Name the cache among the arguments of a model; transformers renamed it in version 5.

    Raises:
        FistaPrunerError: the model takes none.
    """
    names = inspect.signature(model.forward).parameters
    for name in ("cache", "past_key_values"):
        if name in names:
            return name
    raise FistaPrunerError(f"{type(model).__name__} takes no cache of keys and values: its decoding is not measured")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def prompts(model: Any, batch: int, length: int, seed: int) -> Tensor:
    """Draw (batch, length) random token ids from a model's vocabulary."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))

"""Calibration text that the model writes itself: no data set, no licence, no network.

Sequences are sampled from the model's own distribution at temperature 1. They begin with BOS where the tokenizer begins
texts with it, else with a random token, as in LLM-QAT (arXiv 2305.17888). After an end-of-text token a new text begins
in the same sequence, as in packed training data; other special tokens are never drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from .text import adds_bos

CACHE_BYTES = 2**29
MAX_BATCH = 64


def generate_tokens(
    model: Any,
    tokenizer: Any,
    samples: int,
    seqlen: int,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Sample token sequences from a causal language model.

    The same model, seed and kind of device give the same tokens: random numbers are drawn on the CPU, and the batch
    follows from the model's shape, never from the machine.

    Args:
        model: a ``transformers`` causal language model, loaded.
        tokenizer: its tokenizer.
        samples: sequences.
        seqlen: tokens in each.
        seed: of the random numbers.
        progress: called with tokens done and tokens in all after each step.

    Returns:
        (samples, seqlen) int64 token ids.

    Raises:
        FistaPrunerError: the model's logits are not finite, or it cannot generate step by step.
    """
    random = torch.Generator().manual_seed(seed)
    vocabulary = _Vocabulary(tokenizer, int(model.config.get_text_config().vocab_size))
    batch = batch_size(model, seqlen)
    parts = []
    for start in range(0, samples, batch):
        count = min(batch, samples - start)

        def report(step: int, start: int = start, count: int = count) -> None:
            if progress is not None:
                progress(start * seqlen + step * count, samples * seqlen)

        parts.append(_sample(model, vocabulary, count, seqlen, random, report))
    return torch.cat(parts)


def batch_size(model: Any, seqlen: int) -> int:
    """Sequences generated side by side: their keys and values take at most :data:`CACHE_BYTES`."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * int(heads) * int(width) * seqlen * model.dtype.itemsize
    return int(max(1, min(MAX_BATCH, CACHE_BYTES // max(cached, 1))))


class _Vocabulary:
    """Which tokens may begin a text, and which may follow.

    Args:
        tokenizer: the tokenizer.
        size: columns of the logits; a model may have more than the tokenizer has tokens.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        special = {token for token in tokenizer.all_special_ids if token is not None}
        self.end: int | None = tokenizer.eos_token_id
        words = torch.ones(size, dtype=torch.bool)
        words[len(tokenizer) :] = False
        words[[token for token in special if token < size]] = False
        if not bool(words.any()):
            raise FistaPrunerError("the tokenizer has no tokens but special ones: the model cannot generate calibration text")
        self.forbidden = ~words
        if self.end is not None and self.end < size:
            self.forbidden[self.end] = False
        self.first = torch.tensor([tokenizer.bos_token_id]) if adds_bos(tokenizer) else words.nonzero().flatten()

    def begin(self, count: int, random: torch.Generator) -> Tensor:
        """(count,) first tokens of new texts."""
        return self.first[torch.randint(len(self.first), (count,), generator=random)]


def _sample(model: Any, vocabulary: _Vocabulary, count: int, seqlen: int, random: torch.Generator, report: Callable[[int], None]) -> Tensor:
    """(count, seqlen) tokens, one column a step, with the keys and values of the columns before in the model's cache."""
    tokens = torch.empty(count, seqlen, dtype=torch.int64)
    tokens[:, 0] = vocabulary.begin(count, random)
    cache = None
    with torch.inference_mode():
        for column in range(1, seqlen):
            fresh = tokens[:, column - 1 : column]
            try:
                out = model(input_ids=fresh.to(model.device), past_key_values=cache, use_cache=True)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                reason = " ".join(str(error).split())[:200]
                raise FistaPrunerError(
                    f"{type(model).__name__} cannot generate calibration text: {reason}; give a text source instead"
                ) from error
            cache = out.past_key_values
            if cache is None:
                raise FistaPrunerError(
                    f"{type(model).__name__} keeps no cache and cannot generate calibration text: give a text source instead"
                )
            logits = out.logits[:, -1].float().cpu()
            if not bool(torch.isfinite(logits).all()):
                raise FistaPrunerError(
                    f"{type(model).__name__} gives NaN or infinite logits: its weights are damaged, or {model.dtype} overflows"
                )
            chances = logits.masked_fill(vocabulary.forbidden, -torch.inf).softmax(-1)
            tokens[:, column] = torch.multinomial(chances, 1, generator=random).flatten()
            ended = fresh[:, 0] == vocabulary.end if vocabulary.end is not None else torch.zeros(count, dtype=torch.bool)
            tokens[ended, column] = vocabulary.begin(int(ended.sum()), random)
            report(column + 1)
    return tokens

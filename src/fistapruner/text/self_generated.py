"""Let the model write calibration text, by ``generate`` of transformers: no data set, no network.

Texts are sampled at temperature 1. They begin with BOS where the tokenizer begins texts with it, else with a random
token, as in LLM-QAT (arXiv 2305.17888). A window packs as many texts as it holds. After an end-of-text token a new text
begins at once; other special tokens are never drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import FistaPrunerError, one_line
from ..models.coupling import named_size
from ..runtime.transfers import sent
from .text import adds_bos

TEXT_LENGTH = 512
"""Tokens of a generated text, at most: about the mean of a C4 document; longer texts cost more per token."""

BATCH = {"cpu": (32, 2**30), "cuda": (128, 2**32)}
"""Texts of a batch, and bytes of their keys and values, at most. On a CPU finished texts are kept more often."""


def generate_tokens(
    model: Any,
    tokenizer: Any,
    samples: int,
    seqlen: int,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    begun: tuple[Tensor, Tensor] | None = None,
    keep: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Sample (samples, seqlen) int64 tokens; the same ones for the same model, seed and kind of device.

    Args:
        model, tokenizer: of transformers.
        samples, seqlen, seed: windows, tokens in each, and of the random numbers, which are drawn on the CPU.
        progress: receives (tokens done, tokens in all) after each step.
        begun: what ``keep`` received last in an attempt that was stopped.
        keep: receives the (texts, length) texts so far and the state of the random numbers after every batch.

    Raises:
        FistaPrunerError: the model's logits are not finite, or it cannot generate.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    texts, length, batch, _ = _sizes(model, samples, seqlen)
    random = torch.Generator().manual_seed(seed)
    found, state = begun or (torch.zeros(0, length, dtype=torch.int64), random.get_state())
    random.set_state(state)
    # As the model's own too: what the one leaves open, such as the token that stops, is taken from the other.
    model.generation_config = GenerationConfig(max_new_tokens=length - 1, do_sample=False, pad_token_id=0)
    while (start := len(found)) < texts:
        count = min(batch, texts - start)

        def report(step: int, done: int = start * length, count: int = count) -> None:
            if progress is not None:
                progress(done + step * count, texts * length)

        drawing = _Drawing(model, tokenizer, random, report)
        first = sent(drawing.begin(count)[:, None], model.device)
        try:
            chosen = {"attention_mask": torch.ones_like(first), "logits_processor": LogitsProcessorList([drawing])}
            found = torch.cat([found, model.generate(first, **chosen).cpu()])
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:  # also memory that runs out
            reason = f"{one_line(error)}; take text instead, such as c4, python or a file"
            raise FistaPrunerError(f"{type(model).__name__} cannot generate text: {reason}") from error
        if keep is not None:
            keep(found, random.get_state())
    return found.view(samples, -1)[:, :seqlen].contiguous()


def generation_steps(model: Any, samples: int, seqlen: int) -> tuple[int, int]:
    """Return the texts of a batch of :func:`generate_tokens`, and its steps of one token a text."""
    texts, length, batch, _ = _sizes(model, samples, seqlen)
    return batch, length * math.ceil(texts / batch)


def generation_bytes(model: Any, samples: int, seqlen: int) -> int:
    """Count the bytes beside the weights: keys and values, which are copied once, and logits."""
    _, _, batch, cached = _sizes(model, samples, seqlen)
    return batch * (2 * cached + 6 * 4 * int(model.config.get_text_config().vocab_size))  # probabilities, sums in fp64


def _sizes(model: Any, samples: int, seqlen: int) -> tuple[int, int, int, int]:
    """Return the number of texts, tokens of each, texts of a batch, and bytes of a text's keys and values."""
    pieces, config = math.ceil(seqlen / TEXT_LENGTH), model.config.get_text_config()
    length, queries = math.ceil(seqlen / pieces), named_size(config, "num_attention_heads") or 1
    width = named_size(config, "head_dim") or config.hidden_size // queries
    width *= named_size(config, "num_key_value_heads") or queries
    cached = 2 * int(config.num_hidden_layers) * int(width) * length * int(model.dtype.itemsize)
    most, room = BATCH[model.device.type]
    return samples * pieces, length, max(1, min(most, room // cached, samples * pieces)), cached


class _Drawing:
    """Draw the next token of every text: a processor of logits that leaves only the drawn tokens."""

    def __init__(self, model: Any, tokenizer: Any, random: torch.Generator, report: Callable[[int], None]) -> None:
        self._random, self._end, self._began, self._report = random, tokenizer.eos_token_id, torch.tensor(True), report
        words = torch.ones(int(model.config.get_text_config().vocab_size), dtype=torch.bool)
        words[len(tokenizer) :] = False
        words[[token for token in tokenizer.all_special_ids if token < len(words)]] = False
        self._first = torch.tensor([tokenizer.bos_token_id]) if adds_bos(tokenizer) else words.nonzero().flatten()
        if self._end is not None and self._end < len(words):
            words[self._end] = True
        self._forbidden = sent(~words, model.device)

    def begin(self, count: int) -> Tensor:
        """Draw the (count,) first tokens of new texts."""
        return self._first[torch.randint(len(self._first), (count,), generator=self._random)]

    def __call__(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """Return (count, vocabulary) scores: 0 of the drawn token, which is behind the (count, length) tokens."""
        if not bool(torch.isfinite(logits).all()):
            raise ValueError("its logits are NaN or infinite")
        logits = logits.float().masked_fill(self._forbidden, -torch.inf)
        # By inverting the cumulative distribution. A GPU adds up a single row in no fixed order.
        sums = (logits.cpu() if len(logits) == 1 else logits).softmax(-1).cumsum(-1, dtype=torch.float64)
        # Uniform in (0, 1]: a token of probability 0 adds nothing, so it is never the first to reach the height.
        height = 1 - torch.rand(len(logits), 1, generator=self._random, dtype=torch.float64)
        drawn = torch.searchsorted(sums, sent(height, sums.device) * sums[:, -1:]).flatten().cpu()
        # Where BOS is EOS, as in OPT, a token that begins a text must not end it.
        self._began = (tokens[:, -1].cpu() == (-1 if self._end is None else self._end)) & ~self._began
        drawn[self._began] = self.begin(int(self._began.sum()))
        self._report(tokens.shape[1] + 1)
        return torch.full_like(logits, -torch.inf).scatter_(1, sent(drawn[:, None], logits.device), 0.0)

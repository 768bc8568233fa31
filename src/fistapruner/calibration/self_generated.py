"""Generate calibration text with the model itself: no data set, no licence, no network.

Texts are sampled from the model's own distribution at temperature 1. They begin with BOS where the tokenizer begins
texts with it, else with a random token, as in LLM-QAT (arXiv 2305.17888). A text has at most :data:`TEXT_LENGTH`
tokens, which is about the mean length of a C4 document, and a window packs as many as it holds: long texts cost more
per token. After an end-of-text token a new text begins at once; other special tokens are never drawn.
"""

from __future__ import annotations

import copy
import inspect
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import FistaPrunerError, one_line
from ..models.architecture import auto_class, find_decoder_layers
from ..models.coupling import named_size
from ..models.layerwise import LayerwiseModel
from ..runtime.transfers import sent
from .text import adds_bos

TEXT_LENGTH = 512
"""Tokens of a generated text, at most."""

CACHE_BYTES, CUDA_CACHE_BYTES = 2**30, 2**32
"""Bytes of the cache of a batch, at most: on a CPU, and of a large model on a GPU (:func:`batch_size`)."""

CACHE_SHARE = 1 / 8
"""Bytes of the cache of a batch on a GPU, as a share of those of the decoder layers' weights."""

MAX_BATCH, CPU_BATCH = 128, 32
"""Texts of a batch, at most; on a CPU fewer, so that finished texts are kept more often."""

MEASURED = 16
"""Tokens of the shorter of two texts of which the cache is measured; the other has twice as many."""

TRIED = 8
"""Tokens on which steps are compared with one pass (:func:`_needs_positions`)."""

SAME, CLEARLY = 1e-3, 3
"""Relative distance of logits up to which they are the same in fp32, and how many times nearer positions must bring."""

DIFFERENT, DIFFERENT_ROUNDED = 0.01, 0.25
"""Relative distance of logits above which they are other predictions, in fp32 and in less precision."""


def generate_tokens(
    model: Any,
    tokenizer: Any,
    samples: int,
    seqlen: int,
    *,
    seed: int = 0,
    text_length: int = TEXT_LENGTH,
    progress: Callable[[int, int], None] | None = None,
    begun: tuple[Tensor, Tensor] | None = None,
    keep: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Sample windows of tokens from a causal language model.

    The same model, seed and kind of device give the same tokens: random numbers are drawn on the CPU, and the batch
    size depends on the model's shape and that kind, not on the machine.

    Args:
        model: a ``transformers`` causal language model, loaded.
        tokenizer: its tokenizer.
        samples: windows.
        seqlen: tokens in a window.
        seed: of the random numbers.
        text_length: tokens of a text, at most.
        progress: receives (tokens done, tokens in all) after each step.
        begun: what ``keep`` received last in an attempt that was stopped.
        keep: receives the (texts, length) texts so far and the state of the random numbers after every batch.

    Returns:
        (samples, seqlen) int64 token ids.

    Raises:
        FistaPrunerError: the model's logits are not finite, or it cannot generate step by step, or not as in one pass.
    """
    random = torch.Generator().manual_seed(seed)
    vocabulary = _Vocabulary(tokenizer, int(model.config.get_text_config().vocab_size))
    pieces, length = _texts(seqlen, text_length)
    texts = samples * pieces
    batch = batch_size(model, _cached_bytes(model, length))
    positions = _needs_positions(model, vocabulary, length)
    parts: list[Tensor] = []
    if begun is not None:
        parts = [begun[0]]
        random.set_state(begun[1])
    for start in range(sum(map(len, parts)), texts, batch):
        count = min(batch, texts - start)

        def report(step: int, start: int = start, count: int = count) -> None:
            if progress is not None:
                progress(start * length + step * count, texts * length)

        parts.append(_sample(model, vocabulary, count, length, random, report, positions))
        if keep is not None:
            keep(torch.cat(parts), random.get_state())
    return torch.cat(parts).view(samples, pieces * length)[:, :seqlen].contiguous()


def batch_size(model: Any, each: int) -> int:
    """Choose how many texts are generated at once: their cache takes :data:`CACHE_BYTES` at most.

    Small batches leave a GPU idle. There it takes :data:`CACHE_SHARE` of the layers' weights if that is more, up to
    :data:`CUDA_CACHE_BYTES`: a GPU that holds the model has as a rule that much left.

    Args:
        model: the model that generates.
        each: bytes of the cache of a text.
    """
    room, most = CACHE_BYTES, CPU_BATCH
    if model.device.type == "cuda":
        room, most = max(room, min(CUDA_CACHE_BYTES, int(CACHE_SHARE * _layer_bytes(model)))), MAX_BATCH
    return max(1, min(most, room // max(each, 1)))


def generation_steps(model: Any, samples: int, seqlen: int) -> tuple[int, int]:
    """Return the texts of a batch of :func:`generate_tokens`, and its steps of one token for each text."""
    pieces, length = _texts(seqlen, TEXT_LENGTH)
    batch = min(batch_size(model, _cached_bytes(model, length)), samples * pieces)
    return batch, length * math.ceil(samples * pieces / batch)


def generation_bytes(model: Any, samples: int, seqlen: int) -> int:
    """Count the bytes that :func:`generate_tokens` needs beside the weights: the cache, and logits.

    Args:
        model: the model that generates, taken apart into layers (:class:`.LayerwiseModel`); it need not be loaded.
        samples, seqlen: as there.
    """
    pieces, length = _texts(seqlen, TEXT_LENGTH)
    each = _cached_bytes(model, length)
    batch = min(batch_size(model, each), samples * pieces)
    # Of each logit: as computed, in fp32, without forbidden tokens, its probability, and the sum of those in fp64.
    return batch * (each + 6 * 4 * int(model.config.get_text_config().vocab_size))


def _layer_bytes(model: Any) -> int:
    """Count the bytes of the decoder layers' weights, of a model that is whole or taken apart into layers."""
    layers = model.layers if isinstance(model, LayerwiseModel) else find_decoder_layers(model)[1]
    return sum(weight.numel() for layer in layers for weight in layer.parameters()) * int(model.dtype.itemsize)


def _texts(seqlen: int, text_length: int) -> tuple[int, int]:
    """Return the texts of a window, and the tokens of each."""
    pieces = math.ceil(seqlen / text_length)
    return pieces, math.ceil(seqlen / pieces)


def _cached_bytes(model: Any, length: int) -> int:
    """Count the bytes of a text's cache: keys and values, and states of recurrent layers.

    They are measured where the model can be run without weights, on the meta device, and else follow from the config.
    """
    try:
        short, long = _measure_cache(model.config, model.dtype, (MEASURED, 2 * MEASURED))
    except Exception:  # of each architecture in its own way, such as one that looks at values
        config = model.config.get_text_config()
        queries = named_size(config, "num_attention_heads") or 0
        if not queries:
            return 0
        heads = named_size(config, "num_key_value_heads") or queries
        width = named_size(config, "head_dim") or config.hidden_size // queries
        return 2 * int(config.num_hidden_layers) * int(heads) * int(width) * length * int(model.dtype.itemsize)
    return short + (long - short) * (length - MEASURED) // MEASURED


def _measure_cache(config: Any, dtype: torch.dtype, lengths: tuple[int, ...]) -> list[int]:
    """Measure the bytes that the cache of a text of each of ``lengths`` tokens holds, on the meta device."""
    from transformers.cache_utils import DynamicCache
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(config)
    # Other ways to compute experts ask which of them are chosen.
    settings = {"dtype": dtype, "trust_remote_code": False, "experts_implementation": "batched_mm"}
    with torch.device("meta"), no_init_weights():
        model = auto_class(config).from_config(config, **settings).eval()
    found = []
    for length in lengths:
        cache = DynamicCache(config=config)
        tokens = torch.zeros(1, length, dtype=torch.int64, device="meta")
        with torch.inference_mode():
            model(input_ids=tokens, use_cache=True, **{_cache_argument(model): cache})
        held = tree_leaves([list(vars(layer).values()) for layer in cache.layers])
        found.append(sum(each.nbytes for each in held if isinstance(each, Tensor) and each.ndim))
    if not found[-1]:
        raise ValueError("the model does not use its cache")
    return found


def _cache_argument(model: Any) -> str:
    """Return what the model calls the argument that is its cache."""
    # transformers renamed it on its way through version 5.
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class _Vocabulary:
    """Tokens that may begin a text, and tokens that may follow.

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
            raise FistaPrunerError("the tokenizer has no tokens but special ones: the model cannot generate text")
        self.forbidden = ~words
        if self.end is not None and self.end < size:
            self.forbidden[self.end] = False
        self.first = torch.tensor([tokenizer.bos_token_id]) if adds_bos(tokenizer) else words.nonzero().flatten()

    def begin(self, count: int, random: torch.Generator) -> Tensor:
        """Draw the (count,) first tokens of new texts."""
        return self.first[torch.randint(len(self.first), (count,), generator=random)]


def _sample(
    model: Any,
    vocabulary: _Vocabulary,
    count: int,
    length: int,
    random: torch.Generator,
    report: Callable[[int], None],
    positions: bool,
) -> Tensor:
    """Sample (count, length) tokens, one column in each step, with a key-value cache."""
    steps = _Steps(model, length, positions)
    tokens = torch.empty(count, length, dtype=torch.int64)
    tokens[:, 0] = vocabulary.begin(count, random)
    # Where BOS is EOS, as in OPT, a token that begins a text must not end it.
    began = torch.ones(count, dtype=torch.bool)
    forbidden = vocabulary.forbidden.to(model.device)
    with torch.inference_mode():
        for column in range(1, length):
            before = tokens[:, column - 1]
            with _explained(model, count):
                logits = steps.next(before)
                finite = torch.isfinite(logits).all()
                drawn = _draw(logits.masked_fill(forbidden, -torch.inf), random)
            if not bool(finite):
                raise _cannot(model, f"its logits are NaN or infinite (damaged weights, or {model.dtype} overflows)")
            tokens[:, column] = drawn
            ended = (before == (-1 if vocabulary.end is None else vocabulary.end)) & ~began
            tokens[ended, column] = vocabulary.begin(int(ended.sum()), random)
            began = ended
            report(column + 1)
    return tokens


class _Steps:
    """Run a model token by token, with a key-value cache.

    Args:
        model: the model.
        length: tokens, at most.
        positions: tell the model the position of each token.
    """

    def __init__(self, model: Any, length: int, positions: bool) -> None:
        from transformers.cache_utils import DynamicCache, DynamicLayer

        self.model, self.positions, self.done = model, positions, 0
        self.keyword = _cache_argument(model)
        self.cache = DynamicCache(config=model.config)
        for layer in self.cache.layers:
            if type(layer) is DynamicLayer:
                # By proxy: a layer that held itself would keep keys and values until the next full garbage collection.
                layer.update = partial(_update_in_place, weakref.proxy(layer), length)

    def next(self, tokens: Tensor) -> Tensor:
        """Compute the (count, vocabulary) logits in fp32 after the (count,) next tokens.

        Raises:
            FistaPrunerError: the model does not use its cache.
        """
        given = {self.keyword: self.cache}
        if self.positions:
            given["position_ids"] = torch.full((len(tokens), 1), self.done, device=self.model.device)
        out = self.model(input_ids=sent(tokens[:, None], self.model.device), use_cache=True, **given)
        self.done += 1
        if _cached_tokens(self.cache) not in (None, self.done):
            raise _cannot(self.model, "it does not use its key-value cache")
        logits: Tensor = out.logits[:, -1].float()
        return logits


def _needs_positions(model: Any, vocabulary: _Vocabulary, length: int) -> bool:
    """Find out whether the model must be told the positions of tokens that come one by one.

    Some models take each for the first of a text. Others count in their own way, from the padding token, and must not
    be told; so positions are given only where the steps then come near to what one pass over the same tokens predicts.
    Both tries round alike, and experts that are chosen otherwise in one pass are so in both.

    Args:
        model: the model.
        vocabulary: its tokens.
        length: tokens of a text.

    Raises:
        FistaPrunerError: the steps predict otherwise either way, by more than rounding explains.
    """
    random = torch.Generator().manual_seed(0)
    words = (~vocabulary.forbidden).nonzero().flatten()
    tokens = words[torch.randint(len(words), (2, min(TRIED, length)), generator=random)]
    with torch.inference_mode():
        with _explained(model, len(tokens)):
            whole = model(input_ids=sent(tokens, model.device), use_cache=False).logits.float()

        def distance(positions: bool) -> float:
            steps = _Steps(model, tokens.shape[1], positions)
            with _explained(model, len(tokens)):
                logits = torch.stack([steps.next(column) for column in tokens.T], 1)
            return float(((logits - whole).norm(dim=-1) / whole.norm(dim=-1)).median())

        plain = distance(False)
        if not plain > SAME:  # NaN is refused where text is sampled
            return False
        try:
            told = distance(True)
        except FistaPrunerError:  # it cannot be told
            told = math.inf
    if told < plain / CLEARLY:
        return True
    if plain > (DIFFERENT if model.dtype == torch.float32 else DIFFERENT_ROUNDED):
        raise _cannot(model, "step by step it predicts otherwise than in one pass")
    return False


@contextmanager
def _explained(model: Any, count: int) -> Iterator[None]:
    """Turn errors of a pass over ``count`` texts into one that says that no text can be generated."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise _cannot(model, f"{model.device} has too little memory for {count} texts at once") from error
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise _cannot(model, one_line(error)) from error


def _cached_tokens(cache: Any) -> int | None:
    """Return the tokens in a cache; None of one of recurrent layers alone, which does not count them."""
    try:
        return int(cache.get_seq_length())
    except ValueError:
        return None


def _draw(logits: Tensor, random: torch.Generator) -> Tensor:
    """Draw (count,) tokens from (count, vocabulary) logits by inverting the cumulative distribution.

    Random numbers come from the CPU, all else is done where the logits are.
    """
    if len(logits) == 1:  # a GPU adds up a single row in no fixed order
        logits = logits.cpu()
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    # Uniform in (0, 1]: a token of probability 0 adds nothing to the sum, so it is never the first to reach the height.
    height = 1 - torch.rand(len(logits), 1, generator=random, dtype=torch.float64)
    return torch.searchsorted(cumulative, sent(height, logits.device) * cumulative[:, -1:]).flatten()


def _update_in_place(layer: Any, room: int, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """Update a cache layer in place, in space for ``room`` tokens, where the original copies the cache."""
    if not layer.is_initialized:
        layer.lazy_initialization(keys, values)
        layer.space = tuple(states.new_empty(*states.shape[:-2], room, states.shape[-1]) for states in (keys, values))
        layer.filled = 0
    start, layer.filled = layer.filled, layer.filled + keys.shape[-2]
    for space, states in zip(layer.space, (keys, values), strict=True):
        space[..., start : layer.filled, :] = states
    layer.keys, layer.values = (space[..., : layer.filled, :] for space in layer.space)
    return layer.keys, layer.values


def _cannot(model: Any, reason: str) -> FistaPrunerError:
    """Make the error that a model cannot generate text."""
    return FistaPrunerError(
        f"{type(model).__name__} cannot generate text: {reason}; take text instead, such as c4, python or a file"
    )

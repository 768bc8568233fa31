"""Forward passes for evaluation, layer by layer: the model is never whole in memory.

All windows of a block go through one decoder layer before the next layer is read, so a checkpoint larger than memory can
be evaluated, each layer is read once for a block, and its weights stay warm in the cache. Only hidden states are kept,
``seqlen * width`` numbers a window. If those of all windows do not fit, the windows are cut into blocks and the
checkpoint is read once for each.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..models.layerwise import Call, LayerwiseModel, Tick
from ..runtime.memory import free_memory
from ..runtime.numerics import windows_at_once
from .scoring import Head, WindowSums, compare_tokens, score_tokens, slices


@dataclass(frozen=True)
class Passes:
    """How forward passes are carried out.

    Args:
        batch_size: windows in one forward pass; None takes as many as make about 2,048 tokens on a CPU, 16,384 on a GPU.
        memory_limit: bytes that hidden states may take; None takes half of what is free.
        tick: told of progress.
    """

    batch_size: int | None = None
    memory_limit: int | None = None
    tick: Tick = lambda what, done, total: None

    def batch(self, seqlen: int, device: torch.device) -> int:
        """Windows in one forward pass."""
        return self.batch_size or windows_at_once(seqlen, device)


def last_hidden(model: LayerwiseModel, tokens: Tensor, passes: Passes, what: str = "") -> Tensor:
    """(windows, seqlen, width) output of the last decoder layer, on the CPU.

    Args:
        model: the model.
        tokens: (windows, seqlen) token ids.
        passes: batch size and progress.
        what: what is passed, for progress.
    """
    windows, seqlen = tokens.shape
    batches = [(start, min(start + size, windows)) for size in [passes.batch(seqlen, model.device)] for start in range(0, windows, size)]
    model.check(compare=True)
    hidden = torch.empty(windows, seqlen, model.width, dtype=model.dtype)
    with torch.no_grad():
        with model.embeddings_and_head(head=False):
            calls: dict[int, list[Call]] = {}
            for start, stop in batches:
                first, arguments = model.embed(tokens[start:stop])
                hidden[start:stop] = first
                # Full windows of one batch size are always called the same way: masks and positions do not depend on ids.
                calls.setdefault(stop - start, arguments)
        for index in range(len(model)):
            with model.layer(index):
                for start, stop in batches:
                    inputs = hidden[start:stop].to(model.device)
                    hidden[start:stop] = model.run(index, inputs, calls[stop - start][index])
            passes.tick(what, index + 1, len(model))
    return hidden


def score_windows(model: LayerwiseModel, tokens: Tensor, passes: Passes, reference: LayerwiseModel | None = None) -> WindowSums:
    """Sums over every window of a model, and of a reference model on the same tokens.

    Args:
        model: the model.
        tokens: (windows, seqlen) token ids.
        passes: how to carry it out.
        reference: the dense model, or None.

    Raises:
        FistaPrunerError: a model gives NaN; it is named.
    """
    windows, seqlen = tokens.shape
    models = [model] if reference is None else [model, reference]
    each = sum(seqlen * model.width * model.dtype.itemsize for model in models)
    budget = passes.memory_limit or free_memory() // 2
    rows: list[tuple[float, ...]] = []
    for start, stop in slices(windows, each, budget):
        block = tokens[start:stop]
        states = [last_hidden(model, block, passes, f"decoder layers of {model.checkpoint.folder.name}") for model in models]
        rows += _reduce(models, states, block)
    columns = torch.tensor(rows, dtype=torch.float64).T
    for position, each_model in enumerate(models):
        if bool(columns[position].isnan().any()):
            raise FistaPrunerError(
                f"{each_model.checkpoint.folder}: the forward pass gives NaN (dtype {each_model.dtype}); try --dtype float32"
            )
    if reference is None:
        return WindowSums(columns[0], seqlen - 1)
    return WindowSums(columns[0], seqlen - 1, columns[1], columns[2], columns[3])


def _reduce(models: list[LayerwiseModel], states: list[Tensor], tokens: Tensor) -> list[tuple[float, ...]]:
    """Sums of every window of a block from the last hidden states of one or two models."""
    vocabulary = vocabulary_size(models[0])
    rows: list[tuple[float, ...]] = []
    with torch.no_grad(), models[0].embeddings_and_head(), models[-1].embeddings_and_head() if len(models) == 2 else nullcontext():
        heads = [_head(model) for model in models]
        for window in range(len(tokens)):
            targets = tokens[window, 1:].to(models[0].device)
            hidden = [state[window, :-1].to(model.device) for state, model in zip(states, models, strict=True)]
            if len(models) == 1:
                rows.append((score_tokens(hidden[0], targets, heads[0], vocabulary),))
            else:
                rows.append(compare_tokens(hidden[0], hidden[1], targets, heads[0], heads[1], vocabulary))
    return rows


def vocabulary_size(model: LayerwiseModel) -> int:
    """Width of the model's logits."""
    return int(model.config.get_text_config().vocab_size)


def _head(model: LayerwiseModel) -> Head:
    """The model's own final norm, head and logit scaling. They act on each token alone, so any tokens may be given."""

    def head(hidden: Tensor) -> Tensor:
        ids = torch.zeros(1, len(hidden), dtype=torch.int64)
        return model.logits(hidden[None], ids)[0]

    return head

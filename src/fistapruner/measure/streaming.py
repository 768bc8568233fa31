"""Run forward passes for evaluation layer by layer; the model is never whole in memory.

All windows of a block go through one decoder layer before the next layer is read. So a checkpoint larger than memory
can be evaluated, and each layer is read once for a block. Only hidden states are stored, ``seqlen * width`` numbers
for each window. If those of all windows do not fit, the windows are cut into blocks, and the checkpoint is read once
for each block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..models.layers import LayerwiseModel
from ..models.source import ModelSource
from ..passes.check import check_model
from ..passes.store import HiddenStates, scratch_factory
from ..passes.stream import forward
from ..runs.records import is_run
from ..runtime.formatting import size
from ..runtime.memory import free_memory, release_failed_memory, resident_memory
from ..runtime.numerics import BUDGETS, slices, windows_at_once
from ..runtime.progress import Tick, silent
from .logits import WindowSums, sum_over_tokens

log = logging.getLogger("fistapruner")


@dataclass(frozen=True)
class Passes:
    """Settings of forward passes.

    Args:
        batch_size: windows in one forward pass; None takes as many as make about 2,048 tokens on a CPU, 16,384 on a
            GPU.
        memory_limit: bytes of main memory that the process may use; None takes half of what is free for hidden states.
        warn: receives what a limit that is too small does not hold, as a sentence, and the limit is exceeded; None
            refuses it.
        tick: receives progress: (what, steps done, steps in all).
    """

    batch_size: int | None = None
    memory_limit: int | None = None
    warn: Callable[[str], None] | None = None
    tick: Tick = silent

    def batch(self, seqlen: int, device: torch.device) -> int:
        """Return the number of windows in one forward pass."""
        return self.batch_size or windows_at_once(seqlen, device)


class KeptStates:
    """Keep the last hidden states of a model in a file, for other evaluations of the same windows.

    So the dense model that many models are compared with runs once.

    Args:
        model: folder of the model.
        file: holds the states until :meth:`close`; its folder must exist.
    """

    def __init__(self, model: Path, file: Path) -> None:
        self._model, self._file = model, file
        self._states: HiddenStates | None = None
        self._tokens = torch.empty(0)

    def of(self, model: LayerwiseModel, tokens: Tensor, passes: Passes) -> HiddenStates | None:
        """Return the states of (windows, seqlen) tokens, computed if need be; None for another model.

        Raises:
            FistaPrunerError: as for :func:`score_windows`, or the disk is full.
        """
        if model.checkpoint.folder != self._model:
            return None
        if self._states is not None and self._states.dtype == model.dtype and torch.equal(self._tokens, tokens):
            return self._states
        self.close()
        self._tokens, self._states = tokens, HiddenStates((*tokens.shape, model.width), model.dtype, self._file)
        try:
            for start, stop, (block,) in _blocks([model], tokens, passes, [model]):
                for window in range(stop - start):
                    self._states.write(start + window, block.read(window, window + 1))
        except BaseException:
            self.close()
            raise
        return self._states

    def close(self) -> None:
        """Remove the states and their file."""
        if self._states is not None:
            self._states.close()
        self._states = None


def score_windows(
    model: LayerwiseModel,
    tokens: Tensor,
    passes: Passes,
    reference: LayerwiseModel | None = None,
    kept: KeptStates | None = None,
) -> WindowSums:
    """Compute sums over every window of a model, and of a reference model on the same tokens.

    Args:
        model: the model.
        tokens: (windows, seqlen) token ids.
        passes: settings of the passes.
        reference: the dense model, or None.
        kept: states of one of them, which then runs only if they are not there.

    Raises:
        FistaPrunerError: a model gives NaN; it is named. Or a GPU has no memory for one window at a time. Or the limit
            does not hold the windows of one forward pass.
    """
    models = [model] if reference is None else [model, reference]
    known = [None if kept is None else kept.of(each, tokens, passes) for each in models]
    unknown = [each for each, states in zip(models, known, strict=True) if states is None]
    rows: list[list[float]] = []
    for start, stop, computed in _blocks(unknown, tokens, passes, models):
        found = iter(computed)
        states = [(next(found), 0) if whole is None else (whole, start) for whole in known]
        rows += _reduce(models, states, tokens[start:stop], passes.tick)
    length = tokens.shape[1] - 1
    columns = torch.tensor(rows, dtype=torch.float64).T
    for each, nll in zip(models, columns, strict=False):
        if bool(nll.isnan().any()):
            folder, exact = each.checkpoint.folder, each.dtype is torch.float32
            how = f"'fistapruner inspect {folder}' names NaN among its weights" if exact else "try --dtype float32"
            raise FistaPrunerError(f"{folder}: the forward pass gives NaN (dtype {each.dtype}); {how}")
    return WindowSums(columns[0], length, *columns[1:])


def _blocks(
    unknown: Sequence[LayerwiseModel], tokens: Tensor, passes: Passes, models: Sequence[LayerwiseModel]
) -> Iterator[tuple[int, int, list[HiddenStates]]]:
    """Run windows through decoder layers, as many at a time as memory holds the states of.

    Args:
        unknown: the models to run.
        tokens: (windows, seqlen) token ids.
        passes: settings of the passes.
        models: all that are in memory meanwhile.

    Yields:
        First window of a block, window after its last one, and the last hidden states of every model that runs, which
        are closed before the next block: memory holds those of one.
    """
    windows, seqlen = tokens.shape
    batch_size = passes.batch(seqlen, models[0].device)
    each = sum(seqlen * model.width * model.dtype.itemsize for model in unknown)
    if passes.memory_limit is None:
        budget = free_memory() // 2
    else:
        budget = _left_for_states(models, passes, min(batch_size, windows) * each, passes.memory_limit)
    for start, stop in slices(windows, max(1, each), budget):
        states: list[HiddenStates] = []
        for model in unknown:
            found, batch_size = _last_hidden(model, tokens[start:stop], batch_size, passes.tick)
            states.append(found)
        yield start, stop, states
        for found in states:
            found.close()


def _left_for_states(models: Sequence[LayerwiseModel], passes: Passes, least: int, limit: int) -> int:
    """Count the bytes that a limit leaves for hidden states, at least those of one forward pass.

    Beside them are the process as it is and a decoder layer that is being read for a GPU; or else embeddings, final
    norms and heads of the models, a decoder layer, and a slice of logits. Tensors outside the decoder layers that two
    models share are there once.

    Args:
        models: one model, or two.
        passes: settings of the passes.
        least: bytes of the hidden states of one forward pass.
        limit: bytes of main memory that the process may use.

    Raises:
        FistaPrunerError: the limit does not hold that, and ``passes`` do not warn of it.
    """
    beside = resident_memory()
    if models[0].device.type == "cpu":
        outside: dict[tuple[str, tuple[int, ...]], int] = {}
        largest = 0
        for model in models:
            layers = [model.layer_sources(index) for index in range(len(model))]
            largest = max(largest, *(model.pass_bytes(names) for names in layers))
            for name in set(model.checkpoint.names()).difference(*layers):
                outside[name, tuple(model.checkpoint.entry(name).shape)] = model.pass_bytes([name])
        compared = max(outside.values()) if models[1:] else 0  # a tensor of the second, beside that of the first
        beside += sum(outside.values()) + max(largest + BUDGETS.head, compared)
    if beside + least > limit:
        sentence = (
            f"--memory-limit {size(limit)} is not enough: to evaluate on one batch of windows needs "
            f"{size(beside + least)}"
        )
        if passes.warn is None:
            raise FistaPrunerError(f"{sentence}: raise it, or lower --batch-size")
        passes.warn(f"{sentence}, which was taken")
    return max(least, limit - beside)


def _last_hidden(model: LayerwiseModel, tokens: Tensor, batch_size: int, tick: Tick) -> tuple[HiddenStates, int]:
    """Run (windows, seqlen) tokens through all layers; fewer at a time where a GPU's memory runs out.

    Returns:
        The output of the last layer, and the windows that went through at a time.

    Raises:
        FistaPrunerError: memory runs out with one window at a time.
    """
    what = f"decoder layers of {shown_name(model.checkpoint.folder)}"
    store = scratch_factory(None, model.dtype)
    while True:
        try:
            check_model(model)
            states, _ = forward(model, tokens, batch_size, store, progress=lambda done, total: tick(what, done, total))
            return states[0], batch_size
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise FistaPrunerError(
                    f"{model.checkpoint.folder}: the memory of {model.device} ran out, even with one window of "
                    f"{tokens.shape[1]} tokens at a time: free some of it, or choose --device cpu"
                ) from None
        release_failed_memory()
        batch_size = max(1, min(batch_size, len(tokens)) // 2)
        log.warning(
            "evaluation: the memory of %s ran out; it goes on with %d windows at a time", model.device, batch_size
        )


def _reduce(
    models: Sequence[LayerwiseModel], states: Sequence[tuple[HiddenStates, int]], tokens: Tensor, tick: Tick
) -> list[list[float]]:
    """Compute sums of every window of a block from the last hidden states of one or two models.

    Args:
        models: the models.
        states: of each model, and the number of the block's first window in them.
        tokens: (windows, seqlen) token ids of the block.
        tick: receives progress.
    """
    rows: list[list[float]] = []
    with (
        torch.no_grad(),
        models[0].embeddings_and_head(),
        models[1].embeddings_and_head(like=models[0]) if models[1:] else nullcontext(),
    ):
        heads = [model.head for model in models]
        for window in range(len(tokens)):
            hidden = [
                found.read(first + window, first + window + 1, model.device)[0, :-1]
                for (found, first), model in zip(states, models, strict=True)
            ]
            targets = tokens[window, 1:].to(models[0].device)
            rows.append(sum_over_tokens(hidden, targets, heads, models[0].vocabulary))
            tick(f"windows scored with {shown_name(models[0].checkpoint.folder)}", window + 1, len(tokens))
    return rows


def shown_name(folder: Path) -> str:
    """Return what progress calls a model: its run for RUN/model, else what its user calls it."""
    return folder.parent.name if folder.name == "model" and is_run(folder.parent) else ModelSource(folder).shown_name

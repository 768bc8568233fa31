"""Run forward passes for evaluation layer by layer; the model is never whole in memory.

All windows go through one decoder layer before the next layer is read. Only hidden states are stored,
``seqlen * width`` numbers for each window: in memory, or in a temporary file where they would take more than half of
what is free.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..models.layers import LayerwiseModel
from ..models.source import ModelSource
from ..passes.store import HiddenStates
from ..passes.stream import check_model, forward
from ..runs.records import is_run
from ..runtime.devices import free_memory, release_failed_memory, resident_memory
from ..runtime.files import temporary_folder
from ..runtime.numerics import windows_at_once
from ..runtime.show import Tick, silent
from .logits import WindowSums, sum_over_tokens

log = logging.getLogger("fistapruner")


@dataclass(frozen=True)
class Passes:
    """Settings of forward passes.

    Args:
        batch_size: windows in one forward pass; None takes as many as make about 2,048 tokens on a CPU, 16,384 on a
            GPU.
        memory_limit: bytes of main memory that the process may use; None is what is free.
        tick: receives progress: (what, steps done, steps in all).
    """

    batch_size: int | None = None
    memory_limit: int | None = None
    tick: Tick = silent


class KeptStates:
    """Keep a model's last hidden states in a file, so that it runs once for many others."""

    def __init__(self, model: Path, file: Path) -> None:
        self._model, self._file = model, file
        self._states: HiddenStates | None = None
        self._tokens = torch.empty(0)

    def of(self, model: LayerwiseModel, tokens: Tensor, passes: Passes) -> HiddenStates | None:
        """Return the states of (windows, seqlen) tokens, computed if need be; None for another model."""
        if model.checkpoint.folder != self._model:
            return None
        if self._states is None or self._states.dtype != model.dtype or not torch.equal(self._tokens, tokens):
            self.close()
            self._states = HiddenStates((*tokens.shape, model.width), model.dtype, self._file)
            _run(model, tokens, passes, self._states)
            self._tokens = tokens
        return self._states

    def close(self) -> None:
        """Remove the states and their file."""
        if self._states is not None:
            self._states.close()
        self._states, self._tokens = None, torch.empty(0)


def score_windows(
    model: LayerwiseModel,
    tokens: Tensor,
    passes: Passes,
    reference: LayerwiseModel | None = None,
    kept: KeptStates | None = None,
) -> WindowSums:
    """Compute sums over every window of (windows, seqlen) tokens of a model, and of a reference model.

    ``kept`` holds states of one of them, which then runs only if they are not there.

    Raises:
        FistaPrunerError: a model gives NaN; it is named. Or a GPU has no memory for one window at a time. Or the disk
            does not hold what memory does not.
    """
    models = [model] if reference is None else [model, reference]
    states: list[HiddenStates] = []
    with ExitStack() as stack:
        for each in models:
            found = None if kept is None else kept.of(each, tokens, passes)
            if found is None:
                limit, needed = passes.memory_limit, tokens.numel() * each.width * each.dtype.itemsize
                free = free_memory() if limit is None else limit - resident_memory()
                file = None if 2 * needed <= free else Path(stack.enter_context(temporary_folder())) / "states"
                found = HiddenStates((*tokens.shape, each.width), each.dtype, file)
                stack.callback(found.close)
                _run(each, tokens, passes, found)
            states.append(found)
        columns = torch.tensor(_reduce(models, states, tokens, passes.tick), dtype=torch.float64).T
    for each, nll in zip(models, columns, strict=False):
        if bool(nll.isnan().any()):
            folder, exact = each.checkpoint.folder, each.dtype is torch.float32
            how = f"'fistapruner inspect {folder}' names NaN among its weights" if exact else "try dtype float32"
            raise FistaPrunerError(f"{folder}: the forward pass gives NaN (dtype {each.dtype}); {how}")
    return WindowSums(columns[0], tokens.shape[1] - 1, *columns[1:])


def _run(model: LayerwiseModel, tokens: Tensor, passes: Passes, states: HiddenStates) -> None:
    """Write the last layer's output; half as many windows at a time where a GPU's memory runs out."""
    what = f"decoder layers of {shown_name(model.checkpoint.folder)}"
    batch_size = min(len(tokens), passes.batch_size or windows_at_once(tokens.shape[1], model.device))
    while True:
        try:
            check_model(model)
            progress = lambda done, total: passes.tick(what, done, total)  # noqa: E731
            forward(model, tokens, batch_size, lambda *_: states, progress=progress)
            return
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise FistaPrunerError(
                    f"{model.checkpoint.folder}: the memory of {model.device} ran out, even with one window of "
                    f"{tokens.shape[1]} tokens at a time: free some of it, or choose --device cpu"
                ) from None
        release_failed_memory()
        batch_size //= 2
        log.warning(
            "evaluation: the memory of %s ran out; it goes on with %d windows at a time", model.device, batch_size
        )


def _reduce(
    models: Sequence[LayerwiseModel], states: Sequence[HiddenStates], tokens: Tensor, tick: Tick
) -> list[list[float]]:
    """Compute sums of every window from the last hidden states of one or two models."""
    rows: list[list[float]] = []
    with (
        torch.no_grad(),
        models[0].embeddings_and_head(),
        models[1].embeddings_and_head() if models[1:] else nullcontext(),
    ):
        heads = [model.head for model in models]
        for window in range(len(tokens)):
            hidden = [found.read(window, window + 1, models[0].device)[0, :-1] for found in states]
            targets = tokens[window, 1:].to(models[0].device)
            rows.append(sum_over_tokens(hidden, targets, heads, models[0].vocabulary))
            tick(f"windows scored with {shown_name(models[0].checkpoint.folder)}", window + 1, len(tokens))
    return rows


def shown_name(folder: Path) -> str:
    """Return what progress calls a model: its run for RUN/model, else what its user calls it."""
    return folder.parent.name if folder.name == "model" and is_run(folder.parent) else ModelSource(folder).shown_name

"""Run windows through models; reduce logits to NLL, KL divergence and top-1 agreement.

A model is never whole in memory: all windows go through one decoder layer before the next layer is read. Only hidden
states are stored, ``seqlen * width`` numbers for each window: in memory, or in a temporary file where they would take
more than half of what is free. Logits of a whole window would be the largest tensor: 1 GB for 2,048 tokens and 128,000
entries. So hidden states go through the head in slices of some hundred tokens, and each slice is reduced to a few
numbers for each token, in blocks of rows that fit the processor's cache, before the next slice is computed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..models.layers import LayerwiseModel
from ..models.source import ModelSource
from ..papers.mrpo import accuracy, margins_of
from ..passes.store import HiddenStates
from ..passes.stream import check_model, forward
from ..runs.records import Divergence, Perplexity, PreferenceFigures, is_run
from ..runtime.devices import free_memory, release_failed_memory, resident_memory
from ..runtime.files import temporary_folder
from ..runtime.numerics import BUDGETS, Budgets, dtype_name, mean_and_error, slices, windows_at_once
from ..runtime.show import Tick, silent
from .data import Windows

log = logging.getLogger("fistapruner")


class KeptStates:
    """Keep a model's last hidden states in a file, so that it runs once for many others."""

    def __init__(self, model: Path, file: Path) -> None:
        self.model, self._file = model, file
        self._states: HiddenStates | None = None
        self._tokens = torch.empty(0)

    def of(self, model: LayerwiseModel, tokens: Tensor, batch_size: int | None, tick: Tick) -> HiddenStates:
        """Return the states of (windows, seqlen) tokens, computed if need be."""
        if self._states is None or self._states.dtype != model.dtype or not torch.equal(self._tokens, tokens):
            self.close()
            self._states, self._tokens = HiddenStates((*tokens.shape, model.width), model.dtype, self._file), tokens
            _run(model, tokens, batch_size, tick, self._states)
        return self._states

    def close(self) -> None:
        """Remove the states and their file."""
        if self._states is not None:
            self._states.close()
        self._states = None


def score_windows(
    model: LayerwiseModel,
    tokens: Tensor,
    reference: LayerwiseModel | None = None,
    *,
    batch_size: int | None = None,
    memory_limit: int | None = None,
    kept: KeptStates | None = None,
    tick: Tick = silent,
) -> Tensor:
    """Sum :func:`token_figures` over the predicted tokens of every window of (windows, seqlen) tokens.

    Args:
        model, reference: models with the same tokens, opened.
        batch_size: windows in one pass; None takes about 2,048 tokens on a CPU, 16,384 on a GPU.
        memory_limit: bytes of main memory that the process may use; None is what is free.
        kept: hidden states of one of the models on these windows.
        tick: receives progress.

    Returns:
        (1, windows) fp64; with a reference (4, windows).
    """
    models = [model] if reference is None else [model, reference]
    states: list[HiddenStates] = []
    with ExitStack() as stack:
        for each in models:
            if kept is not None and each.checkpoint.folder == kept.model:
                states.append(kept.of(each, tokens, batch_size, tick))
                continue
            needed = tokens.numel() * each.width * each.dtype.itemsize
            free = free_memory() if memory_limit is None else memory_limit - resident_memory()
            file = None if 2 * needed <= free else Path(stack.enter_context(temporary_folder())) / "states"
            states.append(HiddenStates((*tokens.shape, each.width), each.dtype, file))
            stack.callback(states[-1].close)
            _run(each, tokens, batch_size, tick, states[-1])
        sums = _reduce(models, states, tokens, tick)
    for each, nll in zip(models, sums, strict=False):
        if bool(nll.isnan().any()):
            folder, exact = each.checkpoint.folder, each.dtype is torch.float32
            how = f"'fistapruner inspect {folder}' names NaN among its weights" if exact else "try dtype float32"
            raise FistaPrunerError(f"{folder}: the forward pass gives NaN (dtype {each.dtype}); {how}")
    return sums


def _run(model: LayerwiseModel, tokens: Tensor, batch_size: int | None, tick: Tick, states: HiddenStates) -> None:
    """Write the last layer's output; half as many windows at a time where a GPU's memory runs out."""
    progress = partial(tick, f"decoder layers of {shown_name(model.checkpoint.folder)}")
    size = min(len(tokens), batch_size or windows_at_once(tokens.shape[1], model.device))
    while True:
        try:
            check_model(model)
            forward(model, tokens, size, lambda *_: states, progress=progress)
            return
        except torch.OutOfMemoryError:
            if size == 1:
                raise FistaPrunerError(
                    f"{model.checkpoint.folder}: the memory of {model.device} ran out, even with one window of "
                    f"{tokens.shape[1]} tokens at a time: free some of it, or choose --device cpu"
                ) from None
        release_failed_memory()
        size //= 2
        log.warning("evaluation: the memory of %s ran out; it goes on with %d windows at a time", model.device, size)


def _reduce(models: Sequence[LayerwiseModel], states: Sequence[HiddenStates], tokens: Tensor, tick: Tick) -> Tensor:
    """Compute (figures, windows) sums of every window from the last hidden states of one or two models."""
    what, device = f"windows scored with {shown_name(models[0].checkpoint.folder)}", models[0].device
    sums = []
    with ExitStack() as stack, torch.no_grad():
        for model in models:
            stack.enter_context(model.embeddings_and_head())
        heads = [model.head for model in models]
        for window, targets in enumerate(tokens[:, 1:]):
            hidden = [found.read(window, window + 1, device)[0, :-1] for found in states]
            sums.append(sum_over_tokens(hidden, targets.to(device), heads, models[0].vocabulary))
            tick(what, window + 1, len(tokens))
    return torch.stack(sums, 1)


def shown_name(folder: Path) -> str:
    """Return what progress calls a model: its run for RUN/model, else what its user calls it."""
    return folder.parent.name if folder.name == "model" and is_run(folder.parent) else ModelSource(folder).shown_name


def token_figures(targets: Tensor, logits: Tensor, reference: Tensor | None = None) -> tuple[Tensor, ...]:
    """Reduce one or two models' logits (tokens, vocabulary) of the same tokens.

    Returns:
        (tokens,) fp32 NLL of ``targets``, token ids, under the model; with a reference also NLL under that,
        KL(reference || model), and whether both have the same most likely token.
    """
    p, index = logits.float(), targets[:, None]
    shift = torch.logsumexp(p, dim=-1)
    nll = shift - p.gather(1, index).squeeze(1)
    if reference is None:
        return (nll,)
    q = reference.float()
    norm = torch.logsumexp(q, dim=-1)
    # KL = sum q (log q - log p). Where the reference gives a token probability 0 (logit -inf, a padded vocabulary), the
    # term is 0 for any model; 0 * inf would be NaN.
    weight = (q - norm[:, None]).exp_()
    gap = (q - p).masked_fill_(weight == 0, 0.0)
    kl = torch.linalg.vecdot(weight, gap) + shift - norm
    agree = (p.argmax(-1) == q.argmax(-1)).float()
    return nll, norm - q.gather(1, index).squeeze(1), kl.clamp_min_(0.0), agree


def sum_over_tokens(
    hidden: Sequence[Tensor],
    targets: Tensor,
    heads: Sequence[Callable[[Tensor], Tensor]],
    vocabulary: int,
    budgets: Budgets = BUDGETS,
) -> Tensor:
    """Sum :func:`token_figures` over (tokens,) targets, as fp64 on the CPU.

    Args:
        hidden: (tokens, width) output of each model's last decoder layer at the token before each target.
        heads: final norm and language-model head of each.
        budgets: bytes of logits at once.
    """
    sums = []
    for start, stop in slices(len(targets), 4 * vocabulary, budgets.head // len(heads)):
        logits = [head(states[start:stop]) for head, states in zip(heads, hidden, strict=True)]
        wanted = targets[start:stop]
        blocks = [
            torch.stack(token_figures(wanted[a:b], *(each[a:b] for each in logits)))
            for a, b in budgets.cache(logits[0])
        ]
        sums.append(torch.cat(blocks, dim=1).double().sum(1))
    total = torch.zeros(len(sums[0]), dtype=torch.float64)
    for values in torch.stack(sums).cpu():
        total += values
    return total


def perplexity_of(sums: Tensor, text: Windows, dtype: torch.dtype) -> Perplexity:
    """Make the record of the (windows,) NLL sums of a text, in passes of that precision.

    Tokens of a window depend on each other, so windows are the independent observations.
    """
    length = text.seqlen - 1
    means = sums.double() / length
    nll, error = mean_and_error(means)
    value = math.exp(nll) if nll < 700 else math.inf
    return Perplexity(
        data=text.data,
        split=text.split,
        seqlen=text.seqlen,
        windows=sums.numel(),
        tokens=sums.numel() * length,
        dtype=dtype_name(dtype),
        perplexity=value,
        standard_error=value * error,
        nll=nll,
        nll_standard_error=error,
        bos=text.bos,
        text_sha256=text.sha256,
        window_nlls=tuple(round(value, 6) for value in means.tolist()),
    )


def divergence_of(sums: Tensor, length: int) -> Divergence:
    """Make the divergence record of (4, windows) sums over ``length`` tokens each."""
    nll, reference_nll, kl, agree = sums
    means = (mean_and_error(values.double() / length) for values in (kl, agree, nll - reference_nll))
    return Divergence(*(number for pair in means for number in pair))


def mcnemar(lost: int, won: int) -> float:
    """Return the p-value of the two-sided exact McNemar test (1947) of ``lost`` against ``won`` items."""
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def preference_figures(models: Mapping[str, Tensor], tokens: Tensor, result: str) -> dict[str, PreferenceFigures]:
    """Measure which answers of the same preference pairs models prefer.

    Args:
        models: (pairs, 2) summed log-probabilities of the chosen and rejected answers, by the model's name.
        tokens: (pairs, 2) tokens of the answers.
        result: the model that the others are tested against.
    """
    right = {name: margins_of(values) > 0 for name, values in models.items()}
    found = {}
    for name, values in models.items():
        margins, by_token = margins_of(values), margins_of(values / tokens)
        figures = PreferenceFigures(
            accuracy=float(accuracy(margins)),
            accuracy_error=accuracy_error(margins),
            normalised=float(accuracy(by_token)),
            normalised_error=accuracy_error(by_token),
        )
        if name != result:
            lost = int((right[name] & ~right[result]).sum())
            won = int((right[result] & ~right[name]).sum())
            figures.lost, figures.won, figures.p_value = lost, won, mcnemar(lost, won)
        found[name] = figures
    return found


def accuracy_error(margins: Tensor) -> float:
    """Return the standard error of an accuracy of (pairs,) margins."""
    return mean_and_error((margins > 0).double() + (margins == 0).double() / 2)[1]

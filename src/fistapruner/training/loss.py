"""Compute the loss of windows or of preference pairs, and its gradient with respect to the masters.

With ``q`` the model's and ``p`` the dense model's next-token distribution (temperature 1),

    kl = sum_v p_v (log p_v - log q_v),    ce = -log q(next token),    mix = (kl + ce) / 2.

Each is a divergence of ``q`` from a *target* distribution ``t`` (``p``, the next token, a mix of both), so its gradient
with respect to ``log q`` is ``-t``. The windows of a step pass in batches: embeddings, decoder layers with their
effective tensors, then the final norm and the head in slices of tokens, where loss and gradient are computed together,
so that no logits outlive their slice. With checkpointing a decoder layer keeps its input only, and runs again on the
way back (torch.utils.checkpoint).

What the dense model predicts is its own final norm and head applied to its last decoder layer's output. That output is
stored on disk, ``width`` values a token, in blocks of windows: one file each, made again where it is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import FistaPrunerError
from ..models.layers import Call, LayerwiseModel
from ..models.safetensors import SafetensorsFile, write_tensors
from ..papers.mrpo import margins_of, preference_losses
from ..passes.store import scratch_factory
from ..passes.stream import forward
from ..runtime.files import disk_errors
from ..runtime.numerics import BUDGETS, ordered_attention, slices
from ..runtime.show import Tick, silent
from ..text.training import Pairs, TrainingText

LENGTHS = 32  # windows of pairs are cut to multiples of this many tokens, so that few lengths occur

BLOCK_TOKENS = 32768  # few enough to lose little in a kill, enough to pay for reading the dense model

Run = Callable[[int, Tensor, Call], Tensor]  # runs decoder layer (index, hidden states, its other arguments)


def token_losses(
    logits: Tensor, targets: Tensor, dense: Tensor | None, share: float, factor: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """Compute the loss of every token, in blocks of rows that fit a core's cache.

    Takes (tokens, vocabulary) logits of the model and of the dense model, the (tokens,) tokens that follow, and the
    ``share`` of the divergence; the rest is cross-entropy. Returns (tokens,) losses, and ``factor`` times the gradient
    of their sum with respect to ``logits``; without a factor no gradient is computed.
    """
    losses, gradient = [], None if factor is None else torch.empty_like(logits)
    for start, stop in BUDGETS.cache(logits):
        own = logits[start:stop].detach().float().log_softmax(-1)
        value, target = _target(own, targets[start:stop], None if dense is None else dense[start:stop], share)
        losses.append(value)
        if gradient is not None and factor is not None:
            # The derivative of log_softmax: softmax times the sum of the target, less the target.
            gradient[start:stop] = (own.exp_() * target.sum(-1, keepdim=True)).sub_(target).mul_(factor)
    return torch.cat(losses), gradient


def _target(own: Tensor, targets: Tensor, dense: Tensor | None, share: float) -> tuple[Tensor, Tensor]:
    """Return losses (tokens,) and target (tokens, vocabulary) of a block of rows."""
    index = targets[:, None]
    if dense is None:
        return -own.gather(1, index)[:, 0], torch.zeros_like(own).scatter_(1, index, 1.0)
    log_p = dense.float().log_softmax(-1)
    target = log_p.exp()
    # Where the dense model gives a token probability 0 (a padded vocabulary), the term is 0 for any model.
    value = torch.linalg.vecdot(target, (log_p - own).masked_fill_(target == 0, 0.0))
    if share < 1.0:
        value = share * value - (1 - share) * own.gather(1, index)[:, 0]
        target = target.mul_(share)
        target = target.scatter_(1, index, target.gather(1, index) + (1 - share))
    return value, target


class HeadLoss(torch.autograd.Function):
    """Losses of tokens behind the final norm and the head, in slices whose logits are not kept.

    ``apply(rows, model, targets, share, dense, factor)`` returns ``factor`` times the (tokens,) fp64 losses of (tokens,
    width) outputs of the last decoder layer. ``dense(start, stop)`` returns the dense model's logits, if any are used.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, model: LayerwiseModel, *args: Any) -> Tensor:
        """Compute the losses, and the gradient of each with respect to its row."""
        targets, share, dense, factor = args
        needed = ctx.needs_input_grad[0]
        losses, below = [rows.new_zeros(0, dtype=torch.float64)], torch.zeros_like(rows)
        # No more rows than the model takes in one window.
        budget = min(BUDGETS.head // 2, 4 * model.vocabulary * model.max_head_rows)
        for start, stop in slices(len(targets), 4 * model.vocabulary, budget):
            with torch.set_grad_enabled(needed):
                part = rows[start:stop].detach().requires_grad_(needed)
                logits = model.head(part, gradients=needed)
            wanted = None if dense is None else dense(start, stop)
            found, above = token_losses(logits, targets[start:stop], wanted, share, factor if needed else None)
            losses.append(found.double())
            if above is not None:
                (below[start:stop],) = torch.autograd.grad(logits, part, above)
        ctx.save_for_backward(below)
        return torch.cat(losses).mul_(factor)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> Any:
        """Multiply the gradient of each row, rounded once."""
        (below,) = ctx.saved_tensors
        return (below.float() * above.float()[:, None]).to(below.dtype), *[None] * 5


@dataclass
class Teacher:
    """The dense model's last hidden states of the windows of a text, in blocks that ``folder`` holds.

    ``tokens`` are (windows, seqlen) ids, ``windows`` their numbers in the order in which they are needed (None is all),
    ``identity`` what else decides the stored values.
    """

    dense: LayerwiseModel
    tokens: Tensor
    folder: Path
    batch_size: int
    windows: Sequence[int] | None = None
    identity: str = ""
    tick: Tick = silent

    def __post_init__(self) -> None:
        order = list(dict.fromkeys(range(len(self.tokens)) if self.windows is None else self.windows))
        size = max(1, BLOCK_TOKENS // (self.tokens.shape[1] * self.batch_size)) * self.batch_size
        self.blocks = [sorted(order[start : start + size]) for start in range(0, len(order), size)]
        self._of = {window: number for number, block in enumerate(self.blocks) for window in block}
        self._open = cache(self._block)

    def hidden(self, window: int) -> Tensor:
        """Return the (seqlen, width) output of the last decoder layer for a window."""
        return self._open(self._of[window]).read(str(window))

    def _block(self, number: int) -> SafetensorsFile:
        """Open a block that is whole and of this text and model, or pass its windows through the dense model."""
        windows, path = self.blocks[number], self.folder / f"{number:05d}.safetensors"
        made_from = f"{self.identity} {self.dense.dtype} {self.batch_size} {windows}"
        with suppress(OSError, FistaPrunerError):
            file = SafetensorsFile(path)
            if file.metadata.get("made_from") == made_from:
                return file
        what = f"predictions of the dense model, block {number + 1} of {len(self.blocks)}"
        states, count, dense = scratch_factory(None, self.dense.dtype), self.batch_size, self.dense
        (last,), _ = forward(dense, self.tokens[windows], count, states, progress=lambda *at: self.tick(what, *at))
        tensors = {str(window): last.read(at, at + 1, dense.device)[0].cpu() for at, window in enumerate(windows)}
        last.close()
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, {"made_from": made_from})
        return SafetensorsFile(path)


@dataclass
class Objective:
    """The loss of windows of a text under a resident model, whose decoder layers ``run`` runs.

    It is a ``share`` of the divergence from the dense model, which needs a ``teacher``, the rest cross-entropy. The
    bits of the result do not depend on ``checkpointing``.
    """

    model: LayerwiseModel
    run: Run
    text: TrainingText
    share: float
    teacher: Teacher | None
    batch_size: int
    checkpointing: bool = False

    def resident(self) -> AbstractContextManager[None]:
        """Keep the final norm and head of the dense model loaded for the block."""
        return nullcontext() if self.teacher is None else self.teacher.dense.embeddings_and_head()

    @torch.no_grad()
    def losses(self, windows: Sequence[int], run: Run | None = None) -> Tensor:
        """Compute the (windows,) fp64 sums of losses; ``run`` replaces the own."""
        found = torch.zeros(len(windows), dtype=torch.float64)
        for places, batch in self._batches(windows):
            found[places] = self._reduce(self._hidden(batch, run or self.run), batch)
        return found

    def backward(self, windows: Sequence[int], count: float | None = None) -> float:
        """Compute the mean loss over ``count``, or the text's counts, and add its gradient to the masters'."""
        count = count or max(1.0, float(self.text.counts[list(windows)].sum()))
        total = 0.0
        with ordered_attention(self.model.device):
            for _, batch in self._batches(windows):
                loss = self._reduce(self._hidden(batch, self.run), batch, 1 / count).sum()
                total += float(loss.detach())
                if loss.requires_grad:
                    loss.backward()
        return total

    def _length(self, windows: Sequence[int]) -> int:
        """Return the tokens of each of these windows that are passed; what is left out of pairs is padding."""
        longest = self.text.tokens.shape[1]
        if isinstance(self.text, Pairs):
            longest = min(longest, -(-int(self.text.lengths[list(windows)].max()) // LENGTHS) * LENGTHS)
        return longest

    def _batches(self, windows: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Yield places and numbers of the windows of each pass; like lengths pass together."""
        together = self.text.together
        units = [range(start, start + together) for start in range(0, len(windows), together)]
        units.sort(key=lambda unit: self._length([windows[place] for place in unit]))
        size = max(1, self.batch_size // together)
        for start in range(0, len(units), size):
            places = [place for unit in units[start : start + size] for place in unit]
            yield places, [windows[place] for place in places]

    def _hidden(self, windows: list[int], run: Run) -> Tensor:
        """Compute the (windows, tokens, width) output of the last decoder layer."""
        hidden, calls = self.model.embed(self.text.tokens[windows, : self._length(windows)])
        again = self.checkpointing and torch.is_grad_enabled()
        for index, call in enumerate(calls):
            if again:
                hidden = checkpoint(run, index, hidden, call, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = run(index, hidden, call)
        return hidden

    def _reduce(self, hidden: Tensor, windows: list[int], factor: float = 1.0) -> Tensor:
        """Return ``factor`` times the (windows,) fp64 losses of the last layer's output."""
        return self._token_sums(hidden, windows, self.share, factor)

    def _token_sums(self, hidden: Tensor, numbers: list[int], share: float, factor: float = 1.0) -> Tensor:
        """Sum a loss over the tokens of each window that carry it; as :meth:`_reduce`."""
        device, teacher, dense = self.model.device, self.teacher, None
        windows, positions = self.text.marks[numbers, 1 : hidden.shape[1]].nonzero(as_tuple=True)
        targets = self.text.tokens[numbers][windows, positions + 1].to(device)
        if teacher is not None and share > 0:
            states = [teacher.hidden(number)[positions[windows == at]] for at, number in enumerate(numbers)]
            stored, model = torch.cat(states), teacher.dense

            def dense(start: int, stop: int) -> Tensor:
                return model.head(stored[start:stop].to(device, model.dtype))

        rows = hidden[windows.to(device), positions.to(device)]
        losses = HeadLoss.apply(rows, self.model, targets, share, dense, factor)
        return torch.zeros(len(numbers), dtype=torch.float64).index_add(0, windows, losses.cpu())


@dataclass
class PairObjective(Objective):
    """The loss of preference pairs, a sum of terms; it stands at the window of the chosen answer.

    Both answers of a pair are in one pass. With ``references``, their (K, pairs) margins and weights, a term is the
    preference loss (:func:`.preference_losses`). ``likelihood`` is the factor of the mean cross-entropy of the chosen
    answer's tokens, ``anchor`` of their mean divergence from the dense model. With ``accuracy`` pairs are counted whose
    chosen answer is not the more likely one, without a gradient.
    """

    references: tuple[Tensor, Tensor] | None = None
    beta: float = 0.1
    likelihood: float = 0.0
    anchor: float = 0.0
    accuracy: bool = False

    def _reduce(self, hidden: Tensor, windows: list[int], factor: float = 1.0) -> Tensor:
        chosen = windows[::2]
        tokens = self.text.loss_tokens[chosen].clamp_min(1)
        answers = -self._token_sums(hidden, windows, 0.0).view(-1, 2)
        found = -self.likelihood * answers[:, 0] / tokens
        if self.references is not None:
            margins, weights = (each[:, [number // 2 for number in chosen]] for each in self.references)
            found = found + preference_losses(margins_of(answers), margins, weights, self.beta)
        if self.accuracy:
            found = found + (answers[:, 0] <= answers[:, 1]).double()
        if self.anchor:
            found = found + self.anchor * self._token_sums(hidden[::2], chosen, 1.0) / tokens
        return factor * torch.stack([found, torch.zeros_like(found)], 1).flatten()

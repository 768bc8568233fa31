"""Compute the training loss of windows, and its gradient with respect to the masters.

The windows of a step pass in batches: embeddings, decoder layers with their effective tensors, then the final norm and
the head in slices of tokens, where loss and gradient are computed together, so that logits are never kept. With
checkpointing a decoder layer keeps its input only, and runs again on the way back (torch.utils.checkpoint).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..models.layers import Call, LayerwiseModel
from ..papers.mrpo import Preference, margins_of
from ..runtime.numerics import BUDGETS, Budgets, ordered_attention, slices
from ..text.training import TrainingText
from .loss import TokenLoss
from .teacher import Teacher

LENGTHS = 32
"""Windows of pairs are cut to multiples of this many tokens, so that few lengths occur."""

LIKELIHOOD, DIVERGENCE = TokenLoss(0.0), TokenLoss(1.0)

Run = Callable[[int, Tensor, Call], Tensor]
"""Runs decoder layer (index, hidden states, its other arguments)."""


class Objective:
    """The loss of windows of a text under a model with some of its tensors replaced.

    Args:
        model: the pruned model, resident. Its embeddings, final norm and head are used as they are.
        run: runs a decoder layer of it.
        text: the windows, and which of their tokens carry loss.
        loss: what is computed of each token.
        teacher: the dense model's predictions; needed where the loss has a divergence.
        batch_size: windows in one pass.
        checkpointing: keep only the inputs of decoder layers for the way back; the bits of the result are the same.
        budgets: bytes of logits at once.
    """

    together = 1
    """Windows that no pass may part."""

    def __init__(
        self,
        model: LayerwiseModel,
        run: Run,
        text: TrainingText,
        loss: TokenLoss,
        teacher: Teacher | None,
        batch_size: int,
        *,
        checkpointing: bool = False,
        budgets: Budgets = BUDGETS,
    ) -> None:
        self.model, self.run, self.text, self.loss, self.teacher = model, run, text, loss, teacher
        self.batch_size, self.checkpointing, self.budgets = batch_size, checkpointing, budgets

    @contextmanager
    def resident(self, *, shared: bool = True) -> Iterator[None]:
        """Keep the final norm and head of the dense model loaded for the block.

        Args:
            shared: use the trained model's own tensors where they are the same; not where these change in place.
        """
        with ExitStack() as loaded:
            if self.teacher is not None:
                like = self.model if shared else None
                loaded.enter_context(self.teacher.dense.resident(layers=False, like=like))
            yield

    def counts(self, windows: Sequence[int]) -> Tensor:
        """Count the (windows,) numbers that each window's loss is a sum over: tokens that carry loss."""
        return self.text.counts[list(windows)]

    def loss_tokens(self, windows: Sequence[int]) -> Tensor:
        """Count the tokens with loss of windows."""
        return self.text.loss_tokens[list(windows)].sum()

    def losses(self, windows: Sequence[int], run: Run | None = None) -> Tensor:
        """Compute the (windows,) fp64 losses of windows, sums over what :meth:`counts` counts.

        Args:
            windows: their numbers.
            run: runs decoder layers in place of :attr:`run`.
        """
        found = torch.zeros(len(windows), dtype=torch.float64)
        with torch.no_grad():
            for places, batch, seqlen in self._batches(windows):
                hidden = self._hidden(batch, seqlen, run or self.run)
                found[places] = self._reduce(hidden, batch)[0]
        return found

    def backward(self, windows: Sequence[int], count: float | None = None) -> float:
        """Compute the mean loss over what :meth:`counts` counts, and add its gradient to the masters'.

        Args:
            windows: their numbers.
            count: what the sum is divided by; None is the count of these windows.
        """
        count = count or max(1.0, float(self.counts(windows).sum()))
        total = 0.0
        with ordered_attention(self.model.device):
            for _, batch, seqlen in self._batches(windows):
                hidden = self._hidden(batch, seqlen, self.run)
                losses, gradient = self._reduce(hidden.detach(), batch, 1.0 / count)
                total += float(losses.sum())
                if hidden.requires_grad:
                    hidden.backward(gradient)
        return total / count

    def seqlen(self, windows: Sequence[int]) -> int:
        """Return the tokens of each window that are passed."""
        return self.text.tokens.shape[1]

    def _batches(self, windows: Sequence[int]) -> Iterator[tuple[list[int], list[int], int]]:
        """Yield places and numbers of the windows of each pass, and their tokens; like lengths pass together."""
        units = [list(range(start, start + self.together)) for start in range(0, len(windows), self.together)]
        lengths = [self.seqlen([windows[place] for place in unit]) for unit in units]
        order = sorted(range(len(units)), key=lambda unit: lengths[unit])
        size = max(1, self.batch_size // self.together)
        for start in range(0, len(order), size):
            part = order[start : start + size]
            places = [place for unit in part for place in units[unit]]
            yield places, [windows[place] for place in places], lengths[part[-1]]

    def _hidden(self, windows: list[int], seqlen: int, run: Run) -> Tensor:
        """Compute the (windows, seqlen, width) output of the last decoder layer."""
        hidden, calls = self.model.embed(self.text.tokens[windows, :seqlen])
        again = self.checkpointing and torch.is_grad_enabled()
        for index, call in enumerate(calls):
            if again:
                hidden = checkpoint(run, index, hidden, call, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = run(index, hidden, call)
        return hidden

    def _reduce(self, hidden: Tensor, windows: list[int], factor: float | None = None) -> tuple[Tensor, Tensor | None]:
        """Pass the last layer's output through the head.

        Args:
            hidden: (windows, seqlen, width).
            windows: their numbers.
            factor: of the gradient; None computes none.

        Returns:
            (windows,) fp64 losses, and ``factor`` times the gradient of their sum with respect to ``hidden``.
        """
        return self._token_sums(hidden, windows, self.loss, factor)

    def _marked(self, windows: Sequence[int], seqlen: int) -> Tensor:
        """Return the (windows, seqlen) positions whose next token carries loss."""
        marks = self.text.marks[list(windows), :seqlen]
        return torch.cat([marks[:, 1:], torch.zeros_like(marks[:, :1])], 1)

    def _token_sums(
        self, hidden: Tensor, numbers: list[int], loss: TokenLoss, factor: float | None
    ) -> tuple[Tensor, Tensor | None]:
        """Sum a loss over the tokens of each window that carry it; as :meth:`_reduce`."""
        device, vocabulary = self.model.device, self.model.vocabulary
        windows, positions = self._marked(numbers, hidden.shape[1]).nonzero(as_tuple=True)
        targets = self.text.tokens[numbers][windows, positions + 1].to(device)
        place = windows.to(device), positions.to(device)
        rows = hidden[place]
        dense = None
        if self.teacher is not None and loss.share > 0:
            dense = torch.cat(
                [self.teacher.hidden(number)[positions[windows == at]] for at, number in enumerate(numbers)]
            )
        below = torch.zeros_like(rows)
        losses = []
        # No more rows than the model takes in one window.
        budget = min(self.budgets.head // 2, 4 * vocabulary * self.model.max_head_rows)
        for start, stop in slices(len(targets), 4 * vocabulary, budget):
            part = rows[start:stop].requires_grad_(factor is not None)
            logits = self.model.head(part, gradients=factor is not None)
            wanted = None
            if dense is not None and self.teacher is not None:
                wanted = self.teacher.dense.head(dense[start:stop].to(device, self.teacher.dense.dtype))
            found, above = loss.tokens(logits, targets[start:stop], wanted, factor, self.budgets)
            losses.append(found.double())
            if above is not None:
                (below[start:stop],) = torch.autograd.grad(logits, part, above)
        sums = torch.zeros(len(numbers), dtype=torch.float64)
        if losses:
            sums.index_add_(0, windows, torch.cat(losses).cpu())
        if factor is None:
            return sums, None
        gradient = torch.zeros_like(hidden)
        gradient[place] = below
        return sums, gradient


class AnswerObjective(Objective):
    """The negative log-probabilities of answers, summed over their tokens; a pair is in one pass."""

    together = 2

    def seqlen(self, windows: Sequence[int]) -> int:
        """See :class:`Objective`; what is left out is padding."""
        longest = int(self.text.lengths[list(windows)].max())  # type: ignore[attr-defined]
        return min(-(-longest // LENGTHS) * LENGTHS, self.text.tokens.shape[1])

    def log_probabilities(self, windows: Sequence[int]) -> Tensor:
        """Compute the (pairs, 2) summed log-probabilities of chosen and rejected answers, fp64."""
        return -self.losses(windows).view(-1, 2)


@dataclass(frozen=True)
class PairTerms:
    """What the loss of a pair is the sum of.

    Args:
        preference: loss of both answers against the references; None has none.
        likelihood: factor of the mean cross-entropy of the chosen answer's tokens.
        anchor: factor of the mean divergence from the dense model's predictions there; needs a teacher.
        accuracy: count pairs whose chosen answer is not the more likely one; it has no gradient.
    """

    preference: Preference | None = None
    likelihood: float = 0.0
    anchor: float = 0.0
    accuracy: bool = False


class PairObjective(AnswerObjective):
    """The loss of preference pairs (:class:`PairTerms`); it stands at the window of the chosen answer.

    The loss of a pair is a function of the summed log-probabilities of its two answers, so its gradient is that of each
    answer's tokens, times one number an answer.
    """

    terms: PairTerms

    def loss_tokens(self, windows: Sequence[int]) -> Tensor:
        """See :class:`Objective`; without a preference loss only the chosen answers carry loss."""
        every = slice(None) if self.terms.preference is not None else slice(None, None, 2)
        return self.text.loss_tokens[list(windows)][every].sum()

    def _reduce(self, hidden: Tensor, windows: list[int], factor: float | None = None) -> tuple[Tensor, Tensor | None]:
        losses, terms = torch.zeros(len(windows), dtype=torch.float64), self.terms
        gradient = None if factor is None else torch.zeros_like(hidden)
        tokens = self._marked(windows[::2], hidden.shape[1]).sum(1).clamp_min(1)  # of the chosen answers
        sums, below = self._token_sums(hidden, windows, LIKELIHOOD, None if factor is None else 1.0)
        answers = (-sums).view(-1, 2).requires_grad_(factor is not None)
        with torch.set_grad_enabled(factor is not None):
            found = -terms.likelihood * answers[:, 0] / tokens
            if terms.preference is not None:
                found = found + terms.preference.losses(margins_of(answers), [number // 2 for number in windows[::2]])
            if terms.accuracy:
                found = found + (answers[:, 0] <= answers[:, 1]).double()
        losses[::2] += found.detach()
        if factor is not None and gradient is not None and below is not None:
            (slopes,) = torch.autograd.grad(found.sum(), answers)
            gradient += _scaled(below, -factor * slopes.flatten())
        if terms.anchor:
            sums, below = self._token_sums(hidden[::2], windows[::2], DIVERGENCE, None if factor is None else 1.0)
            losses[::2] += terms.anchor * sums / tokens
            if factor is not None and gradient is not None and below is not None:
                gradient[::2] += _scaled(below, factor * terms.anchor / tokens)
        return losses, gradient


def _scaled(gradient: Tensor, factors: Tensor) -> Tensor:
    """Multiply the gradient of each window with a number, rounded once."""
    return (gradient.float() * factors.float().to(gradient.device)[:, None, None]).to(gradient.dtype)

"""Compute the loss of preference pairs, and its gradient, walking through the decoder layers.

The loss of a pair is a function of the summed log-probabilities of its two answers, so its gradient is that of each
answer's tokens, times one number an answer. Both answers of a pair are in one pass. Windows are cut to the longest
answer of those that pass together: what is left out is padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..activations.stream import Variants
from ..calibration.pairs import Pairs
from ..runtime.transfers import sent
from .losses import TokenLoss
from .objective import Objective
from .preference import margins_of, preference_losses

LENGTHS = 32
"""Windows are cut to multiples of this many tokens, so that few lengths occur."""

AT_ONCE = 256
"""Windows of the longest pairs whose hidden states are kept at once, if no pass has more."""

LIKELIHOOD, DIVERGENCE = TokenLoss(0.0), TokenLoss(1.0)


class AnswerObjective(Objective):
    """The negative log-probabilities of answers, summed over their tokens.

    Args:
        text: pairs, each of two windows.
    """

    text: Pairs

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        if self.batch_size % 2:
            raise ValueError(f"batch_size is {self.batch_size}: both answers of a pair are in one pass")
        self._lengths = self.text.lengths

    def seqlen(self, numbers: Sequence[int]) -> int:
        longest = int(self._lengths[list(numbers)].max())
        return min(-(-longest // LENGTHS) * LENGTHS, self.text.tokens.shape[1])

    def batch(self, seqlen: int) -> int:
        """See :class:`Objective`; ``batch_size`` counts the longest windows, of shorter ones more pass."""
        return self.batch_size * self.text.tokens.shape[1] // seqlen // 2 * 2

    def losses(self, numbers: Sequence[int], variants: Variants) -> Tensor:
        """See :class:`Objective`; pairs of one length pass together, so little padding does, and few at once."""
        self._require(numbers)  # of the whole step: the teacher's rounds follow the order of training
        by_length: dict[int, list[int]] = {}
        for place in range(0, len(numbers), 2):
            by_length.setdefault(self.seqlen(numbers[place : place + 2]), []).extend((place, place + 1))
        parts: list[tuple[list[int], Tensor]] = []
        for length, group in sorted(by_length.items()):
            most = max(1, AT_ONCE // self.batch_size) * self.batch(length)  # whole passes: same bits
            for start in range(0, len(group), most):
                places = group[start : start + most]
                parts.append((places, super().losses([numbers[place] for place in places], variants)))
        found = torch.zeros(len(parts[0][1]), len(numbers), dtype=torch.float64)
        for places, losses in parts:
            found[:, places] = losses
        return found


@dataclass(frozen=True)
class Preference:
    """What the loss of pairs compares a model with.

    Args:
        margins: (K, pairs) of the references; ``weights``: of each, their sum over K is 1.
        beta: strength of the references.
        label_smoothing: assumed share of swapped labels.
    """

    margins: Tensor
    weights: Tensor
    beta: float
    label_smoothing: float = 0.0

    def losses(self, margin: Tensor, pairs: list[int]) -> Tensor:
        """Compute the (pairs,) losses of a model with so large a margin on these pairs."""
        return preference_losses(
            margin, self.margins[:, pairs], self.weights[:, pairs], self.beta, self.label_smoothing
        )


class PairObjective(AnswerObjective):
    """The loss of preference pairs under a model with some of its tensors replaced.

    The loss of a pair is the sum of three terms: a preference loss; the mean cross-entropy of its chosen answer's
    tokens; the mean divergence of the model's from the dense model's predictions there. It stands at the window of the
    chosen answer.

    Args:
        preference: the preference loss; None has none.
        likelihood: factor of the cross-entropy.
        anchor: factor of the divergence, which needs the ``teacher``.
    """

    def __init__(
        self,
        *arguments: Any,
        preference: Preference | None,
        likelihood: float = 0.0,
        anchor: float = 0.0,
        **more: Any,
    ) -> None:
        super().__init__(*arguments, **more)
        self.preference, self.likelihood, self.anchor = preference, likelihood, anchor

    def _require(self, numbers: Sequence[int]) -> None:
        super()._require(list(numbers[::2]))

    def _reduce(
        self, hidden: Sequence[Tensor], numbers: list[int], factor: float | None = None
    ) -> tuple[Tensor, Tensor | None]:
        losses = torch.zeros(len(hidden), len(numbers), dtype=torch.float64)
        gradient = None if factor is None else torch.zeros_like(hidden[0])
        one = None if factor is None else 1.0
        tokens = self._where(numbers[::2]).sum(1).clamp_min(1)  # of the chosen answers
        if self.preference is not None or self.likelihood:
            pairs = [number // 2 for number in numbers[::2]]
            sums, below = self._token_sums(hidden, numbers, LIKELIHOOD, one)
            answers = (-sums).view(len(hidden), -1, 2).requires_grad_(one is not None)
            with torch.set_grad_enabled(one is not None):
                found = -self.likelihood * answers[..., 0] / tokens
                if self.preference is not None:
                    margins = margins_of(answers)
                    found = found + torch.stack([self.preference.losses(each, pairs) for each in margins])
            losses[:, ::2] += found.detach()
            if factor is not None and gradient is not None and below is not None:
                (slopes,) = torch.autograd.grad(found.sum(), answers)
                gradient += _scaled(below, -factor * slopes[0].flatten())
        if self.anchor:
            chosen = [each[::2] for each in hidden]
            sums, below = self._token_sums(chosen, numbers[::2], DIVERGENCE, one)
            losses[:, ::2] += self.anchor * sums / tokens
            if factor is not None and gradient is not None and below is not None:
                gradient[::2] += _scaled(below, factor * self.anchor / tokens)
        return losses, gradient


def _scaled(gradient: Tensor, factors: Tensor) -> Tensor:
    """Multiply the gradient of each window with a number, rounded once."""
    return (gradient.float() * sent(factors.float(), gradient.device)[:, None, None]).to(gradient.dtype)

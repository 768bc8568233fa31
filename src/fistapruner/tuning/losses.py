"""Compute losses of predicted tokens and their gradients: divergence from a model, cross-entropy.

With ``q`` the model's and ``p`` the dense model's next-token distribution (temperature 1),

    kl = sum_v p_v (log p_v - log q_v),    ce = -log q(next token),    mix = share * kl + (1 - share) * ce.

Each is a divergence of ``q`` from a *target* distribution ``t`` (``p``, the next token, a mix of both), so its gradient
with respect to ``log q`` is ``-t``. Logits are reduced in blocks of rows that fit a core's cache; no logit outlives its
slice.

Where only the dense model's ``k`` most likely tokens are stored, the rest of its probability is one bucket:

    kl_k = sum_{v in top k} p_v (log p_v - log q_v) + p_rest (log p_rest - log q_rest).

It is at most kl, grows with ``k`` and is kl where ``k`` is the vocabulary. The renormalised form, without the bucket,
is neither: its gradient was off by 22 % for k = 128 where this one's was off by 3 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..runtime.numerics import BUDGETS, Budgets

LEAST = -87.0
"""Smallest logarithm of the rest's probability under the model: about that of fp32's smallest normal number."""


class Reference(Protocol):
    """Stored predictions of the dense model for some tokens."""

    def divergence(self, start: int, stop: int, own: Tensor) -> tuple[Tensor, Tensor]:
        """Compare with the model's predictions of tokens ``start`` to ``stop``.

        Args:
            own: (tokens, vocabulary) fp32 log-probabilities of the model.

        Returns:
            (tokens,) divergences, and the target (tokens, vocabulary).
        """


@dataclass(frozen=True)
class DenseLogits:
    """All logits (tokens, vocabulary) of the dense model."""

    logits: Tensor

    def divergence(self, start: int, stop: int, own: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Reference`."""
        log_p = self.logits[start:stop].float().log_softmax(-1)
        p = log_p.exp()
        # Where the dense model gives a token probability 0 (a padded vocabulary), the term is 0 for any model.
        gap = log_p.sub_(own).masked_fill_(p == 0, 0.0)
        return torch.linalg.vecdot(p, gap), p


@dataclass(frozen=True)
class TopTokens:
    """The dense model's most likely tokens, and the rest of its probability as one bucket.

    Args:
        tokens: (tokens, k) ids.
        log_p: (tokens, k) log-probabilities.
        rest: (tokens,) probability of all other tokens.
    """

    tokens: Tensor
    log_p: Tensor
    rest: Tensor

    @classmethod
    def of(cls, logits: Tensor, k: int) -> TopTokens:
        """Take the ``k`` most likely tokens of (tokens, vocabulary) logits."""
        everything = logits.float().log_softmax(-1)
        log_p, tokens = everything.topk(min(k, logits.shape[-1]), -1)
        return cls(tokens, log_p, everything.scatter_(-1, tokens, -torch.inf).exp_().sum(-1))

    def divergence(self, start: int, stop: int, own: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Reference`."""
        tokens = self.tokens[start:stop].long()
        log_p, rest = self.log_p[start:stop].float(), self.rest[start:stop].float()
        p = log_p.exp()
        others = own.scatter(-1, tokens, -torch.inf)
        log_rest = others.logsumexp(-1).clamp_min(LEAST)
        gap = (log_p - own.gather(-1, tokens)).masked_fill_(p == 0, 0.0)
        value = torch.linalg.vecdot(p, gap) + torch.xlogy(rest, rest) - rest * log_rest
        target = others.sub_(log_rest[:, None]).exp_().mul_(rest[:, None])
        return value, target.scatter_(-1, tokens, p)


@dataclass(frozen=True)
class TokenLoss:
    """A loss of predicted tokens.

    Args:
        share: of the divergence; the rest is cross-entropy.
    """

    share: float

    @classmethod
    def named(cls, name: str, mix: float = 0.5) -> TokenLoss:
        """Return the loss ``kl``, ``ce``, or ``mix`` with the share ``mix`` of kl."""
        return cls({"kl": 1.0, "ce": 0.0, "mix": mix}[name])

    def tokens(
        self,
        logits: Tensor,
        targets: Tensor,
        reference: Reference | None,
        factor: float | None = None,
        budgets: Budgets = BUDGETS,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the loss of every token.

        Args:
            logits: (tokens, vocabulary) of the model.
            targets: (tokens,) the tokens that follow.
            reference: the dense model's predictions; not needed for cross-entropy alone.
            factor: of the gradient; None computes none.
            budgets: bytes of logits at once.

        Returns:
            (tokens,) losses, and ``factor`` times the gradient of their sum with respect to ``logits``.
        """
        losses: list[Tensor] = []
        gradient = None if factor is None else torch.empty_like(logits)
        for start, stop in budgets.cache(logits):
            rows = logits[start:stop].detach().float().requires_grad_(factor is not None)
            with torch.set_grad_enabled(factor is not None):
                own = rows.log_softmax(-1)
            value, target = self._target(own.detach(), targets[start:stop], reference, start)
            losses.append(value)
            if gradient is not None and factor is not None:
                (gradient[start:stop],) = torch.autograd.grad(own, rows, target.mul_(-factor))
        return torch.cat(losses), gradient

    def _target(self, own: Tensor, targets: Tensor, reference: Reference | None, start: int) -> tuple[Tensor, Tensor]:
        """Return losses (tokens,) and target (tokens, vocabulary) of a block of rows."""
        index = targets[:, None]
        if self.share == 0.0:
            return -own.gather(1, index)[:, 0], torch.zeros_like(own).scatter_(1, index, 1.0)
        if reference is None:
            raise ValueError("a divergence needs the dense model's predictions")
        value, target = reference.divergence(start, start + len(own), own)
        if self.share == 1.0:
            return value, target
        value = self.share * value - (1 - self.share) * own.gather(1, index)[:, 0]
        target = target.mul_(self.share)
        return value, target.scatter_(1, index, target.gather(1, index) + (1 - self.share))

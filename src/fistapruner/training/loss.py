"""Compute losses of predicted tokens and their gradients: divergence from a model, cross-entropy.

With ``q`` the model's and ``p`` the dense model's next-token distribution (temperature 1),

    kl = sum_v p_v (log p_v - log q_v),    ce = -log q(next token),    mix = (kl + ce) / 2.

Each is a divergence of ``q`` from a *target* distribution ``t`` (``p``, the next token, a mix of both), so its gradient
with respect to ``log q`` is ``-t``. Logits are reduced in blocks of rows that fit a core's cache; no logit outlives its
slice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.numerics import BUDGETS, Budgets


@dataclass(frozen=True)
class TokenLoss:
    """A loss of predicted tokens.

    Args:
        share: of the divergence; the rest is cross-entropy.
    """

    share: float

    @classmethod
    def named(cls, name: str) -> TokenLoss:
        """Return the loss ``kl``, ``ce``, or ``mix``, which is half of each."""
        return cls({"kl": 1.0, "ce": 0.0, "mix": 0.5}[name])

    def tokens(
        self,
        logits: Tensor,
        targets: Tensor,
        dense: Tensor | None,
        factor: float | None = None,
        budgets: Budgets = BUDGETS,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the loss of every token.

        Args:
            logits: (tokens, vocabulary) of the model.
            targets: (tokens,) the tokens that follow.
            dense: (tokens, vocabulary) logits of the dense model; not needed for cross-entropy alone.
            factor: of the gradient; None computes none.
            budgets: bytes of logits at once.

        Returns:
            (tokens,) losses, and ``factor`` times the gradient of their sum with respect to ``logits``.
        """
        losses: list[Tensor] = []
        gradient = None if factor is None else torch.empty_like(logits)
        for start, stop in budgets.cache(logits):
            own = logits[start:stop].detach().float().log_softmax(-1)
            value, target = self._target(own, targets[start:stop], None if dense is None else dense[start:stop])
            losses.append(value)
            if gradient is not None and factor is not None:
                # The derivative of log_softmax: softmax times the sum of the target, less the target.
                gradient[start:stop] = (own.exp_() * target.sum(-1, keepdim=True)).sub_(target).mul_(factor)
        return torch.cat(losses), gradient

    def _target(self, own: Tensor, targets: Tensor, dense: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return losses (tokens,) and target (tokens, vocabulary) of a block of rows."""
        index = targets[:, None]
        if self.share == 0.0:
            return -own.gather(1, index)[:, 0], torch.zeros_like(own).scatter_(1, index, 1.0)
        if dense is None:
            raise ValueError("a divergence needs the dense model's logits")
        log_p = dense.float().log_softmax(-1)
        target = log_p.exp()
        # Where the dense model gives a token probability 0 (a padded vocabulary), the term is 0 for any model.
        value = torch.linalg.vecdot(target, (log_p - own).masked_fill_(target == 0, 0.0))
        if self.share < 1.0:
            value = self.share * value - (1 - self.share) * own.gather(1, index)[:, 0]
            target = target.mul_(self.share)
            target = target.scatter_(1, index, target.gather(1, index) + (1 - self.share))
        return value, target

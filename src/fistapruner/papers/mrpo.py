"""MRPO: preference losses with several reference models (Le et al., arXiv 2405.16388).

DPO is the case of one.

A pair has a chosen answer w and a rejected answer l to one prompt. With summed log-probabilities p of the model and r
of a reference model, h = p_w - p_l and m = r_w - r_l are their margins, and

    dpo(m) = -log sigmoid(beta (h - m)),                  d dpo / dh = -beta sigmoid(-beta (h - m)).

So a reference enters as one number a pair: it changes how much a pair counts, never in which direction it pulls.
Several references with weights a_k (sum 1) enter as margins m_k:

    dpo         m of the one reference                                          DPO, arXiv 2305.18290
    multi-dpo   sum_k a_k dpo(m_k)                                              every reference its own loss
    harmonic    dpo(m), for either answer r = -logsumexp_k(log a_k - r_k)       MRPO, equation 9
    geometric   dpo(m), m = sum_k a_k m_k       the optimum of reward - beta sum_k a_k KL(model || reference k)

The harmonic mean is close to the lowest of the r_k: sequences differ by many nats, so a_k hardly matters, and a
constant that is added to one reference changes it. The geometric mean is linear in r.

Differences from MRPO's public code (thaihungle/MRPO):

1. Its closed form for two references, ``r_1 + r_2 - log(a e^r_1 + (1 - a) e^r_2)``, is ``-log(a / pi_2 + (1 - a) /
   pi_1)``: the weights are swapped. Here a_k belongs to reference k, as in the paper's formula.
2. It adds ``max(r_1, r_2)`` by hand; here it is ``logsumexp``, for any number of references.
3. Its multi-dpo takes the clipped reference; here only the harmonic mean does.
4. Its guard of 1e-6 against equal models stands in the denominator of adaptive weights, so their sum is not 1; here it
   is added to every margin.

Of arXiv 2512.10040, which weighs references by held-out pairs, the rule of :func:`held_out_weights` is all that was
known when this was written: its text could not be read.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

PreferenceLoss = Literal["dpo", "multi-dpo", "harmonic", "geometric"]

GUARD = 1e-6
"""Added to the size of every margin by :func:`pair_weights`, so that equal answers are shared evenly."""


def preference_losses(margin: Tensor, margins: Tensor, weights: Tensor, beta: float) -> Tensor:
    """Compute the (pairs,) losses ``sum_k a_k dpo(m_k)``, differentiable in the model's margin.

    Args:
        margin: (pairs,) h of the model.
        margins: (K, pairs) m of the references.
        weights: (K, pairs) a; their sum over K is 1.
        beta: strength of the references.
    """
    return (weights * -logsigmoid(beta * (margin - margins))).sum(0)


def reference_margins(kind: PreferenceLoss, references: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Turn the log-probabilities of references into what :func:`preference_losses` takes.

    Args:
        kind: how they are combined.
        references: (K, pairs, 2) summed log-probabilities of the chosen and the rejected answers, fp64.
        weights: (K, pairs) a.

    Returns:
        Margins and weights, (K, pairs) of multi-dpo, (1, pairs) of the others.
    """
    if kind == "multi-dpo":
        return margins_of(references), weights
    mixed = virtual_reference(kind, references, weights)
    return margins_of(mixed)[None], torch.ones_like(weights[:1])


def virtual_reference(kind: PreferenceLoss, references: Tensor, weights: Tensor) -> Tensor:
    """Return the (pairs, 2) log-probabilities of the one reference that several are combined to.

    multi-dpo has none; its margin is the mean of its references' margins. As :func:`reference_margins`.
    """
    if kind == "dpo":
        return references[0]
    return harmonic_mean(references, weights) if kind == "harmonic" else geometric_mean(references, weights)


def margins_of(log_probabilities: Tensor) -> Tensor:
    """Subtract the rejected from the chosen answers' (..., pairs, 2) log-probabilities."""
    return log_probabilities[..., 0] - log_probabilities[..., 1]


def harmonic_mean(references: Tensor, weights: Tensor) -> Tensor:
    """Return the (pairs, 2) log-probabilities of MRPO's virtual reference: ``1 / pi = sum_k a_k / pi_k``."""
    return -(weights.log()[..., None] - references).logsumexp(0)


def geometric_mean(references: Tensor, weights: Tensor) -> Tensor:
    """Return the (pairs, 2) weighted mean log-probabilities."""
    return (weights[..., None] * references).sum(0)


def clipped(references: Tensor, eta: float) -> Tensor:
    """Clip references to a trust region around the first of them (CTRO of MRPO).

    With b the first reference and means over all references,

        e_w = eta |mean r_w| / (|mean r_w| + |mean r_l|),  e_l = eta - e_w,  (1 + e) r_b <= r_k <= (1 - e) r_b.

    The less likely answer has the wider region. An answer of -200 nats and e = 0.05 may move by 10 nats.

    Args:
        references: (K, pairs, 2) log-probabilities, below 0.
        eta: size of the region; below 0 it is ``|eta|`` for both answers. At 0 every reference is the first one.
    """
    if eta < 0:
        share = torch.full_like(references[0], -eta)
    else:
        mean = references.mean(0).abs()
        share = eta * mean / mean.sum(-1, keepdim=True)
    middle = references[0]
    return references.clamp((1 + share) * middle, (1 - share) * middle)


def weigh(references: Tensor, rule: str, held_out: list[int]) -> Tensor:
    """Compute (K, pairs) weights by a recipe's rule.

    ``references`` are (K, pairs, 2) log-probabilities, ``held_out`` numbers of pairs that are not trained on.
    """
    if rule == "per-pair":
        return pair_weights(references)
    shares = references.new_ones(len(references))
    if rule != "fixed":
        shares = held_out_weights(references[:, held_out], "margin" if rule == "held-out-margin" else "accuracy")
    return fixed_weights(shares, references.shape[1])


def fixed_weights(shares: Tensor, pairs: int) -> Tensor:
    """Give every pair the same (K,) weights; their sum is made 1."""
    return (shares / shares.sum())[:, None].expand(-1, pairs)


def held_out_weights(references: Tensor, rule: Literal["accuracy", "margin"] = "accuracy") -> Tensor:
    """Compute (K,) weights from held-out pairs (arXiv 2512.10040).

    Args:
        references: (K, pairs, 2) log-probabilities of held-out pairs.
        rule: ``accuracy``, the share of pairs whose chosen answer is more likely, or ``margin``, the mean size of
            margins.
    """
    shares = margins_of(references).abs().mean(1) if rule == "margin" else accuracy(margins_of(references))
    if not bool(shares.sum() > 0):
        shares = torch.ones_like(shares)
    return shares / shares.sum()


def pair_weights(references: Tensor) -> Tensor:
    """Compute (K, pairs) weights in proportion to the size of every reference's margin (ARWC of MRPO).

    They come from the very pair whose label the loss uses. The sizes are those of the pair with its answers swapped,
    though.
    """
    sizes = margins_of(references).abs() + GUARD
    return sizes / sizes.sum(0)


def accuracy(margins: Tensor) -> Tensor:
    """Compute the share of (..., pairs) margins above 0; those that are 0 count one half."""
    return (margins > 0).double().mean(-1) + (margins == 0).double().mean(-1) / 2

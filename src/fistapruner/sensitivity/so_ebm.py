"""Learn a forecast from the cost of its decisions. Experimental.

This is SO-EBM (Kong et al. 2022, "End-to-End Stochastic Optimization with Energy-Based Model", arXiv 2211.13837).

From the features x of a case, a forecast gives the expected cost E(x, a) of every decision a; f(y, a) is the cost once
the outcome y is known, and a*(y) the decision that is best then. Costs are read as energies of two distributions of
decisions,

    q(a|x) ∝ exp(-E(x, a)/τ)        p(a|y) ∝ exp(-f(y, a)/τ),

and the forecast minimises the mean over cases of

    E(x, a*) + τ log Z(x) + λ τ KL(p || q),

Z being the sum of exp(-E/τ) over all decisions. Its gradient is ∇E(a*) - 𝔼_q ∇E + λ (𝔼_p ∇E - 𝔼_q ∇E). The two
expectations are weighted means over some decisions.

1. Differs from the paper in τ, which is 1 there.
2. Differs from the public program (Lingkai-Kong/SO-EBM) as the paper does: its weights for p are proportional to the
   cost itself, which prefers expensive decisions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def importance_weights(energy: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute self-normalised weights of decisions for the distribution ∝ exp(-energy/temperature).

    Args:
        energy: (..., decisions), of all decisions that there are; no gradient passes. Of drawn decisions, their
            energy plus τ times the log density with which they were drawn.
        temperature: τ.
    """
    return torch.softmax(-energy.detach() / temperature, -1)


def energy_loss(best: Tensor, energy: Tensor, q: Tensor, p: Tensor, penalty: float) -> Tensor:
    """Compute a number with the gradient of SO-EBM's loss; its own value means nothing.

    Args:
        best: (cases,) energies E(x, a*) of the best decisions in hindsight.
        energy: (cases, decisions) energies of some decisions.
        q: their weights for the distribution of E, and ``p`` for that of the cost f (:func:`importance_weights`).
        penalty: λ; the paper takes 0.01.
    """
    forecast = (q * energy).sum(-1)
    return (best - forecast + penalty * ((p * energy).sum(-1) - forecast)).mean()

"""ALPS: ADMM between least squares and the constraint, with a growing penalty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..constraints import Constraint
from ..problem import LayerProblem
from .base import SUPPORT_CHANGE, Method, Solution, Stats, Trace
from .conditioning import alive_gram, once
from .refit import refit_cg

RESTARTS = 10
"""Most times that rho falls to a fifth: to 1e-7 of the first one, where ADMM takes the least-squares weights."""


class ALPS(Method):
    """ADMM with hard thresholding, then conjugate gradients on the support.

    Algorithm 1 of Meng et al. 2024. On the Gram scaled to a unit diagonal, ``H~ = Q diag(l) Q^T``:

        A = (B~ - U + rho D) Q (l + rho)^-1 Q^T;   D = P(A + U / rho);   U = U + rho (A - D).

    Every third step rho grows by a factor of 1.3, 1.2 or 1.1 if the support changed by more than 10 %, more than 0.5 %,
    or at all. ADMM stops when the support no longer changes (after 30 steps: by less than 0.03 %). Both rules are those
    of the authors' program. If the support stops changing before it ever changed by 0.5 %, rho was too large: it falls
    to a fifth and ADMM starts again; here at most ten times, since few zeros never change that much of the support.
    """

    name: ClassVar[str] = "alps"
    trace: ClassVar[Trace | None] = SUPPORT_CHANGE
    takes_start: ClassVar[bool] = False

    rho: float = Field(0.1, gt=0.0, description="First penalty, in units of the scaled Gram's diagonal.")
    iterations: int = Field(300, ge=1, description="Largest number of ADMM steps.")
    damping: float = Field(
        0.01,
        ge=0.0,
        description="Added to the diagonal of H, as a share of its mean, in the quadratic and the linear term.",
    )
    refit: int = Field(10, ge=0, description="Conjugate gradient steps at the end.")

    def solve(self, problem: LayerProblem, sparsity: Sequence[Constraint], start: Solution | None = None) -> Solution:
        gram, scale, values, vectors = once(
            problem.gram, (self.name, self.damping), lambda: self._decomposed(problem.gram)
        )
        masks, weights, stats = [], [], []
        for operator, pattern in zip(problem.operators(), sparsity, strict=True):
            linear = operator.weight @ gram
            if operator.drift_gradient is not None:
                linear += operator.drift_gradient
            sparse, mask, record = self._admm(operator.weight * scale, linear / scale, values, vectors, pattern)
            weights.append(sparse / scale)
            masks.append(mask)
            stats.append(record)
        weight, mask = torch.cat(weights), torch.cat(masks)
        return Solution(refit_cg(problem, gram, weight, mask, self.refit), mask, tuple(stats))

    def _decomposed(self, gram: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Damp a Gram (n, n) and decompose it scaled; returns it, its scale, eigenvalues, eigenvectors."""
        gram = alive_gram(gram)
        gram.diagonal().add_(self.damping * gram.diagonal().mean())
        scale = gram.diagonal().sqrt()
        values, vectors = torch.linalg.eigh(gram / scale / scale[:, None])
        return gram, scale, values.clamp_min(0.0), vectors

    def _admm(
        self, dense: Tensor, linear: Tensor, values: Tensor, vectors: Tensor, pattern: Constraint
    ) -> tuple[Tensor, Tensor, Stats]:
        """Run ADMM for one operator in scaled coordinates; returns its projected weights, mask and records."""
        rho = self.rho
        support = first = pattern.project(dense.abs())
        kept = max(int(first.sum()), 1)
        sparse, dual = dense * first, torch.zeros_like(dense)
        moved = False
        step, restarts, path = 0, 0, []
        inverse = (vectors / (values + rho)) @ vectors.T
        for step in range(1, self.iterations + 1):
            smooth = (linear - dual + rho * sparse) @ inverse
            proposal = smooth + dual / rho
            mask = pattern.project(proposal.abs())
            sparse = proposal * mask
            dual = dual + rho * (smooth - sparse)
            if step % 3:
                continue
            change = int(torch.count_nonzero(mask != support))
            support = mask
            path.append({"step": step, "rho": rho, "support_change": change / kept})
            if change >= 0.1 * kept:
                moved, rho = True, rho * 1.3
            elif change >= 0.005 * kept:
                moved, rho = True, rho * 1.2
            elif change and moved:
                rho *= 1.1
            elif moved or restarts == RESTARTS:
                break
            else:
                rho, restarts = rho / 5, restarts + 1
                if change:
                    sparse, dual, support = dense * first, torch.zeros_like(dense), first
            if step > 30 and change < 3e-4 * kept:
                break
            inverse = (vectors / (values + rho)) @ vectors.T
        mask = pattern.project(smooth.abs())
        return smooth * mask, mask, {"iterations": step, "rho": rho, "path": path}

"""ADMM weight update: one inverse, a few steps, the mask chosen anew while the sparsity grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from ..constraints.patterns import NM, Sparsity, Unstructured
from ..problem import LayerProblem
from .base import Method, Solution, project_operators
from .conditioning import alive_gram, damped_cholesky


class ADMM(Method):
    """Fast ADMM weight update with gradual pruning (Boza 2024, algorithms 1 and 2).

    On the Gram scaled to a unit diagonal and damped, with one inverse of ``H + rho I`` for all steps:

        Z = (V + U) on the mask;   U = U + V - Z;   V = (B + rho (Z - U)) (H + rho I)^-1.

    The mask keeps the largest ``|V + U|`` of each row. It is chosen anew in the first steps, at a sparsity that grows as
    ``s (1 - (1 - t/k)^3)``, and then fixed. For n:m the kept number of each group falls from m to n in the same way.

    Args:
        rho: penalty, in units of the scaled Gram's diagonal (the paper's 1).
        iterations: steps in all (20).
        growing: steps in which the sparsity grows and the mask is chosen anew (15).
        damping: added to the scaled Gram's diagonal (0.1).
    """

    name: ClassVar[str] = "admm"
    summary: ClassVar[str] = "ADMM weight update, sparsity grows over the first steps"
    reference: ClassVar[str] = "Boza 2024, arXiv 2401.02938"

    rho: float = Field(1.0, gt=0.0)
    iterations: int = Field(20, ge=1)
    growing: int = Field(15, ge=0)
    damping: float = Field(0.1, ge=0.0)

    def solve(self, problem: LayerProblem, sparsity: Sequence[Sparsity], start: Solution | None = None) -> Solution:
        gram = alive_gram(problem.gram)
        scale = gram.diagonal().sqrt()
        gram = gram / scale / scale[:, None]
        gram.diagonal().add_(self.damping)
        factor, damping, warnings = damped_cholesky(gram, self.rho, problem.label)
        inverse = torch.cholesky_inverse(factor)
        rho = damping * float(gram.diagonal().mean())
        dense = problem.weight * scale
        linear = dense @ gram
        if problem.drift_gradient is not None:
            linear += problem.drift_gradient / scale
        smooth, dual = dense, torch.zeros_like(dense)
        growing = min(self.growing, self.iterations)
        mask = torch.ones_like(dense, dtype=torch.bool)
        for step in range(1, self.iterations + 1):
            if step <= growing or step == 1:
                share = 1.0 - (1.0 - step / growing) ** 3 if growing else 1.0
                mask = project_operators((smooth + dual).abs(), problem.rows, [_part(p, share) for p in sparsity], scope="row")
            sparse = (smooth + dual) * mask
            dual = dual + smooth - sparse
            smooth = (linear + rho * (sparse - dual)) @ inverse
        weight = (smooth + dual) * mask / scale
        return Solution(weight, mask, tuple({"damping": self.damping, "rho": rho} for _ in problem.rows), tuple(warnings))


def _part(pattern: Sparsity, share: float) -> Sparsity:
    """The pattern on its way from dense (share 0) to itself (share 1)."""
    if isinstance(pattern, Unstructured):
        return Unstructured(pattern.fraction * share)
    kept = pattern.m - round((pattern.m - pattern.n) * share)
    return Unstructured(0.0) if kept >= pattern.m else NM(kept, pattern.m)

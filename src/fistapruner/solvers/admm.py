"""ADMM weight update: one inverse, a few steps, a new mask in each step while the sparsity grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..constraints import Constraint
from ..problem import LayerProblem
from .base import Method, Solution
from .conditioning import alive_gram, damped_cholesky, inverse_from_cholesky, once


class ADMM(Method):
    """Fast ADMM weight update with gradual pruning.

    Algorithms 1 and 2 of Boza 2024, with the author's program. On the Gram scaled to a unit diagonal and damped, with
    one inverse of ``H + rho I`` for all steps:

        Z = (V + U) on the mask;   U = U + V - Z;   V = (B + rho (Z - U)) (H + rho I)^-1.

    The mask keeps the largest ``|V + U|`` of the whole operator. In the first k steps it is chosen anew, at a sparsity
    that grows as ``s (1 - (1 - t/k)^3)``; then it is fixed. For other constraints than unstructured sparsity, the
    weights that the projection keeps stay, and the smallest of all others are dropped, as many as that sparsity asks
    for.
    """

    name: ClassVar[str] = "admm"
    takes_start: ClassVar[bool] = False

    rho: float = Field(
        1.0, gt=0.0, description="Penalty, in units of the scaled Gram's diagonal before it is damped (the paper's 1)."
    )
    iterations: int = Field(20, ge=1, description="Steps in all (20).")
    growing: int = Field(
        15, ge=0, description="k, steps in which the sparsity grows (15); 0 takes the mask of the dense weights."
    )
    damping: float = Field(0.1, ge=0.0, description="Added to the scaled Gram's diagonal (0.1).")

    # Differs from the author's program (github.com/fmfi-compbio/admm-pruning, lib/admm.py):
    # (1) There the mask of the whole operator has the final sparsity from the first step on; the schedule is computed,
    #     but only the masks by row and n:m use it. Here it grows for all of them, as the paper's algorithm 2 says. On
    #     Grams of SmolLM2 the error is then 1.2 % lower at 50 % and 0.3 % higher at 70 %.
    # (2) There n:m is 2:4 whatever is asked for. Here it is any n:m.
    # (3) There the number of zeros is rounded down. Here it is exact (the operator's promised number).
    # (4) There a dead input's scale is 1e-8. Here its weights are scaled down, as for every method.

    def solve(self, problem: LayerProblem, sparsity: Sequence[Constraint], start: Solution | None = None) -> Solution:
        gram, scale, inverse, rho, warnings = once(
            problem.gram,
            (self.name, self.damping, self.rho),
            lambda: self._inverse(problem),
            lambda found: not found[4],
        )
        dense = problem.weight * scale
        linear = dense @ gram
        if problem.drift_gradient is not None:
            linear += problem.drift_gradient / scale
        smooth, dual = dense, torch.zeros_like(dense)
        growing = min(self.growing, self.iterations)
        mask = torch.ones_like(dense, dtype=torch.bool)
        for step in range(1, self.iterations + 1):
            if step <= growing or step == 1:
                grown = 1.0 - (1.0 - step / growing) ** 3 if growing else 1.0
                scores = (smooth + dual).abs().split(problem.rows)
                mask = torch.cat([pattern.relaxed(part, grown) for part, pattern in zip(scores, sparsity, strict=True)])
            sparse = (smooth + dual) * mask
            dual = dual + smooth - sparse
            smooth = (linear + rho * (sparse - dual)) @ inverse
        weight = (smooth + dual) * mask / scale
        return Solution(
            weight, mask, tuple({"damping": self.damping, "rho": rho} for _ in problem.rows), tuple(warnings)
        )

    def _inverse(self, problem: LayerProblem) -> tuple[Tensor, Tensor, Tensor, float, list[str]]:
        """Scale and damp the Gram; returns it, its scale (n,), the inverse with rho, that rho, and warnings."""
        gram = alive_gram(problem.gram)
        scale = gram.diagonal().sqrt()
        gram = gram / scale / scale[:, None]
        gram.diagonal().add_(self.damping)
        level = float(gram.diagonal().mean())
        factor, share, warnings = damped_cholesky(gram, self.rho / level, problem.label)
        return gram, scale, inverse_from_cholesky(factor), share * level, warnings

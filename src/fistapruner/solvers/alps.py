"""ALPS: ADMM between least squares and the constraint, with a growing penalty."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core import Constraint, LayerProblem, Ridge
from .base import Method, Solution, Stats
from .refit import refit_cg
from .splitting import LeastSquares, Resolvent, State, resolvents, scaled, split

RESTARTS = 10
"""Most times that rho falls to a fifth: to 1e-7 of the first one, where ADMM takes the least-squares weights."""


@dataclass(frozen=True)
class ALPS(Method):
    """ADMM with hard thresholds, then conjugate gradients (Meng et al. 2024, algorithm 1).

    The splitting on the Gram scaled to a unit diagonal. Every third step rho grows by a factor of 1.3, 1.2 or 1.1 if
    the support changed by more than 10 %, more than 0.5 %, or at all. It stops when the support no longer changes
    (after 30 steps: by less than 0.03 %). Both rules are those of the authors' program. If the support stops changing
    before it ever changed by 0.5 %, rho was too large: it falls to a fifth and the splitting starts again; here at most
    ten times, since few zeros never change that much of the support.

    Args:
        rho: first penalty, in units of the scaled Gram's diagonal.
        iterations: largest number of steps.
        damping: added to the diagonal of H, as a share of its mean, in the quadratic and the linear term.
        refit: conjugate gradient steps at the end.
    """

    name: ClassVar[str] = "alps"
    takes_start: ClassVar[bool] = False

    rho: float = 0.1
    iterations: int = 300
    damping: float = 0.01
    refit: int = 10

    def solve(self, problem: LayerProblem, constraint: Constraint, start: Solution | None = None) -> Solution:
        centre, gram, warnings = problem.regularised(Ridge(mean=self.damping))
        scale = gram.diagonal().sqrt()
        resolvent = problem.cached((self.name, self.damping), lambda: resolvents(scaled(gram, scale)))
        term = _Smooth(centre * scale, resolvent)
        first = centre * scale
        first = first * constraint.project(first.abs())
        path: list[Stats] = []
        mask = torch.empty(0)

        def project(z: Tensor, kept: Tensor) -> None:
            nonlocal mask
            mask = constraint.project(z.abs())
            torch.mul(z, mask, out=kept)

        def schedule(state: State) -> Iterator[float]:
            rho, moved, restarts, support = self.rho, False, 0, mask
            size = max(int(mask.sum()), 1)
            while state.step < self.iterations:
                yield rho
                if state.step % 3:
                    continue
                change, support = int(torch.count_nonzero(mask != support)), mask
                path.append({"step": state.step, "rho": rho, "support_change": change / size})
                if change >= 0.005 * size:
                    moved, rho = True, rho * (1.3 if change >= 0.1 * size else 1.2)
                elif change and moved:
                    rho *= 1.1
                elif moved or restarts == RESTARTS:
                    return
                else:
                    rho, restarts = rho / 5, restarts + 1
                    if change:
                        state.z.copy_(first)
                        project(state.z, state.kept)
                        support = mask
                if state.step > 30 and change < 3e-4 * size:
                    return

        state = split(term, first, schedule, project)
        mask = constraint.project(term.smooth.abs())
        weight = refit_cg(centre, gram, term.smooth * mask / scale, mask, self.refit)
        record: Stats = {"iterations": state.step, "rho": path[-1]["rho"] if path else self.rho, "path": path}
        return Solution(weight, mask, (record,), warnings)


class _Smooth(LeastSquares):
    """Least squares that keeps ``A = prox(2 D - Z)``, whose projection the authors' program returns."""

    def __init__(self, centre: Tensor, resolvent: Resolvent) -> None:
        super().__init__(centre, resolvent, fast=False)
        self.smooth = centre.clone()

    def advance(self, z: Tensor, kept: Tensor) -> None:
        torch.sub(kept, z, out=self.smooth)
        super().advance(z, kept)
        self.smooth.add_(z)

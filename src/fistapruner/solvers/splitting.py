"""Split between least squares and a constraint: the one iteration of ADMM, ALPS and proximal.

For ``min ||V - C||_H^2`` over V in a set S, Douglas-Rachford splitting (Lions & Mercier 1979) with penalty rho repeats

    D = P(Z);    A = prox(2 D - Z);    Z = Z + A - D,

with P the projection onto S and ``prox(X) = argmin_V ||V - C||_H^2 / 2 + rho ||V - X||^2 / 2``. With ``U = Z - D`` it
is ADMM: A = prox(D - U), D = P(A + U), U = U + A - D. S is not convex; a small rho lets the support change, a large one
fixes it. The methods differ in these parts:

    method     metric (scale of the inputs)   penalty rho                      projection          products
    admm       sqrt of the Gram's diagonal    constant                         grows sparser       fp32
    alps       sqrt of the Gram's diagonal    grows with the support's change  exact               fp32
    proximal   optimal brain surgeon's        geometric                        fast threshold      matrix units
    low rank   as proximal                    geometric                        fast threshold      matrix units

``split`` is the iteration. Its *term* is least squares (:class:`LeastSquares`; with a low-rank part
:class:`~fistapruner.solvers.low_rank.WithLowRank`), its *schedule* yields rho for every step and may look at the state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.linalg import Product, damped_cholesky

Resolvent = Callable[[float], Tensor]
"""rho to ``rho (H + rho I)^-1`` (n, n), a new tensor."""

Project = Callable[[Tensor, Tensor], None]
"""Write the projection of the first tensor (m, n) to the second."""


@dataclass
class State:
    """Where a splitting stands.

    Args:
        z: (m, n) Z; its projection is the sparse solution.
        kept: (m, n) D, the projection of Z.
        step: steps taken.
    """

    z: Tensor
    kept: Tensor
    step: int = 0


Schedule = Callable[[State], Iterator[float]]
"""Yield rho for every step; ends when it ends."""


def split(term: LeastSquares, start: Tensor, schedule: Schedule, project: Project) -> State:
    """Run the splitting.

    Args:
        term: the least-squares term.
        start: (m, n) first Z, in the coordinates of the term and the projection.
        schedule: rho of every step. As rho changes, the dual ``rho U`` stays.
        project: the projection P, in place of which a fast inexact one may stand.
    """
    state = State(start.clone(), torch.empty_like(start))
    project(state.z, state.kept)
    before = 0.0
    for rho in schedule(state):
        if rho != before:
            if before:
                torch.lerp(state.kept, state.z, before / rho, out=state.z)
            term.penalise(rho)
            before = rho
        term.advance(state.z, state.kept)
        state.step += 1
        project(state.z, state.kept)
    return state


class LeastSquares:
    """The term ``||V - C||_H^2 / 2``, in one product a step.

    With ``M = rho (H + rho I)^-1 - I/2`` a step is ``Z = (Z + C)/2 + (2 D - Z - C) M``. All eigenvalues of M are in
    (-1/2, 1/2], so that a product in bf16 is accurate enough.

    Args:
        centre: (m, n) C.
        resolvent: of H.
        fast: multiply on low-precision matrix units.
    """

    def __init__(self, centre: Tensor, resolvent: Resolvent, *, fast: bool) -> None:
        self.centre, self.resolvent = centre, resolvent
        self._product = Product(centre.new_empty(0, 0), fast=fast)
        self._moved = torch.empty_like(centre)

    def penalise(self, rho: float) -> None:
        """Prepare for steps with penalty rho."""
        matrix = self.resolvent(rho)
        matrix.diagonal().sub_(0.5)
        self._product.use(matrix)

    def advance(self, z: Tensor, kept: Tensor) -> None:
        """Replace Z (m, n) by ``Z + prox(2 D - Z) - D``, with D the ``kept`` values."""
        torch.add(z, self.centre, out=self._moved).sub_(kept, alpha=2.0).neg_()
        z.lerp_(self.centre, 0.5)
        self._product.add(z, self._moved)


def geometric(first: float, last: float, levels: int, steps: int) -> Schedule:
    """Make the schedule of ``levels`` penalties from ``first`` to ``last``, ``steps`` steps at each."""
    growth = (last / first) ** (1.0 / max(levels - 1, 1))
    return lambda state: (first * growth**level for level in range(levels) for _ in range(steps))


def resolvents(gram: Tensor) -> Resolvent:
    """Make the function ``rho -> rho (H + rho I)^-1`` of a Gram (n, n), the ridge included.

    It factors the matrix for each rho. One eigendecomposition for all of them takes twice as long for eleven values.
    """

    def resolvent(rho: float) -> Tensor:
        shifted = gram.clone()
        shifted.diagonal().add_(rho)
        return torch.cholesky_inverse(damped_cholesky(shifted)[0]).mul_(rho)

    return resolvent


def scaled(gram: Tensor, scale: Tensor) -> Tensor:
    """Write a Gram (n, n) in coordinates in which the weights are multiplied by ``scale`` (n,)."""
    return gram / scale / scale[:, None]


def strided_order(n: int, length: int, device: torch.device) -> Tensor:
    """Order n inputs by their place in their group, so that comparisons run over contiguous slices."""
    return torch.arange(n, device=device).view(-1, length).T.reshape(-1)


def natural_order(z: Tensor, length: int) -> Tensor:
    """Order the columns of z (m, n), which are in :func:`strided_order`, as the inputs are."""
    return z.view(len(z), length, -1).transpose(1, 2).reshape(z.shape) if length > 1 else z

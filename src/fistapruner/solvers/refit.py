"""Refit: least-squares weights on a fixed support, by conjugate gradients or exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..core import Constraint, LayerProblem, Ridge
from ..core.linalg import Product, damped_cholesky
from .base import Method, Solution, keep_better_rows


@dataclass(frozen=True)
class Refit(Method):
    """Minimise f over the weights that a mask keeps; the mask does not change.

    ``cg`` runs conjugate gradients with a Jacobi preconditioner on all rows at once, each row with its own step sizes;
    a step takes one m x n x n product. A row stops where rounding errors would decide on its steps. ``exact`` factors
    the kept block of the Gram of every row by batched Cholesky, which costs about ``n^3 / 3`` times the cube of the
    kept share for each row. Rows whose error would not fall, by more than it is rounded, keep their weights, so that
    the result is never worse.

    Args:
        solver: ``cg`` or ``exact``.
        iterations: conjugate gradient steps.
        damping: ridge towards the dense weights, as a share of the mean of the Gram's diagonal. ``exact`` raises it
            tenfold, with a warning, until every block has a Cholesky factor.
        shrinkage: additional ridge for the sampling error of the Gram, as of proximal; matters with few tokens.
    """

    name: ClassVar[str] = "refit"
    refines: ClassVar[bool] = True

    solver: Literal["cg", "exact"] = "cg"
    iterations: int = 40
    damping: float = 0.0
    shrinkage: float = 3.0

    def solve(self, problem: LayerProblem, constraint: Constraint, start: Solution | None = None) -> Solution:
        assert start is not None
        centre, gram, warnings = problem.regularised(Ridge(mean=self.damping, sampling=self.shrinkage))
        damping = self.damping
        if self.solver == "exact":
            weight, damping, raised = refit_exact(centre, gram, start.mask, problem.name)
            damping, warnings = damping + self.damping, (*warnings, *raised)
        else:
            weight = refit_cg(centre, gram, start.weight, start.mask, self.iterations)
        weight, mask = keep_better_rows(problem, weight, start.mask, start)
        improved = int((weight != start.weight).any(1).sum())
        return Solution(weight, mask, ({"damping": damping, "rows_improved": improved},), warnings)


def refit_cg(
    centre: Tensor, gram: Tensor, weight: Tensor, mask: Tensor, iterations: int, *, fast: bool = False
) -> Tensor:
    """Refit the support by Jacobi-preconditioned conjugate gradients, all rows at once.

    Args:
        centre: (m, n) least-squares weights C without a constraint.
        gram: (n, n) positive definite.
        weight: (m, n) first iterate.
        mask: (m, n) True where a weight may change; elsewhere the result is zero.
        iterations: steps, each one product; the residual is computed in fp32 once, at the start.
        fast: low-precision matrix units for the products of the steps.
    """
    inverse_diagonal = mask / gram.diagonal()
    weight = weight * mask
    buffer = torch.sub(centre, weight)
    residual = buffer @ gram
    direction = residual * inverse_diagonal
    length = torch.linalg.vecdot(residual, direction)
    eps, tiny = torch.finfo(weight.dtype).eps, torch.finfo(weight.dtype).tiny
    diagonal = gram.diagonal() * (len(gram) ** 0.5 * eps)
    going = torch.ones_like(length, dtype=torch.bool)
    multiply = Product(gram, fast=fast)
    # Everything is written in place: allocating memory of this size takes longer than computing in it.
    for step in range(iterations):
        rounding = torch.mv(torch.square(direction, out=buffer), diagonal)
        curved = multiply(direction, out=buffer)
        curvature = torch.linalg.vecdot(direction, curved)
        # A row stops where its curvature is no larger than rounding errors; a solved or empty one has none.
        going &= curvature > rounding.clamp_min(tiny)
        along = torch.where(going, length / curvature.clamp_min(tiny), torch.zeros_like(length))[:, None]
        weight.addcmul_(along, direction)
        if step == iterations - 1:
            break
        residual.addcmul_(along, curved, value=-1.0)
        scaled = torch.mul(residual, inverse_diagonal, out=buffer)
        following = torch.linalg.vecdot(residual, scaled)
        direction.mul_((following / length.clamp_min(tiny))[:, None]).add_(scaled)
        length = following
    return weight


def refit_exact(
    centre: Tensor, gram: Tensor, mask: Tensor, name: str, budget: int = 1 << 26
) -> tuple[Tensor, float, tuple[str, ...]]:
    """Solve least squares on the support by batched Cholesky of each row's kept block of the Gram.

    Args:
        centre: (m, n) least-squares weights C without a constraint.
        gram: (n, n) Gram without zeros on its diagonal.
        mask: (m, n) weights that may change.
        name: of the operator, for a warning.
        budget: largest number of values in a batch of blocks.

    Returns:
        Weights (m, n), the largest damping that was added, as a share of the mean diagonal, and a warning if any was.
    """
    dropped = centre.masked_fill(mask, 0.0)
    rhs = dropped @ gram
    kept = mask.sum(1)
    width = max(int(kept.max()), 1)
    # A row's kept positions come first; the rest of its block is a unit diagonal with a zero right-hand side.
    order = torch.sort(mask.to(torch.int8), dim=1, descending=True, stable=True).indices[:, :width]
    filled = torch.arange(width, device=mask.device) < kept[:, None]
    weight = torch.zeros_like(centre)
    worst, warnings = 0.0, list[str]()
    for rows in torch.arange(len(weight), device=mask.device).split(max(1, budget // (width * width))):
        index, real = order[rows], filled[rows]
        factor, used, raised = factor_blocks(gram[index[:, :, None], index[:, None, :]], real, gram, name)
        worst, warnings = max(worst, used), raised or warnings
        change = torch.cholesky_solve((rhs[rows].gather(1, index) * real)[:, :, None], factor)[:, :, 0]
        values = (centre[rows].gather(1, index) + change).masked_fill(~real, 0.0)
        weight[rows] = weight[rows].scatter(1, index, values)
    return weight, worst, tuple(warnings)


def factor_blocks(blocks: Tensor, kept: Tensor, gram: Tensor, name: str) -> tuple[Tensor, float, list[str]]:
    """Factor each row's kept block of the Gram, with damping where one is singular.

    Args:
        blocks: (rows, k, k) of the Gram; overwritten.
        kept: (rows, k) True where a block is kept; its other part becomes a diagonal with the mean of the Gram's.
        gram: (n, n) the whole Gram.
        name: of the operator, for a warning.

    Returns:
        Lower factors (rows, k, k), the damping as a share of the Gram's mean diagonal, and a warning if there is some.
    """
    blocks.mul_(kept[:, :, None] & kept[:, None, :])
    blocks.diagonal(dim1=1, dim2=2).add_(~kept * gram.diagonal().mean())
    return damped_cholesky(blocks, 0.0, f"{name}, kept block of a row")

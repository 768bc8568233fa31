"""Refit: least-squares weights on a fixed support, by conjugate gradients or exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..constraints import Constraint
from ..errors import FistaPrunerError
from ..problem import LayerProblem
from ..runtime.numerics import fast_products
from .base import Method, Solution
from .conditioning import MOST_DAMPING, regularised_gram


class Refit(Method):
    """Minimise f over the weights that a mask keeps; the mask does not change.

    ``cg`` runs conjugate gradients with a Jacobi preconditioner on all rows at once, each row with its own step sizes;
    a step takes one m x n x n product. A row stops where rounding errors would decide on its steps. ``exact`` factors
    the kept block of the Gram of every row by batched Cholesky, which costs about ``n^3 / 3`` times the cube of the
    kept share for each row. Rows whose error would not fall, by more than it is rounded, keep their weights, so that
    the result is never worse.
    """

    name: ClassVar[str] = "refit"
    refines: ClassVar[bool] = True

    solver: Literal["cg", "exact"] = Field("cg", description="cg (conjugate gradients) or exact (Cholesky).")
    iterations: int = Field(40, ge=1, description="Conjugate gradient steps.")
    damping: float = Field(
        0.0,
        ge=0.0,
        description="Ridge towards the dense weights, as a share of the mean of the Gram's diagonal. exact "
        "raises it tenfold, with a warning, until every block has a Cholesky factor.",
    )

    shrinkage: float = Field(
        3.0,
        ge=0.0,
        description="Additional ridge for the sampling error of the Gram, as of proximal; matters with few tokens.",
    )

    def solve(self, problem: LayerProblem, sparsity: Sequence[Constraint], start: Solution | None = None) -> Solution:
        if start is None:
            raise FistaPrunerError("refit needs the mask of a step before it, such as wanda+refit")
        gram = regularised_gram(problem.gram, problem.tokens, 0.0, self.shrinkage)
        if self.solver == "exact":
            weight, damping, warnings = refit_exact(problem, gram, start.mask, self.damping)
        else:
            gram.diagonal().add_(self.damping * gram.diagonal().mean())
            weight, damping, warnings = (
                refit_cg(problem, gram, start.weight, start.mask, self.iterations),
                self.damping,
                [],
            )
        # Large changes that cancel leave a small error with a large rounding error.
        rounding = torch.finfo(gram.dtype).eps * ((weight - problem.weight).square() @ problem.gram.diagonal())
        better = problem.row_errors(weight) + rounding < problem.row_errors(start.weight)
        weight = torch.where(better[:, None], weight, start.weight)
        stats = tuple({"damping": damping, "rows_improved": int(part.sum())} for part in better.split(problem.rows))
        return Solution(weight, start.mask, stats, tuple(warnings))

    def rows_independent(self, sparsity: Constraint) -> bool:
        return self.solver == "cg"  # exact raises the damping of a whole batch of rows


def refit_cg(
    problem: LayerProblem, gram: Tensor, weight: Tensor, mask: Tensor, iterations: int, *, fast: bool = False
) -> Tensor:
    """Refit the support by Jacobi-preconditioned conjugate gradients, all rows at once.

    Args:
        problem: the layer problem; ``gram`` is used in place of its Gram.
        gram: (n, n) positive definite.
        weight: (m, n) first iterate.
        mask: (m, n) True where a weight may change; elsewhere the result is zero.
        iterations: steps, each one product; the residual is computed in fp32 once, at the start.
        fast: low-precision matrix units for the products of the steps.
    """
    return refit_with_residual(problem, gram, weight, mask, iterations, fast=fast)[0]


def refit_with_residual(
    problem: LayerProblem, gram: Tensor, weight: Tensor, mask: Tensor, iterations: int, *, fast: bool
) -> tuple[Tensor, Tensor]:
    """Refit as :func:`refit_cg` and return the last residual ``(W - V) H + a R`` (m, n), too."""
    inverse_diagonal = mask / gram.diagonal()
    weight = weight * mask
    buffer = torch.sub(problem.weight, weight)
    residual = buffer @ gram
    if problem.drift_gradient is not None:
        residual += problem.drift_gradient
    direction = residual * inverse_diagonal
    length = torch.linalg.vecdot(residual, direction)
    eps, tiny = torch.finfo(weight.dtype).eps, torch.finfo(weight.dtype).tiny
    diagonal = gram.diagonal() * (len(gram) ** 0.5 * eps)
    going = torch.ones_like(length, dtype=torch.bool)
    # Everything is written in place: allocating memory of this size takes longer than computing in it.
    with fast_products(fast):
        for step in range(iterations):
            rounding = torch.mv(torch.square(direction, out=buffer), diagonal)
            curved = torch.mm(direction, gram, out=buffer)
            curvature = torch.linalg.vecdot(direction, curved)
            # A row stops where its curvature is no larger than rounding errors; a solved or empty one has none.
            going &= curvature > rounding.clamp_min(tiny)
            along = torch.where(going, length / curvature.clamp_min(tiny), torch.zeros_like(length))[:, None]
            weight.addcmul_(along, direction)
            residual.addcmul_(along, curved, value=-1.0)
            if step == iterations - 1:
                break
            scaled = torch.mul(residual, inverse_diagonal, out=buffer)
            following = torch.linalg.vecdot(residual, scaled)
            direction.mul_((following / length.clamp_min(tiny))[:, None]).add_(scaled)
            length = following
    return weight, residual


def refit_exact(
    problem: LayerProblem, gram: Tensor, mask: Tensor, damping: float, budget: int = 1 << 26
) -> tuple[Tensor, float, list[str]]:
    """Solve least squares on the support by batched Cholesky of each row's kept block of the Gram.

    Args:
        problem: the layer problem.
        gram: (n, n) Gram without zeros on its diagonal.
        mask: (m, n) weights that may change.
        damping: first ridge towards the dense weights, as a share of the mean diagonal.
        budget: largest number of values in a batch of blocks.

    Returns:
        Weights (m, n), the largest damping that was used, and a warning if it was raised.
    """
    dropped = torch.where(mask, torch.zeros_like(problem.weight), problem.weight)
    rhs = dropped @ gram
    if problem.drift_gradient is not None:
        rhs += problem.drift_gradient
    mean = gram.diagonal().mean()
    kept = mask.sum(1)
    width = max(int(kept.max()), 1)
    # A row's kept positions come first; the rest of its block is the identity with a zero right-hand side.
    order = torch.sort(mask.to(torch.int8), dim=1, descending=True, stable=True).indices[:, :width]
    filled = torch.arange(width, device=mask.device) < kept[:, None]
    weight = torch.zeros_like(problem.weight)
    worst = damping
    for rows in torch.arange(len(weight), device=mask.device).split(max(1, budget // (width * width))):
        index, real = order[rows], filled[rows]
        pairs = real[:, :, None] & real[:, None, :]
        blocks = torch.where(pairs, gram[index[:, :, None], index[:, None, :]], torch.zeros_like(mean))
        factor, used = factor_blocks(blocks, real, mean, damping, problem.label)
        worst = max(worst, used)
        change = torch.cholesky_solve((rhs[rows].gather(1, index) * real)[:, :, None], factor)[:, :, 0]
        values = torch.where(real, problem.weight[rows].gather(1, index) + change, torch.zeros_like(mean))
        weight[rows] = weight[rows].scatter(1, index, values)
    return weight, worst, damping_warning(damping, worst, problem.label)


def factor_blocks(blocks: Tensor, kept: Tensor, mean: Tensor, damping: float, label: str) -> tuple[Tensor, float]:
    """Factor each row's kept block of the Gram, raising the damping tenfold until that succeeds.

    Args:
        blocks: (rows, k, k) Grams, zero in all rows and columns that are not kept.
        kept: (rows, k) True where a block is kept; its other part becomes the identity.
        mean: of the diagonal of the whole Gram.
        damping: first ridge, as a share of ``mean``.
        label: names of the operators, for the error.

    Returns:
        Lower factors (rows, k, k) and the damping that was used.

    Raises:
        FistaPrunerError: no damping helps.
    """
    floor = blocks.shape[-1] * torch.finfo(blocks.dtype).eps  # as of damped_cholesky
    while True:
        ridge = torch.where(kept, damping * mean, torch.ones_like(mean))
        damped = blocks + torch.diag_embed(ridge)
        factor, info = torch.linalg.cholesky_ex(damped)
        pivots = factor.diagonal(dim1=1, dim2=2).square() / damped.diagonal(dim1=1, dim2=2)
        if bool(((info == 0) & (pivots > floor).all(1)).all()):
            return factor, damping
        damping = max(damping * 10.0, 1e-7)
        if damping > MOST_DAMPING:
            raise FistaPrunerError(f"{label}: the kept block of a row has no Cholesky factor; check its activations")


def damping_warning(damping: float, used: float, label: str) -> list[str]:
    """Return a warning that kept blocks of the Gram needed more damping; none where they did not."""
    if used == damping:
        return []
    by = f"damping raised from {damping:g} to {used:g} of its mean diagonal"
    return [f"{label}: a kept block of the Gram is singular; {by}"]

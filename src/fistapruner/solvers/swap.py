"""Swap: exchange a kept and a dropped weight of a row while that lowers the refitted row's error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..constraints import Constraint
from ..errors import FistaPrunerError
from ..problem import LayerProblem
from .base import Method, Solution
from .conditioning import alive_gram
from .refit import damping_warning, factor_blocks, refit_exact


class Swap(Method):
    """Exchange the best pair of a kept and a dropped weight at a time, with exact refits.

    Each row has the *swept* Gram of its support S (the sweep operator of regression): with ``P = H_SS^-1`` and
    ``T = H_NS P`` it contains ``-P``, ``T`` and the Schur complements ``H_NN - T H_SN``, bordered by the weights
    ``w_S`` and the correlations ``g_N`` of the dropped inputs with the row's residual. Replacing s by j changes f by
    exactly

        w_s^2 / P_ss - (g_j + T_js w_s / P_ss)^2 / (schur_j + T_js^2 / P_ss).

    All pairs of the ``candidates`` cheapest weights to drop and the ``candidates`` best to add are compared (for n:m:
    all pairs within a group). Two sweeps exchange the best pair, as long as that lowers f. The number of kept weights
    of each row or group does not change. The cost is of order ``n^3`` for each row. Rows whose error would not fall are
    left as they are.
    """

    name: ClassVar[str] = "swap"
    refines: ClassVar[bool] = True

    swaps: int = Field(32, ge=1, description="Largest number of exchanges in a row.")
    candidates: int = Field(
        32, ge=1, description="Weights on each side of which all pairs are compared (unstructured)."
    )
    damping: float = Field(
        1e-4, ge=0.0, description="Ridge towards the dense weights, as a share of the mean of the Gram's diagonal."
    )

    def supports(self, constraint: Constraint) -> bool:
        return constraint.exchanges is not None

    def solve(self, problem: LayerProblem, sparsity: Sequence[Constraint], start: Solution | None = None) -> Solution:
        if start is None:
            raise FistaPrunerError("swap needs the mask of a step before it, such as alps+swap")
        gram = alive_gram(problem.gram)
        weight, damping, warnings = refit_exact(problem, gram, start.mask, self.damping)
        n, most = problem.shape[1], damping
        # On a CPU, small batches stay in the cache and stop as soon as their rows do; a GPU needs many rows at once.
        batch = max(1, (1 << 22 if gram.device.type == "cpu" else 1 << 28) // (n * n))
        masks, counts = [], []
        operators = zip(
            problem.operators(), start.mask.split(problem.rows), weight.split(problem.rows), sparsity, strict=True
        )
        for operator, mask, values, pattern in operators:
            done = torch.zeros(len(mask), dtype=torch.long, device=mask.device)
            parts = []
            for begin in range(0, len(mask), batch):
                rows = slice(begin, begin + batch)
                part = operator.slice(begin, min(begin + batch, len(mask)), operator.names)
                swept, done[rows], used = self._exchange(part, gram, mask[rows], values[rows], pattern, damping)
                most = max(most, used)
                parts.append(swept)
            masks.append(torch.cat(parts))
            counts.append(int(done.sum()))
        mask = torch.cat(masks)
        warnings += damping_warning(damping, most, problem.label)
        moved, _, more = refit_exact(problem, alive_gram(problem.gram), mask, damping)
        better = problem.row_errors(moved) < problem.row_errors(start.weight)
        weight = torch.where(better[:, None], moved, start.weight)
        mask = torch.where(better[:, None], mask, start.mask)
        return Solution(
            weight, mask, tuple({"swaps": count} for count in counts), tuple(dict.fromkeys(warnings + more))
        )

    def _exchange(
        self, problem: LayerProblem, gram: Tensor, mask: Tensor, weight: Tensor, pattern: Constraint, damping: float
    ) -> tuple[Tensor, Tensor, float]:
        """Exchange weights of a batch of rows; returns their masks, each row's swaps, and the damping."""
        n = problem.shape[1]
        table, border, damping = _sweep_support(problem, gram, mask, weight, damping)
        mask = mask.clone()
        every = torch.arange(len(mask), device=mask.device)
        count = torch.zeros(len(mask), dtype=torch.long, device=mask.device)
        length = pattern.group_length
        for _ in range(self.swaps):
            diagonal = table.diagonal(dim1=1, dim2=2)
            magnitude = diagonal.abs().clamp_min(torch.finfo(table.dtype).tiny)
            saliency = border.square() / magnitude  # cost of dropping a kept weight, gain of adding a dropped one
            if pattern.exchanges == "group":
                drop = torch.arange(n, device=mask.device).expand(len(mask), n)
                group = torch.arange(n, device=mask.device).view(-1, length).repeat_interleave(length, 0)
                add = group.expand(len(mask), n, length)
            else:
                size = min(self.candidates, n)
                drop = torch.where(mask, saliency, torch.inf).topk(size, largest=False).indices
                add = (
                    torch.where(mask, -torch.inf, saliency).topk(size).indices[:, None, :].expand(len(mask), size, size)
                )
            cross = table[every[:, None, None], drop[:, :, None], add]
            inverse = 1.0 / magnitude.gather(1, drop)[:, :, None]
            shift = border.gather(1, drop)[:, :, None] * inverse
            gain = (border[every[:, None, None], add] + cross * shift).square()
            gain = gain / (magnitude[every[:, None, None], add] + cross.square() * inverse)
            change = border.gather(1, drop)[:, :, None] * shift - gain
            valid = mask.gather(1, drop)[:, :, None] & ~mask[every[:, None, None], add]
            change = torch.where(valid, change, torch.inf).flatten(1)
            best, place = change.min(1)
            # Gains at the level of rounding errors would exchange two weights for ever.
            moving = best < -1e-6 * problem.row_errors(weight).to(best.dtype)
            if not bool(moving.any()):
                break
            out = drop.gather(1, (place // add.shape[2])[:, None])[:, 0]
            into = add.flatten(1).gather(1, place[:, None])[:, 0]
            _sweep(table, border, out, moving, removing=True)
            _sweep(table, border, into, moving, removing=False)
            # A mask as index would make the host wait for a GPU.
            mask.scatter_(1, out[:, None], mask.gather(1, out[:, None]) & ~moving[:, None])
            mask.scatter_(1, into[:, None], mask.gather(1, into[:, None]) | moving[:, None])
            count += moving
        return mask, count, damping


def _sweep_support(
    problem: LayerProblem, gram: Tensor, mask: Tensor, weight: Tensor, damping: float
) -> tuple[Tensor, Tensor, float]:
    """Sweep the damped Gram on each row's support.

    Returns:
        The table (rows, n, n); its border (rows, n), weights or correlations; and the damping, which is raised until
        all supports have a Cholesky factor.
    """
    kept = mask.to(gram.dtype)
    pairs = kept[:, :, None] * kept[:, None, :]
    mean = gram.diagonal().mean()
    factor, damping = factor_blocks(gram * pairs, mask, mean, damping, problem.label)
    inverse = torch.cholesky_inverse(factor) * pairs
    gram = gram + torch.diag_embed((damping * mean).expand(len(gram)))
    cross = gram @ inverse  # (rows, n, n): T on dropped rows, identity on kept ones
    schur = gram - cross @ gram
    lower = cross * (1.0 - kept)[:, :, None]
    both = (1.0 - kept)[:, :, None] * (1.0 - kept)[:, None, :]
    table = schur * both + lower + lower.transpose(1, 2) - inverse
    residual = (problem.weight - weight) @ gram
    if problem.drift_gradient is not None:
        residual += problem.drift_gradient
    return table, torch.where(mask, weight, residual), damping


def _sweep(table: Tensor, border: Tensor, pivot: Tensor, moving: Tensor, *, removing: bool) -> None:
    """Sweep the table of each moving row on its pivot, in place."""
    rows = torch.arange(len(table), device=table.device)
    column = table[rows, :, pivot]
    divisor = column.gather(1, pivot[:, None])
    divisor = torch.where(moving[:, None], divisor, torch.ones_like(divisor))
    value = border.gather(1, pivot[:, None])
    active = moving[:, None].to(table.dtype)
    step = column * active / divisor
    table.baddbmm_(step[:, :, None], column[:, None, :], alpha=-1.0)
    border.addcmul_(step, value, value=-1.0)
    turned = torch.where(moving[:, None], (-column if removing else column) / divisor, column)
    turned.scatter_(
        1, pivot[:, None], torch.where(moving[:, None], -1.0 / divisor, divisor * 0 + column.gather(1, pivot[:, None]))
    )
    table[rows, :, pivot] = turned
    table[rows, pivot, :] = turned
    own = torch.where(moving[:, None], (-value if removing else value) / divisor, value)
    border.scatter_(1, pivot[:, None], own)

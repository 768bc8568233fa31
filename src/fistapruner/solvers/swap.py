"""Swap: exchange a kept and a dropped weight of a row while that lowers the refitted row's error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core import Constraint, LayerProblem, Ridge
from .base import Method, Solution, keep_better_rows
from .refit import factor_blocks, refit_exact

CANDIDATES = 32
"""Weights on each side of which all pairs are compared, where an exchange may be anywhere in a row."""


@dataclass(frozen=True)
class Swap(Method):
    """Exchange the best pair of a kept and a dropped weight at a time, with exact refits.

    Each row has the *swept* Gram of its support S (the sweep operator of regression, Goodnight 1979): with
    ``P = H_SS^-1`` and ``T = H_NS P`` it contains ``-P``, ``T`` and the Schur complements ``H_NN - T H_SN``, bordered
    by the weights ``w_S`` and the correlations ``g_N`` of the dropped inputs with the row's residual. Replacing s by j
    changes f by exactly

        w_s^2 / P_ss - (g_j + T_js w_s / P_ss)^2 / (schur_j + T_js^2 / P_ss).

    All pairs of the 32 cheapest weights to drop and the 32 best to add are compared (for n:m: all pairs within a
    group). Two sweeps exchange the best pair, as long as that lowers f. The number of kept weights of each row or group
    does not change. The cost is of order ``n^3`` for each row. Rows whose error would not fall are left as they are.

    Args:
        swaps: largest number of exchanges in a row.
        damping: ridge towards the dense weights, as a share of the mean of the Gram's diagonal.
    """

    name: ClassVar[str] = "swap"
    refines: ClassVar[bool] = True

    swaps: int = 32
    damping: float = 1e-4

    def solve(self, problem: LayerProblem, constraint: Constraint, start: Solution | None = None) -> Solution:
        assert start is not None
        centre, gram, warnings = problem.regularised(Ridge(mean=self.damping))
        weight, _, raised = refit_exact(centre, gram, start.mask, problem.name)
        mask, done, length = start.mask.clone(), 0, constraint.group_length
        # On a CPU, small batches stay in the cache and stop as soon as their rows do; a GPU needs many rows at once.
        batch = max(1, (1 << 22 if gram.device.type == "cpu" else 1 << 28) // len(gram) ** 2)
        for rows in (slice(begin, begin + batch) for begin in range(0, len(mask), batch)):
            errors = problem.slice(rows).row_errors(weight[rows])
            done += self._exchange(centre[rows], gram, mask[rows], weight[rows], errors, length, problem.name)
        weight, _, more = refit_exact(centre, gram, mask, problem.name)
        weight, mask = keep_better_rows(problem, weight, mask, start)
        return Solution(weight, mask, ({"swaps": done},), tuple(dict.fromkeys((*warnings, *raised, *more))))

    def _exchange(
        self, centre: Tensor, gram: Tensor, mask: Tensor, weight: Tensor, errors: Tensor, length: int, name: str
    ) -> int:
        """Exchange weights of a batch of rows, in groups of a ``length``, in their ``mask``; return how often."""
        n = len(gram)
        table, border = _sweep_support(centre, gram, mask, weight, name)
        every = torch.arange(len(mask), device=mask.device)
        count = torch.zeros(len(mask), dtype=torch.long, device=mask.device)
        for _ in range(self.swaps):
            magnitude = table.diagonal(dim1=1, dim2=2).abs().clamp_min(torch.finfo(table.dtype).tiny)
            saliency = border.square() / magnitude  # cost of dropping a kept weight, gain of adding a dropped one
            if length > 1:
                drop = torch.arange(n, device=mask.device).expand(len(mask), n)
                group = torch.arange(n, device=mask.device).view(-1, length).repeat_interleave(length, 0)
                add = group.expand(len(mask), n, length)
            else:
                size = min(CANDIDATES, n)
                drop = torch.where(mask, saliency, torch.inf).topk(size, largest=False).indices
                best_added = torch.where(mask, -torch.inf, saliency).topk(size).indices
                add = best_added[:, None, :].expand(len(mask), size, size)
            cross = table[every[:, None, None], drop[:, :, None], add]
            inverse = 1.0 / magnitude.gather(1, drop)[:, :, None]
            shift = border.gather(1, drop)[:, :, None] * inverse
            gain = (border[every[:, None, None], add] + cross * shift).square()
            gain = gain / (magnitude[every[:, None, None], add] + cross.square() * inverse)
            change = border.gather(1, drop)[:, :, None] * shift - gain
            valid = mask.gather(1, drop)[:, :, None] & ~mask[every[:, None, None], add]
            best, place = torch.where(valid, change, torch.inf).flatten(1).min(1)
            # Gains at the level of rounding errors would exchange two weights for ever.
            moving = best < -1e-6 * errors.to(best.dtype)
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
        return int(count.sum())


def _sweep_support(centre: Tensor, gram: Tensor, mask: Tensor, weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Sweep the Gram on each row's support: the table (rows, n, n) and its border (rows, n)."""
    kept = mask.to(gram.dtype)
    pairs = kept[:, :, None] * kept[:, None, :]
    factor, damping, _ = factor_blocks(gram.repeat(len(mask), 1, 1), mask, gram, name)
    inverse = torch.cholesky_inverse(factor) * pairs
    gram = gram + torch.diag_embed((damping * gram.diagonal().mean()).expand(len(gram)))
    cross = gram @ inverse  # (rows, n, n): T on dropped rows, identity on kept ones
    schur = gram - cross @ gram
    lower = cross * (1.0 - kept)[:, :, None]
    both = (1.0 - kept)[:, :, None] * (1.0 - kept)[:, None, :]
    table = schur * both + lower + lower.transpose(1, 2) - inverse
    return table, torch.where(mask, weight, (centre - weight) @ gram)


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

"""Remove input channels one by one, always the one whose removal costs least (OBS for columns).

Without constraint the least-squares weights are ``C = W + G H^-1``. Removing channel j, and letting the others make
up for it, costs ``||C_j||^2 / [H^-1]_jj``, with C_j column j; then C and H^-1 are those of the other channels. The
costs add up to the exact error of every number of removed channels. ZipLM (Kurtic et al. 2023, NeurIPS) and OSSCAR
(Meng et al. 2024, ICML) remove columns in this way.

H^-1 is computed once. Its changes are kept as columns of a thin matrix C, so a step costs a product with C and one
rank-one change of V instead of a change of an n x n matrix.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from ..core import LayerProblem
from ..core.linalg import alive_gram, damped_cholesky, dead_inputs

FEW = 12
"""Blocks of which all subsets are tried, where one number is to be removed."""


@dataclass(frozen=True)
class Elimination:
    """Channels in the order in which they were removed.

    Args:
        order: (count,) int64 channels.
        costs: (count,) fp64 what each of them added to the error of the least-squares weights.
        warnings: sentences.
    """

    order: Tensor
    costs: Tensor
    warnings: tuple[str, ...] = ()


def eliminate(problem: LayerProblem, count: int, block: int = 1, *, every_subset: bool = False) -> Elimination:
    """Choose ``count`` input channels, or blocks of them, to remove, greedily.

    Ties go to the first channel. Channels that are zero on every token go first, at no cost.

    Args:
        problem: the layer problem of the operator that reads the channels.
        count: channels to remove, less than all.
        block: consecutive inputs of a channel; more than one are removed together, as those of an attention head.
        every_subset: of at most :data:`FEW` blocks choose those that cost least together instead, by trying all.
    """
    gram = alive_gram(problem.gram.double())
    factor, _, warnings = damped_cholesky(gram, 0.0, problem.name)
    weight = problem.weight.double()
    if problem.drift is not None:
        weight = weight + torch.cholesky_solve(problem.drift.double().T, factor).T
    inverse = torch.cholesky_inverse(factor)
    weight = torch.where(dead_inputs(problem.gram), 0.0, weight)
    if block > 1:
        return _eliminate_blocks(inverse, weight, count, block, tuple(warnings), every_subset=every_subset)
    columns = weight.T.contiguous()
    diagonal = inverse.diagonal().clone()
    steps = torch.zeros(len(gram), count, dtype=gram.dtype, device=gram.device)
    alive = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    order: list[int] = []
    costs: list[Tensor] = []
    for done in range(count):
        # Where rounding has left nothing of a pivot, another channel has taken over: what is left of it costs nothing.
        price = torch.linalg.vector_norm(columns, dim=1).square() / diagonal.clamp_min(torch.finfo(diagonal.dtype).tiny)
        channel = int(torch.where(alive, price, torch.inf).argmin())
        column = inverse[:, channel] - steps[:, :done] @ steps[channel, :done]
        pivot = column[channel]
        removed = columns[channel].clone()
        costs.append(removed.square().sum() / pivot)
        order.append(channel)
        alive[channel] = False
        steps[:, done] = column / pivot.sqrt()
        diagonal -= steps[:, done].square()
        columns.addr_(column / pivot, removed, alpha=-1.0)
        columns[channel] = 0.0
    return Elimination(torch.tensor(order, dtype=torch.int64), torch.stack(costs), tuple(warnings))


def _eliminate_blocks(
    inverse: Tensor, weight: Tensor, count: int, block: int, warnings: tuple[str, ...], *, every_subset: bool
) -> Elimination:
    """Remove blocks P of inputs, each at the cost ``tr(V_P ([H^-1]_PP)^-1 V_P^T)``.

    Args:
        inverse: (n, n) fp64 inverse of the Gram; it is changed.
        weight: (m, n) fp64 least-squares weights; they are changed.
        count: blocks to remove; ``block``: inputs of each.
        warnings: sentences to pass on.
        every_subset: as for :func:`eliminate`.
    """
    places = torch.arange(weight.shape[1], device=weight.device).view(-1, block)
    alive = list(range(len(places)))
    if every_subset and len(alive) <= FEW:
        products = weight.T @ weight

        def price(numbers: Iterable[int]) -> float:
            inside = places[list(numbers)].flatten()
            return float(torch.linalg.solve(inverse[inside][:, inside], products[inside][:, inside]).trace())

        alive = list(min(combinations(alive, count), key=price))
    order: list[int] = []
    costs: list[Tensor] = []
    for _ in range(count):
        prices = []
        for number in alive:
            inside, removed = inverse[places[number]][:, places[number]], weight[:, places[number]]
            prices.append((torch.linalg.solve(inside, removed.T) * removed.T).sum())
        best = min(range(len(alive)), key=lambda place: (float(prices[place]), place))
        chosen = places[alive[best]]
        solved = torch.linalg.solve(inverse[chosen][:, chosen], inverse[chosen])
        weight -= weight[:, chosen] @ solved
        inverse -= inverse[:, chosen] @ solved
        weight[:, chosen] = 0.0
        costs.append(prices[best].clamp_min(0))
        order.append(alive.pop(best))
    return Elimination(torch.tensor(order, dtype=torch.int64), torch.stack(costs), warnings)

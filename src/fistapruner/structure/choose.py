"""Choose the input channels of an operator that stay.

Scores look at each channel alone. OBS removes them one by one, always the one whose removal costs least: without
constraint the least-squares weights are ``C = W + G H^-1``, and removing channel j, while the others make up for it,
costs ``||C_j||^2 / [H^-1]_jj``, with C_j column j; then C and H^-1 are those of the other channels. ZipLM (Kurtic et
al. 2023, NeurIPS) and OSSCAR (Meng et al. 2024, ICML) remove columns in this way.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from ..core import LayerProblem
from ..core.linalg import alive_gram, damped_cholesky, dead_inputs

FEW = 12
"""Blocks of which all subsets are tried."""


def best_channels(scores: Tensor, count: int) -> Tensor:
    """Return the ``count`` channels with the largest scores, ascending; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def channel_scores(method: Literal["energy", "flap", "magnitude"], problem: LayerProblem, mean: Tensor) -> Tensor:
    """Compute the importance of each input channel: the sum over the outputs of what it adds to them.

    ``magnitude`` is the squared norm of the channel's weights. ``energy`` is times the mean square of the channel: the
    exact energy of what it adds to the outputs. ``flap`` is times the channel's variance instead (FLAP's WIFV, An et
    al. 2024, AAAI; computed exactly, while its program forgets the first batch).

    ``mean``: (n,) mean of the inputs over tokens. Returns (n,) fp64.
    """
    norms = problem.weight.double().square().sum(0)
    if method == "magnitude":
        return norms
    squares = problem.gram.diagonal().double()
    return norms * (squares - mean.double().square() if method == "flap" else squares).clamp_min(0)


def eliminate(problem: LayerProblem, count: int, block: int = 1) -> tuple[list[int], list[str]]:
    """Choose ``count`` input channels, or blocks of them, to remove, greedily.

    H^-1 is computed once. Its changes are kept as columns of a thin matrix, so a step costs a product with that and a
    rank-one change of V. Ties go to the first channel. Channels that are zero on every token go first, at no cost.

    Args:
        problem: of the operator that reads the channels; ``count``: channels to remove, less than all.
        block: consecutive inputs of a channel; more than one are removed together, as those of an attention head. Of
            at most :data:`FEW` blocks those go that cost least together, by trying all subsets.

    Returns:
        The channels in the order in which they go, and warnings.
    """
    gram = alive_gram(problem.gram.double())
    factor, _, warnings = damped_cholesky(gram, 0.0, problem.name)
    weight = problem.weight.double()
    if problem.drift is not None:
        weight = weight + torch.cholesky_solve(problem.drift.double().T, factor).T
    inverse = torch.cholesky_inverse(factor)
    weight = torch.where(dead_inputs(problem.gram), 0.0, weight)
    if block > 1:
        return _eliminate_blocks(inverse, weight, count, block), warnings
    columns = weight.T.contiguous()
    diagonal = inverse.diagonal().clone()
    steps = torch.zeros(len(gram), count, dtype=gram.dtype, device=gram.device)
    alive = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    order: list[int] = []
    for done in range(count):
        # Where rounding has left nothing of a pivot, another channel has taken over: what is left of it costs nothing.
        price = torch.linalg.vector_norm(columns, dim=1).square() / diagonal.clamp_min(torch.finfo(diagonal.dtype).tiny)
        channel = int(torch.where(alive, price, torch.inf).argmin())
        column = inverse[:, channel] - steps[:, :done] @ steps[channel, :done]
        pivot = column[channel]
        removed = columns[channel].clone()
        order.append(channel)
        alive[channel] = False
        steps[:, done] = column / pivot.sqrt()
        diagonal -= steps[:, done].square()
        columns.addr_(column / pivot, removed, alpha=-1.0)
        columns[channel] = 0.0
    return order, warnings


def _eliminate_blocks(inverse: Tensor, weight: Tensor, count: int, block: int) -> list[int]:
    """Remove ``count`` blocks P of ``block`` inputs, each at the cost ``tr(V_P ([H^-1]_PP)^-1 V_P^T)``.

    ``inverse``: (n, n) of the Gram, ``weight``: (m, n) least-squares weights, both fp64; both are changed.
    """
    places = torch.arange(weight.shape[1], device=weight.device).view(-1, block)
    if len(places) <= FEW:
        products = weight.T @ weight

        def together(numbers: Iterable[int]) -> float:
            inside = places[list(numbers)].flatten()
            return float(torch.linalg.solve(inverse[inside][:, inside], products[inside][:, inside]).trace())

        return list(min(combinations(range(len(places)), count), key=together))

    def price(number: int) -> float:
        inside = places[number]
        removed = weight[:, inside].T
        return float((torch.linalg.solve(inverse[inside][:, inside], removed) * removed).sum())

    order: list[int] = []
    for _ in range(count):
        best = min((number for number in range(len(places)) if number not in order), key=price)
        chosen = places[best]
        solved = torch.linalg.solve(inverse[chosen][:, chosen], inverse[chosen])
        weight -= weight[:, chosen] @ solved
        inverse -= inverse[:, chosen] @ solved
        weight[:, chosen] = 0.0
        order.append(best)
    return order

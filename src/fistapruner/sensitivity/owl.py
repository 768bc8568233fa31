"""Allocate sparsity by outliers of decoder layers: OWL (Yin et al. 2023, arXiv 2310.05175)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..core import Unstructured
from ..models.layout import Layout
from .fisher import InputEnergy

OUTLIER = 5.0
"""``M``: scores above this multiple of the mean are outliers."""

OWL_REACH = 0.08
"""``lambda``: largest distance of a layer's sparsity from the asked one."""


class Outliers:
    """Gather the share of outliers in every decoder layer."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._seen: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._shares: dict[int, float] = {}

    def add(self, index: int, number: int, sums: InputEnergy) -> None:
        """Add the mean squared inputs of group ``number`` of decoder layer ``index``."""
        self._seen.setdefault(index, []).append((sums.weight, sums.mean().sqrt()))
        if number == len(self._layout.layers[index]) - 1:
            self._shares[index] = outlier_share(self._seen.pop(index))

    def allocation(self, sizes: Mapping[str, int], fraction: float) -> dict[str, Unstructured]:
        """Compute OWL's sparsities; ``sizes`` are the numbers of weights by full name."""
        members = {}
        for index in self._shares:
            names = [self._layout.full_name(index, operator) for operator in self._layout.in_layer(index)]
            members[index] = {name: sizes[name] for name in names}
        return owl_allocation(self._shares, members, fraction)


def outlier_share(operators: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Compute the share of a layer's scores ``|W_ij| ||X_j||`` above ``M`` times their mean.

    Args:
        operators: (m, n) weight and (n,) root mean square of its inputs, for every operator of the layer.
    """
    scores = [weight.float().abs() * norm for weight, norm in operators]
    count = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
    return sum(int(torch.count_nonzero(score > OUTLIER * mean)) for score in scores) / count


def owl_allocation(
    shares: Mapping[int, float], members: Mapping[int, Mapping[str, int]], fraction: float
) -> dict[str, Unstructured]:
    """Map outlier shares linearly to sparsities in a range of ``2 lambda``, with an exact total.

    Args:
        shares: share of outliers in each decoder layer.
        members: numbers of weights of the operators of each decoder layer.
        fraction: the sparsity of all operators together.
    """
    low, high = min(shares.values()), max(shares.values())
    reach = min(OWL_REACH, fraction / 2, (1 - fraction) / 2)
    span = (high - low) or 1.0
    raw = {layer: -2 * reach * (share - low) / span for layer, share in shares.items()}
    total = sum(sum(sizes.values()) for sizes in members.values())
    mean = sum(raw[layer] * sum(sizes.values()) for layer, sizes in members.items()) / total
    budget = sum(Unstructured(fraction).zeros(1, size) for sizes in members.values() for size in sizes.values())
    flat = {
        name: (fraction + raw[layer] - mean, size) for layer, sizes in members.items() for name, size in sizes.items()
    }
    return exact_total(flat, budget)


def exact_total(wanted: Mapping[str, tuple[float, int]], budget: int) -> dict[str, Unstructured]:
    """Round (fraction, size) of each operator to zeros that sum to ``budget``, by cumulative rounding.

    Near a sparsity of 1 rounding may give an operator more zeros than weights: the rest goes to its neighbours.
    """
    result: dict[str, Unstructured] = {}
    running, given = 0.0, 0
    rest = sum(size for _, size in wanted.values())
    for name, (fraction, size) in wanted.items():
        running += fraction * size
        rest -= size
        upto = min(max(round(running), given, budget - rest), given + size, budget)
        result[name] = Unstructured.of_counts(upto - given, size)
        given = upto
    return result

"""Allocate sparsity by outliers of decoder layers: OWL.

Yin et al. 2023, "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity",
arXiv 2310.05175. ``D_l`` is the share of Wanda's scores ``|W_ij| ||X_j||`` of decoder layer l above ``M`` times their
mean, and the layer's sparsity is ``S_l = S - 2 λ (D_l - min D)/(max D - min D)``, shifted so that the mean is S.

1. Differs from the program, whose mean is that over layers: here it is over weights, and the zeros of all operators sum
   to exactly what S gives in every operator.
2. Differs from the program near S = 0 and S = 1, where λ is at most half of the distance to them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core import ProblemSums, Unstructured
from ..models.operators import Layout

OUTLIER = 5.0
"""M."""

REACH = 0.08
"""λ: largest distance of a layer's sparsity from the asked one."""


class Outliers:
    """Gather the share of outliers in every decoder layer, and allocate by it."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._scores: list[Tensor] = []
        self._shares: dict[int, float] = {}

    def add(self, index: int, number: int, sums: ProblemSums) -> None:
        """Add the inputs of a group of decoder layer ``index``; an expert without tokens has no outliers."""
        self._scores.append(sums.weight.abs() * (sums.gram.diagonal() / max(sums.tokens, 1)).sqrt())
        if number == len(self._layout.layers[index]) - 1:
            count = sum(scores.numel() for scores in self._scores)
            mean = sum(float(scores.sum(dtype=torch.float64)) for scores in self._scores) / count
            over = sum(int(torch.count_nonzero(scores > OUTLIER * mean)) for scores in self._scores)
            self._shares[index] = over / count
            self._scores.clear()

    def allocation(self, sizes: Mapping[str, int], fraction: float) -> dict[str, Unstructured]:
        """Return sparsities of operators of these ``sizes``, whose share of zeros together is ``fraction``."""
        low, high = min(self._shares.values()), max(self._shares.values())
        reach = min(REACH, fraction / 2, (1 - fraction) / 2)
        raw = {index: -2 * reach * (share - low) / ((high - low) or 1.0) for index, share in self._shares.items()}
        members = {
            index: {(name := self._layout.full_name(index, each)): sizes[name] for each in self._layout.in_layer(index)}
            for index in raw
        }
        rest = sum(sum(own.values()) for own in members.values())
        mean = sum(raw[index] * sum(own.values()) for index, own in members.items()) / rest
        budget = sum(Unstructured(fraction).zeros(1, size) for own in members.values() for size in own.values())
        found: dict[str, Unstructured] = {}
        running, given = 0.0, 0
        for index, own in members.items():
            for name, size in own.items():
                running += (fraction + raw[index] - mean) * size
                rest -= size
                # Near a sparsity of 1 rounding may give more zeros than weights: the neighbours get what is left.
                upto = min(max(round(running), given, budget - rest), given + size, budget)
                found[name] = Unstructured.of_counts(upto - given, size)
                given = upto
        return found

"""Decide which operators get their input channels in another order, and which heads are rotated.

Orders are found by :mod:`.channel_order`, rotations by :mod:`.head_rotation`, while the dense model is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import NM, Constraint
from ..models.coupling import find_links, reordered
from ..models.files.checkpoint import reorder
from ..models.layerwise import LayerwiseModel
from ..models.layout import Layout
from .channel_order import channel_order, raised_shares
from .head_rotation import head_rotation, rotated_energy


@dataclass(frozen=True)
class _Order:
    """An order of an operator's input channels, or rotations of those of its heads.

    Args:
        shares: for each pattern of which it raises what is kept of the scores, the shares before and after.
        tensors: that are reordered with it (:attr:`~.decision.Decision.orders`).
        rows: the same for the rows of the operators that make the channels, by full name.
    """

    shares: dict[Constraint, tuple[float, float]]
    tensors: dict[str, tuple[int, Tensor]]
    rows: dict[str, Tensor]


def reordered_rows(importance: Tensor, order: Tensor) -> Tensor:
    """Return the weights of reordered rows; of rotated ones, as if the rows were independent."""
    if order.ndim == 1:
        return importance[order]
    return reorder(importance.square(), 0, order.square()).sqrt()


class Permutations:
    """Find orders of the free input channels of operators with an n:m pattern, and rotations of heads.

    Args:
        sparsity: pattern of every operator, for which its order is searched.
        others: patterns that operators may be given instead.
    """

    def __init__(
        self, model: LayerwiseModel, layout: Layout, sparsity: Mapping[str, Constraint], others: Sequence[Constraint]
    ) -> None:
        self._model = model
        self._layout = layout
        self._sparsity = sparsity
        self._others = [pattern for pattern in others if pattern.nm is not None]
        self._links = find_links(model, layout)
        self._found: dict[str, list[_Order]] = {}
        self._written: dict[str, tuple[Tensor, Tensor]] = {}
        self.orders: dict[str, tuple[int, Tensor]] = {}
        self.permuted: dict[str, tuple[float, float]] = {}
        self.rows: dict[str, Tensor] = {}

    def add(self, index: int, number: int, weight: Tensor, gram: Tensor) -> None:
        """Order the input channels of group ``number`` of decoder layer ``index``.

        Args:
            index: number of the layer.
            number: of the group.
            weight: (m, n) weights of its operators, stacked by rows.
            gram: (n, n) of its inputs.
        """
        energy = gram.diagonal()
        group = self._layout.layers[index][number]
        weights = dict(
            zip(
                (operator.name for operator in group),
                weight.split([operator.rows for operator in group]),
                strict=True,
            )
        )
        for link in self._links[index]:
            name = self._layout.full_name(index, link.consumer)
            sparsity = self._sparsity.get(name)
            if sparsity is None or sparsity.nm is None or link.channels % sparsity.nm[1]:
                continue
            pattern = NM(*sparsity.nm)
            producers = [self._layout.full_name(index, producer) for producer in link.producers]
            rotates = link.rotates and self._sparsity.get(producers[0]) == sparsity
            if rotates and link.producers[0] in weights:  # it runs before what reads its channels
                self._written[producers[0]] = weights[link.producers[0]].clone(), energy.clone()
            if link.consumer.name not in weights:
                continue
            reader = weights[link.consumer.name]
            scores = reader.square() * energy
            written = self._written.pop(producers[0], None)
            changed: list[tuple[Tensor, Tensor]] = []
            if written is not None:
                order = head_rotation(link, reader, gram, pattern, *written)
                changed.append((order, reorder(reader, 1, order).square() * rotated_energy(link, gram, order)))
            if written is None or self._others:  # what makes the channels may be left dense
                order = torch.stack([channel_order(block, pattern) for block in link.by_block(scores)])
                changed.append((order, scores[:, link.places(order)[1]]))
            self._found[name] = []
            for order, after in changed:
                shares = {
                    each: raised
                    for each in dict.fromkeys([sparsity, *self._others])
                    if (raised := raised_shares(scores, after, each)) is not None
                }
                rows = dict.fromkeys(producers, link.places(order)[0])
                self._found[name].append(_Order(shares, reordered(self._model, index, link, order), rows))

    def take(self, chosen: Mapping[str, Constraint]) -> None:
        """Take the first orders that raise what patterns keep: those ``chosen`` since, or else as asked."""
        for name, orders in self._found.items():
            for order in orders:
                shares = order.shares.get(chosen.get(name, self._sparsity[name]))
                # Rotated rows lose the zeros that they have, so they must get zeros of their own.
                turned = [row for row, rows in order.rows.items() if rows.ndim == 3]
                if shares is not None and all(chosen.get(row, self._sparsity[row]).nm is not None for row in turned):
                    self.orders |= order.tensors
                    self.permuted[name] = shares
                    self.rows |= order.rows
                    break

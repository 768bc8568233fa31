"""Order channels and rotate heads so that an n:m pattern keeps most of the important weights.

An n:m pattern keeps n of every m neighbouring weights of a row, however important the others are. Where the order of an
operator's input channels is free (:mod:`fistapruner.models.links`), channels can be ordered so that the important
weights of a row are spread over the groups. The dense model's outputs do not change.

The order is found as in RIA (Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large
Language Models", ICLR): channels are dealt to groups by importance, then one member of every group at a time is
reassigned by a linear sum assignment. Channel permutation for n:m sparsity goes back to Pool & Yu 2021 (NeurIPS).

The channels of a value head are added up by attention and read by the output projection, with no nonlinearity between
them. So they can be rotated: ``v_proj`` becomes ``R^T W_v`` and, of every query head that reads the head, ``o_proj``
becomes ``W_o R``. R minimises the shares of Wanda's squared scores ``W_ij² H_jj`` that the pattern loses, by steps of
Adam on the group of rotations. Rotations that gather importance before pruning: DenoiseRotator (Gu et al. 2025, arXiv
2505.23049), there inside every decoder layer and at some cost in speed; here only those that cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import NM, Constraint
from ..core.selection import spread_stride
from ..models.checkpoint import reorder
from ..models.layers import LayerwiseModel
from ..models.links import Link, find_links, reordered
from ..models.operators import Layout
from ..runtime.devices import available_cores

ROWS = 2048
"""Output rows that the search for an order samples, at most."""

EXCHANGING_GROUPS = 1024
"""Groups that exchange members in one assignment, at most: its cost is cubic in their number."""

STEPS, RATE = 100, 0.03
"""Steps of the search for rotations, and the first one's root mean square angle in radians; it falls linearly to 0."""

DECAYS = 0.9, 0.99
"""Of Adam's moments."""


def kept_share(scores: Tensor, pattern: Constraint) -> float:
    """Compute the share of the sum of (rows, channels) scores that a pattern with an n:m in it keeps."""
    assert pattern.nm is not None
    n, m = pattern.nm
    groups = scores.masked_fill(~pattern.project(scores), 0.0).view(len(scores), -1, m)
    kept = groups.topk(n, dim=2).values.sum(dtype=torch.float64)  # sorted: the order inside a group changes no bit
    return float(kept / scores.sum(dtype=torch.float64).clamp_min(1e-300))


def raised_shares(scores: Tensor, reordered: Tensor, pattern: Constraint) -> tuple[float, float] | None:
    """Compute what a pattern keeps of (rows, channels) scores before and after; None if not more."""
    before, after = kept_share(scores, pattern), kept_share(reordered, pattern)
    return (before, after) if after > before else None


def sample_rows(values: Tensor) -> Tensor:
    """Select at most :data:`ROWS` rows.

    Rows of operators that share inputs, such as the query heads of a group, take turns: the sample has all of them.
    """
    return values[:: spread_stride(len(values) + ROWS - 1, ROWS, len(values))]


def channel_order(scores: Tensor, pattern: NM) -> Tensor:
    """Find an order of the input channels in which a pattern keeps a large share of the scores.

    Args:
        scores: (rows, channels) non-negative importance of every weight.
        pattern: n:m; m divides the number of channels.

    Returns:
        (channels,) int64: new channel i is old channel ``order[i]``. The identity where no better order was found.
    """
    identity = torch.arange(scores.shape[1], device=scores.device)
    if scores.shape[1] == pattern.m:
        return identity
    few = sample_rows(scores)
    # Deal by importance, strongest channels first: of G groups, group g gets ranks g, G + g, 2 G + g, ...
    members = few.sum(0).argsort(descending=True, stable=True).view(pattern.m, -1).T.contiguous()
    count = -(-len(members) // EXCHANGING_GROUPS)
    with ThreadPoolExecutor(min(count, available_cores())) as pool:
        for place in range(pattern.m):
            # Groups of a chunk lie far apart, so that it holds channels of every rank.
            chunks = [members[first::count] for first in range(count)]
            chosen = [pool.submit(_assign, _gains(few, chunk, place, pattern)) for chunk in chunks]
            for chunk, assigned in zip(chunks, chosen, strict=True):
                chunk[:, place] = chunk[assigned.result(), place]
    order = members.reshape(-1)
    return order if kept_share(scores[:, order], pattern) > kept_share(scores, pattern) else identity


def _gains(scores: Tensor, members: Tensor, place: int, pattern: NM) -> Tensor:
    """Compute what each group keeps with each candidate for ``place``: (groups, candidates).

    It is twice that, up to constants that are the same for every assignment.

    Args:
        scores: (rows, channels).
        members: (groups, m) channels of each group; those at ``place`` are the candidates.
        place: in every group.
        pattern: of the groups.
    """
    others = torch.cat([members[:, :place], members[:, place + 1 :]], 1)
    fixed = scores[:, others.reshape(-1)].view(len(scores), len(others), -1)
    # With the other members fixed, a candidate x adds max(x, b) - b to a row, b being the n-th largest of them.
    bound = fixed.topk(pattern.n, dim=2).values[:, :, -1].T.contiguous()
    candidates = scores[:, members[:, place]].T.contiguous()
    # 2 max(x, b) = x + b + |x - b|, and the sums of x and of b are the same for every assignment.
    return torch.cdist(bound, candidates, p=1.0).cpu()


def _assign(gains: Tensor) -> Tensor:
    """Assign a candidate to every group, so that the groups keep most: (groups,); other threads go on."""
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(gains.numpy(), maximize=True)[1])


def head_rotation(link: Link, reader: Tensor, gram: Tensor, pattern: NM, writer: Tensor, energy: Tensor) -> Tensor:
    """Find rotations of the channels of heads with which a pattern loses little of the scores.

    Args:
        link: its channels may be rotated.
        reader: (m, columns) weights of the operator that reads the channels.
        gram: (columns, columns) of its inputs.
        pattern: n:m; m divides the channels of a head.
        writer: (blocks * channels, n) weights of the operator that makes the channels, which gets the pattern too.
        energy: (n,) mean squared inputs of ``writer``.

    Returns:
        (blocks, channels, channels) fp32 orthogonal matrices for :func:`~fistapruner.models.checkpoint.reorder`:
        rotations, and in the heads that they lead to the order of channels of which the pattern keeps most.
    """
    blocks, repeats, channels = link.blocks, link.repeats, link.channels
    few = sample_rows(reader)
    rows = few.view(len(few), blocks, repeats, channels).transpose(0, 1)
    inputs = _grams_of_heads(link, gram)
    made = writer.view(blocks, channels, -1)

    def scores(rotation: Tensor) -> tuple[Tensor, Tensor]:
        read = _energy(inputs, rotation)
        reading = (rows @ rotation[:, None]).square() * read[:, None]
        return reading.reshape(-1, channels), ((rotation.mT @ made).square() * energy).flatten(0, 1)

    rotation = torch.eye(channels, device=reader.device).repeat(blocks, 1, 1)
    first, second = torch.zeros_like(rotation), torch.zeros(blocks, 1, 1, device=reader.device)
    for step in range(STEPS):
        with torch.enable_grad():
            at = rotation.clone().requires_grad_()
            lost = [(each * ~pattern.project(each.detach())).sum() / each.sum().clamp_min(1e-30) for each in scores(at)]
            torch.stack(lost).clamp_min(1e-30).log().sum().backward()
        assert at.grad is not None
        slope = rotation.mT @ at.grad
        slope = slope - slope.mT
        first = torch.lerp(slope, first, DECAYS[0])
        second = torch.lerp(slope.square().mean((1, 2), keepdim=True), second, DECAYS[1])
        size = (second / (1 - DECAYS[1] ** (step + 1))).sqrt().clamp_min(1e-30)
        angle = first / (1 - DECAYS[0] ** (step + 1)) / size
        rotation = rotation @ torch.linalg.matrix_exp(-RATE * (1 - step / STEPS) * angle)
    left, _, right = torch.linalg.svd(rotation.double())  # exactly orthogonal again
    rotation = (left @ right).float()
    kept = scores(rotation)[0].view(blocks, -1, channels)
    orders = torch.stack([channel_order(block, pattern) for block in kept])
    ordered: Tensor = rotation.gather(2, orders[:, None].expand(-1, channels, -1)).contiguous()
    return ordered


def rotated_energy(link: Link, gram: Tensor, rotation: Tensor) -> Tensor:
    """Compute the (columns,) mean squared inputs of an operator after its heads are rotated."""
    return _energy(_grams_of_heads(link, gram), rotation).reshape(-1)


def _energy(grams: Tensor, rotation: Tensor) -> Tensor:
    """Compute the diagonals of the heads' Grams after a rotation: (blocks, repeats, channels)."""
    return ((grams @ rotation[:, None]) * rotation[:, None]).sum(2)


def _grams_of_heads(link: Link, gram: Tensor) -> Tensor:
    """Return the Grams of the heads that an operator reads: (blocks, repeats, channels, channels)."""
    size = link.blocks * link.repeats
    heads = gram.view(size, link.channels, size, link.channels).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return heads.reshape(link.blocks, link.repeats, link.channels, link.channels)


class _Order(NamedTuple):
    """An order of an operator's input channels, or rotations of those of its heads."""

    shares: dict[Constraint, tuple[float, float]]  # kept before and after, of each pattern that keeps more so
    tensors: dict[str, tuple[int, Tensor]]  # that are reordered with it
    rows: dict[str, Tensor]  # the same for the rows of the operators that make the channels, by full name


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
            index, number: of the layer, and of the group in it.
            weight: (m, n) weights of its operators, stacked by rows.
            gram: (n, n) of its inputs.
        """
        energy = gram.diagonal()
        group = self._layout.layers[index][number]
        parts = weight.split([operator.rows for operator in group])
        weights = {operator.name: part for operator, part in zip(group, parts, strict=True)}
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
                each = dict.fromkeys([sparsity, *self._others])
                shares = {one: found for one in each if (found := raised_shares(scores, after, one)) is not None}
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

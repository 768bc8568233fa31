"""Rotate the channels of attention heads, so that an n:m pattern loses less of the important weights.

The channels of a value head are added up by attention and read by the output projection, with no nonlinearity between
them. So they can be rotated: ``v_proj`` becomes ``R^T W_v`` and, of every query head that reads the head, ``o_proj``
becomes ``W_o R``. The dense model's outputs do not change but for rounding, and what has to be computed stays the same.
With channels in the order of :mod:`.channel_order` a row's important weights are spread over its groups; rotated, the
importance itself is gathered in fewer of them.

R minimises the shares of Wanda's squared scores ``W_ij² H_jj`` that the pattern loses, by steps of Adam on the group of
rotations. Rotations that gather importance before pruning: DenoiseRotator (Gu et al. 2025, arXiv 2505.23049), there
inside every decoder layer and at some cost in speed; here only those that cost nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import NM
from ..models.coupling import Link
from .channel_order import channel_order, sample_rows

STEPS, RATE = 100, 0.03
"""Steps of the search, and the first one's root mean square angle in radians; it falls linearly to 0."""

DECAYS = 0.9, 0.99
"""Of Adam's moments."""


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
        (blocks, channels, channels) fp32 orthogonal matrices for :func:`~fistapruner.models.files.checkpoint.reorder`:
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

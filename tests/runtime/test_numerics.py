"""Grams of which only one half is multiplied out."""

from __future__ import annotations

import pytest
import torch

from fistapruner.runtime.numerics import add_gram, mirror


@pytest.mark.parametrize("n", [1, 7, 255, 512, 700, 1100, 2304])
def test_half_a_gram_is_the_whole_one_once_mirrored(n: int) -> None:
    first, second = torch.randn(2, 40, n, generator=torch.Generator().manual_seed(n))
    sums = torch.zeros(n, n)
    add_gram(sums, first)
    add_gram(sums, second)
    mirror(sums)
    assert torch.equal(sums, sums.T)
    both = torch.cat([first, second]).double()
    torch.testing.assert_close(sums, (both.T @ both).float(), rtol=1e-4, atol=1e-4)


def test_only_the_upper_half_is_read() -> None:
    square = torch.arange(9.0).view(3, 3)
    assert mirror(square.clone()).tolist() == [[0, 1, 2], [1, 4, 5], [2, 5, 8]]

"""Grams of which only one half is multiplied out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fistapruner import LayerProblem, solve
from fistapruner.runtime.numerics import add_gram, fast_products, mirror


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


def precision() -> str:
    return str(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]


def test_the_precision_comes_back_when_the_last_of_overlapping_blocks_ends() -> None:
    before = precision()
    first, second = fast_products(), fast_products()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert precision() == "bf16"
    second.__exit__(None, None, None)
    assert precision() == before


def test_solves_in_several_threads_give_the_bits_of_solves_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(600, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    problems = [LayerProblem.from_activations(torch.randn(96, 96, generator=generator), inputs) for _ in range(12)]
    before = precision()
    alone = [solve(problem, "50%").weight for problem in problems]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda problem: solve(problem, "50%").weight, problems))
    assert precision() == before
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_only_the_upper_half_is_read() -> None:
    square = torch.arange(9.0).view(3, 3)
    assert mirror(square.clone()).tolist() == [[0, 1, 2], [1, 4, 5], [2, 5, 8]]

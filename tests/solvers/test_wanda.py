"""Wanda against its formula, entry by entry from the activations."""

from __future__ import annotations

import math

import pytest
import torch
from layer_problems import activations

from fistapruner import LayerProblem
from fistapruner.solvers import solve


@pytest.mark.parametrize(
    ("sparsity", "zeros", "group"), [("50%", 8, 16), ("75%", 12, 16), ("2:4", 2, 4), ("1:4", 3, 4)]
)
def test_the_lowest_products_of_magnitude_and_input_norm_are_dropped(sparsity: str, zeros: int, group: int) -> None:
    """Within each row, or each group of a row; what is kept is not changed."""
    inputs = activations(16, 100)
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 6)[:, None]
    norms = [math.sqrt(sum(value * value for value in column)) for column in inputs.T.tolist()]
    expected = weight.clone()
    for i, row in enumerate(weight.tolist()):
        scores = [abs(value) * norm for value, norm in zip(row, norms, strict=True)]
        for start in range(0, 16, group):
            for j in sorted(range(start, start + group), key=scores.__getitem__)[:zeros]:
                expected[i, j] = 0.0
    solution = solve(LayerProblem.from_activations(weight, inputs), sparsity, "wanda")
    assert torch.equal(solution.mask, expected != 0)
    assert torch.equal(solution.weight, expected)

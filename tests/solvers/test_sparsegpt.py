"""Blocked SparseGPT against optimal brain surgeon, column by column, in fp64."""

from __future__ import annotations

import pytest
import torch
from layer_problems import make_problem

from fistapruner import LayerProblem
from fistapruner.core import parse_sparsity
from fistapruner.solvers import solve
from fistapruner.solvers.sparsegpt import SparseGPT


def brain_surgeon(problem: LayerProblem, mask: torch.Tensor, damping: float) -> torch.Tensor:
    """Remove the pruned weights of each column in turn with the inverse of the Gram of the columns not yet passed."""
    gram = problem.gram.double()
    gram = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    weight = problem.weight.double()
    if problem.drift_gradient is not None:
        weight = weight + problem.drift_gradient.double() @ torch.linalg.inv(gram)
    weight = weight.clone()
    for j in range(len(gram)):
        inverse = torch.linalg.inv(gram[j:, j:])
        error = torch.where(mask[:, j], 0.0, weight[:, j]) / inverse[0, 0]
        weight[:, j:] -= error[:, None] * inverse[0]
        weight[:, j] = torch.where(mask[:, j], weight[:, j], 0.0)
    return weight


@pytest.mark.parametrize("sparsity", ["50%", "70%", "2:4", "4:8", "3:5"])
@pytest.mark.parametrize(("drift", "target"), [(0.0, 1.0), (0.1, 1.0), (0.1, 0.5)])
def test_compensation_is_that_of_brain_surgeon(sparsity: str, drift: float, target: float) -> None:
    problem = make_problem((8, 6), 40, drift=drift, target=target)
    solution = SparseGPT(block=16).solve(problem, [parse_sparsity(sparsity)] * 2)
    oracle = brain_surgeon(problem, solution.mask, 0.01)
    assert torch.allclose(solution.weight.double(), oracle, atol=2e-4 * float(oracle.abs().max()))


def test_first_block_takes_the_cheapest_weights() -> None:
    problem = make_problem((10,), 24)
    solution = SparseGPT(block=24).solve(problem, [parse_sparsity(0.5)])
    gram = problem.gram.double()
    gram += 0.01 * gram.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    saliency = (problem.weight.double() / upper.diagonal()).square()
    assert float(saliency[~solution.mask].max()) <= float(saliency[solution.mask].min()) * (1 + 1e-4)


@pytest.mark.parametrize("block", [1, 7, 16, 128])
def test_block_size_changes_masks_not_sparsity(block: int) -> None:
    problem = make_problem((9,), 30)
    solution = solve(problem, 0.37, [{"sparsegpt": {"block": block}}])
    assert int((~solution.mask).sum()) == round(0.37 * 270)

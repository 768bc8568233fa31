"""ADMM against the author's program, written out anew in fp64."""

from __future__ import annotations

import pytest
import torch
from layer_problems import make_problem
from torch import Tensor

from fistapruner import LayerProblem
from fistapruner.core import NM, Constraint, parse_sparsity
from fistapruner.solvers import solve


def program(problem: LayerProblem, pattern: Constraint, growing: int = 15, iterations: int = 20) -> Tensor:
    """(m, n) weights by lib/admm.py of the author's repository: rho is 1, the damping a tenth of the mean diagonal."""
    gram = problem.gram.double()
    norm = gram.diagonal().sqrt()
    gram = gram / norm / norm[:, None]
    gram = gram + 0.1 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    v = problem.weight.double() * norm
    right = v @ gram
    if problem.drift_gradient is not None:
        right = right + problem.drift_gradient.double() / norm
    inverse = torch.linalg.inv(gram + torch.eye(len(gram), dtype=torch.float64))
    u, keep = torch.zeros_like(v), torch.ones_like(v, dtype=torch.bool)
    for step in range(iterations):
        if step < growing:
            score = (v + u).abs()
            if isinstance(pattern, NM):
                groups = score.view(-1, pattern.m)
                groups.scatter_(1, groups.argsort(1)[:, pattern.m - pattern.n :], torch.inf)
            zeros = round(pattern.zeros(*score.shape) * (1 - (1 - (step + 1) / growing) ** 3))
            keep = torch.ones(score.numel(), dtype=torch.bool)
            keep[score.flatten().argsort()[:zeros]] = False
            keep = keep.view(score.shape)
        z = (v + u) * keep
        u = u + v - z
        v = (right + z - u) @ inverse
    return (v + u) * keep / norm


@pytest.mark.parametrize(("drift", "target"), [(0.0, 1.0), (0.3, 1.0), (0.3, 0.5)])
@pytest.mark.parametrize("sparsity", ["50%", "70%", "2:4", "4:8", "1:4"])
def test_the_authors_program_gives_the_same_weights(sparsity: str, drift: float, target: float) -> None:
    problem = make_problem((24,), 32, drift=drift, target=target)
    pattern = parse_sparsity(sparsity)
    expected = program(problem, pattern)
    solution = solve(problem, pattern, "admm")
    assert torch.equal(solution.mask, expected != 0)
    torch.testing.assert_close(solution.weight.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert solution.stats[0]["steps"][0]["rho"] == pytest.approx(1.0)


def test_rows_compete_for_the_weights_that_are_kept() -> None:
    problem = make_problem((24,), 32)
    loud = LayerProblem(problem.weight * torch.logspace(-1, 1, 24)[:, None], problem.gram)
    assert len(set(solve(loud, "50%", "admm").mask.sum(1).tolist())) > 5

"""ALPS against the paper's updates, written out anew in fp64."""

from __future__ import annotations

import pytest
import torch
from layer_problems import make_problem
from torch import Tensor

from fistapruner import LayerProblem
from fistapruner.core import NM, Constraint, parse_sparsity
from fistapruner.solvers import solve


def largest(scores: Tensor, pattern: Constraint) -> Tensor:
    """Mask of the largest magnitudes: of the whole operator, or of every group of a row."""
    flat = scores.abs().reshape(-1, pattern.m) if isinstance(pattern, NM) else scores.abs().reshape(1, -1)
    dropped = pattern.m - pattern.n if isinstance(pattern, NM) else pattern.zeros(*scores.shape)
    keep = torch.ones_like(flat, dtype=torch.bool)
    return keep.scatter_(1, flat.argsort(1)[:, :dropped], False).view(scores.shape)


def program(
    problem: LayerProblem, pattern: Constraint, rho: float, iterations: int
) -> tuple[Tensor, Tensor, list[tuple[float, float]]]:
    """Algorithm 1 of Meng et al. with the rules for rho of the authors' program, without conjugate gradients.

    As they write it: inputs by outputs, B the weights, D those with zeros, V the dual.

    Returns:
        The weights (m, n), their mask, and (rho, share of the support that changed) at every third step.
    """
    gram = problem.gram.double()
    gram = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    norm = gram.diagonal().sqrt()[:, None]
    dense = problem.weight.double().T
    right = gram @ dense
    if problem.drift is not None:
        right = right + problem.target * problem.drift.double().T
    gram, right = gram / norm / norm.T, right / norm
    mask = largest((dense * norm).T, pattern).T
    start, support = dense * norm * mask, mask
    d, v, path, fixed = start, torch.zeros_like(start), [], False
    for step in range(1, iterations + 1):
        b = torch.linalg.solve(gram + rho * torch.eye(len(gram), dtype=torch.float64), right - v + rho * d)
        d = b + v / rho
        mask = largest(d.T, pattern).T
        d = d * mask
        v = v + rho * (b - d)
        if step % 3:
            continue
        changed = int((mask ^ support).sum()) / int(support.sum())
        support = mask
        path.append((rho, changed))
        if changed > 0.005:
            rho, fixed = rho * (1.3 if changed > 0.1 else 1.2), True
        elif fixed and changed:
            rho *= 1.1
        elif fixed:
            break
        else:
            rho /= 5
            if changed:
                d, v, support = start, torch.zeros_like(start), start != 0
        if step > 30 and changed < 0.0003:
            break
    kept = largest(b.T, pattern)
    return (b / norm).T * kept, kept, path


@pytest.mark.parametrize(("drift", "target"), [(0.0, 1.0), (0.3, 1.0), (0.3, 0.5)])
@pytest.mark.parametrize(("rho", "iterations"), [(0.1, 300), (30.0, 300), (0.1, 10)])
@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
def test_the_authors_updates_give_the_same_weights(
    sparsity: str, rho: float, iterations: int, drift: float, target: float
) -> None:
    problem = make_problem((48,), 48, drift=drift, target=target)
    pattern = parse_sparsity(sparsity)
    weight, mask, path = program(problem, pattern, rho, iterations)
    solution = solve(problem, pattern, [{"alps": {"rho": rho, "iterations": iterations, "refit": 0}}])
    assert torch.equal(solution.mask, mask)
    torch.testing.assert_close(solution.weight.double(), weight, rtol=1e-3, atol=1e-4 * float(weight.abs().max()))
    found = [(each["rho"], each["support_change"]) for each in solution.stats[0]["steps"][0]["path"]]
    assert [each["step"] for each in solution.stats[0]["steps"][0]["path"]] == [3 * i for i in range(1, len(path) + 1)]
    assert found == [pytest.approx(each, rel=1e-9) for each in path]

"""Published methods against their papers and programs, written out anew in fp64."""

import pytest
import torch
from torch import Tensor

from fistapruner.core import NM, Constraint, LayerProblem, parse_sparsity
from fistapruner.solvers import solve
from fistapruner.solvers.alps import ALPS
from fistapruner.solvers.sparsegpt import SparseGPT
from layer_problems import DRIFTS, activations, damped, linear, make_problem


def check(problem: LayerProblem, sparsity: str, method: object, weight: Tensor, mask: Tensor) -> dict[str, object]:
    """Compare a method's mask, weights to rounding, and return what it recorded."""
    solution = solve(problem, sparsity, [method])  # type: ignore[list-item]
    assert torch.equal(solution.mask, mask)
    torch.testing.assert_close(solution.weight.double(), weight, rtol=1e-3, atol=1e-4 * float(weight.abs().max()))
    record: dict[str, object] = solution.stats[0]["steps"][0]
    return record


def largest(scores: Tensor, pattern: Constraint) -> Tensor:
    """Mask of the largest magnitudes: of the whole operator, or of every group of a row."""
    flat = scores.abs().reshape(-1, pattern.m) if isinstance(pattern, NM) else scores.abs().reshape(1, -1)
    dropped = pattern.m - pattern.n if isinstance(pattern, NM) else pattern.zeros(*scores.shape)
    keep = torch.ones_like(flat, dtype=torch.bool)
    return keep.scatter_(1, flat.argsort(1)[:, :dropped], False).view(scores.shape)


@pytest.mark.parametrize(
    ("sparsity", "zeros", "group"), [("50%", 8, 16), ("75%", 12, 16), ("2:4", 2, 4), ("1:4", 3, 4)]
)
def test_wanda(sparsity: str, zeros: int, group: int) -> None:
    """The lowest products of magnitude and input norm of each row, or each group of a row, are dropped (eq. 1)."""
    inputs = activations(16, 100)
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 6)[:, None]
    scores = (weight.double().abs() * inputs.double().norm(dim=0)).view(-1, group)
    mask = torch.ones_like(scores, dtype=torch.bool).scatter_(1, scores.argsort(1)[:, :zeros], False).view(6, 16)
    problem = LayerProblem.from_activations(weight, inputs)
    check(problem, sparsity, "wanda", weight.double() * mask, mask)


def test_magnitude() -> None:
    problem, mask = make_problem(), largest(make_problem().weight, parse_sparsity("50%"))
    check(problem, "50%", "magnitude", problem.weight.double() * mask, mask)


@pytest.mark.parametrize("sparsity", ["50%", "70%", "2:4", "4:8", "3:5"])
@pytest.mark.parametrize(("drift", "target"), DRIFTS)
@pytest.mark.parametrize("block", [8, 20, 128])
def test_sparsegpt(sparsity: str, drift: float, target: float, block: int) -> None:
    """Algorithm 1, with the inverse of the Gram of the columns not yet passed in place of its Cholesky factor."""
    problem, pattern = make_problem(14, 40, drift=drift, target=target), parse_sparsity(sparsity)
    gram = damped(problem.gram, 0.01)
    upper = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    weight = problem.weight.double()
    weight = weight + (linear(problem) - weight @ problem.gram.double()) @ torch.linalg.inv(gram)
    mask = torch.ones_like(weight, dtype=torch.bool)
    group = pattern.group_length
    span = group if group > 1 else block
    for j in range(40):
        if j % span == 0:
            columns = slice(j, min(j + span, 40))
            scores = (weight[:, columns] / upper.diagonal()[columns]).square()
            if group == 1:
                zeros = pattern.zeros(14, columns.stop) - pattern.zeros(14, j)
                mask[:, columns] = scores > scores.flatten().sort().values[zeros - 1]
            else:
                mask[:, columns] = largest(scores, pattern)
        inverse = torch.linalg.inv(gram[j:, j:])
        removed = torch.where(mask[:, j], 0.0, weight[:, j]) / inverse[0, 0]
        weight[:, j:] -= removed[:, None] * inverse[0]
        weight[:, j] = torch.where(mask[:, j], weight[:, j], 0.0)
    check(problem, sparsity, SparseGPT(block=block), weight, mask)


@pytest.mark.parametrize("sparsity", ["50%", "70%", "2:4", "4:8", "1:4"])
@pytest.mark.parametrize(("drift", "target"), [(0.0, 1.0), (0.3, 1.0), (0.3, 0.5)])
def test_admm(sparsity: str, drift: float, target: float) -> None:
    """lib/admm.py of the author's repository: rho is 1, the damping a tenth of the scaled Gram's mean diagonal."""
    problem, pattern = make_problem(24, 32, drift=drift, target=target), parse_sparsity(sparsity)
    norm = problem.gram.double().diagonal().sqrt()
    v = problem.weight.double() * norm
    gram = damped(problem.gram.double() / norm / norm[:, None], 0.1)
    right = v @ gram + (linear(problem) - problem.weight.double() @ problem.gram.double()) / norm
    v = torch.linalg.solve(gram, right.T).T  # of the dense weights where nothing has drifted
    inverse = torch.linalg.inv(gram + torch.eye(32, dtype=torch.float64))
    u, keep = torch.zeros_like(v), torch.ones_like(v, dtype=torch.bool)
    for step in range(1, 21):
        if step <= 15:
            score = (v + u).abs()
            if isinstance(pattern, NM):
                groups = score.view(-1, pattern.m)
                groups.scatter_(1, groups.argsort(1)[:, pattern.m - pattern.n :], torch.inf)
            zeros = round(pattern.zeros(24, 32) * (1 - (1 - step / 15) ** 3))
            keep = torch.ones(24 * 32, dtype=torch.bool).index_fill(0, score.flatten().argsort()[:zeros], False)
            keep = keep.view(24, 32)
        z = (v + u) * keep
        u = u + v - z
        v = (right + z - u) @ inverse
    assert check(problem, sparsity, "admm", (v + u) * keep / norm, keep)["rho"] == 1.0


@pytest.mark.parametrize(("drift", "target"), [(0.0, 1.0), (0.3, 1.0), (0.3, 0.5)])
@pytest.mark.parametrize(("rho", "iterations"), [(0.1, 300), (30.0, 300), (0.1, 10)])
@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
def test_alps(sparsity: str, rho: float, iterations: int, drift: float, target: float) -> None:
    """Algorithm 1 with the rules for rho of the authors' program, without conjugate gradients.

    As they write it: inputs by outputs, B the weights, D those with zeros, V the dual.
    """
    problem, pattern = make_problem(48, 48, drift=drift, target=target), parse_sparsity(sparsity)
    method = ALPS(rho=rho, iterations=iterations, refit=0)
    gram = damped(problem.gram, 0.01)
    norm = gram.diagonal().sqrt()[:, None]
    dense = problem.weight.double().T
    right = (gram @ dense + linear(problem).T - problem.gram.double() @ dense) / norm
    gram = gram / norm / norm.T
    dense = torch.linalg.solve(gram, right)  # the dense weights, scaled, where nothing has drifted
    support = largest(dense.T, pattern).T
    start = dense * support
    d, v, path, fixed = start, torch.zeros_like(start), [], False
    for step in range(1, iterations + 1):
        b = torch.linalg.solve(gram + rho * torch.eye(48, dtype=torch.float64), right - v + rho * d)
        d = b + v / rho
        mask = largest(d.T, pattern).T
        d = d * mask
        v = v + rho * (b - d)
        if step % 3:
            continue
        changed = int((mask ^ support).sum()) / int(support.sum())
        support = mask
        path.append({"step": step, "rho": pytest.approx(rho, rel=1e-9), "support_change": pytest.approx(changed)})
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
    assert check(problem, sparsity, method, (b / norm).T * kept, kept)["path"] == path

"""The splitting against ADMM with an explicit dual in fp64; the default solver; sparse plus low rank."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fistapruner.core import LayerProblem, parse_sparsity
from fistapruner.solvers import Solution, parse_method, solve
from fistapruner.solvers.low_rank import LowRank, WithLowRank, solve_low_rank
from fistapruner.solvers.proximal import Proximal, obs_scale
from fistapruner.solvers.splitting import LeastSquares, geometric, natural_order, resolvents, split, strided_order
from layer_problems import DRIFTS, damped, linear, make_problem


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in full precision, also where the processor has units for bf16."""
    monkeypatch.setattr("fistapruner.core.linalg.has_bf16_units", lambda device: False)


@pytest.mark.parametrize("rank", [None, 0, 3])
@pytest.mark.usefixtures("exact")
def test_splitting_is_admm_with_a_dual_that_stays_as_the_penalty_grows(rank: int | None) -> None:
    """Against ADMM with the dual Y itself, which has nothing to rescale: Z is ``A + Y / rho``."""
    problem, pattern = make_problem(12, 16), parse_sparsity("2:4")
    wanted, identity = problem.weight.double(), torch.eye(16, dtype=torch.float64)
    gram = problem.gram.double() / problem.gram.double().diagonal().mean()

    def project(z: Tensor, kept: Tensor) -> None:
        torch.mul(z, pattern.project(z.abs()), out=kept)

    schedule, resolvent = geometric(0.05, 0.5, 5, 3), resolvents(gram)
    term = LeastSquares(wanted, resolvent, fast=False) if rank is None else WithLowRank(wanted, resolvent, rank)
    state = split(term, wanted, schedule, project)

    basis = torch.randn(12, rank or 0, generator=torch.Generator().manual_seed(0)).double()
    dense, dual, before = wanted, torch.zeros_like(wanted), 0.05
    for rho in schedule(state):
        shifted = dense + dual / before
        kept = shifted * pattern.project(shifted.abs())
        dual = dual + before * (dense - kept)
        start = kept - dual / rho
        change = torch.linalg.solve(gram + rho * identity, gram @ (start - wanted).T).T  # without a low-rank part
        basis = torch.linalg.qr((start - wanted) @ (change.T @ basis)).Q
        dense, before = start - change + basis @ (basis.T @ change), rho
    torch.testing.assert_close(state.z, dense + dual / before, rtol=1e-8, atol=1e-8)


def test_resolvents_scales_and_orders_are_what_they_say() -> None:
    gram = damped(make_problem().gram, 0.01)
    scale, _ = obs_scale(gram, "fc1")
    norm = gram.diagonal().sqrt()
    schur = 1 / torch.linalg.inv(gram / norm / norm[:, None] + 0.1 * torch.eye(32)).diagonal() - 0.1
    ratio = scale / norm / schur.sqrt()
    assert float(ratio.max() / ratio.min()) == pytest.approx(1.0)
    assert float((scale / norm).log().mean()) == pytest.approx(0.0, abs=1e-9)
    expected = 0.3 * torch.linalg.inv(gram + 0.3 * torch.eye(32))
    torch.testing.assert_close(resolvents(gram)(0.3), expected)
    values = torch.randn(3, 12)
    assert torch.equal(natural_order(values[:, strided_order(12, 4, values.device)], 4), values)


@pytest.mark.parametrize(("sparsity", "drift"), [("50%", 0.0), ("70%", 0.3), ("2:4", 0.3), ("4:8", 0.0)])
def test_proximal_beats_the_other_solvers(sparsity: str, drift: float) -> None:
    """On the mean of a few problems; single small ones are a lottery for every heuristic."""
    problem = make_problem(192, 64, drift=drift)

    def mean(method: str | Proximal) -> float:
        parts = (problem.slice(slice(start, start + 32)) for start in range(0, 192, 32))
        return sum(solve(part, sparsity, method).stats[0]["relative_error"] for part in parts)

    ours = mean(Proximal(shrinkage=0))  # the error that is compared is that of the same tokens
    assert ours <= mean("alps") * 1.02
    for name in ("wanda+refit", "sparsegpt+refit", "fista+refit", "admm"):
        assert ours < mean(name)


PATTERNS = ("50%", "2:4")
over_methods = pytest.mark.parametrize("method", ["proximal", "sparsegpt+refit", "wanda", "fista"])


def solved(problem: LayerProblem, rank: int, sparsity: str, method: str) -> tuple[Solution, LowRank | None, float]:
    """The sparse part, the low-rank one, and the relative error of their sum."""
    sparse, part = solve_low_rank(problem, parse_sparsity(sparsity), parse_method(method), rank)
    weight = sparse.weight if part is None else sparse.weight + part.product()
    return sparse, part, problem.relative_error(weight)


@over_methods
@pytest.mark.parametrize("sparsity", PATTERNS)
@pytest.mark.parametrize(("drift", "target"), DRIFTS[::2])
def test_a_low_rank_part_lowers_the_error(method: str, sparsity: str, drift: float, target: float) -> None:
    problem = make_problem(24, 32, drift=drift, target=target)
    plain = solve(problem, sparsity, method)
    before = plain.stats[0]["relative_error"]
    for rank in (1, 4, 12):
        sparse, part, error = solved(problem, rank, sparsity, method)
        assert part.b.shape[1] == part.a.shape[0] == rank
        assert error < before
        assert sparse.stats[0]["relative_error"] == pytest.approx(error, rel=1e-4)
        assert parse_sparsity(sparsity).satisfies(sparse.weight)
        assert not bool(sparse.weight[~sparse.mask].any())
        before = error
    for rank, asked in ((0, sparsity), (4, "0%")):
        sparse, part, _ = solved(problem, rank, asked, method)
        assert part is None
        assert torch.equal(sparse.weight, solve(problem, asked, method).weight)


@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("rows", [24, 40])
@pytest.mark.parametrize("sparsity", PATTERNS)
@pytest.mark.parametrize(("drift", "target"), DRIFTS)
def test_it_is_the_best_of_its_rank(rows: int, sparsity: str, drift: float, target: float, identity: bool) -> None:
    """Beside the sparse part: a truncated SVD, of an identity Gram as it is, else in whitened coordinates; fp64."""
    problem = replace(make_problem(rows, 32, drift=drift, target=target), tokens=None)
    if identity:
        problem = LayerProblem(problem.weight, torch.eye(32))
    sparse, part, _ = solved(problem, 5, sparsity, "wanda")
    gram = damped(problem.gram, 0.001)
    factor = torch.linalg.cholesky(gram)
    drifted = linear(problem) - problem.weight.double() @ problem.gram.double()
    wanted = problem.weight.double() + torch.linalg.solve(gram, drifted.T).T - sparse.weight.double()
    u, s, v = torch.linalg.svd(wanted if identity else wanted @ factor, full_matrices=False)
    best = (u[:, :5] * s[:5]) @ v[:5]
    found = part.product().double() if identity else part.product().double() @ factor
    assert float((found - best).norm()) < 1e-3 * float(best.norm())
    balanced = part.balanced()
    torch.testing.assert_close(balanced.product(), part.product(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(balanced.b.norm(dim=0), balanced.a.norm(dim=1))


@over_methods
@pytest.mark.parametrize("sparsity", ["80%", "1:4"])
def test_weights_that_are_sparse_plus_low_rank_are_found(method: str, sparsity: str) -> None:
    """Parts in turn alone do not find them: they begin with a sparse part that is far from the one drawn."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(64, 64, generator=generator)
    weight *= parse_sparsity(sparsity).project(weight.abs())
    weight += torch.randn(64, 3, generator=generator) @ torch.randn(3, 64, generator=generator)
    drawn = replace(make_problem(64, 64), weight=weight, energy=None, tokens=None)
    sparse, _, error = solved(drawn, 3, sparsity, method)
    assert error < 0.2 * sparse.stats[0]["steps"][-1]["path"][1]


def test_full_rank_leaves_no_error_and_dead_inputs_take_none_of_a_rank() -> None:
    problem = replace(make_problem(24, 32), tokens=None)
    assert solved(problem, 24, "2:4", "wanda")[2] < 1e-9
    gram = problem.gram.clone()
    gram[7] = gram[:, 7] = 0.0
    _, part, _ = solved(replace(problem, gram=gram), 3, "2:4", "wanda")
    assert not bool(part.a[:, 7].any())

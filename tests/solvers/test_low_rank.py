"""Sparse plus low rank: each part is the best given the other, and the error never rises."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from layer_problems import make_problem

from fistapruner import FistaPrunerError, LayerProblem
from fistapruner.core import parse_sparsity
from fistapruner.solvers import parse_method, solve
from fistapruner.solvers.low_rank import (
    ALTERNATIONS,
    LEVELS,
    RHO,
    STEPS,
    SparsePlusLowRank,
    _LowRankStep,
    _split,
    solve_low_rank,
)
from fistapruner.solvers.proximal import Proximal, strided_order

METHODS = ("proximal", "alps", "sparsegpt+refit", "wanda", "fista")
PATTERNS = ("50%", "2:4", "8:2:8")
DRIFTS = ((0.0, 1.0), (0.1, 0.5))


def solved(problem: LayerProblem, rank: int, sparsity: str, method: str, **how: int) -> SparsePlusLowRank:
    return solve_low_rank(problem, [parse_sparsity(sparsity)] * len(problem.rows), parse_method(method), rank, **how)


def exact(drift: float = 0.0, target: float = 1.0, rows: tuple[int, ...] = (24, 40), n: int = 32) -> LayerProblem:
    """A problem whose Gram is taken as exact, so that the low-rank part is the best on this very Gram."""
    return replace(make_problem(rows, n, drift=drift, target=target), tokens=None)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", PATTERNS)
@pytest.mark.parametrize(("drift", "target"), DRIFTS)
def test_error_never_rises_and_falls_below_the_sparse_part_alone(
    method: str, sparsity: str, drift: float, target: float
) -> None:
    problem = make_problem((24, 40), 32, drift=drift, target=target)
    plain, found = solve(problem, sparsity, method), solved(problem, 4, sparsity, method)
    for before, after, part in zip(plain.stats, found.sparse.stats, found.low_rank, strict=True):
        path = after["steps"][-1]["path"]
        assert path[0] == pytest.approx(before["relative_error"], rel=1e-5)
        assert all(late <= early * (1 + 1e-6) for early, late in itertools.pairwise(path))
        assert after["relative_error"] == path[-1] < before["relative_error"]
        assert part is not None
        assert part.b.shape[1] == part.a.shape[0] == 4
    errors = problem.relative_errors(found.weight(problem))
    assert errors == pytest.approx([stats["relative_error"] for stats in found.sparse.stats], rel=1e-5)
    for weight, mask in zip(found.sparse.weight.split((24, 40)), found.sparse.mask.split((24, 40)), strict=True):
        assert parse_sparsity(sparsity).satisfies(weight)
        assert not bool((weight[~mask] != 0).any())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", PATTERNS)
@pytest.mark.parametrize(("drift", "target"), DRIFTS)
def test_rank_zero_is_the_sparse_part_alone(method: str, sparsity: str, drift: float, target: float) -> None:
    problem = make_problem((24, 8), drift=drift, target=target)
    plain, found = solve(problem, sparsity, method), solved(problem, 0, sparsity, method)
    assert torch.equal(found.sparse.weight, plain.weight)
    assert torch.equal(found.weight(problem), plain.weight)
    assert found.low_rank == (None, None)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", PATTERNS)
@pytest.mark.parametrize(("drift", "target"), DRIFTS)
def test_sparse_part_is_what_the_method_finds_beside_the_low_rank_part(
    method: str, sparsity: str, drift: float, target: float
) -> None:
    """Of the first alternation beside nothing; of the third beside the second's, where that lowers the error."""
    problem = make_problem((24,), 32, drift=drift, target=target)
    first, second, third = (solved(problem, 4, sparsity, method, alternations=count) for count in (1, 2, 3))
    assert torch.equal(first.sparse.weight, solve(problem, sparsity, method).weight)
    (part,) = second.low_rank
    assert part is not None
    residual = replace(problem, weight=problem.weight - part.product())
    beside = solve(residual, sparsity, method)
    lower = residual.errors(beside.weight) < residual.errors(second.sparse.weight)
    assert torch.equal(third.sparse.weight, beside.weight if lower else second.sparse.weight)


@pytest.mark.parametrize("sparsity", PATTERNS)
@pytest.mark.parametrize(("drift", "target"), DRIFTS)
def test_kept_weights_are_least_squares_beside_the_low_rank_part(sparsity: str, drift: float, target: float) -> None:
    """Against normal equations of every row in fp64; the last low-rank part is little else than the one before."""
    problem = exact(drift, target, rows=(24,))
    found = solved(problem, 4, sparsity, "proximal+refit", alternations=4)
    (part,) = found.low_rank
    assert part is not None
    gram, linear = problem.gram.double(), problem.linear.double() - part.product().double() @ problem.gram.double()
    best = torch.zeros_like(linear)
    for row, kept in enumerate(found.sparse.mask):
        best[row, kept] = torch.linalg.solve(gram[kept][:, kept], linear[row, kept])
    total = problem.relative_errors(best.float() + part.product())
    assert found.sparse.stats[0]["relative_error"] == pytest.approx(total[0], rel=0.02)


@pytest.mark.parametrize("rows", [(24,), (40,)])
@pytest.mark.parametrize("sparsity", PATTERNS)
@pytest.mark.parametrize("alternations", [1, ALTERNATIONS])
@pytest.mark.parametrize(("drift", "target"), DRIFTS)
def test_low_rank_part_is_the_best_of_its_rank_beside_the_sparse_one(
    rows: tuple[int, ...], sparsity: str, alternations: int, drift: float, target: float
) -> None:
    """Against a truncated SVD in whitened coordinates in fp64, and its gradient in both factors is zero."""
    problem = exact(drift, target, rows)
    found = solved(problem, 5, sparsity, "wanda", alternations=alternations)
    (part,) = found.low_rank
    assert part is not None
    gram = problem.gram.double()
    gram = gram + 0.001 * gram.diagonal().mean() * torch.eye(len(gram))
    factor = torch.linalg.cholesky(gram)
    wanted = (problem.weight - found.sparse.weight).double()
    if problem.drift_gradient is not None:
        wanted = wanted + torch.linalg.solve(gram, problem.drift_gradient.double().T).T
    u, s, v = torch.linalg.svd(wanted @ factor, full_matrices=False)
    best = torch.linalg.solve(factor.T, ((u[:, :5] * s[:5]) @ v[:5]).T).T
    scale = float((best @ factor).norm())
    assert float(((part.product().double() - best) @ factor).norm()) < 1e-3 * scale
    gradient = (part.product().double() - wanted) @ gram
    size = float((wanted @ gram).norm())
    assert float((part.b.double().T @ gradient).norm()) < 1e-3 * size
    assert float((gradient @ part.a.double().T).norm()) < 1e-3 * size * float(part.a.norm())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", ["80%", "1:4", "8:2:8"])
def test_weights_that_are_sparse_plus_low_rank_are_found(method: str, sparsity: str) -> None:
    """Parts in turn alone do not find them: they begin with a sparse part that is far from the one drawn."""
    problem = exact(rows=(64,), n=64)
    generator = torch.Generator().manual_seed(3)
    sparse = torch.randn(64, 64, generator=generator)
    sparse *= parse_sparsity(sparsity).project(sparse.abs())
    low_rank = torch.randn(64, 3, generator=generator) @ torch.randn(3, 64, generator=generator)
    drawn = replace(problem, weight=sparse + low_rank, energy=None)
    once, found = (solved(drawn, 3, sparsity, method, alternations=count) for count in (1, ALTERNATIONS))
    assert found.sparse.stats[0]["relative_error"] < 0.2 * once.sparse.stats[0]["relative_error"]


@pytest.mark.parametrize("rank", [0, 3])
def test_splitting_is_admm_with_a_dual_that_keeps_its_size_as_the_penalty_grows(rank: int) -> None:
    """Against ADMM with the dual Y itself, in fp64, which has nothing to rescale: its Z is ``X + Y / rho``."""
    problem, pattern = make_problem((12,), 16), parse_sparsity("2:4")
    gram, wanted = problem.gram.double(), problem.weight.double()
    gram = gram / gram.diagonal().mean()
    identity, order = torch.eye(16, dtype=torch.float64), strided_order(16, 4, gram.device)

    def resolvent(rho: float) -> torch.Tensor:
        return (rho * torch.linalg.inv(gram + rho * identity))[order][:, order]

    found = _split(wanted, resolvent, [12], [pattern], rank, fast=False)

    basis = torch.randn(12, rank, generator=torch.Generator().manual_seed(0)).double()
    dense, dual, rho = wanted, torch.zeros_like(wanted), RHO[0]
    for step in range(LEVELS * STEPS):
        shifted = dense + dual / rho
        sparse = shifted * pattern.project(shifted.abs())
        dual = dual + rho * (dense - sparse)
        rho = RHO[0] * (RHO[1] / RHO[0]) ** (step // STEPS / (LEVELS - 1))
        start = sparse - dual / rho
        change = torch.linalg.solve(gram + rho * identity, gram @ (start - wanted).T).T  # without a low-rank part
        basis = torch.linalg.qr((start - wanted) @ (change.T @ basis)).Q
        dense = start - change + basis @ (basis.T @ change)
    assert torch.allclose(found, dense + dual / rho, atol=1e-9)


@pytest.mark.parametrize("sparsity", PATTERNS)
@pytest.mark.parametrize(("drift", "target"), DRIFTS)
def test_splitting_finds_the_same_in_other_units_of_the_inputs(sparsity: str, drift: float, target: float) -> None:
    """Powers of two round nothing, and ridges that depend on the units are left out."""
    problem = make_problem((12, 20), 32, drift=drift, target=target)
    units = 2.0 ** torch.randint(-3, 4, (32,), generator=torch.Generator().manual_seed(0))
    other = replace(
        problem,
        weight=problem.weight / units,
        gram=problem.gram * units * units[:, None],
        drift=None if problem.drift is None else problem.drift * units,
    )
    patterns, settings = [parse_sparsity(sparsity)] * 2, Proximal(damping=0.0, shrinkage=0.0, fast=False)
    ours, theirs = (_LowRankStep(each, settings).split(patterns, 3, [True, True]) for each in (problem, other))
    for one, two in zip(ours, theirs, strict=True):
        assert one is not None
        assert two is not None
        assert torch.allclose(two.product() * units, one.product(), rtol=1e-3, atol=1e-3)


def test_operators_of_a_group_are_solved_as_each_alone_with_any_mix_of_patterns() -> None:
    problem = make_problem((24, 16, 40, 8), 32, drift=0.1, target=0.5)
    patterns = [parse_sparsity(text) for text in ("2:4", "0%", "50%", "4:8")]
    together = solve_low_rank(problem, patterns, parse_method("proximal"), 4)
    for operator, pattern, part, stats in zip(
        problem.operators(), patterns, together.low_rank, together.sparse.stats, strict=True
    ):
        alone = solve_low_rank(operator, [pattern], parse_method("proximal"), 4)
        assert (part is None) == (alone.low_rank[0] is None) == (str(pattern) == "0%")
        if part is not None:
            assert stats["relative_error"] == pytest.approx(alone.sparse.stats[0]["relative_error"], rel=1e-3)


@pytest.mark.parametrize("method", ["proximal", "wanda"])
@pytest.mark.parametrize("rows", [(24,), (40,)])
def test_full_rank_leaves_no_error(method: str, rows: tuple[int, ...]) -> None:
    problem = exact(rows=rows)
    found = solved(problem, min(rows[0], 32), "2:4", method)
    assert found.sparse.stats[0]["relative_error"] < 1e-9


def test_a_higher_rank_has_a_lower_error() -> None:
    problem = make_problem((24, 40), 32, drift=0.1, target=0.5)
    errors = [
        [s["relative_error"] for s in solved(problem, rank, "2:4", "proximal").sparse.stats] for rank in (1, 4, 12)
    ]
    assert all(low > middle > high for low, middle, high in zip(*errors, strict=True))


def test_operators_without_zeros_get_no_low_rank_part_and_keep_their_weights() -> None:
    problem = make_problem((24, 40), 32)
    patterns = [parse_sparsity("0%"), parse_sparsity("2:4")]
    found = solve_low_rank(problem, patterns, parse_method("proximal"), 4)
    plain = solve(problem, patterns, "proximal")
    assert found.low_rank[0] is None
    assert found.low_rank[1] is not None
    assert torch.equal(found.sparse.weight[:24], plain.weight[:24])
    assert found.sparse.stats[0]["steps"][-1]["method"] == "proximal"


def test_inputs_that_are_always_zero_take_none_of_the_rank() -> None:
    problem = make_problem((24,), 32)
    gram = problem.gram.clone()
    gram[7], gram[:, 7] = 0.0, 0.0
    (part,) = solved(replace(problem, gram=gram), 3, "2:4", "wanda").low_rank
    assert part is not None
    assert not bool(part.a[:, 7].any())


def test_same_bits_every_time() -> None:
    one, two = (solved(make_problem((16, 8)), 3, "50%", "proximal") for _ in range(2))
    assert torch.equal(one.weight(make_problem((16, 8))), two.weight(make_problem((16, 8))))


def test_a_rank_that_an_operator_has_not_is_refused() -> None:
    for rank, shape, most in ((-1, "operator0 is 24 x 32", 24), (9, "operator1 is 8 x 32", 8)):
        with pytest.raises(FistaPrunerError, match=rf"{shape}: .* a rank from 0 to {most}, not {rank}"):
            solved(make_problem((24, 8)), rank, "2:4", "wanda")


def test_alternations_go_on_lowering_the_error() -> None:
    problem = make_problem((48,), 64)
    path = solved(problem, 4, "2:4", "proximal").sparse.stats[0]["steps"][-1]["path"]
    assert len(path) == 1 + ALTERNATIONS
    assert path[-1] < path[1]


def test_balanced_factors_have_the_same_product_and_norms() -> None:
    (part,) = solved(make_problem((24,)), 4, "2:4", "wanda").low_rank
    assert part is not None
    balanced = part.balanced()
    assert torch.allclose(balanced.product(), part.product(), atol=1e-5)
    assert torch.allclose(balanced.b.norm(dim=0), balanced.a.norm(dim=1))

"""Grams that break naive solvers: dead, collinear, rank-deficient, massive; and operators of awkward shapes."""

from __future__ import annotations

import pytest
import torch
from fistapruner.solvers.conditioning import regularised_gram
from layer_problems import activations
from torch import Tensor

from fistapruner import FistaPrunerError, LayerProblem
from fistapruner.core.linalg import damped_cholesky, largest_eigenvalue
from fistapruner.solvers import METHODS, solve

CHAINS = [name for name, method in METHODS.items() if not method.refines]
CHAINS += [f"wanda+{name}" for name, method in METHODS.items() if method.refines]


def dead(inputs: Tensor) -> Tensor:
    inputs[:, 5:9] = 0
    return inputs


def all_dead(inputs: Tensor) -> Tensor:
    return torch.zeros_like(inputs)


def collinear(inputs: Tensor) -> Tensor:
    inputs[:, 1] = inputs[:, 0]
    inputs[:, 20] = -3 * inputs[:, 7]
    return inputs


def few_tokens(inputs: Tensor) -> Tensor:
    return inputs[:5]


def massive(inputs: Tensor) -> Tensor:
    inputs[:, 4] *= 3e3
    return inputs


def tiny(inputs: Tensor) -> Tensor:
    return inputs * 1e-8


HARD = [dead, all_dead, collinear, few_tokens, massive, tiny]


@pytest.mark.parametrize("spoil", HARD, ids=lambda f: f.__name__)
@pytest.mark.parametrize("chain", [*CHAINS, "proximal+swap"])
@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
def test_hard_grams(chain: str, spoil: object, sparsity: str) -> None:
    inputs = spoil(activations(40, 300))  # type: ignore[operator]
    weight = torch.randn(13, 40, generator=torch.Generator().manual_seed(0))
    problem = LayerProblem.from_activations(weight, inputs, name="layers.3.down_proj")
    solution = solve(problem, sparsity, chain)
    assert bool(torch.isfinite(solution.weight).all())
    assert int((solution.weight == 0).sum()) >= 13 * 20
    assert solution.stats[0]["relative_error"] <= 1.0
    assert all("layers.3.down_proj" in warning for warning in solution.warnings)


@pytest.mark.parametrize("chain", [chain for chain in CHAINS if chain != "magnitude"])
@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
def test_weights_of_dead_inputs_go_first(chain: str, sparsity: str) -> None:
    """They change no output, so the error is that of a problem without them."""
    inputs = activations(48, 400)
    inputs[:, ::4] = 0
    weight = torch.randn(13, 48, generator=torch.Generator().manual_seed(0))
    solution = solve(LayerProblem.from_activations(weight, inputs), sparsity, chain)
    assert int(solution.mask[:, ::4].sum()) == 0
    assert torch.equal(solution.weight == 0, ~solution.mask)
    if sparsity == "50%":
        alive = torch.arange(48) % 4 > 0
        without = solve(LayerProblem.from_activations(weight[:, alive], inputs[:, alive]), 1 / 3, chain)
        assert solution.stats[0]["relative_error"] == pytest.approx(without.stats[0]["relative_error"], rel=0.1)


@pytest.mark.parametrize("chain", ["proximal", "wanda+refit"])
def test_dead_inputs_beside_a_massive_one_do_not_hold_the_others_back(chain: str) -> None:
    """The ridge for the sampling error is that of a problem without them, and so is the error."""
    inputs = activations(96, 1000)
    inputs[:, 20] *= 300
    inputs[:, 48:] = 0
    gram = inputs.T @ inputs / 1000
    ridge = (regularised_gram(gram, 1000, 0.0, 3.0) - gram)[:48, :48].diagonal()
    alone = (regularised_gram(gram[:48, :48], 1000, 0.0, 3.0) - gram[:48, :48]).diagonal()
    assert torch.allclose(ridge[:20], alone[:20], rtol=1e-3)
    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(0))
    found = solve(LayerProblem.from_activations(weight, inputs), 0.75, chain)
    without = solve(LayerProblem.from_activations(weight[:, :48], inputs[:, :48]), 0.5, chain)
    assert found.stats[0]["relative_error"] == pytest.approx(without.stats[0]["relative_error"], rel=0.1)


def test_weights_of_dead_inputs_that_stay_are_the_dense_ones() -> None:
    """Where more of them are dead than are to go: the number of zeros stays exact."""
    inputs = activations(40, 300)
    inputs[:, 8:] = 0
    weight = torch.randn(13, 40, generator=torch.Generator().manual_seed(0))
    for chain in CHAINS:
        solution = solve(LayerProblem.from_activations(weight, inputs), "50%", chain)
        assert int((solution.weight == 0).sum()) == 13 * 20
        stays = solution.mask & (torch.arange(40) >= 8)
        assert torch.equal(solution.weight[stays], weight[stays])
        if "proximal" in chain:  # by and large the largest of them
            assert weight[stays].abs().mean() > 3 * weight[~solution.mask & (torch.arange(40) >= 8)].abs().mean()


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("shape", [(1, 8), (1, 1), (3, 130), (129, 7), (200, 257)])
def test_awkward_shapes(chain: str, shape: tuple[int, int]) -> None:
    rows, columns = shape
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    problem = LayerProblem.from_activations(
        weight, activations(columns, 400) if columns > 3 else torch.randn(50, columns)
    )
    solution = solve(problem, 0.5, chain)
    assert int((~solution.mask).sum()) == round(0.5 * rows * columns)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_and_activations(dtype: torch.dtype) -> None:
    weight, inputs = (
        torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).to(dtype),
        activations(16, 100).to(dtype),
    )
    problem = LayerProblem.from_activations(weight, inputs)
    assert problem.weight.dtype == torch.float32
    for chain in CHAINS:
        assert solve(problem, 0.5, chain).stats[0]["relative_error"] < 1


def test_damping_is_raised_step_by_step_and_said() -> None:
    gram = torch.ones(6, 6)
    factor, used, warnings = damped_cholesky(gram, 0.0, "layers.0.q_proj")
    assert used > 0
    assert len(warnings) == 1
    assert "layers.0.q_proj" in warnings[0]
    assert torch.allclose(factor @ factor.T, gram + used * torch.eye(6), atol=1e-5)


def test_a_large_damping_is_taken_as_it_is() -> None:
    factor, used, warnings = damped_cholesky(torch.eye(6), 20.0, "layers.0.q_proj")
    assert (used, warnings) == (20.0, [])
    assert torch.allclose(factor @ factor.T, 21 * torch.eye(6))


def test_a_matrix_that_is_no_gram_is_refused() -> None:
    with pytest.raises(FistaPrunerError, match="no Cholesky factor"):
        damped_cholesky(torch.tensor([[1.0, 50.0], [50.0, 1.0]]), 0.01, "layers.0.q_proj")


def test_singular_support_is_damped_with_a_warning() -> None:
    inputs = collinear(activations(24, 200))
    problem = LayerProblem.from_activations(
        torch.randn(4, 24, generator=torch.Generator().manual_seed(0)), inputs, name="fc1"
    )
    solution = solve(problem, 0.1, ["wanda", {"refit": {"solver": "exact", "shrinkage": 0}}])
    assert any("fc1" in warning for warning in solution.warnings)
    assert bool(torch.isfinite(solution.weight).all())


@pytest.mark.parametrize("n", [1, 3, 40])
def test_largest_eigenvalue_is_a_safe_bound(n: int) -> None:
    inputs = activations(n, 200) if n > 3 else torch.randn(200, n)
    gram = inputs.T @ inputs
    exact = float(torch.linalg.eigvalsh(gram.double())[-1])
    assert exact * (1 - 1e-5) <= float(largest_eigenvalue(gram)) <= exact * 1.01

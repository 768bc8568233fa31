"""The layer problem equals its definition on explicit activations, in fp64."""

import subprocess
import sys
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fistapruner import FistaPrunerError
from fistapruner.core import LayerProblem, ProblemSums, Ridge
from fistapruner.core.linalg import damped_cholesky, largest_eigenvalue
from fistapruner.core.problem import unweighted
from fistapruner.core.sums import DriftFrom
from fistapruner.solvers import solve
from layer_problems import activations, damped, make_problem

TOKENS, INPUTS, ROWS = 60, 10, 7


class Data(NamedTuple):
    """Activations by tokens, and the outputs that are wanted of the operator."""

    weight: Tensor
    seen: Tensor
    dense: Tensor
    residual: Tensor | None
    wanted: Tensor
    problem: LayerProblem

    def row_errors(self, weight: Tensor) -> Tensor:
        """Mean squared output error of each row: (m,) fp64."""
        return (self.seen.double() @ weight.double().T - self.wanted).square().sum(0) / TOKENS

    def energy(self) -> Tensor:
        return (self.dense.double() @ self.weight.double().T).square().sum(0) / TOKENS


def draw(target: float = 1.0, rows: int = ROWS, corrected: bool = False) -> Data:
    generator = torch.Generator().manual_seed(0)
    weight, dense = torch.randn(rows, INPUTS, generator=generator), torch.randn(TOKENS, INPUTS, generator=generator)
    seen = dense + 0.2 * torch.randn(TOKENS, INPUTS, generator=generator)
    residual = torch.randn(TOKENS, rows, generator=generator) if corrected else None
    drift = (dense - seen).double() @ weight.double().T + (0.0 if residual is None else residual.double())
    wanted = seen.double() @ weight.double().T + target * drift
    problem = LayerProblem.from_activations(weight, seen, dense, residual, target=target, name="fc1")
    return Data(weight, seen, dense, residual, wanted, problem)


CASES = [(0.0, ROWS, False), (0.3, ROWS, False), (1.0, ROWS, False), (1.0, 20, False), (0.3, 20, False), (0.5, 7, True)]
"""Target, rows, corrected. Drift is found from outputs where there are fewer of them than inputs, else from inputs."""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_errors_and_gradient_are_those_of_the_activations(case: tuple[float, int, bool]) -> None:
    data = draw(*case)
    problem = data.problem
    pruned = (data.weight * (data.weight.abs() > 0.5)).double().requires_grad_()
    rows, weight = data.row_errors(pruned), pruned.detach().float()
    rows.sum().backward()
    torch.testing.assert_close(problem.gradient(weight).double(), pruned.grad / 2, rtol=1e-4, atol=1e-4)
    expected, energy = rows.detach(), float(data.energy().sum())
    torch.testing.assert_close(problem.row_errors(weight), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(problem.row_errors(weight, problem.gradient(weight)), expected, rtol=1e-4, atol=1e-5)
    assert problem.error(weight) == pytest.approx(float(expected.sum()), rel=1e-4)
    assert problem.relative_error(weight) == pytest.approx(float(expected.sum()) / energy, rel=1e-4)
    torch.testing.assert_close(problem.output_energy, data.energy(), rtol=1e-4, atol=1e-5)
    left = float(data.row_errors(data.weight).sum()) / energy
    assert problem.dense_error() == (pytest.approx(left, rel=1e-4) if case[0] else None)
    undrifted = data._replace(wanted=data.seen.double() @ data.weight.double().T)
    found = problem.without_drift().row_errors(weight)
    torch.testing.assert_close(found, undrifted.row_errors(weight), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("ridge", [Ridge(), Ridge(mean=0.1), Ridge(own=0.1), Ridge(mean=0.001, sampling=1.0)], ids=str)
def test_the_regularised_problem_has_the_objective_of_error_plus_ridge(
    case: tuple[float, int, bool], ridge: Ridge
) -> None:
    """``||V - C||_H^2`` differs from ``f(V) + ridge`` by the same for every V."""
    data = draw(*case)
    centre, gram, warnings = data.problem.regularised(ridge)
    exact = data.seen.double().T @ data.seen.double() / TOKENS
    diagonal = exact.diagonal()
    added = ridge.own * diagonal + ridge.mean * diagonal.mean()
    added += ridge.sampling * INPUTS / TOKENS * diagonal.log().mean().exp()
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(4):
        weight = torch.randn(data.weight.shape, generator=generator, dtype=torch.float64)
        towards = ((weight - data.weight).square() * added).sum(1)
        moved = weight - centre.double()
        found.append((moved @ gram.double() * moved).sum(1) - data.row_errors(weight) - towards)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-3, atol=1e-3 * float(data.energy().max()))
    assert not warnings


def test_a_singular_gram_gets_a_larger_ridge_only_where_drift_needs_it() -> None:
    data = draw()
    singular = replace(data.problem, gram=torch.ones(INPUTS, INPUTS), cache={})
    for _ in range(2):  # the second time from the cache
        (warning,) = singular.regularised(Ridge()).warnings
        assert "fc1" in warning
    assert not singular.without_drift().regularised(Ridge()).warnings


def test_batches_add_up_and_bf16_activations_lose_nothing() -> None:
    weight, seen, dense = (part.bfloat16() for part in draw()[:3])
    told: dict[DriftFrom, Tensor] = {"inputs": dense, "outputs": dense @ weight.T}
    exact = seen.double().T @ seen.double() / TOKENS
    drift = weight.double() @ (dense - seen).double().T @ seen.double() / TOKENS
    for source, values in told.items():
        sums = ProblemSums(weight.float(), drift_from=source)
        for begin in range(0, TOKENS, 16):
            sums.add(seen[begin : begin + 16], values[begin : begin + 16])
        kept, problem = sums.problem("fc1", 0.5), sums.problem("fc1", 0.5, release=True)
        assert problem.tokens == TOKENS
        torch.testing.assert_close(problem.gram.double(), exact, rtol=1e-5, atol=1e-5)
        assert torch.equal(problem.gram, problem.gram.T)
        assert torch.equal(kept.gram, problem.gram)
        assert torch.equal(kept.drift, problem.drift)
        torch.testing.assert_close(problem.drift.double(), drift / 2, rtol=0, atol=0.01 * float(exact.max()))


@pytest.mark.parametrize("source", ["inputs", "outputs"])
def test_drift_told_by_the_first_tokens_is_that_of_these(source: DriftFrom) -> None:
    """The Gram is of all tokens; drift, its energy and the outputs' are of those that the dense model saw."""
    generator = torch.Generator().manual_seed(3)
    weight, seen, moved = (torch.randn(*shape, generator=generator) for shape in ((12, 8), (900, 8), (900, 8)))
    dense = seen + 0.1 * moved
    told = dense if source == "inputs" else dense @ weight.T
    sums = ProblemSums(weight, drift_from=source)
    with pytest.raises(FistaPrunerError, match="fc1: no calibration tokens"):
        sums.problem("fc1")
    for start in range(0, 900, 100):
        batch = slice(start, start + 100)
        sums.add(seen[batch], told[batch] if start < 300 else None)
    found, part = sums.problem(), LayerProblem.from_activations(weight, seen[:300], dense[:300])
    torch.testing.assert_close(found.gram, LayerProblem.from_activations(weight, seen).gram)
    for name in ("drift", "drift_energy"):
        torch.testing.assert_close(getattr(found, name), getattr(part, name), rtol=1e-3, atol=1e-4)
    with pytest.raises(FistaPrunerError, match=f"dense {source} are for the first batches"):
        sums.add(seen, told)
    never = ProblemSums(torch.ones(2, 3), drift_from=source)
    never.add(torch.ones(4, 3))
    with pytest.raises(FistaPrunerError, match=r"fc1: no calibration tokens .* in the dense model"):
        never.problem("fc1")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parts_of_a_problem_have_the_errors_of_the_whole(case: tuple[float, int, bool]) -> None:
    """Rows, input channels, and the same problem around other weights."""
    problem = draw(*case).problem
    generator = torch.Generator().manual_seed(1)
    weight, other = torch.randn(2, *problem.shape, generator=generator)
    expected = problem.row_errors(weight)
    rows = torch.tensor([5, 0, 3])
    assert problem.slice(slice(2, 6), "q").name == "q"
    torch.testing.assert_close(problem.slice(slice(2, 6)).row_errors(weight[2:6]), expected[2:6])
    torch.testing.assert_close(problem.slice(rows).row_errors(weight[rows]), expected[rows])
    around = problem.around(other)
    assert torch.equal(around.weight, other)
    torch.testing.assert_close(around.row_errors(weight), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(around.gradient(weight), problem.gradient(weight), rtol=1e-4, atol=1e-3)
    assert around.relative_error(weight) == pytest.approx(problem.relative_error(weight), rel=1e-4)
    keep = torch.tensor([8, 1, 2, 5])
    small, padded = problem.restricted(keep), torch.zeros(problem.shape)
    padded[:, keep] = weight[:, keep]
    torch.testing.assert_close(small.row_errors(weight[:, keep]), problem.row_errors(padded), rtol=1e-4, atol=1e-4)
    dropped = torch.zeros(problem.shape)
    dropped[:, keep] = problem.weight[:, keep]
    assert small.dense_error() == pytest.approx(problem.relative_error(dropped), rel=1e-4)
    for wrong in ([], [1, 1], [-1], [INPUTS]):
        with pytest.raises(FistaPrunerError, match=f"fc1.*{INPUTS} inputs"):
            problem.restricted(torch.tensor(wrong, dtype=torch.long))


def test_weighted_rows() -> None:
    """Errors are weighted; where rows do not compete the solution is the same; relative errors are without weights."""
    problem = draw(0.5).problem
    importance = torch.rand(ROWS, generator=torch.Generator().manual_seed(5)) + 0.1
    weighted, root = problem.weighted(importance), importance.sqrt()[:, None]
    weight = problem.weight * (problem.weight.abs() > 0.5)
    expected = problem.row_errors(weight) * importance
    torch.testing.assert_close(weighted.row_errors(weight * root), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weighted.gradient(weight * root), problem.gradient(weight) * root, rtol=1e-4, atol=1e-5)
    plain, other = solve(problem, "1:2", "alps"), solve(weighted, "1:2", "alps")
    assert torch.equal(plain.mask, other.mask)
    torch.testing.assert_close(unweighted(other.weight.clone(), importance), plain.weight, rtol=1e-3, atol=1e-4)
    error = problem.relative_error(plain.weight)
    assert other.stats[0]["relative_error"] == pytest.approx(error, rel=1e-4)
    assert weighted.dense_error() == pytest.approx(problem.dense_error(), rel=1e-4)
    twice = weighted.weighted(importance.flip(0)).slice(slice(1, 3))
    scaled = (plain.weight * root * root.flip(0))[1:3]
    assert twice.relative_error(scaled) == pytest.approx(problem.slice(slice(1, 3)).relative_error(plain.weight[1:3]))
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(FistaPrunerError, match="fc1: the importance"):
            problem.weighted(importance.index_fill(0, torch.tensor([2]), wrong))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gram": torch.zeros(3, 3)}, r"gram is \(3, 3\), expected \(10, 10\)"),
        ({"drift": torch.zeros(ROWS, INPUTS)}, "drift and drift_energy"),
        ({"drift": torch.zeros(ROWS, INPUTS), "drift_energy": torch.ones(1)}, r"drift_energy is \(1,\)"),
        ({"weight": torch.ones(INPUTS)}, r"weight is \(10,\)"),
        ({"weight": torch.ones(ROWS, INPUTS, dtype=torch.int8)}, r"weight is torch\.int8"),
        ({"gram": torch.eye(INPUTS).numpy()}, "gram is ndarray"),
        ({"gram": torch.eye(INPUTS, device="meta")}, "weight is on cpu, its gram on meta"),
        ([torch.ones(2, 3), torch.ones(5, 4)], r"inputs is \(5, 4\), expected \(5, 3\)"),
        ([torch.ones(2, 3), torch.ones(1, 5, 3)], r"inputs is \(1, 5, 3\)"),
        ([torch.ones(2, 3), torch.ones(5, 3), torch.ones(4, 3)], r"dense_inputs is \(4, 3\), expected \(5, 3\)"),
        ([torch.ones(2, 3), *[torch.ones(5, 3)] * 3], r"residual is \(5, 3\), expected \(5, 2\)"),
        ([torch.ones(2, 3), torch.ones(5, 3), None, torch.ones(5, 2)], "residual .* without dense_inputs"),
        ([torch.eye(3) / 0, torch.ones(5, 3)], "the weights contain NaN"),
        ([torch.ones(2, 3), torch.ones(5, 3) / 0], "the Gram .* NaN or infinite"),
    ],
)
def test_tensors_that_do_not_fit_are_named(given: Any, message: str) -> None:
    """Those of a problem by name, and activations in the order of the call."""
    fields = {"weight": draw().weight, "gram": torch.eye(INPUTS), **given} if isinstance(given, dict) else {}
    make, arguments = (LayerProblem, ()) if fields else (LayerProblem.from_activations, given)
    with pytest.raises(FistaPrunerError, match=f"fc1: .*{message}"):
        make(*arguments, **fields, name="fc1")


def test_other_types_and_gradients_become_plain_fp32() -> None:
    weight, seen, dense = draw()[:3]
    expected = LayerProblem.from_activations(weight, seen, dense)
    drift, energy = expected.drift, expected.drift_energy
    other = LayerProblem.from_activations(*(part.double().requires_grad_() for part in (weight, seen, dense)))
    for made in (other, LayerProblem(weight.half(), expected.gram.double(), drift, energy)):
        for tensor in (made.weight, made.gram, made.drift):
            assert (tensor.dtype, tensor.requires_grad) == (torch.float32, False)
    torch.testing.assert_close(other.gram, expected.gram)
    same = LayerProblem(expected.weight, expected.gram)
    assert same.gram.data_ptr() == expected.gram.data_ptr()  # nothing is copied that need not be
    assert expected.to("cpu").relative_error(weight) == expected.relative_error(weight)


def test_damping_is_raised_step_by_step_and_told() -> None:
    factor, used, (warning,) = damped_cholesky(torch.ones(6, 6), 0.0, "fc1")
    assert used > 0
    assert "fc1" in warning
    torch.testing.assert_close((factor @ factor.T).double(), damped(torch.ones(6, 6), used), rtol=1e-5, atol=1e-5)
    factor, used, warnings = damped_cholesky(torch.eye(6), 20.0, "fc1")
    assert (used, warnings) == (20.0, [])
    torch.testing.assert_close(factor @ factor.T, 21 * torch.eye(6))
    with pytest.raises(FistaPrunerError, match="fc1: the Gram has no Cholesky factor"):
        damped_cholesky(torch.tensor([[1.0, 50.0], [50.0, 1.0]]), 0.01, "fc1")


@pytest.mark.parametrize("n", [1, 3, 40])
def test_the_largest_eigenvalue_is_a_safe_bound(n: int) -> None:
    inputs = activations(n, 200)
    gram = inputs.T @ inputs
    exact = float(torch.linalg.eigvalsh(gram.double())[-1])
    assert exact * (1 - 1e-5) <= float(largest_eigenvalue(gram)) <= exact * 1.01


def test_a_notebook_needs_torch_only() -> None:
    """Importing both rooms and solving with plain tensors loads no recipe, no pydantic and no transformers."""
    program = """
import sys, torch
from fistapruner.core import LayerProblem
from fistapruner.solvers import METHODS, solve
problem = LayerProblem.from_activations(torch.randn(8, 16), torch.randn(100, 16))
for name, method in METHODS.items():
    solve(problem, "2:4", f"wanda+{name}" if method.refines else name)
heavy = ["pydantic", "transformers", "yaml", "safetensors", "fistapruner.settings", "fistapruner.models"]
print([name for name in heavy if name in sys.modules])
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_what_depends_on_the_gram_alone_is_computed_once() -> None:
    problem = replace(make_problem(), cache={})
    counted: list[str] = []
    for part in (problem.slice(slice(0, 8)), problem.slice(slice(8, 24)), problem.without_drift()):
        part.cached("key", lambda: counted.append("computed"))
    assert counted == ["computed"]
    assert problem.regularised(Ridge(mean=0.1)).gram is problem.slice(slice(0, 8)).regularised(Ridge(mean=0.1)).gram
    assert problem.restricted(torch.arange(4)).cache is None


def test_an_error_of_an_operator_without_outputs_is_one() -> None:
    """Its target is the drift of the hidden states alone, which is no share of nothing."""
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    problem = LayerProblem.from_activations(torch.zeros(2, 4), inputs, inputs, torch.ones(8, 2), target=0.5)
    assert problem.dense_error() == solve(problem, "50%", "wanda").stats[0]["relative_error"] == 1.0
    assert LayerProblem.from_activations(torch.zeros(2, 4), inputs).relative_error(torch.zeros(2, 4)) == 0.0

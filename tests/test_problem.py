"""The layer problem equals its definition on explicit activations."""

from __future__ import annotations

import pytest
import torch

from fistapruner import FistaPrunerError, LayerProblem
from fistapruner.core import ProblemSums
from fistapruner.core.linalg import fast_products
from fistapruner.core.problem import unweighted
from fistapruner.core.sums import DriftFrom
from fistapruner.solvers import solve

TOKENS, INPUTS, ROWS = 60, 10, 7


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(TOKENS, INPUTS, generator=generator)
    return (
        torch.randn(ROWS, INPUTS, generator=generator),
        dense + 0.2 * torch.randn(TOKENS, INPUTS, generator=generator),
        dense,
    )


def check_against_activations(problem: LayerProblem, data: tuple[torch.Tensor, ...], wanted: torch.Tensor) -> None:
    """Error, energy and gradient of a problem whose outputs should be ``wanted`` (TOKENS, ROWS), by their
    definitions."""
    weight, seen, dense = data
    pruned = (weight * (weight.abs() > 0.5)).double().requires_grad_()
    rows = (seen.double() @ pruned.T - wanted).square().sum(0) / TOKENS
    assert torch.allclose(problem.row_errors(pruned.detach().float()), rows, rtol=1e-4)
    energy = (dense.double() @ weight.double().T).square().sum() / TOKENS
    assert problem.relative_errors(pruned.detach().float())[0] == pytest.approx(
        float(rows.detach().sum() / energy), rel=1e-4
    )
    left = problem.dense_errors()
    assert (left is None) == (problem.target == 0.0)
    if left is not None:
        dense_rows = (seen.double() @ weight.double().T - wanted).square().sum() / TOKENS
        assert left[0] == pytest.approx(float(dense_rows / energy), rel=1e-4)
    rows.sum().backward()
    assert pruned.grad is not None
    assert torch.allclose(problem.gradient(pruned.detach().float()).double(), pruned.grad / 2, atol=1e-4)
    assert torch.allclose(problem.gradient(weight), -problem.linear + weight @ problem.gram, atol=1e-4)


@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows", [ROWS, 2 * INPUTS])
def test_error_energy_and_gradient_are_those_of_the_activations(
    data: tuple[torch.Tensor, ...], target: float, rows: int
) -> None:
    """Drift is found from outputs where there are fewer of them than inputs, else from inputs."""
    _, seen, dense = data
    weight = torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(2))
    data = weight, seen, dense
    problem = LayerProblem.from_activations(weight, seen, dense, target=target)
    wanted = target * dense.double() @ weight.double().T + (1 - target) * seen.double() @ weight.double().T
    check_against_activations(problem, data, wanted)


@pytest.mark.parametrize("target", [0.5, 1.0])
def test_what_outputs_are_added_to_may_be_part_of_the_target(data: tuple[torch.Tensor, ...], target: float) -> None:
    weight, seen, dense = data
    added_to, added_to_dense = torch.randn(2, TOKENS, ROWS, generator=torch.Generator().manual_seed(1)).double()
    problem = LayerProblem.from_activations(weight, seen, dense, (added_to_dense - added_to).float(), target=target)
    after = target * (dense.double() @ weight.double().T + added_to_dense) + (1 - target) * (
        seen.double() @ weight.double().T + added_to
    )
    check_against_activations(problem, data, after - added_to)


def test_batches_add_up_and_bf16_activations_lose_nothing(data: tuple[torch.Tensor, ...]) -> None:
    weight, seen, dense = (part.bfloat16() for part in data)
    told: dict[DriftFrom, torch.Tensor] = {"inputs": dense, "outputs": dense @ weight.T}
    exact = seen.double().T @ seen.double() / TOKENS
    drift = weight.double() @ (dense - seen).double().T @ seen.double() / TOKENS
    for source, values in told.items():
        sums = ProblemSums(weight.float(), drift_from=source)
        for begin in range(0, TOKENS, 16):
            sums.add(seen[begin : begin + 16], values[begin : begin + 16])
        problem = sums.problem(("q",), (ROWS,), 0.5)
        assert problem.tokens == TOKENS
        assert torch.allclose(problem.gram.double(), exact, rtol=1e-5, atol=1e-5)
        assert torch.equal(problem.gram, problem.gram.T)
        assert problem.drift is not None
        assert torch.allclose(problem.drift.double(), drift, atol=0.01 * float(exact.diagonal().max())), source


def test_operators_are_views_of_the_stack(data: tuple[torch.Tensor, ...]) -> None:
    weight, seen, dense = data
    whole = LayerProblem.from_activations(weight, seen, dense)
    problem = LayerProblem(
        whole.weight,
        whole.gram,
        whole.drift,
        whole.drift_energy,
        whole.energy,
        names=("q", "k"),
        rows=(4, 3),
        tokens=TOKENS,
    )
    pruned = weight * (weight.abs() > 0.5)
    alone = [
        part.errors(pruned[rows])[0] for part, rows in zip(problem.operators(), (slice(0, 4), slice(4, 7)), strict=True)
    ]
    assert problem.errors(pruned) == pytest.approx(alone)
    assert [part.label for part in problem.operators()] == ["q", "k"]
    assert problem.label == "q+k"
    assert problem.to("cpu").relative_errors(pruned) == problem.relative_errors(pruned)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gram": torch.zeros(3, 3)}, r"Gram is \(3, 3\)"),
        ({"rows": (3, 3)}, "rows"),
        ({"drift": torch.zeros(ROWS, INPUTS)}, "come together"),
        ({"drift": torch.zeros(2, 2), "drift_energy": torch.zeros(ROWS)}, r"drift is \(2, 2\)"),
        ({"target": 1.5}, "target 1.5"),
        ({"weight": torch.ones(INPUTS)}, r"weight is \(10,\), expected \(outputs, inputs\)"),
        ({"weight": torch.ones(0, INPUTS)}, r"weight is \(0, 10\)"),
        (
            {"weight": torch.ones(ROWS, INPUTS, dtype=torch.int8)},
            "weight is torch.int8, expected a floating-point tensor",
        ),
        ({"gram": torch.eye(INPUTS).numpy()}, "gram is ndarray, expected a floating-point tensor"),
        ({"energy": torch.ones(3)}, r"energy is \(3,\), expected \(7,\)"),
        (
            {"drift": torch.zeros(ROWS, INPUTS), "drift_energy": torch.ones(1)},
            r"drift_energy is \(1,\), expected \(7,\)",
        ),
        ({"gram": torch.eye(INPUTS, device="meta")}, "weight is on cpu, its gram on meta"),
        ({"tokens": 0}, "tokens 0 is not a number"),
        ({"rows": (8, -1), "names": ("layers.1.fc1", "fc2")}, "rows"),
    ],
)
def test_what_does_not_fit_is_refused(data: tuple[torch.Tensor, ...], change: dict[str, object], message: str) -> None:
    fields: dict[str, object] = {"weight": data[0], "gram": torch.eye(INPUTS), "names": ("layers.1.fc1",)}
    with pytest.raises(FistaPrunerError, match=message) as error:
        LayerProblem(**{**fields, **change})  # type: ignore[arg-type]
    assert "layers.1.fc1" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3), torch.ones(5, 4)), r"inputs is \(5, 4\), expected \(tokens, 3\)"),
        ((torch.ones(2, 3), torch.ones(1, 5, 3)), r"inputs is \(1, 5, 3\), expected \(tokens, 3\)"),
        ((torch.ones(3), torch.ones(5, 3)), r"weight is \(3,\), expected \(outputs, inputs\)"),
        ((torch.ones(2, 3), torch.ones(5, 3), torch.ones(4, 3)), r"dense_inputs is \(4, 3\), expected \(5, 3\)"),
        (
            (torch.ones(2, 3), torch.ones(5, 3), torch.ones(5, 3), torch.ones(5, 3)),
            r"residual is \(5, 3\), expected \(5, 2\)",
        ),
        ((torch.ones(2, 3), torch.ones(5, 3), None, torch.ones(5, 2)), "residual is given without dense_inputs"),
        (
            (torch.ones(2, 3), torch.ones(5, 3, dtype=torch.long)),
            "inputs is torch.int64, expected a floating-point tensor",
        ),
    ],
)
def test_activations_that_do_not_fit_are_refused(arguments: tuple[torch.Tensor, ...], message: str) -> None:
    with pytest.raises(FistaPrunerError, match=f"fc1: .*{message}"):
        LayerProblem.from_activations(*arguments, name="fc1")


def test_other_types_and_gradients_become_plain_fp32(data: tuple[torch.Tensor, ...]) -> None:
    weight, seen, dense = (part.double().requires_grad_() for part in data)
    problem = LayerProblem.from_activations(weight, seen, dense)
    expected = LayerProblem.from_activations(*data)
    for made in (problem, LayerProblem(weight.half(), expected.gram.double(), weight, expected.drift_energy)):
        for tensor in (made.weight, made.gram, made.drift):
            assert tensor is not None
            assert tensor.dtype == torch.float32
            assert not tensor.requires_grad
    assert torch.equal(problem.gram, expected.gram)
    plain = LayerProblem(expected.weight, expected.gram)
    assert plain.weight is expected.weight  # nothing is copied that need not be
    assert plain.gram is expected.gram


def test_nan_and_infinity_are_refused_by_name(data: tuple[torch.Tensor, ...]) -> None:
    weight, seen, _ = data
    spoiled = weight.clone()
    spoiled[5, 2] = float("nan")
    problem = LayerProblem(
        spoiled, torch.eye(INPUTS), energy=torch.ones(ROWS), names=("layers.1.q", "layers.1.k"), rows=(4, 3)
    )
    with pytest.raises(FistaPrunerError, match=r"layers\.1\.k: the weights"):
        problem.check_finite()
    seen = seen.clone()
    seen[0, 0] = float("inf")
    with pytest.raises(FistaPrunerError, match=r"fc1.*NaN or infinite"):
        LayerProblem.from_activations(weight, seen, name="fc1")


def test_no_tokens() -> None:
    with pytest.raises(FistaPrunerError, match="no calibration tokens"):
        ProblemSums(torch.ones(2, 3)).problem(("fc1",), (2,), 1.0)


def test_fast_products_restores_the_precision_after_an_error() -> None:
    cpu = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = cpu.fp32_precision
    with fast_products():
        assert cpu.fp32_precision == "bf16"
    assert cpu.fp32_precision == before
    with pytest.raises(RuntimeError), fast_products():
        raise RuntimeError
    assert cpu.fp32_precision == before
    with fast_products(False):
        assert cpu.fp32_precision == before


def test_weighted_rows(data: tuple[torch.Tensor, ...]) -> None:
    """Errors are weighed and gradients scaled; where rows do not compete the solution is the same once it is taken
    back."""
    weight, seen, dense = data
    problem = LayerProblem.from_activations(weight, seen, dense, target=0.5)
    importance = torch.rand(problem.shape[0], generator=torch.Generator().manual_seed(5)) + 0.1
    weighted = problem.weighted(importance)
    weight = weight * (weight.abs() > 0.5)
    root = importance.sqrt()[:, None]
    torch.testing.assert_close(
        weighted.row_errors(weight * root), problem.row_errors(weight) * importance, rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(weighted.gradient(weight * root), problem.gradient(weight) * root, rtol=1e-4, atol=1e-5)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(
            FistaPrunerError, match="operator: the importance of a row is zero, negative, NaN or infinite"
        ):
            problem.weighted(importance.index_fill(0, torch.tensor([2]), wrong))
    plain, other = solve(problem, "1:2", "alps"), solve(weighted, "1:2", "alps")
    assert torch.equal(plain.mask, other.mask)
    taken_back = unweighted(other.weight.clone(), importance)
    torch.testing.assert_close(taken_back, plain.weight, rtol=1e-3, atol=1e-4)
    (recorded,) = other.stats
    assert recorded["relative_error"] == pytest.approx(problem.relative_errors(taken_back)[0], rel=1e-5)
    assert weighted.slice(1, 3).relative_errors(taken_back[1:3] * root[1:3]) == pytest.approx(
        problem.slice(1, 3).relative_errors(taken_back[1:3]), rel=1e-4
    )
    twice = weighted.weighted(importance.flip(0)).relative_errors(taken_back * root * root.flip(0))
    assert twice == pytest.approx(problem.relative_errors(taken_back), rel=1e-4)


def test_an_error_of_an_operator_without_outputs_is_one() -> None:
    """Its target is the drift of the hidden states alone, which is no share of nothing."""
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    problem = LayerProblem.from_activations(torch.zeros(2, 4), inputs, inputs, torch.ones(8, 2), target=0.5)
    assert problem.dense_errors() == [1.0]
    assert solve(problem, "50%", "wanda").stats[0]["relative_error"] == 1.0
    assert LayerProblem.from_activations(torch.zeros(2, 4), inputs).relative_errors(torch.zeros(2, 4)) == [0.0]


@pytest.mark.parametrize("source", ["inputs", "outputs"])
def test_drift_told_by_the_first_tokens_is_that_of_these(source: DriftFrom) -> None:
    """The Gram is of all tokens; drift, its energy and the dense outputs' energy are of those that the dense model
    saw."""
    generator = torch.Generator().manual_seed(3)
    weight, seen, moved = (torch.randn(*shape, generator=generator) for shape in ((12, 8), (900, 8), (900, 8)))
    dense = seen + 0.1 * moved
    told = dense if source == "inputs" else dense @ weight.T
    sums = ProblemSums(weight, drift_from=source)
    for start in range(0, 900, 100):
        batch = slice(start, start + 100)
        sums.add(seen[batch], told[batch] if start < 300 else None)
    found = sums.problem(("q",), (12,), 1.0)
    whole, part = (
        LayerProblem.from_activations(weight, seen),
        LayerProblem.from_activations(weight, seen[:300], dense[:300]),
    )
    torch.testing.assert_close(found.gram, whole.gram)
    assert found.drift is not None
    assert found.drift_energy is not None
    torch.testing.assert_close(found.drift, part.drift, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.drift_energy, part.drift_energy, rtol=1e-3, atol=1e-5)
    with pytest.raises(FistaPrunerError, match=f"dense {source} are for the first batches"):
        sums.add(seen, told)


@pytest.mark.parametrize("source", ["inputs", "outputs"])
def test_drift_asked_for_but_never_told_is_refused(source: DriftFrom) -> None:
    sums = ProblemSums(torch.ones(2, 3), drift_from=source)
    sums.add(torch.ones(4, 3))
    with pytest.raises(FistaPrunerError, match=r"fc1: no calibration tokens reached this operator in the dense model"):
        sums.problem(("fc1",), (2,), 1.0)

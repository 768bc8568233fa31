"""Groups cut into parts: the parts are the whole, whatever the method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fistapruner.pruning.partition import cut, part_of, solve_in_parts, solve_part
from torch.utils._python_dispatch import TorchDispatchMode

from fistapruner.core import LayerProblem, parse_sparsity
from fistapruner.planning.footprint import peak_bytes
from fistapruner.solvers import METHODS, parse_method, solve

ROWS, COLUMNS = (40, 13), 24
PATTERNS = ["50%", "37%", "2:4"]


@pytest.fixture
def problem() -> LayerProblem:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(200, COLUMNS, generator=generator)
    weight = torch.randn(sum(ROWS), COLUMNS, generator=generator)
    drift = 0.1 * torch.randn(sum(ROWS), COLUMNS, generator=generator)
    gram = inputs.T @ inputs / len(inputs)
    return LayerProblem(weight, gram, drift, torch.ones(sum(ROWS)), names=("wide", "narrow"), rows=ROWS, target=0.5)


def chains() -> list[str]:
    return [f"wanda+{name}" if method.refines else name for name, method in METHODS.items()]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("chain", chains())
def test_blocks_of_rows_change_nothing_where_they_are_made(problem: LayerProblem, chain: str, pattern: str) -> None:
    """Every operator is a part; one whose method treats rows alone is cut on, and its solution is that of the whole."""
    steps, sparsity = parse_method(chain), [parse_sparsity(pattern)] * 2
    made = cut(ROWS, COLUMNS, sparsity, steps, block=6)
    assert [made[0].start, *(part.stop for part in made)] == [*(part.start for part in made), sum(ROWS)]
    for operator, rows in enumerate(ROWS):
        zeros = sum(part.sparsity.zeros(part.stop - part.start, COLUMNS) for part in made if part.operator == operator)
        assert zeros == sparsity[0].zeros(rows, COLUMNS)
    apart, whole = solve_in_parts(problem, sparsity, steps, block=6), solve(problem, sparsity, steps)
    alone = [step.rows_independent(sparsity[0]) for step in steps]
    assert len(made) == (7 + 3 if all(alone) else 2)
    if all(alone):
        assert torch.equal(apart.mask, whole.mask)
        assert torch.allclose(apart.weight, whole.weight, rtol=1e-4, atol=1e-5)
        for one, other in zip(apart.stats, whole.stats, strict=True):
            assert one["relative_error"] == pytest.approx(other["relative_error"], rel=1e-4)
            assert [step.keys() for step in one["steps"]] == [step.keys() for step in other["steps"]]
            if chain == "wanda+refit":
                assert one["steps"][-1]["rows_improved"] == other["steps"][-1]["rows_improved"]


def test_a_block_of_rows_without_zeros_has_fewer_statistics() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(20, 12, generator=generator), torch.randn(90, 12, generator=generator)
    solution = solve_in_parts(
        LayerProblem.from_activations(weight, inputs), [parse_sparsity("0.5%")], parse_method("wanda+refit"), block=6
    )
    assert int((~solution.mask).sum()) == 1
    assert "damping" in solution.stats[0]["steps"][-1]


class Factorisations(TorchDispatchMode):
    """Counts factorisations of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(name in str(func) for name in ("_linalg_eigh", "cholesky_ex"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_what_depends_on_the_gram_alone_is_computed_once(problem: LayerProblem, pattern: str) -> None:
    """With the bits of parts that are solved apart, as workers solve them."""
    steps, sparsity = parse_method("proximal"), [parse_sparsity(pattern)] * 2
    parts = cut(problem.rows, COLUMNS, sparsity, steps, block=6)
    with Factorisations() as apart:
        solutions = [solve_part(part_of(problem, part), part.sparsity, steps) for part in parts]
    with Factorisations() as shared:
        solution = solve_in_parts(problem, sparsity, steps, block=6)
    assert apart.count == shared.count * len(parts)
    for part, alone in zip(parts, solutions, strict=True):
        assert torch.equal(solution.weight[part.start : part.stop], alone.weight)


def test_rows_that_would_lose_everything_stay_together() -> None:
    """23.7 of 24 weights in a row: the first rows of the operator have none left, and no pattern says that of a
    block."""
    sparsity = [parse_sparsity(23.7 / 24)]
    assert len(cut((4096,), COLUMNS, sparsity, parse_method("wanda"))) == 1


@pytest.mark.parametrize("chain", ["wanda", "magnitude"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_cheap_methods_need_little_memory(chain: str, pattern: str) -> None:
    """Beside weight and Gram: the solution, its mask, and blocks; not several copies."""
    weight = torch.randn(2048, 256)
    problem = LayerProblem(weight, torch.eye(256))
    assert peak_bytes(lambda: solve(problem, pattern, chain)) < 2.0 * weight.nbytes

"""Every method on every constraint, those of a newcomer included: exact zeros, or a refusal before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layer_problems import make_problem
from safetensors.torch import load_file

import fistapruner as fp
import tiny
from fistapruner import FistaPrunerError
from fistapruner.core import Constraint, parse_sparsity
from fistapruner.core.constraints import patterns_met
from fistapruner.evaluation.inspection import inspect_checkpoint
from fistapruner.solvers import METHODS, parse_method, solve
from toy_constraints import TOYS, every_constraint, registered

CHAINS = [f"wanda+{name}" if method.refines else name for name, method in METHODS.items()]
ANY = {"proximal", "alps", "admm", "wanda", "magnitude", "refit"}


@pytest.mark.parametrize("constraint", every_constraint(), ids=str)
@pytest.mark.parametrize("chain", CHAINS)
def test_exact_zeros_or_a_refusal(chain: str, constraint: Constraint) -> None:
    problem = make_problem((10, 7), 8 * constraint.group_length, drift=0.1, target=0.5)
    refusing = [step for step in parse_method(chain) if not step.supports(constraint)]
    if refusing:
        assert isinstance(constraint, tuple(TOYS.values())) or (constraint.exchanges is None and "swap" in chain)
        with pytest.raises(FistaPrunerError) as error:
            solve(problem, constraint, chain)
        assert refusing[0].name in str(error.value)
        assert str(constraint) in str(error.value)
        assert all(name in str(error.value) for name in ANY)
        return
    solution = solve(problem, [constraint, constraint], chain)
    for weight, mask in zip(solution.weight.split(problem.rows), solution.mask.split(problem.rows), strict=True):
        assert int((~mask).sum()) == constraint.zeros(*weight.shape)
        assert constraint.satisfies(weight)
        assert not bool((weight[~mask] != 0).any())
        assert bool(torch.isfinite(weight).all())


def test_methods_that_take_any_constraint_take_a_newcomer() -> None:
    for name in ANY:
        for kind in TOYS.values():
            assert METHODS[name]().supports(parse_toy(kind))
    assert METHODS["fista"](warm_start="wanda").supports(parse_toy(TOYS["whole columns"]))  # type: ignore[call-arg]


def parse_toy(kind: type[Constraint]) -> Constraint:
    return next(constraint for constraint in every_constraint() if isinstance(constraint, kind))


@pytest.mark.parametrize("chain", ["proximal", "alps", "fista"])
@pytest.mark.parametrize("text", ["shared 4:2:4", "columns 50.0%", "4:2:8"])
def test_solvers_beat_magnitude_on_a_newcomer(chain: str, text: str) -> None:
    with registered():
        constraint = parse_sparsity(text)
    problem = make_problem((32,), 48)
    if METHODS[chain]().supports(constraint):
        error, worse = (solve(problem, constraint, name).stats[0]["relative_error"] for name in (chain, "magnitude"))
        assert error < worse


def test_a_run_prunes_to_a_newcomer_by_its_text(tmp_path: Path) -> None:
    """One file and one line: recipe, run, report and checkpoint know the constraint."""
    tiny.save("llama", tmp_path / "dense")
    settings = {"calibration": {"source": "python", "samples": 4, "seqlen": 32}}
    with registered():
        constraint = parse_sparsity("shared 4:2:4")
        report = fp.prune(str(tmp_path / "dense"), tmp_path / "out", sparsity="shared 4:2:4", method="alps", **settings)
        operators = report.operators
        assert {operator.sparsity for operator in operators} == {"shared 4:2:4"}
        assert all(operator.zeros == constraint.zeros(*operator.shape) for operator in operators)
        with pytest.raises(FistaPrunerError, match="swap"):
            fp.prune(
                str(tmp_path / "dense"), tmp_path / "refused", sparsity="shared 4:2:4", method="wanda+swap", **settings
            )


@pytest.mark.parametrize("method", ["proximal", "sparsegpt", "wanda"])
def test_shared_inputs_are_pruned_and_packed(tmp_path: Path, method: str) -> None:
    tiny.save("llama", tmp_path / "dense", dtype=torch.bfloat16)
    settings = {"calibration": {"source": "python", "samples": 4, "seqlen": 32}}
    fp.prune(str(tmp_path / "dense"), tmp_path / "out", sparsity="4:2:8", method=method, **settings)
    model = tmp_path / "out" / "model"
    assert not inspect_checkpoint(model).violations
    fp.pack(model, tmp_path / "packed")
    kept = load_file(fp.unpack(tmp_path / "packed", tmp_path / "unpacked") / "model.safetensors")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in load_file(model / "model.safetensors").items())
    down = kept["model.layers.0.mlp.down_proj.weight"]
    assert "2:8" in map(str, patterns_met(down, 8))

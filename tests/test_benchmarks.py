"""Programs of ``benchmarks/`` on tiny problems: they run, keep what they measured, and do not mix measurements."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import layer_error
from alps_reference import alps_reference

from fistapruner.constraints import parse_sparsity
from fistapruner.errors import FistaPrunerError
from fistapruner.solvers import solve
from solvers.layer_problems import make_problem


@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
def test_the_yardstick_prunes_to_the_pattern(sparsity: str) -> None:
    problem, pattern = make_problem(), parse_sparsity(sparsity)
    weight, _ = alps_reference(problem.weight, problem.gram, pattern)
    assert pattern.satisfies(weight)
    wanda = solve(problem, pattern, "wanda").weight
    assert max(problem.relative_errors(weight)) < max(problem.relative_errors(wanda))


def test_layer_errors_are_kept_after_each_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second group cannot be pruned: what the first one gave is in the file."""
    problems = {"0.o_proj": make_problem(rows=(8,), n=16), "0.down_proj": make_problem(rows=(8,), n=18)}
    monkeypatch.setattr(layer_error.real_problems, "load", lambda arguments: problems)
    out = tmp_path / "rows.json"
    options = ["--sparsity", "2:4", "--methods", "magnitude,wanda", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["layer_error.py", *options])
    with pytest.raises(FistaPrunerError, match="18 inputs"):
        layer_error.main()
    assert [(row["group"], row["method"]) for row in json.loads(out.read_text())] == [
        ("0.o_proj", "magnitude"),
        ("0.o_proj", "wanda"),
    ]

"""What a method declares about its records is true of what it records; reports know no solver by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from layer_problems import make_problem

from fistapruner import reporting
from fistapruner.solvers import METHODS, solve

TRACED = [name for name, method in METHODS.items() if method.trace is not None]


@pytest.mark.parametrize("name", TRACED)
def test_the_rounds_that_a_method_declares_are_recorded(name: str) -> None:
    trace = METHODS[name].trace
    assert trace is not None
    step = solve(make_problem((24,), 32), "50%", name).stats[0]["steps"][0]
    rounds = trace.rounds(step)
    assert len(rounds) > 1
    assert all(record[trace.value] >= 0 and record[trace.penalty] > 0 for record in rounds)
    if trace.search:
        assert trace.value in step


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.refit_helps])
def test_a_refit_helps_where_a_method_says_so(name: str) -> None:
    problem = make_problem((24,), 32)
    before, after = (solve(problem, "50%", chain).stats[0]["relative_error"] for chain in (name, f"{name}+refit"))
    assert after < 0.999 * before


def test_reports_know_no_method_by_name() -> None:
    folder = Path(reporting.__file__).parent
    for path in folder.rglob("*.py"):
        text = path.read_text()
        assert not [name for name in METHODS if f'"{name}"' in text], path.name

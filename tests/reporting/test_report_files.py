"""report.json, layer files, status, the model card: read back what was written, say what is wrong with what was not."""

from __future__ import annotations

import json
import math
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

import samples

from fistapruner import FistaPrunerError
from fistapruner.cli import main
from fistapruner.evaluation.scoring import perplexity_of
from fistapruner.reporting.advice import advice
from fistapruner.reporting.evaluation_text import evaluation_text
from fistapruner.reporting.layer_errors import hardest
from fistapruner.reporting.model_card import model_card
from fistapruner.reporting.status_text import status_facts, status_text
from fistapruner.runs.records import VERSION, Report, load_run, parse
from fistapruner.runs.results import Divergence, Evaluation
from fistapruner.runtime.formatting import (
    align_columns,
    duration,
    p_value,
    percent,
    short_count,
    significant,
    size,
    with_error,
)


def unfinished(folder: Path, done: int = 3) -> Path:
    """A run directory with ``done`` of 12 layers."""
    whole = samples.report()
    facts = whole.model_dump(mode="json", exclude={"layers", "totals", "evaluations"}) | {
        "status": "running",
        "finished": None,
        "warnings": [],
    }
    (folder / "layers").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(facts))
    for layer in whole.layers[:done]:
        (folder / "layers" / f"{layer.index:04d}.json").write_text(layer.model_dump_json())
    return folder


def test_a_report_survives_the_file() -> None:
    report = samples.report()
    assert parse(Report, json.loads(report.model_dump_json()), "x") == report
    assert (report.method, report.sparsity) == ("sparsegpt+fista", "50%")


def test_unknown_keys_are_kept() -> None:
    data = samples.report(1).model_dump(mode="json") | {"of_tomorrow": 7}
    data["layers"][0]["operators"][0]["also"] = "kept"
    again = parse(Report, data, "x").model_dump(mode="json")
    assert again["of_tomorrow"] == 7
    assert again["layers"][0]["operators"][0]["also"] == "kept"


def test_infinite_figures_become_null_not_broken_json() -> None:
    report = samples.report(1)
    report.totals.seconds = float("inf")
    assert json.loads(report.model_dump_json())["totals"]["seconds"] is None


def test_a_model_that_gives_a_token_no_chance_has_an_infinite_perplexity() -> None:
    """It is null in JSON, infinite when read back, and said to be infinite wherever it is shown."""
    sums, settings = (
        torch.tensor([math.inf, 12.0]),
        {"data": "text", "split": "test", "seqlen": 9, "dtype": "float32", "bos": "none"},
    )
    found = perplexity_of(sums, 8, **settings, sha256="ab")
    evaluation = Evaluation(
        "model", "dense", found, samples.perplexity(12.0), Divergence(math.inf, math.nan, 0.5, 0.1, math.inf, math.nan)
    )
    data = samples.report(1).model_dump(mode="json") | {"evaluations": [evaluation.to_dict()]}
    data = json.loads(json.dumps(data, allow_nan=False))
    assert data["evaluations"][0]["perplexity"]["perplexity"] is None
    report = parse(Report, data, "sample")
    assert report.evaluations[0].perplexity is not None
    assert report.evaluations[0].perplexity.perplexity == math.inf
    for text in (evaluation_text(report.evaluations[0]), model_card(report)):
        assert "∞" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is not a JSON object"),
        (json.dumps({"version": VERSION + 1}), f"has version {VERSION + 1}"),
        (json.dumps({"status": "sleeping"}), "status"),
        (json.dumps({"layers": [{"name": "no index"}]}), r"layers\.0\.index"),
    ],
)
def test_a_broken_report_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(FistaPrunerError, match=message):
        load_run(tmp_path)


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert "is not a run" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "absent")]) == 2


def test_an_unfinished_run_is_read_from_its_layers(tmp_path: Path) -> None:
    run = unfinished(tmp_path / "run")
    (run / "layers" / "0003.json").write_text("{ torn")
    report = load_run(run)
    assert [layer.index for layer in report.layers] == [0, 1, 2]
    assert report.status == "running"
    assert "0003.json" in report.warnings[0]


def test_status_of_an_unfinished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = unfinished(tmp_path / "run")
    now = datetime(2026, 1, 1, 10, 6, tzinfo=UTC)
    facts = status_facts(load_run(run), now)
    spent = sum(sum(layer.seconds.values()) for layer in load_run(run).layers)
    assert facts["seconds_left"] == pytest.approx(9 * spent / 3)
    assert (facts["layers_done"], facts["layers"], facts["seconds_since_start"], facts["seconds_since_last_layer"]) == (
        3,
        12,
        360,
        60,
    )
    assert "no process works on it" in status_text(load_run(run), alive=False, now=now)
    assert main(["status", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "3 of 12 decoder layers" in printed
    assert "layer   2" in printed
    errors = {
        operator.relative_error: f"(layer {layer.index}, {operator.name})"
        for layer in load_run(run).layers
        for operator in layer.operators
        if operator.relative_error is not None
    }
    assert errors[max(errors)] in printed
    assert main(["status", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["working"] is False


def test_report_of_an_unfinished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")
    run = unfinished(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert "3 of 12 decoder layers" in (run / "report.html").read_text()


def test_advice_names_the_layer_and_the_operator_that_stand_out() -> None:
    words = advice(samples.report())
    assert any(line.startswith("Decoder layer 1 ") and r"re:model\.layers\.1\." in line for line in words)
    assert any(line.startswith("mlp.down_proj loses most") for line in words)
    assert any("--method sparsegpt+fista+refit" in line for line in words)
    assert any("32 windows; the papers use 128" in line for line in words)
    assert advice(Report()) == []


def test_what_dense_weights_would_leave_is_no_operators_loss() -> None:
    report = samples.report()
    for layer in report.layers:
        for operator in layer.operators:
            if operator.name == "mlp.down_proj":
                operator.dense_error = 0.99 * (operator.relative_error or 0.0)
    assert not any("mlp.down_proj loses most" in line for line in advice(report))
    assert all(operator.name != "mlp.down_proj" for _, operator in hardest(report.layers, 8))


def test_the_allocation_that_advice_gives_is_understood() -> None:
    from fistapruner.recipes.loading import parse_yaml
    from fistapruner.recipes.patterns import matches

    line = next(line for line in advice(samples.report()) if '--allocation "' in line)
    mapping = parse_yaml(re.search(r'--allocation "(\{.*\})"', line)[1], "advice")  # type: ignore[index]
    (pattern,) = mapping
    assert matches("model.layers.1.mlp.up_proj", pattern)
    assert not matches("model.layers.11.mlp.up_proj", pattern)


def card_parts(report: Report) -> tuple[dict[str, Any], str]:
    _, block, text = model_card(report).split("---\n", 2)
    return yaml.safe_load(block), text


def test_model_card_metadata_and_figures() -> None:
    report = samples.report()
    report.model.source, report.model.license = "owner/name", "apache-2.0"
    report.calibration.source = "/home/someone/secret/c4.jsonl"  # type: ignore[union-attr]
    block, text = card_parts(report)
    assert block["base_model"] == ["owner/name"]
    assert block["license"] == "apache-2.0"
    assert block["model-index"][0]["results"][0]["metrics"][0]["value"] == 46.53
    assert "46.53 ± 0.93" in text
    assert "(50.00 %)" in text
    assert report.command in text  # type: ignore[operator]
    assert "neither smaller nor faster" in text
    assert "/home/someone" not in text


def test_model_card_of_a_local_model_names_no_folder_of_this_machine() -> None:
    report = Report(recipe={"sparsity": "2:4", "method": "wanda"})
    report.model.source = "/home/someone/models/mine"
    block, text = card_parts(report)
    assert "base_model" not in block
    assert "/home" not in text
    assert "# mine, 2:4 sparse" in text


def test_numbers_for_people() -> None:
    assert (size(512), size(1536), size(3 * 2**30)) == ("512 B", "1.50 KiB", "3.00 GiB")
    assert (duration(0.84), duration(12.34), duration(245), duration(12000)) == (
        "840 ms",
        "12.3 s",
        "4 min 05 s",
        "3 h 20 min",
    )
    assert (percent(0.5), percent(0.123456), percent(None)) == ("50.0 %", "12.3 %", "–")
    assert (short_count(134515008), p_value(0.0001), p_value(0.15)) == ("135M", "p < 0.001", "p = 0.150")
    assert (with_error(25.321, 0.414), with_error(25.321, float("nan"))) == ("25.32 ± 0.41", "25.32")


def test_columns_of_a_text_table_are_aligned() -> None:
    rows = [("name", "zeros", ""), ("q", "1", "holds"), ("mlp.down_proj", "12345", "")]
    lines = align_columns(rows, right=(1,)).splitlines()
    assert lines == ["name           zeros", "q                  1  holds", "mlp.down_proj  12345"]
    assert align_columns([]) == ""


@given(st.floats(-1e300, 1e300) | st.just(float("nan")) | st.just(float("inf")), st.integers(1, 6))
def test_any_number_can_be_written(value: float, digits: int) -> None:
    text = significant(value, digits)
    if math.isfinite(value) and value != 0:
        assert float(text.replace(",", "")) == pytest.approx(value, rel=10.0 ** (1 - digits))
    size(abs(value))
    duration(value)


def test_model_card_shows_names_as_they_are_and_runs_nothing() -> None:
    report = samples.report()
    report.model.source = "/home/me/<img src=x onerror=alert(1)>`|[a](b)\n# title"
    report.command = "fistapruner prune '```' --out x"
    _, _, text = model_card(report).split("---\n", 2)
    assert "\\<img src=x onerror=alert(1)\\>\\`\\|\\[a\\](b) # title" in text
    assert not re.search(r"(?<!\\)<img", text)
    assert "\n````bash\n" in text

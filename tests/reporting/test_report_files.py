"""report.json, layer files and status: read back what was written, say what is wrong with what was not."""

import json
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import samples
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from fistapruner import FistaPrunerError
from fistapruner.reporting.terminal import status_facts, status_text
from fistapruner.runs.log import StepJournal, hold
from fistapruner.runs.records import VERSION, LayerEntry, Report, load_run, parse
from fistapruner.runtime.show import (
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
    facts = whole.model_dump(mode="json", exclude={"layers", "totals", "evaluations"})
    facts |= {"status": "running", "finished": None, "warnings": []}
    (folder / "layers").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(facts))
    for layer in whole.layers[:done]:
        (folder / "layers" / f"{layer.index:04d}.json").write_text(layer.model_dump_json())
    return folder


def test_a_report_survives_the_file() -> None:
    report = samples.report()
    assert parse(Report, json.loads(report.model_dump_json()), "x") == report
    assert (report.method, report.sparsity) == ("sparsegpt+fista", "50%")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        (json.dumps({"version": VERSION + 1}), f"has version {VERSION + 1}"),
        (json.dumps({"layers": [{"name": "no index"}]}), r"layers\.0\.index"),
    ],
)
def test_a_broken_report_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(FistaPrunerError, match=message):
        load_run(tmp_path)


def test_a_folder_that_is_no_run(tmp_path: Path, cli: tiny.Cli) -> None:
    assert "is not a run" in cli("status", tmp_path, status=2).err
    absent = str(tmp_path / "absent")
    for verb, *more in (["status"], ["report"], ["resume"], ["bench"], ["inspect"], ["pack", f"{absent}-packed"]):
        fault = "is not a run that was begun" if verb == "resume" else "does not exist"
        assert f"{absent} {fault}" in cli(verb, absent, *more, status=2).err


def test_an_unfinished_run_is_read_from_its_layers(tmp_path: Path) -> None:
    run = unfinished(tmp_path / "run")
    (run / "layers" / "0003.json").write_text("{ torn")
    report = load_run(run)
    assert [layer.index for layer in report.layers] == [0, 1, 2]
    assert report.status == "running"
    assert "0003.json" in report.warnings[0]


def test_status_of_an_unfinished_run(tmp_path: Path, cli: tiny.Cli) -> None:
    run = unfinished(tmp_path / "run")
    now = datetime(2026, 1, 1, 10, 6, tzinfo=UTC)
    facts = status_facts(load_run(run), now)
    longest = max(sum(layer.seconds.values()) for layer in load_run(run).layers)
    assert facts["seconds_left"] == pytest.approx(9 * longest / 3)  # all three were finished at once
    assert (facts["layers_done"], facts["layers"]) == (3, 12)
    assert (facts["seconds_since_start"], facts["seconds_since_last_layer"]) == (360, 60)
    assert "no process works on it" in status_text(load_run(run), alive=False, now=now)
    printed = cli("status", run).out
    assert "3 of 12 decoder layers" in printed
    assert "layer   2" in printed
    assert json.loads(cli("status", run, "--json").out)["working"] is False


@pytest.mark.parametrize("error", ["the disk is full", None], ids=["failed", "finished"])
def test_a_run_at_work_again_does_not_have_the_status_of_its_last_attempt(
    error: str | None, tmp_path: Path, cli: tiny.Cli
) -> None:
    run, report = tmp_path / "run", samples.report(2)
    report.error, report.status = error, "failed" if error else "finished"
    report.finished = "2020-01-01T00:00:00+00:00"
    run.mkdir()
    (run / "report.json").write_text(report.model_dump_json())
    with hold(run):
        said, facts = cli("status", run).out, json.loads(cli("status", run, "--json").out)
    states = ("running again; the last attempt failed: the disk is full", "finished; a process works on it")
    assert f": {states[error is None]}\n" in said
    assert facts["measured"] is True
    assert (facts["status"], facts["error"]) == ("running again" if error else "finished", error)
    assert facts["working"] is True
    assert json.loads(cli("status", run, "--json").out)["status"] == report.status


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(0, 10**5))
def test_seconds_left_are_those_of_all_workers(workers: int, rounds: int, pause: int) -> None:
    """Each of them prunes a layer in 60 s; a pause between two commands counts nothing."""
    report, begin = samples.report(), datetime(2026, 1, 1, tzinfo=UTC)
    report.status, report.model.layers = "running", 100
    ends = [60 * (number + 1) + pause * (number > 0) for number in range(rounds) for _ in range(workers)]
    report.layers = [
        LayerEntry(index=index, seconds={"solve": 60.0}, finished=(begin + timedelta(seconds=end)).isoformat())
        for index, end in enumerate(ends)
    ]
    facts = status_facts(report, begin + timedelta(days=9))
    assert facts["seconds_left"] == pytest.approx((100 - len(ends)) * 60 / workers)


def test_layers_of_what_a_run_was_before_are_left_out(tmp_path: Path) -> None:
    run = unfinished(tmp_path / "run")
    fingerprint = json.loads((run / "run.json").read_text())["fingerprint"]
    for index, of in enumerate((fingerprint, "another")):
        file = run / "layers" / f"{index:04d}.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "file": {"fingerprint": of}}))
    report = load_run(run)
    assert [layer.index for layer in report.layers] == [0, 2]
    assert not report.warnings


def unfinished_recovery(folder: Path, lines: list[dict[str, Any]]) -> Path:
    """A recovery run that has just begun, and its journal."""
    facts = samples.recovery().model_dump(mode="json", exclude={"layers", "totals", "evaluations", "generations"})
    parts = ("parameters", "optimizer", "loss", "asked_steps", "windows", "held_out_windows")
    begun = {"recovery": {part: facts["recovery"][part] for part in parts}, "status": "running", "finished": None}
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({**facts, **begun}))
    with StepJournal(folder / "steps.jsonl", -1) as journal:
        for line in lines:
            journal.append(line)
    return folder


STEPS = [
    {"step": 0, "held_out": 0.9, "kept": True, "by_task": {}},
    {"step": 1, "loss": 1.1, "tokens": 100, "seconds": 2.0},
    {"step": 2, "loss": None, "tokens": 100, "seconds": 2.0},
    {"step": 3, "loss": 0.8, "tokens": 100, "seconds": 5.0, "held_out": 0.7, "kept": True, "by_task": {}},
    {"step": 4, "loss": 0.6, "tokens": 100, "seconds": 3.0, "held_out": 0.8, "kept": False, "by_task": {}},
]


def test_status_of_an_unfinished_recovery(tmp_path: Path, cli: tiny.Cli) -> None:
    run = unfinished_recovery(tmp_path / "run", STEPS)
    facts = json.loads(cli("status", run, "--json").out)
    assert (facts["steps_done"], facts["steps"], facts["kept_step"], facts["tokens"]) == (4, 60, 3, 400)
    assert facts["seconds_left"] == pytest.approx(12 / 4 * 56)
    assert facts["training_loss"] == pytest.approx((1.1 + 0.8 + 0.6) / 3)
    checks = [(check["step"], check["loss"], check["kept"]) for check in facts["held_out"]]
    assert checks == [(0, 0.9, True), (3, 0.7, True), (4, 0.8, False)]
    assert 0 <= facts["seconds_since_last_step"] < 3600
    assert "layers" not in facts
    printed = cli("status", run).out
    for part in ("4 of 60 steps", "held-out loss 0.7000", "step 4", "recovery (lora, kl"):
        assert part in printed, part
    assert "decoder layers" not in printed
    assert "0 of 60 steps" in cli("status", unfinished_recovery(tmp_path / "new", [])).out


def test_the_curve_in_a_report_is_bounded(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 1 / step, "tokens": 10, "seconds": 0.1} for step in range(1, 1302)]
    found = load_run(unfinished_recovery(tmp_path / "run", lines)).recovery
    assert (found.steps, found.tokens) == (1301, 13_010)
    assert 400 < len(found.curve) <= 500


def test_numbers_for_people() -> None:
    assert (size(512), size(1536), size(3 * 2**30)) == ("512 B", "1.50 KiB", "3.00 GiB")
    durations = [duration(seconds) for seconds in (0.84, 12.34, 245, 12000)]
    assert durations == ["840 ms", "12.3 s", "4 min 05 s", "3 h 20 min"]
    assert (percent(0.5), percent(0.123456), percent(None)) == ("50.0 %", "12.3 %", "–")
    assert (short_count(134515008), p_value(0.0001), p_value(0.15)) == ("135M", "p < 0.001", "p = 0.150")
    assert (with_error(25.321, 0.414), with_error(25.321, float("nan"))) == ("25.32 ± 0.41", "25.32")
    assert (with_error(-0.0004, 0.0021, 3), with_error(-0.001, None)) == ("0.000 ± 0.002", "0.00")
    assert (with_error(0.00512, 0.00012, 3), with_error(0.5, 0.0, 1)) == ("0.0051 ± 0.0001", "0.5 ± 0.0")
    assert with_error(0.5, 1e-9) == "0.50 ± 0.00"


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


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    report = samples.recovery()
    report.recovery.curve, report.totals.seconds = [(1, math.inf), (2, math.nan)], math.nan
    report.layers = []
    text = json.dumps(report.model_dump(mode="json"), allow_nan=False)
    again = Report.model_validate_json(text)
    assert again.totals.seconds is None
    assert [math.isnan(loss) for _, loss in again.recovery.curve] == [True, True]

"""report.json, layer files, status, the model card: read back what was written, say what is wrong with what was not."""

from __future__ import annotations

import json
import math
import re
import sys
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
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
from fistapruner.core import parse_sparsity
from fistapruner.measure.logits import perplexity_of
from fistapruner.reporting.advice import advice
from fistapruner.reporting.comparison import comparison_markdown
from fistapruner.reporting.evaluation_text import evaluation_text, perplexity_conditions
from fistapruner.reporting.layer_errors import hardest, short_names
from fistapruner.reporting.lineage_text import lineage_lines
from fistapruner.reporting.model_card import model_card, plain_card
from fistapruner.reporting.quality_rows import points, quality_rows, recovery_rows
from fistapruner.reporting.recovery_text import closed_text, gain, gain_text, text_used
from fistapruner.reporting.status_text import status_facts, status_text
from fistapruner.reporting.summary import summary
from fistapruner.reporting.verdict import verdict
from fistapruner.runs.base import VERSION, parse
from fistapruner.runs.layer_records import LayerEntry
from fistapruner.runs.lineage import stage_of
from fistapruner.runs.lock import hold
from fistapruner.runs.records import Kind, Lineage, Report, Stage, StageFigures, load_run
from fistapruner.runs.results import Divergence, Evaluation, TaskResult
from fistapruner.runs.steps import StepJournal
from fistapruner.runs.training_records import Alignment, PreferenceFigures
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


def test_an_infinite_error_is_left_out_of_the_mean_before_and_after_it_is_stored() -> None:
    report = samples.report(1)
    report.layers[0].operators[0].relative_error = math.inf
    again = parse(Report, json.loads(report.model_dump_json()), "x")
    assert report.mean_error == again.mean_error == stage_of(report).figures.relative_error
    assert [summary(report, "run"), model_card(report)] == [summary(again, "run"), model_card(again)]


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
        ("{", "is not valid JSON"),
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
    absent = str(tmp_path / "absent")
    for verb, *more in (["status"], ["report"], ["resume"], ["bench"], ["inspect"], ["pack", f"{absent}-packed"]):
        assert main([verb, absent, *more]) == 2
        assert f"{absent} does not exist" in capsys.readouterr().err


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
    longest = max(sum(layer.seconds.values()) for layer in load_run(run).layers)
    assert facts["seconds_left"] == pytest.approx(9 * longest / 3)  # all three were finished at once
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


@pytest.mark.parametrize("error", ["the disk is full", None], ids=["failed", "finished"])
def test_a_run_at_work_again_does_not_have_the_status_of_its_last_attempt(
    error: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, report = tmp_path / "run", samples.report(2)
    report.error, report.status = error, "failed" if error else "finished"
    report.finished = "2020-01-01T00:00:00+00:00"
    run.mkdir()
    (run / "report.json").write_text(report.model_dump_json())
    with hold(run):
        assert main(["status", str(run)]) == 0
        said = capsys.readouterr().out
        assert main(["status", str(run), "--json"]) == 0
    states = ("running again; the last attempt failed: the disk is full", "finished; a process works on it")
    assert f": {states[error is None]}\n" in said
    facts = json.loads(capsys.readouterr().out)
    assert (facts["status"], facts["error"]) == ("running again" if error else "finished", error)
    assert facts["working"] is True
    assert main(["status", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == report.status


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


def test_report_of_an_unfinished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")
    run = unfinished(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert "3 of 12 decoder layers" in (run / "report.html").read_text()


def test_advice_names_the_layer_and_the_operator_that_stand_out() -> None:
    words = advice(samples.report())
    assert any(line.startswith("Decoder layer 1 ") and r"re:model\.layers\.1\." in line for line in words)
    assert any(line.startswith("Pruning adds the largest error to mlp.down_proj:") for line in words)
    assert any("--method sparsegpt+fista+refit" in line for line in words)
    assert any("32 windows; the papers use 128" in line for line in words)
    assert advice(Report()) == []
    report = samples.report()
    for operator in report.layers[5].operators:
        operator.relative_error = 0.8
    line = next(line for line in advice(report) if line.startswith("Decoder layer"))
    assert re.match(r"Decoder layers 5 \(80 %\), 1 \([\d.]+ %\) stand out .* Give them less sparsity", line)
    assert r"re:model\.layers\.5\." in line


def test_a_search_that_often_keeps_its_warm_start_is_told() -> None:
    """The rounds of a sample reach 0.948; after another step the start is not the search's own."""

    def told(kept: float, *, share: int = 1, first: bool = True) -> list[str]:
        report = samples.report(4)
        for operator in report.operators[::share]:
            operator.steps = [step | {"e_total": kept} for step in operator.steps[1:]] if first else operator.steps
        return [line.partition(" beat")[0] for line in advice(report) if "warm start" in line]

    assert told(0.93) == ["In 28 of 28 operators no round of the λ search"]
    assert told(0.93, share=3) == ["In 10 of 28 operators no round of the λ search"]
    assert told(0.93, share=4) == told(0.948) == told(0.96) == told(0.93, first=False) == []


def test_recovery_is_advised_where_quality_was_lost() -> None:
    def advised(loss: float, error: float | None = 0.01, structured: bool = False) -> list[str]:
        report = samples.report()
        damage = Divergence(0.1, 0.01, 0.8, 0.01, loss, error)
        report.evaluations = [replace(each, divergence=damage) for each in report.evaluations[:1]]
        if structured:
            report.recipe |= {"structure": {"remove": "25%"}, "sparsity": "0%"}
        return [line for line in advice(report) if "fistapruner recover RUN" in line]

    assert "every zero kept" in advised(0.3)[0]
    assert "zero" not in advised(0.3, structured=True)[0]
    assert len(advised(0.3, None)) == 1
    assert advised(0.015) == advised(-0.3) == []


def test_what_dense_weights_would_leave_is_no_operators_loss() -> None:
    report = samples.report()
    for layer in report.layers:
        for operator in layer.operators:
            if operator.name == "mlp.down_proj":
                operator.dense_error = 0.99 * (operator.relative_error or 0.0)
    assert not any("largest error to mlp.down_proj" in line for line in advice(report))
    assert all(operator.name != "mlp.down_proj" for _, operator in hardest(report.layers, 8))


def test_a_run_that_lost_nothing_has_no_layer_or_operator_that_stands_out() -> None:
    report = samples.report()
    for operator in report.operators:
        operator.relative_error = 0.0
    assert not any("stand" in line or "largest error" in line for line in advice(report))
    report.layers[0].operators[0].relative_error = 0.1
    assert not any("largest error" in line for line in advice(report))


def test_operators_with_the_same_last_name_are_told_apart() -> None:
    report = samples.report()
    names = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "mlp.experts.1.up", "mlp.experts.17.up", "up"]
    short = ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj", "experts.1.up", "experts.17.up", "up"]
    for layer in report.layers:
        for operator, name in zip(layer.operators, names, strict=True):
            operator.name, operator.relative_error = name, 0.5 if name == "mlp.c_proj" else 0.1
    assert short_names(report.layers) == dict(zip(names, short, strict=True))
    assert any("`--ignore mlp.c_proj` leaves it dense" in line for line in advice(report))


def test_calibration_text_is_advised_only_where_the_method_needs_it() -> None:
    def words(method: str, tokens: int = 32768, **settings: Any) -> str:
        report = samples.report()
        report.recipe |= {"method": method, **settings}
        report.calibration.source, report.calibration.tokens = "python", tokens  # type: ignore[union-attr]
        return " ".join(advice(report))

    few, other, quick = "calibration tokens are few", "Calibration text was 'python'", "quality drops quickly"
    assert few in words("sparsegpt", 100)
    assert other in words("sparsegpt", 100)
    for text in (few, other, quick):
        assert text not in words("magnitude", 100) + words("magnitude") + words("sparsegpt", 0)
    assert few in words("magnitude", 100, allocation="owl")
    assert few in words("magnitude+refit", 100)
    assert few in words("magnitude", 100, structure={"remove": "25%"})
    assert not any("Calibration text was" in line for line in advice(samples.report()))  # it is a file of the user's
    assert quick in words("sparsegpt")
    assert quick not in words("wanda")
    assert few not in words("wanda", 100)
    assert other in words("wanda")


def test_patterns_that_were_chosen_by_error_are_called_mixed() -> None:
    report = samples.report()
    report.recipe |= {"sparsity": "2:4", "allocation": "error"}
    assert report.sparsity == "mixed n:4 (50%)"
    block, text = card_parts(report)
    assert "to **mixed n:4 (50%)** with" in text
    assert "mixed-n:4" in block["tags"]
    report.layers[0].operators[0].sparsity = "3:4"
    assert any("Sparsity differs between operators already; `--ignore" in line for line in advice(report))
    report.recipe["allocation"] = "uniform"
    assert report.sparsity == "2:4"


def test_the_allocation_that_advice_gives_is_understood() -> None:
    from fistapruner.settings.loading import parse_yaml
    from fistapruner.settings.patterns import matches

    report = samples.report()
    for sparsity in ("50%", "0.3", "12.5%", "1%", "95%"):
        report.recipe["sparsity"] = sparsity
        line = next(line for line in advice(report) if '--allocation "' in line)
        mapping = parse_yaml(re.search(r'--allocation "(\{.*\})"', line)[1], "advice")  # type: ignore[index]
        ((pattern, less),) = mapping.items()
        assert matches("model.layers.1.mlp.up_proj", pattern)
        assert not matches("model.layers.11.mlp.up_proj", pattern)
        assert 0 < parse_sparsity(less).fraction < parse_sparsity(sparsity).fraction


@pytest.mark.parametrize("sparsity", ["2:4", "4:8"])
def test_allocation_by_error_is_advised_for_patterns_that_have_neighbours(sparsity: str) -> None:
    report = samples.report()
    for operator in report.operators:
        operator.sparsity = sparsity
    report.recipe["sparsity"] = sparsity
    words = " ".join(advice(report))
    assert "`--allocation error` spreads the same budget" in words
    assert "{'" not in words  # a share of zeros for one layer would leave the pattern


@pytest.mark.parametrize(
    ("kind", "settings", "flag"),
    [
        ("recover", {"steps": None}, "--tokens"),
        ("recover", {"steps": 60}, "--steps"),
        ("align", {}, "--epochs"),
        ("align", {"steps": 60}, "--steps"),
    ],
)
def test_a_longer_training_is_advised_by_the_setting_that_decides_its_length(
    kind: Kind, settings: dict[str, Any], flag: str
) -> None:
    report = samples.recovery(2)
    report.kind = kind
    report.recipe |= settings
    assert advice(report) == [f"The held-out loss was lowest at the last step: more `{flag}` may win more."]
    assert report.recovery is not None
    report.recovery.kept_step = 12
    assert advice(report) == []
    report.recovery.kept_step = 0
    assert [line.partition(":")[0] for line in advice(report)] == ["No check was better than the start"]
    del report.recovery.checks[1:]  # the only one is that of the start
    assert advice(report) == []


def test_a_training_without_gradients_is_told_what_is_better() -> None:
    report = samples.recovery(2)
    assert report.recovery is not None
    for optimizer in ("adamw", "mezo", "subzero"):
        for report.recovery.kept_step in (0, 12, 60):
            report.recovery.optimizer = optimizer
            found = [line for line in advice(report) if "`--parameters lora --optimizer adamw`" in line]
            assert len(found) == (optimizer != "adamw")
            assert all(f"of {optimizer} are estimates, which need thousands of steps" in line for line in found)


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


def test_status_of_a_finished_run_that_has_no_figures_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, record = unfinished(tmp_path / "run") / "run.json", samples.report()

    def told(evaluations: list[Any], *, asked: bool, held: bool) -> str:
        run.write_text(json.dumps({"decision": {"evaluation": {"data": "python"} if asked else None}}))
        facts = record.model_dump(mode="json") | {"evaluations": evaluations}
        (run.parent / "report.json").write_text(json.dumps(facts))
        with hold(run.parent) if held else nullcontext():
            assert main(["status", str(run.parent)]) == 0
        return capsys.readouterr().out.splitlines()[0].partition("50%: ")[2]

    figures = record.model_dump(mode="json")["evaluations"]
    assert told([], asked=True, held=True) == "finished, being measured"
    assert told([], asked=True, held=False) == "finished, not measured: give the same command again"
    assert told(figures, asked=True, held=True) == "finished; a process works on it"
    assert told([], asked=False, held=False) == "finished"
    assert main(["status", str(run.parent), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["measured"] is False


def test_status_of_an_unfinished_recovery(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = unfinished_recovery(tmp_path / "run", STEPS)
    assert main(["status", str(run), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["steps_done"], facts["steps"], facts["kept_step"], facts["tokens"]) == (4, 60, 3, 400)
    assert facts["seconds_left"] == pytest.approx(12 / 4 * 56)
    assert facts["training_loss"] == pytest.approx((1.1 + 0.8 + 0.6) / 3)
    assert [(check["step"], check["loss"], check["kept"]) for check in facts["held_out"]] == [
        (0, 0.9, True),
        (3, 0.7, True),
        (4, 0.8, False),
    ]
    assert 0 <= facts["seconds_since_last_step"] < 3600
    assert "layers" not in facts
    assert main(["status", str(run)]) == 0
    printed = capsys.readouterr().out
    for part in (
        "4 of 60 steps",
        "0.9000 → 0.7000 at step 3",
        "step 4",
        "not better",
        "recovery (lora, kl, 246k tokens with loss)",
    ):
        assert part in printed, part
    assert "decoder layers" not in printed


def test_a_recovery_without_a_step_has_a_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(unfinished_recovery(tmp_path / "run", []))]) == 0
    assert "0 of 60 steps" in capsys.readouterr().out


def test_the_curve_in_a_report_is_bounded(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 1 / step, "tokens": 10, "seconds": 0.1} for step in range(1, 1302)]
    found = load_run(unfinished_recovery(tmp_path / "run", lines)).recovery
    assert found is not None
    assert (found.steps, found.tokens) == (1301, 13_010)
    assert 400 < len(found.curve) <= 500


def test_a_held_out_loss_without_bound_survives_the_file(tmp_path: Path) -> None:
    run = unfinished_recovery(tmp_path / "run", [{"step": 0, "held_out": math.inf, "kept": True, "by_task": {}}])
    report = parse(Report, json.loads(load_run(run).model_dump_json()), "x")
    assert report.recovery is not None
    assert report.recovery.checks[0].held_out == math.inf
    json.dumps(status_facts(report), allow_nan=False)
    assert status_facts(report)["held_out"] == [{"step": 0, "loss": None, "kept": True}]
    assert "held-out loss inf" in status_text(report)


def test_tokens_that_are_not_known_before_the_end_are_not_named() -> None:
    """Of examples only the answers have a loss."""
    report = samples.recovery(2)
    assert report.calibration is not None
    side = report.calibration.tasks["c4.jsonl"].trained
    assert side is not None
    report.status = "running"
    assert report.method == "recovered: lora, kl, 246k tokens with loss"
    side.loss_tokens = 60_000
    assert report.method == "recovered: lora, kl"
    report.status = "finished"
    assert report.method == "recovered: lora, kl, 246k tokens with loss"


def test_a_recovery_is_named_by_what_was_trained_and_by_its_operators() -> None:
    report = samples.recovery(2)
    assert (report.method, report.sparsity) == ("recovered: lora, kl, 246k tokens with loss", "50%")
    operators = report.operators
    operators[0].sparsity = "2:4"
    assert report.sparsity == "50%", "what the model was pruned to"
    report.lineage = None
    assert report.sparsity == "50.0 %", "the share of zeros"
    for operator in operators:
        operator.sparsity = "2:4"
    assert report.sparsity == "2:4"
    report.recipe["targets"] = ["down_proj"]
    assert report.sparsity == "2:4", "of a model of which no more is known"
    report.lineage = samples.recovery(2).lineage
    assert report.sparsity == "50%", "that of the whole model"
    report = samples.recovery(2)
    assert report.lineage is not None
    report.lineage.stages[0].settings |= {"structure": {"remove": "25%"}, "sparsity": "0%"}
    assert report.sparsity == "structure 25%"
    assert report.only_structure
    assert "owner/small, structure 25%, recovered" in model_card(report)


@pytest.mark.parametrize(
    ("other", "label"), [("0%", "2:4, others by name"), ("1:4", "2:4, others by name"), ("2:4", "2:4")]
)
def test_sparsities_by_name_beside_that_of_the_others_are_told(other: str, label: str) -> None:
    report = samples.report(2)
    report.recipe |= {"sparsity": "2:4", "allocation": {"down_proj": other}}
    assert report.sparsity == label
    block, text = card_parts(report)
    assert f"to **{label}** with" in text
    assert ("mixed" in block["tags"], "2:4" in block["tags"]) == (other != "2:4", other == "2:4")


def test_zeros_that_an_allocation_sets_by_name_beside_structure_are_told() -> None:
    report = samples.report()
    report.recipe |= {"sparsity": "0%", "structure": {"remove": "25%", "method": "obs"}, "allocation": {"re:mlp": "0%"}}
    assert report.only_structure
    report.recipe["allocation"] = {"re:mlp": "2:4", "re:self_attn": "2:4"}
    assert not report.only_structure
    assert report.sparsity == "structure 25% and 2:4 by name"
    assert report.method.endswith(", sparsegpt+fista")
    said = card_parts(report)[1]
    assert "weights of the pruned operators are zero" in said
    assert "; zeros of pruned operators are " in said  # those of other tensors are not counted
    report.lineage = Lineage(source=report.model, stages=[Stage(settings=report.recipe, figures=StageFigures())])
    report.lineage.stages[0].figures.operator_weights, report.lineage.stages[0].figures.operator_zeros = 8, 4
    assert "50.0 % zeros in its operators" in lineage_lines(report.lineage)[1]


def test_a_name_in_a_record_adds_no_line_and_no_control_code() -> None:
    report = samples.report()
    report.model.source = "name\x1b[2J\nforged: line"
    report.warnings = ["one\ntwo"]
    report.lineage = Lineage(source=report.model, stages=[])
    assert lineage_lines(report.lineage)[0].startswith(r"name\x1b[2J\nforged: line")
    lines = status_text(report).split("\n")
    assert lines[0].startswith(r"name\x1b[2J\nforged: line")
    assert lines[-1] == r"warning: one\ntwo"


def test_the_gap_s_error_is_that_of_a_resampled_ratio() -> None:
    """An independent estimate: the jackknife over windows."""
    generator = torch.Generator().manual_seed(0)
    dense = 3.0 + 0.3 * torch.randn(200, generator=generator)
    before = dense + 0.5 + 0.1 * torch.randn(200, generator=generator)
    after = 0.5 * (before + dense) + 0.05 * torch.randn(200, generator=generator)
    settings = {"data": "text", "split": "test", "seqlen": 2, "dtype": "float32", "bos": "none", "sha256": "ab"}
    records = [perplexity_of(values.double(), 1, **settings) for values in (dense, before, after)]
    found = gain(Evaluation("a", "d", records[1], records[0]), Evaluation("b", "d", records[2], records[0]))
    assert found is not None

    def closed(keep: torch.Tensor) -> float:
        return float(1 - (after - dense)[keep].double().mean() / (before - dense)[keep].double().mean())

    everything = torch.ones(200, dtype=torch.bool)
    left_out = torch.tensor([closed(everything & (torch.arange(200) != window)) for window in range(200)])
    jackknife = math.sqrt(199 / 200 * float((left_out.double() - left_out.double().mean()).square().sum()))
    assert found.closed == pytest.approx(closed(everything), abs=1e-5)
    assert found.closed_error == pytest.approx(jackknife, rel=0.02)


def test_a_gain_needs_the_same_windows_and_a_gap() -> None:
    def evaluation(value: float, data: str = "a") -> Evaluation:
        return Evaluation("m", "dense", samples.perplexity(value, data), samples.perplexity(10.0, data))

    assert gain(evaluation(20.0), evaluation(15.0, "b")) is None
    assert gain(Evaluation("m"), evaluation(15.0)) is None
    better_than_dense = gain(evaluation(9.0), evaluation(8.0))
    assert better_than_dense is not None
    assert better_than_dense.closed is None
    noise = tuple(math.log(10.1) + 0.5 * math.sin(3 * window) for window in range(60))
    unclear = gain(
        replace(evaluation(10.1), perplexity=replace(samples.perplexity(10.1, "a"), window_nlls=noise)), evaluation(9.0)
    )
    assert unclear is not None
    assert unclear.closed is None, "the gap is below twice its error"
    alone = gain(replace(evaluation(20.0), reference=None), replace(evaluation(15.0), reference=None))
    assert alone is not None
    assert alone.closed is None
    known, unknown = evaluation(20.0), replace(evaluation(15.0), reference=None)
    whole = gain(known, evaluation(15.0))
    assert whole is not None
    assert whole.closed is not None
    assert gain(known, unknown) == gain(replace(known, reference=None), evaluation(15.0)) == whole
    assert gain_text(known, unknown, "recovery") == gain_text(known, evaluation(15.0), "recovery")
    elsewhere = [replace(each, reference=samples.perplexity(10.0, "b")) for each in (known, unknown)]
    assert gain(*elsewhere) == alone, "the dense model was measured on other windows"
    assert gain(replace(known, perplexity=replace(samples.perplexity(20.0, "a"), nll=math.inf)), unknown) is None
    short = replace(samples.perplexity(20.0), window_nlls=())
    unpaired = gain(replace(evaluation(20.0, "wikitext2"), perplexity=short), evaluation(15.0, "wikitext2"))
    assert unpaired is not None
    assert unpaired.closed == pytest.approx(1 - math.log(1.5) / math.log(2))
    assert math.isnan(unpaired.closed_error or 0.0)
    assert "±" not in closed_text(unpaired)


def test_model_card_of_a_recovery() -> None:
    report = samples.recovery()
    block, text = card_parts(report)
    assert block["base_model"] == ["owner/small"], "the dense model, not the run that went in"
    assert block["license"] == "apache-2.0"
    assert "recovery" in block["tags"]
    for part in (
        "# owner/small, 50% sparse, recovered",
        "2,551,808 numbers (`lora`) were trained on 246k tokens with loss, from c4.jsonl, to match the dense model's "
        "predictions",
        "62.0 ± 0.2 % of the gap",
        "| 25.32 ± 0.51 | 46.53 ± 0.93 | 31.90 ± 0.64 |",
        "recovered: lora, kl, 246k tokens with loss of c4.jsonl",
    ):
        assert part in text, part
    assert "/home/someone" not in text
    assert text_used(report).endswith("; 246k tokens with loss passed")
    assert report.recovery is not None
    used = f"* training text: c4.jsonl: {report.recovery.windows} windows"  # not those held out among them
    assert used in text
    figures = {
        name: PreferenceFigures(accuracy=0.5, accuracy_error=0.1, normalised=0) for name in ("pruned", "aligned")
    }
    report.alignment = Alignment(pairs=49, held_out_pairs=3, test_pairs=8, test=figures)
    assert "* pairs of c4.jsonl: 49 pairs to train on, 3 held out, 8 to test (" in card_parts(report)[1]
    report.alignment = None
    assert "This is owner/small (LlamaForCausalLM), pruned after training to **50%** with `fistapruner`." in text


def test_model_card_of_a_recovery_does_not_claim_a_pruning_by_another_program() -> None:
    report = samples.recovery()
    assert report.lineage is not None
    report.lineage = report.lineage.model_copy(update={"stages": report.lineage.stages[-1:]})
    _, text = card_parts(report)
    assert "which was pruned to **50%** before `fistapruner` trained it." in text
    assert "pruned after training" not in text


def test_scores_before_training_are_those_of_the_same_items() -> None:
    report = samples.recovery()
    assert report.recovery is not None
    before = report.recovery.before[0]  # arc_easy over 2376 items, piqa
    easy, piqa = before.tasks
    after = [replace(task, value=task.value + 0.02, p_value=0.5) for task in before.tasks]

    def shown(*tasks: TaskResult) -> tuple[dict[str, str], str]:
        report.evaluations[1:] = [Evaluation("run/model", "small", tasks=tasks)]
        return {row[0]: row[2] for row in recovery_rows(report)}, model_card(report)

    page, card = shown(*after)
    assert (page["arc_easy, acc, %"], page["piqa, acc, %"]) == ("52.0 ± 1.0", "65.5 ± 1.1")
    assert page["Mean of 2 tasks, %"] == f"{100 * (easy.value + piqa.value) / 2:.1f} ± 0.8"
    assert "p = 0.500 | 0.5800 ± 0.0101 | 0.5200 ± 0.0102 | 0.5400 ± 0.0102 |" in card
    others = {"items": 100, "shots": 5, "source": "another file", "dtype": "float32", "metric": "acc_norm"}
    for other in ({name: value} for name, value in others.items()):
        page, card = shown(replace(after[0], **other), after[1])
        assert (page[f"arc_easy, {other.get('metric', 'acc')}, %"], page["piqa, acc, %"]) == ("–", "65.5 ± 1.1")
        assert page["Mean of 2 tasks, %"] == "–"
        assert "0.5200 ± 0.0102" not in card


@pytest.mark.parametrize("known", [True, False])
def test_a_mean_of_tasks_takes_plain_accuracy_and_is_compared_where_every_task_is(known: bool) -> None:
    dense = {"reference": 0.7, "reference_standard_error": 0.02}
    tasks = (
        TaskResult("a", "acc", 50, 0.5, 0.03, **dense),
        TaskResult("a", "acc_norm", 50, 0.9, 0.05, **dense),
        TaskResult("b", "acc_norm", 50, 0.8, 0.05, **dense),
        TaskResult("b", "acc", 50, 0.6, 0.04, reference=0.65 if known else None, reference_standard_error=0.04),
    )
    name, before, value, change, how = quality_rows([Evaluation("m", "dense", tasks=tasks)])[-1]
    assert (name, value) == ("Mean of 2 tasks, %", "55.0 ± 2.5")
    error = 100 * math.hypot(0.02, 0.04) / 2
    assert (before, change) == ((f"67.5 ± {error:.1f}", "−12.5") if known else ("–", "–"))
    assert how == "unweighted mean over a acc, b acc"


def test_an_evaluation_of_tasks_alone_hides_no_perplexity() -> None:
    pruned, recovered = samples.report(), samples.recovery()
    only_tasks = Evaluation("run/model", "small", tasks=pruned.evaluations[0].tasks)
    for report in (pruned, recovered):
        report.evaluations.insert(0, only_tasks)
    assert "Perplexity on wikitext2 went from 25.32 to 46.53" in verdict(pruned)
    assert "The most likely next token stayed the same for 62.0 %" in verdict(pruned)
    assert "of the gap is closed" in verdict(recovered)
    assert "62.0 ± 0.2 % of the gap" in model_card(recovered)


def card_parts(report: Report) -> tuple[dict[str, Any], str]:
    _, block, text = model_card(report).split("---\n", 2)
    return yaml.safe_load(block), text


def test_model_card_metadata_and_figures() -> None:
    report = samples.report()
    report.model.source, report.model.revision, report.model.license = "owner/name", "ab" * 20, "apache-2.0"
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


def test_a_licence_of_several_lines_adds_nothing_to_the_metadata() -> None:
    card = plain_card("mit\ntags: [official]\n---\n# forged", "A model", "has made it")
    block = yaml.safe_load(card.removeprefix("---\n").partition("\n---\n")[0])
    assert block["tags"] == ["pruning", "sparsity", "fistapruner"]
    assert block["license"].startswith("mit\n")
    assert "license" not in yaml.safe_load(plain_card(None, "A model", "has made it").split("---\n")[1])


def test_model_card_of_a_local_model_names_no_folder_of_this_machine() -> None:
    report = Report(recipe={"sparsity": "2:4", "method": "wanda"})
    for folder in ("/home/someone/models/mine", "models/mine"):
        report.model.source = folder
        block, text = card_parts(report)
        assert "base_model" not in block
        assert folder.removesuffix("mine") not in text
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
    near = [p_value(value) for value in (0.0494, 0.0498, 0.04998, 0.05, 0.0502, 0.0506)]
    assert near == ["p = 0.049", "p = 0.0498", "p = 0.04998", "p = 0.050", "p = 0.0502", "p = 0.051"]
    assert (with_error(25.321, 0.414), with_error(25.321, float("nan"))) == ("25.32 ± 0.41", "25.32")
    assert (with_error(-0.0004, 0.0021, 3), with_error(-0.001, None)) == ("0.000 ± 0.002", "0.00")
    assert points(-0.0002) == "0.0"
    assert (with_error(0.00512, 0.00012, 3), with_error(0.5, 0.0, 1)) == ("0.0051 ± 0.0001", "0.5 ± 0.0")
    assert with_error(0.5, 1e-9) == "0.50 ± 0.00"


def test_the_error_of_a_perplexity_is_explained_where_it_is_shown() -> None:
    settings: dict[str, Any] = {"data": "text", "split": "test", "seqlen": 9, "dtype": "float32", "bos": "none"}
    one, two = (
        perplexity_conditions(perplexity_of(torch.tensor(sums), 8, **settings, sha256=""))
        for sums in ([9.0], [9.0, 12.0])
    )
    assert one == "text (test), 1 window of 9 tokens, no BOS, float32"
    assert two == "text (test), 2 windows of 9 tokens, no BOS, float32; ± one standard error"


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
    assert report.calibration is not None
    report.calibration.how = "sql: 3 windows of a*b*<img>.txt"
    _, _, text = model_card(report).split("---\n", 2)
    assert "(sql: 3 windows of a\\*b\\*\\<img\\>.txt)" in text
    assert "\\<img src=x onerror=alert(1)\\>\\`\\|\\[a\\](b) # title" in text
    assert not re.search(r"(?<!\\)<img", text)
    assert "\n````bash\n" in text


def test_a_comparison_in_markdown_shows_names_as_they_are() -> None:
    comparison = samples.comparison()
    comparison.rows[0].method = r"wanda@ignore=[re:layers\.[01]\.*mlp*|x]"
    comparison.rows[-1].error = "<b>no</b> memory"
    assert comparison.dense is not None
    comparison.dense = replace(comparison.dense, data="a*b*.txt")
    text = comparison_markdown(comparison)
    assert r"| wanda@ignore=\[re:layers\\.\[01\]\\.\*mlp\*\|x\] | 50% |" in text
    assert r"on a\*b\*.txt (test)" in text
    assert r"\<b\>no\</b\> memory" in text


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    report = samples.recovery()
    assert report.recovery is not None
    report.recovery.curve, report.totals.seconds = [(1, math.inf), (2, math.nan)], math.nan
    report.layers = []
    text = json.dumps(report.model_dump(mode="json"), allow_nan=False)
    again = Report.model_validate_json(text)
    assert again.totals.seconds is None
    assert again.recovery is not None
    assert [math.isnan(loss) for _, loss in again.recovery.curve] == [True, True]

"""The page says what the JSON says, whatever is missing from it, and lets nothing of it become markup."""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from html import unescape
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import samples

from fistapruner import reporting
from fistapruner.reporting import compare_page
from fistapruner.reporting.alignment_text import preference_sentence
from fistapruner.reporting.compare_page import (
    Point,
    comparison_page,
    points,
    quality_against_sparsity,
    quality_against_time,
    short_labels,
    verdict,
)
from fistapruner.reporting.comparison import comparison_table
from fistapruner.reporting.drawing import FULL, HALF, HEAT, HEAT_LEVELS, NARROW, draw
from fistapruner.reporting.figures import layer_errors, layer_figures, solver_path
from fistapruner.reporting.figures_quality import quality_figures
from fistapruner.reporting.heat_map import _brief
from fistapruner.reporting.model_card import model_card
from fistapruner.reporting.page import run_page
from fistapruner.reporting.recovery_text import change_text
from fistapruner.reporting.size_and_speed import (
    NOT_MEASURED,
    QUANTISE_FIRST,
    low_rank_sentence,
    low_rank_share,
    size_rows,
    speed_rows,
    speed_table,
)
from fistapruner.reporting.structure_text import structure_table
from fistapruner.reporting.summary import summary
from fistapruner.reporting.tiles import tiles
from fistapruner.reporting.traces import TRACES
from fistapruner.reporting.write import write_page
from fistapruner.runs.base import parse
from fistapruner.runs.comparison_records import Comparison
from fistapruner.runs.labels import PHASES
from fistapruner.runs.layer_records import RemovalEntry
from fistapruner.runs.records import CalibrationTask, Lineage, ModelFacts, Report, Stage
from fistapruner.runs.training_records import Alignment, PreferenceFigures, Recovery
from fistapruner.runtime.formatting import duration, significant, size

pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")


@pytest.fixture
def text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without their drawings, which take longer than all else, for tests of what a page says."""
    monkeypatch.setenv("FISTAPRUNER_FIGURES", "0")


@cache
def sample_page() -> str:
    """The page of the sample run, drawn once."""
    return _drawn(samples.report(4))


@cache
def recovery_page() -> str:
    """The page of the sample recovery run of two tasks, drawn once."""
    return _drawn(samples.recovery(4, tasks=True))


def _drawn(report: Report) -> str:
    """The page of a report with its drawings, whichever test asks first."""
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("FISTAPRUNER_FIGURES", raising=False)
        return run_page(report)


@pytest.mark.usefixtures("text_alone")
def test_headline_numbers_are_the_report_s() -> None:
    text = run_page(samples.report())
    for part in (
        "46.53 ± 0.93",
        "25.32 ± 0.51",
        "×1.84",
        "0.710 ± 0.020",
        "62.0 %",
        "6 min 52 s",
        "1.86 GiB",
        "McNemar p &lt; 0.001",
    ):
        assert part in text, part
    assert "wikitext2 (test), 60 windows of 1024 tokens, no BOS, bfloat16" in text
    assert "The capital of France is" in text


def test_one_file_that_asks_for_nothing() -> None:
    for text in (sample_page(), recovery_page(), comparison_page(samples.comparison())):
        assert "<script" not in text
        assert re.findall(r"(?:src|href)=\"(?!#|data:)[^\"]*\"", text) == []
        assert "@import" not in text
        assert [url for url in re.findall(r"url\(([^)]*)\)", text) if not url.startswith("#")] == []
        assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {"http://www.w3.org/2000/svg"}
        assert not re.search(r"#(?:0[1-4]){3}\b|#1100|#2200", text), "a place-holder colour was left in a figure"


def test_the_same_report_gives_the_same_page() -> None:
    assert run_page(samples.report(4)) == sample_page()


SMALL_PARTS = (
    "totals",
    "recipe",
    "machine",
    "versions",
    "calibration",
    "generations",
    "plan",
    "started",
    "command",
    "fingerprint",
    "speed",
)


@pytest.mark.parametrize("missing", [("layers",), ("evaluations",), SMALL_PARTS])
def test_any_part_may_be_missing(missing: tuple[str, ...]) -> None:
    data = samples.report(2).model_dump(mode="json")
    for part in missing:
        del data[part]
    assert "</html>" in run_page(parse(Report, data, "sample"))


def test_an_infinite_perplexity_is_said_to_be_one() -> None:
    data = samples.report(2).model_dump(mode="json")
    for key in ("perplexity", "standard_error", "nll", "nll_standard_error"):
        data["evaluations"][0]["perplexity"][key] = None
    assert "∞" in run_page(parse(Report, data, "sample"))
    for evaluation in data["evaluations"]:
        assert 'id="figure-divergence"' in run_page(parse(Report, data, "sample"))
        for key in ("kl", "kl_standard_error"):
            evaluation["divergence"][key] = None
    page = run_page(parse(Report, data, "sample"))
    assert 'id="figure-divergence"' not in page
    assert "∞" in page


def test_an_empty_run_has_a_page() -> None:
    text = run_page(Report())
    assert "The run is not finished" in text
    assert "<figure" not in text


def test_operators_may_lack_all_that_is_optional() -> None:
    operator = {"name": "mlp.up", "shape": [4, 4], "sparsity": "50%", "zeros": 8, "density": 0.5}
    data = {
        "status": "failed",
        "error": "the disk is full",
        "layers": [{"index": 0, "operators": [operator]}, {"index": 1}],
    }
    text = run_page(parse(Report, data, "sample"))
    assert "the disk is full" in text
    assert "figure-layer-sparsity" in text


def test_text_never_becomes_markup() -> None:
    hostile = "<script>alert(1)</script>\"'&"
    report = samples.report(2)
    report.generations[0].prompt = report.generations[0].dense = report.generations[0].pruned = hostile
    report.warnings = [hostile]
    report.command = report.error = report.model.source = hostile
    report.recipe = {"method": hostile, "sparsity": hostile}
    report.layers[0].operators[0].name = hostile
    report.layers[0].operators[0].steps[0]["method"] = hostile
    assert report.workload is not None
    report.workload.tasks = {hostile: report.workload.tasks["chat"]}
    report.lineage = Lineage(
        source=ModelFacts(source=hostile), stages=[Stage(kind="prune", settings={"sparsity": hostile})]
    )
    text = run_page(report)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    recovered = samples.recovery(2, tasks=True)
    assert recovered.recovery is not None
    assert recovered.calibration is not None
    recovered.recovery.parameters = recovered.recovery.loss = recovered.generations[0].recovered = hostile
    recovered.recovery.checks[0].by_task = recovered.recovery.checks[-1].by_task = {hostile: 1.0}
    recovered.calibration.tasks = {hostile: CalibrationTask(source=hostile, how=hostile)}
    text = run_page(recovered)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    compared = samples.comparison()
    compared.model.source = compared.rows[0].method = compared.rows[-1].error = compared.command = hostile
    compared.warnings = [hostile]
    text = comparison_page(compared)
    assert "<script" not in text
    assert "&lt;script&gt;" in text


@pytest.mark.usefixtures("text_alone")
def test_a_smaller_model_with_zeros_is_not_called_as_large_as_the_dense_one() -> None:
    report = samples.report(2)
    filled = "Rows named dense hold the same weights with their zeros filled in"
    assert filled in run_page(report)
    report.recipe = {**report.recipe, "structure": {"remove": "25%"}, "sparsity": "2:4"}
    assert report.speed is not None
    report.speed["speeds"].append(samples.speed("smaller float32", 12.0))
    text = run_page(report)
    assert "Rows named dense are the dense model, before structure was removed" in text
    assert filled not in text
    assert "as large" not in text


@pytest.mark.usefixtures("text_alone")
def test_sizes_and_speeds_of_a_recovered_smaller_model() -> None:
    """Sizes are beside those of the dense model, not of the input; speeds stand alone where that model is gone."""
    report = samples.recovery()
    assert report.lineage is not None
    report.lineage.stages[0].settings |= {"structure": {"remove": "25%"}, "sparsity": "0%"}
    report.lineage.source.bytes, report.model.bytes = 400_000_000, report.totals.checkpoint_bytes
    report.speed = {"speeds": [samples.speed("smaller float32", 12.0)], "sentence": "nothing to compare with"}
    text = run_page(report).replace("<wbr>", "")
    assert f"dense {size(400_000_000)}" in text
    assert "Decoding, smaller float32, tokens/s" in text
    assert "not measured" not in text
    card = model_card(report)
    assert "| Decoding, smaller float32, tokens/s |" in card
    assert "(–)" not in card


def test_sizes_are_those_of_all_files_against_the_dense_ones() -> None:
    report = samples.report(2)
    report.model.bytes = 400 * 2**20
    totals = report.totals
    totals.checkpoint_bytes, totals.compressed_bytes, totals.low_rank_bytes = 400 * 2**20, 250 * 2**20, 20 * 2**20
    totals.operator_weights, totals.operator_zeros, totals.low_rank_weights, totals.low_rank = 2000, 1000, 100, 8
    written = ("Checkpoint on disk", "400 MiB", "400 MiB", "×1.00", "zeros are stored as they are")
    beside = ("Low-rank adapter beside it", "–", "20.0 MiB", "×0.0500", "comes on top")
    how = "packed, the same weights bit for bit: a mask and the kept values"
    packed = ("Compressed checkpoint", "–", "250 MiB", "×0.625")
    assert size_rows(report) == [written, beside, (*packed, f"{how}; the adapter is counted")]
    assert "100 additional weights, 5.00 % of the pruned operators' weights (20.0 MiB)" in low_rank_sentence(report)
    totals.low_rank_bytes, totals.low_rank_weights = None, None
    assert size_rows(report) == [written, (*packed, how)]
    assert low_rank_sentence(report) == low_rank_share(report) == ""
    report.speed, totals.compressed_bytes = None, None
    assert size_rows(report) == [written, ("Compressed checkpoint", "–", "–", "–", NOT_MEASURED)]
    totals.operator_zeros = None
    assert size_rows(report) == [written]
    totals.operator_zeros, report.stacked_experts = 1000, True
    assert size_rows(report) == [written]
    report.stacked_experts, totals.checkpoint_bytes = False, 300 * 2**20
    report.recipe |= {"structure": {"remove": "25%"}, "sparsity": "0%"}
    assert size_rows(report) == [("Checkpoint on disk", "400 MiB", "300 MiB", "×0.750", "fewer parameters")]


def test_speeds_are_those_of_every_form_against_the_fastest_dense_one() -> None:
    report = samples.report(2)
    facts = {
        "dense bfloat16": (10.0, 900),
        "dense float32": (20.0, 800),
        "packed": (30.0, 400),
        "packed int8": (25.0, 300),
    }
    speeds = [
        {
            "variant": name,
            "tokens_per_second": rate,
            "peak_memory": memory * 2**20,
            "batch": 2,
            "prompt": 1,
            "threads": 4,
        }
        for name, (rate, memory) in facts.items()
    ]
    odd = [{"variant": "packed odd", "tokens_per_second": None}, "nothing"]
    report.speed = {"speeds": [*speeds, *odd], "machine": {"cpu": "a processor"}}
    speeds[2] |= {"tokens_per_second_range": [29.0, 31.5], "first_token": 0.02, "file_size": 250 * 2**20, "runs": 5}
    speeds[3]["device"] = "cuda"
    against = "against dense float32, the fastest dense form; greedy, batch 2, 1 prompt token, "
    of = "of the process that decodes, packed against dense float32"
    assert speed_rows(report) == [
        (
            "Decoding, packed, tokens/s",
            *("20.0", "30.0 (29.0 to 31.5)", "×1.50"),
            f"{against}median (range) of 5 runs, 4 threads, a processor",
        ),
        ("Decoding, packed int8, tokens/s", "20.0", "25.0", "×1.25", f"perplexity not measured, {against}a processor"),
        ("Peak memory while decoding", "800 MiB", "400 MiB", "×0.500", of),
    ]
    assert speed_table(report)[2] == ("packed", "30.0", "29.0 to 31.5", "20 ms", "400 MiB", "250 MiB")
    assert speed_table(report)[4] == ("packed odd", *"–––––")
    report.speed = None
    assert [row[-1] for row in speed_rows(report)] == [NOT_MEASURED]
    report.status = "running"
    assert speed_rows(report) == []


def test_gguf_files_stand_beside_the_forms_and_are_none_of_them() -> None:
    report = samples.report(2)
    rows = [samples.speed(name, rate) for name, rate in (("dense float32", 12.0), ("packed", 30.0))]
    report.speed = {"speeds": rows, "machine": {"cpu": "a processor"}}
    unmeasured, alone = run_page(report), speed_rows(report)
    rows.append(samples.speed("llama.cpp dense-Q8_0", 99.0) | {"perplexity": 25.36, "kl": 0.003})
    page = unescape(run_page(report))
    assert page.count("KL, nats a token</th>") == unmeasured.count("KL, nats a token</th>") + 1
    assert "llama.cpp dense-Q8_0" in page
    said = "zeros filled in; their perplexity is the dense model's.", "GGUF files in llama.cpp, and evaluated with"
    assert [text in " ".join(unmeasured.split()) for text in said] == [False, False]
    assert [text in " ".join(page.split()) for text in said] == [True, True]
    assert "0.00300" in page
    assert speed_rows(report) == alone  # the fastest dense form is still one of ours


@pytest.mark.usefixtures("text_alone")
def test_quantising_is_named_once_where_sizes_are() -> None:
    report = samples.report(1)
    report.recipe |= {"structure": {"remove": "25%"}, "sparsity": "0%"}
    for text in (sample_page(), recovery_page(), run_page(report)):
        assert unescape(text).count(QUANTISE_FIRST) == 1
    report.totals.checkpoint_bytes = None
    assert QUANTISE_FIRST not in unescape(run_page(report))


def test_the_rate_of_reading_prompts_counts_the_tokens_of_all_prompts() -> None:
    report, prompts = samples.report(2), {"batch": 4, "prompt": 30}
    rows = [samples.speed(name, 12.0) | prompts for name in ("dense float32", "smaller float32")]
    rows[1]["first_token"] = 0.05
    rows.append(samples.speed("packed", 30.0) | prompts | {"first_token": 0.01})  # dense forms alone are compared with
    report.speed = {"speeds": rows}
    found = {row[0]: row[1:4] for row in speed_rows(report)}
    assert found["Reading the prompt, smaller float32, tokens/s"] == ("600", "2,400", "×4.00")


@pytest.mark.usefixtures("text_alone")
def test_the_fastest_form_is_on_the_tile() -> None:
    report = samples.report(2)
    rates = {"dense float32": 10.0, "packed": 12.0, "packed int8": 15.0, "smaller float32": 20.0}
    for best, ratio in (("smaller float32", "×2.00"), ("packed", "×1.20")):  # int8 has other weights
        report.speed = {"speeds": [samples.speed(name, rate) for name, rate in rates.items()]}
        tile = run_page(report).partition("Decoding speed</dt>")[2].partition("</dd>")[0]
        assert ratio in tile
        assert f"{best}, against dense float32" in tile
        del rates[best]


@pytest.mark.usefixtures("text_alone")
def test_speeds_without_a_packed_form_are_not_called_unmeasured() -> None:
    report = samples.report(1)
    report.speed = {"speeds": [samples.speed("dense float32", 12.0)], "sentence": "no packed form"}
    text = run_page(report)
    assert "no packed form" in text
    assert "not measured; " not in text


def test_errors_of_removed_structure_are_those_that_were_measured() -> None:
    report = samples.report(1)
    errors = {"dropped_error": 0.2, "relative_error": 0.1, "validated_dropped": 0.3}
    report.layers[0].removals = [
        RemovalEntry(unit="MLP channels", before=8, after=4, method="obs", compensate="none", **errors),
        RemovalEntry(unit="experts", before=4, after=2, kept=[0, 2], method="reap", compensate="none"),
    ]
    table = structure_table(report)
    assert table.head[3:] == (
        "error of all channels",
        "others as they were",
        "as written",
        "fresh, as they were",
        "fresh, as written",
    )
    channels, experts = table.rows
    assert channels[3:] == ("0 %", "20.0 %", "10.0 %", "30.0 %", "–")
    assert experts[3:] == ("–",) * 5


@pytest.mark.usefixtures("text_alone")
def test_the_lineage_is_shown_stage_by_stage() -> None:
    report = samples.report(2)
    report.lineage = Lineage(
        source=ModelFacts(source="owner/dense", revision="ab" * 20),
        stages=[Stage(kind="prune", settings={"sparsity": "50%", "method": "wanda"}), Stage(kind="recover")],
    )
    lines = ("owner/dense (revision abababababab)", "pruned to 50% with wanda", "recovered")
    assert [
        unescape(line) for line in re.findall(r"<li>(.*?)</li>", run_page(report).partition("<h3>Lineage</h3>")[2])
    ][:3] == [*lines]
    card, summed = model_card(report), summary(report, "runs/first")
    assert all(line in card and line in summed for line in lines)
    assert "Lineage" not in sample_page()


@pytest.mark.usefixtures("text_alone")
def test_packing_is_advised_where_there_are_zeros_to_leave_out() -> None:
    report = samples.report(2)
    assert "'fistapruner pack' makes the file smaller" in summary(report, "runs/first")
    assert "`fistapruner pack` makes it smaller." in model_card(report)
    assert "Only packed" in run_page(report)
    assert "Compressed checkpoint" in run_page(report)
    assert report.totals.operator_weights is not None
    report.totals.compressed_bytes, report.speed = None, None
    for dtype, share, smaller in (  # a mask has a bit for each weight
        ("bfloat16", 0.07, True),
        ("bfloat16", 0.06, False),
        ("bfloat16", 0, False),
        ("float32", 0.5, False),  # packed only with rounded values
    ):
        report.model.dtype = dtype
        report.totals.operator_zeros = int(share * report.totals.operator_weights)
        assert ("fistapruner pack" in summary(report, "runs/first")) == smaller
        assert ("fistapruner pack" in model_card(report)) == smaller
        assert ("Only packed" in run_page(report)) == smaller
        assert ("Compressed checkpoint" in run_page(report)) == smaller


@pytest.mark.usefixtures("text_alone")
def test_zeros_of_the_whole_model_are_the_same_everywhere() -> None:
    """Those that earlier runs made count, too."""
    report = samples.report(2)
    assert report.totals.model_weights is not None
    report.totals.model_zeros = report.totals.model_weights * 5 // 8
    for text, said in (
        (summary(report, "runs/first"), f"62.5 % of all {report.totals.model_weights} weights"),
        (model_card(report), "62.5 % of all weights"),
        (run_page(report), "62.5 % of the model"),
    ):
        assert said in unescape(text)


def test_the_mean_error_of_the_operators_has_one_name() -> None:
    run, compared = samples.report(2), samples.comparison()
    for text in (summary(run, "runs/first"), run_page(run), comparison_table(compared), comparison_page(compared)):
        assert "mean relative error" in text.lower()
    assert compared.rows[0].relative_error == 0.8 / 15
    assert " 5.33 % " in comparison_table(compared)


def test_a_recovery_page_says_what_was_won_on_what() -> None:
    text = unescape(recovery_page())
    for part in (
        "owner/small at 50% sparsity, recovered",
        "recovered: lora, kl, 246k tokens",
        "from 46.53 to 31.90, against 25.32 of the dense model: 62.0 ± 0.2 % of the gap is closed",
        "1.0000 → 0.4311 at step 60 of 60, which is kept",
        "2,551,808 numbers",
        "120 windows of 300 documents to train on, 5 windows of 12 documents held out",
        "sql: texts/sql.jsonl",
        "Time in all",
    ):
        assert part in text, part
    drawn = set(re.findall(r'<figure id="figure-([\w-]+)"', text))
    assert {"training", "change-map", "perplexity", "divergence", "layer-sparsity"} == drawn
    sections = re.findall(r"<h2[^>]*>(.*?)</h2>", text)
    assert {"Training", "What changed", "Side by side"} <= {*sections}
    assert not {"Where the error is", "How the solver got there"} & {*sections}
    assert not re.search(r"--method|--calibration|--allocation", text)
    assert "Training" not in re.findall(r"<h2[^>]*>(.*?)</h2>", sample_page())


def test_the_largest_change_is_named_with_its_layer_and_operator() -> None:
    report = samples.recovery(3)
    changes = {(at.index, op.name): op.change for at in report.layers for op in at.operators if op.change is not None}
    report.layers[1].operators[2].change = 0.5
    assert max(changes.values()) < 0.5
    expected = f"largest ‖ΔW‖ / ‖W‖ 50 % (layer 1, {report.layers[1].operators[2].name})"
    assert change_text(report).endswith(expected)


@pytest.mark.parametrize("missing", ["layers", "evaluations", "calibration", "lineage", "recipe", "totals"])
def test_any_part_of_a_recovery_may_be_missing(missing: str) -> None:
    data = samples.recovery(2).model_dump(mode="json")
    del data[missing]
    report = parse(Report, data, "sample")
    assert "</html>" in run_page(report)
    assert summary(report, "runs/recovered")
    assert model_card(report)


@pytest.mark.usefixtures("text_alone")
def test_a_recovery_that_has_just_begun_has_a_page() -> None:
    text = run_page(Report(kind="recover", recovery=Recovery(parameters="lora", asked_steps=8)))
    assert "0 of 8 steps" in text
    assert "this page shows the steps that are done" in text
    assert "<figure" not in text


@pytest.mark.usefixtures("text_alone")
def test_a_recovery_that_won_nothing_says_so() -> None:
    report = samples.recovery(2)
    assert report.recovery is not None
    report.recovery.kept_step = 0
    for check in report.recovery.checks[1:]:
        check.kept, check.held_out = False, 2.0
    report.recovery.before = [report.evaluations[0]]
    for text in (run_page(report), summary(report, "runs/recovered"), model_card(report)):
        assert "none of 5 checks is better, the weights of the input are kept" in text
        assert "0.0 ± 0.0 %" in text
    del report.recovery.checks[2:]
    assert "none of 1 check is better" in summary(report, "runs/recovered")


def test_markup_stands_in_templates() -> None:
    folder = Path(reporting.__file__).parent
    for path in folder.glob("*.py"):
        assert not re.search(
            r"</?(div|p|h\d|table|t[hdr]|section|span|ul|li|style)\b[^a-z]", path.read_text("utf-8")
        ), path.name


def test_figures_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FISTAPRUNER_FIGURES", "0")
    text = run_page(samples.report(2))
    assert "<svg" not in text
    assert 'id="figure-layer-errors"' in text


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (1, "of 1 test pair, before alignment in 40.0 %; fewer than 20 pairs say little."),
        (19, "of 19 test pairs, before alignment in 40.0 %; fewer than 20 pairs say little."),
        (20, "of 20 test pairs, before alignment in 40.0 %."),
    ],
)
def test_few_test_pairs_are_said_to_say_little(pairs: int, said: str) -> None:
    report, shares = samples.recovery(), {"pruned": 0.4, "aligned": 0.6}
    test = {name: PreferenceFigures(accuracy=share, accuracy_error=0.1, normalised=0) for name, share in shares.items()}
    report.alignment = Alignment(test_pairs=pairs, test=test)
    assert preference_sentence(report).endswith(said)


@pytest.mark.parametrize(
    ("seconds", "split", "said"),
    [
        (
            76.0,
            {"solve": 34.0, "gram": 15.0, "io": 0.2, "plain": 0.0},
            "1 min 16 s (seconds: choosing zeros and weights 34, other 27, sums over the calibration text 15)",
        ),
        (76.0, {"solve": 75.8, "io": 0.2}, "1 min 16 s (seconds: choosing zeros and weights 76)"),
        (50.0, {"solve": 75.8, "io": 0.2}, "50.0 s (seconds: choosing zeros and weights 76)"),  # of several workers
        (0.4, {"solve": 0.2, "io": 0.2}, "400 ms\n"),
    ],
)
def test_the_time_of_a_summary_leaves_out_what_is_nothing(seconds: float, split: dict[str, float], said: str) -> None:
    report = samples.report(2)
    report.totals.seconds, report.totals.time_split = seconds, split
    assert said in summary(report, "runs/first")
    report.totals.time_split = {**split, "evaluation": 3600.0, "samples": 60.0}
    text = summary(report, "runs/first")
    assert "(seconds: evaluation 3600, " in text
    assert "sample prompts 60" in text
    found = dict(tile[:2] for tile in tiles(report))
    assert found["Time in all"] == duration(seconds + 3660)


@pytest.mark.usefixtures("text_alone")
def test_a_text_that_was_evaluated_again_stands_once_on_the_page() -> None:
    report = samples.report(2)
    first = report.evaluations[0]
    assert first.perplexity is not None
    again = replace(first.perplexity, windows=7, seqlen=32, perplexity=47.77)
    report.evaluations.append(replace(first, perplexity=again, tasks=()))
    text = run_page(report)
    assert ("47.77" in text, "46.53" in text) == (True, False)
    assert first.tasks[0].task in text


def test_tiles_are_of_one_form_of_the_model() -> None:
    report = samples.report(2)
    assert report.speed is not None
    report.speed["speeds"].append(samples.speed("packed int8", 60.0) | {"perplexity": 47.1})
    _, value, note = next(tile for tile in tiles(report) if tile[0] == "Decoding speed")
    assert (value, note.partition(", against")[0]) == ("×1.30", "26.0 tokens/s, packed")
    (how,) = [row[4] for row in speed_rows(report) if "int8" in row[0]]
    assert how.startswith("perplexity 47.1, against dense")


def test_a_start_that_made_no_difference_is_said() -> None:
    report = samples.report(1)
    steps = [operator.steps for operator in report.operators]
    for number, found in enumerate(steps):
        found[-1]["start_kept"] = number == 0
    assert f"(the start was kept in 1 of {len(steps)} operators)" in summary(report, "runs/first")


def test_evaluations_on_one_text_are_told_apart_in_figures() -> None:
    report = samples.report(2)
    first = report.evaluations[0]
    alone = quality_figures(report)
    assert first.perplexity is not None
    report.evaluations.append(replace(first, perplexity=replace(first.perplexity, windows=7, seqlen=32)))
    for key in ("perplexity", "divergence"):
        drawing = quality_figures(report)[key]
        for where in (drawing.wide, drawing.narrow, drawing.description):
            assert "wikitext2, 60 x 1024" in where
            assert "wikitext2, 7 x 32" in where
        assert " x 1024" not in alone[key].wide


@pytest.mark.usefixtures("text_alone")
def test_a_run_that_sets_no_zeros_has_no_figure_of_them() -> None:
    report = samples.report(2)
    assert "layer-sparsity" in layer_figures(report)
    report.recipe = {**report.recipe, "structure": {"remove": "25%"}, "sparsity": "0%"}
    assert "layer-sparsity" not in layer_figures(report)


@pytest.mark.parametrize("width", [NARROW, HALF])
def test_the_legend_of_the_errors_is_above_the_data(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    plots: list[Any] = []
    monkeypatch.setattr("fistapruner.reporting.figures.draw", lambda key, title, plot, **_: plots.append(plot))
    layer_errors(samples.report().layers)
    figure = Figure(figsize=(width / 72, 300 / 72), dpi=72, layout="constrained")
    plots[0](figure, width)
    figure.draw_without_rendering()
    (legend,), (axes,) = figure.legends, figure.axes
    box = legend.get_window_extent()
    assert box.y0 >= axes.get_window_extent().y1
    assert 0 <= box.x0 < box.x1 <= width


@contextmanager
def plotted(module: str, width: int) -> Iterator[dict[str, Any]]:
    """Draw the figures of a module on matplotlib's own, by key, without an SVG of them."""
    from matplotlib.figure import Figure

    figures: dict[str, Any] = {}

    def plot(key: str, title: str, onto: Any, **others: Any) -> None:
        figures[key] = Figure()
        onto(figures[key], width)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"fistapruner.reporting.{module}.draw", plot)
        yield figures


def test_lines_and_bars_of_decoder_layers_are_those_of_the_report() -> None:
    report = samples.report(4)
    report.layers[2].operators[4].zeros = 0
    with plotted("figures", HALF) as drawn, plotted("heat_map", HALF):
        layer_figures(report)
    (axes,) = drawn["layer-errors"].axes
    means = [mean(operator.relative_error or 0.0 for operator in layer.operators) for layer in report.layers]
    for line, shares in zip(axes.lines, (means, [0.02] * 4), strict=True):
        assert line.get_xdata().tolist() == [0, 1, 2, 3]
        assert line.get_ydata().tolist() == pytest.approx([100 * share for share in shares])
    assert axes.get_ylim()[0] == 0
    (axes,) = drawn["layer-sparsity"].axes
    weights = sum(operator.shape[0] * operator.shape[1] for operator in report.layers[0].operators)
    third = 50 - 100 * (192 * 64 // 2) / weights
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([50, 50, third, 50])
    assert [bar.get_x() + bar.get_width() / 2 for bar in axes.patches] == pytest.approx([0, 1, 2, 3])
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[2, 0], [2, 50]]]
    assert axes.get_ylim() == (0, 100)
    (axes,) = drawn["time-by-layer"].axes
    known = ("capture", "gram", "solve", "io", "other")
    phases = dict(zip(known, axes.containers, strict=True))
    assert axes.get_legend_handles_labels()[1] == [PHASES.get(phase, phase) for phase in known]
    for phase, bars in phases.items():
        expected = [layer.seconds.get(phase, 0.0) for layer in report.layers]
        assert [bar.get_height() for bar in bars] == pytest.approx(expected)
    ends = [bar.get_y() + bar.get_height() for bar in phases["other"]]
    assert ends == pytest.approx([sum(layer.seconds.values()) for layer in report.layers])
    assert axes.get_ylim()[1] > max(ends)


def test_the_steps_of_solvers_are_those_of_the_report() -> None:
    """The path is that of the operators with the largest errors; one operator has had the first step alone."""
    report = samples.report(4)
    del report.layers[0].operators[0].steps[1]
    with plotted("figures", HALF) as drawn, plotted("heat_map", HALF):
        layer_figures(report)
    (axes,) = drawn["chain-errors"].axes
    errors = [100 * (operator.relative_error or 0.0) for operator in report.operators]
    for place, expected in enumerate(([1.2 * error for error in errors], errors[1:])):
        dots, bar = axes.lines[2 * place : 2 * place + 2]
        assert sorted(dots.get_ydata()) == pytest.approx(sorted(expected))
        assert all(abs(x - place) <= 0.2 for x in dots.get_xdata())
        assert bar.get_ydata() == pytest.approx([median(expected)] * 2)
    above, below = drawn["solver-path"].axes
    assert [line.get_label() for line in above.lines] == ["1 down_proj", "1 up_proj", "1 v_proj", "1 gate_proj"]
    (rounds,) = {tuple(line.get_ydata()) for line in above.lines}
    assert rounds == pytest.approx([1 - 0.05 * k + 0.012 * k * k for k in range(6)])
    assert below.lines[0].get_ydata().tolist() == pytest.approx([1e-4 * 3 ** (k % 4) for k in range(6)])
    assert below.lines[0].get_xdata().tolist() == [1, 2, 3, 4, 5, 6]
    assert (above.get_ylabel(), below.get_ylabel(), below.get_xlabel()) == ("error, first = 1", "λ", "round")
    assert (above.get_yscale(), below.get_yscale()) == ("linear", "log")


@pytest.mark.parametrize("width", [NARROW, FULL])
def test_cells_of_a_heat_map_have_the_color_of_their_value(width: int) -> None:
    """Layers across a wide figure, down a narrow one; the scale ends with the largest. An unknown one has no cell."""
    from matplotlib.colors import to_rgba

    report = samples.report(4)
    report.layers[1].operators[2].relative_error = None
    with plotted("figures", width), plotted("heat_map", width) as drawn:
        layer_figures(report)
    axes, scale = drawn["error-map"].axes
    names = [operator.name.rpartition(".")[2] for operator in report.layers[0].operators]
    ticks = [[text.get_text() for text in texts] for texts in (axes.get_xticklabels(), axes.get_yticklabels())]
    assert ticks == ([list("0123"), names] if width == FULL else [names, list("0123")])
    cells = {(round(cell.get_x() + 0.47), round(cell.get_y() + 0.46)): cell.get_facecolor() for cell in axes.patches}
    levels = {to_rgba(color): level for level, color in enumerate(HEAT)}
    places = {
        (layer.index, row): 100 * operator.relative_error
        for layer in report.layers
        for row, operator in enumerate(layer.operators)
        if operator.relative_error is not None
    }
    found = {value: levels[cells.pop(place if width == FULL else place[::-1])] for place, value in places.items()}
    assert not cells
    low, high = sorted(found)[1], max(found)  # the scale leaves out the lowest twentieth, here one of 28
    for value, level in found.items():
        share = math.log(value / low) / math.log(high / low)
        assert level == min(max(math.floor(share * HEAT_LEVELS), 0), HEAT_LEVELS - 1)
    labels = [text.get_text() for text in (scale.get_yticklabels() if width == FULL else scale.get_xticklabels())]
    assert labels == [
        f"≤ {significant(low, 2)} %",
        f"{significant(math.sqrt(low * high), 2)} %",
        f"{significant(high, 2)} %",
    ]
    if width == FULL:
        written = {tuple(map(round, text.get_position())): float(text.get_text()) for text in axes.texts}
        assert written == pytest.approx(places, abs=0.05)


@pytest.mark.parametrize(
    ("value", "said"), [(0.004, "<0.01"), (0.01, "0.01"), (0.994, "0.99"), (1, "1.0"), (99.9, "99.9"), (99.96, "100")]
)
def test_a_cell_has_room_for_its_number(value: float, said: str) -> None:
    assert _brief(value) == said


@pytest.mark.parametrize("kind", ["prune", "recover"])
def test_bars_of_quality_are_those_of_the_evaluations(kind: str) -> None:
    from matplotlib.container import ErrorbarContainer

    report = samples.report(1) if kind == "prune" else samples.recovery(1)
    with plotted("figures_quality", HALF) as drawn:
        quality_figures(report)
    (axes,) = drawn["perplexity"].axes
    expected = [25.32, 46.53, 12.3, 17.4] if kind == "prune" else [25.32, 46.53, 31.9]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(expected)
    assert [text.get_text() for text in axes.texts] == [f"{value:.2f}" for value in expected]
    labels = [text.get_text().rpartition(", ")[2] for text in axes.get_yticklabels()]
    assert labels == (["dense", "pruned"] * 2 if kind == "prune" else ["dense", "before", "recovered"])
    spans = [bars[2][0].get_segments()[0] for bars in axes.containers if isinstance(bars, ErrorbarContainer)]
    errors = [(end - start) / 2 for (start, _), (end, _) in spans]
    assert errors == pytest.approx([0.02 * value for value in expected])
    left, right = drawn["divergence"].axes
    kl, agreement = ([0.71, 0.71], [0.62, 0.62]) if kind == "prune" else ([0.71, 0.3], [0.62, 0.75])
    assert [bar.get_width() for bar in left.patches] == pytest.approx(kl)
    assert [bar.get_width() for bar in right.patches] == pytest.approx([100 * (1 - share) for share in agreement])


def test_a_solver_s_records_may_be_anything() -> None:
    report = samples.report(2)
    odd: list[Any] = [
        "no list",
        [1, 2],
        [{"lambda": None, "e_total": 0}] * 3,
        [{"lambda": 1.0, "e_total": None}] * 2,
        [],
    ]
    for operator, records in zip(report.layers[0].operators, [*odd, None], strict=False):
        operator.steps = [{"method": "fista", "rounds": records, "e_total": 1.0}, {"method": "gone"}, {}]
    assert "</html>" in run_page(report)


def test_alps_records_are_drawn() -> None:
    report = samples.report(2)
    for layer in report.layers:
        for operator in layer.operators:
            path = [{"step": 3 * k, "rho": 0.1 * 1.2**k, "support_change": 0.1 / k} for k in range(1, 6)]
            operator.steps = [{"method": "alps", "relative_error": operator.relative_error, "path": path}]
    text = run_page(report)
    assert "penalty ρ" in text
    assert TRACES["alps"].caption in text
    with plotted("figures", HALF) as drawn:
        solver_path(report.layers)
    above, below = drawn["solver-path"].axes
    assert above.lines[0].get_ydata() == pytest.approx([100 * 0.1 / k for k in range(1, 6)])
    assert below.lines[0].get_ydata() == pytest.approx([0.1 * 1.2**k for k in range(1, 6)])
    assert (above.get_ylabel(), above.get_yscale()) == ("support changed, %", "log")


def test_figures_tell_operators_with_the_same_last_name_apart() -> None:
    report = samples.report(2)
    for layer in report.layers:
        layer.operators[3].name, layer.operators[6].name = "attn.c_proj", "mlp.c_proj"
    for drawing in layer_figures(report).values():
        assert drawing.table is not None
        named = [cell for row in (drawing.table[0], *drawing.table[1]) for cell in row]
        assert not any(cell.split()[-1:] == ["c_proj"] for cell in named), drawing.key
    assert ">attn.c_proj<" in layer_figures(report)["error-map"].wide


def test_the_experts_of_a_mixture_are_a_row_for_each_kind() -> None:
    """With the largest beside their median; dots are thinned, and the largest error stays."""
    report = samples.report(8)
    for layer in report.layers:
        gate = layer.operators.pop(4)
        for expert in range(48):
            error = 0.001 * (expert + 1)
            steps = [step | {"relative_error": error} for step in gate.steps]
            changed = {"name": f"mlp.experts.{expert}.gate_proj", "relative_error": error, "steps": steps}
            layer.operators.append(gate.model_copy(update=changed))
    drawings = layer_figures(report)
    drawing = drawings["error-map"]
    assert drawing.table is not None
    head, rows = drawing.table
    assert len(head) == 1 + 7 + 1
    found = dict(zip(head, rows[0], strict=True))
    assert (found["experts.*.gate_proj"], found["experts.*.gate_proj, largest"]) == ("2.45", "4.80")
    assert "A row such as experts.*.gate_proj is the median of a layer's experts" in drawing.caption
    assert ">experts.*.gate_proj<" in drawing.wide
    assert drawing.wide.count("var(--heat-") < 8 * 7 + 30
    assert "one in" not in drawings["chain-errors"].caption
    for layer in report.layers:
        layer.operators *= 5
    many = layer_figures(report)["chain-errors"]
    assert many.wide.count("<use") < 2100
    assert "Of 2,160 operators, ordered by error, one in 3 is drawn." in many.caption
    assert many == layer_figures(report)["chain-errors"]


@pytest.mark.usefixtures("text_alone")
def test_seeds_are_gathered() -> None:
    found = {(point.method, point.sparsity): point for point in points(samples.comparison().rows)}
    assert found["alps", "50%"].seeds == 2
    assert found["alps", "50%"].gap == pytest.approx(0.605)
    assert ("fista", "50%") not in found
    text = comparison_page(samples.comparison())
    assert '<td class="n">failed</td>' in text
    assert "<li>failed: fista, 50%, seed 0: out of memory</li>" in text
    assert text.count("out of memory") == 1
    assert "± of a gap is one standard deviation over seeds" in text.partition("<footer>")[2]
    assert "± is one standard error." not in text
    assert "± is one standard error." in sample_page().partition("<footer>")[2]
    assert "At 50%, alps (46.14) has the lowest perplexity: below sparsegpt (52.54) by 0.130 ± 0.001 nats" in text
    assert "</html>" in comparison_page(Comparison())


@pytest.mark.parametrize(("gap", "error"), [(None, "out of memory"), (float("inf"), None)])
def test_a_mean_that_lacks_a_seed_says_so_and_wins_nothing(gap: float | None, error: str | None) -> None:
    comparison = samples.comparison()
    row = next(row for row in comparison.rows if row.method == "alps" and row.sparsity == "50%" and row.seed == 1)
    row.gap, row.error = gap, error
    found = {(point.method, point.sparsity): point for point in points(comparison.rows)}
    assert (found["alps", "50%"].seeds, found["alps", "50%"].missing) == (1, 1)
    text = comparison_page(comparison)
    assert "0.600 (1 of 2 seeds)</td>" in text
    assert "alps: gap 0.600 in 4 min 06 s (1 of 2 seeds)" in text
    drawing = quality_against_time(list(found.values()), "50%")
    assert drawing is not None
    assert drawing.table == (
        ["method", "seeds", "seconds", "gap"],
        [
            ["wanda", "2", "138", "0.805 ± 0.007"],
            ["sparsegpt", "2", "142", "0.735 ± 0.007"],
            ["alps", "1 of 2", "246", "0.600"],
        ],
    )
    assert drawing.wide.count("(1 of 2 seeds)") == 1
    assert "0.735 ± 0.007 ★" in text
    assert "At 50%, sparsegpt (52.54) has the lowest perplexity: below wanda" in text
    assert "At 70%, alps (169.29) has the lowest perplexity" in text


@pytest.mark.usefixtures("text_alone")
def test_a_mean_over_fewer_seeds_than_others_have_wins_nothing() -> None:
    comparison = samples.comparison()
    comparison.rows = [row for row in comparison.rows if (row.method, row.sparsity, row.seed) != ("alps", "50%", 1)]
    text = comparison_page(comparison)
    assert "0.600 (1 of 2 seeds)</td>" in text
    assert "At 50%, sparsegpt (52.54) has the lowest perplexity: below wanda" in text
    assert "At 70%, alps (169.29) has the lowest perplexity" in text


@pytest.mark.usefixtures("text_alone")
@pytest.mark.parametrize(
    ("zeros", "more", "settings", "note"),
    [
        (500, 46, {"low_rank": 16}, "+4.6 % weights"),
        (300, None, {"allocation": "total:30%"}, "+20.0 % weights"),
        (375, None, {"structure": {"remove": "25%"}}, "−12.5 % weights"),
        (501, None, {}, None),
    ],
)
def test_methods_that_keep_another_share_of_the_weights_win_nothing(
    zeros: int, more: int | None, settings: dict[str, Any], note: str | None
) -> None:
    comparison = samples.comparison()
    for row in comparison.rows:
        if row.method == "alps" and row.sparsity == "50%":
            row.operator_weights = 750 if "structure" in settings else 1000
            row.operator_zeros, row.low_rank_weights, row.settings = zeros, more, settings
    text = comparison_page(comparison)
    if note is None:
        assert "0.605 ± 0.007 ★" in text
        return
    assert f"0.605 ± 0.007 ({note})</td>" in text
    assert "0.735 ± 0.007 ★" in text
    assert "At 50%, sparsegpt (52.54) has the lowest perplexity: below wanda" in text
    assert f"alps ({note}) has 46.14 at 50%." in text
    assert f"alps: gap 0.605 in 4 min 06 s ({note})" in text
    assert "At 70%, alps (169.29) has the lowest perplexity" in text


@pytest.mark.usefixtures("text_alone")
def test_results_of_a_comparison_begin_with_the_dense_model() -> None:
    """Divergence has a column where it was measured."""
    comparison = samples.comparison()
    comparison.rows[0].time_split = {"solve": 100.0}
    page = unescape(comparison_page(comparison)).partition("of it solving")
    assert re.findall(r"<th[^>]*>([^<]*)<", page[0])[-7:] == [
        *("method", "sparsity", "seed", "perplexity", "gap", "mean relative error", "time")
    ]
    cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", page[2])[2:]
    assert cells[:10] == ["dense", "–", "–", "25.32 ± 0.51", "0", "0", "–", "–", "–", "–"]
    perplexity = f"{25.32 * math.exp(0.6):.2f} ± {25.32 * math.exp(0.6) * 0.02:.2f}"
    assert cells[10:20] == [
        *("alps", "50%", "0", perplexity, "0.600", "4.00 %", "4 min 06 s", "–", "1.86 GiB", "50.00 %")
    ]
    comparison.rows[0].divergence = samples.report(1).evaluations[0].divergence
    page = unescape(comparison_page(comparison)).partition("of it solving")
    assert re.findall(r"<th[^>]*>([^<]*)<", page[0])[-4:] == ["gap", "KL", "mean relative error", "time"]


@pytest.mark.usefixtures("text_alone")
def test_a_method_wins_by_a_difference_over_windows_or_not_at_all() -> None:
    comparison = samples.comparison()
    here = [row for row in comparison.rows if row.sparsity == "50%" and row.perplexity is not None]
    for row in here:
        row.perplexity = samples.perplexity({"alps": 52.50}.get(row.method, 52.51))
        row.gap = row.perplexity.nll - math.log(25.32)
    text = verdict(comparison, points(comparison.rows))
    assert text.startswith("At 50%, no winner: alps (52.50) and wanda (52.51) differ by 0.000")
    assert "±" in text.partition("nats")[0]
    assert "★" not in " ".join(row[1] for row in overview(comparison))
    for row in here:
        row.perplexity = None if row.perplexity is None else replace(row.perplexity, window_nlls=())
    assert verdict(comparison, points(comparison.rows)).startswith("At 50%, no winner")


def overview(comparison: Comparison) -> list[list[str]]:
    """Rows of the first table of a comparison's page."""
    table = comparison_page(comparison).partition("<tbody>")[2].partition("</tbody>")[0]
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:]]


@pytest.mark.usefixtures("text_alone")
def test_a_comparison_is_sorted_by_quality_and_begins_with_perplexity() -> None:
    comparison = samples.comparison()
    name = "wanda@propagate=pruned,dense_target=pruned"
    comparison.rows = [row for row in comparison.rows if row.sparsity == "50%"]
    comparison.rows[0].label = comparison.rows[1].label = name
    rows = overview(comparison)
    assert [row[0].replace("<wbr>", "") for row in rows] == ["dense", "alps", "sparsegpt", name]
    assert [row[1] for row in rows[:2]] == ["25.32", "46.14, gap 0.605 ± 0.007 ★"]
    assert "<wbr>dense_target=" in rows[3][0]
    assert "Quality against sparsity</h3>" not in comparison_page(comparison)
    lines = comparison_table(comparison).splitlines()
    assert [line.split()[0] for line in lines[-9:-2]] == ["alps"] * 2 + ["sparsegpt"] * 2 + [name] * 2 + ["fista"]


def test_a_method_with_more_weights_is_named_only_where_it_beats_the_best() -> None:
    """A method whose zeros are not recorded is compared as one that keeps what was asked."""
    comparison = samples.comparison()
    here = [row for row in comparison.rows if row.sparsity == "50%"]
    for row in here:
        row.operator_zeros = {"sparsegpt": 300, "wanda": None}.get(row.method, 500)
    text = verdict(comparison, points(comparison.rows))
    assert text.startswith("At 50%, alps (46.14) has the lowest perplexity: below wanda (56.35)")
    assert "sparsegpt" not in text.partition("At 70%")[0]
    for row in here:
        row.gap = None if row.gap is None else row.gap - 0.5 * (row.method == "sparsegpt")
    text = verdict(comparison, points(comparison.rows))
    assert "over windows. sparsegpt (+20.0 % weights) has 52.54 at 50%. At 70%" in text


@pytest.mark.parametrize(("gap", "scale"), [(0.1, "log"), (0.0, "linear"), (-0.1, "linear")])
def test_every_gap_has_a_place_in_its_figure(gap: float, scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    monkeypatch.setattr(compare_page, "draw", lambda key, title, plot, **others: plot(figure, 640))
    quality_against_sparsity([Point("wanda", "10%", 1, gap, 0.0, None), Point("wanda", "50%", 1, 0.8, 0.0, None)])
    assert figure.axes[0].get_yscale() == scale
    assert figure.axes[0].get_ylim()[0] < gap


def test_marks_of_a_comparison_are_the_means_of_its_seeds() -> None:
    """Shares of zeros are joined by a line; n:m patterns stand apart, behind them."""
    found = points(samples.comparison().rows)
    with plotted("compare_page", HALF) as drawn:
        quality_against_sparsity(found)
        quality_against_time(found, "70%")
    (axes,) = drawn["gap-sparsity"].axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["50%", "70%", "2:4"]
    gaps = {"wanda": (0.8, 3.0, 1.9), "sparsegpt": (0.73, 2.5, 1.4), "alps": (0.6, 1.9, 1.1)}
    expected = [marks for first, *others in gaps.values() for marks in ([(0, first), (1, others[0])], [(2, others[1])])]
    spread = 0.01 / math.sqrt(2)  # standard deviation of two gaps that differ by 0.01
    for (line, _, (bars,)), marks in zip(axes.containers, expected, strict=True):
        assert np.allclose(line.get_xydata(), [(place, gap + 0.005) for place, gap in marks])
        ends = [(gap + 0.005 - spread, gap + 0.005 + spread) for _, gap in marks]
        assert np.allclose([segment[:, 1] for segment in bars.get_segments()], ends)
    assert axes.get_legend_handles_labels()[1] == list(gaps)
    (axes,) = drawn["gap-time-70-"].axes
    marks = [container[0].get_xydata()[0] for container in axes.containers]
    assert np.allclose(marks, [(138, 3.005), (142, 2.505), (246, 1.905)])
    assert {text.get_text(): text.xy for text in axes.texts} == dict(zip(gaps, map(tuple, marks), strict=True))


def test_names_in_figures_may_have_any_signs() -> None:
    name = "price $5 to $9_x_^{.txt"
    drawing = draw("names", name, lambda figure, _: figure.text(0.1, 0.5, name), caption=name, description=name)
    assert name in drawing.wide


def test_labels_in_figures_are_short_and_different() -> None:
    methods = ("wanda@propagate=pruned", "alps", "alps@propagate=pruned,dense_target=pruned")
    found = [Point(method, "50%", 1, 0.5, 0.0, 10.0) for method in methods]
    assert list(short_labels(found).values()) == ["wanda", "alps (1)", "alps (2)"]


@pytest.mark.usefixtures("text_alone")
def test_write_page_chooses_by_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(samples.report(2).model_dump_json())
    assert write_page(tmp_path) == tmp_path / "report.html"
    (tmp_path / "compare.json").write_text(samples.comparison().model_dump_json())
    assert write_page(tmp_path) == tmp_path / "compare.html"


def themes() -> list[dict[str, str]]:
    """The colours that a page defines for the light and for the dark scheme."""
    style = re.search(r"<style>(.*?)</style>", sample_page(), re.DOTALL)
    assert style is not None
    blocks = re.findall(r":root \{(.*?)\}", style[1], re.DOTALL)
    return [found for block in blocks if (found := dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)))]


def luminance(color: str) -> float:
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast_of_type_and_lines(scheme: int) -> None:
    theme = themes()[scheme]
    assert theme.keys() == themes()[0].keys()
    for ground in ("surface", "page"):
        for name in ("ink", "muted", "accent", "good", "bad"):
            assert contrast(theme[name], theme[ground]) >= 4.5, (name, ground)
    for name in (name for name in theme if name.startswith("series")):
        assert contrast(theme[name], theme["surface"]) >= 3, name
    colors = [theme[f"heat-{level}"] for level in range(HEAT_LEVELS)]
    for level, color in enumerate(colors):
        assert contrast(color, theme["ink"] if level < HEAT_LEVELS // 2 else theme["surface"]) >= 4.5, level
    lights = [luminance(color) for color in colors]
    assert all(a > b for a, b in itertools.pairwise(lights)) or all(a < b for a, b in itertools.pairwise(lights))


@pytest.mark.parametrize("kind", ["run", "recovery", "comparison"])
def test_columns_of_numbers_are_flush_right_and_no_others(kind: str) -> None:
    pages = {"run": sample_page, "recovery": recovery_page}
    text = pages[kind]() if kind in pages else comparison_page(samples.comparison())
    number = re.compile(r"[-−×~<≤]?\s?\d[\d.,' ]*")
    seen = 0
    for table in re.findall(r"<table.*?</table>", text, re.DOTALL):
        body = re.search(r"<tbody[^>]*>(.*)</tbody>", table, re.DOTALL)
        assert body is not None
        if ' class="n"' not in table:  # the data behind a figure
            continue
        rows = [
            re.findall(r"<t[hd]([^>]*)>(.*?)</t[hd]>", row, re.DOTALL)
            for row in re.findall(r"<tr.*?</tr>", body[1], re.DOTALL)
        ]
        for column in zip(*rows, strict=True):
            cells = [unescape(cell) for _, cell in column]
            flush = [' class="n"' in attributes for attributes, _ in column]
            filled = [cell for cell in cells if cell not in ("", "–")]
            names = all(re.fullmatch(r"\d+(\.\d+)?%|\d+:\d+|\d+", cell) for cell in filled)  # sparsities, seeds
            numbers = [bool(number.match(cell)) and " × " not in cell for cell in filled]
            numeric = not names and 2 * sum(numbers) > len(numbers)
            seen += numeric
            assert len(set(flush)) == 1, cells
            assert flush[0] == numeric or names, cells
    assert seen > 5


@pytest.mark.usefixtures("text_alone")
def test_long_runs_of_line_breaks_become_one_line() -> None:
    report = samples.report(2)
    report.generations[0].pruned = "so" + "\n" * 31 + "it"
    assert "so\n[31 line breaks]\nit" in run_page(report)

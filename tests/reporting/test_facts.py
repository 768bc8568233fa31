"""The facts of a run, and their three renderers: terminal text, model card, page."""

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest
import samples
import torch
import yaml

from fistapruner.measure.data import Windows
from fistapruner.measure.logits import perplexity_of
from fistapruner.reporting.facts import facts, lineage_lines, summary
from fistapruner.reporting.measured import NOT_MEASURED, Fact, evaluation_text, points, quality_facts, task_facts
from fistapruner.reporting.model_card import model_card, plain_card
from fistapruner.reporting.page import run_page
from fistapruner.reporting.terminal import status_text
from fistapruner.runs.records import (
    Alignment,
    Divergence,
    Evaluation,
    Lineage,
    ModelFacts,
    PreferenceFigures,
    RemovalEntry,
    Report,
    Stage,
    TaskResult,
    parse,
)

pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")


def found(report: Report) -> dict[str, Fact]:
    """Facts by label; of several with one label the first."""
    return {fact.label: fact for fact in reversed(facts(report))}


def texts(report: Report) -> tuple[str, str, str]:
    """What the three renderers say, without escapes."""
    card, page = model_card(report), run_page(report)
    return summary(report, "runs/first"), re.sub(r"\\(.)", r"\1", card), page.replace("<wbr>", "").replace("&lt;", "<")


def card_parts(report: Report) -> tuple[dict[str, Any], str]:
    _, block, text = model_card(report).split("---\n", 2)
    return yaml.safe_load(block), text


@pytest.mark.parametrize(
    ("report", "parts"),
    [
        (
            samples.report(),
            (
                *("46.53 ± 0.93", "25.32 ± 0.51", "×1.84", "0.710 ± 0.020", "62.0 ± 0.4", "6 min 52 s", "1.86 GiB"),
                "difference from dense −6.0 ± 0.7; 210 lost, 68 won, McNemar p < 0.001",
                "wikitext2 (test), 60 windows of 1024 tokens, no BOS, bfloat16",
                "weights of the pruned operators are zero; zeros of pruned operators are 25.0 % of all weights",
                "choosing zeros and weights 1 min 45 s",
                "32 windows of 1024 tokens",
            ),
        ),
        (
            samples.recovery(tasks=True),
            (
                *("46.53 ± 0.93", "31.90 ± 0.64", "0.608 ± 0.010", "1.0000", "0.4311"),
                "step 60 of 60 is kept",
                "2,551,808 numbers of 84 operators",
                "120 windows of 300 documents, 5 windows of 12 documents held out",
                "owner/small (LlamaForCausalLM, bfloat16, revision abababababab) → pruned to 50% with sparsegpt+fista",
            ),
        ),
    ],
)
def test_all_renderers_say_the_same_facts(report: Report, parts: tuple[str, ...]) -> None:
    for text in texts(report):
        for part in parts:
            assert part in text, part
        assert "/home/someone" not in text


@pytest.mark.parametrize("missing", ["layers", "evaluations", "calibration", "lineage", "recipe", "totals", "machine"])
def test_any_part_may_be_missing(missing: str) -> None:
    for report in (samples.report(2), samples.recovery(2)):
        data = report.model_dump(mode="json")
        del data[missing]
        assert all(texts(parse(Report, data, "sample")))


def test_a_run_that_has_just_begun_has_a_page() -> None:
    assert "0 of 0 decoder layers are done" in run_page(Report())
    operator = {"name": "mlp.up", "shape": [4, 4], "sparsity": "50%", "zeros": 8}
    layers = [{"index": 0, "operators": [operator]}, {"index": 1}]
    text = run_page(parse(Report, {"status": "failed", "error": "the disk is full", "layers": layers}, "sample"))
    assert "Stopped: the disk is full" in text


def test_infinite_figures_are_said_to_be_infinite() -> None:
    """They are null in JSON, and left out of means."""
    sums = torch.tensor([math.inf, 12.0])
    perplexity = perplexity_of(sums, Windows(torch.zeros(2, 9), "text", "test", "none"), torch.float32)
    damage = Divergence(math.inf, math.nan, 0.5, 0.1, math.inf, math.nan)
    report = samples.report(1)
    report.evaluations = [Evaluation("model", "dense", perplexity, samples.perplexity(12.0), damage)]
    report.layers[0].operators[0].relative_error = math.inf
    again = parse(Report, json.loads(report.model_dump_json()), "sample")
    assert report.mean_error == again.mean_error
    assert texts(report)[:2] == texts(again)[:2]
    assert all("∞" in text for text in (*texts(again), evaluation_text(again.evaluations[0])))


def test_a_text_that_was_evaluated_again_stands_once() -> None:
    report = samples.report(2)
    first = report.evaluations[0]
    again = replace(first.perplexity, windows=7, seqlen=32, perplexity=47.77)
    report.evaluations.append(replace(first, perplexity=again, tasks=()))
    for text in (summary(report, "run"), run_page(report)):
        assert ("47.77" in text, "46.53" in text) == (True, False)
        assert first.tasks[0].task in text


def test_sizes_are_those_of_all_files_against_the_dense_ones() -> None:
    report, totals = samples.report(2), samples.report(2).totals
    report.model.bytes, report.totals = 400 * 2**20, totals
    totals.checkpoint_bytes, totals.compressed_bytes, totals.low_rank_bytes = 400 * 2**20, 250 * 2**20, 20 * 2**20
    totals.low_rank_weights, totals.low_rank = 100, 8
    rows = {label: fact.line for label, fact in found(report).items()}
    assert rows["Checkpoint on disk"].startswith("400 MiB (dense 400 MiB); ×1.00 of dense; ")
    assert rows["Low-rank adapter beside it"].startswith("20.0 MiB; ×0.0500 of dense; ")
    assert rows["Compressed checkpoint"].startswith("250 MiB; ×0.625 of dense; ")
    assert rows["Additional weights"].startswith("100; low-rank part of rank 8")
    totals.checkpoint_bytes = 300 * 2**20
    report.recipe |= {"structure": {"remove": "25%"}, "sparsity": "0%"}
    assert found(report)["Checkpoint on disk"].line.startswith("300 MiB (dense 400 MiB); ×0.750 of dense; ")


def test_speeds_are_those_of_every_form_against_the_fastest_dense_one() -> None:
    report = samples.report(2)
    rates = {"dense bfloat16": 10.0, "dense float32": 20.0, "packed": 30.0, "packed int8": 25.0, "smaller float32": 40}
    rows: list[Any] = [samples.speed(name, rate) | {"batch": 2, "threads": 4} for name, rate in rates.items()]
    rows.append({"variant": "packed odd", "tokens_per_second": None})
    report.speed = {"speeds": rows, "machine": {"cpu": "a processor"}}
    lines = {label: fact.line for label, fact in found(report).items()}
    assert lines["Decoding, packed, tokens/s"].startswith("30.0 (28.5 to 31.2) (dense 20.0); ×1.50 of dense float32, ")
    assert lines["Decoding, packed int8, tokens/s"].endswith("file 250 MiB")
    assert "Decoding, packed odd, tokens/s" not in lines
    report.speed = None
    assert found(report)["Decoding speed, tokens/s"].how == NOT_MEASURED
    report.status = "running"
    assert "Decoding speed, tokens/s" not in found(report)


def test_removed_structure_stands_with_its_errors() -> None:
    report = samples.report(1)
    report.recipe |= {"structure": {"remove": "25%", "method": "obs"}, "sparsity": "0%"}
    errors = {"dropped_error": 0.2, "relative_error": 0.1, "validated_error": 0.3}
    report.layers[0].removals = [
        RemovalEntry(unit="MLP channels", before=8, after=4, compensate="none", **errors),
        RemovalEntry(unit="experts", before=4, after=2, kept=[0, 2], compensate="none"),
    ]
    rows = found(report)
    assert "4 of 8 MLP channels" in rows["Structure"].after
    assert "2 of 4 experts" in rows["Structure"].after
    assert "Zeros" not in rows
    cells = re.findall(r">([^<>]*)</t[dh]>", run_page(report))
    place = cells.index("MLP channels 8 → 4")
    assert cells[place + 1 : place + 4] == ["20.0 %", "10.0 %", "30.0 %"]
    assert cells[cells.index("experts 4 → 2, without 1, 3") + 1] == "–"


def test_a_recovery_that_won_nothing_says_so() -> None:
    report = samples.recovery(2)
    report.recovery.kept_step = 0
    report.recovery.before = [report.evaluations[0]]
    for text in texts(report):
        assert "none of 5 checks is lower: the weights of the input are kept" in text


def test_an_alignment_stands_with_its_tests() -> None:
    report = samples.recovery()
    report.kind = "align"
    shares = {"dense": 0.7, "pruned": 0.4, "aligned": 0.6}
    test = {
        name: PreferenceFigures(accuracy=share, accuracy_error=0.1, normalised=share) for name, share in shares.items()
    }
    test["pruned"].lost, test["pruned"].won, test["pruned"].p_value = 3, 5, 0.7266
    report.alignment = Alignment(pairs=49, held_out_pairs=3, test_pairs=8, left_out=2, test=test, margin=0.2)
    report.recipe["pairs_per_step"] = 1
    rows = found(report)
    line = "60.0 ± 10.0 (dense 70.0 ± 10.0, before 40.0 ± 10.0); 8 test pairs; against before 3 lost, 5 won, McNemar"
    assert rows["Preference accuracy, %"].line == f"{line} p = 0.727"
    assert rows["Reward margin"].line == "0.200; beta (h - m) against the model that went in"
    assert rows["Pairs"].line.startswith("49 preference pairs; 3 held out, 8 to test, 2 left out, from c4.jsonl")
    assert "Training text" not in rows


def test_scores_before_training_are_those_of_the_same_items() -> None:
    report = samples.recovery()
    before = report.recovery.before[0]  # arc_easy over 2376 items, piqa
    after = [replace(task, value=task.value + 0.02, p_value=0.5) for task in before.tasks]

    def shown(*tasks: TaskResult) -> dict[str, str]:
        report.evaluations[1:] = [Evaluation("run/model", "small", tasks=tasks)]
        return {fact.label: fact.before for fact in quality_facts(report)}

    rows = shown(*after)
    assert (rows["arc_easy, acc, %"], rows["piqa, acc, %"]) == ("52.0 ± 1.0", "65.5 ± 1.1")
    assert rows["Mean of 2 tasks, %"] == "58.8 ± 0.8"
    others = {"items": 100, "shots": 5, "source": "another file", "dtype": "float32", "metric": "acc_norm"}
    for other in ({name: value} for name, value in others.items()):
        rows = shown(replace(after[0], **other), after[1])
        assert (rows[f"arc_easy, {other.get('metric', 'acc')}, %"], rows["piqa, acc, %"]) == ("", "65.5 ± 1.1")
        assert rows["Mean of 2 tasks, %"] == ""


@pytest.mark.parametrize("known", [True, False])
def test_a_mean_of_tasks_takes_plain_accuracy_and_is_compared_where_every_task_is(known: bool) -> None:
    dense = {"reference": 0.7, "reference_standard_error": 0.02}
    tasks = (
        TaskResult("a", "acc", 50, 0.5, 0.03, **dense),
        TaskResult("a", "acc_norm", 50, 0.9, 0.05, **dense),
        TaskResult("b", "acc_norm", 50, 0.8, 0.05, **dense),
        TaskResult("b", "acc", 50, 0.6, 0.04, reference=0.65 if known else None, reference_standard_error=0.04),
    )
    mean = task_facts(tasks)[-1]
    assert (mean.label, mean.after) == ("Mean of 2 tasks, %", "55.0 ± 2.5")
    error = 100 * math.hypot(0.02, 0.04) / 2
    assert mean.dense == (f"67.5 ± {error:.1f}" if known else "")
    assert mean.how.startswith("difference from dense −12.5; ") == known
    assert mean.how.endswith("unweighted mean over a acc, b acc")
    assert points(-0.0002) == "0.0"


def test_the_card_has_what_the_hub_reads() -> None:
    report = samples.report()
    report.model.source, report.model.revision, report.model.license = "owner/name", "ab" * 20, "apache-2.0"
    block, text = card_parts(report)
    assert (block["base_model"], block["license"]) == (["owner/name"], "apache-2.0")
    assert block["tags"] == ["pruning", "sparsity", "fistapruner", "sparsegpt-fista", "50-percent"]
    assert block["model-index"][0]["results"][0]["metrics"][0]["value"] == 46.53
    assert report.command in text
    assert "neither smaller nor faster" in text
    block, text = card_parts(samples.recovery())
    assert block["base_model"] == ["owner/small"], "the dense model, not the run that went in"
    assert "recovery" in block["tags"]
    assert "# owner/small, 50% sparse, recovered" in text
    assert "| 25.32 ± 0.51 | 46.53 ± 0.93 | 31.90 ± 0.64 |" in text


def test_a_local_model_names_no_folder_and_a_license_adds_nothing() -> None:
    report = Report(recipe={"sparsity": "2:4", "method": "wanda", "calibration": {"source": "/home/someone/c4.jsonl"}})
    for folder in ("/home/someone/models/mine", "models/mine"):
        report.model.source = folder
        block, text = card_parts(report)
        assert "base_model" not in block
        assert folder.removesuffix("mine") not in text
        assert "/home/someone" not in text
        assert "# mine, 2:4 sparse" in text
    card = plain_card("mit\ntags: [official]\n---\n# forged", "A model", "has made it")
    block = yaml.safe_load(card.removeprefix("---\n").partition("\n---\n")[0])
    assert block["tags"] == ["pruning", "sparsity", "fistapruner"]
    assert block["license"].startswith("mit\n")
    assert "license" not in yaml.safe_load(plain_card(None, "A model", "has made it").split("---\n")[1])


def test_a_card_shows_names_as_they_are_and_runs_nothing() -> None:
    report = samples.report()
    report.model.source = "/home/me/<img src=x onerror=alert(1)>`|[a](b)\n# title"
    report.command = "fistapruner prune '```' --out x"
    report.calibration.how = "sql: 3 windows of a*b*<img>.txt"
    _, text = card_parts(report)
    assert "sql: 3 windows of a\\*b\\*\\<img\\>.txt" in text
    assert "\\<img src=x onerror=alert(1)\\>\\`\\|\\[a\\](b) # title" in text
    assert not re.search(r"(?<!\\)<img", text)
    assert "\n````bash\n" in text


@pytest.mark.parametrize(
    ("recipe", "label", "tag"),
    [
        ({"sparsity": "2:4", "allocation": "error"}, "mixed n:4 (50%)", "mixed-n:4"),
        ({"sparsity": "2:4", "allocation": {"down_proj": "1:4"}}, "2:4, others by name", "mixed"),
        ({"sparsity": "2:4", "allocation": {"down_proj": "2:4"}}, "2:4", "2:4"),
    ],
)
def test_sparsities_that_differ_are_told(recipe: dict[str, Any], label: str, tag: str) -> None:
    report = samples.report(2)
    report.recipe |= recipe
    assert report.sparsity == label
    block, text = card_parts(report)
    assert f"**{label}**" in text
    assert tag in block["tags"]


def test_only_structure_is_no_zeros_by_name() -> None:
    report = samples.report()
    report.recipe |= {"sparsity": "0%", "structure": {"remove": "25%", "method": "obs"}, "allocation": {"re:mlp": "0%"}}
    assert report.only_structure
    report.recipe["allocation"] = {"re:mlp": "2:4", "re:self_attn": "2:4"}
    assert (report.only_structure, report.sparsity) == (False, "structure 25% and 0%, others by name")
    assert "Zeros" in found(report)


def test_a_recovery_is_named_by_what_was_trained_and_by_its_operators() -> None:
    report = samples.recovery(2)
    assert (report.method, report.sparsity) == ("recovered: lora, kl, 246k tokens with loss", "50%")
    report.operators[0].sparsity = "2:4"
    assert report.sparsity == "50%", "what the model was pruned to"
    report.lineage = None
    assert report.sparsity == "50.0 %", "the share of zeros"
    for operator in report.operators:
        operator.sparsity = "2:4"
    assert report.sparsity == "2:4"


def test_a_name_in_a_record_adds_no_line_and_no_control_code() -> None:
    report = samples.report()
    report.lineage = Lineage(source=ModelFacts(source="name\x1b[2J\nforged: line"), stages=[Stage()])
    report.model.source, report.warnings = report.lineage.source.source, ["one\ntwo"]
    for text in (lineage_lines(report.lineage)[0], status_text(report)):
        assert text.startswith(r"name\x1b[2J\nforged: line")
    for text in (summary(report, "run"), status_text(report)):
        assert r"one\ntwo" in text

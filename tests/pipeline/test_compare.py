"""The comparison: how methods are named, one protocol for all, going on where it stopped."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, Mock

import pytest
import torch

import tiny
from fistapruner.cli import main
from fistapruner.errors import FistaPrunerError
from fistapruner.measure.data import cut_windows
from fistapruner.measure.evaluate import evaluate as run_evaluation
from fistapruner.models.whole import load_whole
from fistapruner.pipeline import measure
from fistapruner.pipeline.compare import compare
from fistapruner.pipeline.compare_jobs import plan_jobs, run_name
from fistapruner.pipeline.contenders import parse_contenders
from fistapruner.pipeline.protocol import Protocol, distinct_seeds
from fistapruner.pipeline.prune import prune
from fistapruner.reporting.comparison import comparison_table
from fistapruner.reporting.model_card import model_card
from fistapruner.reporting.page import run_page
from fistapruner.runs.comparison_records import CompareRow
from fistapruner.runs.listener import Listener
from fistapruner.runs.records import load_run
from fistapruner.runs.results import Perplexity
from fistapruner.runtime.files import write_json_atomic, write_sealed_json
from fistapruner.runtime.formatting import percent
from fistapruner.settings.settings import Recipe

SETTINGS: dict[str, Any] = {"calibration": {"source": "python", "samples": 3, "seqlen": 32}}


class Counts(Listener):
    """Counts the rows that are measured and the passes of the dense model for it, and interrupts a comparison.

    Args:
        stop: a message that begins so interrupts.
    """

    def __init__(self, stop: str | None = None) -> None:
        self.stop, self.measured, self.dense, self.reports = stop, 0, 0, 0

    def say(self, message: str) -> None:
        self.measured += message.startswith("evaluating on")
        self.reports += message.startswith("report: ")
        if self.stop and message.startswith(self.stop):
            raise KeyboardInterrupt

    def tick(self, what: str, done: int, total: int) -> None:
        self.dense += done == total and what == "decoder layers of dense model"


def test_methods_and_their_settings() -> None:
    contenders = parse_contenders(
        "wanda, alps@propagate=pruned,dense_target=0.5,calibration.samples=4,wanda+refit@allocation=owl,paper"
    )
    assert [contender.label for contender in contenders] == [
        "wanda",
        "alps@propagate=pruned,dense_target=0.5,calibration.samples=4",
        "wanda+refit@allocation=owl",
        "paper",
    ]
    assert contenders[1].settings == {
        "method": "alps",
        "propagate": "pruned",
        "dense_target": 0.5,
        "calibration": {"samples": 4},
    }
    assert contenders[2].settings == {"method": "wanda+refit", "allocation": "owl"}
    assert contenders[3].settings["propagate"] == "dense"
    assert "calibration" not in contenders[3].settings


def test_settings_of_a_single_method_itself_follow_as_those_of_its_recipe_do() -> None:
    jobs = plan_jobs(parse_contenders("alps@iterations=3,propagate=dense,damping=0.1,alps"), ["50%"], [0], SETTINGS)
    [own], [default] = (job.recipe.steps for job in jobs)
    assert (own.iterations, own.damping, jobs[0].recipe.propagate) == (3, 0.1, "dense")
    assert replace(own, iterations=default.iterations, damping=default.damping) == default
    for text, message in (
        ("wanda+refit@rho=3", "unknown setting 'rho'"),
        ("alps@iterations=0", "method alps: iterations"),
    ):
        with pytest.raises(FistaPrunerError, match=message):
            plan_jobs(parse_contenders(text), ["50%"], [0], SETTINGS)


def test_a_list_of_methods_is_read_as_text() -> None:
    text = "wanda@targets=re:.*q_proj,ignore=lm_head,alps@calibration={samples: 2, seqlen: 8},sparsegpt"
    items = ["wanda@targets=re:.*q_proj,ignore=lm_head", "alps@calibration={samples: 2, seqlen: 8}", "sparsegpt"]
    assert parse_contenders(items) == parse_contenders(text)
    wanda, alps, _ = parse_contenders(text)
    assert (wanda.settings["targets"], wanda.settings["ignore"]) == ("re:.*q_proj", "lm_head")
    assert alps.settings["calibration"] == {"samples": 2, "seqlen": 8}


@pytest.mark.parametrize("label", ["wanda@calibration={samples: 2, seqlen: 8}", "wanda@calibration.samples=2", "best"])
def test_a_method_may_have_calibration_settings_of_its_own(label: str) -> None:
    """However they are written, its row is none of another protocol."""
    text = cut_windows("the quick brown fox jumps over it. " * 40, tiny.tokenizer(), 32, 2)
    [job] = plan_jobs(parse_contenders(label), ["50%"], [1], SETTINGS)
    protocol = Protocol(text, "float32", Recipe.build(SETTINGS).calibration)
    settings = job.recipe.resolved().model_dump(mode="json", exclude={"execution"})
    protocol.check(CompareRow(method="wanda", label=label, sparsity="50%", settings=settings), Path("out"), kept=True)


def test_the_recipe_of_a_run_takes_seed_and_execution_of_the_comparison(tmp_path: Path) -> None:
    """A run writes every setting, those that all methods share too."""
    file = tmp_path / "recipe.yaml"
    file.write_text(Recipe.build({**SETTINGS, "method": "wanda", "dense_target": 0.5, "sparsity": "70%"}).to_yaml())
    settings = {**SETTINGS, "execution": {"device": "cpu"}}
    jobs = plan_jobs(parse_contenders([str(file), "wanda"]), ["50%"], [1, 2], settings)
    assert [job.recipe.seed for job in jobs] == [job.recipe.calibration.seed for job in jobs] == [1, 1, 2, 2]
    assert {job.recipe.execution.device for job in jobs} == {"cpu"}
    assert [job.recipe.dense_target for job in jobs[::2]] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dense_target=0.5,alps", "begins with the setting 'dense_target=0.5'"),
        ("wanda,,alps", "empty name"),
        ("wanda,wanda", "same method twice"),
        ("wanda@dense_target", "'dense_target' is not a setting"),
        ("wanda@target=", "'target=' is not a setting"),
        (
            "wanda@calibration=3,calibration.samples=4",
            "calibration is given whole and 'calibration.samples=4' beside it",
        ),
        ("wanda@structure.multiple=16,structure=25%", "structure is given before 'structure=25%' already"),
        ("wanda@seqlen=8,seqlen=9", "seqlen is given before 'seqlen=9' already"),
        ("wanda@calibration.samples=8,calibration.samples=9", "calibration.samples is given before"),
        ("wanda@sparsity=70%", "'sparsity=70%' is for one method, and sparsity is that of --sparsity for all"),
        ("wanda@seed=5", "seed is that of --seeds for all"),
        ("wanda@calibration.seed=5", "calibration.seed is that of --seeds for all"),
        ("wanda@calibration={samples: 4, seed: 5}", "calibration.seed is that of --seeds for all"),
        ("wanda@method=magnitude", "'method=magnitude' is a second method"),
        ("alps@iteration=3", r"^--methods alps@iteration=3: unknown setting 'iteration': did you mean 'iterations'\?$"),
        ("alps@propagat=dense,rho=1", r"unknown setting 'propagat': did you mean 'propagate'\?$"),
        ("alps@xyz=3", "unknown setting 'xyz': one of rho, iterations, .*propagate, .* is expected$"),
        *(
            (f"{name}@{key}=3", f"{key} is one of the own settings of {re.escape(name)}'s steps: write them in a")
            for name, key in (("fista", "iterations"), ("wanda+refit", "iterations"), ("paper", "warm_start"))
        ),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(FistaPrunerError, match=message):
        parse_contenders(text)


def test_a_row_cannot_be_asked_twice(tmp_path: Path) -> None:
    for sparsities, seeds, message in (
        (["50%"], (0, 1, 0), "--seeds '0,1,0': different whole numbers such as 0,1,2 are expected"),
        (["50%", "2:4", "0.5"], (0,), "--sparsity '50%,2:4,0.5' names the same sparsity twice"),
    ):
        with pytest.raises(FistaPrunerError, match=re.escape(message)):
            compare(tmp_path, "wanda", sparsities, tmp_path / "out", seeds=seeds)


@pytest.mark.parametrize("seeds", [3, "0,1,2", None, [0, "1"], [0.5], [True], {0: 1}])
def test_what_is_no_list_of_seeds_is_refused(tmp_path: Path, seeds: Any) -> None:
    message = re.escape(f"seeds {seeds!r}: a list of different whole numbers such as [0, 1, 2] is expected")
    with pytest.raises(FistaPrunerError, match=message):
        compare(tmp_path, "wanda", ["50%"], tmp_path / "out", seeds=seeds)
    assert distinct_seeds(seed for seed in range(3)) == (0, 1, 2)


def test_run_names_are_plain_and_different() -> None:
    names = {
        run_name(label, sparsity, 0)
        for label in ("wanda", "wanda@dense_target=0", "wanda@dense_target=1")
        for sparsity in ("50%", "2:4")
    }
    assert len(names) == 6
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.+-_") for name in names)


def test_one_protocol_and_going_on(tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "dense model")
    out = tmp_path / "out"
    named = {"settings": SETTINGS, "windows": 3, "seeds": (0, 1)}
    methods = "magnitude,wanda+refit@propagate=pruned,dense_target=pruned,sparsegpt@allocation=owl"
    stopped = Counts(stop="6/12")
    with pytest.raises(KeyboardInterrupt):
        compare(str(source), methods, ["50%", "2:4"], out, listener=stopped, **named)
    partial = json.loads((out / "compare.json").read_text())
    assert partial["status"] == "running"
    resumed = Counts()
    comparison = compare(str(source), methods, ["50%", "2:4"], out, listener=resumed, **named)
    # Five runs were over when the sixth was interrupted. Of the other seven two fail: owl cannot do 2:4.
    assert (stopped.measured, resumed.measured) == (5, 5)
    assert (stopped.dense, resumed.dense) == (1, 1)  # and not once a row
    assert not (out / "dense-states").exists()
    assert comparison.status == "finished"
    assert len(comparison.rows) == 12
    failed = [row for row in comparison.rows if row.error]
    assert [(row.sparsity, row.method) for row in failed] == [("2:4", "sparsegpt")] * 2
    good = [row for row in comparison.rows if not row.error]
    assert comparison.dense is not None
    for row in good:
        assert row.perplexity is not None
        assert row.perplexity.text_sha256 == comparison.dense.text_sha256
        assert row.gap == pytest.approx(row.perplexity.nll - comparison.dense.nll)
        assert row.divergence is not None
        assert row.divergence.kl > 0
        assert row.divergence.nll_difference == pytest.approx(row.gap, abs=1e-6)
        assert row.operator_zeros is not None
        assert row.operator_weights is not None
        assert row.operator_zeros >= row.operator_weights // 2
    tokens: dict[int, set[str]] = {}
    for folder in (file.parent for file in (out / "runs").glob("*/run.json")):
        facts = json.loads((folder / "run.json").read_text())
        tokens.setdefault(facts["recipe"]["seed"], set()).add(facts["calibration"]["sha256"])
        assert not (folder / "model").exists()
        assert not list((folder / "layers").glob("*.safetensors"))
    assert {seed: len(hashes) for seed, hashes in tokens.items()} == {0: 1, 1: 1}
    assert tokens[0] != tokens[1]
    table = (out / "compare.md").read_text()
    assert table.count("\n| ") == 1 + 12
    assert "cannot be used with 2:4" in table
    again = compare(f"{source.parent}/../{source.parent.name}/{source.name}/", methods, ["50%", "2:4"], out, **named)
    assert [row.gap for row in again.rows] == [row.gap for row in comparison.rows]
    more = compare(str(source), "wanda", ["50%"], out, settings=SETTINGS, windows=3)
    assert [row.label for row in more.rows] == [row.label for row in comparison.rows] + ["wanda"]
    with pytest.raises(FistaPrunerError, match="holds a comparison of"):
        compare("another", methods, ["50%"], out, **named)


def test_an_interruption_loses_no_row_of_an_earlier_command(tmp_path: Path) -> None:
    source, out = str(tiny.save("llama", tmp_path / "model", num_hidden_layers=1)), tmp_path / "out"
    named: dict[str, Any] = {"settings": SETTINGS, "windows": 2}

    def rows() -> list[str]:
        return [row["label"] for row in json.loads((out / "compare.json").read_text())["rows"]]

    first = compare(source, "magnitude,wanda", ["50%"], out, **named)
    with pytest.raises(KeyboardInterrupt):
        compare(source, "magnitude,sparsegpt,wanda", ["50%"], out, listener=Counts(stop="2/3"), **named)
    assert sorted(rows()) == ["magnitude", "wanda"]
    both = compare(source, "sparsegpt", ["50%"], out, **named)
    assert sorted(rows()) == ["magnitude", "sparsegpt", "wanda"]
    assert [row for row in both.rows if row.label != "sparsegpt"] == first.rows[::-1]
    compare(source, "wanda,magnitude", ["50%"], out, **named)
    assert rows() == ["sparsegpt", "wanda", "magnitude"]  # those asked for in their order, after those that stay


def test_rows_of_one_table_share_text_and_calibration(tmp_path: Path) -> None:
    source = str(tiny.save("llama", tmp_path / "model"))
    for folder, sentence in (("a", "a brown fox jumps over it. "), ("b", "the dog is lazy and sleeps. ")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.txt").write_text(sentence * 40)
    one, other = str(tmp_path / "a" / "text.txt"), str(tmp_path / "b" / "text.txt")
    out = tmp_path / "out"
    first = compare(source, "magnitude", ["50%"], out, settings=SETTINGS, data=one, windows=999)
    counts = Counts()
    again = compare(source, "magnitude", ["50%"], out, settings=SETTINGS, data=one, windows=999, listener=counts)
    assert not counts.measured
    assert again.rows[0].gap == first.rows[0].gap
    longer: dict[str, Any] = {"calibration": {**SETTINGS["calibration"], "seqlen": 64}}
    more: dict[str, Any] = {"calibration": {**SETTINGS["calibration"], "samples": 4}}
    for settings, data, windows, message in (
        (SETTINGS, other, None, "is on other text"),  # a file of the same name
        (SETTINGS, one, 2, "is on other text"),
        (longer, one, None, "calibrated on 3 windows of 32 tokens"),
        (more, one, None, "this comparison is on 4 windows of 32 tokens"),
    ):
        with pytest.raises(FistaPrunerError, match=message):
            compare(source, "wanda", ["50%"], out, settings=settings, data=data, windows=windows, listener=counts)
    for data, windows in (("nowhere.txt", None), (one, 0)):
        with pytest.raises(FistaPrunerError, match=r"nowhere.txt|windows 0"):
            compare(
                source,
                "wanda",
                ["50%"],
                tmp_path / "bad",
                settings=SETTINGS,
                data=data,
                windows=windows,
                listener=counts,
            )
    assert not counts.measured
    assert not (tmp_path / "bad").exists()
    # All rows asked for anew on other text: measured again, none of the old figures stays.
    anew = compare(source, "magnitude", ["50%"], out, settings=SETTINGS, data=other)
    assert anew.dense is not None
    assert anew.rows[0].perplexity is not None
    assert anew.rows[0].perplexity.text_sha256 == anew.dense.text_sha256 != first.rows[0].perplexity.text_sha256  # type: ignore[union-attr]


def test_rows_begun_with_other_settings_are_refused_and_kept(tmp_path: Path) -> None:
    source, out = str(tiny.save("llama", tmp_path / "model", num_hidden_layers=1)), tmp_path / "out"
    compare(source, "magnitude", ["50%"], out, settings=SETTINGS, windows=2)
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    for other, message in (({"dtype": "bfloat16"}, 'dtype = "auto"'), ({"propagate": "dense"}, 'propagate = "pruned"')):
        with pytest.raises(FistaPrunerError, match=f"holds a run with {message}, this one has .*name another folder"):
            compare(source, "magnitude,wanda", ["50%"], out, settings={**SETTINGS, **other}, windows=2)
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    next(out.rglob("run.json")).unlink()
    [row] = compare(source, "magnitude", ["50%"], out, settings={**SETTINGS, "propagate": "dense"}, windows=2).rows
    assert (row.perplexity, "other things in it" in (row.error or "")) == (None, True)


def test_rows_stay_where_another_executor_is_asked_for(tmp_path: Path) -> None:
    """What auto is for several processes is no setting that was given."""
    source, out = str(tiny.save("llama", tmp_path / "model", num_hidden_layers=1)), tmp_path / "out"
    first = compare(source, "magnitude", ["50%"], out, settings=SETTINGS, windows=2, seeds=(0, 1))
    processes: dict[str, Any] = {**SETTINGS, "execution": {"executor": "process"}}
    counts = Counts()
    both = compare(source, "magnitude", ["50%"], out, settings=processes, windows=2, seeds=(1,), listener=counts)
    assert (both.rows, counts.measured) == (first.rows, 0)
    with pytest.raises(FistaPrunerError, match=r"seed 0, made with propagate = \"pruned\", .* propagate = \"dense\""):
        compare(source, "wanda", ["50%"], out, settings={**processes, "propagate": "dense"}, windows=2, seeds=(1,))


def test_rows_that_stay_have_the_settings_that_all_share(tmp_path: Path) -> None:
    source, out = str(tiny.save("llama", tmp_path / "model", num_hidden_layers=1)), tmp_path / "out"
    ignoring: dict[str, Any] = {**SETTINGS, "ignore": ["down_proj"]}

    def compared(method: str, settings: dict[str, Any]) -> list[str | None]:
        return [row.error for row in compare(source, method, ["50%"], out, settings=settings, windows=2).rows]

    assert compared("magnitude", SETTINGS) == [None]
    before = (out / "compare.json").read_bytes()
    for settings, message in (
        (ignoring, r'made with ignore = \[.*\], this comparison would make it with ignore = \["down_proj"\]: name'),
        ({**SETTINGS, "structure": {"multiple": 16, "remove": "25%"}}, r"structure\.remove"),
    ):
        with pytest.raises(FistaPrunerError, match=message):
            compared("wanda", settings)
    assert (out / "compare.json").read_bytes() == before
    assert compared("wanda@ignore=[down_proj]", SETTINGS) == [None] * 2  # its own settings are in its name
    content = json.loads((out / "compare.json").read_text())
    for row in content["rows"]:
        del row["settings"]  # as earlier releases wrote it
    (out / "compare.json").write_text(json.dumps(content))
    assert compared("wanda", ignoring) == [None] * 3


def test_a_row_that_failed_does_not_stand_in_the_way_of_other_settings(tmp_path: Path) -> None:
    source, out = str(tiny.save("llama", tmp_path / "model", num_hidden_layers=1)), tmp_path / "out"
    compare(source, "wanda@allocation=owl", ["2:4"], out, settings=SETTINGS, windows=2)
    ignoring: dict[str, Any] = {**SETTINGS, "ignore": ["down_proj"]}
    rows = compare(source, "magnitude", ["2:4"], out, settings=ignoring, windows=2).rows
    assert [bool(row.error) for row in rows] == [True, False]


def test_a_setting_that_an_earlier_release_did_not_have_is_at_its_default() -> None:
    """Also one inside a section: its row is none of another protocol."""
    text = cut_windows("the quick brown fox jumps over it. " * 40, tiny.tokenizer(), 32, 2)
    shared: dict[str, Any] = {**SETTINGS, "structure": {"remove": "mlp=25%"}}
    [job] = plan_jobs(parse_contenders("wanda"), ["50%"], [0], shared)
    settings = job.recipe.resolved().model_dump(mode="json", exclude={"execution"})
    del settings["structure"]["multiple"], settings["reconstruct"]
    figures = Perplexity("python", "", 32, 2, 62, "float32", 2.7, 0.1, 1.0, 0.1, text_sha256=text.sha256)
    row = CompareRow(method="wanda", sparsity="50%", settings=settings, perplexity=figures)

    def check(structure: dict[str, Any]) -> None:
        calibration = Recipe.build(SETTINGS).calibration
        Protocol(text, "float32", calibration, shared={**shared, "structure": structure}).check(
            row, Path("out"), kept=True
        )

    check(shared["structure"])
    with pytest.raises(FistaPrunerError, match=r"made with structure\.multiple = \d+, .* structure\.multiple = 48:"):
        check({**shared["structure"], "multiple": 48})


def test_one_comparison_at_a_time_works_in_a_folder(tmp_path: Path) -> None:
    source, out = str(tiny.save("llama", tmp_path / "model", num_hidden_layers=1)), tmp_path / "out"
    named: dict[str, Any] = {"settings": SETTINGS, "windows": 2}
    refused = []

    class Second(Listener):
        def say(self, message: str) -> None:
            if message.startswith("1/1"):
                with pytest.raises(FistaPrunerError, match="in use by process") as error:
                    compare(source, "wanda", ["50%"], out, **named)
                refused.append(error)

    out.mkdir()
    (out / "lock").write_text("")  # of a comparison that was killed before its first row
    compare(source, "magnitude", ["50%"], out, listener=Second(), **named)
    assert refused
    assert not (out / "lock").exists()
    assert [row.label for row in compare(source, "wanda", ["50%"], out, **named).rows] == ["magnitude", "wanda"]


def test_a_cut_text_is_another_text() -> None:
    """The same ids in windows of another length are other predictions."""
    text = "the quick brown fox jumps over it. " * 40
    short, long = (cut_windows(text, tiny.tokenizer(), seqlen, windows) for seqlen, windows in ((32, 4), (64, 2)))
    assert short.tokens.flatten().equal(long.tokens.flatten())
    assert short.sha256 != long.sha256


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny.save("llama", tmp_path / "model")
    common = [
        "compare",
        str(source),
        "--calibration",
        "python",
        "--samples",
        "2",
        "--seqlen",
        "32",
        "--evaluate-windows",
        "2",
    ]
    assert (
        main(
            [*common, "--out", str(tmp_path / "out"), "--methods", "magnitude,wanda", "--sparsity", "50%,2:4", "--keep"]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert printed.count("50.0000 %") == 4
    assert "dense: perplexity" in printed
    runs = list((tmp_path / "out" / "runs").iterdir())
    assert len(runs) == 4
    for run in runs:
        assert "| Perplexity, python |" in (run / "model" / "README.md").read_text()
        assert "Perplexity, python" in (run / "report.html").read_text()
    assert main([*common, "--out", str(tmp_path / "out2"), "--methods", "nothing"]) == 2
    assert "'nothing' is not known" in capsys.readouterr().err
    assert main([*common, "--out", str(tmp_path / "out3"), "--methods", "wanda", "--seeds", "a"]) == 2
    assert not (tmp_path / "out3").exists()
    assert main([*common, "--out", str(tmp_path / "out4"), "--methods", "wanda", "--seed", "5"]) == 0
    assert [row["seed"] for row in json.loads((tmp_path / "out4" / "compare.json").read_text())["rows"]] == [5]


def test_a_command_whose_rows_all_fail_says_so_beside_earlier_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = str(tiny.save("llama", tmp_path / "model", num_hidden_layers=1)), str(tmp_path / "out")
    common = ["compare", source, "--out", out, "--evaluate-windows", "2", "--seqlen", "32", "--samples", "2"]
    common += ["--calibration", "python", "--methods"]
    fails = "sparsegpt@allocation=owl"  # owl cannot do 2:4
    assert main([*common, "magnitude", "--sparsity", "2:4"]) == 0
    assert main([*common, fails, "--sparsity", "2:4"]) == 1
    assert main([*common, f"{fails},magnitude", "--sparsity", "2:4"]) == 0
    [run] = (file.parent for file in (tmp_path / "out" / "runs").glob("magnitude*/run.json"))
    (run / "report.json").unlink()
    monkeypatch.setattr("fistapruner.pipeline.compare_rows.prune", Mock(side_effect=FistaPrunerError("no memory")))
    assert main([*common, "magnitude", "--sparsity", "2:4"]) == 1  # its earlier figures stay
    content = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [bool(row["error"]) for row in content["rows"]] == [True, False]
    assert "has the figures of an earlier command" in content["warnings"][-1]
    assert "failed" not in content
    shutil.rmtree(run)
    assert main([*common, "magnitude", "--sparsity", "2:4", "--ignore", "down_proj"]) == 1
    content = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [bool(row["error"]) for row in content["rows"]] == [True, True]  # those of other settings do not


def test_checkpoints_are_kept_of_rows_that_were_there(tmp_path: Path) -> None:
    source, out = str(tiny.save("llama", tmp_path / "model", num_hidden_layers=1)), tmp_path / "out"
    counts = [Counts(), Counts(), Counts()]
    [first], [again], [once_more] = (
        compare(source, "wanda", ["50%"], out, settings=SETTINGS, windows=2, keep=keep, listener=count).rows
        for keep, count in zip((False, True, True), counts, strict=True)
    )
    assert first.error is None
    assert (again.error, again.perplexity, again.operator_zeros) == (None, first.perplexity, first.operator_zeros)
    assert once_more == again
    assert counts[2].measured == 0
    compare(source, "wanda,magnitude", ["50%"], out, settings=SETTINGS, windows=2)  # keeps what was kept before
    runs = {path.name.startswith("wanda"): path for path in (out / "runs").iterdir()}
    run, other = runs[True], runs[False]
    assert not (other / "model").exists()
    assert list(run.glob("layers/*.safetensors"))
    assert (run / "model" / "model.safetensors").is_file()
    assert "| Perplexity, python |" in (run / "model" / "README.md").read_text()


def test_a_damaged_checkpoint_is_none_that_was_kept(tmp_path: Path) -> None:
    source, out = str(tiny.save("llama", tmp_path / "model", num_hidden_layers=1)), tmp_path / "out"
    named: dict[str, Any] = {"settings": SETTINGS, "windows": 2, "keep": True}
    [first] = compare(source, "wanda", ["50%"], out, **named).rows
    [run] = (out / "runs").iterdir()
    file = run / "model" / "model.safetensors"
    whole = file.read_bytes()
    for cut in (whole[:-8], None):  # damaged, half-removed
        file.write_bytes(cut) if cut else file.unlink()
        [again] = compare(source, "wanda", ["50%"], out, **named).rows
        assert (again.error, again.perplexity) == (None, first.perplexity)
        assert file.read_bytes() == whole


def test_figures_of_kept_checkpoints_are_those_of_their_weights(tmp_path: Path) -> None:
    """What was measured stays only with weights that are the same, as on another processor they may not be."""
    source, out = str(tiny.save("llama", tmp_path / "model", num_hidden_layers=1)), tmp_path / "out"

    def measured(keep: bool) -> Any:
        [row] = compare(source, "wanda", ["50%"], out, settings=SETTINGS, windows=2, keep=keep).rows
        assert row.error is None
        assert row.perplexity is not None
        return row.perplexity.nll

    def change(file: Path, edit: Any) -> None:
        content = json.loads(file.read_text())
        content.pop("sha256", None)
        edit(content)
        (write_json_atomic if file.name == "report.json" else write_sealed_json)(file, content)

    nll = measured(keep=False)
    [run] = (out / "runs").iterdir()
    change(run / "report.json", lambda report: report["evaluations"][0]["perplexity"].update(nll=99.0))
    assert measured(keep=False) == 99.0
    assert measured(keep=True) == 99.0  # of the same weights
    shutil.rmtree(run / "model")
    for tensors in run.glob("layers/*.safetensors"):
        tensors.unlink()
    change(run / "model.json", lambda record: record["files"]["model.safetensors"].update(sha256="others"))
    assert measured(keep=True) == nll


def test_damaged_records_of_a_row_do_not_cost_its_figures(tmp_path: Path) -> None:
    """A report is made again; what cannot be is named, and the row stays."""
    source, out = str(tiny.save("llama", tmp_path / "model", num_hidden_layers=1)), tmp_path / "out"
    said = tiny.Said()

    def compared() -> Any:
        return compare(source, "wanda", ["50%"], out, settings=SETTINGS, windows=2, listener=said)

    [row] = compared().rows
    [run] = (out / "runs").iterdir()
    damaged = run / "report.json"
    damaged.write_text("")
    [again] = compared().rows
    assert (again.error, again.perplexity) == (None, row.perplexity)
    assert any(f"the report is made again: {damaged} " in sentence for sentence in said.sentences)
    assert damaged.read_text()


def test_the_sparsity_is_that_of_the_recipe_unless_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = Mock(side_effect=FistaPrunerError("far enough"))
    monkeypatch.setattr("fistapruner.pipeline.compare.compare", asked)
    file = tmp_path / "own.yaml"
    file.write_text("sparsity: 70%")
    smaller = tmp_path / "smaller.yaml"
    smaller.write_text("structure: 25%")
    common = ["compare", "model", "--out", str(tmp_path / "out"), "--methods", "wanda"]
    recipe = ["--recipe", str(file)]
    for given, sparsities in (
        ([], ["50%"]),
        (recipe, ["70%"]),
        (["--structure", "25%"], ["0%"]),
        (["--recipe", str(smaller)], ["0%"]),
        ([*recipe, "--structure", "25%"], ["70%"]),
        ([*recipe, "--sparsity", "2:4, 60%"], ["2:4", "60%"]),
    ):
        assert main([*common, *given]) == 2
        assert asked.call_args.args[2] == sparsities
    assert "sparsity" not in parse_contenders([str(file)])[0].settings


@pytest.mark.parametrize("names", [["runs/experiment/notes.txt"], ["runs/", "thesis.tex"]])
def test_a_folder_that_is_no_comparison_is_refused_and_kept(tmp_path: Path, names: list[str]) -> None:
    source, out = tiny.save("llama", tmp_path / "model"), tmp_path / "out"
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).mkdir() if name.endswith("/") else (out / name).write_text("years of work")
    before = sorted(out.rglob("*"))
    with pytest.raises(FistaPrunerError, match="other things in it"):
        compare(source, "magnitude", ["50%"], out, settings=SETTINGS, windows=2)
    assert sorted(out.rglob("*")) == before


def test_damaged_figures_of_a_comparison_are_made_again(tmp_path: Path) -> None:
    source, out = tiny.save("llama", tmp_path / "model", num_hidden_layers=1), tmp_path / "out"
    counts = Counts()

    def compared() -> Any:
        return compare(source, "magnitude", ["50%"], out, settings=SETTINGS, windows=2, listener=counts)

    before = compared()
    (out / "compare.html").write_text("its page")
    (out / "compare.json").write_text("")
    (out / "dense.json").write_text("")
    with pytest.raises(FistaPrunerError, match=r"compare\.json is not valid JSON: .*: remove it; rows that are"):
        compared()
    (out / "compare.json").unlink()
    after = compared()
    assert (after.rows, after.dense) == (before.rows, before.dense)
    assert counts.measured == 1  # its rows are read again
    (out / "compare.json").unlink()
    (out / "dense.json").unlink()
    with pytest.raises(FistaPrunerError, match=r"other things in it \(compare\.html\)"):
        compared()


@pytest.mark.parametrize("partial", ["dense.json.partial", "compare.json.partial"])
def test_a_comparison_killed_in_writing_its_first_figures_goes_on(tmp_path: Path, partial: str) -> None:
    source, out = tiny.save("llama", tmp_path / "model", num_hidden_layers=1), tmp_path / "out"
    compare(source, "magnitude", ["50%"], out, settings=SETTINGS, windows=2)
    for file in out.glob("compare.*"):
        file.unlink()
    if partial.startswith("dense"):
        (out / "dense.json").unlink()
        shutil.rmtree(out / "runs")
        (out / "runs").mkdir()
    (out / partial).write_text("{")
    assert compare(source, "magnitude", ["50%"], out, settings=SETTINGS, windows=2).status == "finished"
    assert not list(out.glob("*.partial"))


def test_a_damaged_figure_of_the_dense_model_is_named(tmp_path: Path) -> None:
    source, out = tiny.save("llama", tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    (out / "dense.json").write_text('{"data": "python"}')
    with pytest.raises(FistaPrunerError, match=r"dense\.json is not what a comparison writes \(split: .*remove it"):
        compare(source, "magnitude", ["50%"], out, settings=SETTINGS, windows=2)


def test_bad_texts_show_before_anything_is_measured(tmp_path: Path) -> None:
    source, out = tiny.save("llama", tmp_path / "model"), tmp_path / "out"
    calibration = SETTINGS["calibration"]
    for bad, message in (
        ({"calibration": {**calibration, "source": "typo.jsonl"}}, r"calibration source '.*typo\.jsonl'"),
        ({"calibration": {**calibration, "seqlen": 10**6}}, r"seqlen 1000000 is more than"),
    ):
        with pytest.raises(FistaPrunerError, match=message):
            compare(source, "magnitude,wanda", ["50%"], out, settings=bad, windows=2)
        assert not out.exists()
        with pytest.raises(FistaPrunerError, match=message):
            prune(source, tmp_path / "run", listener=Counts(stop="plan:"), **bad)


def test_calibration_text_that_is_too_short_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    source, out, text = tiny.save("llama", tmp_path / "model"), tmp_path / "out", tmp_path / "short.txt"
    text.write_text("once upon a time")
    counts, settings = Counts(), {"calibration": {"source": str(text), "samples": 3, "seqlen": 32}}
    with pytest.raises(FistaPrunerError, match=r"short\.txt"):
        compare(source, "magnitude,wanda", ["50%"], out, settings=settings, windows=2, listener=counts)
    assert not counts.dense
    assert not out.exists()


def test_calibration_text_is_generated_once_and_in_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a comparison that goes on."""
    loaded, given = Mock(side_effect=load_whole), Mock(side_effect=prune)
    monkeypatch.setattr("fistapruner.pipeline.prepare.load_whole", loaded)
    monkeypatch.setattr("fistapruner.pipeline.compare_rows.prune", given)
    source = tiny.save("llama", tmp_path / "model", num_hidden_layers=1)
    settings = {"calibration": {"samples": 2, "seqlen": 32}}
    named: dict[str, Any] = {"settings": settings, "windows": 2}
    with pytest.raises(KeyboardInterrupt):
        compare(source, "magnitude,wanda", ["50%"], tmp_path / "out", listener=Counts(stop="2/2"), **named)
    comparison = compare(source, "magnitude,wanda", ["50%"], tmp_path / "out", **named)
    assert [row.error for row in comparison.rows] == [None, None]
    assert loaded.call_count == 1
    assert [call.kwargs["tokens"] is not None for call in given.call_args_list] == [True, True]


def test_measuring_obeys_the_memory_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does for it stands in the report of the run."""
    limits: list[Any] = []

    def evaluate(*models: Any, memory_limit: int | None = None, warn: Any, **settings: Any) -> Any:
        limits.append(memory_limit)
        if warn is not None:
            warn("one window at a time")
        return run_evaluation(*models, memory_limit=memory_limit, **settings)

    monkeypatch.setattr("fistapruner.pipeline.compare_rows.run_evaluation", evaluate)
    source = tiny.save("llama", tmp_path / "model", num_hidden_layers=1)
    settings = {**SETTINGS, "execution": {"memory_limit": "4GiB"}}
    compare(source, "magnitude", ["50%"], tmp_path / "out", settings=settings, windows=2)
    assert limits == [4 << 30] * 2
    [run] = (tmp_path / "out" / "runs").iterdir()
    assert load_run(run).warnings == ["one window at a time"]


def test_figures_are_those_of_the_model(tmp_path: Path) -> None:
    """A comparison stopped before its first row was of another model, or its weights are others since."""
    one, other = (str(tiny.save("llama", tmp_path / f"model {seed}", seed=seed)) for seed in (0, 1))
    named: dict[str, Any] = {"settings": SETTINGS, "windows": 2}
    stopped = Counts(stop="1/1")
    with pytest.raises(KeyboardInterrupt, match=r"^interrupted; nothing is lost: give the same command again$"):
        compare(one, "magnitude", ["50%"], tmp_path / "out", listener=stopped, **named)
    expected = compare(other, "magnitude", ["50%"], tmp_path / "anew", **named)
    first = compare(other, "magnitude", ["50%"], tmp_path / "out", **named)
    assert first.dense == expected.dense
    counts = Counts()
    assert compare(other, "magnitude", ["50%"], tmp_path / "out", listener=counts, **named).rows == first.rows
    assert not counts.measured
    shutil.copy(Path(one) / "model.safetensors", Path(other) / "model.safetensors")
    changed = compare(other, "magnitude", ["50%"], tmp_path / "out", **named)
    assert changed.dense != expected.dense
    assert changed.rows[0].perplexity != expected.rows[0].perplexity
    assert not changed.warnings
    again = compare(other, "wanda", ["50%"], tmp_path / "anew", **named)
    assert [row.label for row in again.rows] == ["wanda"]
    [said] = again.warnings
    assert said.startswith("the row magnitude, 50%, seed 0 is left out: ")
    assert "model.safetensors has changed" in said


def test_one_table_is_of_one_model(tmp_path: Path) -> None:
    """Also where all rows of the last command failed."""
    one, other = (str(tiny.save("llama", tmp_path / f"model {seed}", seed=seed)) for seed in (0, 1))
    out = tmp_path / "out"
    named: dict[str, Any] = {"settings": SETTINGS, "windows": 2}
    first = compare(one, "magnitude", ["2:4"], out, **named)
    failed = compare(one, "wanda@allocation=owl", ["2:4"], out, **named)
    assert [bool(row.error) for row in failed.rows] == [False, True]
    assert (failed.model, failed.calibration) == (first.model, first.calibration)
    with pytest.raises(FistaPrunerError, match="holds a comparison of"):
        compare(other, "wanda", ["2:4"], out, **named)


def test_rows_are_known_from_another_folder_and_made_again_of_a_changed_calibration_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = str(tiny.save("llama", tmp_path / "model").relative_to(tmp_path)), tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("it was the best of times, it was the worst of times. " * 20)
    settings = {"calibration": {"source": "text.txt", "samples": 3, "seqlen": 32}}
    first = compare(source, "wanda", ["50%"], out, settings=settings, windows=2)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    settings["calibration"]["source"], name, source = "../text.txt", source, f"../{source}"
    again = compare(source, "wanda", ["50%"], out, settings=settings, windows=2)
    assert again.rows == first.rows
    Path("../text.txt").write_text("it was the age of wisdom, it was the age of foolishness. " * 20)
    other = compare(source, "wanda", ["50%"], out, settings=settings, windows=2)
    assert other.rows[0].perplexity != first.rows[0].perplexity
    tiny.save("llama", Path(name), seed=1)  # another model of this name, here
    with pytest.raises(FistaPrunerError, match="holds a comparison of"):
        compare(name, "wanda", ["2:4"], out, settings=settings, windows=2)


def test_all_rows_are_of_the_commit_that_the_first_one_was_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = [tiny.save("llama", tmp_path / f"seed_{seed}", num_hidden_layers=1, seed=seed) for seed in (1, 0)]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(commits[-1]))
    shared: dict[str, Any] = {"settings": SETTINGS, "windows": 2}
    first = compare("someone/model", "magnitude", ["50%"], tmp_path / "out", **shared)
    commits.pop()
    counts = Counts()
    both = compare("someone/model", "magnitude,wanda", ["50%"], tmp_path / "out", listener=counts, **shared)
    assert (both.dense, both.rows[0], counts.measured) == (first.dense, first.rows[0], 1)
    assert counts.reports <= 1  # of the new row; none without matplotlib
    folders = [json.loads(file.read_text())["decision"]["folder"] for file in (tmp_path / "out").rglob("run.json")]
    assert folders == [str(tmp_path / "seed_0")] * 2


def test_rows_say_what_structure_was_removed(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    settings = {
        "structure": {"remove": "mlp=25%", "multiple": 4},
        "calibration": {"source": "python", "samples": 4, "seqlen": 32},
    }
    comparison = compare(folder, "wanda", ["50%"], tmp_path / "out", settings=settings, windows=2)
    (row,), whole = comparison.rows, load_run(next((tmp_path / "out" / "runs").glob("*")))
    assert (row.model_weights, row.checkpoint_bytes) == (whole.totals.model_weights, whole.totals.checkpoint_bytes)
    assert row.model_weights
    assert row.flops_per_token
    parameters = percent(1 - row.model_weights / (whole.model.parameters or 0))
    operations = percent(1 - row.flops_per_token / (whole.totals.dense_flops_per_token or 0))
    removed = f"mlp=25% removed: −{parameters} parameters, −{operations} FLOP a token"
    said = f"50.0000 % (structure {removed})"
    assert said in comparison_table(comparison)
    assert said in (tmp_path / "out" / "compare.md").read_text()
    assert said.partition(" % ")[2] in (tmp_path / "out" / "compare.html").read_text()


@pytest.mark.parametrize(("step", "nth", "keep"), [("write_lineage", 1, False), ("write_page", 2, True)])
def test_a_comparison_killed_before_the_page_of_a_row_makes_it_up(
    step: str, nth: int, keep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report has the figures: they are not measured again. Every run is published twice, without and with them."""
    source, counts = str(tiny.save("llama", tmp_path / "model", num_hidden_layers=1)), Counts()
    named: dict[str, Any] = {"settings": SETTINGS, "windows": 2, "keep": keep}
    with monkeypatch.context() as killed:
        steps = [*[DEFAULT] * (nth - 1), KeyboardInterrupt]
        killed.setattr(measure, step, Mock(wraps=getattr(measure, step), side_effect=steps))
        with pytest.raises(KeyboardInterrupt):
            compare(source, "wanda", ["50%"], tmp_path / "out", **named)
    [row] = compare(source, "wanda", ["50%"], tmp_path / "out", listener=counts, **named).rows
    assert counts.measured == 1 - nth // 2
    [run] = (tmp_path / "out" / "runs").iterdir()
    report = load_run(run)
    assert (row.seconds, row.peak_memory) == (report.totals.seconds, report.totals.peak_memory)
    assert (run / "report.html").read_text() == run_page(report)
    assert not keep or (run / "model" / "README.md").read_text() == model_card(report)
    assert report.lineage is not None
    assert all(stage.figures.perplexity for stage in report.lineage.stages)


def test_a_row_with_a_low_rank_part(tmp_path: Path) -> None:
    """Its weights are counted, its adapter is deleted with the checkpoint, and it is not measured again."""
    source, out, counts = tiny.save("llama", tmp_path / "model", num_hidden_layers=1), tmp_path / "out", Counts()
    named: dict[str, Any] = {"settings": SETTINGS, "windows": 2}
    found = compare(source, "magnitude@low_rank=2,magnitude", ["2:4"], out, **named)
    assert [row.error for row in found.rows] == [None, None]
    assert found.rows[0].low_rank_weights
    assert not found.rows[1].low_rank_weights
    assert not [*out.glob("runs/*/adapter"), *out.glob("runs/*/model")]
    again = compare(source, "magnitude@low_rank=2,magnitude", ["2:4"], out, listener=counts, **named)
    assert (again.rows, counts.measured) == (found.rows, 0)


def test_legacy_weights_are_compared_where_they_are_trusted(tmp_path: Path) -> None:
    """By every step of a row: pruning, and the comparison with the dense model. Each has the command."""
    source = tiny.save("llama", tmp_path / "model", num_hidden_layers=1)
    torch.save(tiny.tensors(source), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    named: dict[str, Any] = {"settings": SETTINGS, "windows": 2}
    with pytest.raises(FistaPrunerError, match="--allow-pickle"):
        compare(source, "wanda", ["50%"], tmp_path / "out", **named)
    [row] = compare(source, "wanda", ["50%"], tmp_path / "out", allow_pickle=True, command="the command", **named).rows
    assert row.error is None
    assert row.divergence is not None
    lineage = load_run(next((tmp_path / "out" / "runs").glob("*"))).lineage
    assert lineage is not None
    assert [stage.command for stage in lineage.stages] == ["the command"]


def test_the_calibration_of_a_comparison_is_that_of_rows_without_their_own(tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "model", num_hidden_layers=1)
    methods = "magnitude@calibration.samples=2,magnitude"
    found = compare(source, methods, ["50%"], tmp_path / "out", settings=SETTINGS, windows=2)
    assert found.calibration is not None
    assert found.calibration.samples == 3


def test_a_row_whose_loss_is_no_number_has_no_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(model: Any, *text: Any, against: Any = None, **settings: Any) -> Any:
        found = run_evaluation(model, *text, against=against, **settings)
        if against is None:  # the dense model
            return found
        return replace(found, perplexity=replace(found.perplexity, nll=math.nan, perplexity=math.nan))

    monkeypatch.setattr("fistapruner.pipeline.compare_rows.run_evaluation", evaluate)
    source = tiny.save("llama", tmp_path / "model", num_hidden_layers=1)
    [row] = compare(source, "magnitude", ["50%"], tmp_path / "out", settings=SETTINGS, windows=2).rows
    assert (row.error, row.gap) == (None, None)

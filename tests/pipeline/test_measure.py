"""Figures that are measured after a run go into its report, its page and its model card."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import fistapruner as fp
import tiny
from fistapruner import FistaPrunerError
from fistapruner.cli import main
from fistapruner.measure import streaming
from fistapruner.measure.bench import record
from fistapruner.measure.zero_shot import Tasks
from fistapruner.models.source import UNTRUSTED
from fistapruner.pipeline.kept_evaluations import add_scores, put_in_place, same_comparison
from fistapruner.pipeline.measure import measure
from fistapruner.reporting.quality import gain, quality_facts
from fistapruner.runs.decision import EvaluationRequest, Numerics, TrainingDecision, TrainingRecord
from fistapruner.runs.listener import Listener
from fistapruner.runs.lock import hold
from fistapruner.runs.prune_directory import PruneDirectory
from fistapruner.runs.records import Lineage, Report, Stage, is_run, load_run
from fistapruner.runs.results import Evaluation, Perplexity, TaskResult
from fistapruner.runs.training_directory import RecoverDirectory
from fistapruner.runs.training_records import Recovery
from fistapruner.settings.execution import Execution
from speeds import in_this_process

TEXT = "it was the best of times, it was the worst of times, it was the age of wisdom. " * 8


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model and a finished run of it that nothing was measured on."""
    folder = tmp_path_factory.mktemp("measured")
    dense = tiny.save("llama", folder / "dense", dtype=torch.bfloat16)
    fp.prune(str(dense), folder / "run", method="wanda", calibration={"source": "python", "samples": 4, "seqlen": 32})
    (folder / "text.txt").write_text(TEXT)
    return folder


def test_an_evaluation_of_a_run_is_kept_with_it(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, text = made / "run", str(made / "text.txt")
    assert is_run(run)
    assert not is_run(run / "model")
    assert main(["evaluate", str(run), "--data", text, "--seqlen", "16", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["reference"]["perplexity"] == fp.evaluate(made / "dense", text, seqlen=16).perplexity.perplexity  # type: ignore[union-attr]
    kept = json.loads((run / "report.json").read_text())["evaluations"]
    assert kept == [printed]
    figure = f"{printed['perplexity']['perplexity']:.2f}"
    assert figure in (run / "model" / "README.md").read_text()
    if (run / "report.html").exists():  # the extra 'report' may not be installed
        assert figure in (run / "report.html").read_text()
    # The same again takes its place; other windows stand beside it.
    fp.evaluate_run(run, text, seqlen=16)
    fp.evaluate_run(run, text, seqlen=16, windows=2)
    fp.evaluate_run(run, text, seqlen=16)
    report = load_run(run)
    windows = [evaluation.perplexity.windows for evaluation in report.evaluations if evaluation.perplexity]
    assert windows == [printed["perplexity"]["windows"], 2]
    assert report.lineage is not None
    assert report.lineage.stages[-1].figures.perplexity.windows == windows[0]  # type: ignore[union-attr]


def test_a_limit_reaches_every_evaluation_of_a_run(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one at the end of a run goes on where it is too small, and the report says so; others are refused."""
    text, run = str(made / "text.txt"), Path(shutil.copytree(made / "run", tmp_path / "run"))
    monkeypatch.setattr(streaming, "resident_memory", lambda: 2**30)
    told = "--memory-limit 1.00 GiB is not enough: "
    for refused in (
        lambda: fp.evaluate_run(run, text, seqlen=16, windows=2, memory_limit="1GiB"),
        lambda: fp.evaluate(made / "dense", text, seqlen=16, windows=2, memory_limit=2**30),
    ):
        with pytest.raises(fp.FistaPrunerError, match=f"^{told}"):
            refused()
    settings = ["--data", text, "--seqlen", "16", "--windows", "2", "--memory-limit", "1GiB", "--quiet"]
    for target in (run, made / "dense"):
        assert main(["evaluate", str(target), *settings]) == 2
        assert told in capsys.readouterr().err
    before = load_run(run)
    before.evaluations.clear()
    request = EvaluationRequest(data=text, windows=2, seqlen=16)
    report = measure(PruneDirectory(run), before, request, Execution(memory_limit=2**30), UNTRUSTED, tiny.Said())
    assert len(report.evaluations) == 1
    assert [line for line in load_run(run).warnings if line.startswith(told)]


def test_the_time_of_a_run_has_its_evaluation_and_samples(made: Path, tmp_path: Path) -> None:
    calibration = {"source": "self", "samples": 2, "seqlen": 16}
    report = fp.prune(made / "dense", tmp_path / "run", calibration=calibration, evaluate=made / "text.txt")
    split = load_run(tmp_path / "run").totals.time_split
    assert {"calibration", "sensitivity", "evaluation", "samples"} <= split.keys()
    assert report.totals.seconds_in_all == report.totals.seconds + split["evaluation"] + split["samples"]  # type: ignore[operator]
    before = dict(split)
    fp.prune(made / "dense", tmp_path / "run", calibration=calibration, evaluate=made / "text.txt")
    assert load_run(tmp_path / "run").totals.time_split == before


def test_evaluation_text_that_is_calibration_text_is_told(tmp_path: Path) -> None:
    """By a run and by a comparison, but not where Python's language reference is both: its parts are apart."""
    dense = tiny.save("llama", tmp_path / "dense", num_hidden_layers=1)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    settings = {"samples": 2, "seqlen": 16}
    told = f"1 of the 1 documents of the evaluation text {str(text)!r} are also in the calibration text ("
    for source, data, expected in ((str(text), str(text), True), ("python", "python", False)):
        said, out = tiny.Said(), tmp_path / f"run-{expected}"
        calibration = {"source": source, **settings}
        report = fp.prune(
            dense, out, method="magnitude", calibration=calibration, evaluate=data, evaluate_windows=2, listener=said
        )
        for lines in (report.warnings, said.sentences):
            assert any(line.startswith(told) for line in lines) == expected
    comparison = fp.compare(
        dense,
        "magnitude",
        ["50%"],
        tmp_path / "compared",
        settings={"calibration": {"source": str(text), **settings}},
        data=str(text),
        windows=2,
    )
    assert [warning[: len(told)] for warning in comparison.warnings] == [told]


def test_text_that_is_measured_or_calibrated_on_later_is_compared_too(tmp_path: Path) -> None:
    """Where a finished run is evaluated on its calibration text, by itself or its command."""
    dense = tiny.save("llama", tmp_path / "dense", num_hidden_layers=1)
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text(TEXT)
    other.write_text(TEXT[1:])
    settings: dict[str, Any] = {"method": "magnitude", "evaluate_windows": 2}
    calibration = {"source": str(text), "samples": 2, "seqlen": 16}
    for name in ("measured", "again"):
        fp.prune(dense, tmp_path / name, calibration=calibration, method="magnitude")
    said = tiny.Said()
    fp.evaluate_run(tmp_path / "measured", str(other), seqlen=16, windows=2, listener=said)
    assert not [line for line in said.sentences if "are also in the calibration text" in line]
    fp.evaluate_run(tmp_path / "measured", str(text), seqlen=16, windows=2, listener=said)
    fp.prune(dense, tmp_path / "again", calibration=calibration, evaluate=str(text), listener=said, **settings)
    assert sum("are also in the calibration text" in line for line in said.sentences) == 2
    for name in ("measured", "again"):
        (warning,) = load_run(tmp_path / name).warnings
        assert f"documents of the evaluation text {str(text)!r} are also in the calibration text" in warning


def test_text_of_calibration_and_training_is_told_of_a_recovery(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In its report, and in what its command prints as JSON."""
    dense = tiny.save("llama", tmp_path / "dense", num_hidden_layers=1)
    text, trained = tmp_path / "text.jsonl", tmp_path / "trained.jsonl"
    for file, word in ((text, "best"), (trained, "worst")):
        lines = (f"{number} is the {word} of times, as everybody knows." for number in range(40))
        file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    calibration = {"source": str(text), "samples": 2, "seqlen": 16}
    following = {"steps": 1, "rank": 2, "data": {"source": str(trained), "seqlen": 16, "tokens": 300}}
    settings: dict[str, Any] = {"method": "magnitude", "calibration": calibration}
    fp.prune(dense, tmp_path / "run", evaluate=str(trained), evaluate_windows=2, **settings)
    report = fp.recover(tmp_path / "run", tmp_path / "recovered", **following)
    assert ["are also in the training text" in warning for warning in report.warnings] == [True]
    for file, told in ((text, "calibration"), (trained, "training")):
        command = ["evaluate", str(tmp_path / "recovered"), "--data", str(file), "--windows", "2", "--json"]
        assert main([*command, "--seqlen", "16"]) == 0
        (warning,) = json.loads(capsys.readouterr().out)["warnings"]
        assert f"documents of the evaluation text {str(file)!r} are also in the {told} text" in warning
    told = [warning.partition(" documents")[0] for warning in load_run(tmp_path / "recovered").warnings]
    assert told == ["8 of the 40", "40 of the 40", "40 of the 40"]  # those trained on; then those of both files


def recovery_of(pruned: Path, folder: Path, dense: Path | None) -> RecoverDirectory:
    """A finished recovery run of a pruning run, as far as measuring reads it; its weights are the dense model's."""
    run, before = RecoverDirectory(folder), load_run(pruned)
    run.create()
    shutil.copytree(pruned.parent / "dense", run.model)
    record = json.loads((pruned / "model" / "fistapruner.json").read_text())
    (run.model / "fistapruner.json").write_text(json.dumps({**record, "fingerprint": "recovered"}))
    own = Stage(kind="recover", fingerprint="recovered")
    assert before.lineage is not None
    lineage = Lineage(source=before.lineage.source, stages=[*before.lineage.stages, own])
    decision = TrainingDecision(
        model=str(pruned),
        folder=pruned / "model",
        numerics=Numerics(batch_size=1, by_operator=False, threads=1, device="cpu", dtype="bfloat16"),
        dense=dense,
        steps=4,
    )
    facts = before.model_dump(exclude={"layers", "totals", "evaluations", "generations", "speed", "recipe", "lineage"})
    changes = {"kind": "recover", "fingerprint": "recovered", "lineage": lineage, "recovery": Recovery(loss="kl")}
    run.write_record(TrainingRecord(**{**facts, **changes, "decision": decision}))
    run.write_report(Report(**{**facts, **changes}))
    run.write_model_record("recovered", {})
    return run


def test_a_recovery_is_measured_beside_its_input(made: Path, tmp_path: Path) -> None:
    text, pruned = str(made / "text.txt"), made / "run"
    run = recovery_of(pruned, tmp_path / "recovered", made / "dense")
    said = tiny.Said()
    request = EvaluationRequest(data=text, windows=3, seqlen=24)
    report = measure(run, load_run(run.folder), request, Execution(), UNTRUSTED, said)
    (after,), (before,) = report.evaluations, report.recovery.before  # type: ignore[union-attr]
    dense = fp.evaluate(made / "dense", text, seqlen=24, windows=3).perplexity
    assert after.perplexity == after.reference == dense
    assert before.perplexity == fp.evaluate(pruned / "model", text, seqlen=24, windows=3).perplexity
    assert before.reference == dense
    assert load_run(run.folder).recovery.before == [before]  # type: ignore[union-attr]
    assert any("before recovery" in line for line in said.sentences)
    assert {name for name, text in vars(report.generations[0]).items() if text} == {
        "prompt",
        "dense",
        "pruned",
        "recovered",
    }
    assert load_run(run.folder).lineage.stages[-1].figures.perplexity == replace(dense, window_nlls=())  # type: ignore
    # Nothing is measured twice, and what the input's run has measured is taken from it.
    said.sentences.clear()
    measure(run, report, request, Execution(), UNTRUSTED, said)
    assert not [line for line in said.sentences if line.startswith("evaluating")]
    known = fp.evaluate_run(pruned, text, seqlen=20, windows=4)
    fp.evaluate_run(run.folder, text, seqlen=20, windows=4, listener=said)
    assert not [line for line in said.sentences if line.startswith("evaluating the model before recovery")]
    assert load_run(run.folder).recovery.before == [before, known]  # type: ignore[union-attr]
    fp.evaluate_run(run.folder, text, seqlen=20, windows=2, listener=said)
    assert [line for line in said.sentences if line.startswith("evaluating the model before recovery")]
    assert len(load_run(run.folder).recovery.before) == 3  # type: ignore[union-attr]


def test_scores_before_recovery_are_those_that_the_input_s_run_has(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From an evaluation of tasks alone, too, and on the same items."""
    pruned = Path(shutil.copytree(made / "run", tmp_path / "run"))
    shutil.copytree(made / "dense", tmp_path / "dense")
    run = recovery_of(pruned, tmp_path / "recovered", made / "dense")
    module = sys.modules[fp.evaluate.__module__]
    scores: dict[Path, TaskResult] = {}
    monkeypatch.setattr(module, "find_tasks", lambda *_: Tasks((), None, ""))
    monkeypatch.setattr(module, "evaluate_tasks", lambda folder, *_, **__: (scores[folder],))
    before, after = (TaskResult("piqa", "acc", 10, value, 0.1) for value in (0.3, 0.4))
    scores = {pruned / "model": before, run.model: after}
    fp.evaluate_run(pruned, tasks="piqa")
    fp.evaluate_run(run.folder, tasks="piqa")
    fp.evaluate_run(run.folder, str(made / "text.txt"), seqlen=16, windows=2, tasks="piqa")
    report = load_run(run.folder)
    assert [one.tasks for one in report.recovery.before] == [(before,), ()]  # type: ignore[union-attr]
    assert "| 30.0 ± 10.0 | 40.0 ± 10.0 |" in (run.model / "README.md").read_text()
    for other in (replace(after, items_sha256="of another file"), replace(after, items=20)):
        scores[run.model] = other
        fp.evaluate_run(run.folder, tasks="piqa")
        report = load_run(run.folder)
        assert report.evaluations[-1].tasks == (other,)
        assert quality_facts(report)[-1].before == ""


def test_figures_of_another_model_are_not_those_before_recovery(made: Path, tmp_path: Path) -> None:
    """The input's run was made again since, with another result; or it was measured against another model."""
    text, pruned = str(made / "text.txt"), tmp_path / "pruned"
    shutil.copytree(made / "run", pruned)
    shutil.copytree(made / "dense", tmp_path / "dense")
    run = recovery_of(pruned, tmp_path / "recovered", made / "dense")
    fp.evaluate_run(pruned, text, seqlen=16, windows=5, against=tmp_path / "dense")
    said = tiny.Said()
    fp.evaluate_run(run.folder, text, seqlen=16, windows=5, listener=said)
    assert [line for line in said.sentences if line.startswith("evaluating the model before recovery")]
    (kept,) = load_run(run.folder).recovery.before  # type: ignore[union-attr]
    assert kept.against == str(made / "dense")
    fp.evaluate_run(pruned, text, seqlen=16, windows=6)
    report = json.loads((pruned / "report.json").read_text())
    (pruned / "report.json").write_text(json.dumps({**report, "fingerprint": "another"}))
    said.sentences.clear()
    fp.evaluate_run(run.folder, text, seqlen=16, windows=6, listener=said)
    assert [line for line in said.sentences if line.startswith("evaluating the model before recovery")]


@pytest.mark.parametrize("recovered", [False, True])
def test_figures_against_another_model_are_not_kept(made: Path, tmp_path: Path, recovered: bool) -> None:
    """The dense model is known by its files, wherever they are."""
    text = str(made / "text.txt")
    if recovered:
        folder = recovery_of(made / "run", tmp_path / "recovered", made / "dense").folder
    else:
        folder = Path(shutil.copytree(made / "run", tmp_path / "run"))
    again = Path(shutil.copytree(made / "dense", tmp_path / "again"))
    own = fp.evaluate_run(folder, text, seqlen=16, windows=3)
    kept, said = load_run(folder), tiny.Said()
    assert own in kept.evaluations
    found = fp.evaluate_run(folder, text, seqlen=16, windows=3, against=made / "run" / "model", listener=said)
    assert found.reference is not None
    assert found.reference.perplexity != own.reference.perplexity  # type: ignore[union-attr]
    assert load_run(folder) == kept
    assert any("is not the dense model of this run" in line for line in said.sentences)
    assert said.passes[0] == "opening and checking the models"  # the sentence is not said again as what goes on
    assert fp.evaluate_run(folder, text, seqlen=16, windows=3, against=again) in load_run(folder).evaluations


def test_a_dense_model_that_has_changed_is_not_compared_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused where it is the default, and left out where speed is measured; another can be named."""
    measured: list[Path | None] = []
    monkeypatch.setattr("fistapruner.pipeline.measure_run.lost_structure", lambda record: True)
    monkeypatch.setattr(
        "fistapruner.pipeline.measure_run.bench", lambda *_, before, **__: measured.append(before) or []
    )
    monkeypatch.setattr("fistapruner.pipeline.measure_run.publish", Mock())
    dense, run, text = tmp_path / "dense", tmp_path / "run", tmp_path / "text.txt"
    text.write_text(TEXT)
    tiny.save("llama", dense, num_hidden_layers=1)
    fp.prune(dense, run, method="magnitude", calibration={"source": "python", "samples": 2, "seqlen": 16})
    same = shutil.copytree(dense, tmp_path / "same")
    fp.bench_run(run)
    shutil.rmtree(dense)
    tiny.save("llama", dense, num_hidden_layers=1, seed=5)
    said = tiny.Said()
    fp.bench_run(run, listener=said)
    assert measured == [dense, None]
    assert any("model.safetensors has changed" in line for line in said.sentences)
    with pytest.raises(FistaPrunerError, match=r"dense/model\.safetensors has changed: .* name the .* with --against"):
        fp.evaluate_run(run, str(text), seqlen=16, windows=2)
    assert fp.evaluate_run(run, str(text), seqlen=16, windows=2, against=same).reference is not None


def test_a_recovery_without_a_dense_model_is_compared_with_its_input(made: Path, tmp_path: Path) -> None:
    pruned = tmp_path / "pruned"
    shutil.copytree(made / "run" / "model", pruned / "model")  # no run that names the dense model
    shutil.copytree(made / "dense", tmp_path / "dense")
    (pruned / "report.json").write_text((made / "run" / "report.json").read_text())
    run = recovery_of(pruned, tmp_path / "recovered", None)
    request = EvaluationRequest(data=str(made / "text.txt"), windows=3, seqlen=24)
    report = measure(run, load_run(run.folder), request, Execution(), UNTRUSTED, tiny.Said())
    (after,), (before,) = report.evaluations, report.recovery.before  # type: ignore[union-attr]
    assert after.against is before.against is after.reference is None
    assert gain(before, after) is not None
    assert report.generations[0].dense is None


class Stopping(Listener):
    """Interrupt a run when it begins to train."""

    def say(self, message: str) -> None:
        if "what is held out" in message:
            raise KeyboardInterrupt


def test_what_was_measured_outlives_a_checkpoint_that_is_made_again(made: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"data": {"source": "python", "tokens": 512, "seqlen": 32}, "evaluate": None}
    out, text = tmp_path / "recovered", str(made / "text.txt")
    fp.recover(made / "run", out, **settings)
    fp.evaluate_run(out, text, seqlen=16, windows=2)
    before = load_run(out).recovery.before  # type: ignore[union-attr]
    assert len(before) == 1
    shutil.rmtree(out / "model")
    again = fp.recover(made / "run", out, **settings)
    assert again.recovery.before == before  # type: ignore[union-attr]
    assert "| before | recovered |" in (out / "model" / "README.md").read_text()


def test_the_failure_of_an_earlier_attempt_is_not_the_state_of_a_run(made: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"data": {"source": "python", "tokens": 512, "seqlen": 32}, "evaluate": None}
    out = tmp_path / "recovered"
    with pytest.raises(KeyboardInterrupt):
        fp.recover(made / "run", out, listener=Stopping(), **settings)
    (out / "report.json").write_text(load_run(out).model_copy(update={"status": "failed"}).model_dump_json())
    with pytest.raises(KeyboardInterrupt):
        fp.recover(made / "run", out, listener=Stopping(), **settings)
    assert load_run(out).status == "running"


@pytest.mark.parametrize("of_run", [True, False])
def test_a_perplexity_outlives_tasks_that_fail(
    made: Path, of_run: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any, **settings: Any) -> None:
        raise OSError("the hub is down")

    for name, content in (
        ("lm_eval", {"simple_evaluate": failing}),
        ("lm_eval.tasks", {"TaskManager": lambda: SimpleNamespace(all_tasks=["boolq"], load=lambda _: {"tasks": {}})}),
        ("lm_eval.models", {}),
        ("lm_eval.models.huggingface", {"HFLM": SimpleNamespace}),
    ):  # a stand-in for lm-eval, installed or not
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    target = made / "run" if of_run else made / "dense"
    command = ["evaluate", str(target), "--data", str(made / "text.txt"), "--seqlen", "16", "--windows", "3", "--quiet"]
    assert main([*command, "--tasks", "boolq"]) == 2
    printed = capsys.readouterr()
    assert "the hub is down" in printed.err
    if of_run:
        assert 3 in [
            evaluation.perplexity.windows for evaluation in load_run(target).evaluations if evaluation.perplexity
        ]
    else:
        assert "perplexity" in printed.out


def test_speed_of_a_run_is_kept_with_it(made: Path) -> None:
    run = made / "run"
    assert load_run(run).totals.compressed_bytes is None
    found = fp.bench_run(run, prompt=4, tokens=3, runs=1, measure=in_this_process)
    printed = json.loads(json.dumps(record(found)))
    report = load_run(run)
    assert report.speed is not None
    assert {key: report.speed[key] for key in printed} == printed
    assert report.speed["machine"]["threads"]
    assert report.totals.compressed_bytes == next(
        row["file_size"] for row in printed["speeds"] if row["variant"] == "packed"
    )
    card = (run / "model" / "README.md").read_text()
    assert "Decoding, packed, tokens/s" in card
    assert "Compressed checkpoint" in card


def test_a_run_that_cannot_be_measured_says_why(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hold(made / "run"):
        assert main(["bench", str(made / "run")]) == 2
    assert "is in use by process" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text((made / "run" / "run.json").read_text())
    for verb in ("evaluate", "bench"):
        assert main([verb, str(tmp_path / "run")]) == 2
        assert "has no finished checkpoint" in capsys.readouterr().err
    moved = made / "dense"
    moved.rename(made / "elsewhere")
    try:
        assert main(["evaluate", str(made / "run"), "--data", str(made / "text.txt"), "--seqlen", "16"]) == 2
        assert "--against" in capsys.readouterr().err
        arguments = [
            "--data",
            str(made / "text.txt"),
            "--seqlen",
            "16",
            "--against",
            str(made / "elsewhere"),
            "--quiet",
        ]
        assert main(["evaluate", str(made / "run"), *arguments]) == 0
    finally:
        (made / "elsewhere").rename(moved)


def test_a_new_figure_takes_the_place_of_the_old_one() -> None:
    text = Perplexity("a", "file", 16, 4, 60, "bfloat16", 9.0, 0.1, 2.2, 0.01, text_sha256="aa")
    tasks = (TaskResult("piqa", "acc", 10, 0.5, 0.1), TaskResult("boolq", "acc", 10, 0.5, 0.1))
    earlier = [Evaluation("m", perplexity=text, reference=text, tasks=tasks[:1]), Evaluation("m", tasks=tasks[1:])]
    again = Evaluation("m", tasks=tasks[1:])
    assert put_in_place(earlier, again) == [earlier[0], again]
    again = Evaluation("m", perplexity=text)
    assert put_in_place(earlier[:1], again) == [again, Evaluation("m", tasks=tasks[:1])]
    again = Evaluation("m", perplexity=text, tasks=tasks)
    assert put_in_place(earlier, again) == [again]
    of_norms = replace(tasks[0], metric="acc_norm")
    kept = [Evaluation("m", tasks=(of_norms,)), Evaluation("m", tasks=tasks[:1])]
    assert put_in_place([Evaluation("m", tasks=(tasks[0], of_norms))], kept[1]) == kept
    # The first text stays the first, so it stays in the headline.
    other = Evaluation("m", perplexity=replace(text, text_sha256="bb"))
    assert put_in_place([earlier[0], other], again) == [again, other]
    assert put_in_place([earlier[0], other], other) == [earlier[0], other]


def test_a_short_try_does_not_take_the_place_of_a_full_score() -> None:
    full = TaskResult("piqa", "acc", 1838, 0.5, 0.1, source="lm-eval", available=1838, dtype="bfloat16")
    text = Perplexity("a", "file", 16, 4, 60, "bfloat16", 9.0, 0.1, 2.2, 0.01, text_sha256="aa")
    stored = [Evaluation("m", tasks=(full,))]
    short = replace(full, items=100, value=0.6)
    assert put_in_place(stored, Evaluation("m", tasks=(short,))) == stored
    assert put_in_place(stored, Evaluation("m", perplexity=text, tasks=(short,))) == [
        *stored,
        Evaluation("m", perplexity=text),
    ]
    other = replace(short, source="local file", available=100)
    assert put_in_place(stored, Evaluation("m", tasks=(other,))) == stored
    for better in (replace(full, value=0.6, dtype="float32"), replace(short, available=100)):  # the task has fewer now
        again = Evaluation("m", tasks=(better,))
        assert put_in_place(stored, again) == [again]
    longer = Evaluation("m", tasks=(replace(short, items=200),))
    assert put_in_place([Evaluation("m", tasks=(short,))], longer) == [longer]


def test_a_score_of_the_input_is_added_once_and_without_figures_of_a_text() -> None:
    """Several runs may have it, and beside a perplexity against another dense model."""
    text = Perplexity("a", "file", 16, 4, 60, "bfloat16", 9.0, 0.1, 2.2, 0.01, text_sha256="aa")
    tasks = (TaskResult("piqa", "acc", 10, 0.5, 0.1), TaskResult("boolq", "acc", 10, 0.5, 0.1))
    found = Evaluation("m", against="other", perplexity=text, reference=text, tasks=tasks)
    result = [Evaluation("r", tasks=(replace(tasks[0], value=0.6),))]
    before: list[Evaluation] = []
    assert add_scores(before, result, [found, found])
    assert before == [Evaluation("m", against="other", tasks=tasks[:1])]
    assert not add_scores(before, result, [found])
    assert len(before) == 1


def test_a_dense_model_is_the_same_under_another_spelling() -> None:
    text = Perplexity("a", "file", 16, 4, 60, "bfloat16", 9.0, 0.1, 2.2, 0.01, text_sha256="aa")
    found = Evaluation("m", against="a/dense", perplexity=text)
    for same in ("a/b/../dense", str(Path("a/dense").resolve())):
        assert same_comparison(found, replace(found, against=same))
    for other in ("dense", None):
        assert not same_comparison(found, replace(found, against=other))
    for another in (replace(text, text_sha256="bb"), replace(text, dtype="float32"), None):
        assert not same_comparison(found, replace(found, perplexity=another))

"""Figures that are measured after a run go into its report, its page and its model card."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import fistapruner as fp
import tiny
from fistapruner import FistaPrunerError
from fistapruner.measure.run import put_in_place
from fistapruner.reporting.facts import cost_facts
from fistapruner.reporting.measured import quality_facts
from fistapruner.runs.log import hold
from fistapruner.runs.records import Evaluation, Perplexity, TaskResult, is_run, load_run
from fistapruner.runtime.show import duration
from forked import FORKS

TEXT = "it was the best of times, it was the worst of times, it was the age of wisdom. " * 8
CALIBRATION = {"source": "python", "samples": 4, "seqlen": 32}
TRAINING: dict[str, Any] = {"data": {"source": "python", "tokens": 512, "seqlen": 32}, "evaluate": None, "steps": 1}


def make(folder: Path) -> Path:
    """Make a dense model, a run of it and a recovery of the run that nothing was measured on."""
    dense = tiny.save("llama", folder / "dense", dtype=torch.bfloat16, num_hidden_layers=2)
    fp.prune(dense, folder / "run", method="wanda", calibration=CALIBRATION)
    fp.recover(folder / "run", folder / "recovered", **TRAINING)
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that all tests share."""
    return make(tmp_path_factory.mktemp("measured"))


def test_an_evaluation_of_a_run_is_kept_with_it(made: Path, cli: tiny.Cli) -> None:
    """The same again takes its place; other windows stand beside it."""
    run, text = made / "run", str(made / "text.txt")
    assert is_run(run)
    assert not is_run(run / "model")
    printed = json.loads(cli("evaluate", run, "--data", text, "--seqlen", "16", "--json").out)
    alone = fp.evaluate(made / "dense", text, seqlen=16).perplexity
    assert printed["reference"]["perplexity"] == alone.perplexity
    kept = json.loads((run / "report.json").read_text())["evaluations"]
    assert kept == [printed]
    figure = f"{printed['perplexity']['perplexity']:.2f}"
    assert figure in (run / "model" / "README.md").read_text()
    assert figure in (run / "report.html").read_text()
    fp.evaluate(run, text, seqlen=16, windows=2)
    fp.evaluate(run, text, seqlen=16)
    report = load_run(run)
    windows = [evaluation.perplexity.windows for evaluation in report.evaluations if evaluation.perplexity]
    assert windows == [printed["perplexity"]["windows"], 2]
    assert report.lineage.stages[-1].figures.perplexity.windows == windows[0]


def test_the_time_of_a_run_has_its_evaluation_and_samples(made: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"calibration": {"source": "self", "samples": 2, "seqlen": 16}}
    report = fp.prune(made / "dense", tmp_path / "run", evaluate=made / "text.txt", **asked)
    split = load_run(tmp_path / "run").totals.time_split
    assert {"calibration", "sensitivity", "evaluation", "samples"} <= split.keys()
    whole = report.totals.seconds + split["evaluation"] + split["samples"]
    assert cost_facts(report)[0].after == duration(whole)
    fp.prune(made / "dense", tmp_path / "run", evaluate=made / "text.txt", **asked)
    assert load_run(tmp_path / "run").totals.time_split == split


def test_text_that_was_seen_before_is_told(made: Path, tmp_path: Path) -> None:
    """By a run, a later evaluation, and a comparison; not where Python's reference is both: its parts are apart."""
    dense, told = made / "dense", "documents of the evaluation text"
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text(TEXT)
    other.write_text(TEXT[1:])
    settings: dict[str, Any] = {"method": "magnitude", "evaluate_windows": 2}
    for source, data, expected in ((str(text), str(text), True), ("python", "python", False)):
        said, calibration = tiny.Said(), {"source": source, "samples": 2, "seqlen": 16}
        out = tmp_path / f"run-{expected}"
        report = fp.prune(dense, out, calibration=calibration, evaluate=data, listener=said, **settings)
        for lines in (report.warnings, said.sentences):
            assert any(told in line for line in lines) == expected
    calibration = {"source": str(text), "samples": 2, "seqlen": 16}
    fp.prune(dense, tmp_path / "later", calibration=calibration, method="magnitude")
    for data, warnings in ((other, 0), (text, 1)):
        fp.evaluate(tmp_path / "later", str(data), seqlen=16, windows=2)
        assert len(load_run(tmp_path / "later").warnings) == warnings
    out = tmp_path / "compared"
    found = fp.compare(dense, "magnitude", ["50%"], out, settings={"calibration": calibration}, data=text, windows=2)
    assert [told in warning for warning in found.warnings] == [True]


def test_text_of_calibration_and_training_is_told_of_a_recovery(made: Path, tmp_path: Path, cli: tiny.Cli) -> None:
    """In its report, and in what its command prints as JSON."""
    text, trained = tmp_path / "text.jsonl", tmp_path / "trained.jsonl"
    for file, word in ((text, "best"), (trained, "worst")):
        lines = (f"{number} is the {word} of times, as everybody knows." for number in range(40))
        file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    calibration = {"source": str(text), "samples": 2, "seqlen": 16}
    following = {"steps": 1, "rank": 2, "data": {"source": str(trained), "seqlen": 16, "tokens": 300}}
    fp.prune(made / "dense", tmp_path / "run", method="magnitude", calibration=calibration)
    fp.recover(tmp_path / "run", tmp_path / "recovered", evaluate=None, **following)
    for file, told in ((text, "calibration"), (trained, "training")):
        command = ["evaluate", tmp_path / "recovered", "--data", file, "--windows", "2", "--json", "--seqlen", "16"]
        (warning,) = json.loads(cli(*command).out)["warnings"]
        assert f"documents of the evaluation text {str(file)!r} are also in the {told} text" in warning
    told = [warning.partition(" documents")[0] for warning in load_run(tmp_path / "recovered").warnings]
    assert told == ["40 of the 40", "40 of the 40"]


def evaluated(run: Path, text: str | None = None, **asked: Any) -> list[str]:
    """Evaluate a run; what was said to be evaluated."""
    said = tiny.Said()
    fp.evaluate(run, text, listener=said, **asked)
    return [line for line in said.sentences if line.startswith("evaluating")]


def test_a_recovery_is_measured_beside_its_input(tmp_path: Path) -> None:
    """Nothing is measured twice, and what the input's run has measured of the same model is taken from it."""
    folder, text = make(tmp_path), str(tmp_path / "text.txt")
    run, recovered = folder / "run", folder / "recovered"
    assert any("before recovery" in line for line in evaluated(recovered, text, seqlen=24, windows=3))
    report = load_run(recovered)
    (after,), (before,) = report.evaluations, report.recovery.before
    for found, model in ((after, recovered / "model"), (before, run / "model")):
        alone = fp.evaluate(model, text, seqlen=24, windows=3, against=folder / "dense")
        assert (found.perplexity, found.reference) == (alone.perplexity, alone.reference)
    assert after.perplexity != before.perplexity
    assert report.lineage.stages[-1].figures.perplexity == replace(after.perplexity, window_nlls=())
    known = fp.evaluate(run, text, seqlen=20, windows=4)
    assert not any("before recovery" in line for line in evaluated(recovered, text, seqlen=20, windows=4))
    assert load_run(recovered).recovery.before == [before, known]
    assert any("before recovery" in line for line in evaluated(recovered, text, seqlen=20, windows=2))
    assert len(load_run(recovered).recovery.before) == 3
    # The input's run was made again since, with another result.
    fp.evaluate(run, text, seqlen=16, windows=6)
    content = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text(json.dumps({**content, "fingerprint": "another"}))
    assert any("before recovery" in line for line in evaluated(recovered, text, seqlen=16, windows=6))


def test_scores_before_recovery_are_those_that_the_input_s_run_has(tmp_path: Path, tasks: Mock) -> None:
    """On the same items only."""
    folder = make(tmp_path)
    run, recovered = folder / "run", folder / "recovered"
    scores = {run / "model": TASKS[0], recovered / "model": replace(TASKS[0], value=0.6)}
    tasks.side_effect = lambda folders, *_, **__: (scores[folders[0]],)
    for target in (run, recovered):
        fp.evaluate(target, tasks="piqa")
    assert "| 50.0 ± 10.0 | 60.0 ± 10.0 |" in (recovered / "model" / "README.md").read_text()
    scores[recovered / "model"] = replace(TASKS[0], items=20)
    fp.evaluate(recovered, tasks="piqa")
    report = load_run(recovered)
    assert [each.tasks for each in report.recovery.before] == [TASKS[:1]]
    assert quality_facts(report)[-1].before == ""


@pytest.mark.parametrize("name", ["run", "recovered"])
def test_a_run_is_compared_with_its_own_dense_model_only(made: Path, tmp_path: Path, name: str) -> None:
    """That model is known by its files, wherever they are."""
    text, folder = str(made / "text.txt"), Path(shutil.copytree(made / name, tmp_path / name))
    again = Path(shutil.copytree(made / "dense", tmp_path / "again"))
    with pytest.raises(FistaPrunerError, match=r"name its dense model with --against, or compare with another by"):
        fp.evaluate(folder, text, seqlen=16, windows=3, against=made / "run" / "model")
    assert fp.evaluate(folder, text, seqlen=16, windows=3, against=again) in load_run(folder).evaluations


def test_a_dense_model_that_has_changed_or_gone_is_not_compared_with(tmp_path: Path, cli: tiny.Cli) -> None:
    """It is refused where it is the default; another can be named."""
    folder, text = make(tmp_path), str(tmp_path / "text.txt")
    dense, run = folder / "dense", folder / "run"
    same = dense.rename(tmp_path / "elsewhere")
    command = ["evaluate", run, "--data", text, "--seqlen", "16", "--windows", "2", "--quiet"]
    assert "--against" in cli(*command, status=2).err
    cli(*command, "--against", same)
    tiny.save("llama", dense, dtype=torch.bfloat16, num_hidden_layers=2, seed=5)
    with pytest.raises(FistaPrunerError, match=r"dense/model\.safetensors has changed: .* name its .* with --against"):
        fp.evaluate(run, text, seqlen=16, windows=2)
    assert fp.evaluate(run, text, seqlen=16, windows=2, against=same).reference is not None


def test_what_a_recovered_run_began_with_is_measured_beside_it(tmp_path: Path) -> None:
    folder, text = make(tmp_path), str(tmp_path / "text.txt")
    fp.evaluate(folder / "recovered", text, seqlen=16, windows=2)
    assert len(load_run(folder / "recovered").recovery.before) == 1
    assert "| before | recovered |" in (folder / "recovered" / "model" / "README.md").read_text()


def test_the_failure_of_an_earlier_attempt_is_not_the_state_of_a_run(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "recovered"
    with pytest.raises(KeyboardInterrupt):
        fp.recover(made / "run", out, listener=tiny.StopsAt("what is held out"), **TRAINING)
    (out / "report.json").write_text(load_run(out).model_copy(update={"status": "failed"}).model_dump_json())
    with pytest.raises(KeyboardInterrupt):
        fp.recover(made / "run", out, listener=tiny.StopsAt("what is held out"), **TRAINING)
    assert load_run(out).status == "running"


@pytest.mark.parametrize("of_run", [True, False])
def test_a_perplexity_outlives_tasks_that_fail(made: Path, of_run: bool, cli: tiny.Cli, tasks: Mock) -> None:
    tasks.side_effect = FistaPrunerError("the hub is down")
    target = made / "run" if of_run else made / "dense"
    command = ["evaluate", target, "--data", made / "text.txt", "--seqlen", "16", "--windows", "3", "--quiet"]
    printed = cli(*command, "--tasks", "boolq", status=2)
    assert "the hub is down" in printed.err
    if of_run:
        assert 3 in [each.perplexity.windows for each in load_run(target).evaluations if each.perplexity]
    else:
        assert "perplexity" in printed.out


def test_speed_of_a_run_is_kept_with_it(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fistapruner.measure.speed.get_context", lambda *_: FORKS)
    run = made / "run"
    assert load_run(run).totals.compressed_bytes is None
    found = fp.bench(run, prompt=4, tokens=3, runs=1)
    printed = json.loads(json.dumps(found.to_json()))
    report = load_run(run)
    assert {key: report.speed[key] for key in printed} == printed
    sizes = {row["variant"]: row["file_size"] for row in printed["speeds"]}
    assert report.totals.compressed_bytes == sizes["packed"]
    card = (run / "model" / "README.md").read_text()
    assert "Decoding, packed, tokens/s" in card
    assert "Compressed checkpoint" in card


def test_a_run_that_cannot_be_measured_says_why(made: Path, tmp_path: Path, cli: tiny.Cli) -> None:
    with hold(made / "run"):
        assert "is in use by process" in cli("bench", made / "run", status=2).err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text((made / "run" / "run.json").read_text())
    for verb in ("evaluate", "bench"):
        assert "has no finished checkpoint" in cli(verb, tmp_path / "run", status=2).err


PERPLEXITY = Perplexity("a", "file", 16, 4, 60, "bfloat16", 9.0, 0.1, 2.2, 0.01, text_sha256="aa")
TASKS = (TaskResult("piqa", "acc", 10, 0.5, 0.1), TaskResult("boolq", "acc", 10, 0.5, 0.1))


def kept(*parts: Perplexity | tuple[TaskResult, ...]) -> Evaluation:
    """An evaluation of a perplexity, tasks or both."""
    text = next((part for part in parts if isinstance(part, Perplexity)), None)
    return Evaluation("m", perplexity=text, tasks=next((part for part in parts if isinstance(part, tuple)), ()))


OTHER = replace(PERPLEXITY, text_sha256="bb")
LATER = replace(TASKS[0], items=5)


@pytest.mark.parametrize(
    ("stored", "found", "expected"),
    [
        ([kept(PERPLEXITY, TASKS)], kept(TASKS[1:]), [kept(PERPLEXITY), kept(TASKS[:1]), kept(TASKS[1:])]),
        ([kept(TASKS[:1])], kept(PERPLEXITY), [kept(TASKS[:1]), kept(PERPLEXITY)]),
        ([kept((replace(TASKS[0], metric="acc_norm"),))], kept(TASKS[:1]), None),
        # The first text stays the first, so it stays in the headline.
        (
            [kept(PERPLEXITY), kept(OTHER)],
            kept(PERPLEXITY, TASKS[:1]),
            [kept(PERPLEXITY), kept(OTHER), kept(TASKS[:1])],
        ),
        ([kept(PERPLEXITY), kept(OTHER)], kept(OTHER), [kept(PERPLEXITY), kept(OTHER)]),
        ([kept(TASKS[:1])], kept((LATER,)), [kept((LATER,))]),
    ],
)
def test_a_new_figure_takes_the_place_of_the_old_one(
    stored: list[Evaluation], found: Evaluation, expected: list[Evaluation] | None
) -> None:
    assert put_in_place(stored, found) == (expected or [*stored, found])

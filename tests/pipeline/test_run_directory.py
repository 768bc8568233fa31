"""The run directory: nothing of others is removed, damage to a finished run is found, permissions and paths are kept
apart from it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import fistapruner as fp
import tiny
from fistapruner.cli import main
from fistapruner.measure.speed import Variant, load_variant
from fistapruner.models.export import export_gguf
from fistapruner.runs.continuation import absolute, evaluation_on, refuse_overlap
from fistapruner.runs.directory import RunDirectory, checkpoint_of
from fistapruner.runs.listener import Listener
from fistapruner.runs.prune_directory import PruneDirectory
from fistapruner.runs.records import Report, load_run
from fistapruner.runs.training_directory import RecoverDirectory

SETTINGS: dict[str, Any] = {"method": "magnitude", "calibration": {"source": "python", "samples": 2, "seqlen": 16}}
TEXT = "it was the best of times, it was the worst of times, it was the age of wisdom. "


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model of several shards."""
    return tiny.save("llama", tmp_path_factory.mktemp("dense") / "model", shard="60KB", num_hidden_layers=2)


@pytest.fixture(scope="module")
def finished(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, to be copied."""
    out = tmp_path_factory.mktemp("finished") / "run"
    fp.prune(dense, out, evaluate="python", evaluate_windows=2, **SETTINGS)
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "names",
    [
        ["layers/", "model/thesis.tex"],
        ["layers/mine.txt"],
        ["layers/0000.json"],
        ["layers/", "hidden/notes.txt"],
        ["layers/", "model.partial/notes.txt"],
        ["layers/", "calibration.safetensors"],
        ["layers/", "recipe.yaml"],
        ["report.json"],
    ],
    ids=" ".join,
)
def test_a_folder_that_is_no_run_is_refused_and_kept(dense: Path, tmp_path: Path, names: list[str]) -> None:
    out = tmp_path / "project"
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).mkdir() if name.endswith("/") else (out / name).write_text("years of work")
    before = contents(out)
    with pytest.raises(fp.FistaPrunerError, match="other things in it"):
        fp.prune(dense, out, **SETTINGS)
    assert contents(out) == before


def test_the_source_inside_the_output_is_kept(dense: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(dense, project / "model")
    (project / "layers").mkdir()
    before = contents(project)
    for out in (project, project / "model"):
        with pytest.raises(fp.FistaPrunerError, match="other things in it"):
            fp.prune(project / "model", out, **SETTINGS)
    assert contents(project) == before


def test_an_output_that_is_the_input_is_refused_and_kept(run: Path, finished: Path, tmp_path: Path) -> None:
    """Whatever settings its run has: to remove it, as for other settings, would remove the input."""
    before = contents(run)
    for model, verb in product((run, run / "model"), (fp.prune, fp.recover)):
        with pytest.raises(fp.FistaPrunerError, match=r"holds the model .* itself: name a folder outside of it"):
            verb(model, run)
    with pytest.raises(fp.FistaPrunerError, match=r"holds a run of 'fistapruner prune', not of recover"):
        fp.recover(finished, run)
    assert contents(run) == before


def test_an_output_inside_the_source_or_beside_it_is_not_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for out in (tmp_path / "a" / "out", tmp_path / "ab"):
        refuse_overlap(tmp_path / "a", out)
    for out in (tmp_path / "a", tmp_path, tmp_path / "b" / ".." / "a"):
        with pytest.raises(fp.FistaPrunerError, match=f"^--out {re.escape(str(out))} holds the model "):
            refuse_overlap(tmp_path / "a", out)


def test_an_empty_folder_becomes_a_run(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert fp.prune(dense, tmp_path / "run", **SETTINGS).status == "finished"


def test_an_output_may_be_named_from_the_home_folder(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shells leave the ~ of --out=~/run."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    flags = ["--out=~/run", "--method", "magnitude", "--calibration", "python", "--samples", "2", "--seqlen", "16"]
    assert main(["prune", str(dense), *flags, "--evaluate", "none"]) == 0
    assert str(tmp_path / "home" / "run") in capsys.readouterr().out
    assert main(["status", "~/run"]) == 0
    assert main(["unpack", str(dense), "~nobody-of-this-name/x"]) == 2
    assert "there is no such home folder" in capsys.readouterr().err
    fp.resume("~/run")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_files_that_a_run_did_not_write_are_not_removed(run: Path) -> None:
    """A damaged checkpoint is not made again over files that somebody put beside it, nor one that the run did not
    write."""
    shard = next((run / "model").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (run / "model" / "notes.txt").write_text("years of work")
    before = contents(run / "model")
    with pytest.raises(fp.FistaPrunerError, match=r"notes\.txt was not written by this run: move it away"):
        fp.resume(run)
    assert contents(run / "model") == before
    (run / "model.json").unlink()
    with pytest.raises(fp.FistaPrunerError, match=r"notes\.txt was not written by this run: move it away"):
        fp.resume(run)
    assert contents(run / "model") == before
    shutil.rmtree(run / "model")
    (run / "model").mkdir()
    (run / "model" / "thesis.tex").write_text("years of work")
    with pytest.raises(fp.FistaPrunerError, match=r"was not written by this run"):
        fp.resume(run)
    assert (run / "model" / "thesis.tex").exists()


def test_a_folder_in_the_way_of_a_temporary_one_is_kept(run: Path, dense: Path, tmp_path: Path) -> None:
    """Building under a temporary name never takes a folder that is not ours: not even the source under that name."""
    model = run / "model"
    model.rename(tmp_path / "out.partial")
    before = contents(tmp_path / "out.partial")
    with pytest.raises(fp.FistaPrunerError, match="holds files that fistapruner did not write"):
        fp.pack(tmp_path / "out.partial", tmp_path / "out", values="bf16")
    assert contents(tmp_path / "out.partial") == before
    fp.pack(tmp_path / "out.partial", tmp_path / "packed", values="bf16")
    (tmp_path / "back.partial").mkdir()
    (tmp_path / "back.partial" / "thesis.tex").write_text("years of work")
    with pytest.raises(fp.FistaPrunerError, match="holds files that fistapruner did not write"):
        fp.unpack(tmp_path / "packed", tmp_path / "back")
    assert (tmp_path / "back.partial" / "thesis.tex").exists()
    (run / "model.partial").mkdir()
    (run / "model.partial" / "thesis.tex").write_text("years of work")
    with pytest.raises(fp.FistaPrunerError, match="holds files that fistapruner did not write"):
        fp.resume(run)
    assert (run / "model.partial" / "thesis.tex").exists()


def cut(run: Path) -> None:
    shard = next((run / "model").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])


def flip(run: Path) -> None:
    shard = next((run / "model").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)


def drop_shard(run: Path) -> None:
    next((run / "model").glob("*.safetensors")).unlink()


def drop_config(run: Path) -> None:
    (run / "model" / "config.json").unlink()


def drop_all(run: Path) -> None:
    shutil.rmtree(run / "model")


def cut_without_a_record(run: Path) -> None:
    (run / "model.json").unlink()
    cut(run)


@pytest.mark.parametrize("damage", [cut, flip, drop_shard, drop_config, drop_all, cut_without_a_record])
@pytest.mark.parametrize("verb", ["prune", "resume"])
def test_a_finished_checkpoint_that_is_damaged_is_made_again(
    dense: Path, run: Path, damage: Any, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before, [measured] = tiny.weights(run), json.loads((run / "report.json").read_text())["evaluations"]
    damage(run)
    assert damage in (drop_config, drop_all) or tiny.weights(run) != before
    if (run / "model").is_dir():
        assert main(["bench", str(run)]) == 2
        assert "fistapruner resume" in capsys.readouterr().err
    if verb == "prune":
        fp.prune(dense, run, evaluate="python", evaluate_windows=2, **SETTINGS)
    else:
        assert main([verb, str(run)]) == 0
        assert "the checkpoint is made again: " in capsys.readouterr().err
    assert tiny.weights(run) == before
    assert (run / "model" / "config.json").exists()
    [now] = json.loads((run / "report.json").read_text())["evaluations"]
    assert now["perplexity"] == measured["perplexity"]
    assert (now == measured) == (damage is not cut_without_a_record)  # without a record of its weights: measured again


@pytest.mark.parametrize(
    "stem", ["config", "fistapruner", "generation_config", "model.safetensors.index", "tokenizer", "tokenizer_config"]
)
def test_a_finished_checkpoint_whose_description_is_cut_is_made_again(run: Path, stem: str) -> None:
    path = run / "model" / f"{stem}.json"
    before = path.read_bytes()
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises(fp.FistaPrunerError, match=rf"{stem}.json is not valid JSON.*: make the checkpoint again with"):
        checkpoint_of(run)
    fp.resume(run)
    assert json.loads(path.read_bytes()).keys() == json.loads(before).keys()


def test_a_finished_checkpoint_whose_record_names_no_run_is_made_again(run: Path) -> None:
    path = run / "model" / "fistapruner.json"
    before = json.loads(path.read_bytes())
    path.write_text("{}")
    with pytest.raises(fp.FistaPrunerError, match="is not of this run, or is damaged: make the checkpoint again with"):
        checkpoint_of(run)
    fp.resume(run)
    assert json.loads(path.read_bytes()).keys() == before.keys()


def test_a_damaged_report_is_made_again_as_status_says(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report.json").write_text("{")
    assert main(["status", str(run)]) == 2
    advice = f"report.json is not valid JSON: .*: make it again with 'fistapruner resume {run}'$"
    assert re.search(advice, capsys.readouterr().err.strip())
    assert main(["resume", str(run)]) == 0
    assert "the report is made again: " in capsys.readouterr().err
    assert main(["status", str(run)]) == 0


def test_a_refused_command_leaves_the_folder_as_it_was(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for before in (None, [], ["times.json"]):
        with pytest.raises(fp.FistaPrunerError, match="matches no operator"):
            fp.prune(dense, out, targets=["nowhere"], **SETTINGS)
        with pytest.raises(fp.FistaPrunerError, match="zeros"):
            fp.recover(dense, out, dense=dense, data={"source": "python"})
        assert ([path.name for path in out.iterdir()] if out.exists() else None) == before
        out.mkdir(exist_ok=True)
        if before is not None:
            (out / "times.json").write_text("[3]")  # of an attempt that was killed


@pytest.mark.parametrize(
    ("name", "kind"), [("model", "file"), ("log.txt", "folder"), ("run.json", "folder"), ("layers", "file")]
)
def test_what_stands_in_the_place_of_a_file_is_named(dense: Path, run: Path, name: str, kind: str) -> None:
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.mkdir() if kind == "folder" else path.write_text("x")
    with pytest.raises(fp.FistaPrunerError, match=rf"{name} is a {kind} where the run keeps a"):
        fp.prune(dense, run, **SETTINGS)


def own_code(folder: Path) -> Path:
    """Give a model Python code of its own that leaves a trace when it is run."""
    (folder / "configuration_own.py").write_text(
        "import os\nfrom pathlib import Path\nfrom transformers import LlamaConfig\n\n"
        "Path(os.environ['TRACE']).write_text('run')\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
    )
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "own_llama", "architectures": ["OwnModel"], "auto_map": code})
    )
    return folder


@pytest.mark.parametrize("executor", ["serial", "process"])
def test_code_runs_only_where_this_command_allows_it(
    tmp_path: Path, executor: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, out = tmp_path / "trace", str(tmp_path / "run")
    monkeypatch.setenv("TRACE", str(trace))
    model = own_code(tiny.save("llama", tmp_path / f"model_{executor}"))  # two layers are left for two workers
    execution = {"executor": executor, "threads": 1, "workers": 2 if executor == "process" else None}
    settings = {**SETTINGS, "propagate": "dense", "execution": execution, "trust_remote_code": True}
    tiny.begin(model, out, **settings)
    assert trace.exists()
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 4)

    def refused(*command: str) -> None:
        trace.unlink(missing_ok=True)
        assert main([*command, "--quiet"]) == 2
        assert "--trust-remote-code" in capsys.readouterr().err
        assert not trace.exists()

    refused("resume", out)
    assert main(["resume", out, "--trust-remote-code", "--quiet"]) == 0
    evaluation = ("evaluate", out, "--data", str(text), "--seqlen", "16")
    refused(*evaluation)
    assert main([*evaluation, "--trust-remote-code", "--quiet"]) == 0
    assert main(["resume", out, "--quiet"]) == 0  # finished: there is nothing to run
    trace.unlink(missing_ok=True)
    with pytest.raises(fp.FistaPrunerError, match="needs Python code of its own"):
        load_variant(Variant("dense", Path(out) / "model"))
    fp.pack(Path(out) / "model", tmp_path / "packed", values="bf16")
    for folder in (out, f"{out}/model", tmp_path / "packed"):  # before anything is packed, unpacked or measured
        with monkeypatch.context() as patch:
            for work in ("pack", "unpack"):
                patch.delattr(f"fistapruner.measure.bench.{work}")
            assert main(["bench", str(folder)]) == 2
        assert "needs Python code of its own" in capsys.readouterr().err
    monkeypatch.setattr("builtins.input", lambda _: "y")  # transformers may ask whether to run it
    with pytest.raises(fp.FistaPrunerError, match=r"of its own: .* load it with .*packed', trust_remote_code=True\)"):
        fp.load(tmp_path / "packed")
    card, packed = ((folder / "README.md").read_text("utf-8") for folder in (Path(out) / "model", tmp_path / "packed"))
    assert card.count(", trust_remote_code=True)\n") == 2  # model and tokenizer
    assert 'from_pretrained("FOLDER", trust_remote_code=True)' in packed
    assert "fistapruner.load(" not in packed
    with pytest.raises(fp.FistaPrunerError, match="is not exported, only llama, mistral"):
        export_gguf(Path(out) / "model", tmp_path / "out.gguf")
    assert not trace.exists()


def test_pickles_are_read_only_where_this_command_allows_it(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.save("llama", tmp_path / "model", num_hidden_layers=2)
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    out = str(tmp_path / "run")
    tiny.begin(folder, out, allow_pickle=True, **SETTINGS)
    assert main(["resume", out, "--quiet"]) == 2
    assert "--allow-pickle" in capsys.readouterr().err
    assert main(["resume", out, "--allow-pickle", "--quiet"]) == 0


def test_a_calibration_file_is_kept_from_the_root(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before its tokens were drawn again or not: the run goes on from anywhere, and is the same run under any
    spelling."""
    (tmp_path / "text.txt").write_text(TEXT * 20)
    monkeypatch.chdir(tmp_path)
    settings = {**SETTINGS, "calibration": {**SETTINGS["calibration"], "source": "text.txt"}}
    tiny.begin(dense, "run", **settings)
    (tmp_path / "run" / "calibration.safetensors").unlink()  # it has to be drawn again
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert fp.resume(tmp_path / "run").status == "finished"
    before = (tmp_path / "run" / "model.json").stat().st_mtime_ns
    for source in ("../text.txt", str(tmp_path / "text.txt"), str(tmp_path / "." / "elsewhere" / ".." / "text.txt")):
        settings["calibration"]["source"] = source
        assert fp.prune(dense, tmp_path / "run", **settings).status == "finished"
    assert (tmp_path / "run" / "model.json").stat().st_mtime_ns == before


def test_the_same_model_under_another_spelling_is_the_same_model(dense: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(dense.parent)
    (tmp_path / "alias").symlink_to(dense)
    for name in (dense / ".." / dense.name, tmp_path / "link" / dense.name, tmp_path / "alias"):
        told = tiny.Said()
        fp.prune(name, run, listener=told, **SETTINGS)
        assert f"{run} holds the finished run of this recipe" in told.sentences
    assert absolute(str(tmp_path / "link" / ".." / dense.parent.name / dense.name)) == str(dense.resolve())
    assert absolute(str(tmp_path / "alias")) == str(tmp_path.resolve() / "alias")  # what a name ends with stays


def test_a_file_that_is_named_none_is_a_text_to_evaluate_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the command has it; without such a file, the word is none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none").write_text(TEXT)
    asked = evaluation_on("none", 2)
    assert asked is not None
    assert (asked.data, asked.windows) == (str(tmp_path / "none"), 2)


OTHERS = ["seed", "model", "text", "tokens", "torch"]


@pytest.mark.parametrize("other", OTHERS)
def test_anything_else_is_another_run(dense: Path, tmp_path: Path, other: str) -> None:
    """The same settings, model files, texts and versions go on; what differs is named, and the folder stays."""
    model, text, out = Path(shutil.copytree(dense, tmp_path / "model")), tmp_path / "text.txt", tmp_path / "run"
    text.write_text(TEXT * 20)
    settings: dict[str, Any] = {**SETTINGS, "calibration": {**SETTINGS["calibration"], "source": str(text)}}
    tiny.begin(model, out, **settings)
    run, said = PruneDirectory(out), other
    if other == "seed":
        settings["seed"] = 1
    elif other == "model":
        tiny.save("llama", model, shard="60KB", num_hidden_layers=2, seed=1)
        said = "has changed: its checksum was"
    elif other == "text":
        text.write_text(TEXT[::-1] * 20)
    elif other == "tokens":
        settings["tokens"] = (run.tokens().flip(1), {"source": "mine"})
    else:
        record = run.begun_record()
        record.versions["torch"] = "1.0"
        run.write_record(record)
        said = r"torch 1\.0 \(now "
    before = {name: data for name, data in contents(out).items() if name not in ("log.txt", "times.json")}
    with pytest.raises(fp.FistaPrunerError, match=rf"^--out {out} holds a run .*{said}.*name another folder"):
        fp.prune(model, out, **settings)
    after = contents(out)
    assert all(after[name] == data for name, data in before.items())


def test_the_same_files_at_another_place_are_the_model_of_the_run(dense: Path, tmp_path: Path) -> None:
    model, elsewhere, run = Path(shutil.copytree(dense, tmp_path / "a")), tmp_path / "b", tmp_path / "run"
    tiny.begin(model, run, **SETTINGS)
    layer = (run / "layers" / "0000.safetensors").stat().st_mtime_ns
    model.rename(elsewhere)
    with pytest.raises(fp.FistaPrunerError, match=re.escape(str(model))):
        fp.resume(run)
    assert fp.prune(elsewhere, run, **SETTINGS).status == "finished"
    assert (run / "layers" / "0000.safetensors").stat().st_mtime_ns == layer
    told = tiny.Said()
    (tmp_path / "alias").symlink_to(elsewhere)
    fp.prune(tmp_path / "alias", run, listener=told, **SETTINGS)
    assert f"{run} holds the finished run of this recipe" in told.sentences
    assert absolute(str(tmp_path / "alias")) == str(tmp_path.resolve() / "alias")  # what a name ends with stays
    shutil.rmtree(elsewhere)
    assert fp.resume(run).status == "finished"  # which needs no model any more


@pytest.mark.parametrize("damaged", ["calibration", "metrics"])
def test_what_was_measured_is_measured_again_where_its_file_is_damaged(
    dense: Path, tmp_path: Path, damaged: str
) -> None:
    """To the same bits: no layer is pruned again."""
    run, settings = PruneDirectory(tmp_path / "run"), {**SETTINGS, "weighting": "fisher"}
    solved: list[int] = []
    fp.prune(dense, run.folder, **settings)
    before = contents(run.folder)
    for data in (before[f"{damaged}.safetensors"][:-4] + b"0000", b""):
        (run.folder / f"{damaged}.safetensors").write_bytes(data)
        run.report_file.unlink()
        fp.prune(dense, run.folder, **settings, inspect=lambda layer, *_: solved.append(layer))
        assert contents(run.folder)[f"{damaged}.safetensors"] == before[f"{damaged}.safetensors"]
    assert not solved


def test_windows_of_another_size_are_refused(dense: Path, tmp_path: Path) -> None:
    for shape in ((1, 16), (4, 8)):
        tokens = torch.ones(shape, dtype=torch.int64), {"source": "mine"}
        with pytest.raises(fp.FistaPrunerError, match=rf"tokens has the shape {re.escape(str(shape))}, .*\(2, 16\)"):
            fp.prune(dense, tmp_path / "new", tokens=tokens, **SETTINGS)


def test_the_command_of_a_run_is_a_command_or_none(
    dense: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook's process has a command line, too, which makes nothing again."""
    report = load_run(run)
    assert report.command is None
    assert report.lineage is not None
    assert report.lineage.stages[0].command is None
    card = (run / "model" / "README.md").read_text()
    assert "Recipe:" in card
    assert "To make it again" not in card
    shutil.rmtree(run / "model")
    (run / "report.json").unlink()
    assert fp.resume(run).command is None
    command = ["prune", str(dense), "--out", str(tmp_path / "other"), "--samples", "2", "--seqlen", "16"]
    command += ["--calibration", "python", "--method", "magnitude", "--evaluate", "none"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/fistapruner", *command])
    assert main(command) == 0
    assert shlex.join(["fistapruner", *command]) in (tmp_path / "other" / "model" / "README.md").read_text()


def test_a_run_whose_evaluation_text_is_gone_goes_on_without_it(dense: Path, tmp_path: Path) -> None:
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(TEXT * 20)
    tiny.begin(dense, run, evaluate=text, layers=2, **SETTINGS)
    text.unlink()
    with pytest.raises(fp.FistaPrunerError, match=r"text\.txt, which this run evaluates on, is gone: .*none"):
        fp.resume(run)
    assert not (run / "model").exists()
    assert fp.prune(dense, run, **SETTINGS).status == "finished"  # as the command with --evaluate none


def test_an_allocation_in_another_order_is_another_run(dense: Path, tmp_path: Path) -> None:
    names = {"down_proj": "40%", r"re:layers\.0\.": "30%"}
    for number, allocation in enumerate((names, dict(reversed(names.items())))):
        run = tmp_path / str(number)
        first = fp.prune(dense, run, **SETTINGS, allocation=allocation)
        assert fp.prune(dense, run, **SETTINGS, allocation=allocation).finished == first.finished
        with pytest.raises(fp.FistaPrunerError, match=r"holds a run with allocation = \[.*\], this one has \["):
            fp.prune(dense, run, **SETTINGS, allocation=dict(reversed(allocation.items())))


def test_several_calibration_texts_are_known_by_name_and_content(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 20)
    command = ["prune", str(dense), "--calibration", f"own={text}", "--calibration", "generated=self"]
    command += ["--samples", "3", "--seqlen", "16", "--method", "wanda", "--evaluate", "none"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    calibration = load_run(tmp_path / "run").calibration
    assert calibration is not None
    assert calibration.source == "own, generated"
    assert sorted(task.samples for task in calibration.tasks.values()) == [1, 2]
    assert calibration.tasks["own"].source == str(text)
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    assert "holds the finished run" in capsys.readouterr().err
    text.write_text(TEXT[::-1] * 20)
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    assert "holds a run for another content of own, generated" in capsys.readouterr().err
    text.unlink()  # nobody can tell
    assert main(["resume", str(tmp_path / "run")]) == 0


def test_resume_advises_what_the_command_takes(dense: Path, run: Path, tmp_path: Path) -> None:
    """Where ``run.json`` is gone or was never written: the same command only where all is of what comes before it."""
    (run / "run.json").unlink()
    with pytest.raises(fp.FistaPrunerError, match=r"it has no run.json\): give a command with a new --out$"):
        fp.resume(run)
    with pytest.raises(fp.FistaPrunerError, match="name a new folder"):
        fp.prune(dense, run, **SETTINGS)
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (stopped / "log.txt").touch()
    for _ in range(2):
        with pytest.raises(fp.FistaPrunerError, match=r"it has no run.json\): give its command again$"):
            fp.resume(stopped)
        fp.prune(dense, stopped, **SETTINGS)
        (stopped / "run.json").unlink()
        for path in stopped.iterdir():  # all that is there when the calibration text has been generated
            if path.name not in ("calibration.safetensors", "log.txt"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_text_that_the_model_writes_is_kept_as_it_is_written(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "calibration": {"source": "self", "samples": 40, "seqlen": 8}}
    write = PruneDirectory.keep_texts

    def stopped(run: PruneDirectory, *texts: Any) -> None:
        write(run, *texts)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(PruneDirectory, "keep_texts", stopped)
        with pytest.raises(KeyboardInterrupt):
            fp.prune(dense, tmp_path / "run", **settings)
    kept = []
    monkeypatch.setattr(PruneDirectory, "keep_texts", lambda run, drawing, texts, random: kept.append(len(texts)))
    fp.prune(dense, tmp_path / "run", **settings)
    assert kept == [40]  # the second batch alone was written
    assert not (tmp_path / "run" / "calibration.begun.safetensors").exists()
    fp.prune(dense, tmp_path / "new", **settings)
    assert torch.equal(PruneDirectory(tmp_path / "new").tokens(), PruneDirectory(tmp_path / "run").tokens())


def test_a_pruning_run_is_not_resumed_by_several_processes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that ``torchrun`` started all would want the lock."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(fp.FistaPrunerError, match="which 2 processes of torchrun cannot share"):
        fp.resume(run)


def begun_on(run: RunDirectory, device: str) -> None:
    """Let a run have begun on another device."""
    record = run.record()
    assert record is not None
    record.recipe["execution"]["device"] = device
    run.write_record(record)


def test_a_run_goes_on_without_its_device(dense: Path, run: Path, tmp_path: Path) -> None:
    """By a command that names another; ``resume`` names none, and says what it takes."""
    following: dict[str, Any] = {"steps": 1, "rank": 2, "data": {"seqlen": 16, "tokens": 300}}
    shutil.rmtree(run)
    fp.prune(dense, run, evaluate="python", evaluate_windows=1, **SETTINGS)
    recovered = tmp_path / "recovered"
    fp.recover(run, recovered, **following)
    begun_on(RecoverDirectory(recovered), "cuda:99")

    def prune(listener: Listener) -> Report:
        execution = {"device": "cpu"}
        again = {**SETTINGS, "execution": execution}
        return fp.prune(dense, run, evaluate="python", evaluate_windows=1, listener=listener, **again)

    for name, go_on in (
        ("prune", prune),
        ("resume", lambda listener: fp.resume(run, listener=listener)),
    ):
        begun_on(PruneDirectory(run), "cuda:99")  # the command before has written its own device
        shutil.rmtree(run / "model")
        (run / "report.json").unlink()
        said = tiny.Said()
        report = go_on(said)
        assert report.evaluations
        found = [sentence for sentence in said.sentences if sentence.startswith("device 'cuda:99'")]
        assert len(found) == (name != "prune")
    shutil.rmtree(recovered / "model")
    said = tiny.Said()
    assert fp.resume(recovered, listener=said).status == "finished"
    assert any("this run goes on with" in sentence for sentence in said.sentences)

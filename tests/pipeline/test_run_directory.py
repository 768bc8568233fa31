"""The run directory: nothing of others is removed, damage to a finished run is found, permissions and paths are kept
apart from it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

import fistapruner as fp
import tiny
from fistapruner.allocate.measure import Decision, decide
from fistapruner.cli import main
from fistapruner.core import parse_sparsity
from fistapruner.measure.speed import Variant, load_variant
from fistapruner.models.files.gguf_export import export_gguf
from fistapruner.models.files.safetensors import SafetensorsFile
from fistapruner.pipeline.begun import (
    evaluation_on,
    interrupted_with,
    refuse_other_settings,
    refuse_overlap,
    say_kept_plan,
    say_other_versions,
)
from fistapruner.pipeline.find_model import absolute
from fistapruner.runs.directory import RunDirectory, checkpoint_of
from fistapruner.runs.listener import Listener
from fistapruner.runs.lock import hold
from fistapruner.runs.prune_directory import PruneDirectory
from fistapruner.runs.records import Report, load_run
from fistapruner.runs.training_directory import RecoverDirectory
from fistapruner.runtime.files import sha256_file
from fistapruner.settings.execution_settings import Execution
from fistapruner.settings.settings import Recipe

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


def test_an_output_around_the_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GGUF file is converted into the cache; here that lies in the run directory, which looks new until then."""
    pytest.importorskip("gguf")
    from tiny_gguf import write_gguf

    write_gguf(tmp_path / "model.gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "run"))
    with pytest.raises(fp.FistaPrunerError, match=r"holds the model .* itself: name a folder outside of it"):
        fp.prune(tmp_path / "model.gguf", tmp_path / "run", **SETTINGS)
    assert list((tmp_path / "run").rglob("config.json"))


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


def test_files_that_a_run_did_not_write_are_not_removed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged checkpoint is not made again over files that somebody put beside it, nor one that the run did not
    write; that is said before a layer is pruned."""
    monkeypatch.setattr("fistapruner.pipeline.prune.prune_layers", Mock(side_effect=AssertionError))
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


def test_the_checkpoint_is_written_without_opening_the_layers_again_for_every_tensor(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, opened = tiny.weights(run), Mock(side_effect=SafetensorsFile)
    drop_all(run)
    monkeypatch.setattr("fistapruner.runs.journal.SafetensorsFile", opened)
    fp.resume(run)
    assert tiny.weights(run) == before
    assert opened.call_count == 2  # decoder layers, of seven operators each


@pytest.mark.parametrize("killed", ["before model.json", "before the report"])
def test_a_checkpoint_is_not_of_two_prunings(run: Path, monkeypatch: pytest.MonkeyPatch, killed: str) -> None:
    """Another machine may prune a lost layer again to other bits than those of the files that were written before."""
    before, folder = tiny.weights(run), run / "model"
    (run / "report.json").unlink()
    shard = min(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x3f")
    digests = {path.name: sha256_file(path) for path in folder.glob("*.safetensors")}
    RunDirectory(run).write_model_record(load_run(run).fingerprint or "", digests)
    if killed == "before model.json":
        (run / "model.json").unlink()
    (run / "layers" / "0001.safetensors").unlink()
    fp.resume(run)
    assert tiny.weights(run) == before
    assert not (run / "model.partial").exists()


def test_a_checkpoint_that_was_made_again_and_killed_is_whole_and_can_be_made_again(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tiny.weights(run)
    for _ in range(2):
        shard = min((run / "model").glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-1])
        with monkeypatch.context() as patch:
            patch.setattr(RunDirectory, "write_model_record", Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                fp.resume(run)
        (run / "model" / ".partial").write_text("")  # as a kill leaves it
        fp.resume(run)
        assert tiny.weights(run) == before
        assert not (run / "model" / ".partial").exists()


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


def test_what_is_damaged_is_said_where_layers_are_gone_too(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tiny.weights(run)
    cut(run)
    (run / "layers" / "0001.safetensors").unlink()
    assert main(["resume", str(run)]) == 0  # the dense model is there: the layer is pruned again, to the same bits
    assert "bytes instead of" in capsys.readouterr().err
    assert tiny.weights(run) == before


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


def test_the_same_relative_name_in_another_folder_is_another_model(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    shutil.copytree(dense, tmp_path / "a" / "model")
    tiny.save("llama", tmp_path / "b" / "model", shard="60KB", num_hidden_layers=2, seed=1)
    monkeypatch.chdir(tmp_path / "a")
    fp.prune("model", tmp_path / "run", **SETTINGS)
    fp.prune(tmp_path / "a" / "model", tmp_path / "run", **SETTINGS)
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(fp.FistaPrunerError, match=r"a run of the model '.*/a/model', this one is of '.*/b/model'"):
        fp.prune("model", tmp_path / "run", **SETTINGS)
    shutil.rmtree(tmp_path / "a")
    assert fp.resume(tmp_path / "run").status == "finished"


def test_the_same_model_under_another_spelling_is_the_same_model(dense: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(dense.parent)
    (tmp_path / "alias").symlink_to(dense)
    for name in (dense / ".." / dense.name, tmp_path / "link" / dense.name, tmp_path / "alias"):
        told = tiny.Said()
        fp.prune(name, run, listener=told, **SETTINGS)
        assert f"{run} holds the finished run of this recipe" in told.sentences
    assert absolute(str(tmp_path / "link" / ".." / dense.parent.name / dense.name)) == str(dense.resolve())
    assert absolute(str(tmp_path / "alias")) == str(tmp_path.resolve() / "alias")  # what a name ends with stays


def test_a_run_in_a_moved_tree_is_still_the_run(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(dense, tmp_path / "a" / "model")
    monkeypatch.chdir(tmp_path / "a")
    fp.prune("model", "run", **SETTINGS)
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.chdir(tmp_path / "b")
    told = tiny.Said()
    assert fp.prune("model", "run", listener=told, **SETTINGS).status == "finished"
    assert "run holds the finished run of this recipe" in told.sentences
    assert PruneDirectory(Path("run")).begun_record().decision.folder == tmp_path / "b" / "model"  # from any folder
    other = tiny.save("llama", tmp_path / "other", seed=5, num_hidden_layers=2)
    with pytest.raises(fp.FistaPrunerError, match="a run of the model"):
        fp.prune(other, "run", **SETTINGS)
    (tmp_path / "b" / "run" / "report.json").unlink()  # an unfinished one goes on
    (tmp_path / "b" / "run" / "layers" / "0001.json").unlink()
    times = (tmp_path / "b" / "run" / "layers" / "0000.safetensors").stat().st_mtime_ns
    assert fp.prune("model", "run", **SETTINGS).status == "finished"
    assert (tmp_path / "b" / "run" / "layers" / "0000.safetensors").stat().st_mtime_ns == times
    (tmp_path / "b" / "run" / "report.json").unlink()
    assert fp.resume("run").status == "finished"


def test_the_same_files_at_another_place_are_the_model_of_the_run(dense: Path, tmp_path: Path) -> None:
    model, elsewhere, run = Path(shutil.copytree(dense, tmp_path / "a")), tmp_path / "b", tmp_path / "run"
    tiny.begin(model, run, **SETTINGS)
    layer = (run / "layers" / "0000.safetensors").stat().st_mtime_ns
    model.rename(elsewhere)
    message = f"the model of the run in {run} is not at {model}; give its prune command again"
    with pytest.raises(fp.FistaPrunerError, match=re.escape(message)):
        fp.resume(run)
    assert fp.prune(elsewhere, run, **SETTINGS).status == "finished"
    assert (run / "layers" / "0000.safetensors").stat().st_mtime_ns == layer
    record = PruneDirectory(run).record()
    assert record is not None
    assert (record.decision.model, record.decision.folder) == (str(elsewhere), elsewhere)
    elsewhere.rename(model)
    assert fp.resume(run).status == "finished"  # which needs no model any more


def test_a_gguf_file_of_another_name_is_refused_before_it_is_converted(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the same name may be the run's model, at another place."""
    pytest.importorskip("gguf")
    from tiny_gguf import write_gguf

    cache, model, moved, of_file = (tmp_path / name for name in ("cache", "a", "b", "of_file"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    model.mkdir()
    write_gguf(model / "tiny.gguf")
    for other in (model / "tiny.gguf", model):
        with pytest.raises(fp.FistaPrunerError, match=r"a run of the model .*/model', this one is of "):
            fp.prune(other, run, **SETTINGS)
    assert not cache.exists()
    fp.prune(model / "tiny.gguf", of_file, **SETTINGS)
    model.rename(moved)
    told = tiny.Said()
    fp.prune(moved / "tiny.gguf", of_file, listener=told, **SETTINGS)
    assert f"{of_file} holds the finished run of this recipe" in told.sentences
    conversions = contents(cache)
    (moved / "tiny.gguf").rename(moved / "other.gguf")
    with pytest.raises(fp.FistaPrunerError, match=r"a run of the model .*tiny\.gguf', this one is of .*other\.gguf'"):
        fp.prune(moved / "other.gguf", of_file, **SETTINGS)
    assert contents(cache) == conversions


@pytest.mark.parametrize("finished", [False, True], ids=["interrupted", "finished"])
def test_what_a_continuing_command_asks_for_is_done_and_recorded(dense: Path, tmp_path: Path, finished: bool) -> None:
    """The evaluation, the execution; ``resume`` does it after another interruption."""
    run = tmp_path / "run"
    asked = {**SETTINGS, "evaluate": "python", "evaluate_windows": 1}
    asked["execution"] = {"batch_size": 1}
    with nullcontext() if finished else pytest.raises(KeyboardInterrupt):
        fp.prune(dense, run, listener=Listener() if finished else tiny.Stops(), **SETTINGS)
    if finished:
        report = fp.prune(dense, run, **asked)
    else:
        told = tiny.Stops()
        with pytest.raises(KeyboardInterrupt):
            fp.prune(dense, run, listener=told, **asked)
        assert (
            "this run keeps the plan that it began with: another --batch-size changes nothing in the pruning"
            in told.sentences
        )
        report = fp.resume(run)
    assert (len(report.evaluations), len(load_run(run).evaluations)) == (1, 1)
    record = PruneDirectory(run).record()
    assert record is not None
    assert record.decision.evaluation is not None
    assert record.decision.evaluation.windows == record.recipe["execution"]["batch_size"] == 1
    assert Recipe.from_yaml((run / "recipe.yaml").read_text()) == Recipe.build(record.recipe)


@pytest.mark.parametrize(("before", "now", "said"), [(None, None, 0), (4, None, 0), (4, 4, 0), (None, 4, 1), (4, 2, 1)])
def test_a_setting_is_said_to_change_nothing_where_it_is_another(
    run: Path, before: int | None, now: int | None, said: int
) -> None:
    record, told = PruneDirectory(run).begun_record(), tiny.Said()
    record.recipe["execution"]["batch_size"] = before
    say_kept_plan(record, Execution(batch_size=now), told)
    assert len(told.sentences) == said
    say_kept_plan(record.model_copy(update={"kind": "recover"}), Execution(memory_limit="1GiB"), told)
    assert told.sentences[said:] == [
        "this run keeps the plan that it began with: another --memory-limit changes nothing in the training"
    ]


def test_other_versions_than_those_that_a_run_began_with_are_said(finished: Path) -> None:
    before, told = PruneDirectory(finished).begun_record().versions, tiny.Said()
    say_other_versions(before, told)
    assert not told.sentences
    say_other_versions({**before, "torch": "1.0"}, told)
    assert [line.partition(":")[0] for line in told.sentences] == [
        f"this run began with torch 1.0 (now {before['torch']})"
    ]


def test_a_file_that_is_named_none_is_a_text_to_evaluate_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the command has it; without such a file, the word is none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none").write_text(TEXT)
    asked = evaluation_on("none", 2)
    assert asked is not None
    assert (asked.data, asked.windows) == (str(tmp_path / "none"), 2)


def test_an_edited_recipe_is_written_again_where_the_run_goes_on(dense: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    following = {"steps": 1, "rank": 2, "data": {"source": "python", "seqlen": 16, "tokens": 300}}
    fp.prune(dense, run, allocation={"re:mlp": "40%"}, **SETTINGS)
    fp.recover(run, tmp_path / "recovered", **following)
    for out in (run, tmp_path / "recovered"):
        recipe = (out / "recipe.yaml").read_text()
        for text, finished in product((recipe, recipe.replace("seed: 0", "seed: 1"), "no: [yaml", None), (False, True)):
            if not finished:
                (out / "report.json").unlink()
            if text is None:
                (out / "recipe.yaml").unlink()
            else:
                (out / "recipe.yaml").write_text(text)
            said = tiny.Said()
            fp.resume(out, listener=said)
            assert any("does not have the settings of run.json" in each for each in said.sentences) == (text != recipe)
            assert (out / "recipe.yaml").read_text() == recipe


def test_other_windows_than_those_of_the_run_or_its_recipe_are_refused(dense: Path, run: Path, tmp_path: Path) -> None:
    tokens, how = PruneDirectory(run).tokens(), {"source": "mine", "how": "drawn", "sha256": ""}
    assert fp.prune(dense, run, tokens=(tokens.to(torch.int32), how), **SETTINGS).status == "finished"
    for left in (True, False):
        with pytest.raises(fp.FistaPrunerError, match="holds a run of other calibration windows"):
            fp.prune(dense, run, tokens=(tokens.flip(1), how), **SETTINGS)
        if left:
            (run / "report.json").unlink()
    for shape in ((1, 16), (4, 8)):
        with pytest.raises(fp.FistaPrunerError, match=rf"tokens has the shape {re.escape(str(shape))}, .*\(2, 16\)"):
            fp.prune(dense, tmp_path / "new", tokens=(torch.ones(shape, dtype=torch.int64), how), **SETTINGS)


@pytest.mark.parametrize("changed", ["text", "model", "tokens"])
def test_other_windows_are_taken_where_the_run_is_made_again(dense: Path, tmp_path: Path, changed: str) -> None:
    model, text, run = Path(shutil.copytree(dense, tmp_path / "model")), tmp_path / "text.txt", tmp_path / "run"
    text.write_text(TEXT * 20)
    settings = {**SETTINGS, "calibration": {**SETTINGS["calibration"], "source": str(text)}}
    tiny.begin(model, run, **settings)
    tokens = PruneDirectory(run).tokens().flip(1)
    if changed == "text":
        text.write_text(TEXT[::-1] * 20)
    elif changed == "model":
        tiny.save("llama", model, shard="60KB", num_hidden_layers=2, seed=1)
    else:
        (run / "calibration.safetensors").unlink()
    how = {"source": "mine", "how": "drawn", "sha256": ""}
    assert fp.prune(model, run, tokens=(tokens, how), **settings).status == "finished"
    assert torch.equal(PruneDirectory(run).tokens(), tokens)


@pytest.mark.parametrize("kind", ["gguf", "hub"])
def test_a_run_keeps_the_model_files_that_it_began_with(
    dense: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another release of transformers converts a GGUF file anew; a hub's name leads to a later commit."""
    commits, model, run = [dense], "someone/model", tmp_path / "run"
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(commits[-1]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if kind == "gguf":
        pytest.importorskip("gguf")
        from tiny_gguf import write_gguf

        model = str(tmp_path / "model.gguf")
        write_gguf(Path(model))
    else:
        commits.append(tiny.save("llama", tmp_path / "later", num_hidden_layers=2, seed=1))
        commits.reverse()
    settings, layer = {**SETTINGS, "propagate": "dense"}, run / "layers" / "0000.safetensors"
    tiny.begin(model, run, **settings)
    before = layer.stat().st_mtime_ns
    commits.pop()
    monkeypatch.setattr("fistapruner.models.source.version", lambda _: "0.0")
    told = tiny.Said()
    assert fp.prune(model, run, listener=told, **settings).status == "finished"
    assert layer.stat().st_mtime_ns == before
    assert not any("made again" in sentence for sentence in told.sentences)
    if kind == "gguf":  # a file that has changed is another model
        write_gguf(Path(model), kind="F16")
        (run / "report.json").unlink()
        fp.prune(model, run, listener=told, **settings)
        assert any("the run is made again with all its layers" in sentence for sentence in told.sentences)
        return
    with pytest.raises(fp.FistaPrunerError, match="a run of the model 'someone/model', this one is of 'someone/other'"):
        fp.prune("someone/other", run, **settings)
    copied = shutil.copytree(dense, tmp_path / "copied")
    for name in (copied, model):  # its files at another place, and its name again
        told = tiny.Said()
        fp.prune(name, run, listener=told, **settings)
        assert f"{run} holds the finished run of this recipe" in told.sentences


@pytest.mark.parametrize("other", ["", "model", "versions", "device", "own code", "own code now", "own code before"])
def test_a_model_is_compared_again_only_where_it_or_what_runs_it_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """The comparison of its logits loads every decoder layer twice."""
    model, run, checked = tmp_path / f"model_{other.replace(' ', '_')}", PruneDirectory(tmp_path / "run"), Mock()
    tiny.save("llama", model, num_hidden_layers=2)
    monkeypatch.setattr("fistapruner.pipeline.prune_inputs.check_model", checked)
    settings = {**SETTINGS, "propagate": "dense"}
    if other.startswith("own code"):  # of a model_type that transformers knows
        (model / "modeling_own.py").write_text(
            "import transformers\n\nclass LlamaForCausalLM(transformers.LlamaForCausalLM):\n    pass\n"
        )
        config = json.loads((model / "config.json").read_text())
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.LlamaForCausalLM"}
        (model / "config.json").write_text(json.dumps(config))
        settings["trust_remote_code"] = other != "own code now"
    tiny.begin(model, run.folder, **settings)
    assert checked.call_count == 1
    record = run.record()
    assert record is not None
    if other == "model":
        tiny.save("llama", model, num_hidden_layers=2, seed=1)
    elif other == "versions":
        record.versions["transformers"] = "0.0"
    elif other == "device":
        record.machine.device_name = "another GPU"
    elif other in ("own code now", "own code before"):
        settings["trust_remote_code"] = other == "own code now"
    run.write_record(record)
    fp.prune(model, run.folder, **settings)
    assert checked.call_count == 1 + bool(other)


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


def test_a_changed_calibration_text_is_another_run(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 20)
    command = ["prune", str(dense), "--calibration", str(text), "--samples", "2", "--seqlen", "16"]
    command += ["--method", "wanda", "--evaluate", "none"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    first = tiny.weights(tmp_path / "run")
    os.utime(text)
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    assert "holds the finished run" in capsys.readouterr().err
    text.write_text(TEXT[::-1] * 20)
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    assert f"the run is made again: {text} is not the text that it was calibrated on" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "new")]) == 0
    assert tiny.weights(tmp_path / "run") == tiny.weights(tmp_path / "new") != first


def test_an_interruption_of_a_run_that_is_made_again_is_told_truly(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, run = tmp_path / "text.txt", tmp_path / "run"
    settings = {"method": "wanda", "calibration": {"source": str(text), "samples": 2, "seqlen": 16}}
    text.write_text(TEXT * 20)
    fp.prune(dense, run, **settings)
    first = tiny.weights(run)
    text.write_text(TEXT[::-1] * 20)
    with monkeypatch.context() as patched:  # the new tokens are there, the record of the run is that of the old ones
        patched.setattr("fistapruner.pipeline.prepare.record", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt, match=rf"^interrupted before the first decoder layer; .* resume {run}$"):
            fp.prune(dense, run, **settings)
    text.write_text(TEXT * 20)
    said = tiny.Said()
    fp.prune(dense, run, listener=said, **settings)
    why = f"{run / 'calibration.safetensors'} does not hold the tokens that it was calibrated on"
    assert f"the run is made again: {why}" in said.sentences
    assert tiny.weights(run) == first
    text.write_text(TEXT[::-1] * 20)
    with pytest.raises(KeyboardInterrupt, match=rf"^interrupted with 0 decoder layers done; .* resume {run}$"):
        fp.prune(dense, run, inspect=Mock(side_effect=KeyboardInterrupt), **settings)

    def interrupt_layer_1(layer: int, *_: object) -> None:
        if layer == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"^interrupted with 1 decoder layer done; "):
        fp.prune(dense, run, inspect=interrupt_layer_1, **settings)


def test_a_run_whose_evaluation_text_is_gone_goes_on_without_it(dense: Path, tmp_path: Path) -> None:
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(TEXT * 20)
    tiny.begin(dense, run, evaluate=text, layers=2, **SETTINGS)
    text.unlink()
    with pytest.raises(fp.FistaPrunerError, match=r"text\.txt, which this run evaluates on, is gone: .*none"):
        fp.resume(run)
    assert not (run / "model").exists()
    assert fp.prune(dense, run, **SETTINGS).status == "finished"  # as the command with --evaluate none
    assert fp.resume(run).status == "finished"


def test_a_setting_that_a_run_does_not_have_is_none_in_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    refuse_other_settings(run, {"seed": 0, "more": 1, "data": None}, {"seed": 0, "new": None, "data": {"tokens": None}})
    for now, said in (
        ({"new": 2}, "new = null, this one has 2"),
        ({"data": {"a": 1}}, "data.a = null, this one has 1"),
    ):
        with pytest.raises(
            fp.FistaPrunerError,
            match=f"holds a run with {said}: 'fistapruner resume .*' goes on with that one; .* name another folder$",
        ):
            refuse_other_settings(run, {"seed": 0, "data": {"b": 2}}, {"seed": 0, **now})


def test_a_second_interruption_does_not_cost_the_sentence_that_says_how_to_go_on() -> None:
    say = Mock(side_effect=[KeyboardInterrupt, "interrupted; go on"])
    with pytest.raises(KeyboardInterrupt, match="interrupted; go on"), interrupted_with(say):
        raise KeyboardInterrupt


def test_an_allocation_in_another_order_is_another_run(dense: Path, tmp_path: Path) -> None:
    names = {"down_proj": "40%", r"re:layers\.0\.": "30%"}
    for number, allocation in enumerate((names, dict(reversed(names.items())))):
        run = tmp_path / str(number)
        first = fp.prune(dense, run, **SETTINGS, allocation=allocation)
        assert fp.prune(dense, run, **SETTINGS, allocation=allocation).finished == first.finished
        with pytest.raises(fp.FistaPrunerError, match=r"holds a run with allocation = \[.*\], this one has \["):
            fp.prune(dense, run, **SETTINGS, allocation=dict(reversed(allocation.items())))


def test_layers_count_only_with_the_measurements_that_they_were_pruned_by(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, settings = PruneDirectory(tmp_path / "run"), {**SETTINGS, "weighting": "fisher"}
    solved: list[int] = []

    def prune(**more: Any) -> list[int]:
        solved.clear()
        fp.prune(dense, run.folder, **settings, **more, inspect=lambda layer, *_: solved.append(layer))
        return sorted(set(solved))

    assert prune() == [0, 1]
    for damaged in (run.metrics_file.read_bytes()[:-4] + b"0000", b""):
        run.metrics_file.write_bytes(damaged)
        run.report_file.unlink()
        assert prune() == []  # the same was measured again
    run.metrics_file.unlink()
    run.report_file.unlink()
    write = PruneDirectory.write_metrics

    def write_others(self: PruneDirectory, metrics: Any, importance: dict[str, Tensor], *rest: Any) -> None:
        write(self, metrics, {name: 2 * rows for name, rows in importance.items()}, *rest)

    monkeypatch.setattr(PruneDirectory, "write_metrics", write_others)
    assert prune() == [0, 1]


def test_layers_count_only_with_the_sparsities_that_they_were_pruned_to(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are measured again with the lost tokens, and nothing else of the measurements is stored."""
    run, settings = PruneDirectory(tmp_path / "run"), {**SETTINGS, "allocation": "owl"}
    fp.prune(dense, run.folder, **settings)
    assert not run.metrics_file.exists()
    solved: list[int] = []

    def prune() -> list[int]:
        solved.clear()
        run.calibration_file.unlink()
        run.report_file.unlink()
        fp.prune(dense, run.folder, **settings, inspect=lambda layer, *_: solved.append(layer))
        return sorted(set(solved))

    assert prune() == []  # the same was measured again

    def decide_otherwise(*arguments: Any, **keywords: Any) -> Decision:
        found = decide(*arguments, **keywords)
        assert found.sparsity is not None
        return replace(found, sparsity=dict.fromkeys(found.sparsity, parse_sparsity("40%")))

    monkeypatch.setattr("fistapruner.pipeline.dense_measurements.decide", decide_otherwise)
    assert prune() == [0, 1]


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
    first = PruneDirectory(tmp_path / "run").tokens()
    text.write_text(TEXT[::-1] * 20)
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    assert "own, generated is not the text that it was calibrated on" in capsys.readouterr().err
    again = PruneDirectory(tmp_path / "run").tokens()
    assert not torch.equal(again, first)
    assert main([*command, "--out", str(tmp_path / "new")]) == 0
    assert torch.equal(PruneDirectory(tmp_path / "new").tokens(), again)
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


def test_a_run_that_another_process_finishes_meanwhile_keeps_its_evaluation(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, others = tmp_path / "run", [{"evaluate": "python", "evaluate_windows": 1}]
    tiny.begin(dense, run, **SETTINGS)

    @contextmanager
    def late(folder: Path) -> Iterator[None]:
        while others:
            fp.prune(dense, run, **others.pop(), **SETTINGS)
        with hold(folder):
            yield

    monkeypatch.setattr("fistapruner.pipeline.prune.hold", late)
    assert len(fp.prune(dense, run, **SETTINGS).evaluations) == len(load_run(run).evaluations) == 1


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


def test_a_run_that_is_made_again_has_its_own_time_only(dense: Path, tmp_path: Path) -> None:
    run, text = tmp_path / "run", tmp_path / "text.txt"
    calibration = {"source": str(text), "samples": 2, "seqlen": 16}

    def seconds(words: str) -> float:
        """Of a run that processes before it have worked on for 1000 s."""
        text.write_text(words * 20)
        if run.exists():
            (run / "times.json").write_text("[500.0, 500.0]")
        report = fp.prune(dense, run, method="magnitude", calibration=calibration)
        assert report.totals.seconds is not None
        return report.totals.seconds

    assert seconds(TEXT) < 1000
    (run / "report.json").unlink()
    assert 1000 < seconds(TEXT) < 1100
    assert seconds("it was the epoch of belief, it was the epoch of incredulity. ") < 1000

"""The run directory: nothing of others is removed, damage is mended, another run is refused, the same one goes on."""

import json
import re
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fistapruner as fp
import tiny
from fistapruner.measure.speed import Variant, load_variant
from fistapruner.runs.directory import PruneDirectory
from fistapruner.runs.records import load_run

SETTINGS: dict[str, Any] = {"method": "magnitude", "calibration": {"source": "python", "samples": 2, "seqlen": 16}}
MEASURED: dict[str, Any] = {**SETTINGS, "evaluate": "python", "evaluate_windows": 2}
TEXT = "it was the best of times, it was the worst of times, it was the age of wisdom. "


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model of several shards."""
    return tiny.save("llama", tmp_path_factory.mktemp("dense") / "model", shard="60KB", num_hidden_layers=2)


@pytest.fixture(scope="module")
def finished(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in what was an empty folder, to be copied."""
    out = tmp_path_factory.mktemp("finished") / "run"
    out.mkdir()
    assert fp.prune(dense, out, **MEASURED).status == "finished"
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
        "layers/ model/thesis.tex",
        "layers/0000.json",
        "layers/ model.partial/notes.txt",
        "report.json",
        "layers/ recipe.yaml",
    ],
)
def test_a_folder_that_is_no_run_is_refused_and_kept(dense: Path, tmp_path: Path, names: str) -> None:
    """So is a model inside it that is to be pruned."""
    out = tmp_path / "project"
    for name in names.split():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).mkdir() if name.endswith("/") else (out / name).write_text("years of work")
    source = shutil.copytree(dense, out / "source")
    before = contents(out)
    for model, folder in ((dense, out), (source, out), (source, source)):
        with pytest.raises(fp.FistaPrunerError, match="other things in it"):
            fp.prune(model, folder, **SETTINGS)
    assert contents(out) == before


def test_an_output_that_is_the_input_is_refused_and_kept(run: Path, finished: Path) -> None:
    """Whatever settings its run has: to remove it, as for other settings, would remove the input."""
    before = contents(run)
    for model, verb in product((run, run / "model"), (fp.prune, fp.recover)):
        with pytest.raises(fp.FistaPrunerError, match=r"holds the model .* itself: name a folder outside of it"):
            verb(model, run)
    with pytest.raises(fp.FistaPrunerError, match=r"holds a run of 'fistapruner prune', not of recover"):
        fp.recover(finished, run)
    assert contents(run) == before


def test_a_folder_of_others_in_the_place_of_the_checkpoint_is_kept(dense: Path, tmp_path: Path) -> None:
    tiny.begin(dense, tmp_path / "run", **SETTINGS)
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "model" / "notes.txt").write_text("years of work")
    with pytest.raises(fp.FistaPrunerError, match=r"run/model exists already: remove it"):
        fp.resume(tmp_path / "run")
    assert contents(tmp_path / "run" / "model") == {"notes.txt": b"years of work"}


def test_a_folder_of_others_beside_a_new_one_is_kept(dense: Path, run: Path, tmp_path: Path) -> None:
    source = (run / "model").rename(tmp_path / "out.partial")
    tiny.begin(dense, run := tmp_path / "begun", **SETTINGS)
    fp.pack(source, tmp_path / "packed", values="bf16")
    for folder in (tmp_path / "back.partial", run / "model.partial"):
        folder.mkdir()
        (folder / "thesis.tex").write_text("years of work")
    before = contents(tmp_path)
    fp.pack(source, tmp_path / "out", values="bf16")
    fp.unpack(tmp_path / "packed", tmp_path / "back")
    fp.resume(run)
    after = contents(tmp_path)
    assert all(after[name] == data for name, data in before.items() if ".partial" in name)


@pytest.mark.parametrize(
    "name", ["model", "config.json", "fistapruner.json", "model.safetensors.index.json", "model-*"]
)
def test_a_finished_checkpoint_that_is_damaged_is_not_measured(run: Path, name: str, cli: tiny.Cli) -> None:
    """The file is named, and the report stays."""
    path = run / "model" if name == "model" else next((run / "model").glob(name))
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = load_run(run)
    for verb in ("bench", "resume") if name == "model" else ("bench",):
        assert str(path) in cli(verb, run, status=2).err
    assert load_run(run) == before


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


@pytest.mark.parametrize("executor", ["serial", pytest.param("process", marks=pytest.mark.slow)])
def test_code_runs_only_where_this_command_allows_it(
    tmp_path: Path, executor: str, monkeypatch: pytest.MonkeyPatch, cli: tiny.Cli
) -> None:
    """And goes with the pruned checkpoint, which is pruned, resumed, evaluated and loaded with it."""
    trace, out = tmp_path / "trace", str(tmp_path / "run")
    monkeypatch.setenv("TRACE", str(trace))
    model = own_code(tiny.save("llama", tmp_path / f"model_{executor}"))  # two layers are left for two workers
    execution = {"executor": executor, "threads": 1, "workers": 2 if executor == "process" else None}
    tiny.begin(model, out, **SETTINGS, propagate="dense", execution=execution, trust_remote_code=True)
    assert trace.exists()
    (tmp_path / "text.txt").write_text(TEXT * 4)
    evaluation = ["evaluate", out, "--data", str(tmp_path / "text.txt"), "--seqlen", "16"]
    for command in (["resume", out], evaluation):
        trace.unlink(missing_ok=True)
        assert "--trust-remote-code" in cli(*command, "--quiet", status=2).err
        assert not trace.exists()
        cli(*command, "--trust-remote-code", "--quiet")
    trace.unlink(missing_ok=True)
    cli("resume", out, "--quiet")  # finished: there is nothing to run
    with pytest.raises(fp.FistaPrunerError, match="needs Python code of its own"):
        load_variant(Variant("dense", Path(out) / "model"))
    fp.pack(Path(out) / "model", tmp_path / "packed", values="bf16")
    for folder in (out, tmp_path / "packed"):
        assert "needs Python code of its own" in cli("bench", folder, status=2).err
    monkeypatch.setattr("builtins.input", lambda _: "y")  # transformers may ask whether to run it
    with pytest.raises(fp.FistaPrunerError, match=r"of its own: .* load it with .*packed', trust_remote_code=True\)"):
        fp.load(tmp_path / "packed")
    with pytest.raises(fp.FistaPrunerError, match="is not exported, only llama, mistral"):
        fp.export(Path(out) / "model", tmp_path / "out.gguf")
    assert not trace.exists()


def test_pickles_are_read_only_where_this_command_allows_it(tmp_path: Path, cli: tiny.Cli) -> None:
    folder, out = tiny.save("llama", tmp_path / "model", num_hidden_layers=2), str(tmp_path / "run")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    tiny.begin(folder, out, allow_pickle=True, **SETTINGS)
    assert "--allow-pickle" in cli("resume", out, "--quiet", status=2).err
    cli("resume", out, "--allow-pickle", "--quiet")


def test_a_run_goes_on_from_another_folder_and_is_the_same_under_any_spelling(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its tokens have to be drawn again."""
    (tmp_path / "text.txt").write_text(TEXT * 20)
    monkeypatch.chdir(tmp_path)
    settings = {**SETTINGS, "calibration": {**SETTINGS["calibration"], "source": "text.txt"}}
    tiny.begin(dense, "run", evaluate="text.txt", **settings)
    (tmp_path / "run" / "calibration.safetensors").unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    report = fp.resume(tmp_path / "run")
    assert report.status == "finished"
    before = (tmp_path / "run" / "model" / "config.json").stat().st_mtime_ns
    for source in ("../text.txt", str(tmp_path / "." / "elsewhere" / ".." / "text.txt")):
        settings["calibration"]["source"] = source
        assert fp.prune(dense, tmp_path / "run", **settings).evaluations == report.evaluations
    assert (tmp_path / "run" / "model" / "config.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("other", ["seed", "model", "text", "tokens", "torch", "order of an allocation"])
def test_anything_else_is_another_run(dense: Path, tmp_path: Path, other: str) -> None:
    """The same settings, model files, texts and versions go on; what differs is named, and the folder stays."""
    model, text, out = Path(shutil.copytree(dense, tmp_path / "model")), tmp_path / "text.txt", tmp_path / "run"
    text.write_text(TEXT * 20)
    settings: dict[str, Any] = {**SETTINGS, "calibration": {**SETTINGS["calibration"], "source": str(text)}}
    settings["allocation"] = {"down_proj": "40%", r"re:layers\.0\.": "30%"}
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
    elif other == "torch":
        record = run.begun_record()
        record.versions["torch"] = "1.0"
        run.write_record(record)
        said = r"torch 1\.0 \(now "
    else:
        settings["allocation"] = dict(reversed(settings["allocation"].items()))
        said = r"allocation = \[.*\], this one has \["
    before = {name: data for name, data in contents(out).items() if name not in ("log.txt", "times.json")}
    with pytest.raises(fp.FistaPrunerError, match=rf"^--out {out} holds a run .*{said}.*name another folder"):
        fp.prune(model, out, **settings)
    after = contents(out)
    assert all(after[name] == data for name, data in before.items())


def test_the_same_files_at_another_place_are_the_model_of_the_run(dense: Path, tmp_path: Path) -> None:
    model, elsewhere, run = Path(shutil.copytree(dense, tmp_path / "a")), tmp_path / "b", tmp_path / "run"
    tiny.begin(model, run, **SETTINGS)
    solved: list[int] = []
    model.rename(elsewhere)
    with pytest.raises(fp.FistaPrunerError, match=re.escape(str(model))):
        fp.resume(run)
    report = fp.prune(elsewhere, run, **SETTINGS, inspect=lambda layer, *_: solved.append(layer))
    assert (report.status, set(solved)) == ("finished", {1})
    (tmp_path / "alias").symlink_to(elsewhere)
    for name in (tmp_path / "alias", elsewhere / ".." / "b"):
        told = tiny.Said()
        fp.prune(name, run, listener=told, **SETTINGS)
        assert f"{run} holds the finished run of this recipe" in told.sentences
    shutil.rmtree(elsewhere)
    assert fp.resume(run).status == "finished"  # which needs no model any more


@pytest.mark.parametrize("damaged", ["calibration", "metrics"])
def test_what_was_measured_is_measured_again_where_its_file_is_damaged(
    dense: Path, tmp_path: Path, damaged: str
) -> None:
    """To the same bits: no layer is pruned again."""
    run, settings = PruneDirectory(tmp_path / "run"), {**SETTINGS, "weighting": "fisher"}
    solved: list[int] = []

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    fp.prune(dense, tmp_path / "whole", **settings)
    tiny.begin(dense, run.folder, layers=1, **settings)
    before = contents(run.folder)
    path = run.folder / f"{damaged}.safetensors"
    for data in (before[path.name][:-4] + b"0000", b""):
        path.write_bytes(data)
        with pytest.raises(KeyboardInterrupt):
            fp.prune(dense, run.folder, **settings, inspect=stop)
        assert path.read_bytes() == before[path.name]
    fp.prune(dense, run.folder, **settings, inspect=lambda layer, *_: solved.append(layer))
    assert set(solved) == {1}
    assert tiny.weights(run.folder) == tiny.weights(tmp_path / "whole")


def test_a_run_whose_evaluation_text_is_gone_goes_on_without_it(dense: Path, tmp_path: Path) -> None:
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(TEXT * 20)
    tiny.begin(dense, run, evaluate=text, layers=2, **SETTINGS)
    text.unlink()
    with pytest.raises(fp.FistaPrunerError, match=r"data '.*text\.txt' is neither"):
        fp.resume(run)
    assert not (run / "model").exists()
    assert fp.prune(dense, run, **SETTINGS).status == "finished"  # as the command with --evaluate none


def test_several_calibration_texts_are_known_by_name_and_content(dense: Path, tmp_path: Path, cli: tiny.Cli) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 20)
    command = ["prune", dense, "--calibration", f"own={text}", "--calibration", "generated=self", "--samples", "3"]
    command += ["--seqlen", "16", "--method", "wanda", "--evaluate", "none", "--out", tmp_path / "run"]
    cli(*command)
    calibration = load_run(tmp_path / "run").calibration
    assert sorted(task.samples for task in calibration.tasks.values()) == [1, 2]
    assert calibration.tasks["own"].source == str(text)
    assert "holds the finished run" in cli(*command).err
    text.write_text(TEXT[::-1] * 20)
    assert "holds a run for another content of own, generated" in cli(*command, status=2).err
    text.unlink()  # nobody can tell
    cli("resume", tmp_path / "run")


def test_a_run_without_its_record_cannot_be_resumed(dense: Path, run: Path, tmp_path: Path) -> None:
    (run / "run.json").unlink()
    with pytest.raises(fp.FistaPrunerError, match=r"it has no run\.json\): give its command again"):
        fp.resume(run)
    with pytest.raises(fp.FistaPrunerError, match="name a new folder"):
        fp.prune(dense, run, **SETTINGS)
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (stopped / "log.txt").touch()
    with pytest.raises(fp.FistaPrunerError, match=r"it has no run\.json\): give its command again"):
        fp.resume(stopped)
    assert fp.prune(dense, stopped, **SETTINGS).status == "finished"


def shares(said: tiny.Said) -> list[float]:
    """How much text had been written when a run began to write a part."""
    return [float(found[1]) for each in said.sentences if (found := re.match(r"generating text: ([\d.]+) of", each))]


def test_text_that_the_model_writes_is_kept_when_it_is_whole(dense: Path, tmp_path: Path) -> None:
    """A run that is stopped before its first layer ends with the same tokens and weights."""
    settings = {**SETTINGS, "weighting": "fisher", "calibration": {"source": "self", "samples": 40, "seqlen": 8}}
    for words in ("generating text: 32", "measuring"):  # in the second batch, of 32 and 8 texts
        stops = tiny.StopsAt(words)
        with pytest.raises(KeyboardInterrupt, match=r"^interrupted; give the command again$"):
            fp.prune(dense, tmp_path / "run", listener=stops, **settings)
    assert min(shares(stops)) < 32  # the first batch was written again
    assert not (tmp_path / "run" / "run.json").exists()
    after, whole = tiny.Said(), tiny.Said()
    fp.prune(dense, tmp_path / "run", listener=after, **settings)
    fp.prune(dense, tmp_path / "new", listener=whole, **settings)
    assert not shares(after)
    assert min(shares(whole)) < 32
    assert torch.equal(PruneDirectory(tmp_path / "new").tokens(), PruneDirectory(tmp_path / "run").tokens())
    assert tiny.weights(tmp_path / "new") == tiny.weights(tmp_path / "run")


def test_a_run_goes_on_without_its_device(dense: Path, run: Path) -> None:
    """By a command that names another."""
    record = PruneDirectory(run).begun_record()
    record.recipe["execution"]["device"] = "cuda:99"
    PruneDirectory(run).write_record(record)
    shutil.rmtree(run / "model")
    (run / "report.json").unlink()
    with pytest.raises(fp.FistaPrunerError, match="device 'cuda:99'"):
        fp.resume(run)
    assert fp.prune(dense, run, **MEASURED, execution={"device": "cpu"}).evaluations

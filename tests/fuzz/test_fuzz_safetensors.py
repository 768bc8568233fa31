"""Damaged safetensors files and indexes: a clean error, or exactly what the reference library reads."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from damage import damaged, damaged_json, damaged_json_text, fuzz
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file

from fistapruner import FistaPrunerError
from fistapruner.models.checkpoint import Checkpoint
from fistapruner.models.safetensors import SafetensorsFile

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "a.bias": torch.arange(3, dtype=torch.bfloat16),
    "b": torch.arange(6, dtype=torch.int64).view(1, 2, 3),
    "c": torch.tensor([True, False]),
    "empty": torch.empty(0, 5),
}
WHOLE = safetensors.torch.save(TENSORS, metadata={"format": "pt"})
HEADER = json.loads(WHOLE[8 : 8 + struct.unpack("<Q", WHOLE[:8])[0]])
DATA = WHOLE[8 + struct.unpack("<Q", WHOLE[:8])[0] :]


def _with_header(header: Any) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + DATA


@fuzz
@given(
    damaged(WHOLE)
    | damaged(WHOLE, upto=len(WHOLE) - len(DATA))
    | damaged_json(HEADER).map(_with_header)
    | st.binary(max_size=64)
)
def test_damaged_file(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(data)
    try:
        file = SafetensorsFile(path)
        tensors = {name: file.read(name) for name in file.entries}
    except FistaPrunerError as error:
        assert str(path) in str(error)  # noqa: PT017
        assert len(str(error)) < 2000  # noqa: PT017
        return
    try:
        expected = safetensors.torch.load(data)
    except SafetensorError as error:
        pytest.fail(f"accepted what the reference library refuses: {error}")
    except (KeyError, AttributeError, RuntimeError, TypeError, ValueError, AssertionError):
        return  # a dtype that the library's torch side does not know
    assert set(tensors) == set(expected)
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype
        assert tensor.shape == expected[name].shape
        if tensor.numel() and tensor.dtype != torch.bool:
            assert torch.equal(tensor.reshape(-1).view(torch.uint8), expected[name].reshape(-1).view(torch.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "config.json").write_text("{}")
    save_file({"a.weight": TENSORS["a.weight"], "c": TENSORS["c"]}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": TENSORS["b"]}, folder / "model-00002-of-00002.safetensors")
    save_file({"secret": TENSORS["b"]}, folder.parent / "outside.safetensors")
    return folder


INDEX = {
    "metadata": {"total_size": 98},
    "weight_map": {
        "a.weight": "model-00001-of-00002.safetensors",
        "c": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
    },
}


@fuzz
@given(
    damaged_json_text(INDEX)
    | st.text(max_size=40).map(lambda name: json.dumps({"weight_map": {"secret": name}}).encode())
)
def test_damaged_index(folder: Path, index: bytes) -> None:
    (folder / "model.safetensors.index.json").write_bytes(index)
    try:
        checkpoint = Checkpoint.open(folder)
    except FistaPrunerError as error:
        assert str(folder) in str(error)  # noqa: PT017
        return
    for name in checkpoint.names():
        assert name in TENSORS
        assert torch.equal(checkpoint.read(name), TENSORS[name])
    assert all((folder / name).is_file() and "/" not in name for name in checkpoint.files)

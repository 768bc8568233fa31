"""Damaged packed folders: a clean error or a correct read, never a crash.

The checksums are switched off, as a hostile author would make them fit; what remains must hold by the format's own
rules.
"""

import json
import struct
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruned import save_pruned

from fistapruner import FistaPrunerError, SparseLinear, pack
from fistapruner.packed.checkpoint import PackedCheckpoint
from fuzz.damage import EXAMPLES, damaged, damaged_json, fuzz


def read_everything(folder):
    packed = PackedCheckpoint(folder, verify=False)
    for name in packed.specs:
        operator = packed.operator(name)
        assert operator.to_dense().shape == operator.shape
        out = SparseLinear(operator)(torch.ones(1, operator.shape[1]))
        assert out.shape == (1, operator.shape[0])
    for name in packed.names():
        packed.tensor(name)


@pytest.fixture(scope="module", params=[("same", "50%"), ("int8", "2:4")], ids=str)
def whole(request, tmp_path_factory):
    """A packed folder and the bytes of its weight file."""
    values, sparsity = request.param
    folder = tmp_path_factory.mktemp("damaged")
    pack(save_pruned(folder / "m", num_hidden_layers=1, sparsity=sparsity), folder / "p", values=values)
    read_everything(folder / "p")
    return folder / "p", (folder / "p" / "model.safetensors").read_bytes()


@settings(fuzz, max_examples=max(EXAMPLES // 4, 1))
@given(st.data())
def test_damaged_files(whole, data):
    """In any byte, in the header, in what it claims of the operators."""
    folder, content = whole
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:end])

    def claiming(claim):
        text = json.dumps({**header, "__metadata__": {"format": "pt", "fistapruner": json.dumps(claim)}}).encode()
        return struct.pack("<Q", len(text)) + text + content[end:]

    claims = damaged_json(json.loads(header["__metadata__"]["fistapruner"])).map(claiming)
    found = data.draw(damaged(content) | damaged(content, upto=end) | claims)
    (folder / "model.safetensors").write_bytes(found)
    about = json.loads((folder / "packed.json").read_text())
    about["files"]["model.safetensors"]["bytes"] = len(found)
    (folder / "packed.json").write_text(json.dumps(about))
    with suppress(FistaPrunerError):
        read_everything(folder)


def test_a_truncated_file_is_refused(whole):
    folder, content = whole
    about = json.loads((folder / "packed.json").read_text())
    for length in (0, 7, 100, len(content) // 2, len(content) - 1):
        (folder / "model.safetensors").write_bytes(content[:length])
        about["files"]["model.safetensors"]["bytes"] = length
        (folder / "packed.json").write_text(json.dumps(about))
        with pytest.raises(FistaPrunerError):
            read_everything(folder)


def test_damaged_records(tmp_path):
    pack(save_pruned(tmp_path / "m", num_hidden_layers=1), tmp_path / "p")
    for text in (
        "",
        "[]",
        "{}",
        "null",
        '{"format": 1}',
        '{"format": "fistapruner-packed", "version": true}',
        "{" * 2000,
    ):
        (tmp_path / "p" / "packed.json").write_text(text)
        with pytest.raises(FistaPrunerError):
            PackedCheckpoint(tmp_path / "p")

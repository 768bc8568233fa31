"""Damaged packed folders: a clean error or a correct read, never a crash, and never a wrong tensor unnoticed.

The checksums are switched off, as a hostile author would make them fit; what remains must hold by the format's own
rules. ``FISTAPRUNER_FUZZ`` sets the number of mutations.
"""

from __future__ import annotations

import json
import os
import random
import struct

import pytest
import torch
from pruned import save_pruned

from fistapruner import FistaPrunerError, SparseLinear, pack
from fistapruner.packed.checkpoint import PackedCheckpoint

MUTATIONS = int(os.environ.get("FISTAPRUNER_FUZZ", "300"))


def read_everything(folder):
    packed = PackedCheckpoint(folder, verify=False)
    for name in packed.specs:
        operator = packed.operator(name)
        dense = operator.to_dense()
        assert dense.shape == operator.shape
        out = SparseLinear(operator)(torch.ones(1, operator.shape[1]))
        assert out.shape == (1, operator.shape[0])
    for name in packed.names():
        packed.tensor(name)


def mutate(data: bytearray, header_end: int, rng: random.Random) -> bytearray:
    kind = rng.randrange(7)
    place = rng.randrange(8, header_end) if rng.random() < 0.5 else rng.randrange(header_end, len(data))
    if kind == 0:
        data[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[place] = rng.randrange(256)
    elif kind == 2:
        width = rng.choice([2, 4, 8])
        data[place : place + width] = rng.choice([b"\x00", b"\xff", b"\x80", b"9"]) * width
    elif kind == 3:
        del data[place : place + rng.randrange(1, 40)]
    elif kind == 4:
        data[place:place] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 20)))
    elif kind == 5:
        data[:8] = struct.pack("<Q", rng.choice([0, 1, header_end, 2**31, 2**63, len(data)]))
    else:
        other = rng.randrange(8, len(data) - 8)
        width = min(rng.randrange(1, 64), len(data) - max(place, other))
        data[place : place + width] = data[other : other + width]
    return data


def mutate_metadata(data: bytearray, rng: random.Random) -> bytearray:
    """Change one value of an operator's description or of a tensor's entry, keeping the JSON valid."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    claim = json.loads(header["__metadata__"]["fistapruner"])
    name = rng.choice(sorted(claim["operators"]))
    spec = claim["operators"][name]
    key = rng.choice(sorted(spec))
    odd = [None, -1, 0, 1, 64, 2**31, 2**70, "", "F16", "BF16", "F32", "I8", [1], [2**40, 2**40], {}]
    if key == "shape" and rng.random() < 0.7:
        spec["shape"][rng.randrange(2)] += rng.choice([-8, -1, 1, 8, 64])
    else:
        spec[key] = rng.choice(odd)
    if rng.random() < 0.2:
        claim["operators"][rng.choice(["x", "", name + ".mask", name + ".values"])] = dict(spec)
    if rng.random() < 0.1:
        claim["version"] = rng.choice(odd)
    header["__metadata__"]["fistapruner"] = json.dumps(claim)
    text = json.dumps(header).encode()
    return bytearray(struct.pack("<Q", len(text)) + text + data[8 + size :])


@pytest.mark.parametrize(("values", "sparsity"), [("same", "50%"), ("int8", "2:4")])
def test_damaged_files(tmp_path, values, sparsity):
    pack(save_pruned(tmp_path / "m", num_hidden_layers=1, sparsity=sparsity), tmp_path / "p", values=values)
    path, record = tmp_path / "p" / "model.safetensors", tmp_path / "p" / "packed.json"
    original, about = path.read_bytes(), json.loads(record.read_text())
    header_end = 8 + struct.unpack("<Q", original[:8])[0]
    rng, refused = random.Random(f"{values} {sparsity}"), 0
    read_everything(tmp_path / "p")
    for turn in range(MUTATIONS // 4):
        data = bytearray(original)
        data = mutate_metadata(data, rng) if turn % 3 == 0 else mutate(data, header_end, rng)
        path.write_bytes(data)
        about["files"]["model.safetensors"]["bytes"] = len(data)
        record.write_text(json.dumps(about))
        try:
            read_everything(tmp_path / "p")
        except FistaPrunerError:
            refused += 1
    assert refused > MUTATIONS // 16


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", '{"format": 1}', '{"format": "fistapruner-packed", "version": true}', "{" * 2000]
)
def test_damaged_records(tmp_path, text):
    pack(save_pruned(tmp_path / "m", num_hidden_layers=1), tmp_path / "p")
    (tmp_path / "p" / "packed.json").write_text(text)
    with pytest.raises(FistaPrunerError):
        PackedCheckpoint(tmp_path / "p")

"""Check the header of a GGUF file, which is untrusted data, before any library reads it."""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any

import torch

from ...errors import FistaPrunerError, MissingExtraError, unreadable
from ...runtime.files import refuse_lfs_pointer
from .safetensors import MAX_BYTES, TensorEntry

MAX_KEYS = 100_000
MAX_TENSORS = 1_000_000
MAX_ARRAY = 50_000_000
MAX_STRING = 2**26

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class _Header:
    """A cursor over a mapped GGUF header; every step is checked against the file's length."""

    def __init__(self, path: Path, data: mmap.mmap | bytes) -> None:
        self.path, self.data, self.at = path, data, 0

    def fault(self, what: str) -> FistaPrunerError:
        return FistaPrunerError(f"{self.path} {what}")

    def skip(self, count: int) -> None:
        if count > len(self.data) - self.at:
            raise self.fault(f"is truncated: its header goes on beyond the file's {len(self.data)} bytes")
        self.at += count

    def number(self, kind: str) -> Any:
        start = self.at
        self.skip(struct.calcsize("<" + kind))
        return struct.unpack_from("<" + kind, self.data, start)[0]

    def string(self) -> str:
        size = self.number("Q")
        if size > MAX_STRING:
            raise self.fault(f"is damaged: it claims a string of {size} bytes")
        start = self.at
        self.skip(size)
        try:
            return self.data[start : self.at].decode("utf-8")
        except UnicodeDecodeError:
            raise self.fault("is damaged: a string in its header is not UTF-8") from None

    def value(self, kind: int, key: str) -> Any:
        """Step over a value; return it if it is a scalar or a string."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.fault(f"is damaged: key {key!r} has the unknown type {kind}")
        item, count = self.number("I"), self.number("Q")
        if count > MAX_ARRAY:
            raise self.fault(f"is damaged: key {key!r} claims {count} values")
        if item in _SCALARS:
            self.skip(count * struct.calcsize("<" + _SCALARS[item]))
        elif item == _STRING:
            for _ in range(count):
                self.string()
        else:
            raise self.fault(f"is damaged: key {key!r} is an array of the unknown type {item}")
        return None


def check_gguf(path: Path) -> dict[str, TensorEntry]:
    """Walk the header of a GGUF file and check that it fits the file.

    Returns:
        Name to entry of every tensor; shapes as PyTorch orders them, ``dtype`` uint8 because the data are packed.

    Raises:
        FistaPrunerError: names the file and the fault: not GGUF, another version or byte order, one part of several,
            absurd counts, a name twice, unknown tensor types, tensors that reach beyond the file.
        MissingExtraError: the ``gguf`` package is missing.
    """
    sizes = _type_sizes()
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                refuse_lfs_pointer(path)
                raise FistaPrunerError(f"{path} is not a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _walk(_Header(path, data), sizes)
    except OSError as error:
        raise unreadable(path, error) from None


def _walk(header: _Header, sizes: dict[int, tuple[int, int]]) -> dict[str, TensorEntry]:
    header.skip(4)
    version = header.number("I")
    if version not in (2, 3):
        raise header.fault(f"is GGUF version {version}, only the little-endian versions 2 and 3 are read")
    tensors, keys = header.number("Q"), header.number("Q")
    # The smallest key takes 13 bytes, the smallest tensor 24: a count the file cannot hold is refused at once.
    if keys > min(MAX_KEYS, len(header.data) // 13) or tensors > min(MAX_TENSORS, len(header.data) // 24):
        raise header.fault(f"is damaged: it claims {keys} keys and {tensors} tensors in {len(header.data)} bytes")
    fields: dict[str, Any] = {}
    for _ in range(keys):
        key = header.string()
        if key in fields:
            raise header.fault(f"is damaged: key {key!r} appears twice")
        fields[key] = header.value(header.number("I"), key)
    parts = fields.get("split.count", 1)
    if type(parts) is int and parts > 1:
        number = fields.get("split.no")
        part = f"part {number + 1} of {parts}" if type(number) is int else f"one of {parts} parts"
        raise header.fault(f"is {part}: join them with 'llama-gguf-split --merge FIRST-PART JOINED.gguf'")
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
        raise header.fault(f"is damaged: alignment {alignment!r} is not a power of two")
    for key, value in fields.items():
        # The architecture is built from this count before any tensor is looked for.
        if key.endswith(".block_count") and not (type(value) is int and 0 < value <= tensors):
            raise header.fault(f"is damaged: {key} is {value!r}, and it has {tensors} tensors")
    entries: dict[str, TensorEntry] = {}
    ends: list[tuple[int, str]] = []
    for _ in range(tensors):
        name = header.string()
        if name in entries or not name.isprintable():
            raise header.fault(f"is damaged: tensor name {name[:100]!r} appears twice or is not a name")
        dimensions = header.number("I")
        if not 1 <= dimensions <= 4:
            raise header.fault(f"is damaged: tensor {name!r} has {dimensions} dimensions")
        shape = tuple(header.number("Q") for _ in range(dimensions))[::-1]
        kind, offset = header.number("I"), header.number("Q")
        if kind not in sizes:
            raise header.fault(f"stores tensor {name!r} in the unknown type {kind}: a newer gguf package may read it")
        block, block_bytes = sizes[kind]
        elements = math.prod(shape)
        if not 0 < elements <= MAX_BYTES or shape[-1] % block or offset % alignment:
            raise header.fault(
                f"is damaged: tensor {name!r} of shape {list(shape)} at offset {offset} does not fit its type"
            )
        entries[name] = TensorEntry(name, torch.uint8, shape, elements // block * block_bytes)
        ends.append((offset + entries[name].nbytes, name))
    start = -(-header.at // alignment) * alignment
    for end, name in ends:
        if start + end > len(header.data):
            raise header.fault(f"is truncated: tensor {name!r} ends at byte {start + end} of {len(header.data)}")
    return entries


def _type_sizes() -> dict[int, tuple[int, int]]:
    """Map every type number to the (elements, bytes) of a block."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError:
        raise MissingExtraError("gguf", "gguf", "reading a GGUF file") from None
    return {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}

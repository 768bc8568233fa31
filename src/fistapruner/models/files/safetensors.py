"""The safetensors format, read strictly and written tensor by tensor.

A file is 8 bytes (little-endian length of the header), the header (JSON: tensor name to ``dtype``, ``shape`` and
``data_offsets``, plus an optional ``__metadata__`` of strings), then the bytes of all tensors, without holes. A
checkpoint is untrusted data, so everything the header claims is checked against the file's real length before a single
tensor is allocated; then each tensor is read alone, so that memory never holds more than the one asked for.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from ...errors import FistaPrunerError
from ...runtime.files import atomic_file, require_space, write_all

MAX_HEADER = 100_000_000  # the format's own limit on the header's bytes
MAX_DIMENSIONS = 32
MAX_BYTES = 2**62  # far above any file, far below what an int64 offset can hold

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """What a checkpoint says of one tensor, without its values.

    Args:
        name: the tensor's name in the checkpoint.
        dtype: stored precision.
        shape: stored shape.
        nbytes: stored bytes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, name: str, dtype: torch.dtype, shape: Iterable[int]) -> Self:
        """The entry of a tensor with this dtype and shape; its bytes follow."""
        sizes = tuple(shape)
        return cls(name, dtype, sizes, math.prod(sizes) * dtype.itemsize)


class SafetensorsFile:
    """One safetensors file: its header in memory, its tensors on disk until they are asked for.

    Holds no open file, so it can be pickled and used from several processes.

    Args:
        path: the file.

    Attributes:
        path: the file.
        entries: name to :class:`TensorEntry`, in the header's order.
        metadata: the header's ``__metadata__``, empty where there is none.

    Raises:
        FistaPrunerError: names the file and what is wrong with it: missing, truncated, a header that is not what the
            format asks for, tensors that overlap, leave holes or reach beyond the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                length = os.fstat(file.fileno()).st_size
                header = _read_header(file.read, length, self._fault)
        except OSError as error:
            raise FistaPrunerError(f"cannot read {self.path}: {error.strerror or error}") from None
        self._start = 8 + header[1]
        self.metadata, self.entries, self._offsets = _check_header(header[0], length - self._start, self._fault)

    def read(self, name: str) -> Tensor:
        """Read one tensor into fresh memory.

        Raises:
            FistaPrunerError: no tensor of that name, or the file was shortened since it was opened.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise FistaPrunerError(f"{self.path} has no tensor {name!r}")
        buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
        view = buffer.numpy().data
        offset = self._start + self._offsets[name]
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(offset)
                while view:
                    count = file.readinto(view[: 2**30])
                    if not count:
                        raise self._fault(f"ends within tensor {name!r}: it is truncated")
                    view = view[count:]
        except OSError as error:
            raise FistaPrunerError(f"cannot read {self.path}: {error.strerror or error}") from None
        if entry.dtype is torch.bool:
            return (buffer != 0).view(entry.shape)
        return buffer.view(entry.dtype).view(entry.shape)

    def _fault(self, what: str) -> FistaPrunerError:
        return FistaPrunerError(f"{self.path} {what}")


class SafetensorsWriter:
    """Write a safetensors file tensor by tensor; the file appears only when all of them are there.

    Use it as a context manager. Tensors may be written in any order; memory holds one at a time. When the block raises,
    or the disk is full, nothing is left behind.

    Args:
        path: the file to make.
        entries: the tensors to come. The header lists them in this order; their bytes are laid out by falling item
            size, so that every tensor is aligned.
        metadata: strings for ``__metadata__``; ``{"format": "pt"}`` is what transformers expects.

    Raises:
        FistaPrunerError: the disk is full, a tensor differs from its entry, or some were never written.
    """

    def __init__(self, path: str | Path, entries: Iterable[TensorEntry], metadata: Mapping[str, str] | None = None) -> None:
        self.path = Path(path)
        self.entries = {entry.name: entry for entry in entries}
        offsets, end = {}, 0
        for entry in sorted(self.entries.values(), key=lambda entry: -entry.dtype.itemsize):
            offsets[entry.name] = end
            end += entry.nbytes
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        for name, entry in self.entries.items():
            start = offsets[name]
            header[name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, start + entry.nbytes]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._header = struct.pack("<Q", len(text)) + text
        self._offsets = {name: len(self._header) + offset for name, offset in offsets.items()}
        self.nbytes = len(self._header) + end
        self._missing = set(self.entries)
        self._file = atomic_file(self.path)
        self._descriptor = -1

    def __enter__(self) -> Self:
        require_space(self.path, self.nbytes)
        self._descriptor = self._file.__enter__()
        try:
            write_all(self._descriptor, self._header, 0)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, from any device, exactly as its entry says.

        Raises:
            FistaPrunerError: the name, dtype or shape is not what the entries promised.
        """
        entry = self.entries.get(name)
        if entry is None or tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
            promised = "nothing of that name" if entry is None else f"{entry.dtype} {list(entry.shape)}"
            raise FistaPrunerError(f"{self.path}: tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, the header promises {promised}")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        write_all(self._descriptor, data.numpy().data, self._offsets[name])
        self._missing.discard(name)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None and self._missing:
            error = FistaPrunerError(f"{self.path}: tensor {min(self._missing)!r} was never written")
            self._file.__exit__(type(error), error, None)
            raise error
        self._file.__exit__(kind, error, trace)


def _read_header(read: Any, length: int, fault: Any) -> tuple[dict[str, Any], int]:
    """The header's JSON object and its bytes; every limit is checked before the bytes are read."""
    if length < 8:
        raise fault(f"is not a safetensors file: {length} bytes are too few")
    size = struct.unpack("<Q", read(8))[0]
    if size > MAX_HEADER:
        raise fault(f"claims a header of {size} bytes; at most {MAX_HEADER} are allowed, so it is damaged or not a safetensors file")
    if size > length - 8:
        raise fault(f"is truncated: its header needs {size} bytes and the file has {length - 8}")
    text = read(size)
    if len(text) != size:
        raise fault(f"is truncated: its header needs {size} bytes")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise fault(f"has a header that is not valid JSON: {_short(error)}") from None
    if not isinstance(header, dict):
        raise fault("has a header that is not a JSON object")
    return header, size


def _check_header(header: dict[str, Any], space: int, fault: Any) -> tuple[dict[str, str], dict[str, TensorEntry], dict[str, int]]:
    """Metadata, entries and offsets of a header whose every claim fits ``space`` bytes of data."""
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise fault("has metadata that is not a mapping of strings")
    entries, offsets = {}, {}
    for name, claim in header.items():
        entry, start = _check_tensor(name, claim, fault)
        entries[name], offsets[name] = entry, start
    end = 0
    for name in sorted(offsets, key=lambda name: (offsets[name], entries[name].nbytes)):
        if offsets[name] != end:
            what = "overlaps another one" if offsets[name] < end else "leaves a hole before it"
            raise fault(f"is damaged: tensor {name!r} at offset {offsets[name]} {what} (expected offset {end})")
        end += entries[name].nbytes
        if end > space:
            raise fault(f"is truncated: tensor {name!r} needs {end} bytes of data and the file has {space}")
    if end != space:
        raise fault(f"is damaged: its tensors take {end} bytes of data and the file has {space}")
    return metadata, entries, offsets


def _check_tensor(name: str, claim: Any, fault: Any) -> tuple[TensorEntry, int]:
    label = name if len(name) <= 200 else name[:200] + "…"
    if not name.isprintable():
        raise fault(f"is damaged: {label!r} is not a tensor name")
    if not isinstance(claim, dict) or set(claim) != {"dtype", "shape", "data_offsets"}:
        raise fault(f"is damaged: tensor {label!r} must have dtype, shape and data_offsets")
    dtype = DTYPES.get(claim["dtype"]) if isinstance(claim["dtype"], str) else None
    if dtype is None:
        raise fault(f"stores tensor {label!r} as {str(claim['dtype'])[:40]!r}; known are {', '.join(DTYPES)}")
    shape, span = claim["shape"], claim["data_offsets"]
    if not _sizes(shape) or len(shape) > MAX_DIMENSIONS or math.prod(size for size in shape if size) > MAX_BYTES:
        raise fault(f"is damaged: tensor {label!r} has shape {str(shape)[:80]}, expected at most {MAX_DIMENSIONS} sizes")
    if not _sizes(span) or len(span) != 2 or span[1] < span[0]:
        raise fault(f"is damaged: tensor {label!r} has data_offsets {str(span)[:80]}, expected [begin, end]")
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes != span[1] - span[0]:
        raise fault(f"is damaged: tensor {label!r} of shape {str(shape)[:80]} does not fit its {span[1] - span[0]} bytes")
    return TensorEntry(name, dtype, tuple(shape), nbytes), span[0]


def _sizes(value: Any) -> bool:
    """Whether ``value`` is a list of non-negative integers of sane size (JSON's true is no integer)."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= MAX_BYTES for item in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name appears twice")
    return table


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 120 else text[:120] + "…"

"""Read and write safetensors files tensor by tensor; the reference library checks their headers.

Tensors are read into fresh memory: a memory map would count as the process's, and end it with a bus error where the
file was truncated after it was opened.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import FistaPrunerError, one_line
from ..runtime.files import atomic_file, disk_errors, refuse_lfs_pointer, require_space, write_all

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
"""Stored dtypes by their names in a header."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Name, dtype, shape and bytes of a stored tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, name: str, dtype: torch.dtype, shape: Iterable[int]) -> Self:
        """Make the entry of a tensor with this dtype and shape."""
        sizes = tuple(shape)
        return cls(name, dtype, sizes, math.prod(sizes) * dtype.itemsize)


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each of them made or read when it is asked for."""

    def __init__(self, entries: Mapping[str, TensorEntry], read: Callable[[str], Tensor]) -> None:
        self.entries = entries
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.entries:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class SafetensorsFile:
    """A safetensors file: its header in memory, its tensors on disk until they are read.

    Holds no open file, so it can be pickled and used from several processes. ``entries`` are in the header's order;
    ``metadata`` is the header's ``__metadata__``, empty where there is none.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with disk_errors(self.path, "read"):
                self.metadata, self.entries, self._offsets = _read_header(self.path)
        except (SafetensorError, ValueError, struct.error) as error:
            refuse_lfs_pointer(self.path)
            reason = one_line(error)
            raise FistaPrunerError(f"{self.path} is truncated, damaged or not a safetensors file: {reason}") from None

    def read(self, name: str, number: int | None = None) -> Tensor:
        """Read a tensor, or its matrix ``tensor[number]``, into fresh memory."""
        entry = self.entries.get(name)
        if entry is None:
            raise FistaPrunerError(f"{self.path} has no tensor {name!r}")
        if number is not None:
            entry = TensorEntry.of(name, entry.dtype, entry.shape[1:])
        buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
        view = buffer.numpy().data
        with disk_errors(self.path, "read"), open(self.path, "rb", buffering=0) as file:
            file.seek(self._offsets[name] + (number or 0) * entry.nbytes)
            while view:
                count = file.readinto(view[: 2**30])
                if not count:
                    raise FistaPrunerError(f"{self.path} is truncated: it ends within tensor {entry.name!r}")
                view = view[count:]
        if entry.dtype is torch.bool:
            return (buffer != 0).view(entry.shape)
        return buffer.view(entry.dtype).view(entry.shape)


@contextmanager
def safetensors_writer(
    path: Path, entries: Iterable[TensorEntry], metadata: Mapping[str, str] | None = None
) -> Iterator[Callable[[str, Tensor], None]]:
    """Write a safetensors file tensor by tensor; it appears only when all tensors are written.

    Tensors may be written in any order; memory holds one at a time. When the block raises, or the disk is full, nothing
    is left behind.

    The header lists the entries in their order; their bytes are laid out by falling item size, so that every tensor is
    aligned. The metadata ``{"format": "pt"}`` is what transformers expects. The block is given a function that writes
    the tensor of a name, from any device.
    """
    promised = {entry.name: entry for entry in entries}
    places, end = {}, 0
    for entry in sorted(promised.values(), key=lambda entry: -entry.dtype.itemsize):
        places[entry.name] = end
        end += entry.nbytes
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, entry in promised.items():
        span = [places[name], places[name] + entry.nbytes]
        header[name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start, missing = 8 + len(text), set(promised)
    with atomic_file(path) as descriptor:  # empties the file of a killed attempt, whose space counts as free

        def write(name: str, tensor: Tensor) -> None:
            entry = promised.get(name)
            if entry is None or (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
                wanted = "nothing of that name" if entry is None else f"{entry.dtype} {list(entry.shape)}"
                found = f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)}"
                raise FistaPrunerError(f"{path}: {found}, the header promises {wanted}")
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            write_all(descriptor, data.numpy().data, start + places[name])
            missing.discard(name)

        require_space(path, start + end)
        write_all(descriptor, struct.pack("<Q", len(text)) + text, 0)
        yield write
        if missing:
            raise FistaPrunerError(f"{path}: tensor {min(missing)!r} was never written")


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file, in their order; :class:`LazyTensors` are read once."""
    if isinstance(tensors, LazyTensors):
        entries = list(tensors.entries.values())
    else:
        entries = [TensorEntry.of(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    with safetensors_writer(Path(path), entries, metadata) as write:
        for name, tensor in tensors.items():
            write(name, tensor)


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, TensorEntry], dict[str, int]]:
    """Read a header, which the library checks: metadata, entries, and the offset of each tensor."""
    with safe_open(path, framework="numpy") as checked:
        metadata = checked.metadata() or {}
    with open(path, "rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    for name, claim in header.items():
        if claim["dtype"] not in DTYPES:
            raise ValueError(f"tensor {name!r} is stored as {claim['dtype']}; known are {', '.join(DTYPES)}")
    entries = {name: TensorEntry.of(name, DTYPES[claim["dtype"]], claim["shape"]) for name, claim in header.items()}
    return metadata, entries, {name: 8 + size + claim["data_offsets"][0] for name, claim in header.items()}

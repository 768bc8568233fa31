"""Keep the fp32 tensors of a training run by kind and decoder layer: in memory, or one file each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from ..models.files.safetensors import LazyTensors, SafetensorsFile, TensorEntry, write_tensors
from ..runtime.files import PARTIAL, copy_atomic, disk_errors


class MemoryStates:
    """Tensors by kind, decoder layer and name, in memory on their device."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, int], dict[str, Tensor]] = {}

    def get(self, kind: str, index: int) -> dict[str, Tensor]:
        """Return the tensors of a layer by name; none where none were put."""
        return self._tensors.get((kind, index), {})

    def lazy(self, kind: str, index: int) -> LazyTensors:
        """Return what :meth:`get` does."""
        found = self.get(kind, index)
        entries = {name: TensorEntry.of(name, tensor.dtype, tensor.shape) for name, tensor in found.items()}
        return LazyTensors(entries, found.__getitem__)

    def put(self, kind: str, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a layer, not copied, in place of those before."""
        self._tensors[kind, index] = dict(tensors)

    def copy(self, source: str, target: str, layers: int) -> None:
        """Make the tensors of kind ``target`` those of kind ``source``, without copying values."""
        for index in range(layers):
            self._tensors[target, index] = dict(self.get(source, index))

    def drop(self, kind: str, layers: int) -> None:
        """Forget all tensors of a kind."""
        for index in range(layers):
            self._tensors.pop((kind, index), None)


class FileStates:
    """Tensors by kind, decoder layer and name, in one safetensors file for each kind and layer.

    Files that another process left in the folder are removed: they may be of any step.

    Args:
        folder: of the files; made if need be.
        device: that tensors are read to.

    Raises:
        FistaPrunerError: the disk refuses.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():
                if path.name.removesuffix(PARTIAL).endswith(".safetensors"):
                    path.unlink()

    def _path(self, kind: str, index: int) -> Path:
        return self.folder / f"{kind}-{index:04d}.safetensors"

    def get(self, kind: str, index: int) -> dict[str, Tensor]:
        """Return the tensors of a layer by name, read into new memory; none where none were put."""
        return dict(self.lazy(kind, index))

    def lazy(self, kind: str, index: int) -> LazyTensors:
        """Return what :meth:`get` does; each tensor is read when it is asked for.

        They must be read before others are put in their place.
        """
        path = self._path(kind, index)
        if not path.exists():
            return LazyTensors({}, dict[str, Tensor]().__getitem__)
        file = SafetensorsFile(path)
        return LazyTensors(file.entries, lambda name: file.read(name).to(self.device))

    def put(self, kind: str, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors of a layer in place of those before."""
        write_tensors(self._path(kind, index), tensors)

    def copy(self, source: str, target: str, layers: int) -> None:
        """Make the files of kind ``target`` those of kind ``source``; files are replaced, so a link is enough."""
        for index in range(layers):
            old, new = self._path(source, index), self._path(target, index)
            with disk_errors(new):
                new.unlink(missing_ok=True)
                if not old.exists():
                    continue
                with suppress(OSError):  # a file system without links
                    os.link(old, new)
                if not new.exists():
                    copy_atomic(old, new)

    def drop(self, kind: str, layers: int) -> None:
        """Remove all files of a kind."""
        for index in range(layers):
            self._path(kind, index).unlink(missing_ok=True)

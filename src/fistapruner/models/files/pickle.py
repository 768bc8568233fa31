"""Read legacy ``.bin`` weight files, which are opened only when the user trusts them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from ...errors import FistaPrunerError, unreadable
from ...runtime.files import refuse_lfs_pointer
from .safetensors import NAMES, TensorEntry


class PickleFile:
    """A legacy ``.bin`` file, unpickled with ``weights_only`` and mapped into memory.

    Reading needs memory for one tensor.

    Args:
        path: the file.

    Attributes:
        path, entries, metadata: as of :class:`~fistapruner.models.files.safetensors.SafetensorsFile`.

    Raises:
        FistaPrunerError: not a PyTorch weight file, or it holds anything but plain tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = {"format": "pt"}
        try:
            with zipfile.ZipFile(path):
                pass
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except OSError as error:
            raise unreadable(path, error) from None
        except zipfile.BadZipFile:
            refuse_lfs_pointer(path)
            what = "is not a whole PyTorch weight file: it is damaged or not a zip file"
            with open(path, "rb") as file:
                if file.read(2) == b"\x80\x02":  # a pickle that is in no zip file
                    what = (
                        "has the format of PyTorch before 1.6, which is not read: write it anew with "
                        "torch.save(torch.load(FILE, weights_only=True), FILE)"
                    )
            raise FistaPrunerError(f"{path} {what}") from None
        except Exception as error:  # an untrusted pickle can make the unpickler raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise FistaPrunerError(f"{path} is not a whole PyTorch weight file: {reason}") from None
        if not isinstance(loaded, dict) or not all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in loaded.items()
        ):
            raise FistaPrunerError(f"{path} is not a mapping of names to tensors")
        size = path.stat().st_size
        for name, tensor in loaded.items():
            if (
                tensor.layout != torch.strided
                or tensor.is_quantized
                or tensor.dtype not in NAMES
                or tensor.nbytes > size
            ):
                kind = f"{tensor.layout}, {tensor.dtype}, {list(tensor.shape)}"
                raise FistaPrunerError(f"{path}: tensor {name!r} ({kind}) is not a plain tensor")
        self._tensors: dict[str, Tensor] = loaded
        self.entries = {name: TensorEntry.of(name, tensor.dtype, tensor.shape) for name, tensor in loaded.items()}

    def read(self, name: str) -> Tensor:
        """Copy one tensor out of the file."""
        return self._tensors[name].detach().clone(memory_format=torch.contiguous_format)

    def read_part(self, name: str, number: int) -> Tensor:
        """Copy ``tensor[number]`` out of the file."""
        return self._tensors[name][number].detach().clone(memory_format=torch.contiguous_format)

"""Read tensors of a checkpoint in another thread, into page-locked memory, while a GPU computes."""

from __future__ import annotations

from collections.abc import Iterable
from threading import Thread

from torch import Tensor

from ..runtime.transfers import page_locked
from .files.checkpoint import Checkpoint


class ReadAhead:
    """Tensors that are being read.

    Args:
        checkpoint: where they are.
        names: their names in the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, names: Iterable[str]) -> None:
        self._checkpoint = checkpoint
        entries = {name: checkpoint.entry(name) for name in names}
        self._tensors = {name: page_locked(entry.shape, entry.dtype) for name, entry in entries.items()}
        self._failed = False
        self._thread = Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for name, tensor in self._tensors.items():
                tensor.copy_(self._checkpoint.read(name))
        except Exception:  # whoever needs the tensors reads them again, and says what is wrong
            self._failed = True

    def tensors(self) -> dict[str, Tensor]:
        """Wait for the tensors and return them by name; none where they could not be read."""
        self._thread.join()
        return {} if self._failed else self._tensors

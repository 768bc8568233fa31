"""Store the dense model's last hidden states of a text on disk, in blocks of windows.

Training leaves embeddings and head alone, so what the dense model predicts is its own final norm and head applied to
its last decoder layer's output. That output is stored: ``width`` values a token, in the precision of the passes. Each
window passes through the dense model once, one decoder layer in memory. A block is one file, which is there as a whole
or not at all; a block that is missing is made again, with the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from ..errors import FistaPrunerError
from ..models.layers import LayerwiseModel
from ..models.safetensors import SafetensorsFile, write_tensors
from ..passes.store import scratch_factory
from ..passes.stream import forward
from ..runtime.files import disk_errors
from ..runtime.show import Tick, silent

BLOCK_TOKENS = 32768
"""Tokens in a block: few enough to lose little when a run is killed, enough to pay for reading the dense model."""


class Teacher:
    """The dense model's last hidden states of the windows of a text.

    Args:
        dense: the dense model; ``tokens``: (windows, seqlen) token ids.
        folder: holds the blocks; made if it is not there.
        batch_size: windows in one pass.
        windows: their numbers in the order in which they are needed; None is all.
        identity: what else decides the stored values (a hash of the dense model's files and of the text).
        tick: receives progress: (what, steps done, steps in all).
    """

    def __init__(
        self,
        dense: LayerwiseModel,
        tokens: Tensor,
        folder: Path,
        batch_size: int,
        windows: Sequence[int] | None = None,
        identity: str = "",
        tick: Tick = silent,
    ) -> None:
        self.dense, self.tokens, self.folder = dense, tokens, folder
        self.identity, self.batch_size, self.tick = identity, batch_size, tick
        order = list(dict.fromkeys(range(len(tokens)) if windows is None else windows))
        size = max(1, BLOCK_TOKENS // (tokens.shape[1] * batch_size)) * batch_size
        self.blocks = [sorted(order[start : start + size]) for start in range(0, len(order), size)]
        self._of = {window: number for number, block in enumerate(self.blocks) for window in block}
        self._open: dict[int, SafetensorsFile] = {}

    def hidden(self, window: int) -> Tensor:
        """Return the (seqlen, width) output of the last decoder layer for a window."""
        number = self._of[window]
        if number not in self._open:
            self._open[number] = self._block(number)
        return self._open[number].read(str(window))

    def prepare(self) -> None:
        """Make all blocks that are not there yet."""
        for block in self.blocks:
            self.hidden(block[0])

    def _block(self, number: int) -> SafetensorsFile:
        """Open a block that is whole and of this text and model, or pass its windows through the dense model."""
        windows, path = self.blocks[number], self.folder / f"{number:05d}.safetensors"
        made_from = f"{self.identity} {self.dense.dtype} {self.batch_size} {windows}"
        with suppress(OSError, FistaPrunerError):
            file = SafetensorsFile(path)
            if file.metadata.get("made_from") == made_from:
                return file
        what = f"predictions of the dense model, block {number + 1} of {len(self.blocks)}"
        states, count, dense = scratch_factory(None, self.dense.dtype), self.batch_size, self.dense
        (last,), _ = forward(dense, self.tokens[windows], count, states, progress=lambda *at: self.tick(what, *at))
        tensors = {str(window): last.read(at, at + 1, dense.device)[0].cpu() for at, window in enumerate(windows)}
        last.close()
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, {"made_from": made_from})
        return SafetensorsFile(path)

"""Store the dense model's predictions of a text on disk, in blocks of windows.

Recovery leaves embeddings and head alone, so what the dense model predicts is its own final norm and head applied to
its last decoder layer's output. That output is stored (kind ``hidden``): ``width`` values a token, in the checkpoint's
precision, unless that is float16 and the passes are in another (:func:`stored_dtype`). For wide models on small disks
the most likely tokens can be stored instead (:data:`TOP`), the rest of the probability as one bucket
(:class:`~.losses.TopTokens`). Either way each window passes through the dense model once, one decoder layer in memory.

A block is ``00007.safetensors`` and ``00007.json``, which is written last and holds a checksum of every window. A block
that is missing, unfinished or damaged is made again, with the same bytes. Where the disk does not hold all windows,
training goes in rounds: the windows of the next steps are stored, used, and make room for those of the next round.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..activations.check import check_model
from ..activations.store import scratch_factory
from ..activations.stream import forward
from ..errors import FistaPrunerError
from ..models.files.safetensors import SafetensorsFile, SafetensorsWriter, TensorEntry
from ..models.layerwise import LayerwiseModel
from ..runtime.files import disk_errors, write_json_atomic
from ..runtime.numerics import BUDGETS, dtype_name, slices
from ..runtime.progress import Tick, silent
from ..runtime.transfers import sent
from .losses import DenseLogits, Reference, TopTokens

PredictionKind = Literal["hidden", "top128", "top64"]

TOP: dict[str, int] = {"top128": 128, "top64": 64}
"""Tokens that are stored for each position."""

BLOCK_TOKENS = 32768
"""Tokens in a block: few enough to lose little when a run is killed, enough to pay for reading the dense model."""

FORMAT = 1
"""Of the files of a block."""

BLOCK_FILE = re.compile(r"\d{5,}\.(json|safetensors)")
"""Names of the files of a block."""

MOST_LIKELY = ("tokens", "log_p", "rest")

STORED: dict[PredictionKind, tuple[str, ...]] = {"hidden": ("hidden",), "top128": MOST_LIKELY, "top64": MOST_LIKELY}
"""Names of what is stored for a window."""


@dataclass(frozen=True)
class Predictions:
    """The dense model's predictions of some tokens.

    Args:
        dense: the dense model.
        stored: what is stored for each of them, by name.
    """

    dense: LayerwiseModel
    stored: dict[str, Tensor]

    def rows(self, start: int, stop: int) -> Reference:
        """Return the predictions of tokens ``start`` to ``stop``; see :attr:`Teacher.ends`."""
        part = {name: values[start:stop] for name, values in self.stored.items()}
        if "hidden" in part:
            return DenseLogits(self.dense.head(part["hidden"].to(self.dense.dtype)))
        return TopTokens(part["tokens"], part["log_p"], part["rest"])


class Teacher:
    """The dense model's predictions of the windows of a text.

    Held-out windows come first, then those of training in its order. A block is made when its first window is asked
    for.

    Args:
        dense: the dense model.
        tokens: (windows, seqlen) token ids.
        folder: holds the blocks; made if it is not there.
        batch_size: windows in one pass.
        kind: what is stored.
        identity: what else decides the stored values (a hash of the dense model's files and of the text).
        order: window numbers in the order of training; without it in the order of their numbers.
        windows_per_step: windows of one step: a round is a number of whole steps.
        held_out: windows that are needed again and again; their blocks stay.
        windows_on_disk: windows that fit on the disk; None is all of them.
        block_tokens: tokens in a block, rounded to whole passes.
        tick: receives progress: (what, steps done, steps in all).

    Attributes:
        step: whose windows are required next, counted from 1: in rounds it says where in the order they are.
        ends: the dense model, whose final norm and head :meth:`Predictions.rows` needs; None where it does not.

    Raises:
        FistaPrunerError: the disk does not hold the held-out windows and those of one step.
    """

    def __init__(
        self,
        dense: LayerwiseModel,
        tokens: Tensor,
        folder: Path,
        *,
        batch_size: int,
        kind: PredictionKind = "hidden",
        identity: str = "",
        order: Sequence[int] = (),
        windows_per_step: int = 1,
        held_out: Sequence[int] = (),
        windows_on_disk: int | None = None,
        block_tokens: int = BLOCK_TOKENS,
        tick: Tick = silent,
    ) -> None:
        self.dense, self.tokens, self.folder, self.kind, self.tick = dense, tokens, folder, kind, tick
        self.identity, self.order = identity, list(order)
        windows, seqlen = tokens.shape
        size = max(1, block_tokens // (seqlen * batch_size)) * batch_size
        self.blocks, self.permanent, self._round = _blocks(
            windows, self.order, held_out, size, windows_per_step, windows_on_disk
        )
        self.batch_size = 1 if self._round else batch_size  # what is stored must not depend on the round
        self.step = 1
        self.ends = dense if kind == "hidden" else None
        self._open: dict[int, tuple[SafetensorsFile, dict[str, int]]] = {}
        self._of: dict[int, int] = {window: n for n in range(self.permanent) for window in self.blocks[n]}
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def require(self, windows: Sequence[int]) -> None:
        """Make the blocks of some windows that are not there yet.

        Args:
            windows: held-out windows, or those of :attr:`step`; in rounds, other rounds make room for theirs.
        """
        if any(window not in self._of for window in windows):
            needed = self._round_of(list(windows))
            self._of = {window: at for window, at in self._of.items() if at < self.permanent}
            self._remove_rounds(needed)
            self._of.update(dict.fromkeys(self.blocks[needed], needed))
        for number in sorted({self._of[window] for window in windows}):
            self._opened(number)

    def _round_of(self, windows: list[int]) -> int:
        """Return the number of the block of the round that has ``windows``, those of :attr:`step`."""
        first = (self.step - 1) * len(windows)
        if not self._round or self.order[first : first + len(windows)] != windows:
            raise ValueError(f"windows {windows[:8]} are not those of step {self.step} in the order of training")
        return self.permanent + first // self._round

    def _remove_rounds(self, needed: int) -> None:
        """Remove the blocks of all rounds but the one that is needed, the record of each first."""
        for number in list(self._open):
            if number >= self.permanent and number != needed:
                del self._open[number]
        with disk_errors(self.folder):
            for path in sorted(self.folder.glob("*")):
                if BLOCK_FILE.fullmatch(path.name) and self.permanent <= int(path.stem) != needed:
                    path.unlink(missing_ok=True)

    def predictions(self, windows: Sequence[int], where: Tensor) -> Predictions:
        """Return the predictions of some tokens. Needs :meth:`require`.

        Args:
            windows: window numbers.
            where: (windows, seqlen) bool: the positions that are wanted.
        """
        found = [self._read(window) for window in windows]
        stored = {
            name: sent(torch.stack([each[name] for each in found])[where], self.dense.device)
            for name in STORED[self.kind]
        }
        return Predictions(self.dense, stored)

    def _read(self, window: int) -> dict[str, Tensor]:
        """Read what is stored for a window; a damaged block is made again."""
        number = self._of[window]
        try:
            values = self._values(number, window)
        except (FistaPrunerError, _DamagedError):
            self._open.pop(number, None)
            self._make(number)
            values = self._values(number, window)
        return values

    def _values(self, number: int, window: int) -> dict[str, Tensor]:
        file, sums = self._opened(number)
        values = {name: file.read(f"{window}.{name}") for name in STORED[self.kind]}
        if _checksum(values) != sums[str(window)]:
            raise _DamagedError
        return values

    def _opened(self, number: int) -> tuple[SafetensorsFile, dict[str, int]]:
        """Open a block; it is made where it is not there."""
        if not self._load(number):
            self._make(number)
        return self._open[number]

    def _load(self, number: int) -> bool:
        """Open a block if it is there."""
        if number not in self._open:
            try:
                record = json.loads(self._path(number, ".json").read_bytes())
                sums = record.pop("checksums")
                if record != self._record(number) or set(sums) != {str(window) for window in self.blocks[number]}:
                    return False
                self._open[number] = SafetensorsFile(self._path(number, ".safetensors")), sums
            except (OSError, ValueError, TypeError, KeyError, AttributeError, FistaPrunerError):
                return False
        return True

    def _make(self, number: int) -> None:
        """Pass a block's windows through the dense model and write its files."""
        windows = sorted(set(self.blocks[number]))
        check_model(self.dense)
        what = f"predictions of the dense model, block {number + 1} of {len(self.blocks)}"
        (last,), _ = forward(
            self.dense,
            self.tokens[windows],
            self.batch_size,
            scratch_factory(None, self.dense.dtype),
            progress=lambda done, total: self.tick(what, done, total),
        )
        seqlen, width, stored = last.seqlen, last.width, stored_dtype(self.dense)
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"hidden": (stored, (seqlen, width))}
        if self.kind in TOP:
            top = min(TOP[self.kind], self.dense.vocabulary)
            shapes = {
                "tokens": (torch.int32, (seqlen, top)),
                "log_p": (torch.float16, (seqlen, top)),
                "rest": (torch.float32, (seqlen,)),
            }
        entries = [
            TensorEntry.of(f"{window}.{name}", dtype, shape)
            for window in windows
            for name, (dtype, shape) in shapes.items()
        ]
        sums = {}
        path = self._path(number, ".safetensors")
        with SafetensorsWriter(path, entries) as writer, self.dense.embeddings_and_head(), torch.no_grad():
            for place, window in enumerate(windows):
                hidden = last.read(place, place + 1, self.dense.device)[0]
                values = {"hidden": hidden} if self.kind == "hidden" else self._top(hidden)
                values = {name: value.to("cpu", shapes[name][0]) for name, value in values.items()}
                for name, value in values.items():
                    writer.write(f"{window}.{name}", value)
                sums[str(window)] = _checksum(values)
        last.close()
        write_json_atomic(self._path(number, ".json"), {**self._record(number), "checksums": sums})
        self._open[number] = SafetensorsFile(path), sums

    def _top(self, hidden: Tensor) -> dict[str, Tensor]:
        """Return the most likely tokens at every position of a window."""
        budget = min(BUDGETS.head, 4 * self.dense.vocabulary * self.dense.max_head_rows)
        parts = [
            TopTokens.of(self.dense.head(hidden[start:stop]), TOP[self.kind])
            for start, stop in slices(len(hidden), 4 * self.dense.vocabulary, budget)
        ]
        return {name: torch.cat([getattr(part, name) for part in parts]) for name in MOST_LIKELY}

    def _record(self, number: int) -> dict[str, Any]:
        """Describe what a block is made from: one with another record is made again."""
        return {
            "format": FORMAT,
            "kind": self.kind,
            "identity": self.identity,
            "dtype": dtype_name(self.dense.dtype),
            "seqlen": self.tokens.shape[1],
            "batch_size": self.batch_size,
            "windows": self.blocks[number],
        }

    def _path(self, number: int, suffix: str) -> Path:
        return self.folder / f"{number:05d}{suffix}"


def stored_dtype(dense: LayerwiseModel) -> torch.dtype:
    """Return the precision in which hidden states are stored.

    It is the checkpoint's; but float16 does not hold all that passes in another precision give.
    """
    return dense.dtype if dense.checkpoint.dtype == torch.float16 else dense.checkpoint.dtype


class _DamagedError(Exception):
    """A block does not hold what its record says."""


def _blocks(
    windows: int,
    order: Sequence[int],
    held_out: Sequence[int],
    size: int,
    windows_per_step: int,
    windows_on_disk: int | None,
) -> tuple[list[list[int]], int, int]:
    """Cut the windows of a text into blocks; see :class:`Teacher`.

    Args:
        windows: number of windows.
        size: windows in a block.

    Returns:
        The blocks, those that stay first; their number; and the windows in a round, 0 where the disk holds all of them.

    Raises:
        FistaPrunerError: the disk does not hold the held-out windows and those of one step.
    """
    blocks, kept_out = _cut(held_out, size), set(held_out)
    train = [window for window in dict.fromkeys(order or range(windows)) if window not in kept_out]
    if windows_on_disk is None or windows_on_disk >= len(held_out) + len(train):
        blocks += _cut(train, size)
        return blocks, len(blocks), 0
    room = windows_on_disk - len(held_out)
    if room < windows_per_step:
        raise FistaPrunerError(
            f"the disk has room for the dense model's predictions of {windows_on_disk} windows: "
            f"{len(held_out)} held-out windows and {windows_per_step} of one step are needed"
        )
    in_round = max(1, min(size, room) // windows_per_step) * windows_per_step
    return blocks + _cut(order, in_round), len(blocks), in_round


def _cut(windows: Sequence[int], size: int) -> list[list[int]]:
    return [list(windows[start : start + size]) for start in range(0, len(windows), size)]


def _checksum(values: dict[str, Tensor]) -> int:
    """CRC of a window's values."""
    total = 0
    for name in sorted(values):
        total = zlib.crc32(values[name].contiguous().view(torch.uint8).numpy().data, total)
    return total

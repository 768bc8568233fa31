"""Store hidden states of all calibration windows, and what enters experts, in memory or in a file.

A file is read and written with system calls and not memory-mapped: its cached pages then do not count as memory of the
process, so the memory of a run does not grow with the calibration tokens.

Every group of operators needs a pass of the calibration windows with the groups before it pruned. Once the groups
inside a child module (the attention, the MLP) that run before its output projection have their final weights, what
enters the projection is the same in every later pass: :class:`CachedOutputs` stores it, and later passes compute the
projection alone. On a GPU computing again is faster than moving so much data: there nothing is stored.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FistaPrunerError
from ..models.operators import Group, Layout, OutputProjection
from ..runtime.files import disk_errors, write_all

CPU = torch.device("cpu")


class HiddenStates:
    """A store of (samples, seqlen, width) activations, in a file or in the memory of a device."""

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, file: Path | None = None, device: torch.device = CPU
    ) -> None:
        self.samples, self.seqlen, self.width = shape
        self.dtype = dtype
        self.file = file
        self._window = self.seqlen * self.width * dtype.itemsize
        self._memory = torch.empty(shape, dtype=dtype, device=device) if file is None else None
        self._descriptor = -1
        if file is not None:
            with disk_errors(file):
                self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)

    @property
    def nbytes(self) -> int:
        """Return the size in bytes."""
        return self.samples * self._window

    def to_main_memory(self) -> None:
        """Move activations from a GPU's memory to main memory."""
        if self._memory is not None:
            self._memory = self._memory.cpu()

    def read(
        self, start: int, stop: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Copy windows ``start`` to ``stop``, (stop - start, seqlen, width); layers may overwrite them.

        ``device`` and ``dtype`` are those of the copy; None is where and as they are stored, the CPU for a file.
        """
        if self._memory is not None:
            return self._memory[start:stop].to(device or self._memory.device, dtype or self.dtype, copy=True)
        out = torch.empty(stop - start, self.seqlen, self.width, dtype=self.dtype)
        self._read_file([start * self.seqlen], out)
        return out.to(device or CPU, dtype or self.dtype)

    def tokens(self, start: int, stop: int, rows: Tensor, device: torch.device | None = None) -> Tensor:
        """Copy single tokens, (tokens, width): ``rows`` are their places in windows ``start`` to ``stop``."""
        if self._memory is None:
            out = torch.empty((len(rows), self.width), dtype=self.dtype)
            self._read_file([start * self.seqlen + row for row in rows.tolist()], out)
            return out.to(device or CPU)
        within = self._memory[start:stop].flatten(0, 1)
        return within[rows.to(within.device)].to(device or within.device)

    def _read_file(self, places: Sequence[int], out: Tensor) -> None:
        """Read equal parts of ``out``, one from each of ``places``: numbers of tokens of all windows."""
        view = memoryview(out.view(torch.uint8).flatten().numpy().data)
        token, part = self.width * self.dtype.itemsize, len(view) // max(1, len(places))
        for number, place in enumerate(places):
            done, end = number * part, (number + 1) * part
            skipped = place * token - done
            while done < end:
                count = os.preadv(self._descriptor, [view[done:end]], skipped + done)
                if count <= 0:
                    raise FistaPrunerError(
                        f"{self.file}: hidden states end early at window {place // self.seqlen}; "
                        "remove the file and resume"
                    )
                done += count

    def write(self, start: int, values: Tensor) -> None:
        """Store windows from ``start`` on, (count, seqlen, width); another shape is a ``ValueError``."""
        if values.shape[1:] != (self.seqlen, self.width):
            raise ValueError(f"values are {tuple(values.shape)}, expected (count, {self.seqlen}, {self.width})")
        if self._memory is not None:
            self._memory[start : start + len(values)] = values
            return
        values = values.detach().to(CPU, self.dtype).contiguous()
        assert self.file is not None
        with disk_errors(self.file):
            view = memoryview(values.view(torch.uint8).numpy().data).cast("B")
            write_all(self._descriptor, view, start * self._window)

    def sync(self) -> None:
        """Flush written values to the disk, so that they survive a crash."""
        if self._descriptor >= 0:
            os.fsync(self._descriptor)

    def close(self, *, keep: bool = False) -> None:
        """Release the memory, and the file unless ``keep``."""
        self._memory = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            if not keep and self.file is not None:
                self.file.unlink(missing_ok=True)


class RoutedTokens:
    """Inputs of the experts of one mixture, and where each token was routed, which stays in memory.

    Args:
        inputs: stores the inputs once, whatever the number of experts; it is closed with this object.
    """

    def __init__(self, inputs: HiddenStates) -> None:
        self._inputs = inputs
        self._batches: list[tuple[int, int, Tensor, Tensor]] = []

    def keep(self, start: int, inputs: Tensor, chosen: Tensor, weights: Tensor) -> None:
        """Keep windows from ``start`` on: (tokens, n) inputs, (tokens, k) experts and their weights."""
        windows = len(inputs) // self._inputs.seqlen
        self._inputs.write(start, inputs.reshape(windows, self._inputs.seqlen, -1))
        self._batches.append((start, start + windows, chosen.to("cpu", torch.int32), weights.to("cpu", torch.float32)))

    def weighted(self, number: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the (tokens, n) inputs of an expert and their (tokens,) weights, batch by batch, in order."""
        for start, stop, chosen, weights in self._batches:
            rows, places = torch.where(chosen == number)
            if len(rows):
                yield self._inputs.tokens(start, stop, rows, device), weights[rows, places].to(device)

    def by_half(self, number: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """Yield the first window of each batch, which is cut at half of the windows, and the inputs."""
        half = self._inputs.samples // 2
        for start, stop, chosen, _ in self._batches:
            rows, _ = torch.where(chosen == number)
            before = rows < (half - start) * self._inputs.seqlen
            for first, part in ((start, rows[before]), (max(start, half), rows[~before])):
                if len(part):
                    yield first, self._inputs.tokens(start, stop, part, device)

    def close(self) -> None:
        """Release the stored inputs."""
        self._inputs.close()


Store = Callable[[str, tuple[int, int, int]], HiddenStates]
"""Makes a store from its name and shape."""


def scratch_factory(folder: Path | None, dtype: torch.dtype, device: torch.device = CPU) -> Store:
    """Return a factory of temporary stores in ``folder``, or in the memory of ``device`` where it is None."""

    def make(name: str, shape: tuple[int, int, int]) -> HiddenStates:
        return HiddenStates(shape, dtype, None if folder is None else folder / name, device)

    return make


Windows = Callable[[], tuple[int, int]]
"""Returns the windows (start, stop) of the batch at work."""


def kept_projections(layout: Layout, index: int, device: torch.device) -> Mapping[str, OutputProjection]:
    """Return the output projections of decoder layer ``index`` whose inputs are stored on ``device``."""
    return layout.output_projections[index] if device.type == "cpu" else {}


@dataclass
class _Child:
    """A child module whose output projection's inputs are stored."""

    module: nn.Module
    projection: nn.Module
    others: int | None  # as in OutputProjection
    last: int  # number of the group that the projection is
    name: str  # of the store
    entering: HiddenStates | None = None
    windows: int = 0  # that are stored


class CachedOutputs:
    """Cached inputs of the output projections of the loaded decoder layer ``index``.

    Args:
        index, layer, groups: number, module and pruned operators of the layer, in execution order.
        projections: by child module, the output projections whose inputs are stored (:func:`kept_projections`).
        passes: number of passes after the last group is pruned.
        inputs: hidden states that enter the layer.
        store: makes the stores.
    """

    def __init__(
        self,
        index: int,
        layer: nn.Module,
        groups: Sequence[Group],
        projections: Mapping[str, OutputProjection],
        passes: int,
        inputs: HiddenStates,
        store: Store,
    ) -> None:
        self._inputs, self._store, self._done = inputs, store, -1
        self._children: list[_Child] = []
        for name, known in projections.items():
            inside = [
                number
                for number, group in enumerate(groups)
                if any(operator.name.startswith(name + ".") for operator in group)
            ]
            alone = inside and [operator.name for operator in groups[inside[-1]]] == [known.operator]
            if alone and len(groups) - 1 - inside[-1] + passes:  # later passes
                modules = layer.get_submodule(name), layer.get_submodule(known.operator)
                self._children.append(_Child(*modules, known.others, inside[-1], f"replay-{index}-{name}"))

    def pruned(self, number: int) -> None:
        """Note that the operators of group ``number`` have their final weights."""
        self._done = number

    @contextmanager
    def around_pass(self, windows: Windows) -> Iterator[None]:
        """Store and reuse activations in the pass inside."""
        with ExitStack() as stack:
            for child in self._children:
                if child.last == self._done + 1:
                    child.windows = 0
                    # Before the other hooks, since the last of them ends the pass.
                    hook = self._keeper(child, windows)
                    stack.enter_context(child.projection.register_forward_pre_hook(hook, prepend=True))
                elif child.last <= self._done and child.windows == self._inputs.samples:
                    child.module.forward = self._reader(child, windows)
                    stack.callback(delattr, child.module, "forward")
            yield

    def _keeper(self, child: _Child, windows: Windows) -> Callable[..., None]:
        def keep(_: object, args: tuple[Tensor, ...]) -> None:
            (start, stop), value = windows(), args[0]
            if value.shape[:-1] != (stop - start, self._inputs.seqlen) or value.dtype != self._inputs.dtype:
                return  # such as tokens that are routed
            if child.entering is None:
                shape = (self._inputs.samples, self._inputs.seqlen, value.shape[-1])
                child.entering = self._store(child.name, shape)
            child.entering.write(start, value)
            child.windows += stop - start

        return keep

    @staticmethod
    def _reader(child: _Child, windows: Windows) -> Callable[..., Any]:
        def forward(*_: Any, **__: Any) -> Any:
            assert child.entering is not None
            out = child.projection(child.entering.read(*windows()))
            return out if child.others is None else (out, *(None for _ in range(child.others)))

        return forward

    def close(self) -> None:
        """Release everything that is stored."""
        for child in self._children:
            if child.entering is not None:
                child.entering.close()
            child.entering, child.windows = None, 0

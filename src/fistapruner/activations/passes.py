"""Passes of calibration windows through one decoder layer, watched at the inputs of its operators."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..models.discovery import Group, Operator
from ..models.layerwise import Call, LayerwiseModel
from .store import HiddenStates

Watch = Callable[[int, int, Tensor], None]
"""Receives (group, first window of the batch, inputs (batch, seqlen, n) or what else is watched)."""

Around = Callable[[Callable[[], tuple[int, int]]], AbstractContextManager[None]]
"""What is done around a pass; it is given a function that tells the windows at hand, (start, stop)."""


@dataclass
class Clock:
    """Wall seconds by phase. Phases nest: time in an inner phase is not counted in the outer one."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    _stack: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside as ``name``."""
        now = self._now()
        if self._stack:
            outer, since = self._stack[-1]
            self._add(outer, now - since)
        self._stack.append((name, now))
        try:
            yield
        finally:
            now = self._now()
            inner, since = self._stack.pop()
            self._add(inner, now - since)
            if self._stack:
                self._stack[-1] = (self._stack[-1][0], now)

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True)
class Calls:
    """How decoder layers are called, for full batches and for the last, smaller one.

    Args:
        batch_size: windows in a full batch.
        by_size: calls of every layer for each batch size that occurs.
    """

    batch_size: int
    by_size: dict[int, list[Call]]

    @classmethod
    def of(cls, model: LayerwiseModel, samples: int, seqlen: int, batch_size: int) -> Calls:
        """Record them, and those of a single window; needs the model's :meth:`~LayerwiseModel.embeddings_and_head`."""
        batch_size = min(batch_size, samples)
        sizes = {batch_size, samples % batch_size, 1} - {0}
        return cls(batch_size, {size: model.calls(size, seqlen) for size in sizes})

    def batches(self, samples: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of every batch."""
        for start in range(0, samples, self.batch_size):
            yield start, min(start + self.batch_size, samples)


class _Reached(Exception):
    """The last watched operator was reached; the rest of the layer is not needed."""


def run_layer(
    model: LayerwiseModel,
    index: int,
    inputs: HiddenStates,
    calls: Calls,
    clock: Clock,
    *,
    groups: Sequence[tuple[int, Group]] = (),
    watch: Watch | None = None,
    answering: Sequence[tuple[int, Operator]] = (),
    answer: Watch | None = None,
    output: HiddenStates | Watch | None = None,
    around: Sequence[Around] = (),
) -> None:
    """Run every window through loaded decoder layer ``index``.

    Args:
        model: the model, layer ``index`` loaded.
        index: which layer.
        inputs: hidden states that enter it.
        calls: how it is called.
        clock: counts the time as ``capture``; ``watch`` counts its own.
        groups: (number, operators) of the groups whose inputs are watched, in execution order.
        watch: receives those inputs.
        answering: (group, operator) of the operators whose outputs are watched; not where passes stop before them.
        answer: receives those outputs.
        output: where the layer's output goes. None: not needed, and every pass stops at the last watched group.
        around: entered before the first batch and left after the last.
    """
    layer = model.layers[index]
    start = stop = 0

    def hook(number: int, last: bool) -> Callable[..., None]:
        def pre_forward(_: object, args: tuple[Tensor, ...]) -> None:
            assert watch is not None
            # Some architectures (OPT) flatten batch and sequence inside the layer.
            watch(number, start, args[0].reshape(stop - start, -1, args[0].shape[-1]))
            if last and output is None:
                raise _Reached

        return pre_forward

    def answered(number: int) -> Callable[..., None]:
        def after_forward(_: object, __: object, out: Tensor) -> None:
            assert answer is not None
            answer(number, start, out.reshape(stop - start, -1, out.shape[-1]))

        return after_forward

    handles = [
        layer.get_submodule(group[0].name).register_forward_pre_hook(hook(number, number == groups[-1][0])) for number, group in groups
    ]
    handles += [layer.get_submodule(operator.name).register_forward_hook(answered(number)) for number, operator in answering]
    try:
        with ExitStack() as stack:
            for enter in around:
                stack.enter_context(enter(lambda: (start, stop)))
            for start, stop in calls.batches(inputs.samples):
                with clock.phase("io"):
                    hidden = inputs.read(start, stop, model.device)
                with clock.phase("capture"), torch.no_grad():
                    try:
                        out = model.run(index, hidden, calls.by_size[stop - start][index])
                    except _Reached:
                        continue
                if isinstance(output, HiddenStates):
                    with clock.phase("io"):
                        output.write(start, out)
                elif output is not None:
                    output(-1, start, out)
    finally:
        for handle in handles:
            handle.remove()

"""Cache outputs of sub-modules whose weights are final, so later passes through a layer skip them.

Every group of operators needs a pass of the calibration windows with the groups before it pruned. Once all operators
of a child module (the attention), and all that run before it, have their final weights, the module's output is the
same in every later pass: the first of these passes stores it, the others read it. The first one need not compute the
whole module either, where the module ends with the operators pruned last (``o_proj``, ``down_proj``): the pass that
gathered their inputs has stored them. On a GPU computing again is faster than moving so much data; there inputs are
not stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..models.layout import Group, Layout, OutputProjection
from .store import HiddenStates, Store


def kept_projections(layout: Layout, index: int, device: torch.device) -> Mapping[str, OutputProjection]:
    """Return the output projections of decoder layer ``index`` whose inputs are stored on ``device``."""
    return layout.output_projections[index] if device.type == "cpu" else {}


class CachedOutputs:
    """Cached inputs and outputs of final sub-modules of one decoder layer.

    Modules whose output is not one tensor of hidden states (alone, or followed by None) are computed in every pass.

    Args:
        index: number of the decoder layer; it is part of the stores' names.
        layer: the loaded decoder layer.
        groups: its pruned operators in execution order.
        projections: by child module, the output projections whose inputs are stored
            (:class:`~fistapruner.models.layout.OutputProjection`).
        passes: number of passes after the last group is pruned.
        inputs: hidden states that enter the layer; their number, length and dtype.
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
        self._index = index
        self._layer = layer
        self._projections: dict[str, OutputProjection] = {}
        self._inputs = inputs
        self._store = store
        self._entering: dict[str, HiddenStates] = {}
        self._kept: dict[str, HiddenStates] = {}
        self._others: dict[str, int | None] = {}
        self._complete: dict[str, int] = {}
        self._device = torch.device("cpu")
        self._next = 0
        self._settled: set[str] = set()
        self._settled_by: dict[int, list[str]] = {}
        self._again: dict[str, int] = {}
        for name, child in layer.named_children():
            inside = [
                number
                for number, group in enumerate(groups)
                if any(operator.name.startswith(name + ".") for operator in group)
            ]
            if inside and any(True for _ in child.children()):
                self._settled_by.setdefault(inside[-1], []).append(name)
                self._again[name] = len(groups) - 1 - inside[-1] + passes
                projection, last = projections.get(name), [operator.name for operator in groups[inside[-1]]]
                if projection is not None and last == [projection.operator] and self._again[name]:
                    self._projections[name] = projection

    def pruned(self, number: int) -> None:
        """Note that the operators of group ``number`` have their final weights."""
        self._settled.update(self._settled_by.get(number, ()))
        self._next = number + 1

    @contextmanager
    def around_pass(self, batch: Callable[[], tuple[int, int]]) -> Iterator[None]:
        """Store and reuse activations in the pass inside; ``batch`` returns its windows (start, stop)."""
        hooks, replaced = ExitStack(), []
        for name in self._settled_by.get(self._next, ()):
            projection = self._projections.get(name)
            if projection is not None:
                self._complete[projection.operator] = 0
                operator = self._layer.get_submodule(projection.operator)
                # Before the other hooks, since the last of them ends the pass.
                keeping = self._keeping_inputs(projection.operator, batch)
                hooks.enter_context(operator.register_forward_pre_hook(keeping, prepend=True))
        for name in self._settled:
            child = self._layer.get_submodule(name)
            if self._complete.get(name) == self._inputs.samples:
                child.forward = self._giving(name, batch)
                replaced.append(child)
                continue
            projection = self._projections.get(name)
            if projection is not None and self._complete.get(projection.operator) == self._inputs.samples:
                child.forward = self._going_on(projection, batch)
                replaced.append(child)
            if self._again[name] > 1:  # one pass stores the output; another one has to read it
                self._complete[name] = 0
                hooks.enter_context(child.register_forward_hook(self._keeping(name, batch)))
        try:
            with hooks:
                yield
        finally:
            for child in replaced:
                del child.forward
        for name in self._settled:
            if self._complete.get(name) == self._inputs.samples and name in self._projections:
                self._forget(self._projections[name].operator)

    def close(self) -> None:
        """Release everything that is stored."""
        for name in list(self._entering):
            self._forget(name)
        for store in self._kept.values():
            store.close()
        self._kept.clear()

    def _forget(self, operator: str) -> None:
        """Release the stored inputs of an output projection."""
        if operator in self._entering:
            self._entering.pop(operator).close()
            self._complete[operator] = 0

    def _keep(self, stores: dict[str, HiddenStates], name: str, value: Tensor, windows: tuple[int, int]) -> bool:
        """Write a value if it is hidden states of ``windows``, and count them; return whether it was."""
        start, stop = windows
        if (
            value.ndim != 3
            or value.shape[:2] != (stop - start, self._inputs.seqlen)
            or value.dtype != self._inputs.dtype
        ):
            return False
        if name not in stores:
            shape = (self._inputs.samples, self._inputs.seqlen, value.shape[-1])
            stores[name] = self._store(f"replay-{self._index}-{name}", shape)
        stores[name].write(start, value)
        self._complete[name] += stop - start
        return True

    def _keeping_inputs(self, operator: str, batch: Callable[[], tuple[int, int]]) -> Callable[..., None]:
        """Make the hook that stores the inputs of an output projection."""

        def keep(_: object, args: tuple[Tensor, ...]) -> None:
            self._keep(self._entering, operator, args[0], batch())

        return keep

    def _going_on(self, projection: OutputProjection, batch: Callable[[], tuple[int, int]]) -> Callable[..., Any]:
        """Make the forward that computes only the output projection, from its stored inputs."""
        operator = self._layer.get_submodule(projection.operator)

        def go_on(*_: object, **__: object) -> Any:
            value = operator(self._entering[projection.operator].read(*batch()))
            return value if projection.others is None else (value, *(None for _ in range(projection.others)))

        return go_on

    def _keeping(self, name: str, batch: Callable[[], tuple[int, int]]) -> Callable[..., None]:
        """Make the hook that stores the output of a module."""

        def keep(_: object, __: object, output: Any) -> None:
            value, others = (output[0], output[1:]) if isinstance(output, tuple) else (output, ())
            if not isinstance(value, Tensor) or any(other is not None for other in others):
                return
            if self._keep(self._kept, name, value, batch()):
                self._others[name] = len(others) if isinstance(output, tuple) else None
                self._device = value.device

        return keep

    def _giving(self, name: str, batch: Callable[[], tuple[int, int]]) -> Callable[..., Any]:
        """Make the forward that reads the stored output of a module."""

        def give(*_: object, **__: object) -> Any:
            value = self._kept[name].read(*batch(), self._device)
            others = self._others[name]
            return value if others is None else (value, *(None for _ in range(others)))

        return give

"""Parts of a decoder layer that are done are not computed again in its later passes.

Every group of operators needs a pass of the calibration windows with the groups before it pruned. Once all operators of a
child module (the attention) have their final weights, and with them everything that runs before it, the module's output is
the same in every pass that follows: the first of them keeps it, the others are given it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..models.hidden import HiddenStates, Store
from ..models.layout import Group


class Replay:
    """What passes through one decoder layer have computed for good.

    Modules that return anything but one tensor of hidden states (alone, or followed by None) are computed in every pass.

    Args:
        index: of the decoder layer; other workers keep theirs in the same folder.
        layer: the loaded decoder layer.
        groups: its pruned operators in execution order.
        passes: number of passes after the last group is pruned.
        inputs: hidden states that enter the layer; their number, length and dtype.
        store: where outputs are kept.
    """

    def __init__(self, index: int, layer: nn.Module, groups: Sequence[Group], passes: int, inputs: HiddenStates, store: Store) -> None:
        self._index = index
        self._layer = layer
        self._inputs = inputs
        self._store = store
        self._kept: dict[str, HiddenStates] = {}
        self._others: dict[str, int | None] = {}
        self._complete: dict[str, int] = {}
        self._device = torch.device("cpu")
        self._wanted: set[str] = set()
        self._settled_by: dict[int, list[str]] = {}
        for name, child in layer.named_children():
            inside = [number for number, group in enumerate(groups) if any(operator.name.startswith(name + ".") for operator in group)]
            # One pass keeps the output, so at least one more has to follow.
            if inside and any(True for _ in child.children()) and len(groups) - 1 - inside[-1] + passes > 1:
                self._settled_by.setdefault(inside[-1], []).append(name)

    def pruned(self, number: int) -> None:
        """The operators of group ``number`` have their final weights."""
        self._wanted.update(self._settled_by.get(number, ()))

    @contextmanager
    def around_pass(self, batch: Callable[[], tuple[int, int]]) -> Iterator[None]:
        """Keep outputs, and give those that are kept, in the pass inside; ``batch`` tells the windows at hand."""
        handles, replaced = [], []
        for name in self._wanted:
            child = self._layer.get_submodule(name)
            if self._complete.get(name) == self._inputs.samples:
                child.forward = self._giving(name, batch)
                replaced.append(child)
            else:
                self._complete[name] = 0
                handles.append(child.register_forward_hook(self._keeping(name, batch)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for child in replaced:
                del child.forward

    def close(self) -> None:
        """Release what is kept."""
        for store in self._kept.values():
            store.close()
        self._kept.clear()

    def _keeping(self, name: str, batch: Callable[[], tuple[int, int]]) -> Callable[..., None]:
        def keep(_: object, __: object, output: Any) -> None:
            start, stop = batch()
            value, others = (output[0], output[1:]) if isinstance(output, tuple) else (output, ())
            whole = isinstance(value, Tensor) and value.shape[:2] == (stop - start, self._inputs.seqlen) and value.ndim == 3
            if not whole or value.dtype != self._inputs.dtype or any(other is not None for other in others):
                return
            if name not in self._kept:
                self._kept[name] = self._store(f"replay-{self._index}-{name}", (self._inputs.samples, self._inputs.seqlen, value.shape[-1]))
                self._others[name] = len(others) if isinstance(output, tuple) else None
                self._device = value.device
            self._kept[name].write(start, value)
            self._complete[name] += stop - start

        return keep

    def _giving(self, name: str, batch: Callable[[], tuple[int, int]]) -> Callable[..., Any]:
        def give(*_: object, **__: object) -> Any:
            value = self._kept[name].read(*batch()).to(self._device, copy=True)  # the layer may work on it in place
            others = self._others[name]
            return value if others is None else (value, *(None for _ in range(others)))

        return give

"""Cache the inputs of output projections of final modules, so later passes skip the rest of them.

Every group of operators needs a pass of the calibration windows with the groups before it pruned. Once the groups
inside a child module (the attention, the MLP) that run before its output projection have their final weights, what
enters the projection is the same in every later pass. The pass that gathers these inputs stores them; the later ones
compute the projection alone. On a GPU computing again is faster than moving so much data: there nothing is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.operators import Group, Layout, OutputProjection
from .store import HiddenStates, Store

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

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


class _Values:
    """Hidden states that one pass stores for all windows; they may be read once all are there."""

    def __init__(self, name: str, like: HiddenStates, store: Store) -> None:
        self._name, self._like, self._store = name, like, store
        self._states: HiddenStates | None = None
        self._windows = 0
        self._device = torch.device("cpu")
        self._others: int | None = None

    @property
    def complete(self) -> bool:
        return self._windows == self._like.samples

    def begin(self) -> None:
        self._windows = 0

    def keep(self, value: Any, windows: tuple[int, int]) -> None:
        """Store one tensor of hidden states of the windows, alone or before None; anything else is left out."""
        start, stop = windows
        value, others = (value[0], value[1:]) if isinstance(value, tuple) else (value, None)
        if not isinstance(value, Tensor) or any(other is not None for other in others or ()):
            return
        if value.shape[:-1] != (stop - start, self._like.seqlen) or value.dtype != self._like.dtype:
            return
        if self._states is None:
            self._states = self._store(self._name, (self._like.samples, self._like.seqlen, value.shape[-1]))
        self._states.write(start, value)
        self._windows += stop - start
        self._device, self._others = value.device, None if others is None else len(others)

    def read(self, windows: tuple[int, int]) -> Any:
        """Return what was kept, as it was."""
        assert self._states is not None
        return _returned(self._states.read(*windows, self._device), self._others)

    def close(self) -> None:
        if self._states is not None:
            self._states.close()
        self._states, self._windows = None, 0


def _returned(value: Tensor, others: int | None) -> Any:
    """Return a value as a module does: alone, or before so many None in a tuple."""
    return value if others is None else (value, *(None for _ in range(others)))


@dataclass(frozen=True)
class _Child:
    """A child module of the layer.

    Args:
        module: the child.
        last: number of the group after which its operators are final; ``later``: of passes that follow.
        projection: its output projection, where the inputs of that are stored, and how the child returns its output.
        entering: those inputs; ``output``: the outputs of the child.
    """

    module: nn.Module
    last: int
    later: int
    projection: tuple[nn.Module, int | None] | None
    entering: _Values
    output: _Values

    def keep_inputs(self, windows: Windows, stack: ExitStack) -> None:
        """Store the inputs of the output projection in the pass that follows."""
        if self.projection is not None:
            self.entering.begin()
            keep = lambda _, args: self.entering.keep(args[0], windows())  # noqa: E731
            # Before the other hooks, since the last of them ends the pass.
            stack.enter_context(self.projection[0].register_forward_pre_hook(keep, prepend=True))

    def skip(self, windows: Windows, stack: ExitStack) -> None:
        """Compute no more in the pass that follows than is not stored; and store the output for later ones."""
        if self.output.complete:
            self._replace(lambda *_, **__: self.output.read(windows()), stack)
            return
        if self.projection is not None and self.entering.complete:
            operator, others = self.projection
            self._replace(lambda *_, **__: _returned(operator(self.entering.read(windows())), others), stack)
        if self.later > 1:  # one pass stores the output; another one has to read it
            self.output.begin()
            keep = lambda _, __, out: self.output.keep(out, windows())  # noqa: E731
            stack.enter_context(self.module.register_forward_hook(keep))

    def _replace(self, forward: Callable[..., Any], stack: ExitStack) -> None:
        self.module.forward = forward
        stack.callback(delattr, self.module, "forward")


class CachedOutputs:
    """Cached inputs and outputs of final sub-modules of one decoder layer.

    Modules whose output is not one tensor of hidden states (alone, or followed by None) are computed in every pass.

    Args:
        index: number of the decoder layer; it is part of the stores' names.
        layer: the loaded decoder layer.
        groups: its pruned operators in execution order.
        projections: by child module, the output projections whose inputs are stored
            (:class:`~fistapruner.models.operators.OutputProjection`).
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
        self._next = 0
        self._final: set[int] = set()
        self._children: list[_Child] = []
        for name, module in layer.named_children():
            inside = [
                number
                for number, group in enumerate(groups)
                if any(operator.name.startswith(name + ".") for operator in group)
            ]
            if not inside or not any(True for _ in module.children()):
                continue
            later = len(groups) - 1 - inside[-1] + passes
            known, last = projections.get(name), [operator.name for operator in groups[inside[-1]]]
            projection = None
            if known is not None and last == [known.operator] and later:
                projection = layer.get_submodule(known.operator), known.others
            entering, output = (_Values(f"replay-{index}-{what}-{name}", inputs, store) for what in ("in", "out"))
            self._children.append(_Child(module, inside[-1], later, projection, entering, output))

    def pruned(self, number: int) -> None:
        """Note that the operators of group ``number`` have their final weights."""
        self._final.add(number)
        self._next = number + 1

    @contextmanager
    def around_pass(self, windows: Windows) -> Iterator[None]:
        """Store and reuse activations in the pass inside."""
        with ExitStack() as stack:
            for child in self._children:
                if child.last == self._next:
                    child.keep_inputs(windows, stack)
                elif child.last in self._final:
                    child.skip(windows, stack)
            yield
        for child in self._children:
            if child.output.complete:
                child.entering.close()

    def close(self) -> None:
        """Release everything that is stored."""
        for child in self._children:
            child.entering.close()
            child.output.close()

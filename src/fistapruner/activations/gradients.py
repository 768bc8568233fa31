"""Take a gradient back through a model, the way that hidden states went in :mod:`.stream`.

:func:`backward` loads one decoder layer after the other, from the last to the first, and runs it again;
:func:`forward_backward` keeps all of them in memory and runs none twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor, nn

from ..models.layerwise import LayerwiseModel
from ..runtime.numerics import ordered_attention
from .store import HiddenStates
from .stream import Calls, Progress, Values

VisitBack = Callable[[int, nn.Module], AbstractContextManager[Callable[[Tensor], None]]]
"""As :data:`~.stream.Visit`; receives of each batch the gradient (batch, seqlen, width) at the layer's output."""

Take = Callable[[int, nn.Module, dict[str, Tensor]], None]
"""Receives (index, loaded decoder layer, gradients of one batch with respect to its values)."""

Done = Callable[[int, nn.Module], None]
"""Called with (index, loaded decoder layer) when the gradients of all batches were received."""


def backward(
    model: LayerwiseModel,
    states: list[HiddenStates],
    calls: Calls,
    gradient: HiddenStates,
    visit: VisitBack | None = None,
    progress: Progress = lambda done, total: None,
    *,
    values: Values | None = None,
    take: Take | None = None,
    done: Done = lambda index, layer: None,
) -> None:
    """Take a gradient back through the whole model, from the last decoder layer to the first.

    Every layer is loaded and run again with gradients, so that one layer's activations are in memory at a time.

    Args:
        model: the model.
        states: hidden states that enter each layer (:func:`~.stream.forward` with ``keep``, less the last ones). They
            are closed one after the other.
        calls: how decoder layers are called.
        gradient: with respect to the output of the last layer; overwritten by that with respect to the input of the
            first, where there is no ``take``.
        visit: called for every decoder layer; its hooks may watch the gradients inside.
        progress: receives the number of layers done.
        values: the tensors that :func:`~.stream.forward` used in place of a layer's parameters.
        take: receives the gradients with respect to them, of one batch after the other; those of each decoder layer
            before those of the layer before it. No other gradients of weights are computed.
        done: called after the last batch of each decoder layer.
    """
    for index in reversed(range(len(model))):
        entering = states.pop()
        with ExitStack() as visits:
            with model.layer(index) as layer:
                model.read_ahead(index - 1)
                receive = None if visit is None else visits.enter_context(visit(index, layer))
                used = {} if values is None else dict(values(index, layer))
                if take is not None:
                    used = {name: value.detach().requires_grad_() for name, value in used.items()}
                visits.enter_context(ordered_attention(model.device))
                for start, stop in calls.batches(entering.samples):
                    hidden = entering.read(start, stop, model.device)
                    above = gradient.read(start, stop, model.device)
                    if receive is not None:
                        receive(above)
                    wanted = hidden.requires_grad_() if index > 0 or take is None else None
                    with torch.enable_grad():
                        out = model.run(index, hidden, calls.by_size[stop - start][index], used)
                    below, found = _differentiate(out, above, wanted, {} if take is None else used)
                    del out
                    if below is not None:
                        gradient.write(start, below)
                    if take is not None:
                        take(index, layer, found)
                done(index, layer)
            entering.close()
        progress(len(model) - index, len(model))


def _differentiate(
    out: Tensor, above: Tensor, hidden: Tensor | None, values: Mapping[str, Tensor]
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Take the gradient ``above`` back through one decoder layer, for one batch.

    Args:
        out: output of the layer.
        above: gradient with respect to it.
        hidden: (batch, seqlen, width) hidden states that have entered the layer; None if their gradient is not needed.
        values: tensors to differentiate with respect to.

    Returns:
        The gradient with respect to ``hidden``, or None; and those with respect to ``values``, zeros where the output
        does not depend on one.
    """
    wanted = [*([] if hidden is None else [hidden]), *values.values()]
    found: list[Tensor | None] = [None] * len(wanted)
    if wanted and out.requires_grad:
        found = list(torch.autograd.grad(out, wanted, above, allow_unused=bool(values)))
    below = None if hidden is None else found.pop(0)
    return below, {
        name: torch.zeros_like(value) if gradient is None else gradient
        for (name, value), gradient in zip(values.items(), found, strict=True)
    }


def forward_backward(
    model: LayerwiseModel,
    tokens: Tensor,
    calls: Calls,
    above: Callable[[int, Tensor], Tensor],
    values: Values,
    take: Take,
    done: Done,
) -> None:
    """Run every window through the whole model and take a gradient back; no layer runs twice.

    In memory are all decoder layers and their values, and the activations of all layers for one batch. The gradients
    are those of :func:`~.stream.forward` and :func:`backward`, bit for bit.

    Args:
        model: the model.
        tokens: (windows, seqlen) token ids.
        calls: how decoder layers are called, as far as it is recorded.
        above: receives (first window of the batch, output of the last layer); returns the gradient with respect to it.
        values: gives the tensors to use in place of a layer's parameters.
        take: as for :func:`backward`; receives the gradients of all layers for one batch, then those for the next.
        done: called for each decoder layer, from the last to the first, after all batches.
    """
    with model.resident():
        calls.record(model, *tokens.shape)
        leaves = [
            {name: value.detach().requires_grad_() for name, value in values(index, layer).items()}
            for index, layer in enumerate(model.layers)
        ]
        for start, stop in calls.batches(len(tokens)):
            hidden = model.embed(tokens[start:stop])[0]
            graphs: list[tuple[Tensor | None, Tensor]] = []
            with ordered_attention(model.device):
                for index, used in enumerate(leaves):
                    entering = hidden.detach().requires_grad_() if index else None
                    with torch.enable_grad():
                        into = hidden if entering is None else entering
                        hidden = model.run(index, into, calls.by_size[stop - start][index], used)
                    graphs.append((entering, hidden))
                gradient: Tensor | None = above(start, hidden.detach())
                for index in reversed(range(len(leaves))):
                    entering, out = graphs.pop()
                    assert gradient is not None
                    gradient, found = _differentiate(out, gradient, entering, leaves[index])
                    del out, entering
                    take(index, model.layers[index], found)
        for index in reversed(range(len(leaves))):
            done(index, model.layers[index])

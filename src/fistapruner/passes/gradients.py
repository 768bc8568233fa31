"""Take a gradient back through a model, the way that hidden states went in :mod:`.stream`.

One decoder layer after the other is loaded, from the last to the first, and runs again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor, nn

from ..models.layers import LayerwiseModel
from ..runtime.numerics import ordered_attention
from .store import HiddenStates
from .stream import Calls, Progress

VisitBack = Callable[[int, nn.Module], AbstractContextManager[Callable[[Tensor], None]]]
"""As :data:`~.stream.Visit`; receives of each batch the gradient (batch, seqlen, width) at the layer's output."""


def backward(
    model: LayerwiseModel,
    states: list[HiddenStates],
    calls: Calls,
    gradient: HiddenStates,
    visit: VisitBack | None = None,
    progress: Progress = lambda done, total: None,
) -> None:
    """Take a gradient back through the whole model, from the last decoder layer to the first.

    Every layer is loaded and run again with gradients, so that one layer's activations are in memory at a time.

    Args:
        model: the model.
        states: hidden states that enter each layer (:func:`~.stream.forward` with ``keep``, less the last ones). They
            are closed one after the other.
        calls: how decoder layers are called.
        gradient: with respect to the output of the last layer; overwritten by that with respect to the input of the
            first.
        visit: called for every decoder layer; its hooks may watch the gradients inside.
        progress: receives the number of layers done.
    """
    for index in reversed(range(len(model))):
        entering = states.pop()
        with ExitStack() as visits:
            with model.layer(index) as layer:
                receive = None if visit is None else visits.enter_context(visit(index, layer))
                visits.enter_context(ordered_attention(model.device))
                for start, stop in calls.batches(entering.samples):
                    hidden = entering.read(start, stop, model.device)
                    above = gradient.read(start, stop, model.device)
                    if receive is not None:
                        receive(above)
                    wanted = hidden.requires_grad_()
                    with torch.enable_grad():
                        out = model.run(index, hidden, calls.by_size[stop - start][index])
                    gradient.write(start, torch.autograd.grad(out, wanted, above)[0])
                    del out
            entering.close()
        progress(len(model) - index, len(model))

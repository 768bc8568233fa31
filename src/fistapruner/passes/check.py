"""Check that a model run layer by layer predicts what it predicts in one forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.layers import Call, LayerwiseModel
from .store import scratch_factory
from .stream import embed, run_layer

CHECK_TOKENS = 16
"""Tokens in the window on which :func:`check_model` compares logits."""

_COMPARED: set[str] = set()
"""Architectures whose logits were compared in this process."""


def check_model(model: LayerwiseModel) -> None:
    """Compare the logits of one short window, run layer by layer, with the model's own.

    In each process once for all models with this config. Other hidden states go through every layer before those that
    are compared: so what a layer keeps from pass to pass shows, and what it leaves for later layers. In no layer may
    the output of the first token depend on later tokens.

    Raises:
        FistaPrunerError: the architecture is not supported; says why.
    """
    model.check()
    architecture = model.architecture()
    if architecture in _COMPARED:
        return
    tokens = model.check_window(CHECK_TOKENS)
    tolerance = max(1e-5, 4 * torch.finfo(model.dtype).eps)
    with model.failures_explained():
        own = model.own_logits(tokens)
        states = scratch_factory(None, model.dtype, model.device)("hidden", (2, tokens.shape[1], model.width))
        calls = embed(model, torch.cat([tokens.flip(1), tokens]), 1, states)
        largest = 0.0
        for index in range(len(model)):
            with model.layer(index):
                entering = states.read(1, 2, model.device)
                run_layer(model, index, states, calls, output=states)
                largest = max(largest, _change_with_later(model, index, entering, calls.by_size[1][index]))
        with model.embeddings_and_head():
            ours = model.logits(states.read(1, 2, model.device), torch.zeros_like(tokens))
        # Damaged weights are found later.
        own, ours = (logits.float().nan_to_num(0.0, 0.0, 0.0) for logits in (own, ours))
        difference, size = float((own - ours).norm()), float(own.norm())
        if not difference <= tolerance * size:
            raise model.unsupported(
                "run layer by layer it predicts otherwise than in one forward pass "
                f"(its logits differ by {difference / size:.2g} of their size)"
            )
        if largest > tolerance:
            raise model.unsupported("its predictions of a token depend on later tokens (bidirectional attention)")
    _COMPARED.add(architecture)


def _change_with_later(model: LayerwiseModel, index: int, hidden: Tensor, call: Call) -> float:
    """Measure how a decoder layer's output of the first token changes with the sign of later ones.

    What enters of the first token is made small, so that it does not hide in its rounding what the layer adds to it.
    """
    first = hidden.clone()
    first[:, 0] /= 64
    other = -first
    other[:, 0] = first[:, 0]
    with torch.no_grad():
        ours, others = (
            model.run(index, states, call)[0, 0].float().nan_to_num(0.0, 0.0, 0.0) for states in (first, other)
        )
    return float((ours - others).norm()) / max(float(ours.norm()), torch.finfo(torch.float32).tiny)

"""Choose heads and channels as GOA does (Li, Dong and Lei 2025, CPAL, arXiv 2407.19126).

A module is a group of operators that read hidden states (level 1: queries, keys and values, or gate and up) and the
operator that reads what they write (level 2: o or down). Its operators are first fitted to the dense model's outputs,
level 1, then level 2 on the new inputs (:func:`.refitted`). On the fitted weights two criteria choose:

A. Heads whose attention probabilities are alike: one of two goes (:class:`HeadDivergence`, :func:`redundant`).
B. MLP channels that can add little to the outputs (:func:`channel_criterion`).

Nothing is fitted after the removal, unless ``compensate: refit`` asks for it.

Differs from the paper in:

1. A number of heads is asked for, where the paper has a threshold: pairs of heads come in the order of their
   divergence. So there are always enough candidates, and none are taken by criterion B.
2. Key/value groups go as a whole. The divergence of two is the mean over the best assignment of their query heads.
3. The paper fits to texts of the downstream tasks; here the calibration text is all there is. The paper's exact solve
   has no damping; here it has 1 % of the mean diagonal.
4. Modules that lose nothing are not fitted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..activations.store import HiddenStates
from ..errors import FistaPrunerError
from ..models.layerwise import LayerwiseModel

DAMPING = 0.01
"""Damping of the reconstruction, as a share of the mean diagonal of the Gram."""

WINDOWS = 16
"""Calibration windows on which attention probabilities are compared, at most: the paper's number."""


class HeadDivergence:
    """Mean Jensen-Shannon divergence between the attention probabilities of all pairs of heads."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._rows = 0

    def add(self, probabilities: Tensor) -> None:
        """Add (windows, heads, queries, keys) attention probabilities."""
        for window in probabilities.float():
            entropy = torch.special.entr(window).sum(-1)
            found = torch.zeros(len(window), len(window), dtype=torch.float64, device=window.device)
            for head in range(len(window) - 1):
                others = slice(head + 1, None)
                middle = torch.special.entr((window[others] + window[head]) / 2).sum(-1)
                divergence = middle - (entropy[others] + entropy[head]) / 2
                found[head, others] = divergence.clamp_min(0).sum(-1, dtype=torch.float64)
            self._sum = found if self._sum is None else self._sum + found
            self._rows += window.shape[1]

    def matrix(self) -> Tensor:
        """Return (heads, heads) fp64 divergences in nats, symmetric, at most ln 2."""
        assert self._sum is not None
        mean = self._sum.cpu() / self._rows
        return mean + mean.T


def group_divergence(divergence: Tensor, repeats: int) -> Tensor:
    """Compute the divergence of key/value groups: the mean over the best assignment of their query heads.

    Args:
        divergence: (heads, heads) of the query heads.
        repeats: consecutive query heads of a group.

    Returns:
        (groups, groups) fp64, symmetric, zero on the diagonal.
    """
    from scipy.optimize import linear_sum_assignment  # half a second that other runs need not wait

    groups = len(divergence) // repeats
    found = torch.zeros(groups, groups, dtype=torch.float64)
    for first in range(groups):
        for second in range(first + 1, groups):
            block = divergence[first * repeats : (first + 1) * repeats, second * repeats : (second + 1) * repeats]
            rows, columns = linear_sum_assignment(block.numpy())
            found[first, second] = found[second, first] = float(block[rows, columns].mean())
    return found


def redundant(divergence: Tensor, count: int) -> list[int]:
    """Choose ``count`` heads, or groups, that others represent.

    Of the two most alike, of which neither goes yet, the first one goes; then of the next two.

    Args:
        divergence: (n, n) symmetric.
        count: how many go, less than all.
    """
    size = len(divergence)
    pairs = sorted((float(divergence[i, j]), i, j) for i in range(size) for j in range(i + 1, size))
    gone: list[int] = []
    for _, first, second in pairs:
        if len(gone) == count:
            break
        if first not in gone and second not in gone:
            gone.append(first)
    return gone


def channel_criterion(consumer: Tensor, producers: Sequence[Tensor], moment: Tensor) -> Tensor:
    """Compute criterion B of MLP channels.

    It is the product over the producers of ``||B_j||^2 a_j S a_j^T / 2``, with column j of the consumer and row j of
    the producer. The paper prints another index of B in one place; its derivation has column j.

    Args:
        consumer: (m, channels) weights B.
        producers: (channels, n) weights A of each operator that writes the channels (gate and up).
        moment: (n, n) uncentred second moment S of the producers' inputs.

    Returns:
        (channels,) fp64.
    """
    norms = consumer.double().square().sum(0)
    moment = moment.double()
    found = torch.ones_like(norms)
    for producer in producers:
        rows = producer.double()
        found *= norms * ((rows @ moment) * rows).sum(1) / 2
    return found


@contextmanager
def eager_attention(model: LayerwiseModel) -> Iterator[None]:
    """Let the model compute attention probabilities, which faster programs do not have."""
    before = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def attention_probabilities(
    model: LayerwiseModel, index: int, consumer: str, seqlen: int, hidden: Iterable[Tensor]
) -> Iterator[Tensor]:
    """Yield the attention probabilities of some windows in the loaded decoder layer ``index``.

    Args:
        model: the model, layer ``index`` loaded.
        index: number of the layer.
        consumer: name inside the layer of the operator that reads the heads.
        seqlen: tokens in a window.
        hidden: (1, seqlen, width) hidden states that enter the layer, of each window.

    Yields:
        (1, heads, queries, keys).

    Raises:
        FistaPrunerError: the attention does not return probabilities.
    """
    attention = model.layers[index].get_submodule(consumer.rpartition(".")[0])
    found: list[Tensor] = []

    def keep(_: object, __: object, output: object) -> None:
        parts = output if isinstance(output, (tuple, list)) else ()
        found.extend(part for part in parts if isinstance(part, Tensor) and part.ndim == 4)

    with attention.register_forward_hook(keep), eager_attention(model), torch.no_grad():
        with model.embeddings_and_head(head=False):
            call = model.calls(1, seqlen)[index]
        for states in hidden:
            found.clear()
            model.run(index, states, call)
            if len(found) != 1 or found[0].shape[-2:] != (seqlen, seqlen):
                raise FistaPrunerError(
                    f"structure: {model.layers_name}.{index} does not return attention probabilities, which goa "
                    "compares heads by: take another --structure-method"
                )
            yield found[0]


def head_divergence(model: LayerwiseModel, index: int, consumer: str, inputs: HiddenStates) -> Tensor:
    """Measure the divergence between all query heads of the loaded decoder layer ``index``.

    Args:
        model, index, consumer: as for :func:`attention_probabilities`.
        inputs: hidden states that enter the layer; the first :data:`WINDOWS` of them are taken.

    Returns:
        (heads, heads) fp64.
    """
    sums = HeadDivergence()
    states = (inputs.read(window, window + 1, model.device) for window in range(min(WINDOWS, inputs.samples)))
    for probabilities in attention_probabilities(model, index, consumer, inputs.seqlen, states):
        sums.add(probabilities)
    return sums.matrix()

"""Score the input channels of an operator, without looking at how the others could make up for them."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..core import LayerProblem


def channel_scores(method: Literal["energy", "flap", "magnitude"], problem: LayerProblem, mean: Tensor) -> Tensor:
    """Compute the importance of each input channel: the sum over the outputs of what it adds to them.

    ``magnitude`` is the squared norm of the channel's weights. ``energy`` is times the mean square of the channel: the
    exact energy of what it adds to the outputs. ``flap`` is times the channel's variance instead (FLAP's WIFV, An et
    al. 2024, AAAI; computed exactly, while its program forgets the first batch).

    Args:
        method: ``magnitude``, ``energy`` or ``flap``.
        problem: the layer problem.
        mean: (n,) mean of the inputs over tokens.

    Returns:
        (n,) fp64.
    """
    norms = problem.weight.double().square().sum(0)
    if method == "magnitude":
        return norms
    squares = problem.gram.diagonal().double()
    return norms * (squares - mean.double().square() if method == "flap" else squares).clamp_min(0)

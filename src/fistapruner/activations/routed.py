"""Keep what enters the experts of a decoder layer, and read the tokens of one expert after the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .store import HiddenStates


class RoutedTokens:
    """Inputs of the experts of one mixture, of all calibration windows, and where each token was routed.

    The inputs are stored once, whatever the number of experts; what the router has chosen is small and stays in memory.

    Args:
        inputs: the store; it is closed with this object.
    """

    def __init__(self, inputs: HiddenStates) -> None:
        self._inputs = inputs
        self._batches: list[tuple[int, int, Tensor]] = []

    def keep(self, start: int, inputs: Tensor, chosen: Tensor) -> None:
        """Keep a batch of windows from ``start`` on.

        Args:
            start: first window.
            inputs: (tokens, n) inputs of the experts.
            chosen: (tokens, k) the experts of each token.
        """
        windows = len(inputs) // self._inputs.seqlen
        self._inputs.write(start, inputs.reshape(windows, self._inputs.seqlen, -1))
        self._batches.append((start, start + windows, chosen.to("cpu", torch.int32)))

    def of_expert(self, number: int, device: torch.device) -> Iterator[Tensor]:
        """Yield the (tokens, n) inputs of expert ``number``, batch by batch, in the order of the tokens."""
        for start, stop, chosen in self._batches:
            rows = (chosen == number).any(1).nonzero().flatten()
            if len(rows):
                yield self._inputs.tokens(start, stop, rows, device)

    def close(self) -> None:
        """Release the stored inputs."""
        self._inputs.close()

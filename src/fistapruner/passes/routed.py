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
        self._batches: list[tuple[int, int, Tensor, Tensor]] = []

    def keep(self, start: int, inputs: Tensor, chosen: Tensor, weights: Tensor) -> None:
        """Keep a batch of windows from ``start`` on.

        Args:
            start: first window.
            inputs: (tokens, n) inputs of the experts.
            chosen: (tokens, k) the experts of each token.
            weights: (tokens, k) their weights.
        """
        windows = len(inputs) // self._inputs.seqlen
        self._inputs.write(start, inputs.reshape(windows, self._inputs.seqlen, -1))
        self._batches.append((start, start + windows, chosen.to("cpu", torch.int32), weights.to("cpu", torch.float32)))

    def weighted(self, number: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the (tokens, n) inputs of an expert and their (tokens,) weights, batch by batch, in order."""
        for start, stop, chosen, weights in self._batches:
            rows, places = torch.where(chosen == number)
            if len(rows):
                yield self._inputs.tokens(start, stop, rows, device), weights[rows, places].to(device)

    def by_half(self, number: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """Yield the first window of each batch, which is cut at half of the windows, and the inputs."""
        half = self._inputs.samples // 2
        for start, stop, chosen, _ in self._batches:
            rows, _ = torch.where(chosen == number)
            before = rows < (half - start) * self._inputs.seqlen
            for first, part in ((start, rows[before]), (max(start, half), rows[~before])):
                if len(part):
                    yield first, self._inputs.tokens(start, stop, part, device)

    def close(self) -> None:
        """Release the stored inputs."""
        self._inputs.close()

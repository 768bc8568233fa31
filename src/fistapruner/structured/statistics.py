"""Gather what is known of the input channels of an operator, batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import ProblemSums
from ..core.sums import DriftFrom, mirror
from .removal import ChannelStatistics
from .shrinkage import problem_without_tokens


class ChannelSums:
    """The sums of a layer problem, the means of its inputs, and both of the first half of the windows.

    Windows are drawn at random, so the two halves are samples of the same text. A batch that has windows of both is
    cut, so the halves do not depend on the batch size.

    Args:
        weight: (m, n) dense weights of the operator.
        windows: calibration windows in all.
        drift_from: as for :class:`~fistapruner.core.ProblemSums`.
        routed: it reads the tokens of one expert, perhaps few or none.
    """

    def __init__(
        self, weight: Tensor, windows: int, *, drift_from: DriftFrom | None = None, routed: bool = False
    ) -> None:
        self._sums = ProblemSums(weight, drift_from=drift_from)
        self._routed = routed
        self._half = windows // 2
        self._total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
        self._first: tuple[Tensor, Tensor, int] | None = None
        self._drift = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
        self._compared = 0

    def add(self, start: int, inputs: Tensor, dense: Tensor | None = None, residual: Tensor | None = None) -> None:
        """Add a batch of windows.

        Args:
            start: number of its first window; batches come in order.
            inputs: (windows, seqlen, n).
            dense: as for :meth:`~fistapruner.core.ProblemSums.add`, by tokens.
            residual: likewise.
        """
        before = self._half - start
        if 0 < before < len(inputs):
            cut = before * inputs.shape[1]
            first, second = [(None, None) if part is None else (part[:cut], part[cut:]) for part in (dense, residual)]
            self.add(start, inputs[:before], first[0], second[0])
            self.add(start + before, inputs[before:], first[1], second[1])
            return
        self.add_tokens(start, inputs.reshape(-1, inputs.shape[-1]), dense, residual)

    def add_tokens(self, start: int, flat: Tensor, dense: Tensor | None = None, residual: Tensor | None = None) -> None:
        """Add (tokens, n) inputs of windows that are all in one half, from ``start`` on.

        The other arguments are those of :meth:`add`.
        """
        if start >= self._half > 0 and self._first is None:
            self._first = self._sums.gram.clone(), self._total.clone(), self._sums.tokens
        self._total += flat.sum(0, dtype=torch.float64)
        self._sums.add(flat, dense, residual)
        if dense is not None and self._sums.drift_from == "outputs":
            seen = self._sums.weight.double() @ flat.sum(0, dtype=torch.float64)
            self._drift += dense.sum(0, dtype=torch.float64) - seen
            self._drift += 0 if residual is None else residual.sum(0, dtype=torch.float64)
            self._compared += len(flat)

    def statistics(self, name: str, target: float) -> ChannelStatistics:
        """Return the statistics of all windows; the sums are used up.

        Args:
            name: full name of the operator.
            target: share of the dense target.
        """
        sums, halves, half_means = self._sums, None, None
        mean = self._total / max(sums.tokens, 1)
        if not sums.tokens and self._routed:
            problem = problem_without_tokens(sums.weight, name)
            return ChannelStatistics(problem, mean, None, tokens=0)
        first, self._first = self._first, None
        if first is not None and 0 < first[2] < sums.tokens:
            gram, total, tokens = first
            rest = mirror((sums.gram - gram).div_(sums.tokens - tokens))
            halves = mirror(gram.div_(tokens)), rest
            half_means = total / tokens, (self._total - total) / (sums.tokens - tokens)
        problem = sums.problem(name, target, release=True)
        drift_mean = target * self._drift / self._compared if self._compared else None
        tokens_routed = sums.tokens if self._routed else None
        return ChannelStatistics(problem, mean, halves, drift_mean, half_means, tokens_routed)

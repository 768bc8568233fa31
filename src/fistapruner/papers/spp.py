"""SPP: sparsity-preserved parameter-efficient fine-tuning (Lu et al., ICML 2024, arXiv 2405.16057).

Every surviving weight is multiplied with a learnt factor of low rank, so zeros stay zeros, and the factor is merged
into the weight at the end (equation 3 and section 3.2):

    W * (1 + c b A_q),    A (r, n), b (m, 1), start A as LoRA's and b = 0.

``A_q`` of output i is the row ``q = floor(i r / m)`` of A: the outputs are cut into r blocks that share a row.

Differences:

1. The paper asks for m divisible by r; here the blocks of outputs differ by one where it is not.
2. The learning rate is chosen by the size of the first step: an Adam step moves an entry of b by the rate, and A's mean
   magnitude is ``0.5 / sqrt(n)``, so ``4e-4 sqrt(n) / (0.5 c)`` changes a weight by 0.04 % of itself.
   The recipe ``spp`` takes the program's rate, schedule and optimizer instead.
3. The program's dropout of 0.05 is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..training.loop import Descent
from ..training.masked import Form, uniform

PUBLISHED = Descent(warm_up=0.03, fall="linear", goes_back=False, betas=(0.9, 0.999), decay=0.001)
"""The optimizer of the published program, which ``as_published: true`` takes."""

FIRST_CHANGE = 4e-4
"""Relative change of a weight that the first step aims at (measured on SmolLM2-135M)."""


@dataclass(frozen=True)
class Spp(Form):
    """The form of SPP.

    Args:
        rank: r blocks of consecutive outputs; at most min(m, n) are used.
        scale: c.
    """

    rank: int
    scale: float

    def start(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Make A and b."""
        return {"A": uniform(min(self.rank, *weight.shape), weight, generator), "b": weight.new_zeros(len(weight), 1)}

    def weight(self, weight: Tensor, masters: Mapping[str, Tensor]) -> Tensor:
        """Rescale the pruned weight."""
        a, b = masters["A"], masters["b"]
        rows = torch.arange(len(b), device=b.device) * len(a) // len(b)
        return weight.to(b.dtype) * (1 + self.scale * b * a[rows])

    def rate(self, columns: int) -> float | None:
        """Return the rate whose first step changes a weight by :data:`FIRST_CHANGE` of itself."""
        return FIRST_CHANGE * math.sqrt(columns) / (0.5 * self.scale)

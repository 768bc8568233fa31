"""Define forms: the effective weight of a pruned operator as a function of trained tensors.

A form maps the pruned weight W (m, n), its mask M and trained tensors to the effective weight of the passes. At the
start of training the effective weight is W itself, bit for bit.

=======  =========================  ==================================  =================================
form     effective weight           trained                             start
=======  =========================  ==================================  =================================
dense    V * M                      V (m, n)                            W
full     scatter(v; M)              v, the surviving weights            W[M]
lora     W + c (BA) * M             A (r, n), B (m, r)                  A uniform in +-1/sqrt(n), B = 0
hira     W * (1 + BA)               A (r, n), B (m, r)                  as lora
spp      W * (1 + c b A_q)          A (r, n), b (m, 1)                  A as lora, b = 0
=======  =========================  ==================================  =================================

``A_q`` of output i is the row ``q = floor(i r / m)`` of A, so spp is hira with ``B_iq = c b_i``. Sources: masked LoRA
is in PERP (arXiv 2312.15230), SQFT (2410.03750) and LoRS (2501.08582); spp is SPP (2405.16057); hira is HiRA (Huang et
al. 2025). Differences:

1. SPP asks for m divisible by r; here the blocks of outputs differ by one where it is not.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..recipes.training_settings import TrainingRecipe
from ..runtime.numerics import exact_products

ITSELF = ""
"""Short name of a trained tensor that stands for the weight itself."""


class Form(ABC):
    """Interface of a form.

    Attributes:
        names: short names of the trained tensors.
    """

    names: ClassVar[tuple[str, ...]]

    @abstractmethod
    def start(self, weight: Tensor, mask: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Make the trained tensors at the start.

        Args:
            weight: (m, n) pruned weight, fp32.
            mask: (m, n), where ``weight`` is not zero.
            generator: of the CPU, for random values.

        Returns:
            fp32 tensors by short name, on the weight's device, none of them a view of ``weight``.
        """

    @abstractmethod
    def weight(self, weight: Tensor, mask: Tensor, trained: Mapping[str, Tensor]) -> Tensor:
        """Compute the (m, n) effective weight, in the dtype of the trained tensors and differentiable.

        Args:
            weight: (m, n) pruned weight, of any dtype.
            mask: (m, n), where ``weight`` is not zero.
            trained: by short name.
        """

    def gradients(
        self, weight: Tensor, mask: Tensor, trained: Mapping[str, Tensor], above: Tensor
    ) -> dict[str, Tensor]:
        """Compute the fp32 gradients with respect to the trained tensors.

        Args:
            weight, mask, trained: as for :meth:`weight`.
            above: (m, n) gradient with respect to the effective weight, of any dtype.
        """
        with torch.enable_grad():
            effective = self.weight(weight, mask, trained)
        with exact_products():
            found = torch.autograd.grad(effective, list(trained.values()), above.to(effective.dtype))
        return dict(zip(trained, found, strict=True))

    @abstractmethod
    def numbers(self, rows: int, columns: int, survivors: int) -> int:
        """Count the trained numbers of an (m, n) operator with so many surviving weights."""


@dataclass(frozen=True)
class WholeMatrix(Form):
    """The whole matrix, masked in the forward pass.

    Three times the memory of ``full`` at half of the weights; block reconstruction uses it, since torch's fused Adam
    gives other bits on another layout.
    """

    names: ClassVar = (ITSELF,)

    def start(self, weight: Tensor, mask: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {ITSELF: weight.clone()}

    def weight(self, weight: Tensor, mask: Tensor, trained: Mapping[str, Tensor]) -> Tensor:
        return trained[ITSELF] * mask

    def numbers(self, rows: int, columns: int, survivors: int) -> int:
        return rows * columns


@dataclass(frozen=True)
class Full(Form):
    """Every surviving weight, as one vector in row-major order of (m, n)."""

    names: ClassVar = (ITSELF,)

    def start(self, weight: Tensor, mask: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {ITSELF: weight.flatten().index_select(0, _places(mask))}

    def weight(self, weight: Tensor, mask: Tensor, trained: Mapping[str, Tensor]) -> Tensor:
        flat = torch.zeros(weight.numel(), dtype=trained[ITSELF].dtype, device=weight.device)
        return flat.index_copy_(0, _places(mask, len(trained[ITSELF])), trained[ITSELF]).view(weight.shape)

    def gradients(
        self, weight: Tensor, mask: Tensor, trained: Mapping[str, Tensor], above: Tensor
    ) -> dict[str, Tensor]:
        places = _places(mask, len(trained[ITSELF]))
        return {ITSELF: above.flatten().index_select(0, places).float()}

    def numbers(self, rows: int, columns: int, survivors: int) -> int:
        return survivors


@dataclass(frozen=True)
class _LowRank(Form):
    """A form whose trained tensors are the factors A and B of a low-rank matrix."""

    names: ClassVar = ("A", "B")

    rank: int

    def start(self, weight: Tensor, mask: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        m, n = weight.shape
        rank = min(self.rank, m, n)
        return {"A": _uniform(rank, weight, generator), "B": weight.new_zeros(m, rank)}

    def numbers(self, rows: int, columns: int, survivors: int) -> int:
        return min(self.rank, rows, columns) * (rows + columns)


@dataclass(frozen=True)
class Lora(_LowRank):
    """A masked low-rank change.

    Args:
        rank: r; at most min(m, n) is used.
        scale: c.
    """

    scale: float

    def weight(self, weight: Tensor, mask: Tensor, trained: Mapping[str, Tensor]) -> Tensor:
        change = _product(trained)
        return torch.addcmul(weight.to(change.dtype), change, mask.to(change.dtype), value=self.scale)


@dataclass(frozen=True)
class Hira(_LowRank):
    """A low-rank factor of each surviving weight.

    Args:
        rank: r; at most min(m, n) is used.
    """

    def weight(self, weight: Tensor, mask: Tensor, trained: Mapping[str, Tensor]) -> Tensor:
        change = _product(trained)
        return weight.to(change.dtype) * (1 + change)

    def as_hira(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return A and B of the same effective weight as :class:`Hira`."""
        return dict(trained)


@dataclass(frozen=True)
class Spp(Hira):
    """Hira with one number an output: ``B = c diag(b)`` times the indicator of r blocks of outputs.

    Args:
        rank: r blocks of consecutive outputs; at most min(m, n) are used.
        scale: c.
    """

    names: ClassVar = ("A", "b")

    scale: float

    def start(self, weight: Tensor, mask: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        m, n = weight.shape
        return {"A": _uniform(min(self.rank, m, n), weight, generator), "b": weight.new_zeros(m, 1)}

    def weight(self, weight: Tensor, mask: Tensor, trained: Mapping[str, Tensor]) -> Tensor:
        return super().weight(weight, mask, self.as_hira(trained))

    def as_hira(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rank, m = len(trained["A"]), len(trained["b"])
        blocks = torch.arange(m, device=trained["b"].device) * rank // m
        indicator = torch.nn.functional.one_hot(blocks, rank).to(trained["b"].dtype)
        return {"A": trained["A"], "B": self.scale * trained["b"] * indicator}

    def numbers(self, rows: int, columns: int, survivors: int) -> int:
        return min(self.rank, rows, columns) * columns + rows


def form_of(recipe: TrainingRecipe) -> Form | None:
    """Return the form of the operators that a recipe trains; None for norms and biases only."""
    forms: dict[str, Form | None] = {
        "lora": Lora(recipe.rank, recipe.scale),
        "full": Full(),
        "spp": Spp(recipe.rank, recipe.scale),
        "hira": Hira(recipe.rank),
        "norms": None,
    }
    return forms[recipe.parameters]


def _places(mask: Tensor, count: int | None = None) -> Tensor:
    """Return the places of True in row-major order.

    Numpy finds them ten times faster than torch on a CPU. On a GPU the host waits for their number, unless ``count``
    says it.
    """
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    if count is not None:
        return torch.nonzero_static(mask.flatten(), size=count).squeeze(1)
    return mask.flatten().nonzero().squeeze(1)


def _product(trained: Mapping[str, Tensor]) -> Tensor:
    """Compute BA (m, n) in full precision, so that the weight is the same wherever it is computed."""
    with exact_products():
        return trained["B"] @ trained["A"]


def _uniform(rank: int, weight: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a (rank, n) matrix uniform in +-1/sqrt(n)."""
    n = weight.shape[1]
    drawn = torch.rand(rank, n, generator=generator).mul_(2).sub_(1).div_(math.sqrt(n))
    return drawn.to(weight)


SHARE = 5e-4
"""First step size of ``full``, ``norms`` and vectors, as a share of a tensor's root mean square at the start.

Measured with ``full`` on SmolLM2-135M, one window a step: 2e-3 is too high, 4e-4 and 5e-4 are equally good
(docs/recovery.md).
"""

LORA_RATE = 2e-3
"""First learning rate of ``lora`` (measured on SmolLM2-135M: docs/recovery.md)."""

FIRST_CHANGE = 4e-4
"""Relative change of a weight that the first step of ``spp`` and ``hira`` aims at (measured: docs/recovery.md)."""

ZEROTH_FULL, ZEROTH_LOW_RANK = 1e-6, 1e-4
"""First learning rates without gradients: of weights and vectors, and of low-rank tensors (MeZO's code)."""


def first_rate(recipe: TrainingRecipe, columns: int | None, width: int, rms: float) -> float:
    """Compute the first learning rate of a trained tensor: the one place where rates come from.

    ``lr: auto`` is, for AdamW, a step in absolute units for low-rank tensors: 2e-3 for lora; for spp and hira such that
    the first step changes a weight by :data:`FIRST_CHANGE` of itself, since an Adam step moves each entry of b or B by
    lr, and A's mean magnitude is ``0.5 / sqrt(n)``: ``4e-4 sqrt(n) / (0.5 c)`` for spp (0.01 at n = 576), and
    ``4e-4 sqrt(n) / (0.5 sqrt(r))`` for hira, which sums r terms. For weights themselves and for vectors it is
    :data:`SHARE` of the tensor's root mean square.

    An alignment takes :attr:`~fistapruner.recipes.training_settings.TrainingRecipe.rate_share` of these.

    A given ``lr`` in the unit ``auto`` is, for AdamW, absolute for low-rank tensors and a share for weights and
    vectors; vectors beside low-rank tensors take the share that stands to :data:`SHARE` as ``lr`` to the automatic
    rate. In the units ``absolute`` and ``share`` it holds for all tensors alike; a share of low-rank tensors is one of
    A's root mean square at the start.

    Without gradients rates are MeZO's, absolute for all tensors: ``lr: auto`` is :data:`ZEROTH_FULL` or
    :data:`ZEROTH_LOW_RANK`, and a given ``lr`` in the unit ``auto`` is absolute.

    Args:
        recipe: settings.
        columns: n of a low-rank tensor's operator; None for surviving weights and vectors.
        width: n of a typical operator, where vectors follow low-rank tensors.
        rms: root mean square of the tensor's values that are not zero, at the start; of A for low-rank tensors.
    """
    low_rank = recipe.parameters not in ("full", "norms")
    unit = recipe.lr_unit
    if recipe.zeroth_order:
        if recipe.lr == "auto":
            return ZEROTH_FULL if columns is None else ZEROTH_LOW_RANK
        return recipe.lr * rms if unit == "share" else recipe.lr

    def automatic(n: int) -> float:
        if recipe.parameters == "spp":
            return FIRST_CHANGE * math.sqrt(n) / (0.5 * recipe.scale)
        if recipe.parameters == "hira":
            return FIRST_CHANGE * math.sqrt(n) / (0.5 * math.sqrt(recipe.rank))
        return LORA_RATE

    if recipe.lr == "auto":
        return recipe.rate_share * (SHARE * rms if columns is None else automatic(columns))
    if unit == "absolute" or (unit == "auto" and columns is not None):
        return recipe.lr
    if unit == "auto" and low_rank:
        return recipe.lr / automatic(width) * SHARE * rms
    return recipe.lr * rms

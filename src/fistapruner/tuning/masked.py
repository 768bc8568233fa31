"""Train parameters with every zero kept: fp32 masters, frozen masks, lossless round trip.

The mask of a pruned tensor is taken once, from the weights that training starts with. A master is the fp32 value of a
tensor; the forward pass uses ``master * mask``, so gradients of pruned weights are zero and any step of an optimizer
leaves them zero. Values go back into the tensors they came from, rounded; an unchanged value goes back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

Rounding = Callable[[str, Tensor], Tensor]
"""Round the named tensor to the precision in which it will be stored."""


class MaskedParameters:
    """Trainable fp32 copies of named tensors, some of which keep their zeros.

    Works for the parameters of one decoder layer as for any other named set of tensors of a model.

    Args:
        tensors: start values by name, all of one floating-point dtype, on one device. They are only read until
            :meth:`write`, and give the dtype of the forward pass.
        pruned: names of the tensors whose zeros are kept.

    Raises:
        ValueError: a pruned name is not among the tensors.
    """

    def __init__(self, tensors: Mapping[str, Tensor], pruned: Collection[str] = ()) -> None:
        unknown = sorted(set(pruned) - set(tensors))
        if unknown:
            raise ValueError(f"pruned: {unknown[0]!r} is not one of the {len(tensors)} tensors")
        self._tensors = dict(tensors)
        self.masters = {name: tensor.detach().float().clone().requires_grad_() for name, tensor in tensors.items()}
        self.masks = {name: tensors[name].detach() != 0 for name in tensors if name in pruned}

    def root_mean_squares(self) -> list[float]:
        """Root mean square of each master over its values that are not zero, in order."""
        return [
            float((master.detach().square().sum() / (master != 0).sum().clamp_min(1)).sqrt())
            for master in self.masters.values()
        ]

    def values(self) -> dict[str, Tensor]:
        """Return the tensors as the forward pass uses them: masked, in its dtype, differentiable."""
        return {
            name: (master * self.masks[name] if name in self.masks else master).to(self._tensors[name].dtype)
            for name, master in self.masters.items()
        }

    def copy(self) -> list[Tensor]:
        """Copy the masters, for :meth:`restore`."""
        return [master.detach().clone() for master in self.masters.values()]

    @torch.no_grad()
    def restore(self, copied: Sequence[Tensor]) -> None:
        """Set the masters to what :meth:`copy` returned."""
        for master, value in zip(self.masters.values(), copied, strict=True):
            master.copy_(value)

    @torch.no_grad()
    def write(self, rounding: Rounding = lambda name, value: value) -> None:
        """Write the values into the tensors that they started from.

        A surviving weight that rounds to zero keeps its start value, so the mask stays what it was.

        Args:
            rounding: precision of the checkpoint, where that is lower than the tensors' own.
        """
        for name, exact in self.values().items():
            tensor = self._tensors[name]
            value = rounding(name, exact).to(tensor.dtype)
            if name in self.masks:
                value = torch.where(self.masks[name] & (value == 0), tensor, value)
            tensor.copy_(value)

"""Train parameters with every zero kept: fp32 masters, frozen masks, lossless round trip.

The mask of a pruned tensor is taken from the weights that training starts with, never from trained ones. A master is an
fp32 tensor that is trained; a form (:mod:`fistapruner.tuning.forms`) makes the effective weight from the masters of a
pruned tensor, zero wherever the mask is. Values go back into the tensors they came from, or to a checkpoint, rounded;
an unchanged value goes back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from .forms import ITSELF, Form, WholeMatrix

Rounding = Callable[[str, Tensor], Tensor]
"""Round the named tensor to the precision in which it will be stored."""


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(0)


class MaskedParameters:
    """Trainable fp32 masters of named tensors, some of which keep their zeros.

    Works for the parameters of one decoder layer as for any other named set of tensors of a model.

    Attributes:
        masters: trained leaves by name; of a pruned tensor by its name, a dot and the form's short name, or by its name
            alone where the form trains the weight itself.
        origin: name of the tensor that a master belongs to.
        masks: where pruned tensors are not zero, as (m, n) matrices (see ``transposed``).

    Args:
        tensors: start values by name, on one device. They are only read until :meth:`write`, and give the dtypes of the
            forward pass.
        pruned: names of the tensors whose zeros are kept.
        form: of the pruned tensors; None is :class:`~fistapruner.tuning.forms.WholeMatrix`.
        transposed: pruned names that are stored as (n, m).
        masters: trained values by the names of :attr:`masters`, on the same device, not copied; tensors that are not in
            it start anew.
        generator: makes the generator of a tensor's random start values from its name.

    Raises:
        ValueError: a pruned name is not among the tensors.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        pruned: Collection[str] = (),
        form: Form | None = None,
        *,
        transposed: Collection[str] = (),
        masters: Mapping[str, Tensor] | None = None,
        generator: Callable[[str], torch.Generator] = _generator,
    ) -> None:
        unknown = sorted(set(pruned) - set(tensors))
        if unknown:
            raise ValueError(f"pruned: {unknown[0]!r} is not one of the {len(tensors)} tensors")
        self.form = form or WholeMatrix()
        self._tensors = dict(tensors)
        self._transposed = set(transposed)
        self.masks = {name: self._matrix(name, tensors[name].detach()).bool() for name in tensors if name in pruned}
        self.masters: dict[str, Tensor] = {}
        self.origin: dict[str, str] = {}
        self._short: dict[str, dict[str, str]] = {}
        for name, tensor in tensors.items():
            shorts = self.form.names if name in self.masks else (ITSELF,)
            keys = {short: f"{name}.{short}" if short else name for short in shorts}
            start = {} if masters is None else {short: masters[key] for short, key in keys.items() if key in masters}
            if len(start) < len(keys):
                exact = tensor.detach().float()
                if name in self.masks:
                    start = self.form.start(self._matrix(name, exact), self.masks[name], generator(name))
                else:
                    start = {ITSELF: exact.clone()}
            for short, key in keys.items():
                self.masters[key] = start[short].detach().requires_grad_()
                self.origin[key] = name
            self._short[name] = keys

    def _matrix(self, name: str, tensor: Tensor) -> Tensor:
        """Turn a tensor as stored into (m, n) and back."""
        return tensor.T if name in self._transposed else tensor

    def root_mean_squares(self) -> list[float]:
        """Root mean square of each master over its values that are not zero, in order."""
        return [root_mean_square(master.detach()) for master in self.masters.values()]

    def exact(self, masters: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the effective tensors in fp32, differentiable.

        Args:
            masters: values in place of :attr:`masters`, by the same names.
        """
        masters = self.masters if masters is None else masters
        return {name: self._exact(name, masters) for name in self._short}

    def _exact(self, name: str, masters: Mapping[str, Tensor]) -> Tensor:
        """Return one effective tensor in fp32, differentiable."""
        trained = {short: masters[key] for short, key in self._short[name].items()}
        if name not in self.masks:
            return trained[ITSELF]
        weight = self._matrix(name, self._tensors[name].detach())
        return self._matrix(name, self.form.weight(weight, self.masks[name], trained))

    def values(self, masters: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the tensors as the forward pass uses them: masked, in its dtype, differentiable.

        Args:
            masters: values in place of :attr:`masters`, by the same names.
        """
        return {name: value.to(self._tensors[name].dtype) for name, value in self.exact(masters).items()}

    def starts(self) -> Mapping[str, Tensor]:
        """Return the tensors that training starts from, by name."""
        return self._tensors

    @torch.no_grad()
    def rounded(self, rounding: Rounding = lambda name, value: value) -> dict[str, Tensor]:
        """Return the tensors rounded as they will be stored, in the dtype of the forward pass.

        A surviving weight that rounds to zero keeps its start value, so the mask stays what it was.

        Args:
            rounding: precision of the checkpoint, where that is lower than the tensors' own.
        """
        values = {}
        for name, tensor in self._tensors.items():
            exact = self._exact(name, self.masters)  # one after the other, so that memory is used again
            value = rounding(name, exact.detach().to(tensor.dtype)).to(tensor.dtype).contiguous()
            if name in self.masks:
                mask, kept = self._matrix(name, self.masks[name]), value.bool()
                if value.is_cuda:  # no wait of the host for what torch.equal finds
                    value = torch.where(mask == kept, value, tensor)
                elif not torch.equal(mask, kept):
                    value = torch.where(mask & kept, value, tensor)
            values[name] = value
        return values

    def chain(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute gradients with respect to the masters from those with respect to :meth:`rounded` tensors.

        Rounding counts as the identity (a straight-through estimate).

        Args:
            gradients: by the names of the tensors; a tensor without one has gradient zero.
        """
        found: dict[str, Tensor] = {}
        for name, shorts in self._short.items():
            masters = {short: self.masters[key] for short, key in shorts.items()}
            if name not in gradients:
                below = {short: torch.zeros_like(master) for short, master in masters.items()}
            elif name in self.masks:
                weight, above = (self._matrix(name, each) for each in (self._tensors[name].detach(), gradients[name]))
                below = self.form.gradients(weight, self.masks[name], masters, above)
            else:
                below = {ITSELF: gradients[name].float()}
            found |= {key: below[short] for short, key in shorts.items()}
        return found

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
        """Write the values into the tensors that they started from, :meth:`rounded`."""
        for name, value in self.rounded(rounding).items():
            self._tensors[name].copy_(value)


def root_mean_square(tensor: Tensor) -> float:
    """Root mean square of a tensor over its values that are not zero; 0 without any."""
    return float((tensor.square().sum() / (tensor != 0).sum().clamp_min(1)).sqrt())

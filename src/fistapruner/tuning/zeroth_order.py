"""Train without gradients: two losses a step, along random directions that can be drawn again.

    z = direction(seed, step, tensor), masked      g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)
    theta <- theta - rate g z

MeZO (arXiv 2305.17333) draws z from the standard normal distribution. SubZero (2410.08989) draws, for matrices,
``z = U Z V^T sqrt(m n) / r`` with Z (r, r) standard normal and frames U (m, r), V (n, r) with orthonormal columns,
drawn anew every ``refresh`` steps. In both the mean of ``|z|^2`` is the number of entries, so rates carry over. Tensors
of low rank are seen as the most square matrix with as many entries, as in SubZero's code; vectors are drawn as in MeZO.

Differences from the published code:

1. Weights are never changed in place, so nothing drifts: theta + eps z and theta - eps z go through the layers
   together.
2. The seed of a draw is a hash of (seed, step, tensor name), so tensors can be drawn in any order.
3. Frames have their own seeds, so a run can be continued in the midst of a subspace.
4. Where ``full`` is trained, MeZO's z is drawn for surviving weights only; SubZero's z is masked and then no longer of
   low rank.
5. Trained tensors are fp32. Weight decay is on operators only.
6. Embeddings, final norm and head are not trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from ..runtime.numerics import exact_products, seeded
from .masked import MaskedParameters
from .trained import Trained


class Directions:
    """Random directions of trained tensors, determined by seed, step and tensor name.

    Draws of large tensors use the generator of their device: a CPU and every kind of GPU draw different numbers.

    Args:
        seed: of the run.
        subspace: r of SubZero; at most min(m, n) of a matrix is used. None is MeZO.
        refresh: steps after which SubZero draws new frames.
    """

    def __init__(self, seed: int, subspace: int | None = None, refresh: int = 2000) -> None:
        self.seed, self.subspace, self.refresh = seed, subspace, refresh
        self._frames: dict[str, tuple[int, Tensor, Tensor]] = {}

    def normal(self, step: int, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Draw a standard normal tensor."""
        generator = seeded(self.seed, "direction", step, name, device=device)
        return torch.randn(shape, generator=generator, device=device)

    def matrix(self, step: int, name: str, rows: int, columns: int, device: torch.device) -> Tensor:
        """Draw a (rows, columns) direction in SubZero's subspace."""
        left, right = self.frames(step, name, rows, columns, device)
        rank = left.shape[1]
        middle = self.normal(step, name, (rank, rank), device)
        with exact_products():
            return (left @ middle @ right.T).mul_(math.sqrt(rows * columns) / rank)

    def frames(self, step: int, name: str, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return U (rows, r) and V (columns, r) of the step, with orthonormal columns."""
        period = (step - 1) // self.refresh
        known = self._frames.get(name)
        if known is None or known[0] != period:
            rank = min(self.subspace or 1, rows, columns)
            generator = seeded(self.seed, "frames", period, name)
            # On the CPU, so that only rounding differs between devices.
            left, right = (
                torch.linalg.qr(torch.randn(size, rank, generator=generator)).Q.to(device) for size in (rows, columns)
            )
            known = self._frames[name] = (period, left, right)
        return known[1], known[2]

    def of(self, step: int, parameters: MaskedParameters) -> dict[str, Tensor]:
        """Draw a direction for every master, of its shape."""
        drawn = {}
        for name, master in parameters.masters.items():
            mask = parameters.masks.get(parameters.origin[name])
            if self.subspace is None or mask is None:
                drawn[name] = self.normal(step, name, tuple(master.shape), master.device)
            elif name == parameters.origin[name]:
                rows, columns = mask.shape
                whole = self.matrix(step, name, rows, columns, master.device)
                drawn[name] = whole if master.shape == mask.shape else whole[mask]
            else:
                rows, columns = most_square(master.numel())
                drawn[name] = self.matrix(step, name, rows, columns, master.device).view(master.shape)
        return drawn


def most_square(count: int) -> tuple[int, int]:
    """Return the rows and columns of the most square matrix with ``count`` entries."""
    rows = next(rows for rows in range(math.isqrt(count), 0, -1) if count % rows == 0)
    return rows, count // rows


class ZerothOrder:
    """Steps without gradients on the trained tensors of a model.

    Args:
        trained: the tensors; its recipe says which directions.
    """

    def __init__(self, trained: Trained) -> None:
        recipe = trained.recipe
        self.trained = trained
        self.eps = recipe.eps
        self.directions = Directions(
            recipe.seed, recipe.subspace if recipe.optimizer == "subzero" else None, recipe.refresh
        )

    def variants(self, step: int) -> Callable[[int, nn.Module], Iterator[dict[str, Tensor]]]:
        """Make the function that gives a layer's tensors on both sides of a step's direction.

        They are not rounded to the checkpoint's precision, which would add noise to the difference of the losses.
        """

        def both(index: int, layer: nn.Module) -> Iterator[dict[str, Tensor]]:
            parameters = self.trained.parameters(index, layer)
            drawn = self.directions.of(step, parameters)
            for eps in (self.eps, -self.eps):
                masters = {
                    name: master.detach().add(drawn[name], alpha=eps) for name, master in parameters.masters.items()
                }
                yield self.trained.inside(index, parameters.values(masters))

        return both

    def slope(self, losses: Tensor | Iterable[float]) -> float | None:
        """Estimate the slope g along the direction from the losses on both sides.

        None where one of them is not finite.
        """
        ahead, behind = (float(loss) for loss in losses)
        slope = (ahead - behind) / (2 * self.eps)
        return slope if math.isfinite(slope) else None

    def take(self, number: int, slope: float | None, factor: float) -> None:
        """Take a step whose slope is known, without passes.

        Args:
            number: of the step, from 1.
            slope: of the step; None changes nothing.
            factor: of the first learning rate.
        """
        for index in range(len(self.trained)):
            with self.trained.model.layer(index) as layer:
                self.update(index, layer, number, slope, factor)

    @torch.no_grad()
    def update(self, index: int, layer: nn.Module, step: int, slope: float | None, factor: float) -> None:
        """Move a layer's trained tensors along the direction of a step.

        Args:
            index: number of the layer.
            layer: the loaded layer of the input checkpoint.
            step: number of the step, from 1.
            slope: of the step; None changes nothing.
            factor: of the first learning rate.
        """
        if slope is None:
            return
        parameters = self.trained.parameters(index, layer)
        rates = self.trained.rates(index, parameters)
        drawn = self.directions.of(step, parameters)
        moved = {}
        for name, master in parameters.masters.items():
            rate = rates[name] * factor
            decayed = master.detach() * (1 - rate * self.trained.decay(index, parameters.origin[name]))
            moved[name] = decayed.add_(drawn[name], alpha=-rate * slope)
        self.trained.replace(index, moved)

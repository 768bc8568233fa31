"""The layer problem: everything that a solver sees of a model and its data.

An operator ``W`` (m outputs x n inputs) has inputs ``X*`` (n x p) in the partly pruned model and ``X`` in the dense
one. With ``a`` the share of the dense target, the error of a pruned operator ``V`` is

    f(V) = || V X* - T ||_F^2 / p,     T = a W X + (1 - a) W X*.

It needs no activations, only sums over tokens (:mod:`fistapruner.core.sums`). With ``E = V - W``,

    f(V) = tr(E H E^T) - 2 <E, G> + sum(c),     G = a R,  c = a^2 d.

G and c are zero if nothing was pruned upstream. Written around W, fp32 does not lose a small error in the difference of
large numbers. With a ridge towards the dense weights, H becomes positive definite and the problem

    min over V of || V - C ||_H^2,     C = W + G H^-1,

which is all that most solvers see (:meth:`LayerProblem.regularised`). Operators with the same inputs share H; they may
be stacked by rows, each with its own constraint (:class:`~fistapruner.core.constraints.Stacked`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from .linalg import alive_gram, damped_cholesky, dead_inputs, row_blocks

Found = TypeVar("Found")


@dataclass(frozen=True)
class Ridge:
    """How much is added to the diagonal of a Gram. It pulls the solution towards the dense weights.

    Args:
        mean: this times the mean of the diagonal, for numerical stability (0.01 in SparseGPT and ALPS).
        own: this times each diagonal element itself (0.1 in ADMM, after scaling).
        sampling: for the sampling error of the Gram: this times inputs / tokens (the order of the error of a
            covariance of n variables from p samples), at most 0.3, times the geometric mean of the diagonal (which
            does not depend on a few massive inputs). No effect where the number of tokens is unknown.
    """

    mean: float = 0.0
    own: float = 0.0
    sampling: float = 0.0


class Regularised(NamedTuple):
    """The problem ``min ||V - C||_H^2``, with what its factorisation needed.

    Args:
        centre: (m, n) ``C = W + G H^-1``, the least-squares weights without a constraint.
        gram: (n, n) ``H`` with the ridge, without the zero diagonal of dead inputs.
        warnings: a sentence where the ridge had to be raised.
    """

    centre: Tensor
    gram: Tensor
    warnings: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """Least squares on the outputs of one operator, or of operators with the same inputs, stacked by rows.

    Tensors of other floating-point types are converted to fp32 (energies may be fp64), contiguous, without gradients.

    Args:
        weight: (m, n) fp32 dense weights ``W``.
        gram: (n, n) fp32 ``H``, mean over tokens, symmetric positive semi-definite.
        drift: (m, n) fp32 ``G``, or None if the inputs have not drifted.
        drift_energy: (m,) ``c``, or None with ``drift``.
        energy: (m,) mean squared dense output of each row, the denominator of relative errors. Default: computed from
            ``W`` and ``H``, which is the same if nothing has drifted.
        name: of the operators, for messages.
        tokens: number of calibration tokens ``p``; None if the Gram is to be taken as exact.
        importance: (m,) by which ``weighted`` has multiplied the errors of the rows; relative errors are without
            it. None where they are not weighted.
        cache: what was computed from the Gram alone (``cached``); problems with the same Gram may share it.
    """

    weight: Tensor
    gram: Tensor
    drift: Tensor | None = None
    drift_energy: Tensor | None = None
    energy: Tensor | None = None
    name: str = "operator"
    tokens: int | None = None
    importance: Tensor | None = None
    cache: dict[Hashable, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("weight", "gram", "drift", "drift_energy", "energy", "importance"):
            given: Any = getattr(self, name)
            if given is None and name not in ("weight", "gram"):
                continue
            if not isinstance(given, Tensor) or not given.is_floating_point():
                found = given.dtype if isinstance(given, Tensor) else type(given).__name__
                raise FistaPrunerError(f"{self.name}: the {name} is {found}, expected a floating-point tensor")
            double = given.dtype == torch.float64 and name in ("drift_energy", "energy")
            object.__setattr__(self, name, (given.detach() if double else given.detach().float()).contiguous())
        if self.weight.ndim != 2 or not self.weight.numel():
            raise FistaPrunerError(f"{self.name}: the weight is {tuple(self.weight.shape)}, expected (outputs, inputs)")
        m, n = self.weight.shape
        if (self.drift is None) != (self.drift_energy is None):
            raise FistaPrunerError(f"{self.name}: drift and drift_energy come together")
        shapes = {"gram": (n, n), "drift": (m, n), "drift_energy": (m,), "energy": (m,), "importance": (m,)}
        for name, shape in shapes.items():
            tensor: Tensor | None = getattr(self, name)
            if tensor is not None and tensor.shape != shape:
                raise FistaPrunerError(f"{self.name}: the {name} is {tuple(tensor.shape)}, expected {shape}")
            if tensor is not None and tensor.device != self.weight.device:
                raise FistaPrunerError(
                    f"{self.name}: the weight is on {self.weight.device}, its {name} on {tensor.device}"
                )
        if self.energy is None:
            object.__setattr__(self, "energy", row_dots(lambda rows: self.weight[rows] @ self.gram, self.weight))

    @classmethod
    def from_activations(
        cls,
        weight: Tensor,
        inputs: Tensor,
        dense_inputs: Tensor | None = None,
        residual: Tensor | None = None,
        *,
        target: float = 1.0,
        name: str = "operator",
    ) -> LayerProblem:
        """Build a problem from explicit activations, for experiments and tests.

        Args:
            weight: (m, n) dense weights.
            inputs: (p, n) ``X*`` by tokens, the inputs in the partly pruned model.
            dense_inputs: (p, n) ``X`` by tokens, the inputs in the dense model. Default: the same.
            residual: (p, m) ``S - S*`` by tokens, the drift of the residual stream; only with ``dense_inputs``.
            target: share a of the dense target.
            name: operator name.
        """
        from .sums import problem_from_activations

        return problem_from_activations(weight, inputs, dense_inputs, residual, target=target, name=name)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the weight."""
        m, n = self.weight.shape
        return m, n

    def cached(self, key: Hashable, compute: Callable[[], Found]) -> Found:
        """Compute something that depends on the Gram alone, unless a problem with this Gram has it.

        Args:
            key: what is computed, and all settings that it depends on.
            compute: computes it; the result must not be changed afterwards.
        """
        if self.cache is None:
            return compute()
        if key not in self.cache:
            self.cache[key] = compute()
        found: Found = self.cache[key]
        return found

    def regularised(self, ridge: Ridge) -> Regularised:
        """Write the problem as ``min ||V - C||_H^2``; what depends on the Gram alone is cached.

        A Gram that has no Cholesky factor gets a larger ridge, with a warning, but only where the drift needs it.
        """
        gram = self.cached(ridge, lambda: self._with_ridge(ridge))
        if self.drift is None:
            return Regularised(self.weight, gram, ())

        def factored() -> tuple[Tensor, Tensor, list[str]]:
            factor, share, warnings = damped_cholesky(gram, 0.0, self.name)
            raised = gram
            if share:
                raised = gram.clone()
                raised.diagonal().add_(share * gram.diagonal().mean())
            return factor, raised, warnings

        factor, raised, warnings = self.cached((ridge, "factor"), factored)
        centre = torch.cholesky_solve(self.drift.T, factor).T + self.weight
        return Regularised(centre, raised, tuple(warnings))

    def _with_ridge(self, ridge: Ridge) -> Tensor:
        """Add a ridge to the Gram (n, n); dead inputs, which have no sampling error, do not count in it."""
        used = ~dead_inputs(self.gram)
        used |= ~used.any()  # where all are dead, they are alike
        gram = alive_gram(self.gram)
        mean = gram.diagonal().mean()
        sizes = (gram.diagonal() / mean)[used]
        uncertain = 0.0 if self.tokens is None else min(0.3, ridge.sampling * len(sizes) / self.tokens)
        own = ridge.own * gram.diagonal()
        gram.diagonal().add_(own + mean * (ridge.mean + uncertain * sizes.log().mean().exp()))
        return gram

    def check_finite(self) -> None:
        """Refuse NaN and infinity; the error names the operator and the tensor."""
        named = {"weights contain": self.weight, "Gram of the calibration activations contains": self.gram}
        if self.drift is not None:
            named["drift contains"] = self.drift
        for what, tensor in named.items():
            if not bool(torch.stack([tensor[rows].isfinite().all() for rows in row_blocks(len(tensor))]).all()):
                raise FistaPrunerError(f"{self.name}: the {what} NaN or infinite values")

    def gradient(self, weight: Tensor) -> Tensor:
        """Compute half the gradient of f, ``(V - W) H - G``: (m, n)."""
        product = (weight - self.weight) @ self.gram
        return product if self.drift is None else product.sub_(self.drift)

    def row_errors(self, weight: Tensor, gradient: Tensor | None = None) -> Tensor:
        """Compute the error f of each row of ``weight`` (m, n): (m,) fp64.

        Args:
            weight: (m, n).
            gradient: (m, n) ``gradient`` there, which saves a product.
        """
        errors = []
        for rows in row_blocks(len(weight)):
            change = weight[rows] - self.weight[rows]
            slope = change @ self.gram if gradient is None else gradient[rows].clone()
            if self.drift is not None:
                slope.sub_(self.drift[rows], alpha=2.0 if gradient is None else 1.0)
            errors.append(_row_dot(slope, change))
        total = torch.cat(errors)
        if self.drift_energy is not None:
            total += self.drift_energy.double()
        return total.clamp_min(0)

    def error(self, weight: Tensor) -> float:
        """Compute the error f: squared output error, mean over tokens, summed over rows."""
        return float(self.row_errors(weight).sum())

    def relative_error(self, weight: Tensor) -> float:
        """Compute the error f as a share of the dense output's energy, ``||W X||^2 / p``."""
        return self.share(self.row_errors(weight))

    def dense_error(self) -> float | None:
        """Compute the relative error of the dense weights, the effect of drift alone; None without drift."""
        return None if self.drift_energy is None else self.share(self.drift_energy.double())

    def share(self, row_errors: Tensor) -> float:
        """Divide the sum of the errors of all rows, (m,) fp64, by the dense output's energy.

        Where that is zero, any error is 1.
        """
        plain = row_errors if self.importance is None else row_errors / self.importance
        error, energy = torch.stack([plain.sum(), self.output_energy.sum()]).tolist()  # the host waits for a GPU once
        return error / energy if energy else float(error > 0)

    @property
    def output_energy(self) -> Tensor:
        """Mean squared dense output of each row, (m,) fp64, not weighted."""
        assert self.energy is not None
        energy = self.energy.double()
        return energy if self.importance is None else energy / self.importance

    def weighted(self, importance: Tensor) -> LayerProblem:
        """Weight the error of every row by its importance: ``sum_i importance_i f_i`` over rows i.

        Every row is scaled by the root of its importance. Its solutions are scaled, too; ``unweighted`` reverts
        that. Important rows keep more weights if rows compete (unstructured sparsity); the least-squares weights of a
        row do not change.

        Args:
            importance: (m,) positive weights of the rows.
        """
        if not bool(((importance > 0) & importance.isfinite()).all()):
            raise FistaPrunerError(
                f"{self.name}: the importance of a row is zero, negative, NaN or infinite, expected positive numbers"
            )
        root = importance.sqrt()
        assert self.energy is not None
        return replace(
            self,
            weight=self.weight * root[:, None],
            drift=None if self.drift is None else self.drift * root[:, None],
            drift_energy=None if self.drift_energy is None else self.drift_energy * importance,
            energy=self.energy * importance,
            importance=importance if self.importance is None else self.importance * importance,
        )

    def slice(self, rows: slice | Tensor, name: str | None = None) -> LayerProblem:
        """Restrict the problem to some rows, in views for a slice; the Gram and its cache are shared."""

        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows]

        return replace(
            self,
            weight=self.weight[rows],
            drift=part(self.drift),
            drift_energy=part(self.drift_energy),
            energy=part(self.energy),
            importance=part(self.importance),
            name=name or self.name,
        )

    def restricted(self, keep: Tensor) -> LayerProblem:
        """Restrict the problem to some input channels: the problem of the smaller operator.

        A weight V of the smaller operator has the error here that [V, 0] has in the whole problem. With K the kept and
        P the other channels, its drift is

            G' = W_P H_PK + G_K,    c'_i = w_P H_PP w_P^T + 2 w_P g_P^T + c_i    (w, g: row i of W, G)

        so ``dense_error`` is the error of dropping the other channels, and a refit makes up for them.

        Args:
            keep: (k,) int64 places of the kept channels, distinct, in the order that they are to have.
        """
        n = self.shape[1]
        if not keep.numel() or int(keep.min()) < 0 or int(keep.max()) >= n or len(keep.unique()) != len(keep):
            raise FistaPrunerError(f"{self.name}: the kept channels are not distinct places among {n} inputs")
        dropped = torch.ones(n, dtype=torch.bool, device=keep.device)
        dropped[keep] = False
        removed = self.weight[:, dropped]
        drift = removed @ self.gram[dropped][:, keep]
        across = removed @ self.gram[dropped][:, dropped]
        if self.drift is not None:
            drift += self.drift[:, keep]
            across += 2 * self.drift[:, dropped]
        energy = row_dots(lambda rows: across[rows], removed)
        if self.drift_energy is not None:
            energy += self.drift_energy.double()
        return replace(
            self,
            weight=self.weight[:, keep],
            gram=self.gram[keep][:, keep],
            drift=drift,
            drift_energy=energy.clamp_min(0),
            cache=None,
        )

    def around(self, weight: Tensor) -> LayerProblem:
        """Write the same problem around other weights (m, n), which take the dense ones' place: errors stay."""
        return replace(self, weight=weight, drift=-self.gradient(weight), drift_energy=self.row_errors(weight))

    def without_drift(self) -> LayerProblem:
        """Return the problem with the target ``W X*``, the dense weight's output on these inputs (a = 0)."""
        return replace(self, drift=None, drift_energy=None)

    def to(self, device: torch.device | str) -> LayerProblem:
        """Return the same problem with its tensors on ``device``."""
        names = ("weight", "gram", "drift", "drift_energy", "energy", "importance")
        moved = {name: tensor.to(device) for name in names if (tensor := getattr(self, name)) is not None}
        return replace(self, **moved, cache=None)


def unweighted(weight: Tensor, importance: Tensor) -> Tensor:
    """Revert the scaling of :meth:`LayerProblem.weighted` in (m, n) weights; in place."""
    return weight.div_(importance.sqrt()[:, None])


def row_dots(left: Callable[[slice], Tensor], right: Tensor) -> Tensor:
    """Compute inner products of the rows of ``right`` (m, n) with those of ``left``, by blocks: (m,) fp64."""
    return torch.cat([_row_dot(left(rows), right[rows]) for rows in row_blocks(len(right))])


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Compute inner products of the rows of two (m, n) blocks: (m,) fp64."""
    return (a.double() * b.double()).sum(1)

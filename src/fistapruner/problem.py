"""The layer problem: everything that a solver sees of a model and its data.

An operator ``W`` (m outputs x n inputs) has inputs ``X*`` (n x p) in the partly pruned model and ``X`` in the dense
one. With ``a`` the share of the dense target, the error of a pruned operator ``V`` is

    f(V) = || V X* - T ||_F^2 / p,     T = a W X + (1 - a) W X*.

It needs no activations, only three sums over tokens, which one streaming pass accumulates:

    H = X* X*^T / p                     Gram of the inputs in the partly pruned model     (n x n)
    R = W (X - X*) X*^T / p             correlation of the output drift with the inputs   (m x n)
    d = rowwise || W (X - X*) ||^2 / p  energy of the output drift                        (m)

With E = V - W, f(V) = tr(E H E^T) - 2 a <E, R> + a^2 sum(d). This equals tr(V H V^T) - 2 <V, B> + c with
B = W H + a R, but it is written around W, so that fp32 does not lose a small error in the difference of large numbers.
R and d are zero if nothing was pruned upstream. Operators with the same inputs share H; they are stacked by rows into
one problem, and every solver works on all of them at once.

An operator that writes to the residual stream can also correct the stream's drift (``residual: correct``). With S the
stream it adds to in the dense model and S* in the partly pruned one, ``V X* + S*`` is to be
``a (W X + S) + (1 - a) (W X* + S*)``. Then ``W (X - X*) + (S - S*)`` replaces ``W (X - X*)`` in R and d.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import FistaPrunerError
from .runtime.numerics import (
    add_gram,
    add_product,
    changes_in_place,
    exact_in_fast_products,
    fast_products,
    mirror,
    row_blocks,
    summed_in_fp32,
    undisturbed,
)

DriftFrom = Literal["inputs", "outputs"]
"""The dense model's activations from which the drift of an operator's outputs is computed."""


def cheapest_drift(rows: int, columns: int, *, corrected: bool) -> DriftFrom:
    """Choose the activations from which the drift is computed at the lowest cost (:class:`ProblemSums`).

    Args:
        rows: outputs of the operator.
        columns: inputs of the operator.
        corrected: the drift of the residual stream is corrected, too, which needs the outputs.
    """
    return "outputs" if corrected or rows <= columns else "inputs"


@dataclass(frozen=True)
class LayerProblem:
    """Least squares on the outputs of one operator, or of several operators that share their inputs.

    Tensors of other floating-point types are converted to fp32 (energies may be fp64), contiguous, without gradients.

    Args:
        weight: (m, n) fp32 dense weights ``W``, operators stacked by rows.
        gram: (n, n) fp32 ``H``, mean over tokens, symmetric positive semi-definite.
        drift: (m, n) fp32 ``R``, or None if the inputs have not drifted.
        drift_energy: (m,) ``d``, or None with ``drift``.
        energy: (m,) mean squared dense output of each row, the denominator of relative errors. Default: computed from
            ``W`` and ``H``, which is the same if nothing has drifted.
        target: share ``a`` of the dense model's output in the target: 1 is ``dense_target=dense`` (FISTAPruner), 0 is
            ``dense_target=pruned`` (SparseGPT, Wanda, ALPS).
        names: operator names, one for each block of rows.
        rows: rows of each operator, summing to m.
        tokens: number of calibration tokens ``p``; None if the Gram is to be taken as exact.
        importance: (m,) by which ``weighted`` has multiplied the errors of the rows; relative errors are without
            it. None where they are not weighted.

    Raises:
        FistaPrunerError: shapes, devices or settings disagree, or something is not a tensor; names the operator.
    """

    weight: Tensor
    gram: Tensor
    drift: Tensor | None = None
    drift_energy: Tensor | None = None
    energy: Tensor | None = None
    target: float = 1.0
    names: tuple[str, ...] = ("operator",)
    rows: tuple[int, ...] = field(default=())
    tokens: int | None = None
    importance: Tensor | None = None

    def __post_init__(self) -> None:
        for name, kind, expected in (("names", str, "names of operators"), ("rows", Integral, "numbers of rows")):
            given = getattr(self, name)
            if not isinstance(given, (tuple, list)) or not all(isinstance(each, kind) for each in given):
                raise FistaPrunerError(f"{name} {given!r}: a tuple of {expected} is expected")
        for name in ("weight", "gram"):
            _require_float(getattr(self, name), f"{self.label}: the {name}")
        for name, given in self._tensors().items():
            energies = name in ("drift_energy", "energy")
            object.__setattr__(self, name, _plain(given, f"{self.label}: the {name}", keep_double=energies))
        if self.weight.ndim != 2 or not self.weight.numel():
            raise FistaPrunerError(
                f"{self.label}: the weight is {tuple(self.weight.shape)}, expected (outputs, inputs)"
            )
        m, n = self.weight.shape
        if self.gram.shape != (n, n):
            raise FistaPrunerError(
                f"{self.label}: the Gram is {tuple(self.gram.shape)}, expected ({n}, {n}) for {n} inputs"
            )
        if not self.rows:
            object.__setattr__(self, "rows", (m,))
        if sum(self.rows) != m or len(self.rows) != len(self.names) or min(self.rows) < 1:
            raise FistaPrunerError(
                f"{self.label}: rows {self.rows} do not describe {len(self.names)} operators of {m} rows in all"
            )
        if (self.drift is None) != (self.drift_energy is None):
            raise FistaPrunerError(f"{self.label}: drift and drift_energy come together")
        if self.drift is not None and self.drift.shape != (m, n):
            raise FistaPrunerError(f"{self.label}: drift is {tuple(self.drift.shape)}, expected ({m}, {n})")
        by_row = {"drift_energy": self.drift_energy, "energy": self.energy, "importance": self.importance}
        for name, energy in by_row.items():
            if energy is not None and energy.shape != (m,):
                raise FistaPrunerError(f"{self.label}: {name} is {tuple(energy.shape)}, expected ({m},)")
        for name, tensor in (("gram", self.gram), ("drift", self.drift), ("energy", self.energy)):
            if tensor is not None and tensor.device != self.weight.device:
                raise FistaPrunerError(
                    f"{self.label}: the weight is on {self.weight.device}, its {name} on {tensor.device}"
                )
        if self.tokens is not None and (not isinstance(self.tokens, Integral) or self.tokens < 1):
            raise FistaPrunerError(
                f"{self.label}: tokens {self.tokens!r} is not a number of calibration tokens (1 or more, or None)"
            )
        if not isinstance(self.target, Real) or not 0.0 <= self.target <= 1.0:
            raise FistaPrunerError(f"{self.label}: target {self.target!r} is not a share of the dense target in [0, 1]")
        if self.energy is None:
            object.__setattr__(self, "energy", _row_dots(lambda rows: self.weight[rows] @ self.gram, self.weight))

    @property
    def label(self) -> str:
        """Names of the operators, for messages."""
        return "+".join(self.names)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the stacked weight."""
        m, n = self.weight.shape
        return m, n

    @property
    def starts(self) -> list[int]:
        """First row of each operator."""
        return [sum(self.rows[:i]) for i in range(len(self.rows))]

    @property
    def drift_gradient(self) -> Tensor | None:
        """(m, n) ``a R``, the drift's part of the negative gradient at W; None if it is zero."""
        return None if self.drift is None or self.target == 0.0 else self.drift * self.target

    @property
    def linear(self) -> Tensor:
        """(m, n) ``B = W H + a R``, the linear term of the least squares."""
        product = self.weight @ self.gram
        return product if self.drift_gradient is None else product + self.drift_gradient

    def check_finite(self) -> None:
        """Refuse NaN and infinity; the error names the operator and the tensor."""
        parts = zip(self.names, self.weight.split(self.rows), strict=True)
        checked = [(f"{name}: the weights contain", part) for name, part in parts]
        checked.append((f"{self.label}: the Gram of the calibration activations contains", self.gram))
        if self.drift is not None:
            checked.append((f"{self.label}: the drift contains", self.drift))
        flags = torch.stack([_all_finite(tensor) for _, tensor in checked]).tolist()  # the host waits for a GPU once
        for (what, _), finite in zip(checked, flags, strict=True):
            if not finite:
                raise FistaPrunerError(f"{what} NaN or infinite values")

    @contextmanager
    def unchanged(self, by: str) -> Iterator[None]:
        """Refuse that others' code changes a tensor of the problem in place.

        Args:
            by: names the code in the error.

        Raises:
            FistaPrunerError: names the operators and the tensor.
        """
        tensors = self._tensors()
        before = {name: changes_in_place(tensor) for name, tensor in tensors.items()}
        yield
        for name, tensor in tensors.items():
            if changes_in_place(tensor) != before[name]:
                raise FistaPrunerError(f"{by} has changed the {name} of {self.label} in place: change a clone of it")

    def row_errors(self, weight: Tensor) -> Tensor:
        """Compute the error f of each row of ``weight`` (m, n): (m,) fp64."""
        errors = []
        for rows in row_blocks(len(weight)):
            delta = weight[rows] - self.weight[rows]
            gradient = delta @ self.gram
            if self.drift is not None and self.target:
                gradient.sub_(self.drift[rows], alpha=2 * self.target)
            errors.append(_row_dot(gradient, delta))
        total = torch.cat(errors)
        if self.drift_energy is not None and self.target:
            total += self.drift_energy.double() * self.target**2
        return total.clamp_min(0)

    def errors(self, weight: Tensor) -> list[float]:
        """Compute the error f of each operator: squared output error, mean over tokens, summed over rows."""
        return [float(part.sum()) for part in self.row_errors(weight).split(self.rows)]

    def relative_errors(self, weight: Tensor) -> list[float]:
        """Compute the error f of each operator as a share of its dense output's energy, ``||W X||^2 / p``."""
        return self._shares(self.row_errors(weight))

    def dense_errors(self) -> list[float] | None:
        """Compute relative errors of the dense weights, the effect of drift alone; None without drift."""
        if self.drift_energy is None or not self.target:
            return None
        return self._shares(self.drift_energy.double() * self.target**2)

    def gradient(self, weight: Tensor) -> Tensor:
        """Compute half the gradient of f, ``V H - B``: (m, n)."""
        product = (weight - self.weight) @ self.gram
        return product if self.drift_gradient is None else product - self.drift_gradient

    def weighted(self, importance: Tensor) -> LayerProblem:
        """Weight the error of every row by its importance: ``sum_i importance_i f_i`` over rows i.

        Every row is scaled by the root of its importance. Its solutions are scaled, too; ``unweighted`` reverts
        that. Important rows keep more weights if rows compete (unstructured sparsity); the least-squares weights of a
        row do not change.

        Args:
            importance: (m,) positive weights of the rows.

        Raises:
            FistaPrunerError: a weight is zero, negative, NaN or infinite.
        """
        if not bool(((importance > 0) & importance.isfinite()).all()):
            raise FistaPrunerError(
                f"{self.label}: the importance of a row is zero, negative, NaN or infinite, expected positive numbers"
            )
        root = importance.sqrt()
        drift = None if self.drift is None else self.drift * root[:, None]
        drift_energy = None if self.drift_energy is None else self.drift_energy * importance
        assert self.energy is not None
        return replace(
            self,
            weight=self.weight * root[:, None],
            drift=drift,
            drift_energy=drift_energy,
            energy=self.energy * importance,
            importance=importance if self.importance is None else self.importance * importance,
        )

    def operators(self) -> list[LayerProblem]:
        """Split the problem into one for each operator; tensors are views, the Gram is shared."""
        return [
            self.slice(start, start + size, (name,))
            for start, size, name in zip(self.starts, self.rows, self.names, strict=True)
        ]

    def slice(self, start: int, stop: int, names: tuple[str, ...] = ("rows",)) -> LayerProblem:
        """Restrict the problem to rows ``start`` to ``stop``, as one operator."""

        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[start:stop]

        return replace(
            self,
            weight=self.weight[start:stop],
            drift=part(self.drift),
            drift_energy=part(self.drift_energy),
            energy=part(self.energy),
            importance=part(self.importance),
            names=names,
            rows=(stop - start,),
        )

    def restricted(self, keep: Tensor) -> LayerProblem:
        """Restrict the problem to some input channels: the problem of the smaller operator.

        A weight V of the smaller operator has the error here that [V, 0] has in the whole problem. With K the kept and
        P the other channels it is a problem with the full target and the drift

            R' = W_P H_PK + a R_K,    d'_i = w_P H_PP w_P^T + 2 a w_P r_P^T + a^2 d_i    (w, r: row i of W, R)

        so ``dense_errors`` are the errors of dropping the other channels, and a refit makes up for them.

        Args:
            keep: (k,) int64 places of the kept channels, distinct, in the order that they are to have.

        Raises:
            FistaPrunerError: no channel is kept, or one is out of range or named twice.
        """
        n = self.shape[1]
        if not keep.numel() or int(keep.min()) < 0 or int(keep.max()) >= n or len(keep.unique()) != len(keep):
            raise FistaPrunerError(f"{self.label}: the kept channels are not distinct places among {n} inputs")
        dropped = torch.ones(n, dtype=torch.bool, device=keep.device)
        dropped[keep] = False
        removed = self.weight[:, dropped]
        drift = removed @ self.gram[dropped][:, keep]
        across = removed @ self.gram[dropped][:, dropped]
        if self.drift is not None and self.target:
            drift += self.target * self.drift[:, keep]
            across += 2 * self.target * self.drift[:, dropped]
        energy = _row_dots(lambda rows: across[rows], removed)
        if self.drift_energy is not None and self.target:
            energy += self.target**2 * self.drift_energy.double()
        return replace(
            self,
            weight=self.weight[:, keep],
            gram=self.gram[keep][:, keep],
            drift=drift,
            drift_energy=energy.clamp_min(0),
            target=1.0,
        )

    def around(self, weight: Tensor) -> LayerProblem:
        """Write the same problem around other weights: every V keeps its error.

        Args:
            weight: (m, n) fp32 weights that take the dense ones' place.
        """
        change = weight - self.weight
        drift = -(change @ self.gram)
        if self.drift_gradient is not None:
            drift += self.drift_gradient
        return replace(self, weight=weight, drift=drift, drift_energy=self.row_errors(weight), target=1.0)

    def to(self, device: torch.device | str) -> LayerProblem:
        """Return the same problem with its tensors on ``device``."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        return replace(self, **moved)

    @property
    def output_energies(self) -> tuple[Tensor, ...]:
        """Mean squared dense output of the rows of each operator, fp64, not weighted."""
        assert self.energy is not None
        energies: tuple[Tensor, ...] = self._not_weighted(self.energy.double()).split(self.rows)
        return energies

    def _tensors(self) -> dict[str, Tensor]:
        """Return the tensors that the problem has, by name."""
        names = ("weight", "gram", "drift", "drift_energy", "energy", "importance")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    def _shares(self, row_errors: Tensor) -> list[float]:
        """Divide the errors of each operator's rows, (m,) fp64, by its dense output's energy.

        Where that is zero, any error is 1.
        """
        parts = zip(self._not_weighted(row_errors).split(self.rows), self.output_energies, strict=True)
        sums = torch.stack([part.sum() for pair in parts for part in pair]).view(-1, 2)
        waited = sums.tolist()  # the host waits for a GPU once
        return [error / energy if energy else float(error > 0) for error, energy in waited]

    def _not_weighted(self, by_row: Tensor) -> Tensor:
        """Divide (m,) errors or energies by the importance of the rows."""
        return by_row if self.importance is None else by_row / self.importance

    @classmethod
    @undisturbed()
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
            target: share of the dense target.
            name: operator name.

        Raises:
            FistaPrunerError: shapes disagree, there are no tokens, or a value is NaN or infinite.
        """
        weight = _plain(weight, f"{name}: the weight")
        if weight.ndim != 2:
            raise FistaPrunerError(f"{name}: the weight is {tuple(weight.shape)}, expected (outputs, inputs)")
        m, n = weight.shape
        if residual is not None and dense_inputs is None:
            raise FistaPrunerError(f"{name}: a residual is given without dense_inputs, expected both")

        def by_token(what: str, tensor: Tensor, width: int) -> Tensor:
            _require_float(tensor, f"{name}: {what}")
            if tensor.ndim != 2 or tensor.shape[1] != width or len(tensor) != len(inputs):
                tokens = "tokens" if tensor is inputs else len(inputs)
                raise FistaPrunerError(f"{name}: {what} is {tuple(tensor.shape)}, expected ({tokens}, {width})")
            return tensor.detach()

        inputs = by_token("inputs", inputs, n)
        dense = None if dense_inputs is None else by_token("dense_inputs", dense_inputs, n)
        residual = None if residual is None else by_token("residual", residual, m)
        source: DriftFrom | None = None
        if dense is not None:
            source = cheapest_drift(m, n, corrected=residual is not None)
            dense = dense.float() @ weight.T if source == "outputs" else dense
        sums = ProblemSums(weight, drift_from=source)
        sums.add(inputs, dense, residual)
        return sums.problem((name,), (m,), target)


class ProblemSums:
    """Accumulate the sums of a layer problem batch by batch in fp32.

    If inputs drift, R and d are computed from one of two activations of the dense model on the same tokens:

    * from the inputs ``X``: the sums (X - X*) X*^T and (X - X*)(X - X*)^T (n x n), and a product with W at the end;
    * from the outputs ``W X``: the sum (W X) X*^T (m x n), less W H at the end. This is cheaper if an operator has no
      more outputs than inputs, and it allows the residual stream to drift, too.

    The sums are on the weight's device. bf16 activations, and fp16 ones on CUDA, are multiplied on the device's matrix
    units (:func:`~fistapruner.runtime.numerics.fast_products`). This is exact for H. For the drift, whose factors are
    rounded to bf16, the error is far below the drift's sampling error.

    Args:
        weight: (m, n) dense weights of the operators that share their inputs, stacked by rows.
        drift_from: the dense model's activations that come with every batch; None if nothing drifts.
    """

    def __init__(self, weight: Tensor, *, drift_from: DriftFrom | None = None) -> None:
        m, n = weight.shape
        device = weight.device
        self.weight = weight.float()
        self.tokens = 0
        self.gram = torch.zeros(n, n, device=device)
        self.drift_from = drift_from
        self._compared = 0
        self._gram_compared: Tensor | None = None
        self._cross = torch.zeros(n if drift_from == "inputs" else m, n, device=device) if drift_from else None
        self._input_drift = torch.zeros(n, n, device=device) if drift_from == "inputs" else None
        self._dense_energy, self._target_energy = torch.zeros(2, m, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, dense: Tensor | None = None, residual: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            inputs: (tokens, n) inputs in the partly pruned model.
            dense: activations of the dense model on the same tokens: (tokens, n) inputs or (tokens, m) outputs without
                bias, as ``drift_from`` says. None for batches without them, which come after all others.
            residual: (tokens, m) ``S - S*``, the drift of the residual stream; only with ``drift_from="outputs"``.
                Default: no drift.
        """
        x = inputs if summed_in_fp32(inputs) else inputs.float()
        self.tokens += x.shape[0]
        if self._cross is not None and (dense is None) != (self._compared < self.tokens - x.shape[0]):
            if dense is not None:
                raise FistaPrunerError(
                    f"dense {self.drift_from} are for the first batches: one without them was added before"
                )
            if self.drift_from == "outputs":
                self._gram_compared = self.gram.clone()
        with fast_products(exact_in_fast_products(inputs.dtype, inputs.device)):
            add_gram(self.gram, x)
            if self._cross is None or dense is None:
                return
            self._compared += x.shape[0]
            if self._input_drift is not None:
                moved = dense.float() - x
                add_gram(self._input_drift, moved)
                add_product(self._cross, moved.T, x)
                return
            target_outputs = dense.float()
            self._dense_energy += _energy(target_outputs)
            if residual is not None:
                target_outputs = target_outputs + residual
            add_product(self._cross, (dense if residual is None else target_outputs).T, x)
            self._target_energy += _energy(target_outputs)

    def problem(
        self, names: Sequence[str], rows: Sequence[int], target: float, *, release: bool = False
    ) -> LayerProblem:
        """Make the layer problem of all tokens added so far (means over tokens).

        Args:
            names: operator names, one for each block of rows.
            rows: rows of each operator.
            target: share of the dense model's output in the target.
            release: these sums will not be used again: the problem takes over the Gram's memory, so that a large Gram
                is never in memory twice, and the other sums are freed.

        Raises:
            FistaPrunerError: no tokens were added, none with the dense activations that ``drift_from`` needs, or a
                value is NaN or infinite.
        """
        if not self.tokens or (self.drift_from and not self._compared):
            where = " in the dense model" if self.tokens else ""
            raise FistaPrunerError(f"{'+'.join(names)}: no calibration tokens reached this operator{where}")
        mean = Tensor.div_ if release else Tensor.div
        gram = mirror(mean(self.gram, self.tokens))
        drift = drift_energy = energy = None
        if self._cross is not None and self._input_drift is not None:
            across = self.weight @ mean(self._cross, self._compared)
            moved = mirror(mean(self._input_drift, self._compared))
            drift, drift_energy = across, _row_dots(lambda rows: self.weight[rows] @ moved, self.weight).clamp_min(0)
            # ||W X||^2 = ||W X*||^2 + 2 <W X*, W (X - X*)> + ||W (X - X*)||^2, row by row.
            energy = (
                _row_dots(lambda rows: torch.add(self.weight[rows] @ gram, across[rows], alpha=2.0), self.weight)
                + drift_energy
            )
        elif self._cross is not None:
            drift = difference = mean(self._cross, self._compared)
            compared_gram = gram if self._gram_compared is None else mirror(mean(self._gram_compared, self._compared))

            def subtract_seen(rows: slice) -> Tensor:
                seen = self.weight[rows] @ compared_gram
                difference[rows] -= seen
                return torch.add(seen, difference[rows], alpha=2.0)

            # With T the target outputs: ||T - W X*||^2 = ||T||^2 - <W X*, 2 (T - W X*) + W X*>, row by row.
            drift_energy = (self._target_energy / self._compared - _row_dots(subtract_seen, self.weight)).clamp_min(0)
            energy = self._dense_energy / self._compared
        if release:
            self._cross = self._input_drift = self._gram_compared = None
        problem = LayerProblem(
            weight=self.weight,
            gram=gram,
            drift=drift,
            drift_energy=drift_energy,
            energy=energy,
            target=target,
            names=tuple(names),
            rows=tuple(rows),
            tokens=self.tokens,
        )
        problem.check_finite()
        return problem


def unweighted(weight: Tensor, importance: Tensor) -> Tensor:
    """Revert the scaling of :meth:`LayerProblem.weighted` in (m, n) weights; in place."""
    return weight.div_(importance.sqrt()[:, None])


def _require_float(tensor: Any, what: str) -> None:
    """Refuse anything but a floating-point tensor; ``what`` names it in the error."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise FistaPrunerError(f"{what} is {found}, expected a floating-point tensor")


def _plain(tensor: Any, what: str, *, keep_double: bool = False) -> Tensor:
    """Convert a tensor to fp32 (or keep fp64), contiguous, without gradients; no copy if it is so."""
    _require_float(tensor, what)
    plain: Tensor = tensor.detach() if tensor.requires_grad else tensor
    plain = plain if keep_double and plain.dtype == torch.float64 else plain.float()
    return plain.contiguous()


def _energy(tensor: Tensor) -> Tensor:
    """Sum the squares of each column of a (tokens, n) tensor: (n,) fp64, from fp32 sums of 128 tokens."""
    return torch.stack([part.square().sum(0) for part in tensor.split(128)]).sum(0, dtype=torch.float64)


def _row_dots(left: Callable[[slice], Tensor], right: Tensor) -> Tensor:
    """Compute inner products of the rows of ``right`` (m, n) with those of ``left``, by blocks: (m,) fp64."""
    return torch.cat([_row_dot(left(rows), right[rows]) for rows in row_blocks(len(right))])


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Compute inner products of the rows of two (m, n) blocks: (m,) fp64."""
    return (a.double() * b.double()).sum(1)


def _all_finite(tensor: Tensor) -> Tensor:
    """Return a 0-dim bool tensor."""
    return torch.stack([torch.isfinite(tensor[rows]).all() for rows in row_blocks(len(tensor))]).all()

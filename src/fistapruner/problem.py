"""The layer problem: all that a solver ever sees of a model and its data.

An operator ``W`` (m outputs x n inputs) sees inputs ``X*`` (n x p) in the partly pruned model and ``X`` in the dense
one. With ``a`` the share of the dense target, a pruned operator ``V`` is judged by

    f(V) = || V X* - T ||_F^2 / p,     T = a W X + (1 - a) W X*,

which needs no activations, only three sums over tokens that are gathered in one streaming pass:

    H = X* X*^T / p                     Gram of what the operator will really see        (n x n)
    R = W (X - X*) X*^T / p             correlation of the drift of its outputs           (m x n)
    d = rowwise || W (X - X*) ||^2 / p  energy of that drift                              (m)

With E = V - W this is f(V) = tr(E H E^T) - 2 a <E, R> + a^2 sum(d): the same f as tr(V H V^T) - 2 <V, B> + c with
B = W H + a R, but written around W, so that fp32 does not lose a small error in the difference of large numbers. R and
d are zero where nothing was pruned upstream. Operators that read the same tensor share H; they are stacked by rows into
one problem and every solver works on all of them at once.

An operator whose output is added to the hidden states may be asked to take their drift back, too (``residual: correct``):
with S what it adds to in the dense model and S* in the partly pruned one, ``V X* + S*`` is to be ``a (W X + S) + (1 - a)
(W X* + S*)``. Then ``W (X - X*) + (S - S*)`` stands for ``W (X - X*)`` in R and d, and nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import FistaPrunerError
from .runtime.numerics import add_gram, fast_products, mirror, row_blocks

DriftFrom = Literal["inputs", "outputs"]
"""What of the dense model tells how far an operator's outputs have drifted."""


def cheapest_drift(rows: int, columns: int, *, corrected: bool) -> DriftFrom:
    """What tells the drift of one operator: its outputs where it has no more of them than inputs, or the drift of what they are added to
    is corrected, too, which only they can tell (:class:`ProblemSums`)."""
    return "outputs" if corrected or rows <= columns else "inputs"


@dataclass(frozen=True)
class LayerProblem:
    """Least squares on the outputs of one operator, or of several that share their inputs.

    Tensors of other floating-point types become fp32 (the energies may be fp64), contiguous and without gradients.

    Args:
        weight: (m, n) fp32 dense weights ``W``, operators stacked by rows.
        gram: (n, n) fp32 ``H``, mean over tokens, symmetric positive semi-definite.
        drift: (m, n) fp32 ``R``, or None where the inputs have not drifted.
        drift_energy: (m,) ``d``, or None with ``drift``.
        energy: (m,) mean squared dense output of each row, the denominator of relative errors. Default: of ``W`` on
            ``H``, which is the same thing when nothing drifted.
        target: share ``a`` of the dense model's output in the target: 1 is ``target=dense`` (FISTAPruner), 0 is
            ``target=pruned`` (SparseGPT, Wanda, ALPS).
        names: operator names, one for each block of rows.
        rows: rows of each operator, summing to m.
        tokens: calibration tokens ``p`` behind the means; None where the Gram is to be taken as exact.

    Raises:
        FistaPrunerError: shapes, devices or settings disagree, or a tensor is none (the operator is named).
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

    def __post_init__(self) -> None:
        for name in ("weight", "gram", "drift", "drift_energy", "energy"):
            tensor = getattr(self, name)
            if tensor is not None:
                energies = name in ("drift_energy", "energy")
                object.__setattr__(self, name, _plain(tensor, f"{self.label}: the {name}", keep_double=energies))
        if self.weight.ndim != 2 or not self.weight.numel():
            raise FistaPrunerError(f"{self.label}: the weight is {tuple(self.weight.shape)}, expected (outputs, inputs)")
        m, n = self.weight.shape
        if self.gram.shape != (n, n):
            raise FistaPrunerError(f"{self.label}: the Gram is {tuple(self.gram.shape)}, expected ({n}, {n}) for {n} inputs")
        if not self.rows:
            object.__setattr__(self, "rows", (m,))
        if sum(self.rows) != m or len(self.rows) != len(self.names) or min(self.rows) < 1:
            raise FistaPrunerError(f"{self.label}: rows {self.rows} do not describe {len(self.names)} operators of {m} rows in all")
        if (self.drift is None) != (self.drift_energy is None):
            raise FistaPrunerError(f"{self.label}: drift and drift_energy come together")
        if self.drift is not None and self.drift.shape != (m, n):
            raise FistaPrunerError(f"{self.label}: drift is {tuple(self.drift.shape)}, expected ({m}, {n})")
        for name, energy in (("drift_energy", self.drift_energy), ("energy", self.energy)):
            if energy is not None and energy.shape != (m,):
                raise FistaPrunerError(f"{self.label}: {name} is {tuple(energy.shape)}, expected ({m},)")
        for name, tensor in (("gram", self.gram), ("drift", self.drift)):
            if tensor is not None and tensor.device != self.weight.device:
                raise FistaPrunerError(f"{self.label}: the weight is on {self.weight.device}, its {name} on {tensor.device}")
        if self.tokens is not None and self.tokens < 1:
            raise FistaPrunerError(f"{self.label}: tokens {self.tokens} is not a number of calibration tokens (1 or more, or None)")
        if not 0.0 <= self.target <= 1.0:
            raise FistaPrunerError(f"{self.label}: target {self.target} is not a share of the dense target in [0, 1]")
        if self.energy is None:
            object.__setattr__(self, "energy", _row_dots(lambda rows: self.weight[rows] @ self.gram, self.weight))

    @property
    def label(self) -> str:
        """The operators' names, for messages."""
        return "+".join(self.names)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the stacked weight."""
        m, n = self.weight.shape
        return m, n

    @property
    def drift_gradient(self) -> Tensor | None:
        """(m, n) ``a R``: what the drift adds to the gradient at W, None when it adds nothing."""
        return None if self.drift is None or self.target == 0.0 else self.drift * self.target

    @property
    def linear(self) -> Tensor:
        """(m, n) ``B = W H + a R``, the linear term of the least squares."""
        product = self.weight @ self.gram
        return product if self.drift_gradient is None else product + self.drift_gradient

    def check_finite(self) -> None:
        """Refuse NaN and infinity, naming the operator and where they are."""
        for name, part in self._named_rows(self.weight):
            if not _all_finite(part):
                raise FistaPrunerError(f"{name}: the weights contain NaN or infinite values")
        for what, tensor in (("Gram of the calibration activations", self.gram), ("drift", self.drift)):
            if tensor is not None and not _all_finite(tensor):
                raise FistaPrunerError(f"{self.label}: the {what} contains NaN or infinite values")

    def row_errors(self, weight: Tensor) -> Tensor:
        """(m,) fp64 error f of each row of ``weight`` (m, n)."""
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
        """Error f of each operator, in the units of mean squared output summed over rows."""
        return [float(part.sum()) for part in self.row_errors(weight).split(self.rows)]

    def relative_errors(self, weight: Tensor) -> list[float]:
        """Error f of each operator as a share of its dense output's energy, c = ||W X||^2."""
        return self._shares(self.row_errors(weight))

    def dense_errors(self) -> list[float] | None:
        """Relative error that each operator's dense weights would have: what has drifted. None where nothing has."""
        if self.drift_energy is None or not self.target:
            return None
        return self._shares(self.drift_energy.double() * self.target**2)

    def gradient(self, weight: Tensor) -> Tensor:
        """(m, n) half the gradient of f: ``V H - B``."""
        product = (weight - self.weight) @ self.gram
        return product if self.drift_gradient is None else product - self.drift_gradient

    def weighted(self, importance: Tensor) -> LayerProblem:
        """The problem whose error is ``sum_i importance_i f_i`` over rows i: every row scaled by the root of its importance.

        Its solutions are scaled alike: :func:`unweighted` takes them back. Where rows compete for the weights that are kept
        (an unstructured pattern), important ones keep more; in a row alone nothing changes.

        Args:
            importance: (m,) positive weights of the rows.

        Raises:
            FistaPrunerError: a weight is zero, negative, NaN or infinite.
        """
        if not bool(((importance > 0) & importance.isfinite()).all()):
            raise FistaPrunerError(f"{self.label}: the importance of a row is zero, negative, NaN or infinite, expected positive numbers")
        root = importance.sqrt()
        drift = None if self.drift is None else self.drift * root[:, None]
        drift_energy = None if self.drift_energy is None else self.drift_energy * importance
        assert self.energy is not None
        return replace(self, weight=self.weight * root[:, None], drift=drift, drift_energy=drift_energy, energy=self.energy * importance)

    def operators(self) -> list[LayerProblem]:
        """The stacked operators one by one; tensors are views, the Gram is shared."""
        starts = [sum(self.rows[:i]) for i in range(len(self.rows))]
        return [self.slice(start, start + size, (name,)) for start, size, name in zip(starts, self.rows, self.names, strict=True)]

    def slice(self, start: int, stop: int, names: tuple[str, ...] = ("rows",)) -> LayerProblem:
        """The problem of rows ``start`` to ``stop`` alone, as one operator."""

        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[start:stop]

        return replace(
            self,
            weight=self.weight[start:stop],
            drift=part(self.drift),
            drift_energy=part(self.drift_energy),
            energy=part(self.energy),
            names=names,
            rows=(stop - start,),
        )

    def to(self, device: torch.device | str) -> LayerProblem:
        """The same problem with its tensors on ``device``."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self,
            weight=self.weight.to(device),
            gram=self.gram.to(device),
            drift=move(self.drift),
            drift_energy=move(self.drift_energy),
            energy=move(self.energy),
        )

    def _shares(self, row_errors: Tensor) -> list[float]:
        """(m,) fp64 errors by row, as each operator's share of its dense output's energy."""
        assert self.energy is not None
        energies = self.energy.double().split(self.rows)
        return [float(error.sum()) / max(float(c.sum()), 1e-300) for error, c in zip(row_errors.split(self.rows), energies, strict=True)]

    def _named_rows(self, tensor: Tensor) -> list[tuple[str, Tensor]]:
        return list(zip(self.names, tensor.split(self.rows), strict=True))

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
            inputs: (p, n) what the operator sees in the pruned model, ``X*`` by tokens.
            dense_inputs: (p, n) what it sees in the dense model. Default: the same.
            residual: (p, m) ``S - S*`` by tokens, see above; only with ``dense_inputs``.
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
    """The sums of a layer problem, gathered batch by batch in fp32.

    Where inputs drift, R and d are found from either of two things that the dense model tells of the same tokens: the operators'
    inputs X, by the sums (X - X*) X*^T and (X - X*)(X - X*)^T (n x n) and a product with W at the end, or their outputs W X, by
    (W X) X*^T (m x n), from which W H is taken. Outputs are cheaper where an operator has no more of them than inputs, and what
    they are added to may drift, too.

    Args:
        weight: (m, n) dense weights of the operators that share their inputs, stacked by rows.
        drift_from: what of the dense model will be given with every batch; None where nothing drifts.

    The sums are kept on the weight's device. Activations that are bf16 values are multiplied on the device's bf16 units
    (:func:`~fistapruner.runtime.numerics.fast_products`): exactly for H; for the drift, whose factors are rounded to bf16, with an error
    far below the drift's own sampling error.
    """

    def __init__(self, weight: Tensor, *, drift_from: DriftFrom | None = None) -> None:
        m, n = weight.shape
        device = weight.device
        self.weight = weight.float()
        self.tokens = 0
        self.gram = torch.zeros(n, n, device=device)
        self.drift_from = drift_from
        self._told = 0
        self._gram_told: Tensor | None = None
        self._cross = torch.zeros(n if drift_from == "inputs" else m, n, device=device) if drift_from else None
        self._moved = torch.zeros(n, n, device=device) if drift_from == "inputs" else None
        self._energy, self._wanted = torch.zeros(2, m, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, dense: Tensor | None = None, residual: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            inputs: (tokens, n) inputs in the partly pruned model.
            dense: of the same tokens in the dense model, (tokens, n) inputs or (tokens, m) outputs without bias, as ``drift_from`` says;
                None from the first batch on that the dense model did not see.
            residual: (tokens, m) ``S - S*``, what the outputs are added to in the dense model less that in the pruned one; only with
                ``drift_from="outputs"``. Default: it has not drifted.
        """
        x = inputs.float()
        self.tokens += x.shape[0]
        if self._cross is not None and (dense is None) != (self._told < self.tokens - x.shape[0]):
            if dense is not None:
                raise FistaPrunerError(f"dense {self.drift_from} are for the first batches: one without them was added before")
            if self.drift_from == "outputs":
                self._gram_told = self.gram.clone()
        with fast_products(inputs.dtype == torch.bfloat16):
            add_gram(self.gram, x)
            if self._cross is None or dense is None:
                return
            self._told += x.shape[0]
            if self._moved is not None:
                moved = dense.float() - x
                add_gram(self._moved, moved)
                self._cross.addmm_(moved.T, x)
                return
            wanted = dense.float()
            self._energy += wanted.square().sum(0, dtype=torch.float64)
            if residual is not None:
                wanted = wanted + residual
            self._cross.addmm_(wanted.T, x)
            self._wanted += wanted.square().sum(0, dtype=torch.float64)

    def problem(self, names: Sequence[str], rows: Sequence[int], target: float, *, release: bool = False) -> LayerProblem:
        """The layer problem of all tokens added so far (means over tokens).

        Args:
            names: operator names, one for each block of rows.
            rows: rows of each operator.
            target: share of the dense model's output in the target.
            release: nothing will be added or asked any more: the Gram's memory becomes the problem's, so that a large one
                is never in memory twice, and the other sums are freed.

        Raises:
            FistaPrunerError: no tokens were added, none of the dense model though ``drift_from``, or something is NaN or infinite.
        """
        if not self.tokens or (self.drift_from and not self._told):
            where = " in the dense model" if self.tokens else ""
            raise FistaPrunerError(f"{'+'.join(names)}: no calibration tokens reached this operator{where}")
        mean = Tensor.div_ if release else Tensor.div
        gram = mirror(mean(self.gram, self.tokens))
        drift = drift_energy = energy = None
        if self._cross is not None and self._moved is not None:
            across = self.weight @ mean(self._cross, self._told)
            moved = mirror(mean(self._moved, self._told))
            drift, drift_energy = across, _row_dots(lambda rows: self.weight[rows] @ moved, self.weight).clamp_min(0)
            # ||W X||^2 = ||W X*||^2 + 2 <W X*, W (X - X*)> + ||W (X - X*)||^2, row by row.
            energy = _row_dots(lambda rows: torch.add(self.weight[rows] @ gram, across[rows], alpha=2.0), self.weight) + drift_energy
        elif self._cross is not None:
            drift = difference = mean(self._cross, self._told)
            told = gram if self._gram_told is None else mirror(mean(self._gram_told, self._told))

            def subtract_seen(rows: slice) -> Tensor:
                seen = self.weight[rows] @ told
                difference[rows] -= seen
                return torch.add(seen, difference[rows], alpha=2.0)

            # With T the outputs wanted: ||T - W X*||^2 = ||T||^2 - <W X*, 2 (T - W X*) + W X*>, row by row.
            drift_energy = (self._wanted / self._told - _row_dots(subtract_seen, self.weight)).clamp_min(0)
            energy = self._energy / self._told
        if release:
            self._cross = self._moved = self._gram_told = None
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
    """(m, n) weights of the plain problem from those of the :meth:`~LayerProblem.weighted` one; in place."""
    return weight.div_(importance.sqrt()[:, None])


def _require_float(tensor: Any, what: str) -> None:
    """Refuse what is no floating-point tensor; ``what`` names it."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise FistaPrunerError(f"{what} is {found}, expected a floating-point tensor")


def _plain(tensor: Any, what: str, *, keep_double: bool = False) -> Tensor:
    """The tensor as solvers want it: fp32 (or fp64), contiguous, without gradients; the same object where it is so already."""
    _require_float(tensor, what)
    plain: Tensor = tensor.detach() if tensor.requires_grad else tensor
    plain = plain if keep_double and plain.dtype == torch.float64 else plain.float()
    return plain.contiguous()


def _row_dots(left: Callable[[slice], Tensor], right: Tensor) -> Tensor:
    """(m,) fp64 inner products of the rows of ``right`` (m, n) with those that ``left`` makes, a block at a time."""
    return torch.cat([_row_dot(left(rows), right[rows]) for rows in row_blocks(len(right))])


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    """(m,) fp64 inner products of the rows of two (m, n) blocks."""
    return (a.double() * b.double()).sum(1)


def _all_finite(tensor: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor[rows]).all()) for rows in row_blocks(len(tensor)))

"""Accumulate the sums of a layer problem in one streaming pass over tokens.

With inputs ``X`` of the dense model and ``X*`` of the partly pruned one, over p tokens, they are

    H = X* X*^T / p                     Gram of the inputs in the partly pruned model     (n x n)
    R = W (X - X*) X*^T / p             correlation of the output drift with the inputs   (m x n)
    d = rowwise || W (X - X*) ||^2 / p  energy of the output drift                        (m)

An operator that writes to the residual stream can also correct the stream's drift. With S the stream it adds to in the
dense model and S* in the partly pruned one, ``W (X - X*) + (S - S*)`` replaces ``W (X - X*)`` in R and d.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from .linalg import exact_in_fast_products, fast_products
from .problem import LayerProblem, row_dots

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


class ProblemSums:
    """Accumulate the sums of a layer problem batch by batch in fp32.

    If inputs drift, R and d are computed from one of two activations of the dense model on the same tokens:

    * from the inputs ``X``: the sums (X - X*) X*^T and (X - X*)(X - X*)^T (n x n), and a product with W at the end;
    * from the outputs ``W X``: the sum (W X) X*^T (m x n), less W H at the end. This is cheaper if an operator has no
      more outputs than inputs, and it allows the residual stream to drift, too.

    The sums are on the weight's device. bf16 activations, and fp16 ones on CUDA, are multiplied on the device's matrix
    units. This is exact for H. For the drift, whose factors are rounded to bf16, the error is far below the drift's
    sampling error.

    Args:
        weight: (m, n) dense weights of the operators that share their inputs, stacked by rows.
        drift_from: the dense model's activations that come with every batch; None if nothing drifts.
    """

    def __init__(self, weight: Tensor, *, drift_from: DriftFrom | None = None) -> None:
        m, n = weight.shape
        self.weight = weight.float()
        self.tokens = 0
        self.gram = self.weight.new_zeros(n, n)
        self.drift_from = drift_from
        self._compared = 0
        self._gram_compared: Tensor | None = None
        self._cross = self.weight.new_zeros(n if drift_from == "inputs" else m, n) if drift_from else None
        self._input_drift = self.weight.new_zeros(n, n) if drift_from == "inputs" else None
        self._dense_energy, self._target_energy = self.weight.new_zeros(2, m, dtype=torch.float64)

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

    def problem(self, name: str = "operator", target: float = 1.0, *, release: bool = False) -> LayerProblem:
        """Make the layer problem of all tokens added so far (means over tokens).

        Args:
            name: of the operators, for messages.
            target: share a of the dense model's output in the target: 1 is the dense model's output (FISTAPruner), 0
                the dense weight's on the drifted inputs (SparseGPT, Wanda, ALPS).
            release: these sums will not be used again: the problem takes over the Gram's memory, so that a large Gram
                is never in memory twice, and the other sums are freed.
        """
        if not self.tokens or (self.drift_from and not self._compared):
            where = " in the dense model" if self.tokens else ""
            raise FistaPrunerError(f"{name}: no calibration tokens reached this operator{where}")
        mean = Tensor.div_ if release else Tensor.div
        gram = mirror(mean(self.gram, self.tokens))
        drift = drift_energy = energy = None
        if self._cross is not None and self._input_drift is not None:
            across = self.weight @ mean(self._cross, self._compared)
            moved = mirror(mean(self._input_drift, self._compared))
            drift, drift_energy = across, row_dots(lambda rows: self.weight[rows] @ moved, self.weight).clamp_min(0)
            # ||W X||^2 = ||W X*||^2 + 2 <W X*, W (X - X*)> + ||W (X - X*)||^2, row by row.
            energy = (
                row_dots(lambda rows: torch.add(self.weight[rows] @ gram, across[rows], alpha=2.0), self.weight)
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
            drift_energy = (self._target_energy / self._compared - row_dots(subtract_seen, self.weight)).clamp_min(0)
            energy = self._dense_energy / self._compared
        if release:
            self._cross = self._input_drift = self._gram_compared = None
        drifts = drift is not None and drift_energy is not None and target != 0.0
        problem = LayerProblem(
            weight=self.weight,
            gram=gram,
            drift=drift * target if drifts and drift is not None else None,
            drift_energy=drift_energy * target**2 if drifts and drift_energy is not None else None,
            energy=energy,
            name=name,
            tokens=self.tokens,
        )
        problem.check_finite()
        return problem


def problem_from_activations(
    weight: Tensor,
    inputs: Tensor,
    dense_inputs: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    target: float = 1.0,
    name: str = "operator",
) -> LayerProblem:
    """Build a problem from explicit activations, as ``LayerProblem.from_activations`` says."""
    m, n = weight.shape
    if residual is not None and dense_inputs is None:
        raise FistaPrunerError(f"{name}: a residual is given without dense_inputs, expected both")
    widths = {"inputs": (inputs, n), "dense_inputs": (dense_inputs, n), "residual": (residual, m)}
    for what, (tensor, width) in widths.items():
        if tensor is not None and (tensor.ndim != 2 or tensor.shape != (len(inputs), width)):
            raise FistaPrunerError(f"{name}: {what} is {tuple(tensor.shape)}, expected ({len(inputs)}, {width})")
    weight = weight.detach().float()
    drift_from = None if dense_inputs is None else cheapest_drift(m, n, corrected=residual is not None)
    dense = dense_inputs
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        if dense_inputs is not None and drift_from == "outputs":
            dense = dense_inputs.detach().float() @ weight.T
        sums = ProblemSums(weight, drift_from=drift_from)
        sums.add(*(None if tensor is None else tensor.detach() for tensor in (inputs, dense, residual)))  # type: ignore[arg-type]
        return sums.problem(name, target)


def add_gram(sums: Tensor, rows: Tensor) -> None:
    """Add ``rows^T rows`` to ``sums``, on and above the diagonal blocks only.

    This saves 20 to 40 % of the product. Entries below are not changed: call :func:`mirror` after the last rows.

    Args:
        sums: (n, n) fp32.
        rows: (p, n) fp32, or as :func:`summed_in_fp32` says.
    """
    n = len(sums)
    size = -(-n // min(8, max(1, n // 256)))  # smaller blocks save no more, and their products are less efficient
    for start in range(0, n, size):
        block = slice(start, start + size)
        add_product(sums[block, start:], rows[:, block].T, rows[:, start:])


def summed_in_fp32(values: Tensor) -> bool:
    """Check whether :func:`add_product` takes such values as they are: bf16 and fp16 on a GPU."""
    return values.is_cuda and values.dtype in (torch.bfloat16, torch.float16)


def add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to ``sums``.

    Where both factors are as :func:`summed_in_fp32` says, the product is exact and summed in fp32, and no fp32 copy of
    them is made.

    Args:
        sums: (m, n) fp32.
        left: (m, p).
        right: (p, n).
    """
    if left.dtype == right.dtype and summed_in_fp32(left):
        sums.add_(torch.mm(left, right, out_dtype=torch.float32))
    else:
        sums.addmm_(left.float(), right.float())


def mirror(sums: Tensor) -> Tensor:
    """Make ``sums`` (n, n) symmetric in place, from its entries on and above the diagonal; return it."""
    for start in range(0, len(sums), 1024):
        block, after = slice(start, start + 1024), slice(start + 1024, None)
        sums[block, block] = sums[block, block].triu() + sums[block, block].triu(1).T
        sums[after, block] = sums[block, after].T
    return sums


def _energy(tensor: Tensor) -> Tensor:
    """Sum the squares of each column of a (tokens, n) tensor: (n,) fp64, from fp32 sums of 128 tokens."""
    return torch.stack([part.square().sum(0) for part in tensor.split(128)]).sum(0, dtype=torch.float64)

"""Layer problems for tests, small and as ill-conditioned as real ones, and a constraint that the package lacks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fistapruner.core import Constraint, LayerProblem, parse_sparsity
from fistapruner.core.constraints import KINDS, Scope
from fistapruner.solvers import METHODS

SOLVERS = [name for name, method in METHODS.items() if not method.refines]
REFINEMENTS = [name for name, method in METHODS.items() if method.refines]
CHAINS = SOLVERS + [f"wanda+{name}" for name in REFINEMENTS]
DRIFTS = ((0.0, 1.0), (0.1, 1.0), (0.1, 0.5))
"""How far the inputs have drifted, and the share of the dense target."""


def activations(n: int, tokens: int, seed: int = 0) -> Tensor:
    """(tokens, n) correlated inputs with one massive-activation direction, as in real models."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=generator) @ torch.diag(torch.logspace(0.5, -0.5, n))
    inputs = torch.randn(tokens, n, generator=generator) @ mixing / n**0.5
    inputs[:, n // 3] += 20 * torch.randn(tokens, generator=generator).abs()
    return inputs


def make_problem(
    rows: int = 24, n: int = 32, tokens: int = 400, seed: int = 0, drift: float = 0.0, target: float = 1.0
) -> LayerProblem:
    """A random operator ``fc1``; ``drift`` moves the pruned model's inputs away from the dense one's."""
    generator = torch.Generator().manual_seed(seed + 1)
    dense = activations(n, tokens, seed)
    weight = torch.randn(rows, n, generator=generator)
    seen = dense + drift * torch.randn(tokens, n, generator=generator) * dense.std(0) if drift else dense
    return LayerProblem.from_activations(weight, seen, dense if drift else None, target=target, name="fc1")


def linear(problem: LayerProblem) -> Tensor:
    """``B = W H + G``, (m, n) fp64: half the gradient of f is ``V H - B``."""
    product = problem.weight.double() @ problem.gram.double()
    return product if problem.drift is None else product + problem.drift.double()


def error(problem: LayerProblem, weight: Tensor) -> Tensor:
    """The error f of each row of (m, n) weights by its formula, (m,) fp64."""
    change = weight.double() - problem.weight.double()
    rows = (change @ problem.gram.double() * change).sum(1)
    if problem.drift is None or problem.drift_energy is None:
        return rows
    return rows - 2 * (change * problem.drift.double()).sum(1) + problem.drift_energy.double()


def damped(gram: Tensor, share: float) -> Tensor:
    """A Gram with a share of its mean diagonal added, fp64."""
    gram = gram.double()
    return gram + share * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def least_squares(problem: LayerProblem, mask: Tensor, ridge: float = 0.0) -> Tensor:
    """The best weights on a support (m, n), row by row, by ``torch.linalg.lstsq`` on a root of the Gram; fp64."""
    gram = damped(problem.gram, ridge)
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.clamp_min(0).sqrt()
    centre = problem.weight.double() + (linear(problem) - problem.weight.double() @ problem.gram.double()) @ (
        torch.linalg.pinv(gram)
    )
    weight = torch.zeros_like(centre)
    for row, kept in enumerate(mask):
        weight[row, kept] = torch.linalg.lstsq(root[kept].T, root.T @ centre[row]).solution
    return weight


@dataclass(frozen=True)
class EachRow(Constraint):
    """The same number of zeros in every row, written ``each row 50%``: what a newcomer writes to add a constraint."""

    share: float

    forms = ("a share of each row (each row 50%)",)

    @classmethod
    def parse(cls, text: str) -> EachRow | None:
        match = re.fullmatch(r"each row ([\d.]+)%", text)
        return cls(float(match[1]) / 100) if match else None

    def __str__(self) -> str:
        return f"each row {100 * self.share:g}%"

    @property
    def fraction(self) -> float:
        return self.share

    def zeros(self, rows: int, columns: int) -> int:
        return rows * round(self.share * columns)

    def project(self, scores: Tensor, scope: Scope = "operator") -> Tensor:
        return self._keep(scores, scores.shape[1] - self.zeros(1, scores.shape[1]))

    def project_columns(self, scores: Tensor, start: int) -> Tensor:
        columns = scores.shape[1]
        return self._keep(scores, columns - self.zeros(1, start + columns) + self.zeros(1, start))

    def satisfies(self, weight: Tensor) -> bool:
        return bool(((weight == 0).sum(1) >= self.zeros(1, weight.shape[1])).all())

    def threshold(self, rows: int, columns: int) -> EachRow:
        return self

    def __call__(self, values: Tensor, out: Tensor, *, correct: bool) -> None:
        torch.mul(values, self.project(values.abs()), out=out)

    def _keep(self, scores: Tensor, count: int) -> Tensor:
        order = torch.nan_to_num(scores, nan=-torch.inf).sort(dim=1, descending=True, stable=True).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :count], True)


EXAMPLES = {
    "unstructured": ("0%", "0.3", "50%", "95%", "0.123456789"),
    "n:m": ("1:2", "2:4", "3:4", "4:8", "3:5"),
    "each row": ("each row 50%", "each row 12.5%"),
}
"""Texts of every constraint."""


@contextmanager
def registered() -> Iterator[None]:
    """Register the newcomer, which takes one line."""
    KINDS["each row"] = EachRow
    try:
        yield
    finally:
        del KINDS["each row"]


def every_constraint() -> list[Constraint]:
    """Read the examples of every constraint."""
    with registered():
        return [parse_sparsity(text) for name in KINDS for text in EXAMPLES[name]]

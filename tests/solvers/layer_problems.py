"""Layer problems for solver tests: small, ill-conditioned as real Grams are, made from a seed."""

from __future__ import annotations

import torch
from torch import Tensor

from fistapruner import LayerProblem


def activations(n: int, tokens: int, seed: int = 0) -> Tensor:
    """(tokens, n) correlated inputs with one massive-activation direction, as in real models."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=generator) @ torch.diag(torch.logspace(0.5, -0.5, n))
    inputs = torch.randn(tokens, n, generator=generator) @ mixing / n**0.5
    inputs[:, n // 3] += 20 * torch.randn(tokens, generator=generator).abs()
    return inputs


def make_problem(
    rows: tuple[int, ...] = (24,),
    n: int = 32,
    tokens: int = 400,
    seed: int = 0,
    drift: float = 0.0,
    target: float = 1.0,
) -> LayerProblem:
    """A problem of stacked random operators; ``drift`` moves the pruned inputs away from the dense ones."""
    generator = torch.Generator().manual_seed(seed + 1)
    dense = activations(n, tokens, seed)
    weight = torch.randn(sum(rows), n, generator=generator)
    seen = dense + drift * torch.randn(tokens, n, generator=generator) * dense.std(0) if drift else dense
    problem = LayerProblem.from_activations(weight, seen, dense if drift else None, target=target)
    return LayerProblem(
        weight=problem.weight,
        gram=problem.gram,
        drift=problem.drift,
        drift_energy=problem.drift_energy,
        energy=problem.energy,
        target=target,
        names=tuple(f"operator{i}" for i in range(len(rows))),
        rows=rows,
        tokens=tokens,
    )

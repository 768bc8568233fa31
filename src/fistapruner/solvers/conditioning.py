"""Make a Gram safe to factor: dead inputs, damping, and a bound on its largest eigenvalue."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..problem import LayerProblem
from ..runtime.numerics import exact_products, mirror

TRIANGLE = 512
"""Rows of a triangular matrix that are inverted, or multiplied by themselves, at once."""

MOST_DAMPING = 10.0
"""Largest damping that is tried, as a share of a Gram's mean diagonal; a larger first one is tried, too."""

FAINT = 2.0**-20
"""Scale of the weights of dead inputs: below all others, and exact."""

EIGENVECTORS, POWER_STEPS = 8, 40
"""Vectors and steps of the block power iteration for the largest eigenvalue of a Gram."""

_shared: ContextVar[tuple[Tensor, dict[Hashable, Any]] | None] = ContextVar("_shared", default=None)

Found = TypeVar("Found")


@contextmanager
def shared_gram(gram: Tensor) -> Iterator[None]:
    """Compute what depends on a Gram alone once for all problems in the block with this very tensor.

    Inside another block with the same tensor it is computed once for both.
    """
    if (outer := _shared.get()) is not None and outer[0] is gram:
        yield
        return
    token = _shared.set((gram, {}))
    try:
        yield
    finally:
        _shared.reset(token)


def once(
    gram: Tensor, key: Hashable, compute: Callable[[], Found], keep: Callable[[Found], bool] = lambda found: True
) -> Found:
    """Compute something that depends on a Gram alone, or return it where :func:`shared_gram` has it.

    Args:
        gram: the Gram.
        key: what is computed, and all settings that it depends on.
        compute: computes it; the result is not changed afterwards.
        keep: whether a result may be used again.
    """
    shared = _shared.get()
    if shared is None or shared[0] is not gram:
        return compute()
    if key not in shared[1]:
        found = compute()
        if not keep(found):
            return found
        shared[1][key] = found
    kept: Found = shared[1][key]
    return kept


def dead_inputs(gram: Tensor) -> Tensor:
    """Find inputs that are zero on every calibration token: (n,) bool. Their weights change no output."""
    return gram.diagonal() <= 0


def with_faint_dead_weights(problem: LayerProblem) -> LayerProblem:
    """Scale the weights of dead inputs down, so that methods prune them before others.

    They change no output, and most methods' regularised Grams would rate them as weights of average inputs. They are
    not zero, so that methods which rate weights by size keep the largest where some must stay.
    """
    dead = dead_inputs(problem.gram)
    if not bool(dead.any()):
        return problem
    return replace(problem, weight=torch.where(dead, FAINT * problem.weight, problem.weight))


def alive_gram(gram: Tensor) -> Tensor:
    """Replace the zero diagonal of dead inputs by the diagonal's mean, or 1 if all are dead.

    Returns:
        (n, n), a copy.
    """
    dead = dead_inputs(gram)
    diagonal = gram.diagonal()
    level = diagonal.clamp_min(0).mean()
    level = torch.where(level > 0, level, torch.ones_like(level))
    return gram + torch.diag(torch.where(dead, level - diagonal, torch.zeros_like(diagonal)))


def regularised_gram(gram: Tensor, tokens: int | None, damping: float, shrinkage: float) -> Tensor:
    """Add a ridge to a Gram, for numerical stability and for its sampling error.

    Args:
        gram: (n, n) of the calibration tokens.
        tokens: their number; None if the Gram is exact.
        damping: share of the mean of the diagonal.
        shrinkage: this times inputs / tokens, at most 0.3, is the share of the geometric mean of the diagonal; dead
            inputs, which have no sampling error, count in neither.

    Returns:
        (n, n), a copy without the zero diagonal of dead inputs (:func:`alive_gram`).
    """
    used = ~dead_inputs(gram)
    used |= ~used.any()  # where all are dead, they are alike
    gram = alive_gram(gram)
    mean = gram.diagonal().mean()
    sizes = (gram.diagonal() / mean)[used]
    uncertain = 0.0 if tokens is None else min(0.3, shrinkage * len(sizes) / tokens)
    gram.diagonal().add_(mean * (damping + uncertain * sizes.log().mean().exp()))
    return gram


def damped_cholesky(gram: Tensor, share: float, label: str) -> tuple[Tensor, float, list[str]]:
    """Factor ``gram + d I`` by Cholesky, raising the damping d tenfold until the factorisation succeeds.

    Args:
        gram: (n, n) symmetric positive semi-definite.
        share: first damping, as a share of the diagonal's mean (0.01 in SparseGPT and ALPS).
        label: names of the operators, for the warning.

    Returns:
        The lower factor, the share that was used, and a warning that names the operators if it was raised.

    Raises:
        FistaPrunerError: no damping helps, so the matrix is not a Gram.
    """
    mean = gram.diagonal().mean()
    # A pivot as small as the rounding error of the diagonal carries no information, even if the factorisation succeeds.
    floor = gram.shape[0] * torch.finfo(gram.dtype).eps
    used, most = share, max(MOST_DAMPING, share)
    while used <= most:
        damped = gram.clone()
        damped.diagonal().add_(used * mean)
        factor, info = torch.linalg.cholesky_ex(damped)
        pivots = factor.diagonal().square() / damped.diagonal()
        if int(info) == 0 and bool((pivots > floor).all()):
            warnings = []
            if used != share:
                raised = f"damping raised from {share:g} to {used:g} of its mean diagonal"
                warnings = [f"{label}: the Gram is close to singular; {raised}"]
            return factor, used, warnings
        used = max(used * 10.0, 1e-6)
    raise FistaPrunerError(
        f"{label}: the Gram has no Cholesky factor even with {most:g} of its mean diagonal added: check its activations"
    )


def inverse_from_cholesky(factor: Tensor) -> Tensor:
    """Invert ``L L^T`` from L, its lower Cholesky factor (n, n); on a GPU in L's memory.

    On a GPU, PyTorch's ``cholesky_inverse`` copies L and solves with an identity matrix, in 2 n^3 multiplications; here
    it takes 2/3 n^3 of them, in products.
    """
    if factor.device.type == "cpu":
        return torch.cholesky_inverse(factor)
    with exact_products():
        invert_lower(factor)
        _multiply_lower(factor, TRIANGLE)
    mirror(factor.T)
    return factor


def invert_lower(factor: Tensor, block: int = TRIANGLE) -> None:
    """Replace a lower triangular matrix (n, n) by its inverse, by halves: most of the work is products.

    Args:
        factor: with zeros above its diagonal.
        block: rows that are inverted at once.
    """
    n = len(factor)
    if n <= block:
        identity = torch.eye(n, dtype=factor.dtype, device=factor.device)
        factor.copy_(torch.linalg.solve_triangular(factor, identity, upper=False))
        return
    half = n // 2
    first, below, last = factor[:half, :half], factor[half:, :half], factor[half:, half:]
    invert_lower(first, block)
    invert_lower(last, block)
    below.copy_((last @ below) @ first).neg_()


def _multiply_lower(factor: Tensor, block: int) -> None:
    """Replace a lower triangular matrix L by the lower half of ``L^T L``; the upper half is undefined."""
    n = len(factor)
    if n <= block:
        factor.copy_(factor.T @ factor)
        return
    half = n // 2
    first, below, last = factor[:half, :half], factor[half:, :half], factor[half:, half:]
    _multiply_lower(first, block)
    first.addmm_(below.T, below)
    below.copy_(last.T @ below)
    _multiply_lower(last, block)


def largest_eigenvalue(gram: Tensor) -> Tensor:
    """Bound the largest eigenvalue of a Gram by block power iteration (0-dim tensor).

    The Rayleigh-Ritz value approaches it from below; 0.1 % is added so that 1/L is a safe step. Grams of real models
    have a few massive-activation directions far above the rest, so that a few iterations agree to many digits.
    """
    n = gram.shape[0]
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(n, min(EIGENVECTORS, n), generator=generator, dtype=gram.dtype).to(gram.device)
    for _ in range(POWER_STEPS):
        vectors = torch.linalg.qr(gram @ vectors).Q
    small = vectors.T @ (gram @ vectors)
    top: Tensor = torch.linalg.eigvalsh((small + small.T) / 2)[-1]
    return top.clamp_min(torch.finfo(gram.dtype).tiny) * 1.001

"""What makes a Gram safe to factor: dead inputs, damping raised step by step, a bound on its largest eigenvalue."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FistaPrunerError


def dead_inputs(gram: Tensor) -> Tensor:
    """(n,) True for inputs that are zero on every calibration token: their weights change no output."""
    return gram.diagonal() <= 0


def alive_gram(gram: Tensor) -> Tensor:
    """The Gram with the mean of its diagonal (1 if all is dead) in place of each dead input's zero: (n, n), a copy if any."""
    dead = dead_inputs(gram)
    diagonal = gram.diagonal()
    level = diagonal.clamp_min(0).mean()
    level = torch.where(level > 0, level, torch.ones_like(level))
    return gram + torch.diag(torch.where(dead, level - diagonal, torch.zeros_like(diagonal)))


def damped_cholesky(gram: Tensor, share: float, label: str, most: float = 10.0) -> tuple[Tensor, float, list[str]]:
    """Lower Cholesky factor of ``gram + d I``, the damping d raised tenfold until the factorisation succeeds.

    Args:
        gram: (n, n) symmetric positive semi-definite.
        share: first damping, as a share of the mean of the diagonal (0.01 in SparseGPT and ALPS).
        label: operators, for the warning.
        most: largest share that is tried.

    Returns:
        The factor, the share that was needed, and a warning that names the operators if it is not the first one.

    Raises:
        FistaPrunerError: no damping helps; the Gram is not a Gram.
    """
    mean = gram.diagonal().mean()
    # A pivot as small as the rounding of the diagonal carries no information, even if the factorisation went through.
    floor = gram.shape[0] * torch.finfo(gram.dtype).eps
    used = share
    while used <= most:
        damped = gram.clone()
        damped.diagonal().add_(used * mean)
        factor, info = torch.linalg.cholesky_ex(damped)
        pivots = factor.diagonal().square() / damped.diagonal()
        if int(info) == 0 and bool((pivots > floor).all()):
            warnings = []
            if used != share:
                warnings = [f"{label}: the Gram is close to singular; damping raised from {share:g} to {used:g} of its mean diagonal"]
            return factor, used, warnings
        used = max(used * 10.0, 1e-6)
    raise FistaPrunerError(f"{label}: the Gram has no Cholesky factor even with {most:g} of its mean diagonal added: check its activations")


def largest_eigenvalue(gram: Tensor, steps: int = 40, block: int = 8) -> Tensor:
    """Largest eigenvalue of a symmetric positive semi-definite ``gram``, from block power iteration (0-dim tensor).

    The Rayleigh-Ritz value approaches from below; 0.1 % is added so that 1/L stays a safe step. Real Grams have a few
    massive-activation directions far above the rest, where a handful of iterations already agree to many digits.
    """
    n = gram.shape[0]
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(n, min(block, n), generator=generator, dtype=gram.dtype).to(gram.device)
    for _ in range(steps):
        vectors = torch.linalg.qr(gram @ vectors).Q
    small = vectors.T @ (gram @ vectors)
    top: Tensor = torch.linalg.eigvalsh((small + small.T) / 2)[-1]
    return top.clamp_min(torch.finfo(gram.dtype).tiny) * 1.001

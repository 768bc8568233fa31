"""Shrink a Gram towards its diagonal, by a share that is chosen by cross-validation.

MLP channels are almost uncorrelated. With p tokens, least squares of a removed channel on n kept ones explains a share
of about n / p of pure noise. So channels are chosen and made up for with

    H_g = (1 - g) H + g diag(H),    R_g = (1 - g) R,

which is the same as a penalty g / (1 - g) sum_j H_jj ||V_j - W_j||^2 on the changes of each channel, in the channel's
own units. g = 0 is plain least squares; with g = 1 the kept weights stay as they were.

An operator with a bias makes up for the means as well, exactly: then H is the covariance of its inputs
(:func:`covariance`).

The share needs no text, only the Grams of two halves of the calibration windows: fitted on one half, tested on the
other, both ways (:func:`validation_errors`). The weights are then fitted on twice as many tokens, and the best penalty
g / (1 - g) falls as 1 / tokens: it is halved (:func:`for_twice_the_tokens`). Measured on SmolLM2's layers 0, 2 and 4,
with 8,192 and 16,384 tokens: on fresh tokens the halved penalty was the grid's best, or next to it, in all six
cases, and better than the one that was not halved in four (docs/structure.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..core import LayerProblem
from ..core.linalg import alive_gram, damped_cholesky

GRID = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
"""Shares that cross-validation tries."""

CONSTANT = 1e-5
"""Share of an input's mean square below which its variance, the difference from the squared mean, is rounding."""

ROWS = 256
"""Output rows on which cross-validation compares shares, at most."""


def share_of_few(inputs: int, tokens: int) -> float | None:
    """Return the share for an expert's Gram of fewer tokens than inputs, ``n / (n + p)``; None for others."""
    return inputs / (inputs + tokens) if tokens < inputs else None


def problem_without_tokens(weight: Tensor, name: str) -> LayerProblem:
    """Make the layer problem of an expert's operators (m, n) without tokens: all inputs count alike."""
    return LayerProblem(weight, torch.eye(weight.shape[1], device=weight.device), name=name)


def shrunk(problem: LayerProblem, share: float) -> LayerProblem:
    """Return the problem with its Gram shrunk towards the diagonal by ``share``, from 0 to 1."""
    drift = None if problem.drift is None else problem.drift * (1 - share)
    return replace(problem, gram=shrunk_gram(problem.gram, share), drift=drift, cache=None)


def shrunk_gram(gram: Tensor, share: float) -> Tensor:
    """Return ``(1 - share) H + share diag(H)``."""
    return (1 - share) * gram + share * torch.diag(gram.diagonal())


def covariance(gram: Tensor, mean: Tensor) -> Tensor:
    """Compute ``H - mean mean^T``; rows and columns of constant inputs are exactly zero."""
    mean = mean.to(gram.dtype)
    varies = gram.diagonal() - mean.square() > CONSTANT * gram.diagonal()
    return (gram - torch.outer(mean, mean)).mul_(varies[:, None]).mul_(varies)


def for_twice_the_tokens(share: float) -> float:
    """Return the share whose penalty ``share / (1 - share)`` is half as large."""
    return share / (2 - share)


def refitted(problem: LayerProblem, damping: float = 0.0) -> tuple[Tensor, list[str]]:
    """Compute the least-squares weights of a problem without zeros, in fp64.

    Args:
        problem: the layer problem; without drift its weights are the solution.
        damping: of the Gram, as a share of its mean diagonal.

    Returns:
        (m, n) fp32, and a warning if the damping had to be raised.
    """
    if problem.drift is None:
        return problem.weight.clone(), []
    factor, _, warnings = damped_cholesky(alive_gram(problem.gram.double()), damping, problem.name)
    change = torch.cholesky_solve(problem.drift.double().T, factor).T
    return (problem.weight + change).float(), warnings


def validation_errors(
    problem: LayerProblem,
    halves: Sequence[Tensor],
    keep: Tensor,
    shares: Sequence[float] = GRID,
    means: Sequence[Tensor] | None = None,
) -> list[float]:
    """Compute errors of removing channels on tokens that the remaining weights were not fitted on.

    Drift is left out: it is not known of each half.

    Args:
        problem: the layer problem of all tokens.
        halves: (n, n) Grams of two halves of the calibration windows.
        keep: (k,) kept channels.
        shares: shares of shrinkage.
        means: (n,) means of the inputs in each half, where a bias is fitted along with the weights.

    Returns:
        For each share the mean error of both ways, of at most :data:`ROWS` rows, relative to their energy.
    """
    step = -(-problem.shape[0] // ROWS)
    weight = problem.weight[::step]
    assert problem.energy is not None
    energy = float(problem.energy[::step].double().sum())
    totals = [0.0] * len(shares)
    for one, other in ((0, 1), (1, 0)):
        fitted, fresh = halves[one], halves[other]
        if means is not None:
            moved = (means[other] - means[one]).to(fresh.dtype)  # the bias is that of the fitted half
            fitted = covariance(fitted, means[one])
            fresh = covariance(fresh, means[other]).add_(torch.outer(moved, moved))
        fitting = LayerProblem(weight, fitted, name=problem.name)
        testing = LayerProblem(weight, fresh, name=problem.name).restricted(keep)
        for place, share in enumerate(shares):
            found = refitted(shrunk(fitting, share).restricted(keep))[0]
            totals[place] += float(testing.row_errors(found).sum()) / 2
    return [total / max(energy, 1e-300) for total in totals]

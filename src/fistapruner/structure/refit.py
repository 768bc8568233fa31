"""Fit the weights of the channels that stay, on a Gram that cross-validation shrinks.

MLP channels are almost uncorrelated. With p tokens, least squares of a removed channel on n kept ones explains a share
of about n / p of pure noise. So channels are chosen and made up for with

    H_g = (1 - g) H + g diag(H),    R_g = (1 - g) R,

which is the same as a penalty g / (1 - g) sum_j H_jj ||V_j - W_j||^2 on the changes of each channel, in the channel's
own units. g = 0 is plain least squares; with g = 1 the kept weights stay as they were.

An operator with a bias makes up for the means as well, exactly: then H is the covariance of its inputs
(:func:`covariance`).

The share needs only the Grams of two halves of the calibration windows: fitted on one half, tested on the other, both
ways. The weights are then fitted on twice as many tokens, and the best penalty falls as 1 / tokens: it is halved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core import LayerProblem, ProblemSums
from ..core.linalg import alive_gram, damped_cholesky
from ..core.sums import DriftFrom, mirror
from ..settings.structure import Structure
from .choose import best_channels, channel_scores, eliminate
from .units import block_places

GRID, ROWS = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0), 256
"""Shares that cross-validation tries, on at most so many output rows."""

CONSTANT = 1e-5
"""Share of an input's mean square below which its variance, the difference from the squared mean, is rounding."""


@dataclass(frozen=True)
class ChannelStatistics:
    """What is known of the input channels of an operator.

    Args:
        problem: the layer problem of the operator, over all calibration windows.
        mean: (n,) mean of the inputs over tokens.
        halves: (n, n) Grams of two halves of the windows, ``half_means``: (n,) means; None where there is one window.
        drift_mean: (m,) mean drift of the outputs, times the share of the dense target; None without drift.
        tokens: that were routed to the operator's expert; None where it reads all tokens.
    """

    problem: LayerProblem
    mean: Tensor
    halves: tuple[Tensor, Tensor] | None
    drift_mean: Tensor | None = None
    half_means: tuple[Tensor, Tensor] | None = None
    tokens: int | None = None

    @property
    def target_mean(self) -> Tensor:
        """(m,) fp64 mean of the target outputs, without bias."""
        mean = self.problem.weight.double() @ self.mean.double()
        return mean if self.drift_mean is None else mean + self.drift_mean

    @property
    def centre(self) -> Tensor:
        """(n,) what variances are around: the mean, or zero for an expert's only token, which has no variance."""
        return torch.zeros_like(self.mean) if self.tokens == 1 else self.mean

    def centred(self) -> LayerProblem:
        """Return the problem with inputs and drift less their means: its errors are those with the best bias.

        For weights V that bias changes by ``mean(t) - V mean(x)``, with t the target outputs. With mu the mean of the
        inputs and s that of the drift, H becomes ``H - mu mu^T``, G ``G - s mu^T`` and c ``c - s^2``.
        """
        problem = self.problem
        gram = covariance(problem.gram, self.centre)
        drift, energy = problem.drift, problem.drift_energy
        if drift is not None and energy is not None and self.drift_mean is not None:
            drift = drift - torch.outer(self.drift_mean, self.mean).to(drift.dtype)
            drift = drift.mul_(gram.diagonal() > 0)
            energy = (energy.double() - self.drift_mean.square()).clamp_min(0)
        return replace(problem, gram=gram, drift=drift, drift_energy=energy, cache=None)

    def around(self, weight: Tensor) -> ChannelStatistics:
        """Write the same problem around other weights, (m, n): every V keeps its error, with a bias, too."""
        drift_mean = (self.problem.weight - weight).double() @ self.mean
        if self.drift_mean is not None:
            drift_mean += self.drift_mean
        return replace(self, problem=self.problem.around(weight), drift_mean=drift_mean)


class ChannelSums:
    """The sums of a layer problem, the means of its inputs, and both of the first half of the windows.

    Windows are drawn at random, so the two halves are samples of the same text. A batch that has windows of both is
    cut, so the halves do not depend on the batch size.

    Args:
        weight: (m, n) dense weights of the operator; ``windows``: calibration windows in all.
        drift_from: as for :class:`~fistapruner.core.ProblemSums`.
        routed: it reads the tokens of one expert, perhaps few or none.
    """

    def __init__(
        self, weight: Tensor, windows: int, *, drift_from: DriftFrom | None = None, routed: bool = False
    ) -> None:
        self._sums = ProblemSums(weight, drift_from=drift_from)
        self._routed = routed
        self._half = windows // 2
        self._total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
        self._first: tuple[Tensor, Tensor, int] | None = None
        self._drift = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
        self._compared = 0

    def add(self, start: int, inputs: Tensor, dense: Tensor | None = None, residual: Tensor | None = None) -> None:
        """Add (windows, seqlen, n) inputs of a batch whose first window is ``start``; batches come in order.

        ``dense`` and ``residual``: as for :meth:`~fistapruner.core.ProblemSums.add`, by tokens.
        """
        before = self._half - start
        if 0 < before < len(inputs):
            cut = before * inputs.shape[1]
            first, second = [(None, None) if part is None else (part[:cut], part[cut:]) for part in (dense, residual)]
            self.add(start, inputs[:before], first[0], second[0])
            self.add(start + before, inputs[before:], first[1], second[1])
            return
        self.add_tokens(start, inputs.reshape(-1, inputs.shape[-1]), dense, residual)

    def add_tokens(self, start: int, flat: Tensor, dense: Tensor | None = None, residual: Tensor | None = None) -> None:
        """Add (tokens, n) inputs of windows that are all in one half, from ``start`` on; else as :meth:`add`."""
        if start >= self._half > 0 and self._first is None:
            self._first = self._sums.gram.clone(), self._total.clone(), self._sums.tokens
        self._total += flat.sum(0, dtype=torch.float64)
        self._sums.add(flat, dense, residual)
        if dense is not None and self._sums.drift_from == "outputs":
            seen = self._sums.weight.double() @ flat.sum(0, dtype=torch.float64)
            self._drift += dense.sum(0, dtype=torch.float64) - seen
            self._drift += 0 if residual is None else residual.sum(0, dtype=torch.float64)
            self._compared += len(flat)

    def statistics(self, name: str, target: float) -> ChannelStatistics:
        """Return the statistics of all windows; the sums are used up.

        ``name``: full name of the operator; ``target``: share of the dense target.
        """
        sums, halves, half_means = self._sums, None, None
        mean = self._total / max(sums.tokens, 1)
        if not sums.tokens and self._routed:
            problem = problem_without_tokens(sums.weight, name)
            return ChannelStatistics(problem, mean, None, tokens=0)
        first, self._first = self._first, None
        if first is not None and 0 < first[2] < sums.tokens:
            gram, total, tokens = first
            rest = mirror((sums.gram - gram).div_(sums.tokens - tokens))
            halves = mirror(gram.div_(tokens)), rest
            half_means = total / tokens, (self._total - total) / (sums.tokens - tokens)
        problem = sums.problem(name, target, release=True)
        drift_mean = target * self._drift / self._compared if self._compared else None
        tokens_routed = sums.tokens if self._routed else None
        return ChannelStatistics(problem, mean, halves, drift_mean, half_means, tokens_routed)


@dataclass(frozen=True)
class Removal:
    """Channels that were chosen, and the weights of those that remain.

    Args:
        keep: (k,) int64 the kept channels, ascending; ``places``: (k * block,) the inputs that belong to them.
        weight: (m, k * block) fp32 weights; ``bias``: (m,) fp32 what is added to the bias, None where nothing is.
        shrink: share of shrinkage that was used; None where nothing depended on it.
        dense: relative error with all channels, from drift alone; None without drift.
        dropped: relative error with the channels removed, and all else as it was.
        validated: mean relative error of fits on half of the windows, on the other half, without drift; None where
            none were fitted.
    """

    keep: Tensor
    places: Tensor
    weight: Tensor
    bias: Tensor | None
    shrink: float | None
    dense: float | None
    dropped: float
    validated: float | None = None
    warnings: tuple[str, ...] = ()


def remove_channels(
    known: ChannelStatistics,
    kept: int,
    settings: Structure,
    block: int = 1,
    *,
    importance: Tensor | None = None,
    chosen: Tensor | None = None,
    biased: bool = False,
) -> Removal:
    """Choose ``kept`` channels of one operator, and refit its weights.

    Args:
        block: consecutive inputs of each channel, which stay or go together.
        importance: (m,) weights of the rows in the choice; None counts all alike.
        chosen: (kept,) places of the channels to keep, ascending, where another method has chosen them.
        biased: the operator has a bias. A refit fits it, too, so it is on the covariance of the inputs, as is obs.
    """
    problem = known.problem
    refits, greedy = settings.compensation == "refit", settings.method == "obs" and chosen is None
    biased = biased and settings.compensation != "none"
    means = known.half_means if biased else None
    fitting = known.centred() if biased else problem
    rated = fitting if settings.method == "obs" else problem
    rated = rated if importance is None else rated.weighted(importance)
    channels, warnings = problem.shape[1] // block, list[str]()
    if chosen is None:
        method = settings.method if settings.method in ("flap", "magnitude") else "energy"
        keep = best_channels(channel_scores(method, rated, known.centre).view(-1, block).sum(1), kept)
    else:
        keep = chosen.to(problem.weight.device)
    shrink, tested = 0.5, None
    if known.tokens is not None and (few := share_of_few(problem.shape[1], known.tokens)) is not None:
        shrink = few
    elif known.halves is not None and (refits or settings.method == "obs"):
        errors = validation_errors(problem, known.halves, block_places(keep, block), means=means)
        tested = -min(zip(errors, (-share for share in GRID), strict=True))[1]  # of equal ones the largest
        shrink = tested / (2 - tested)  # half the penalty, for twice the tokens
    if greedy:
        gone, said = eliminate(shrunk(rated, shrink), channels - kept, block)
        warnings += said
        remaining = torch.ones(channels, dtype=torch.bool)
        remaining[gone] = False
        keep = remaining.nonzero()[:, 0].to(problem.weight.device)
    places = block_places(keep, block)
    weight, bias = problem.weight[:, places], None
    if refits:
        weight, said = refitted(shrunk(fitting, shrink).restricted(places))
        warnings += said
    if biased:
        wanted = known.target_mean if refits else problem.weight.double() @ known.mean.double()
        bias = (wanted - weight.double() @ known.mean[places].double()).float()
    validated = None
    if refits and tested is not None and known.halves is not None:
        (validated,) = validation_errors(problem, known.halves, places, (tested,), means)
    dropped = problem.restricted(places).dense_error()
    assert dropped is not None
    return Removal(
        keep=keep,
        places=places,
        weight=weight,
        bias=bias,
        shrink=shrink if refits or settings.method == "obs" else None,
        dense=problem.dense_error(),
        dropped=dropped,
        validated=validated,
        warnings=tuple(dict.fromkeys(warnings)),
    )


def removal_error(known: ChannelStatistics, places: Tensor, weight: Tensor, bias: Tensor | None = None) -> float:
    """Compute the relative error of an operator that has lost inputs.

    With c added to its bias, that is ``f(V) + 2 <c, mean(V x - t)> + |c|^2``, with t the target outputs. Arguments are
    as in :class:`Removal`.
    """
    problem = known.problem
    error = problem.restricted(places).relative_error(weight)
    if bias is None:
        return error
    shift = 2 * (weight.double() @ known.mean[places].double() - known.target_mean) + bias.double()
    energy = float(problem.output_energy.sum())
    return max(error + float((bias.double() * shift).sum()) / energy, 0.0) if energy else error


def share_of_few(inputs: int, tokens: int) -> float | None:
    """Return the share for an expert's Gram of fewer tokens than inputs, ``n / (n + p)``; None for others."""
    return inputs / (inputs + tokens) if tokens < inputs else None


def problem_without_tokens(weight: Tensor, name: str) -> LayerProblem:
    """Make the problem of an expert that no token was routed to, (m, n): all inputs count alike."""
    return LayerProblem(weight, torch.eye(weight.shape[1], device=weight.device), name=name)


def shrunk(problem: LayerProblem, share: float) -> LayerProblem:
    """Return the problem with its Gram shrunk towards the diagonal by ``share``, from 0 to 1."""
    drift = None if problem.drift is None else problem.drift * (1 - share)
    gram = (1 - share) * problem.gram + share * torch.diag(problem.gram.diagonal())
    return replace(problem, gram=gram, drift=drift, cache=None)


def covariance(gram: Tensor, mean: Tensor) -> Tensor:
    """Compute ``H - mean mean^T``; rows and columns of constant inputs are exactly zero."""
    mean = mean.to(gram.dtype)
    varies = gram.diagonal() - mean.square() > CONSTANT * gram.diagonal()
    return (gram - torch.outer(mean, mean)).mul_(varies[:, None]).mul_(varies)


def refitted(problem: LayerProblem, damping: float = 0.0) -> tuple[Tensor, list[str]]:
    """Compute the least-squares weights of a problem without zeros, in fp64.

    ``damping``: share of the Gram's mean diagonal. Returns (m, n) fp32, and a warning if it had to be raised.
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
        problem: the layer problem of all tokens; ``halves``: (n, n) Grams of two halves of the calibration windows.
        keep: (k,) kept inputs; ``shares``: of shrinkage.
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

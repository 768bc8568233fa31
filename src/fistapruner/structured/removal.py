"""Remove input channels of one operator: choose them, and let the remaining ones make up for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core import LayerProblem
from ..recipes.structure_settings import Structure
from .elimination import eliminate
from .scores import channel_scores
from .shrinkage import GRID, covariance, for_twice_the_tokens, refitted, share_of_few, shrunk, validation_errors


@dataclass(frozen=True)
class ChannelStatistics:
    """What is known of the input channels of an operator.

    Args:
        problem: the layer problem of the operator, over all calibration windows.
        mean: (n,) mean of the inputs over tokens.
        drift_mean: (m,) mean drift of the outputs from those of the dense operator, times the share of the dense
            target; None without drift.
        halves: (n, n) Grams of two halves of the windows; None where there is one window only.
        half_means: (n,) means of the inputs in each half; None with ``halves``.
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


@dataclass(frozen=True)
class Removal:
    """Channels that were chosen, and the weights of those that remain.

    Args:
        keep: (k,) int64 places of the kept channels, ascending.
        places: (k * block,) the inputs that belong to them.
        weight: (m, k * block) fp32 weights of the operator.
        bias: (m,) fp32 what is added to its bias; None where nothing is.
        shrink: share of shrinkage that was used; None where nothing depended on it.
        dense: relative error of the operator with all its channels, from drift alone; None without drift.
        dropped: relative error with the channels removed and the other weights, and the bias, as they were.
        validated: mean relative error on tokens that the weights were not fitted on (fitted on half of the windows,
            tested on the other, drift left out), None where none were fitted; ``validated_dropped``: without making up
            for the removed channels.
        warnings: sentences.
    """

    keep: Tensor
    places: Tensor
    weight: Tensor
    bias: Tensor | None
    shrink: float | None
    dense: float | None
    dropped: float
    validated: float | None = None
    validated_dropped: float | None = None
    warnings: tuple[str, ...] = ()


def remove_channels(
    known: ChannelStatistics,
    kept: int,
    settings: Structure,
    importance: Tensor | None = None,
    block: int = 1,
    *,
    chosen: Tensor | None = None,
    biased: bool = False,
) -> Removal:
    """Choose ``kept`` channels of one operator, and refit its weights.

    Args:
        known: the operator's inputs.
        kept: channels to keep, fewer than all.
        settings: how they are chosen and made up for, resolved.
        importance: (m,) weights of the rows in the choice; None counts all alike.
        block: consecutive inputs of each channel, which stay or go together.
        chosen: (kept,) places of the channels to keep, ascending, where another method has chosen them.
        biased: the operator has a bias. A refit fits it, too, so it is on the covariance of the inputs, as is obs.
    """
    problem = known.problem
    biased = biased and settings.compensation != "none"
    fitting = known.centred() if biased else problem
    rated = fitting if settings.method == "obs" else problem
    rated = rated if importance is None else rated.weighted(importance)
    channels = problem.shape[1] // block
    warnings: list[str] = []
    if chosen is None:
        method = settings.method if settings.method in ("flap", "magnitude") else "energy"
        keep = best_channels(channel_scores(method, rated, known.centre).view(-1, block).sum(1), kept)
    else:
        keep = chosen.to(problem.weight.device)
    shrink, tested = choose_shrink(known, block_places(keep, block), settings, biased=biased)
    if settings.method == "obs" and chosen is None:
        found = eliminate(shrunk(rated, shrink), channels - kept, block, every_subset=True)
        warnings += found.warnings
        remaining = torch.ones(channels, dtype=torch.bool)
        remaining[found.order] = False
        keep = remaining.nonzero()[:, 0].to(problem.weight.device)
    places = block_places(keep, block)
    small = problem.restricted(places)
    weight, bias, more = made_up(known, places, shrink, settings, biased=biased)
    warnings += more
    used = settings.compensation == "refit" or settings.method == "obs"
    validated = validated_dropped = None
    if tested is not None and known.halves is not None:
        (validated_dropped,) = validation_errors(problem, known.halves, places, (1.0,))
        if settings.compensation == "refit":
            means = known.half_means if biased else None
            (validated,) = validation_errors(problem, known.halves, places, (tested,), means)
    dropped = small.dense_error()
    assert dropped is not None
    return Removal(
        keep=keep,
        places=places,
        weight=weight,
        bias=bias,
        shrink=shrink if used else None,
        dense=problem.dense_error(),
        dropped=dropped,
        validated=validated,
        validated_dropped=validated_dropped,
        warnings=tuple(dict.fromkeys(warnings)),
    )


def made_up(
    known: ChannelStatistics, places: Tensor, shrink: float, settings: Structure, *, biased: bool
) -> tuple[Tensor, Tensor | None, list[str]]:
    """Compute the weights of the inputs that stay, which make up for the others.

    Args:
        known: what is known of the operator's inputs.
        places: (k,) its inputs that stay.
        shrink: share of shrinkage of a refit.
        settings: how they are made up for.
        biased: the bias changes, too.

    Returns:
        (m, k) weights, (m,) what is added to the bias or None, and warnings.
    """
    problem = known.problem
    weight = problem.weight[:, places]
    warnings: list[str] = []
    if settings.compensation == "refit":
        fitting = known.centred() if biased else problem
        weight, warnings = refitted(shrunk(fitting, shrink).restricted(places))
    if not biased:
        return weight, None, warnings
    wanted = known.target_mean if settings.compensation == "refit" else problem.weight.double() @ known.mean.double()
    return weight, (wanted - weight.double() @ known.mean[places].double()).float(), warnings


def removal_error(known: ChannelStatistics, places: Tensor, weight: Tensor, bias: Tensor | None = None) -> float:
    """Compute the relative error of an operator that has lost inputs.

    With ``c`` added to its bias, that is ``f(V) + 2 <c, mean(V x - t)> + |c|^2``, with t the target outputs.

    Args:
        known: what is known of the operator's inputs.
        places: (k,) its inputs that stay.
        weight: (m, k) its weights.
        bias: (m,) what is added to its bias; None is nothing.
    """
    problem = known.problem
    error = problem.restricted(places).relative_error(weight)
    if bias is None:
        return error
    shift = 2 * (weight.double() @ known.mean[places].double() - known.target_mean) + bias.double()
    energy = float(problem.output_energy.sum())
    return max(error + float((bias.double() * shift).sum()) / energy, 0.0) if energy else error


def block_places(keep: Tensor, block: int) -> Tensor:
    """Return the places of the inputs of some channels of ``block`` consecutive inputs each."""
    return (keep[:, None] * block + torch.arange(block, device=keep.device)).reshape(-1)


def choose_share(errors: Sequence[float]) -> float:
    """Return the share of :data:`GRID` with the smallest validation error; of equal ones the largest."""
    return min(zip(errors, (-share for share in GRID), strict=True))[1] * -1.0


def choose_shrink(
    known: ChannelStatistics, keep: Tensor, settings: Structure, *, biased: bool
) -> tuple[float, float | None]:
    """Choose the share of shrinkage.

    For an expert with few tokens it is that of its zeros (:func:`.shrinkage.share_of_few`).

    Args:
        known: what is known of the operator's inputs.
        keep: (k,) its inputs that stay.
        settings: what it is for.
        biased: a bias makes up for the means.

    Returns:
        The share, and the one that cross-validation chose for half of the tokens; None where it did not.
    """
    if settings.shrink != "auto":
        return float(settings.shrink), None
    if known.tokens is not None and (share := share_of_few(known.problem.shape[1], known.tokens)) is not None:
        return share, None
    if known.halves is None or (settings.compensation != "refit" and settings.method != "obs"):
        return 0.5, None
    best = choose_share(
        validation_errors(known.problem, known.halves, keep, means=known.half_means if biased else None)
    )
    return for_twice_the_tokens(best), best


def best_channels(scores: Tensor, count: int) -> Tensor:
    """Return the ``count`` channels with the largest scores, ascending; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values

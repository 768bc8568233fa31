"""Remove input channels of one operator: choose them, and let the remaining ones make up for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..problem import LayerProblem
from ..recipes.structure_settings import Structure
from .elimination import eliminate
from .scores import channel_scores
from .shrinkage import GRID, for_twice_the_tokens, refitted, shrunk, validation_errors


@dataclass(frozen=True)
class ChannelStatistics:
    """What is known of the input channels of an operator.

    Args:
        problem: the layer problem of the operator, over all calibration windows.
        mean: (n,) mean of the inputs over tokens.
        halves: (n, n) Grams of two halves of the windows; None where there is one window only.
    """

    problem: LayerProblem
    mean: Tensor
    halves: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Removal:
    """Channels that were chosen, and the weights of those that remain.

    Args:
        keep: (k,) int64 places of the kept channels, ascending.
        places: (k * block,) the inputs that belong to them.
        weight: (m, k * block) fp32 weights of the operator.
        shrink: share of shrinkage that was used; None where nothing depended on it.
        dense: relative error of the operator with all its channels, from drift alone; None without drift.
        dropped: relative error with the channels removed and the other weights as they were.
        validated: mean relative error on tokens that the weights were not fitted on (fitted on half of the windows,
            tested on the other, drift left out); ``validated_dropped``: without making up for the removed channels.
        warnings: sentences.
    """

    keep: Tensor
    places: Tensor
    weight: Tensor
    shrink: float | None
    dense: float | None
    dropped: float
    validated: float | None = None
    validated_dropped: float | None = None
    warnings: tuple[str, ...] = ()


def remove_channels(
    known: ChannelStatistics, kept: int, settings: Structure, importance: Tensor | None = None, block: int = 1
) -> Removal:
    """Choose ``kept`` channels of one operator, and refit its weights.

    Args:
        known: the operator's inputs.
        kept: channels to keep, fewer than all.
        settings: how they are chosen and made up for.
        importance: (m,) weights of the rows in the choice; None counts all alike.
        block: consecutive inputs of each channel, which stay or go together.
    """
    problem = known.problem
    rated = problem if importance is None else problem.weighted(importance)
    channels = problem.shape[1] // block
    warnings: list[str] = []
    scores = channel_scores("energy" if settings.method == "obs" else settings.method, rated, known.mean)
    keep = _kept(scores.view(-1, block).sum(1), kept)
    shrink, tested = _shrink(known, block_places(keep, block), settings)
    if settings.method == "obs":
        found = eliminate(shrunk(rated, shrink), channels - kept, block)
        warnings += found.warnings
        remaining = torch.ones(channels, dtype=torch.bool)
        remaining[found.order] = False
        keep = remaining.nonzero()[:, 0].to(problem.weight.device)
    places = block_places(keep, block)
    small = problem.restricted(places)
    weight = small.weight
    if settings.compensate == "refit":
        weight, more = refitted(shrunk(problem, shrink).restricted(places))
        warnings += more
    used = settings.compensate == "refit" or settings.method == "obs"
    errors = None
    if tested is not None and known.halves is not None:
        errors = validation_errors(problem, known.halves, places, (tested, 1.0))
    dense = problem.dense_errors()
    dropped = small.dense_errors()
    assert dropped is not None
    return Removal(
        keep=keep,
        places=places,
        weight=weight,
        shrink=shrink if used else None,
        dense=None if dense is None else dense[0],
        dropped=dropped[0],
        validated=errors[0] if errors else None,
        validated_dropped=errors[1] if errors else None,
        warnings=tuple(dict.fromkeys(warnings)),
    )


def block_places(keep: Tensor, block: int) -> Tensor:
    """Return the places of the inputs of some channels of ``block`` consecutive inputs each."""
    return (keep[:, None] * block + torch.arange(block, device=keep.device)).reshape(-1)


def choose_share(errors: Sequence[float], shares: Sequence[float] = GRID) -> float:
    """Return the share with the smallest validation error; of equal ones the largest."""
    return min(zip(errors, (-share for share in shares), strict=True))[1] * -1.0


def _shrink(known: ChannelStatistics, keep: Tensor, settings: Structure) -> tuple[float, float | None]:
    """Return the share of shrinkage, and the one cross-validation chose for half of the tokens."""
    if settings.shrink != "auto":
        return float(settings.shrink), None
    if known.halves is None or (settings.compensate == "none" and settings.method != "obs"):
        return 0.5, None
    best = choose_share(validation_errors(known.problem, known.halves, keep))
    return for_twice_the_tokens(best), best


def _kept(scores: Tensor, count: int) -> Tensor:
    """Return the ``count`` channels with the largest scores, ascending; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values

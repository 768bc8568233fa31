"""Measure which answers of preference pairs a model prefers, from log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..papers.mrpo import accuracy, margins_of
from ..runs.records import PreferenceFigures
from ..runtime.numerics import mean_and_error
from .logits import mcnemar


def preference_figures(models: Mapping[str, Tensor], tokens: Tensor, result: str) -> dict[str, PreferenceFigures]:
    """Measure models on the same pairs.

    Args:
        models: (pairs, 2) summed log-probabilities of the chosen and rejected answers, by the model's name.
        tokens: (pairs, 2) tokens of the answers.
        result: the model that the others are tested against.
    """
    right = {name: margins_of(values) > 0 for name, values in models.items()}
    found = {}
    for name, values in models.items():
        margins = margins_of(values)
        by_token = margins_of(values / tokens)
        figures = PreferenceFigures(
            accuracy=float(accuracy(margins)),
            accuracy_error=accuracy_error(margins),
            normalised=float(accuracy(by_token)),
            normalised_error=accuracy_error(by_token),
        )
        if name != result:
            lost = int((right[name] & ~right[result]).sum())
            won = int((right[result] & ~right[name]).sum())
            figures.lost, figures.won, figures.p_value = lost, won, mcnemar(lost, won)
        found[name] = figures
    return found


def accuracy_error(margins: Tensor) -> float:
    """Return the standard error of an accuracy of (pairs,) margins."""
    return mean_and_error((margins > 0).double() + (margins == 0).double() / 2)[1]

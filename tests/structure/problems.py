"""Small layer problems of channels, what is known of their inputs, and models that must compute the same."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import tiny
from fistapruner import LayerProblem
from fistapruner.settings.structure import Structure
from fistapruner.structure.refit import ChannelStatistics

ROWS, CHANNELS, COUNT = 5, 8, 200
TOKENS = tiny.tokens(2, 16)


def assert_alike(small: Any, dense: Any) -> None:
    """Two models have the same logits but for rounding, and write the same, with their caches."""
    torch.testing.assert_close(small(TOKENS).logits, dense(TOKENS).logits, rtol=1e-4, atol=1e-4)
    written = [model.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0) for model in (small, dense)]
    assert torch.equal(*written)


def by(method: str, compensate: str = "auto") -> Structure:
    """Settings of a removal."""
    settings: dict[str, Any] = {"remove": "25%", "method": method, "compensate": compensate}
    return Structure(**settings)


def make(drift: float, target: float = 1.0, seed: int = 0, channels: int = CHANNELS) -> LayerProblem:
    """A random layer problem."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator)
    dense = torch.randn(COUNT, channels, generator=generator) @ mixing
    seen = dense + drift * torch.randn(COUNT, channels, generator=generator)
    weight = torch.randn(ROWS, channels, generator=generator)
    return LayerProblem.from_activations(weight, seen, dense if drift else None, target=target)


def brute(problem: LayerProblem, keep: Tensor) -> float:
    """Smallest error with the other channels zero: a solve in fp64 of f = tr(V H V') - 2 <V, B> + c, around W."""
    gram, weight = problem.gram.double(), problem.weight.double()
    linear = weight @ gram
    if problem.drift is not None:
        linear = linear + problem.drift.double()
    full = torch.zeros_like(weight)
    full[:, keep] = torch.linalg.solve(gram[keep][:, keep], linear[:, keep].T).T
    change = full - weight
    error = ((change @ gram) * change).sum()
    if problem.drift is not None and problem.drift_energy is not None:
        error += problem.drift_energy.double().sum() - 2 * (change * problem.drift.double()).sum()
    return float(error)


def statistics(weight: Tensor, inputs: Tensor) -> ChannelStatistics:
    """What is known of the inputs of an operator."""
    half = len(inputs) // 2
    grams = [part.T @ part / len(part) for part in (inputs[:half], inputs[half:])]
    return ChannelStatistics(LayerProblem.from_activations(weight, inputs), inputs.mean(0), (grams[0], grams[1]))


def unshrunk(known: ChannelStatistics) -> ChannelStatistics:
    """The same with halves that are alike, for which no shrinkage is best."""
    gram, mean = known.problem.gram, known.mean.double()
    return replace(known, halves=(gram, gram), half_means=(mean, mean))

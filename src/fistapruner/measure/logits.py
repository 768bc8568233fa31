"""Reduce logits to token NLL, KL divergence and top-1 agreement, with errors and paired tests.

Logits of a whole window would be the largest tensor of an evaluation: 1 GB for 2,048 tokens and 128,000 entries. So
hidden states go through the head in slices of some hundred tokens, and each slice is reduced to a few numbers for each
token, in blocks of rows that fit the processor's cache, before the next slice is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..papers.mrpo import accuracy, margins_of
from ..runs.records import Divergence, Perplexity, PreferenceFigures
from ..runtime.numerics import BUDGETS, Budgets, mean_and_error, slices

Head = Callable[[Tensor], Tensor]
"""Maps hidden states of the last decoder layer (tokens, width) to logits (tokens, vocabulary)."""


@dataclass
class WindowSums:
    """Sums over the ``length`` predicted tokens of each window, (windows,) fp64 each."""

    nll: Tensor
    length: int
    reference_nll: Tensor | None = None
    kl: Tensor | None = None  # KL(reference || model)
    agree: Tensor | None = None  # tokens with the same most likely next token


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the (tokens,) fp32 NLL of ``targets`` (tokens,) under ``logits`` (tokens, vocabulary)."""
    rows = logits.float()
    return torch.logsumexp(rows, dim=-1) - rows.gather(1, targets[:, None]).squeeze(1)


def token_divergence(logits: Tensor, reference: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compare two models' logits (tokens, vocabulary) of the same tokens.

    Returns:
        (tokens,) fp32 each: NLL of ``targets`` under the model, under the reference, KL(reference || model), and
        whether both have the same most likely token.
    """
    p, q = logits.float(), reference.float()
    index = targets[:, None]
    top_p, top_q = p.argmax(-1), q.argmax(-1)
    shift, norm = torch.logsumexp(p, dim=-1), torch.logsumexp(q, dim=-1)
    nll = shift - p.gather(1, index).squeeze(1)
    reference_nll = norm - q.gather(1, index).squeeze(1)
    # KL = sum q (log q - log p). Where the reference gives a token probability 0 (logit -inf, a padded vocabulary), the
    # term is 0 for any model; 0 * inf would be NaN.
    weight = (q - norm[:, None]).exp_()
    gap = (q - p).masked_fill_(weight == 0, 0.0)
    kl = torch.linalg.vecdot(weight, gap) + shift - norm
    return nll, reference_nll, kl.clamp_min_(0.0), (top_p == top_q).float()


def sum_over_tokens(
    hidden: Sequence[Tensor], targets: Tensor, heads: Sequence[Head], vocabulary: int, budgets: Budgets = BUDGETS
) -> list[float]:
    """Sum the NLL over ``targets``; with a second model, the reference, all of :func:`token_divergence`.

    Args:
        hidden: (tokens, width) output of each model's last decoder layer at the token before each target.
        targets: (tokens,) token ids.
        heads: final norm and language-model head of each.
        vocabulary: width of the logits.
        budgets: bytes of logits at once.
    """
    sums = []
    for start, stop in slices(len(targets), 4 * vocabulary, budgets.head // len(heads)):
        logits = [head(states[start:stop]) for head, states in zip(heads, hidden, strict=True)]
        wanted = targets[start:stop]
        parts = []
        for a, b in budgets.cache(logits[0]):
            rows = [each[a:b] for each in logits]
            found = token_divergence(rows[0], rows[1], wanted[a:b]) if rows[1:] else (token_nll(rows[0], wanted[a:b]),)
            parts.append(torch.stack(found))
        sums.append(torch.cat(parts, dim=1).double().sum(1))
    total = torch.zeros(len(sums[0]), dtype=torch.float64)
    for values in torch.stack(sums).cpu():
        total += values
    return [float(value) for value in total]


def perplexity_of(sums: Tensor, length: int, *, sha256: str, **about: Any) -> Perplexity:
    """Make the record of (windows,) NLL sums of ``length`` tokens; ``about`` has its other fields.

    Tokens of a window depend on each other, so windows are the independent observations.
    """
    means = sums.double() / length
    nll, error = mean_and_error(means)
    value = math.exp(nll) if nll < 700 else math.inf
    return Perplexity(
        **about,
        windows=sums.numel(),
        tokens=sums.numel() * length,
        perplexity=value,
        standard_error=value * error,
        nll=nll,
        nll_standard_error=error,
        text_sha256=sha256,
        window_nlls=tuple(round(value, 6) for value in means.tolist()),
    )


def divergence_of(sums: WindowSums) -> Divergence:
    """Make the divergence record of sums that have a reference."""
    assert sums.reference_nll is not None
    assert sums.kl is not None
    assert sums.agree is not None
    kl, kl_error = mean_and_error(sums.kl.double() / sums.length)
    agree, agree_error = mean_and_error(sums.agree.double() / sums.length)
    difference, difference_error = mean_and_error((sums.nll - sums.reference_nll).double() / sums.length)
    return Divergence(kl, kl_error, agree, agree_error, difference, difference_error)


def mcnemar(lost: int, won: int) -> float:
    """Return the p-value of the two-sided exact McNemar test (1947) of ``lost`` against ``won`` items."""
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def preference_figures(models: Mapping[str, Tensor], tokens: Tensor, result: str) -> dict[str, PreferenceFigures]:
    """Measure which answers of the same preference pairs models prefer.

    Args:
        models: (pairs, 2) summed log-probabilities of the chosen and rejected answers, by the model's name.
        tokens: (pairs, 2) tokens of the answers.
        result: the model that the others are tested against.
    """
    right = {name: margins_of(values) > 0 for name, values in models.items()}
    found = {}
    for name, values in models.items():
        margins, by_token = margins_of(values), margins_of(values / tokens)
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

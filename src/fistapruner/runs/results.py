"""What an evaluation returns: numbers, each beside the text, window length and precision it needs.

``Evaluation.to_dict`` gives JSON, and ``report.json`` stores exactly that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BeforeValidator, TypeAdapter

from ..runtime.show import finite

Loss = Annotated[float, BeforeValidator(lambda value: math.inf if value is None else value)]
"""Infinite where a model gives a token of the text no chance at all, which is null in JSON."""

StandardError = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""NaN where a single observation leaves it undefined, which is null in JSON."""


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of one model on one text.

    Args:
        data: name of the data set or file; ``split``: its split, for a local file ``file``.
        windows: number of non-overlapping windows; ``seqlen``: tokens in one; ``tokens``: predicted tokens behind the
            mean, ``windows * (seqlen - 1)``.
        bos: where the BOS token stands: ``none``, ``text`` (once, before the text) or ``window`` (first of every one).
        dtype: precision of the forward pass.
        perplexity: exp of the mean token NLL; ``standard_error``: of it, over windows (delta method).
        nll: mean negative log-likelihood of a token, in nats; ``nll_standard_error``: of it, over windows.
        text_sha256: hash of the windows' token ids; ``window_nlls``: mean token NLL of each, to six decimals. With
            them figures of the same windows are compared pair by pair.
    """

    data: str
    split: str
    seqlen: int
    windows: int
    tokens: int
    dtype: str
    perplexity: Loss
    standard_error: StandardError
    nll: Loss
    nll_standard_error: StandardError
    bos: str = "none"
    text_sha256: str = ""
    window_nlls: tuple[Loss, ...] = field(default=(), repr=False)

    @property
    def measured_on(self) -> tuple[str, str]:
        """Hash of the windows and precision of the passes: figures compare where both are the same."""
        return self.text_sha256, self.dtype


@dataclass(frozen=True)
class Divergence:
    """How far a model's next-token distributions are from a reference model's, on the same tokens.

    Args:
        kl: mean over tokens of KL(reference || model), in nats.
        top1_agreement: share of tokens where both models' most likely next token is the same.
        nll_difference: mean NLL of the model minus that of the reference: ln of the ratio of perplexities.
        kl_standard_error, top1_standard_error, nll_difference_standard_error: over windows, the last one paired.
    """

    kl: Loss
    kl_standard_error: StandardError
    top1_agreement: float
    top1_standard_error: StandardError
    nll_difference: Loss
    nll_difference_standard_error: StandardError


@dataclass(frozen=True)
class TaskResult:
    """Score of a zero-shot task, alone or beside a reference model on the same items.

    Args:
        task: its name; ``items``: number of questions; ``shots``: examples in the prompt.
        metric: what ``value`` is: ``acc``, ``acc_norm``, ``exact_match``; after a comma how answers were filtered.
        value: the model's score; ``standard_error``: of it, over items.
        reference, reference_standard_error: those of the reference model on the same items, or None.
        lost: items that only the reference model gets right; ``won``: that only this model gets right.
        p_value: two-sided exact McNemar test of ``lost`` against ``won``; None, with these, where items are not just
            right or wrong.
        source: where the items came from; ``items_sha256``: hash of the items themselves.
        available: items that the task has, where ``items`` are only its first so many.
        dtype: precision of weights and passes; None where it was not recorded.
    """

    task: str
    metric: str
    items: int
    value: float
    standard_error: StandardError
    reference: float | None = None
    reference_standard_error: float | None = None
    lost: int | None = None
    won: int | None = None
    p_value: float | None = None
    shots: int = 0
    source: str = ""
    available: int | None = None
    dtype: str | None = None
    items_sha256: str = ""

    @property
    def measured_on(self) -> tuple[str, str, int, str, int, str, str | None]:
        """Task, metric, items, examples, source and precision: scores compare where all are the same."""
        return self.task, self.metric, self.items, self.items_sha256, self.shots, self.source, self.dtype

    @property
    def difference_error(self) -> float | None:
        """Standard error of the difference, paired over items; None where the pairs are not known."""
        if self.lost is None or self.won is None or self.items < 2:
            return None
        mean = (self.won - self.lost) / self.items
        return math.sqrt(((self.won + self.lost) / self.items - mean**2) / (self.items - 1))


@dataclass(frozen=True)
class Evaluation:
    """Everything one call of ``fistapruner.evaluate`` measured.

    Args:
        model: what was evaluated, as the user named it; ``against``: the reference (dense) model, or None.
        perplexity: of ``model``; None when only tasks were asked for. ``reference``: that of ``against`` on the same
            tokens; ``divergence``: of ``model`` from ``against`` on them.
        tasks: zero-shot results.
        seconds: wall time of the call; ``device``: that ran it.
        low_rank: additional weights of the low-rank part that belongs to ``model`` and was added to it; None without
            one.
        warnings: what to know of the figures.
    """

    model: str
    against: str | None = None
    perplexity: Perplexity | None = None
    reference: Perplexity | None = None
    divergence: Divergence | None = None
    tasks: tuple[TaskResult, ...] = field(default=())
    seconds: float = 0.0
    device: str = "cpu"
    low_rank: int | None = None
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        values: dict[str, Any] = finite(TypeAdapter(Evaluation).dump_python(self, mode="json"))
        return values

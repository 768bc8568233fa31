"""Records of one decoder layer: what was removed, and what every operator became."""

from __future__ import annotations

from typing import Any

from .base import Number, Record


class OperatorEntry(Record):
    """One pruned operator.

    Args:
        name: inside the decoder layer (``self_attn.q_proj``).
        shape: [outputs, inputs].
        sparsity: pattern asked for (``50%``, ``2:4``).
        zeros: exact number of zeros; ``density``: exact share of weights kept.
        relative_error: error of its outputs as a share of their energy (``f / c``); ``dense_error``: the same of its
            dense weights on the same inputs and target, None where inputs and hidden states had not drifted.
        group: operators that share a value read the same inputs and were solved together.
        steps: what each step of the method chain recorded: ``method``, ``relative_error``, ``seconds`` and its own
            keys. The report draws the ones it knows: ``rounds`` of a lambda search (list of {lambda, e_total, …}) and
            the ``path`` of ADMM (list of {rho, support_change, …}).
        tokens: calibration tokens that were routed to its expert; None of operators that read all tokens.
        low_rank: rank of the low-rank part beside it; None of operators without one. ``relative_error`` is then that of
            the sum; zeros and density are those of the sparse part.
        change: of a recovery run: norm of the weight's change over its norm; ``changed``: weights that changed.
    """

    name: str
    shape: tuple[int, int]
    sparsity: str
    zeros: int
    density: Number
    relative_error: float | None = None
    dense_error: float | None = None
    group: int | None = None
    steps: list[dict[str, Any]] = []
    tokens: int | None = None
    low_rank: int | None = None
    change: float | None = None
    changed: int | None = None

    @property
    def loss(self) -> float | None:
        """The error that pruning adds to that of the dense weights; 0 where it removes some of that."""
        return None if self.relative_error is None else max(0.0, self.relative_error - (self.dense_error or 0.0))


class RemovalEntry(Record):
    """Channels or experts that were removed from a decoder layer.

    Args:
        unit: what was removed (``MLP channels``).
        kept: of experts, the numbers in the dense model of those that stay; ``scores``: of all, REAP's.
        producers, consumer: the operators that write and read the channels.
        before, after: their number.
        method: how they were chosen; ``compensate``: how the remaining weights make up for them.
        shrink: share of shrinkage of the Gram.
        dense_error: relative error of the consumer's outputs with all channels, from drift alone; ``dropped_error``:
            without the removed ones, the others' weights as they were; ``relative_error``: with the new weights.
        validated_error, validated_dropped: relative_error and dropped_error on tokens that were not fitted (half of the
            windows), where shrinkage was chosen by them; the first only of a refit.
        permuted: shares of the weights' importance that an n:m pattern keeps in the old and in the new order of the
            remaining channels.
        tokens: calibration tokens that were routed to the expert whose channels were removed; None of others.
    """

    unit: str
    kept: list[int] | None = None
    scores: list[float] | None = None
    producers: list[str] = []
    consumer: str = ""
    before: int
    after: int
    method: str = ""
    compensate: str = ""
    shrink: float | None = None
    dense_error: float | None = None
    dropped_error: float | None = None
    relative_error: float | None = None
    validated_error: float | None = None
    validated_dropped: float | None = None
    permuted: tuple[float, float] | None = None
    tokens: int | None = None


class LayerEntry(Record):
    """One pruned decoder layer; also the content of ``RUN/layers/NNNN.json``.

    Args:
        index: from 0; ``name``: in the checkpoint (``model.layers.0``).
        seconds: wall seconds by phase (``capture``, ``gram``, ``solve``, ``reconstruct``, ``io``, …).
        relative_error: of the layer's output hidden states against the dense layer's, as a share of the energy of what
            the dense layer adds to its input, or whatever ``relative_error_of`` says.
        operators: in execution order; ``removals``: the channels that were removed.
        passed_after: seconds until the dense hidden states were ready for the next layer.
        finished: ISO time; ``device``: that solved it; ``peak_memory``: bytes while it ran.
        warnings: sentences.
    """

    index: int
    name: str = ""
    seconds: dict[str, Number] = {}
    relative_error: float | None = None
    relative_error_of: str | None = None
    operators: list[OperatorEntry] = []
    removals: list[RemovalEntry] = []
    passed_after: float | None = None
    finished: str | None = None
    device: str | None = None
    peak_memory: int | None = None
    warnings: list[str] = []

    @property
    def judged(self) -> list[OperatorEntry]:
        """Operators whose errors are known, without those that an allocation kept as they were."""
        known = [operator for operator in self.operators if operator.relative_error is not None]
        return [operator for operator in known if operator.sparsity != "0%" or self.removals]

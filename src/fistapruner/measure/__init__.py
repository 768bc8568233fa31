"""Measure a pruned model: perplexity, divergence from the dense model, zero-shot tasks."""

from ..runs.results import Divergence, Evaluation, Perplexity, TaskResult

__all__ = ["QUANTISE_FIRST", "Divergence", "Evaluation", "Perplexity", "TaskResult"]

QUANTISE_FIRST = (
    "Where a smaller file is all you want, quantise first: at the same size 4 or 8 bits cost less quality in what was "
    "measured; a model without some of its channels (--structure) can be quantised, too ('fistapruner export')."
)
"""Said beside sizes; measured in ``docs/smaller.md``."""

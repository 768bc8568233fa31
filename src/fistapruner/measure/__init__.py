"""Measure a pruned model: perplexity, divergence from the dense model, zero-shot tasks."""

from ..runs.results import Divergence, Evaluation, Perplexity, TaskResult

__all__ = ["Divergence", "Evaluation", "Perplexity", "TaskResult"]

"""What pruning did to a model: perplexity, divergence from the dense model, zero-shot tasks, speed."""

from ..runs.results import Divergence, Evaluation, Perplexity, TaskResult

__all__ = ["Divergence", "Evaluation", "Perplexity", "TaskResult"]

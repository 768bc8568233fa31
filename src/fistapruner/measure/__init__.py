"""Measure models: quality, zeros and speed.

``data`` cuts evaluation text into windows, ``streaming`` runs them through models by layers, ``logits`` reduces
what comes out to perplexity and divergence; ``tasks`` scores zero-shot tasks with lm-eval. ``evaluate`` is all of that
for one model, or two. ``generations`` continues prompts, ``inspection`` counts zeros and checks patterns, ``speed``
times decoding (the verb ``bench``). ``run`` does these for a finished run and keeps the figures with it.
"""

from ..runs.results import Divergence, Evaluation, Perplexity, TaskResult

__all__ = ["Divergence", "Evaluation", "Perplexity", "TaskResult"]

"""Measure models: quality, zeros and speed.

``data`` cuts evaluation text into windows, ``logits`` runs them through models by layers and reduces what comes out to
perplexity and divergence; ``tasks`` scores zero-shot tasks with lm-eval. ``evaluate`` is all of that for one model, or
two. ``inspection`` counts zeros and checks patterns, ``speed`` times decoding (the verb ``bench``). ``run`` does these
for a finished run, continues a few prompts, and keeps all of that with the run.
"""

QUANTISE_FIRST = (
    "Where a smaller file is all you want, quantise first: at the same size 4 or 8 bits cost less quality in what was "
    "measured; a model without some of its channels (--structure) can be quantised, too ('fistapruner export')."
)
"""Said beside sizes; measured in ``docs/smaller.md``."""

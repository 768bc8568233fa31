"""Say what a run did: one list of facts, and three renderers of it.

:func:`~.facts.facts` reads a :class:`Report` and lists what was measured and decided, each fact with its section,
label, values (dense model, before training, result) and how it was obtained. Terminal text (``summary``), model card
(``model_card``) and the page (``page``) show the same facts and compute nothing. Differences stand with their standard
errors and p-values; no sentence says what they mean. Beside the facts the page has at most four figures (``figures``):
the loss of a training, one heat map of the operators, and errors and sparsities by decoder layer. ``comparison`` does
the same for many runs under one protocol, ``status_text`` for a run that is not finished.

Everything is made from ``report.json`` or ``compare.json`` alone, and the same file gives the same text. Parts of a
report may be missing. Names of folders on this machine stand only in commands: cards and pages are published.
"""

from importlib import import_module

from ..runs.records import Comparison, Evaluation, LayerEntry, OperatorEntry, Report, load_run
from .facts import summary
from .measured import evaluation_text

# Results print as their verb prints them: print(fistapruner.prune(...)).
Report.__str__ = summary  # type: ignore[method-assign, assignment]
Evaluation.__str__ = evaluation_text  # type: ignore[method-assign, assignment]
Comparison.__str__ = lambda found: import_module(".comparison", __name__).comparison_table(found)  # type: ignore[method-assign]

__all__ = ["Comparison", "LayerEntry", "OperatorEntry", "Report", "load_run"]

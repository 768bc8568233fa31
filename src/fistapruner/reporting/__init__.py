"""Draw pages and write model cards from the JSON of a run."""

from ..runs.comparison_records import Comparison
from ..runs.layer_records import LayerEntry, OperatorEntry
from ..runs.records import Report, load_run

__all__ = ["Comparison", "LayerEntry", "OperatorEntry", "Report", "load_run"]

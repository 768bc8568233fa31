"""Draw pages and write model cards from the JSON of a run."""

from ..runs.layer_records import LayerEntry, OperatorEntry
from ..runs.records import Comparison, Report, load_run

__all__ = ["Comparison", "LayerEntry", "OperatorEntry", "Report", "load_run"]

"""Results to JSON, and JSON to one self-contained page."""

from ..runs.records import Comparison, LayerEntry, OperatorEntry, Report, load_run

__all__ = ["Comparison", "LayerEntry", "OperatorEntry", "Report", "load_run"]

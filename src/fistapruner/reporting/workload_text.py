"""Say how sparsities were allocated for a workload, and what that means for its tasks."""

from __future__ import annotations

from ..runs.records import Report
from ..runs.workload_records import WorkloadFacts
from ..runtime.formatting import count, percent, significant
from .rendering import Table


def workload_sentence(facts: WorkloadFacts) -> str:
    """Say what chose the sparsities, and the predicted loss of each task."""
    how = f"by SO-EBM from {count(facts.deployments)} earlier deployments" if facts.deployments else "by its mix"
    losses = [
        f"{name} {significant(task.predicted)} instead of {significant(task.uniform)}"
        for name, task in facts.tasks.items()
    ]
    return (
        f"Sparsities were allocated for a workload {how}; predicted loss in nats a token, against uniform sparsity: "
        f"{', '.join(losses)}."
    )


def workload_tables(report: Report) -> list[Table]:
    """Tabulate the tasks of a workload."""
    if report.workload is None:
        return []
    rows = [
        (name, percent(task.weight), significant(task.uniform), significant(task.predicted))
        for name, task in report.workload.tasks.items()
    ]
    head = ("task", "weight", "loss at uniform sparsity", "loss as allocated")
    label = "Workload: predicted loss in nats a token, from error curves of the dense model"
    return [Table(label, head, rows, numeric=(1, 2, 3), stack=True)]

"""Say how sparsities were allocated for a workload: by which rule, and the regret of every rule."""

from __future__ import annotations

from ..runs.records import Report
from ..runs.workload_records import WorkloadFacts
from ..runtime.formatting import count, percent, significant, with_error
from .lineage_text import file_name
from .rendering import Table


def workload_sentence(facts: WorkloadFacts) -> str:
    """Say which rule chose the sparsities, why, and what that means for the tasks."""
    history = "" if facts.deployments is None else f", from {count(facts.deployments)} earlier deployments"
    losses = [
        f"{name} {significant(task.predicted)} instead of {significant(task.uniform)}"
        for name, task in facts.tasks.items()
    ]
    unknown = "".join(
        f" Feature {number} has one value in the whole history and another in this deployment: it does not count."
        for number in facts.unknown_features
    )
    return (
        f"Sparsities were allocated for the workload {file_name(facts.file)} by the rule {facts.rule} "
        f"({facts.why}{history}); predicted loss in nats a token, against uniform sparsity: "
        f"{', '.join(losses)}.{unknown}"
    )


def workload_tables(report: Report) -> list[Table]:
    """Tabulate tasks, and the cost and regret of every rule where there is a history of deployments."""
    facts = report.workload
    if facts is None:
        return []
    tasks = [
        (
            name,
            percent(task.weight),
            significant(task.uniform),
            significant(task.predicted),
            "–" if task.tolerance is None else significant(task.tolerance),
        )
        for name, task in facts.tasks.items()
    ]
    head = ("task", "weight", "loss at uniform sparsity", "loss as allocated", "mean tolerance")
    tables = [Table("Workload: predicted loss in nats a token", head, tasks, numeric=(1, 2, 3, 4), stack=True)]
    if facts.costs:
        names = {"uniform": "uniform sparsity", "mix": "for the known mix alone", "chosen": "as allocated"}
        costs = [(name, significant(facts.costs[key])) for key, name in names.items()]
        tables.append(
            Table(
                "Workload: expected cost",
                ("allocation", "mean cost over all earlier deployments"),
                costs,
                numeric=(1,),
                stack=True,
            )
        )
    if facts.rules:
        rules = [
            (
                f"{row.rule} (experimental)" if row.rule == "so-ebm" else row.rule,
                with_error(row.regret, row.regret_error, 3),
                with_error(row.behind, row.behind_error, 3) if row.behind or row.behind_error else "–",
                "chosen" if row.rule == facts.rule else "",
            )
            for row in facts.rules
        ]
        columns = ("rule", "regret", "cost above the least", "")
        label = f"Workload: rules of allocation on {facts.deployments} held-out deployments"
        tables.append(Table(label, columns, rules, numeric=(1, 2), stack=True))
    return tables


def workload_how(report: Report) -> str:
    """Say how the figures of the tables came about."""
    predicted = "Losses are predicted from error curves of the dense model, not measured on the pruned one."
    if report.workload is None or not report.workload.rules:
        return predicted
    return (
        "Costs are in units of the mean loss at uniform sparsity; the mean over all earlier deployments is what an "
        "allocation is expected to cost where no feature is known. Regret is the mean cost above that of the best "
        "allocation in hindsight. Every fifth of the history was decided for with what the rest teaches. ± is one "
        f"standard error over deployments, paired in the third column. {predicted}"
    )

"""Records of an allocation for a workload: its tasks, the rules that were tried, and their costs."""

from __future__ import annotations

from .base import Number, Record


class WorkloadTask(Record):
    """What an allocation for a workload means for a task.

    Args:
        weight: in the mix.
        uniform, predicted: predicted loss at uniform sparsity, and at the sparsities that were chosen, in nats a token.
        tolerance: mean of the losses that earlier deployments stood; None without a history.
    """

    weight: Number
    uniform: Number
    predicted: Number
    tolerance: float | None = None


class WorkloadRule(Record):
    """How a rule of allocation did on held-out deployments.

    Costs are in units of the mean loss at uniform sparsity.

    Args:
        rule: its name; ``uniform`` is uniform sparsity.
        cost: mean over deployments.
        regret: mean cost above that of the best allocation in hindsight; ``regret_error``: its standard error.
        behind: mean cost above that of the rule with the least; ``behind_error``: standard error, paired.
    """

    rule: str
    cost: Number
    regret: Number
    regret_error: Number
    behind: Number
    behind_error: Number


class WorkloadFacts(Record):
    """How the sparsities were allocated for a workload.

    Args:
        file: the workload file; ``sha256``: of it and its history; ``deployments``: in the history, None without one.
        rule: that chose; ``why``: it was taken.
        tasks: by name.
        rules: all rules on held-out deployments; empty without a history.
        costs: mean cost over all deployments, in units of the mean loss at uniform sparsity, of ``uniform`` sparsity,
            of the allocation for the known ``mix`` alone, and of the ``chosen`` one; empty without a history.
        unknown_features: numbers, from 1, of features that have one value in the whole history and another in the
            deployment at hand: nothing is known of it, so they do not count.
    """

    file: str
    sha256: str
    rule: str
    why: str = ""
    tasks: dict[str, WorkloadTask] = {}
    rules: list[WorkloadRule] = []
    deployments: int | None = None
    costs: dict[str, Number] = {}
    unknown_features: list[int] = []

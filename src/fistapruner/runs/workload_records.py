"""Records of an allocation for a workload."""

from __future__ import annotations

from .base import Number, Record


class WorkloadTask(Record):
    """What an allocation for a workload means for a task.

    Args:
        weight: in the mix.
        uniform, predicted: predicted loss at uniform sparsity, and at the sparsities that were chosen, in nats a token.
    """

    weight: Number
    uniform: Number
    predicted: Number


class WorkloadFacts(Record):
    """How the sparsities were allocated for a workload.

    Args:
        fingerprint: of what the workload file says.
        deployments: in its history; 0 where the mix alone decided.
        tasks: by name.
    """

    fingerprint: str
    deployments: int = 0
    tasks: dict[str, WorkloadTask] = {}

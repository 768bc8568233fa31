"""Make the layer problems of experts that few calibration tokens, or none, were routed to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..models.discovery import Group
from ..problem import LayerProblem, ProblemSums
from ..runs.records import OperatorEntry
from ..structured.shrinkage import shrunk

FEW = "fewer tokens than inputs, so their Grams are shrunk towards the diagonal"
NONE = "no token was routed to them, so they are pruned by magnitude"


def routed_problem(sums: ProblemSums, names: Sequence[str], group: Group, target: float) -> LayerProblem:
    """Make the layer problem of a group of an expert's operators, whatever the number of its tokens.

    With p tokens, fewer than the n inputs, the Gram is singular, and least squares would fit noise. It is shrunk
    towards its diagonal by the share n / (n + p) (:mod:`fistapruner.structured.shrinkage`): the penalty on changes of
    weights is n / p. Without tokens the Gram is the identity: all inputs count alike.

    Args:
        sums: of the tokens that were routed to the expert; they are released.
        names: full names of the operators.
        group: the operators.
        target: share of the dense model's output in the target.
    """
    rows = [operator.rows for operator in group]
    n = group[0].columns
    if not sums.tokens:
        identity = torch.eye(n, device=sums.weight.device)
        return LayerProblem(sums.weight, identity, target=target, names=tuple(names), rows=tuple(rows))
    problem = sums.problem(names, rows, target, release=True)
    return shrunk(problem, n / (n + sums.tokens)) if sums.tokens < n else problem


def routing_warnings(layer: str, operators: Iterable[OperatorEntry], mixtures: Iterable[str]) -> list[str]:
    """Name the experts of a layer that few calibration tokens, or none, were routed to.

    Args:
        layer: name of the decoder layer.
        operators: the report's entries of its operators.
        mixtures: names of its modules of experts.
    """
    warnings = []
    for mixture in mixtures:
        tokens: dict[str, int] = {}
        inputs: dict[str, int] = {}
        for entry in operators:
            if entry.tokens is not None and entry.name.startswith(mixture + "."):
                expert = entry.name.removeprefix(mixture + ".").partition(".")[0]
                tokens[expert], inputs[expert] = entry.tokens, max(inputs.get(expert, 0), entry.shape[1])
        none = [expert for expert, count in tokens.items() if not count]
        few = [f"{expert} ({count} tokens)" for expert, count in tokens.items() if 0 < count < inputs[expert]]
        warnings += [
            f"{layer}.{mixture}: experts {', '.join(found)}: {said}"
            for found, said in ((none, NONE), (few, FEW))
            if found
        ]
    return warnings

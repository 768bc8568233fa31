"""What a method is: a frozen settings object that turns a layer problem into a solution.

A *solver* makes a solution from the problem alone (it may use the previous step's as a start). A *refinement* improves
the solution of the step before it. Both have the same shape, so they chain: ``wanda -> refit``,
``sparsegpt -> fista -> refit -> swap``. To add one, write one file with one class and name it in
``solvers/__init__.py``; it then exists in recipes, on the command line, in ``compare`` and in the property tests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..constraints import Constraint, Scope
from ..problem import LayerProblem

Stats = dict[str, Any]

Positive = Annotated[float, Field(gt=0.0)]


@dataclass(frozen=True)
class Solution:
    """Pruned weights of a layer problem.

    Args:
        weight: (m, n) fp32, exactly zero where ``mask`` is False.
        mask: (m, n) bool, True where a weight is kept; exact for every operator's sparsity.
        stats: one dictionary for each operator (JSON values): what its solver recorded.
        warnings: sentences for the user, each naming its operator.
    """

    weight: Tensor
    mask: Tensor
    stats: tuple[Stats, ...] = ()
    warnings: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Trace:
    """What a solver records of every round, and how a report shows it.

    Args:
        key: key of the rounds in an operator's ``stats``: a list of one dictionary for each.
        value: key of a round's result, a number.
        penalty: key of the penalty that the round used, a number.
        value_label: axis label of the result.
        penalty_label: axis label of the penalty, its symbol.
        round_label: axis label of the rounds.
        caption: sentence about what is shown.
        of_first: results are shown as a multiple of the first one, on a linear axis; else in %, on a logarithmic one.
        search: rounds are candidates: the best of them and of the warm start is the solution.
    """

    key: str
    value: str
    penalty: str
    value_label: str
    penalty_label: str
    round_label: str
    caption: str
    of_first: bool = False
    search: bool = False

    def rounds(self, stats: Mapping[str, Any]) -> list[Stats]:
        """Read the rounds from what a step recorded; empty where they are missing or incomplete."""
        rounds = stats.get(self.key)
        if not isinstance(rounds, list):
            return []
        whole = all(isinstance(record, dict) and self.penalty in record for record in rounds)
        return rounds if whole and all(isinstance(record.get(self.value), (int, float)) for record in rounds) else []


SUPPORT_CHANGE = Trace(
    key="path",
    value="support_change",
    penalty="rho",
    value_label="support changed, %",
    penalty_label="ρ",
    round_label="step of ρ",
    caption="Share of the kept weights that another weight replaced as the penalty ρ grew, for the hardest operators.",
)
"""Of solvers whose penalty grows until the support rests."""


class Method(BaseModel, ABC):
    """Base of solvers and refinements: settings are fields, validated, unknown ones refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str] = ""
    refines: ClassVar[bool] = False
    """True for a refinement: it needs the solution of a step before it."""
    auto_keeps_paper_settings: ClassVar[bool] = True
    """``auto`` settings of a recipe leave a published method as it was published, and give this project's own what measured best."""
    propagate: ClassVar[Literal["dense", "pruned"]] = "pruned"
    """Whose hidden states feed a decoder layer with ``propagate: auto``."""
    target: ClassVar[float] = 0.0
    """Share of the dense target with ``target: auto``, where hidden states are those that :attr:`propagate` says."""
    trace: ClassVar[Trace | None] = None
    """What is recorded of every round, None where there is nothing to draw."""
    refit_helps: ClassVar[bool] = False
    """Whether the kept weights are far from their least-squares values, so that a refit after it is worth its time."""

    @abstractmethod
    def solve(self, problem: LayerProblem, sparsity: Sequence[Constraint], start: Solution | None = None) -> Solution:
        """Solve for all operators of ``problem`` at once.

        Args:
            problem: the layer problem.
            sparsity: one pattern for each operator.
            start: the solution of the previous step of a chain.
        """

    def for_model(self, family: Callable[[], str], earlier: Method | None = None) -> Method:
        """This method with settings written out that depend on the model it prunes.

        Args:
            family: tells the model's family (``model_type`` of its config); asked only where a setting depends on it.
            earlier: the same step of the run that is continued: what it chose stays.
        """
        return self

    def supports(self, constraint: Constraint) -> bool:
        """Tell whether the method can prune to the constraint; most methods can prune to any."""
        return True

    def rows_independent(self, sparsity: Constraint) -> bool:
        """Whether a row's answer depends on that row alone, so that blocks of rows may be solved apart from each other."""
        return False


def project_operators(scores: Tensor, rows: Sequence[int], sparsity: Sequence[Constraint], scope: Scope = "operator") -> Tensor:
    """Choose the weights to keep of stacked operators (m, n), each with its own constraint."""
    if len(rows) == 1:
        return sparsity[0].project(scores, scope)
    parts = zip(scores.split(tuple(rows)), sparsity, strict=True)
    return torch.cat([pattern.project(part, scope) for part, pattern in parts])

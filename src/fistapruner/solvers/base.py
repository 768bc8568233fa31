"""Base class of methods: a frozen settings object that solves a layer problem.

A *solver* computes a solution from the problem alone; it may start from the previous step's solution. A *refinement*
improves the previous step's solution. Both have the same interface and can be chained: ``wanda+refit``,
``sparsegpt+fista+refit+swap``. To add one, write one file with one class and add a line to ``solvers/catalogue.py``. It
is then available in recipes, on the command line, in ``compare`` and in the property tests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from ..constraints import Constraint, Scope
from ..errors import refuse_yes_no
from ..problem import LayerProblem

Stats = dict[str, Any]

Positive = Annotated[float, Field(gt=0.0)]


@dataclass(frozen=True)
class Solution:
    """Pruned weights of a layer problem.

    Args:
        weight: (m, n) fp32, exactly zero where ``mask`` is False.
        mask: (m, n) bool, True where a weight is kept; exact for every operator's sparsity.
        stats: what the solver recorded of each operator: one dictionary of JSON values for each.
        warnings: sentences for the user; each names its operator.
    """

    weight: Tensor
    mask: Tensor
    stats: tuple[Stats, ...] = ()
    warnings: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Trace:
    """Describe the record that a solver keeps of every round, so that reports can draw it.

    Args:
        key: key of the rounds in an operator's ``stats``; its value is a list with one dictionary for each round.
        value: key of a round's result, a number.
        penalty: key of the penalty that the round used, a number.
        value_label: axis label of the result.
        penalty_label: axis label of the penalty, its symbol.
        round_label: axis label of the rounds.
        caption: a sentence that says what is drawn.
        of_first: draw results relative to the first one on a linear axis; else in % on a logarithmic axis.
        search: every round is a candidate; the solution is the best of them and of the warm start.
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
        """Read the rounds from a step's record; empty if they are missing or incomplete."""
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
    caption="Share of the kept weights that another weight replaced as the penalty ρ grew, for the hardest operators. "
    "Steps where none did are left out.",
)
"""Trace of solvers that raise the penalty until the support stops changing."""


class Method(BaseModel, ABC):
    """Base of solvers and refinements: settings are validated fields; unknown settings are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    refines: ClassVar[bool] = False
    """Whether it is a refinement, which needs the solution of a previous step."""
    takes_start: ClassVar[bool] = True
    """Whether a solver starts from the solution of a step before it; else it stands first in a chain."""
    auto_keeps_paper_settings: ClassVar[bool] = True
    """Whether ``auto`` settings of a recipe are the paper's; if not, they are what measured best."""
    propagate: ClassVar[Literal["dense", "pruned"]] = "pruned"
    """The model whose hidden states feed a decoder layer with ``propagate: auto``."""
    dense_target: ClassVar[float] = 0.0
    """Share of the dense target with ``dense_target: auto``, if ``propagate`` is the method's own."""
    trace: ClassVar[Trace | None] = None
    """The record of every round, or None if the method keeps none."""
    refit_helps: ClassVar[bool] = False
    """Whether the kept weights are far from their least-squares values, so that a refit lowers the error."""
    takes: ClassVar[Literal["nothing", "norms", "Gram"]] = "Gram"
    """What it takes from the calibration text: nothing, the norms of the inputs, or all of their Gram."""

    _no_yes_or_no = field_validator("*", mode="before")(classmethod(refuse_yes_no))

    @abstractmethod
    def solve(self, problem: LayerProblem, sparsity: Sequence[Constraint], start: Solution | None = None) -> Solution:
        """Solve for all operators of ``problem`` at once.

        Args:
            problem: the layer problem; its tensors must not be changed.
            sparsity: one constraint for each operator.
            start: the solution of the previous step of a chain, or None.
        """

    def for_model(self, family: Callable[[], str], earlier: Method | None = None) -> Method:
        """Return this method with the settings resolved that depend on the model.

        Args:
            family: returns the model's family (``model_type`` of its config); called only if a setting needs it.
            earlier: the same step of the run that is continued; its choices stay.
        """
        return self

    def supports(self, constraint: Constraint) -> bool:
        """Return whether the method can prune to the constraint; most methods can prune to any."""
        return True

    def rows_independent(self, sparsity: Constraint) -> bool:
        """Return whether each row is solved alone, so that blocks of rows can be solved in parallel."""
        return False


def project_operators(
    scores: Tensor, rows: Sequence[int], sparsity: Sequence[Constraint], scope: Scope = "operator"
) -> Tensor:
    """Choose the weights to keep of stacked operators (m, n), each with its own constraint."""
    if len(rows) == 1:
        return sparsity[0].project(scores, scope)
    parts = zip(scores.split(tuple(rows)), sparsity, strict=True)
    return torch.cat([pattern.project(part, scope) for part, pattern in parts])

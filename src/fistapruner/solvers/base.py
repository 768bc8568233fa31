"""What a method is: a frozen settings object that turns a layer problem into a solution.

A *solver* makes a solution from the problem alone (it may use the previous step's as a start). A *refinement* improves
the solution of the step before it. Both have the same shape, so they chain: ``wanda -> refit``,
``sparsegpt -> fista -> refit -> swap``. To add one, write one file with one class and name it in
``solvers/__init__.py``; it then exists in recipes, on the command line, in ``compare`` and in the property tests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
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

    def rows_independent(self, sparsity: Constraint) -> bool:
        """Whether a row's answer depends on that row alone, so that blocks of rows may be solved apart from each other."""
        return False


def project_operators(scores: Tensor, rows: Sequence[int], sparsity: Sequence[Constraint], scope: Scope = "operator") -> Tensor:
    """Choose the weights to keep of stacked operators (m, n), each with its own constraint."""
    if len(rows) == 1:
        return sparsity[0].project(scores, scope)
    parts = zip(scores.split(tuple(rows)), sparsity, strict=True)
    return torch.cat([pattern.project(part, scope) for part, pattern in parts])

"""What a method is: a frozen settings object that solves a layer problem.

A *solver* computes a solution from the problem alone; it may start from the previous step's solution. A *refinement*
improves the previous step's solution. Both have the same interface and can be chained: ``wanda+refit``,
``sparsegpt+fista+refit+swap``. A new one is one file with one class and a line in ``solvers/catalogue.py``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core import Constraint, LayerProblem
from ..errors import FistaPrunerError

Stats = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Solution:
    """Pruned weights of a layer problem.

    Args:
        weight: (m, n) fp32, exactly zero where ``mask`` is False.
        mask: (m, n) bool, True where a weight is kept; exact for every operator's sparsity.
        stats: what was recorded of each operator, one dictionary of JSON values for each.
        warnings: sentences for the user; each names its operator.
    """

    weight: Tensor
    mask: Tensor
    stats: tuple[Stats, ...] = ()
    warnings: tuple[str, ...] = field(default=())


def setting(
    default: Any,
    description: str,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    choices: Sequence[str] = (),
) -> Any:
    """Make a field of a method that recipes set: with its bounds, which are checked, and its description.

    Other fields are arguments of the class alone; their defaults are those of the paper, or measured once.
    """
    bounds = {"least": least, "above": above, "below": below, "choices": tuple(choices)}
    return field(default=default, metadata={"description": description, **bounds})


@dataclass(frozen=True)
class Method(ABC):
    """Base of solvers and refinements: frozen dataclasses.

    Raises:
        FistaPrunerError: a setting is of another type than its default, or out of its bounds.
    """

    name: ClassVar[str]
    refines: ClassVar[bool] = False
    """Whether it is a refinement, which needs the solution of a previous step."""
    reference: ClassVar[str] = ""
    """Of a user's own method, where its class is and a hash of its source, as runs record it."""
    takes_start: ClassVar[bool] = True
    """Whether a solver starts from the solution of a step before it; else it stands first in a chain."""

    def __post_init__(self) -> None:
        for each in _settings(type(self)):
            value = getattr(self, each.name)
            if isinstance(each.default, float) and type(value) is int and abs(value) < 2**1000:
                object.__setattr__(self, each.name, value := float(value))
            if (wrong := _wrong(value, each.default, each.metadata)) is not None:
                raise FistaPrunerError(f"method {self.name}: {each.name} {value!r}: {wrong} is expected")

    @abstractmethod
    def solve(self, problem: LayerProblem, constraint: Constraint, start: Solution | None = None) -> Solution:
        """Solve the problem of one operator.

        Args:
            problem: the layer problem; its tensors must not be changed.
            constraint: its sparsity pattern.
            start: the solution of the previous step of a chain, or None.
        """

    @classmethod
    def descriptions(cls) -> dict[str, tuple[Any, str]]:
        """Return the default and the description of every setting, by name."""
        return {each.name: (each.default, each.metadata["description"]) for each in _settings(cls)}

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {each.name: getattr(self, each.name) for each in _settings(type(self))}


def _settings(method: type[Method]) -> list[Field[Any]]:
    """List the fields of a method that recipes set."""
    return [each for each in fields(method) if each.metadata]


def _wrong(value: Any, default: Any, metadata: Any) -> str | None:
    """Say what is expected of a setting, or None if its value is right."""
    if choices := metadata.get("choices"):
        return None if value in choices else " or ".join(choices)
    least, above, below = (metadata[key] for key in ("least", "above", "below"))
    kind = "a whole number" if isinstance(default, int) else "a number"
    if isinstance(value, bool) or not isinstance(value, type(default)) or not math.isfinite(value):
        return kind
    bounds = [f"at least {least:g}"] * (least > -math.inf) + [f"above {above:g}"] * (above > -math.inf)
    bounds += [f"below {below:g}"] * (below < math.inf)
    return None if least <= value < below and value > above else f"{kind} {' and '.join(bounds)}"


def keep_better(problem: LayerProblem, solution: Solution, start: Solution | None) -> Solution:
    """Take ``solution``, or ``start`` where that has the lower error."""
    if start is None:
        return solution
    kept = problem.error(solution.weight) >= problem.error(start.weight)
    stats = tuple({**record, "start_kept": kept} for record in solution.stats)
    best = start if kept else solution
    return replace(solution, weight=best.weight, mask=best.mask, stats=stats)


def keep_better_rows(problem: LayerProblem, weight: Tensor, mask: Tensor, start: Solution) -> tuple[Tensor, Tensor]:
    """Take the rows of ``weight`` and ``mask`` (m, n), or those of ``start`` where the error is lower.

    Large changes that cancel leave a small error with a large rounding error, which counts against the new rows.
    """
    rounding = torch.finfo(weight.dtype).eps * ((weight - problem.weight).square() @ problem.gram.diagonal())
    better = (problem.row_errors(weight) + rounding < problem.row_errors(start.weight))[:, None]
    return torch.where(better, weight, start.weight), torch.where(better, mask, start.mask)

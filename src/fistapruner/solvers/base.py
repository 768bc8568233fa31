"""What a method is: a frozen settings object that solves a layer problem.

A *solver* computes a solution from the problem alone; it may start from the previous step's solution. A *refinement*
improves the previous step's solution. Both have the same interface and can be chained: ``wanda+refit``,
``sparsegpt+fista+refit+swap``. A new one is one file with one class and an entry in ``solvers/__init__.py``.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core import Constraint, LayerProblem, Stacked, parse_sparsity
from ..core.linalg import dead_inputs
from ..errors import FistaPrunerError, instead_of

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
    default: Any, description: str, *, least: float = -math.inf, above: float = -math.inf, choices: Sequence[str] = ()
) -> Any:
    """Make a field of a method that recipes set: with its bounds, which are checked, and its description.

    Other fields are arguments of the class alone; their defaults are those of the paper, or measured once.
    """
    bounds = {"least": least, "above": above, "choices": choices}
    return field(default=default, metadata={"description": description, **bounds})


@dataclass(frozen=True)
class Method(ABC):
    """Base of solvers and refinements: frozen dataclasses, whose settings are checked."""

    name: ClassVar[str]
    refines: ClassVar[bool] = False
    """Whether it is a refinement, which needs the solution of a previous step."""
    reference: ClassVar[str] = ""
    """Of a user's own method, where its class is and a hash of its source, as runs record it."""
    takes_start: ClassVar[bool] = True
    """Whether a solver starts from the solution of a step before it; else it stands first in a chain."""

    def __post_init__(self) -> None:
        for each in (each for each in fields(self) if each.metadata):
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
        return {each.name: (each.default, each.metadata["description"]) for each in fields(cls) if each.metadata}

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {name: getattr(self, name) for name in self.descriptions()}


def _wrong(value: Any, default: Any, metadata: Any) -> str | None:
    """Say what is expected of a setting, or None if its value is right."""
    if choices := metadata.get("choices"):
        return None if value in choices else " or ".join(choices)
    least, above = metadata["least"], metadata["above"]
    kind = "a whole number" if isinstance(default, int) else "a number"
    if isinstance(value, bool) or not isinstance(value, type(default)) or not math.isfinite(value):
        return kind
    bounds = [f"at least {least:g}"] * (least > -math.inf) + [f"above {above:g}"] * (above > -math.inf)
    return None if value >= least and value > above else f"{kind} {' and '.join(bounds)}"


def keep_better_rows(problem: LayerProblem, weight: Tensor, mask: Tensor, start: Solution) -> tuple[Tensor, Tensor]:
    """Take the rows of ``weight`` and ``mask`` (m, n), or those of ``start`` where the error is lower.

    Large changes that cancel leave a small error with a large rounding error, which counts against the new rows.
    """
    rounding = torch.finfo(weight.dtype).eps * ((weight - problem.weight).square() @ problem.gram.diagonal())
    better = (problem.row_errors(weight) + rounding < problem.row_errors(start.weight))[:, None]
    return torch.where(better, weight, start.weight), torch.where(better, mask, start.mask)


Steps = str | Method | Sequence["str | dict[str, object] | Method"]

FAINT = 2.0**-20
"""Scale of the weights of dead inputs: below all others, and exact."""


def parse_method(value: Steps) -> tuple[Method, ...]:
    """Read a method as users write it.

    Args:
        value: a name (``"fista"``), a user's own class (``"./mine.py:MyMethod"``), names joined by ``+``
            (``"alps+swap"``), or a list of names, of one-entry dictionaries with settings
            (``[sparsegpt, {fista: {warm_start: wanda}}, refit]``) or of method objects.
    """
    if isinstance(value, str):
        value = value.split("+")
    steps = tuple(map(_parse_step, value if isinstance(value, (list, tuple)) and value else [value]))
    for number, step in enumerate(steps):
        before, fault = "+".join(earlier.name for earlier in steps[:number]), None
        if step.refines and not before:
            fault = f"refines another solution: put a solver before it, such as wanda+{step.name}"
        elif before and not step.takes_start:
            fault = f"does not start from another solution: leave out {before!r} before it"
        if fault is not None:
            raise FistaPrunerError(f"method {step.name!r} {fault}")
    return steps


def _parse_step(step: object) -> Method:
    if isinstance(step, Method):
        return step
    settings: object = {}
    if isinstance(step, dict) and len(step) == 1:
        ((step, settings),) = step.items()
    if not isinstance(step, str) or not isinstance(settings or {}, dict):
        raise FistaPrunerError(f"method {step!r} is not a name, or one with settings: {{fista: {{warm_start: wanda}}}}")
    name = step.strip()
    from . import METHODS
    from .own import own_method

    found = METHODS.get(name) or own_method(name)
    if found is None:
        raise FistaPrunerError(f"method {name!r} is not known{instead_of(name, METHODS)}")
    known = found.descriptions()
    for key in settings or {}:  # type: ignore[attr-defined]
        if key not in known:
            right = instead_of(str(key), known) if known else ": it has none"
            raise FistaPrunerError(f"method {name}: unknown setting {key!r}{right}")
    return found(**(settings or {}))  # type: ignore[arg-type]


@torch.no_grad()
def solve(problem: LayerProblem, sparsity: str | float | Constraint | Stacked, method: Steps = "proximal") -> Solution:
    """Prune the operators of a layer problem; those without zeros keep their dense weights.

    Args:
        problem: the layer problem.
        sparsity: a constraint as users write it, or the constraints of stacked operators, which are solved one after
            another.
        method: a method or a chain (see ``parse_method``).

    Returns:
        The solution. For each operator its ``stats`` hold ``relative_error`` and, under ``steps``, one record for
        each step: the method, its error, its seconds and what the solver recorded.

    Raises:
        FistaPrunerError: bad settings, a constraint that does not fit, NaN in the data, or settings so extreme that the
            solution is not finite.
    """
    steps = parse_method(method)
    problem.check_finite()
    if problem.cache is None:
        problem = replace(problem, cache={})
    if isinstance(sparsity, Stacked) and sum(sparsity.rows) != len(problem.weight):
        raise FistaPrunerError(
            f"{problem.name}: {len(problem.weight)} rows, and its constraints are for {sparsity.rows}"
        )
    with torch.autocast(problem.weight.device.type, enabled=False):  # of a caller
        if not isinstance(sparsity, Stacked):
            return _run_steps(problem, parse_sparsity(sparsity), steps)
        found = [_run_steps(problem.slice(rows, name), part, steps) for name, rows, part in sparsity.parts()]
    return Solution(
        torch.cat([each.weight for each in found]),
        torch.cat([each.mask for each in found]),
        tuple(each.stats[0] for each in found),
        tuple(warning for each in found for warning in each.warnings),
    )


def _run_steps(problem: LayerProblem, constraint: Constraint, steps: Sequence[Method]) -> Solution:
    """Run a chain on one operator."""
    m, n = problem.shape
    constraint.check(n, problem.name)
    solution: Solution | None = None
    records: list[Stats] = []
    warnings: list[str] = []
    rated, dead = _with_faint_dead_weights(problem)
    for step in steps:
        begin = time.perf_counter()
        if not constraint.zeros(m, n):
            solution = Solution(problem.weight.clone(), torch.ones_like(problem.weight, dtype=torch.bool))
        else:
            solution = step.solve(problem if step.name == "magnitude" else rated, constraint, solution)
        seconds = time.perf_counter() - begin
        if step.reference:
            from .own import check_solution

            check_solution(step, problem, constraint, solution)
        if not bool(solution.weight.isfinite().all()):
            raise FistaPrunerError(
                f"{problem.name}: {step} ended in NaN or infinite weights: take arguments nearer to the defaults, or "
                "check the weights and the text"
            )
        extra = solution.stats[0] if solution.stats else {}
        error = problem.relative_error(solution.weight)
        records.append({"method": step.name, "relative_error": error, "seconds": seconds, **extra})
        warnings += solution.warnings
    assert solution is not None
    weight = solution.weight
    if rated is not problem:
        weight = torch.where(solution.mask & dead, problem.weight, weight)
    stats = {"relative_error": records[-1]["relative_error"], "steps": records}
    return Solution(weight, solution.mask, (stats,), tuple(dict.fromkeys(warnings)))


def _with_faint_dead_weights(problem: LayerProblem) -> tuple[LayerProblem, Tensor]:
    """Scale the weights of dead inputs down, so that methods prune them first; return these inputs, too.

    They change no output, and most methods' regularised Grams would rate them as weights of average inputs. They are
    not zero, so that methods which rate weights by size keep the largest where some must stay.
    """
    dead = dead_inputs(problem.gram)
    if not bool(dead.any()):
        return problem, dead
    return replace(problem, weight=torch.where(dead, FAINT * problem.weight, problem.weight)), dead

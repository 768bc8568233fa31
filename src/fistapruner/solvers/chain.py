"""Read a chain of methods as users write it, and run it on a layer problem."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module

import torch

from ..constraints import Constraint, parse_sparsity
from ..errors import FistaPrunerError, explain
from ..problem import LayerProblem
from ..runtime.numerics import dtype_name, undisturbed
from .base import Method, Solution
from .catalogue import CATALOGUE
from .conditioning import dead_inputs, with_faint_dead_weights

METHODS: dict[str, type[Method]] = {
    entry.name: getattr(import_module(f".{entry.module}", __package__), entry.class_name) for entry in CATALOGUE
}
"""Classes of the methods by name."""

Steps = str | Method | Sequence["str | dict[str, object] | Method"]


def parse_method(value: Steps) -> tuple[Method, ...]:
    """Read a method as users write it.

    Args:
        value: a name (``"fista"``), names joined by ``+`` (``"alps+swap"``), or a list of names, of one-entry
            dictionaries with settings (``[sparsegpt, {fista: {iterations: 50}}, refit]``) or of method objects.

    Raises:
        FistaPrunerError: an unknown name or setting, a refinement with nothing before it, or a solver after another
            step whose solution it does not take.
    """
    if isinstance(value, (Method, dict)):
        value = [value]
    if isinstance(value, str):
        value = value.split("+")
    if not isinstance(value, (list, tuple)):
        raise FistaPrunerError(f"method {value!r} is not a name, names joined by '+', or a list of names and settings")
    steps = tuple(_parse_step(step) for step in value)
    if not steps:
        raise FistaPrunerError("method is empty: name one of " + ", ".join(METHODS))
    if steps[0].refines:
        first = steps[0].name
        raise FistaPrunerError(
            f"method {first!r} refines another solution: put a solver before it, such as wanda+{first}"
        )
    for number, step in enumerate(steps):
        if number and not step.takes_start:
            before = "+".join(earlier.name for earlier in steps[:number])
            raise FistaPrunerError(
                f"method {step.name!r} does not start from another solution: leave out {before!r} before it"
            )
    return steps


def _parse_step(step: object) -> Method:
    if isinstance(step, Method):
        if not isinstance(getattr(step, "name", None), str):
            raise FistaPrunerError(f"the class {type(step).__name__} of a method has no name: give it name = 'mine'")
        return step
    settings: object = {}
    if isinstance(step, dict):
        if len(step) != 1:
            raise FistaPrunerError(
                f"method step {step!r} is not one name with its settings, such as {{fista: {{iterations: 50}}}}"
            )
        ((step, settings),) = step.items()
    name = str(step).strip()
    if name not in METHODS:
        raise FistaPrunerError(f"method {name!r} is not known: one of {', '.join(METHODS)}")
    try:
        return METHODS[name].model_validate(settings or {})
    except ValueError as error:
        raise FistaPrunerError(f"method {name}: {explain(error, METHODS[name])}") from None


def check_constraint(constraint: Constraint, columns: int, steps: Sequence[Method], name: str) -> None:
    """Refuse a constraint that does not fit an operator or that a step does not support.

    Raises:
        FistaPrunerError: names the operator and its inputs, or the step and the methods that support the constraint.
    """
    constraint.check(columns, name)
    for step in steps:
        if not step.supports(constraint):
            able = ", ".join(other for other, method in METHODS.items() if method().supports(constraint))
            raise FistaPrunerError(
                f"method {step.name!r} does not support the pattern {constraint}: take one of {able}"
            )


@undisturbed()
def solve(
    problem: LayerProblem,
    sparsity: str | float | Constraint | Sequence[Constraint],
    method: Steps = "proximal",
) -> Solution:
    """Prune the operators of a layer problem; those without zeros keep their dense weights.

    Whatever the calling program has set, such as autocast, changes nothing. Calls from several threads run one after
    another, so that each call returns the same bits as on its own.

    Args:
        problem: the layer problem.
        sparsity: one constraint for all operators, or one for each.
        method: a method or a chain (see ``parse_method``).

    Returns:
        The solution. For each operator its ``stats`` hold ``relative_error`` and, under ``steps``, one record for
        each step: the method, its error, its seconds (of all operators together) and what the solver recorded.

    Raises:
        FistaPrunerError: bad settings, a constraint that does not fit or is not supported, NaN in the data,
            settings so extreme that the solution is not finite, or a method that returns no solution or changes the
            problem.
    """
    if not isinstance(problem, LayerProblem):
        raise FistaPrunerError(f"problem is a {type(problem).__name__}, expected a LayerProblem")
    steps = parse_method(method)
    if isinstance(sparsity, Sequence) and not isinstance(sparsity, str):
        parsed = [parse_sparsity(pattern) for pattern in sparsity]
    else:
        parsed = [parse_sparsity(sparsity)] * len(problem.rows)
    if len(parsed) != len(problem.rows):
        raise FistaPrunerError(f"{problem.label}: {len(parsed)} sparsities for {len(problem.rows)} operators")
    for pattern, name in zip(parsed, problem.names, strict=True):
        check_constraint(pattern, problem.shape[1], steps, name)
    problem.check_finite()
    return _run_steps(problem, parsed, steps)


def _run_steps(problem: LayerProblem, parsed: Sequence[Constraint], steps: Sequence[Method]) -> Solution:
    """Run a chain after its settings, constraints and data have been checked."""
    solution: Solution | None = None
    records: list[list[dict[str, object]]] = [[] for _ in problem.rows]
    warnings: list[str] = []
    dense = [pattern.zeros(rows, problem.shape[1]) == 0 for pattern, rows in zip(parsed, problem.rows, strict=True)]
    rated = with_faint_dead_weights(problem)
    for step in steps:
        begin = time.perf_counter()
        if all(dense):
            solution = Solution(problem.weight.clone(), torch.ones_like(problem.weight, dtype=torch.bool))
        else:
            given = problem if step.name == "magnitude" else rated
            with given.unchanged(f"method {step.name!r}"):
                found = step.solve(given, parsed, solution)
            _check_form(problem, step.name, found)
            solution = _restored(problem, found, dense)
        seconds = time.perf_counter() - begin
        warnings += solution.warnings
        errors = problem.relative_errors(solution.weight)
        if not all(map(math.isfinite, errors)) and not bool(solution.weight.isfinite().all()):
            settings = step.model_dump(exclude_defaults=True) or "its defaults"
            raise FistaPrunerError(
                f"{problem.label}: {step.name} with {settings} ended in NaN or infinite weights: take settings nearer "
                "to the defaults"
            )
        _check_zeros(problem, parsed, step.name, solution)
        for index, record in enumerate(records):
            extra = solution.stats[index] if solution.stats else {}
            record.append({"method": step.name, "relative_error": errors[index], "seconds": seconds, **extra})
    assert solution is not None
    if rated is not problem:
        kept = solution.mask & dead_inputs(problem.gram)
        solution = replace(solution, weight=torch.where(kept, problem.weight, solution.weight))
    stats = tuple({"relative_error": record[-1]["relative_error"], "steps": record} for record in records)
    return replace(solution, stats=stats, warnings=tuple(warnings))


def _check_form(problem: LayerProblem, name: str, found: object) -> None:
    """Refuse what a method returns if it is no solution, or one whose parts are of another kind.

    Raises:
        FistaPrunerError: names the method, what it returned and what is expected.
    """
    if not isinstance(found, Solution):
        raise FistaPrunerError(f"method {name!r} returned {type(found).__name__}, and a Solution is expected")
    weight, operators = problem.weight, len(problem.rows)
    listed = _all_are(found.stats, dict) and len(found.stats) in (0, operators)
    for what, value, right, expected in (
        ("weight", found.weight, _kind(found.weight) == _kind(weight), _kind(weight)),
        ("mask", found.mask, _kind(found.mask) == _kind(weight, torch.bool), _kind(weight, torch.bool)),
        ("stats", found.stats, listed, f"a tuple of {operators} dict or of none"),
        ("warnings", found.warnings, _all_are(found.warnings, str), "a tuple of str"),
    ):
        if not right:
            raise FistaPrunerError(f"method {name!r} returned as {what} {_kind(value)}, and {expected} is expected")


def _kind(value: object, dtype: torch.dtype | None = None) -> str:
    """Describe a tensor, with its dtype or another, or the class of anything else and of its entries."""
    if isinstance(value, torch.Tensor):
        return f"{dtype_name(dtype or value.dtype)} {tuple(value.shape)} on {value.device}"
    entries = [type(entry).__name__ for entry in value] if isinstance(value, (tuple, list)) else None
    return type(value).__name__ + (f" ({', '.join(entries)})" if entries is not None else "")


def _all_are(value: object, kind: type) -> bool:
    return isinstance(value, (tuple, list)) and all(isinstance(entry, kind) for entry in value)


def _check_zeros(problem: LayerProblem, parsed: Sequence[Constraint], name: str, found: Solution) -> None:
    """Refuse a solution whose mask has not the zeros of the patterns, or whose weight has not those.

    Raises:
        FistaPrunerError: names the method, and the operator with its zeros.
    """
    parts = (tensor.split(problem.rows) for tensor in (found.weight, found.mask))
    for operator, pattern, weight, mask in zip(problem.names, parsed, *parts, strict=True):
        outside = (weight != 0).logical_and_(~mask).any()
        # With nothing outside this has the zeros of the mask, and the weight has them too; ones everywhere satisfy no
        # pattern with zeros. The host waits for a GPU once for both.
        if not pattern.satisfies((mask | outside).view(torch.uint8)):  # a byte a weight, as the mask has
            if bool(outside):
                raise FistaPrunerError(
                    f"method {name!r} returned weights of {operator} that are not zero where mask is False"
                )
            zeros, expected = int((~mask).sum()), pattern.zeros(*weight.shape)
            raise FistaPrunerError(
                f"method {name!r} returned {zeros} zeros in the mask of {operator} that are not the {expected} of "
                f"{pattern}"
            )


def _restored(problem: LayerProblem, solution: Solution, dense: Sequence[bool]) -> Solution:
    """Give operators without zeros their dense weights back, which a step of all operators may have moved."""
    parts = (tensor.split(problem.rows) for tensor in (problem.weight, solution.weight, solution.mask))
    for stays, before, weight, mask in zip(dense, *parts, strict=True):
        if stays:
            weight.copy_(before)
            mask.fill_(True)
    stats = tuple({} if stays else found for stays, found in zip(dense, solution.stats, strict=False))
    return replace(solution, stats=stats)

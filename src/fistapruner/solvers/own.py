"""Load a user's own method: ``./mine.py:MyMethod``, or an entry point of ``fistapruner.methods``.

A class needs a method ``solve(problem, constraint, start)`` that returns a :class:`~.base.Solution`. One derived from
:class:`~.base.Method` may have settings; of any other class an object is made without arguments.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from ..core import Constraint, LayerProblem
from ..errors import FistaPrunerError
from .base import Method, Solution

GROUP = "fistapruner.methods"

RECORDED = re.compile(r"(.+)@([0-9a-f]{12})")
"""A method as a run records it: its name, and the beginning of the SHA-256 of its source file."""


def own_method(name: str) -> type[Method] | None:
    """Return the class of a user's own method; None for a name of no file and no entry point.

    Args:
        name: ``FILE.py:CLASS`` or the name of an entry point; after an ``@`` the hash that a run has recorded.
    """
    recorded = RECORDED.fullmatch(name)
    place = recorded[1] if recorded else name
    file, _, attribute = place.rpartition(":")
    if file.endswith(".py"):
        path = Path(file).expanduser().absolute()
        if not path.is_file():
            raise FistaPrunerError(f"method {place!r}: {path} is not a file")
        place = f"{path}:{attribute}"
    elif found := next(iter(entry_points(group=GROUP, name=place)), None):
        attribute, path = "", Path(inspect.getsourcefile(found.load()) or "")
    else:
        return None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    if recorded and recorded[2] != digest:
        raise FistaPrunerError(
            f"method {place!r}: {path} has changed since the run began (its checksum was {recorded[2]} and is "
            f"{digest}): name another --out"
        )
    return _method(place, path, attribute, digest)


@lru_cache
def _method(place: str, path: Path, attribute: str, digest: str) -> type[Method]:
    """Import a class, and make it a method with the name that runs record; once for the same source."""
    try:
        if attribute:
            spec = spec_from_file_location(f"fistapruner_own_{digest}", path)
            assert spec is not None
            assert spec.loader is not None
            module = module_from_spec(spec)
            spec.loader.exec_module(module)
            found = getattr(module, attribute)
        else:
            found = next(iter(entry_points(group=GROUP, name=place))).load()
        if not isinstance(found, type) or not callable(getattr(found, "solve", None)):
            raise TypeError("it is not a class with solve(problem, constraint, start)")
    except Exception as error:
        raise FistaPrunerError(f"method {place!r} cannot be imported: {type(error).__name__}: {error}") from error
    more: dict[str, Any] = {
        "name": getattr(found, "name", found.__name__),
        "reference": f"{place}@{digest}",
        "__module__": __name__,
    }
    if issubclass(found, Method):
        base = found if "__dataclass_fields__" in vars(found) else dataclass(frozen=True)(found)
        return type(found.__name__, (base,), more)

    def solve(_: Method, problem: LayerProblem, constraint: Constraint, start: Solution | None = None) -> Solution:
        made: Any = found()
        solution: Solution = made.solve(problem, constraint, start)
        return solution

    return type(found.__name__, (Method,), {**more, "solve": solve})


def check_solution(step: Method, problem: LayerProblem, constraint: Constraint, solution: Any) -> None:
    """Refuse a solution of a user's own method that is none."""
    shape, fault = tuple(problem.weight.shape), None
    if not isinstance(solution, Solution):
        fault = f"solve has returned {type(solution).__name__}, and a Solution is expected"
    elif (tuple(solution.weight.shape), tuple(solution.mask.shape)) != (shape, shape):
        fault = f"weight and mask are {tuple(solution.weight.shape)} and {tuple(solution.mask.shape)}, not {shape}"
    elif str(solution.mask.dtype) != "torch.bool" or solution.weight.dtype != problem.weight.dtype:
        fault = f"weight and mask are of {solution.weight.dtype} and {solution.mask.dtype}, not float32 and bool"
    elif not bool(solution.weight.isfinite().all()):
        fault = "weights are NaN or infinite"
    elif bool((solution.weight[~solution.mask] != 0).any()):
        fault = "weights are not zero where the mask is False"
    elif not constraint.satisfies(solution.mask.to(problem.weight.dtype)):
        kept = int(solution.mask.sum())
        fault = f"the mask is not {constraint}: it keeps {kept} of {solution.mask.numel()} weights"
    if fault is not None:
        raise FistaPrunerError(f"{problem.name}: method {step.reference}: {fault}")

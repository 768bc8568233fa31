"""Read sparsities, methods, allocations and other values of a pruning recipe, and write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer

from ..errors import FistaPrunerError
from .base import word_or_number
from .loading import parse_value
from .patterns import check_patterns
from .structure_settings import Structure

if TYPE_CHECKING:
    from ..core import Constraint
    from ..solvers.base import Method

ALLOCATIONS = ("uniform", "owl", "error", "auto")
WORKLOAD = "workload:"
"""What an allocation for a workload begins with; the path of its file follows."""


def _sparsity(value: Any) -> Constraint:
    """Parse a sparsity; the error is a ValueError, which pydantic collects."""
    # imports torch, which reading the settings' descriptions does not need
    from ..core import parse_sparsity

    try:
        return parse_sparsity(value)
    except FistaPrunerError as error:
        raise ValueError(str(error)) from None


def read_method(value: Any) -> tuple[Method, ...]:
    """Parse a method or a chain of them; the error is a ValueError, which pydantic collects."""
    from ..solvers import METHODS, parse_method

    try:
        steps = parse_method(value)
    except FistaPrunerError as error:
        raise ValueError(str(error)) from None
    for step in steps:
        if not step.reference and METHODS.get(step.name) is not type(step):
            raise ValueError(
                f"method {step.name!r} of the class {type(step).__name__} is not known by its name to worker "
                "processes and a resumed run: give FILE.py:CLASS; fp.solve takes the object as it is"
            )
    return steps


def _dense_target(value: Any) -> Any:
    return {"dense": 1.0, "pruned": 0.0}.get(value, value) if isinstance(value, str) else value


def _allocation(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(WORKLOAD):
        if file := value.removeprefix(WORKLOAD).strip():
            return WORKLOAD + file
        raise ValueError("workload: names no file: write workload:FILE")
    if isinstance(value, str) and value not in ALLOCATIONS:
        value = parse_value(value, repr(value))
    if not isinstance(value, dict) and value not in ALLOCATIONS:
        known = ", ".join(ALLOCATIONS)
        raise ValueError(f"{known}, workload:FILE or a mapping such as 're:mlp: 60%' is expected")
    return value if isinstance(value, str) else _sparsities(value)


def _sparsities(named: Mapping[Any, Any]) -> dict[str, Constraint]:
    """Parse the sparsities of operators, by names of these; the first fault is a ValueError."""
    found = {}
    for name, value in named.items():
        if not isinstance(name, str):
            raise ValueError(f"{name!r}: names of operators are expected, such as down_proj or 're:layers\\.0\\.'")
        try:
            found[name] = _sparsity(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return check_patterns(found)


def _dump_method(steps: tuple[Method, ...]) -> list[Any]:
    return [{step.reference or step.name: step.settings()} for step in steps]


def _structure(value: Any) -> Any:
    """Read an amount alone, ``25%``, as the section with this amount."""
    return value if value is None or isinstance(value, (Mapping, Structure)) else {"remove": value}


SparsitySetting = Annotated[Any, BeforeValidator(_sparsity), PlainSerializer(str)]
MethodSetting = Annotated[Any, BeforeValidator(read_method), PlainSerializer(_dump_method)]
AllocationSetting = Annotated[
    Literal["uniform", "owl", "error", "auto"] | str | dict[str, SparsitySetting], BeforeValidator(_allocation)
]
StructureSetting = Annotated[Structure, BeforeValidator(_structure)]
DenseTarget = Annotated[
    Annotated[float, Field(ge=0.0, le=1.0)] | Literal["auto"],
    word_or_number(
        "auto",
        "dense, pruned, auto, or a share of the dense output from 0 to 1 is expected",
        lambda share: 0 <= share <= 1,
    ),
    BeforeValidator(_dense_target),
]

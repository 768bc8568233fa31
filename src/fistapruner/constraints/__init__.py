"""Sparsity patterns: their text forms, numbers of zeros and exact projections."""

from __future__ import annotations

from ..errors import FistaPrunerError
from .base import Constraint, Scope
from .nm import NM
from .unstructured import Unstructured
from .vnm import VNM

CONSTRAINTS: dict[str, type[Constraint]] = {"unstructured": Unstructured, "n:m": NM, "v:n:m": VNM}
"""Every constraint by name; a text is read by the first one whose form it has."""

__all__ = ["CONSTRAINTS", "NM", "VNM", "Constraint", "Scope", "Unstructured", "counted_sparsity", "parse_sparsity"]


def parse_sparsity(value: str | float | Constraint) -> Constraint:
    """Read a constraint as users write it: ``0.5``, ``"50%"``, ``"2:4"``, ``"64:2:8"``.

    Args:
        value: a share of zeros, a percentage, an ``n:m`` pattern (n kept of every m inputs), a ``v:n:m`` pattern (in
            inputs that v rows share), or a constraint.

    Raises:
        FistaPrunerError: the value is none of these, or out of range.
    """
    if isinstance(value, Constraint):
        return value
    text = str(value).strip()
    for kind in CONSTRAINTS.values():
        found = kind.parse(text)
        if found is not None:
            return found
    forms = [form for kind in CONSTRAINTS.values() for form in kind.forms]
    raise FistaPrunerError(f"sparsity {value!r} is not understood: write {', '.join(forms[:-1])} or {forms[-1]}")


def counted_sparsity(zeros: int, weights: int) -> str:
    """Write a counted share of zeros as :func:`parse_sparsity` reads it, which is never 100%."""
    return f"{min(zeros / max(weights, 1), 0.999999):.4%}"

"""Match names of operators: plain names and ``re:`` patterns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator

P = TypeVar("P", bound=Iterable[str])


def check_patterns(patterns: P) -> P:
    """Refuse a ``re:`` pattern that does not compile.

    Raises:
        ValueError: names the pattern and the fault.
    """
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    return patterns


def _names(value: Any) -> Any:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise ValueError("a list of names is expected, such as [down_proj]")
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else value  # the same in every process


Patterns = Annotated[tuple[str, ...], BeforeValidator(_names), AfterValidator(check_patterns)]


def matches(name: str, pattern: str) -> bool:
    """Return whether a pattern matches an operator: ``re:`` searches, a plain name equals its last parts."""
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    return name == pattern or name.endswith("." + pattern)

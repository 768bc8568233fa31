"""Match names of operators: plain names and ``re:`` patterns."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, TypeVar

from pydantic import AfterValidator

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


Patterns = Annotated[tuple[str, ...], AfterValidator(check_patterns)]


def matches(name: str, pattern: str) -> bool:
    """Return whether a pattern matches an operator: ``re:`` searches, a plain name equals its last parts."""
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    return name == pattern or name.endswith("." + pattern)

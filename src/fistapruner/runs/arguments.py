"""Check the arguments that mean the same in every public function."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

from ..errors import FistaPrunerError
from ..models.source import ModelSource
from .listener import Listener

P = ParamSpec("P")
R = TypeVar("R")

YES_NO = (lambda value: isinstance(value, bool), "True or False")
FUNCTION = (lambda value: value is None or callable(value), "a function")

EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "listener": (
        lambda value: value is None or isinstance(value, Listener),
        "an object of a subclass of fistapruner.Listener",
    ),
    "inspect": FUNCTION,
    "progress": FUNCTION,
    "tick": FUNCTION,
    "warn": FUNCTION,
    "command": (lambda value: value is None or isinstance(value, str), "the text of a shell line"),
    "source": (lambda value: value is None or isinstance(value, ModelSource), "a ModelSource"),
    "allow_pickle": YES_NO,
    "trust_remote_code": YES_NO,
    "verify": YES_NO,
    "int8": YES_NO,
}
"""Arguments by name: the check, and what is expected."""


def checked_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Check arguments before a public function begins.

    Raises:
        FistaPrunerError: names the argument, its class and what is expected.
    """
    parameters = signature(function).parameters

    @wraps(function)
    def call(*given: P.args, **named: P.kwargs) -> R:
        for name, value in [*zip(parameters, given, strict=False), *named.items()]:
            fits, expected = EXPECTED.get(name, (lambda value: True, ""))
            if not fits(value):
                raise FistaPrunerError(f"{name} is of the class {type(value).__name__}, and {expected} is expected")
        return function(*given, **named)

    return call

"""Check the arguments that public functions share, and name keywords where an error names flags."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import wraps
from inspect import Parameter, signature
from typing import Any, ParamSpec, TypeVar

from ..errors import FistaPrunerError
from ..models.source import ModelSource
from ..recipes.base import RunRecipe
from ..recipes.flags import SAME_FLAG, flag_of, settings
from .listener import Listener

P = ParamSpec("P")
R = TypeVar("R")

NOTE = "In Python: "
"""Beginning of the note on an error that names flags."""

YES_NO = (lambda value: isinstance(value, bool), "True or False")
FUNCTION = (lambda value: value is None or callable(value), "a function")

EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "listener": (
        lambda value: value is None or isinstance(value, Listener),
        "an object of a subclass of fistapruner.runs.listener.Listener",
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
"""Arguments that mean the same in every public function: the check, and what is expected."""


def python_call(recipe: type[RunRecipe] | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function public: check its shared arguments, and name the keywords of flags in its errors.

    Messages name flags, as the command line has them; Python shows the note below the message.

    Args:
        recipe: whose settings the function takes as keywords; None where it takes no recipe.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = signature(function).parameters

        @wraps(function)
        def call(*given: P.args, **named: P.kwargs) -> R:
            try:
                _check({**dict(zip(parameters, given, strict=False)), **named})
                return function(*given, **named)
            except FistaPrunerError as error:
                if note := _note(str(error), parameters, recipe):
                    error.__notes__ = [note]  # in place of that of a public function inside this one
                raise

        return call

    return decorate


def _check(arguments: Mapping[str, Any]) -> None:
    """Refuse shared arguments of a wrong type.

    Raises:
        FistaPrunerError: names the argument, its class and what is expected.
    """
    for name, value in arguments.items():
        fits, expected = EXPECTED.get(name, (lambda value: True, ""))
        if not fits(value):
            raise FistaPrunerError(f"{name} is of the class {type(value).__name__}, and {expected} is expected")


def _note(message: str, parameters: Mapping[str, Parameter], recipe: type[RunRecipe] | None) -> str:
    """Say which keyword each flag in a message is; empty where there is none."""
    keywords = {"--" + name.replace("_", "-"): f"{name}=..." for name in parameters}
    for path, field in () if recipe is None else settings(recipe):
        section, _, key = path.rpartition(".")
        flag = flag_of(path)
        if path not in SAME_FLAG:
            keywords[flag] = f"{section}={{{key!r}: ...}}" if section else f"{key}=..."
        if field.annotation is bool:
            keywords[flag.replace("--", "--no-")] = keywords[flag].replace("...", "False")
    advice = re.sub(r"'(fistapruner|hf|pip|llama-gguf-split) [^']*'", "", message)  # whole commands stay commands
    flags = dict.fromkeys(re.findall(r"(?<![\w-])--[a-z][a-z-]*", advice))
    said = [f"{flag} is {keywords[flag]}" for flag in flags if flag in keywords]
    return NOTE + ", ".join(said) if said else ""

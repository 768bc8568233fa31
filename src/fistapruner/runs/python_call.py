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
from ..recipes.recover_settings import RecoverRecipe
from ..recipes.settings import Recipe
from .listener import Listener

P = ParamSpec("P")
R = TypeVar("R")

NOTE = "In Python: "
"""Beginning of the note on an error that names flags."""

COMMAND = re.compile(r"'(fistapruner|hf|pip|llama-gguf-split)( '[^']*'| [^' ]+)*'")
"""A whole command in a message, whose flags stay flags; a shell's quotes may stand in it."""

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
                note = _note(str(error), parameters, recipe)
                others = [other for other in getattr(error, "__notes__", []) if not other.startswith(NOTE)]
                error.__notes__ = others + [note] * bool(note)  # a public function inside this one has other keywords
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
    following = recipe is Recipe and message.startswith("recover: ")
    for path, field in () if recipe is None else settings(RecoverRecipe if following else recipe):
        place = f"recover.{path}" if following and not path.startswith("execution.") else path
        flag = flag_of(path)
        if path not in SAME_FLAG:
            keywords[flag] = _keyword(place, "...")
        if field.annotation is bool:
            keywords[flag.replace("--", "--no-")] = _keyword(place, "False")
    flags = dict.fromkeys(re.findall(r"(?<![\w-])--[a-z][a-z-]*", COMMAND.sub("", message)))
    said = [f"{flag} is {keywords[flag]}" for flag in flags if flag in keywords]
    return NOTE + ", ".join(said) if said else ""


def _keyword(path: str, value: str) -> str:
    """Write a setting as the keyword of a function, such as ``calibration={'seqlen': ...}``."""
    keyword, *keys = path.split(".")
    return f"{keyword}=" + "".join(f"{{{key!r}: " for key in keys) + value + "}" * len(keys)

"""Arguments that several verbs share, and the recipe that they make.

The settings that most runs need have a flag (:data:`FLAGS`); all others are for ``--set`` and recipe files.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from ..errors import FistaPrunerError
from ..runtime.show import finite
from ..settings.base import RunRecipe, Settings
from ..settings.parse import load_recipe_settings, merge_settings, read_assignments

if TYPE_CHECKING:
    from ..runs.log import Listener

AnyRecipe = TypeVar("AnyRecipe", bound=RunRecipe)

FLAGS = {
    "sparsity": ("--sparsity", "PATTERN"),
    "method": ("--method", "METHOD"),
    "structure.remove": ("--structure", "AMOUNT"),
    "calibration.source": ("--calibration", "TEXT"),
    "calibration.samples": ("--samples", "N"),
    "calibration.seqlen": ("--seqlen", "N"),
    "data.source": ("--data", "TEXT"),
    "data.pairs": ("--data", "FILE"),
    "data.tokens": ("--tokens", "N"),
    "parameters": ("--parameters", "WHICH"),
    "loss": ("--loss", "LOSS"),
    "lr": ("--lr", "RATE"),
    "steps": ("--steps", "N"),
    "epochs": ("--epochs", "N"),
    "seed": ("--seed", "N"),
    "execution.device": ("--device", "DEVICE"),
}
"""Flags of settings, and the placeholders of their values."""

TEXTS = ("calibration.source", "data.source")
"""Settings whose flag may be given several times, as NAME=TEXT."""

PLURAL = ("sparsity", "method", "seed")
"""Settings for which ``compare`` has arguments of its own, each with several values."""


def settings(recipe: type[Settings]) -> Iterator[tuple[str, FieldInfo]]:
    """Yield every setting of a recipe with its path, such as ``calibration.samples``."""
    for name, field in recipe.model_fields.items():
        if isinstance(field.default, Settings):
            yield from ((f"{name}.{path}", inner) for path, inner in settings(type(field.default)))
        elif not field.exclude:  # what a user does not set
            yield name, field


def add_recipe(parser: argparse.ArgumentParser, recipe: type[RunRecipe], *, single: bool = True) -> None:
    """Add a recipe and its settings; with ``single`` those too of which ``compare`` takes several values."""
    group = parser.add_argument_group("recipe")
    group.add_argument("--recipe", metavar="NAME|FILE", help="a shipped recipe, or a YAML file")
    known = dict(settings(recipe))
    for path, (flag, metavar) in FLAGS.items():
        if path in known and (single or path not in PLURAL):
            group.add_argument(
                flag,
                dest=f"recipe.{path}",
                metavar=metavar,
                action="append" if path in TEXTS else "store",
                help=_described(known[path]),
            )
    group.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting of the reference"
    )
    parser.set_defaults(recipe_kind=recipe)


def _described(field: FieldInfo) -> str:
    """Return the beginning of a setting's description, with its default."""
    said = re.split(r"(?<!\.)\. |; ", f"{field.description} ")[0].rstrip(". ")
    shown = f" (default: {field.default})" if isinstance(field.default, (str, int, float)) else ""
    return f"{said[0].lower()}{said[1:]}{shown}".replace("%", "%%")


def add_evaluation(parser: argparse.ArgumentParser, default: str = "python") -> None:
    """Add the text that the result of a run is evaluated on, and how much of it."""
    parser.add_argument(
        "--evaluate", default=default, metavar="TEXT", help=f"text for perplexity, or none (default: {default})"
    )
    parser.add_argument("--evaluate-windows", type=int, metavar="N", help="windows of that text (default: all)")


def add_common(
    parser: argparse.ArgumentParser, *, quiet: bool = True, as_json: bool = True, code: bool = True, pickle: bool = True
) -> None:
    """Add what a checkpoint may do, and how much is printed, by what the verb does.

    It shows progress (``quiet``), has a result in JSON, runs the model (``code``), or reads weights (``pickle``).
    """
    group = parser.add_argument_group("trust and output")
    if pickle:
        group.add_argument("--allow-pickle", action="store_true", help="read legacy .bin weights, without running code")
    if code:
        group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    if quiet:
        group.add_argument("--quiet", action="store_true", help="print only errors and the result")
    if as_json:
        group.add_argument("--json", action="store_true", help="print the result as JSON")


def recipe_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Collect the settings of the arguments: those of ``--recipe``, over them flags, over them ``--set``."""
    base = {} if arguments.recipe is None else load_recipe_settings(arguments.recipe, arguments.recipe_kind.verb)
    changes: dict[str, Any] = {}
    for path, (flag, _) in FLAGS.items():
        if (value := getattr(arguments, f"recipe.{path}", None)) is not None:
            section, _, name = path.rpartition(".")
            inner = changes.setdefault(section, {}) if section else changes
            inner[name] = _texts(value, flag) if path in TEXTS else value
    return merge_settings(merge_settings(base, changes), read_assignments(arguments.set, "--set"))


def read_recipe(arguments: argparse.Namespace, recipe: type[AnyRecipe]) -> AnyRecipe:
    """Build the recipe of the arguments; an error of the recipe file itself names the file."""
    try:
        return recipe.build(recipe_settings(arguments))
    except FistaPrunerError:
        recipe.of(arguments.recipe)
        raise


def _texts(texts: Sequence[str], flag: str) -> str | dict[str, str]:
    """Read the values of a flag that names texts: one TEXT, or NAME=TEXT for each of several."""
    found = [(text, re.fullmatch(r"([\w.-]+)=(.+)", text)) for text in texts]
    named = {match[1]: match[2] for text, match in found if match and not Path(text).exists()}
    if not named and len(texts) == 1:
        return texts[0]
    if len(named) < len(texts):
        given = " ".join(f"{flag} {text}" for text in texts)
        raise FistaPrunerError(f"{given}: several texts need a name each, as in {flag} NAME=TEXT")
    return named


def trust(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the models' files may do, as the functions take it."""
    names = ("allow_pickle", "trust_remote_code")
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def this_command() -> str:
    """Return the command line, for the record of a run."""
    return shlex.join(["fistapruner", *sys.argv[1:]])


def run_options(arguments: argparse.Namespace, listener: Listener) -> dict[str, Any]:
    """Return what all functions take that make a run."""
    return {
        **trust(arguments),
        "evaluate": arguments.evaluate,
        "evaluate_windows": arguments.evaluate_windows,
        "listener": listener,
        "command": this_command(),
    }


def hide_progress(arguments: argparse.Namespace) -> None:
    """Take a live line of progress from the terminal, where a verb shows one."""
    if (listener := getattr(arguments, "listener", None)) is not None:
        listener.close()


def write(text: str, stream: TextIO | None, end: str = "\n") -> OSError | None:
    """Print to a standard stream, which is None where it was closed before the program began.

    Where the stream takes nothing, as its reader has left or the disk is full, all that follows is dropped: it stops no
    work. The error is returned.
    """
    if stream is None:
        return None
    try:
        print(text, file=stream, end=end, flush=True)
    except OSError as error:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        return error
    return None


def show(result: Any, arguments: argparse.Namespace) -> None:
    """Print what a function returned: its text, or with ``--json`` its values."""
    hide_progress(arguments)
    text = str(result)
    if getattr(arguments, "json", False):
        values = result.to_json() if hasattr(result, "to_json") else TypeAdapter(Any).dump_python(result, mode="json")
        text = json.dumps(finite(values), indent=2)
    error = write(text, sys.stdout)
    if error is not None and error.errno not in (errno.EPIPE, errno.EIO):  # its reader has left, or the terminal
        raise FistaPrunerError(f"standard output cannot be written: {error.strerror}; the work is done")

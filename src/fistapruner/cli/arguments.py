"""Arguments that several verbs share.

Those of recipe settings are made from the fields of :class:`Recipe`."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

from pydantic.fields import FieldInfo

from ..errors import FistaPrunerError
from ..settings.align_settings import AlignRecipe
from ..settings.assignments import read_assignments
from ..settings.base import RunRecipe, Settings
from ..settings.loading import load_recipe_settings, merge_settings
from ..settings.recover_settings import RecoverRecipe
from ..settings.settings import Recipe
from ..settings.structure_settings import Structure
from ..settings.training_settings import TrainingRecipe

if TYPE_CHECKING:
    from ..runs.listener import Listener

AnyRecipe = TypeVar("AnyRecipe", bound=RunRecipe)

FLAGS = {
    "calibration.source": "--calibration",
    "data.source": "--data",
    "data.pairs": "--data",
    "structure.remove": "--structure",
    **{f"structure.{name}": f"--structure-{name}" for name in Structure.model_fields if name != "remove"},
}
"""Flags that are not called as their setting."""

SAME_FLAG = {
    "calibration.seed": "seed",
    "calibration.tasks": "calibration.source",
    "data.seed": "seed",
    "data.tasks": "data.source",
}
"""Settings that take their value from the flag of another setting."""

TEXTS: dict[type[Settings], str] = {Recipe: "calibration", RecoverRecipe: "data"}
"""Section of a recipe whose ``source`` and ``tasks`` share a flag."""

RECIPE_OF: dict[type[TrainingRecipe], str] = {
    RecoverRecipe: "a shipped recipe (spp, ...) or a YAML file",
    AlignRecipe: "a YAML file",
}
"""Help of ``--recipe`` where it names a recipe of training."""

NOT_FOR_TRAINING = ("execution.executor", "execution.workers", "execution.address")
"""Settings of execution that runs which train have no use for."""

METAVARS = {
    "sparsity": "PATTERN",
    "method": "METHOD",
    "dense_target": "TARGET",
    "targets": "NAME|re:...",
    "ignore": "NAME|re:...",
    "allocation": "NAME|workload:FILE|YAML",
    "reconstruct": "STEPS",
    "structure.remove": "SHARE|mlp=...",
    "calibration.source": "SOURCE|NAME=SOURCE",
    "lr": "RATE",
    "also": "NAME,...",
    "data.source": "SOURCE|NAME=SOURCE",
    "data.tokens": "TOKENS",
    "data.pairs": "FILE",
    "references": "NAME,...",
    "shares": "SHARE,...",
    "clip": "none|ETA",
    "execution.device": "DEVICE",
    "execution.memory_limit": "SIZE",
    "execution.address": "HOST:PORT",
}
"""Placeholders in the help; ``N`` if not given here."""

REPEATED = ("targets", "ignore", "calibration.source", "data.source")
"""Settings whose flag may be given several times."""

PLURAL = ("sparsity", "method", "seed")
"""Settings for which ``compare`` has arguments of its own, each with several values."""

SHOWN = {
    *("sparsity", "method", "structure.remove", "seed"),
    *("calibration.source", "calibration.samples", "calibration.seqlen"),
    *("data.source", "data.tokens", "data.pairs", "parameters", "lr", "loss", "rank", "epochs"),
    *("execution.device", "execution.memory_limit", "execution.executor"),
}
"""Settings whose flags ``--help`` shows: those that most runs need. All others are for ``--set`` and recipes."""

SET_HELP = "any setting of the reference, as in a recipe file: low_rank=4, calibration.samples=64; may be repeated"

DEST = "recipe."
"""Prefix of these arguments in the parsed namespace; their flag follows, without its dashes."""


def settings(recipe: type[Settings] = Recipe) -> Iterator[tuple[str, FieldInfo]]:
    """Yield every setting of a recipe with its path, such as ``calibration.samples``."""
    for name, field in recipe.model_fields.items():
        if not isinstance(field.default, Settings):
            yield name, field
            continue
        for key, inner in type(field.default).model_fields.items():
            if not issubclass(recipe, TrainingRecipe) or f"{name}.{key}" not in NOT_FOR_TRAINING:
                yield f"{name}.{key}", inner


def flag_of(path: str) -> str:
    """Return the flag of a setting."""
    return FLAGS.get(path, "--" + path.rpartition(".")[2].replace("_", "-"))


def add_model_and_run(parser: argparse.ArgumentParser, model: str) -> None:
    """Add the model that goes in, described by ``model``, and the run directory."""
    parser.add_argument("model", metavar="MODEL", help=model)
    parser.add_argument(
        "--out", required=True, metavar="RUN", help="run directory; an unfinished run of the same recipe is continued"
    )


def add_dense_argument(parser: argparse.ArgumentParser) -> None:
    """Add the dense model of a run that trains a pruned one."""
    parser.add_argument("--dense", metavar="MODEL", help="the dense model (default: the one that was pruned)")


def add_recipe_arguments(parser: argparse.ArgumentParser, *, single: bool = True) -> None:
    """Add the recipe's settings.

    Args:
        parser: of the verb.
        single: add those settings too of which ``compare`` takes several values.
    """
    group = parser.add_argument_group("recipe (over --recipe)")
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--recipe", metavar="NAME|FILE", help="a shipped recipe (best, fast, fista, paper, ...) or a YAML file"
    )
    source.add_argument("--quality", choices=("fast", "default", "best"), help=argparse.SUPPRESS)
    add_set_argument(group)
    execution = parser.add_argument_group("execution")
    for path, field in settings():
        if path in SAME_FLAG or (path in PLURAL and not single):
            continue
        _add_setting(execution if path.startswith("execution.") else group, path, field)


def add_training_arguments(parser: argparse.ArgumentParser, recipe: type[TrainingRecipe]) -> None:
    """Add the settings of a recipe of a verb that trains."""
    group = parser.add_argument_group("recipe (over --recipe)")
    group.add_argument("--recipe", metavar="NAME|FILE", help=RECIPE_OF[recipe])
    add_set_argument(group)
    execution = parser.add_argument_group("execution")
    for path, field in settings(recipe):
        if path not in SAME_FLAG:
            _add_setting(execution if path.startswith("execution.") else group, path, field)


def add_set_argument(group: argparse._ArgumentGroup) -> None:
    """Add settings by name."""
    group.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=SET_HELP)


def add_evaluation(parser: argparse.ArgumentParser, help_of_text: str, default: str = "python") -> None:
    """Add the text that the result of a run is evaluated on, and how much of it."""
    parser.add_argument("--evaluate", default=default, metavar="DATA", help=f"{help_of_text} (default: {default})")
    parser.add_argument(
        "--evaluate-windows", type=int, default=None, metavar="N", help="windows of that text (default: all)"
    )


def add_evaluation_of_result(parser: argparse.ArgumentParser) -> None:
    """Add the text that the result of a run which trains is evaluated on."""
    add_evaluation(
        parser,
        "text for the perplexity: as for prune, or auto, that of the run that goes in, or python where a checkpoint "
        "goes in that is of no run; in windows as long as those of that run, whatever --seqlen says",
        "auto",
    )


def flags_of(recipe: type[Settings]) -> tuple[str, ...]:
    """Return the flags of a recipe's settings."""
    return tuple(flag_of(path) for path, _ in settings(recipe) if path not in SAME_FLAG)


def given_flags(arguments: argparse.Namespace, recipe: type[Settings]) -> list[str]:
    """List the flags of a recipe's settings that a command has given."""
    return [flag for flag in flags_of(recipe) if getattr(arguments, _dest(flag), None) is not None]


def _dest(flag: str) -> str:
    """Return the name of a setting's flag in the parsed namespace."""
    return DEST + flag.removeprefix("--")


def _add_setting(group: argparse._ArgumentGroup, path: str, field: FieldInfo) -> None:
    """Add one setting: its flag, choices and help are those of the field, which also checks the value."""
    repeated = " May be given several times." if path in REPEATED else ""
    options: dict[str, Any] = {
        "dest": _dest(flag_of(path)),
        "default": None,
        "help": _description(field) + repeated if path in SHOWN else argparse.SUPPRESS,
    }
    literal = get_origin(field.annotation) is Literal
    if field.annotation is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif literal:
        options["choices"] = get_args(field.annotation)
    else:
        options["metavar"] = METAVARS.get(path, "NAME" if literal else "N")
        if path in REPEATED:
            options["action"] = "append"
    group.add_argument(flag_of(path), **options)


def _description(field: FieldInfo) -> str:
    """Describe a setting for argparse, in one sentence, with its default."""
    said = re.split(r"(?<!\.)\. |; ", f"{field.description} ")[0]
    default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    shown = "" if default in (None, "") or field.annotation is bool else f" (default: {default})"
    return f"{said}{shown}".replace("%", "%%")


def recipe_settings(arguments: argparse.Namespace, recipe: type[RunRecipe] = Recipe) -> dict[str, Any]:
    """Collect the recipe of the arguments: ``--recipe`` or ``--quality``, flags and then ``--set`` over it.

    Raises:
        FistaPrunerError: an unknown recipe, several texts without names, or what is no setting.
    """
    given = {path: getattr(arguments, _dest(flag_of(SAME_FLAG.get(path, path))), None) for path, _ in settings(recipe)}
    name = _recipe_name(arguments)
    base = {} if name is None else load_recipe_settings(name, recipe.verb)
    changes: dict[str, Any] = {}
    for path, value in given.items():
        section, _, key = path.rpartition(".")
        (changes.setdefault(section, {}) if section else changes)[key] = value
    if (texts := TEXTS.get(recipe)) is not None:
        changes[texts] |= read_texts(changes[texts].pop("source"), flag_of(f"{texts}.source"))
    return merge_settings(merge_settings(base, _given(changes)), read_assignments(arguments.set, "--set"))


def read_recipe(arguments: argparse.Namespace, recipe: type[AnyRecipe]) -> AnyRecipe:
    """Build the recipe of the arguments.

    Raises:
        FistaPrunerError: as :func:`recipe_settings`, or wrong settings; those that the recipe file has itself are named
            as its own.
    """
    try:
        return recipe.build(recipe_settings(arguments, recipe))
    except FistaPrunerError:
        recipe.of(_recipe_name(arguments))
        raise


def _recipe_name(arguments: argparse.Namespace) -> str | None:
    """Return what ``--recipe`` or ``--quality`` names."""
    return getattr(arguments, "quality", None) if arguments.recipe is None else arguments.recipe


def _given(changes: dict[str, Any]) -> dict[str, Any]:
    """Leave out the settings that no flag has given."""
    return {
        key: _given(value) if isinstance(value, dict) else value for key, value in changes.items() if value is not None
    }


def read_texts(texts: Sequence[str] | None, flag: str) -> dict[str, Any]:
    """Read the values of a flag that names texts: one SOURCE, or NAME=SOURCE for each task.

    Args:
        texts: the values.
        flag: for messages.

    Returns:
        The settings ``source`` and ``tasks``, either of them None.

    Raises:
        FistaPrunerError: several texts of which one has no name, or a name that is given twice.
    """
    texts = texts or []
    found = [(text, re.fullmatch(r"([\w.-]+)=(.+)", text)) for text in texts]
    named = [(match[1], match[2]) for text, match in found if match and not Path(text).exists()]
    if not named and len(texts) <= 1:
        return {"source": texts[0] if texts else None, "tasks": None}
    given = " ".join(f"{flag} {text}" for text in texts)
    if len(named) < len(texts):
        raise FistaPrunerError(f"{given}: several texts need a name each, as in {flag} NAME=SOURCE")
    if len(dict(named)) < len(named):
        raise FistaPrunerError(f"{given}: one name stands twice")
    return {"source": None, "tasks": dict(named)}


def add_trust_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what an untrusted checkpoint may do; nothing by default."""
    group = parser.add_argument_group("trust")
    add_pickle_argument(group)
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the checkpoint"
    )


def add_pickle_argument(parser: argparse._ActionsContainer) -> None:
    """Add that legacy weights may be read; a verb that runs no model needs no other trust."""
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read legacy .bin weights (loaded without running code)"
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how much is printed."""
    group = parser.add_argument_group("output")
    group.add_argument("--quiet", action="store_true", help="print only errors and the result")
    group.add_argument("--json", action="store_true", help="print the result as JSON")


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Add that what a verb found is printed as JSON."""
    parser.add_argument("--json", action="store_true", help="print machine-readable JSON")


def add_begun_run(parser: argparse.ArgumentParser) -> None:
    """Add what a verb takes that goes on with a run."""
    parser.add_argument("run_directory", metavar="RUN", help="the run directory")
    add_trust_arguments(parser)
    add_output_arguments(parser)


def trust(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the models' files may do, as the functions take it."""
    return {"allow_pickle": arguments.allow_pickle, "trust_remote_code": arguments.trust_remote_code}


def this_command() -> str:
    """Return the command line, for the record of a run."""
    return shlex.join(["fistapruner", *sys.argv[1:]])


def run_options(arguments: argparse.Namespace, listener: Listener) -> dict[str, Any]:
    """Return what all functions take that make a run."""
    return {
        **trust(arguments),
        "evaluate": None if arguments.evaluate == "none" else arguments.evaluate,
        "evaluate_windows": arguments.evaluate_windows,
        "listener": listener,
        "command": this_command(),
    }


def read_seeds(text: str) -> list[int]:
    """Read the seeds of a comparison.

    Raises:
        FistaPrunerError: not whole numbers.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise FistaPrunerError(f"--seeds {text!r}: different whole numbers such as 0,1,2 are expected")
    return [int(word) for word in words]

"""What can go wrong in a way the user can mend."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationInfo


def printable(text: str) -> str:
    """Write line breaks, control codes and half characters as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class FistaPrunerError(Exception):
    """An error of the input, the machine or the settings, not of the program.

    The message is one line that names the thing, its value and what would be right; what a name in somebody's file may
    hold, such as line breaks, is escaped. The command line prints it and exits with status 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class MissingExtraError(FistaPrunerError):
    """An optional dependency is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str = "", purpose: str = "") -> None:
        """Say that ``purpose`` needs a package of an extra; a text alone, as from a pickle, stays as it is."""
        install = f"pip install 'fistapruner[{extra}]', or from a checkout pip install '.[{extra}]'"
        super().__init__(f"{purpose} needs the package {package!r}: {install}" if extra else package)


def needs_code(folder: object, error: Exception) -> FistaPrunerError | None:
    """Return the error of a checkpoint whose own Python code was not trusted; None for other errors."""
    if "trust_remote_code" not in str(error):
        return None
    return FistaPrunerError(
        f"{folder} needs Python code that comes with it: if you trust that code, add --trust-remote-code"
    )


MANY_UNKNOWN = 4
"""Unknown settings that are answered one by one; more of them are no slips of the pen."""

A_MODEL = "a folder, a file or a hub id"
A_FOLDER = "the path of a folder"
A_TEXT = "a file or the name of a data set"


def path_text(name: str, value: object, expected: str) -> str:
    """Return what the argument ``name`` gives, a file, folder or data set, as text; ``~/`` is put in full."""
    advice = ": save_pretrained writes a model to a folder" if hasattr(value, "save_pretrained") else ""
    wrong = "is None" if value is None else f"is of the class {type(value).__name__}"
    if isinstance(value, (str, Path)):
        text = str(at_home(str(value)))
        if max(map(len, text.split("/"))) < 256:  # no file has a longer name
            return text
        wrong = f"has {len(text)} characters"
    raise FistaPrunerError(f"{name} {wrong}, and {expected} is expected{advice}")


def at_home(value: Any) -> Any:
    """Put the home folder in place of ``~/`` in texts, paths, lists and mappings; paths become text.

    It is replaced in ``NAME=~/file``, too. Shells leave it there in ``--out=~/run`` and in recipes.
    """
    value = str(value) if isinstance(value, Path) else value
    if isinstance(value, Mapping):
        return {key: at_home(each) for key, each in value.items()}
    if isinstance(value, list):
        return [at_home(each) for each in value]
    home = os.path.expanduser("~")
    return re.sub(r"(^|[=:])~(?=/)", lambda found: found[1] + home, value) if isinstance(value, str) else value


def with_name(path: Path) -> Path:
    """Resolve a path that ends in no name, such as ``.`` or ``..``; return others as they are."""
    return path.resolve() if path.name in ("", "..") else path


def out_path(out: object, expected: str = A_FOLDER, name: str = "out") -> Path:
    """Return the path of an output or a run; refuse an empty path, which Python takes for ``.``."""
    if not (text := path_text(name, out, expected)):
        raise FistaPrunerError(f"{name} '' is empty: give {expected}")
    return Path(text)


def refuse_yes_no(settings: type[BaseModel], value: Any, info: ValidationInfo) -> Any:
    """Refuse yes and no for a setting whose type is a number; Python takes them for 1 and 0.

    A pydantic validator of all fields: ``field_validator("*", mode="before")(classmethod(refuse_yes_no))``.
    """
    if isinstance(value, bool) and info.field_name is not None:
        kind = settings.model_fields[info.field_name].annotation
        parts = {getattr(part, "__origin__", part) for part in get_args(kind) or (kind,)}
        if parts <= {int, float, NoneType, Literal} and parts & {int, float}:
            raise ValueError("a number is expected")
    return value


def explain(error: Exception, settings: type[BaseModel] | None = None) -> str:
    """Describe a validation error in one line: which setting, what is wrong with it, what it was.

    With ``settings``, the schema that was validated, an unknown setting is answered with the nearest name.
    """
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    parts, found = [], error.errors()
    unknown = [str(item["loc"][-1]) for item in found if item["type"] == "extra_forbidden"]
    if settings is not None and len(unknown) > MANY_UNKNOWN:
        shown, more = ", ".join(map(repr, unknown[:MANY_UNKNOWN])), len(unknown) - MANY_UNKNOWN
        parts.append(f"unknown settings {shown} and {more} more: a recipe of another verb, or another kind of file?")
        found = [item for item in found if item["type"] != "extra_forbidden"]
    for item in found:
        where, value, kind = ".".join(map(str, item["loc"])), item.get("input"), item["type"]
        if kind == "extra_forbidden":
            parts.append(f"unknown setting {where!r}{_nearest(where, settings)}")
            continue
        shown = f" (got {value!r})" if isinstance(value, (str, int, float, NoneType)) else ""
        if not shown and (kind.endswith("_type") or kind == "literal_error"):
            shown = f" (got an object of the class {type(value).__name__})"
        message = str(item["ctx"]["error"]) if kind == "value_error" and "ctx" in item else item["msg"]
        message = "a mapping of settings is expected" if kind == "model_type" else message
        parts.append(f"{where}: {message}{shown}" if where else message)
    return "; ".join(parts)


def _nearest(where: str, settings: type[BaseModel] | None) -> str:
    """Name the settings that an unknown one may be: of the same name in another section, else the nearest."""
    if settings is None:
        return ""
    section, _, name = where.rpartition(".")
    known = _names(settings)
    same = [other for other in known if other.rpartition(".")[2] == name]
    if same:
        return f": did you mean {' or '.join(map(repr, same))}?"
    own = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == section]
    return instead_of(name, own)


def _names(settings: type[BaseModel]) -> list[str]:
    """List the names of settings, those of sections with the section's name: ``calibration.samples``."""
    found = []
    for name, field in settings.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        inner = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
        found += [name] + ([f"{name}.{each}" for each in _names(inner)] if inner is not None else [])
    return found


def instead_of(name: str, known: Collection[str]) -> str:
    """Say which known name is nearest to one that is not, or name all; the end of an error's sentence."""
    near = get_close_matches(name, known, n=1)
    return f": did you mean {near[0]!r}?" if near else f": one of {', '.join(known)} is expected"


def one_line(error: Exception, most: int = 200) -> str:
    """Return the message of another library's error as one line of at most so many characters."""
    return " ".join(str(error).split())[:most]

"""The base of all records, and how they are read from JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import FistaPrunerError, explain

VERSION = 1


R = TypeVar("R", bound="Record")


class Record(BaseModel):
    """Base of all records; unknown keys are kept, so an older reader loses no newer figures."""

    model_config = ConfigDict(extra="allow", protected_namespaces=(), ser_json_inf_nan="null")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        FistaPrunerError: no such file, not JSON, or not an object.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise FistaPrunerError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FistaPrunerError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise FistaPrunerError(f"{path} is not a JSON object")
    return data


def parse(schema: type[R], data: dict[str, Any], origin: str) -> R:
    """Validate ``data``.

    Raises:
        FistaPrunerError: it is of a newer version, or does not have the schema.
    """
    version = data.get("version", VERSION)
    if not isinstance(version, int) or version > VERSION:
        raise FistaPrunerError(f"{origin} has version {version!r}: this program reads up to {VERSION}, update it")
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise FistaPrunerError(f"{origin}: {explain(error)}") from None

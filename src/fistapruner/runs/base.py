"""The base of all records, and how they are read from JSON."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import FistaPrunerError, explain

VERSION = 1


R = TypeVar("R", bound="Record")


class Record(BaseModel):
    """Base of all records; unknown keys are kept, so an older reader loses no newer figures."""

    model_config = ConfigDict(extra="allow", protected_namespaces=(), ser_json_inf_nan="null")


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

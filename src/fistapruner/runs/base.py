"""The base of all records, and how they are read from JSON."""

from __future__ import annotations

import math
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializerFunctionWrapHandler, ValidationError
from pydantic import model_serializer as serializer

from ..errors import FistaPrunerError, explain
from ..runtime.show import finite

VERSION = 1


R = TypeVar("R", bound="Record")

Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A number that is null in JSON where it is NaN or infinite, and NaN when it is read again."""


class Record(BaseModel):
    """Base of all records; unknown keys are kept, so an older reader loses no newer figures."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    @serializer(mode="wrap", when_used="json")
    def _written(self, write: SerializerFunctionWrapHandler) -> Any:
        """JSON has neither NaN nor infinity: null is written for them."""
        return finite(write(self))


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

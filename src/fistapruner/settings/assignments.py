"""Read settings as the command line and ``compare`` take them: ``KEY=VALUE``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import FistaPrunerError
from .loading import merge_settings, parse_value


def read_assignments(texts: Iterable[str], origin: str) -> dict[str, Any]:
    """Read ``["dense_target=0.5", "calibration.samples=64"]`` as nested settings, the values as YAML.

    Args:
        texts: the assignments; of several to one setting the last counts.
        origin: where they stand, for messages.

    Raises:
        FistaPrunerError: no assignment, or its value is not YAML.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip() or not value:
            raise FistaPrunerError(f"{origin}: {text!r} is not a setting such as dense_target=0.5")
        found = parse_value(value, f"{origin}: the value of {text!r}")
        for name in reversed(key.strip().split(".")):
            found = {name: found}
        settings = merge_settings(settings, found)
    return settings

"""Read settings as users write them: YAML, ``KEY=VALUE``, sizes, shares, names of operators."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BeforeValidator

from ..errors import FistaPrunerError, at_home
from ..runtime.files import disk_errors

P = TypeVar("P", bound=Iterable[str])


class _PlainLoader(yaml.SafeLoader):
    """Load YAML without aliases and dates, with the numbers of YAML 1.2: ``2:4`` is no number in base 60.

    A few nested aliases can expand to more text than fits in memory.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError(f"aliases (*{self.peek_event().anchor}) are not read: write the value out")
        return super().compose_node(parent, index)


_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("int", "float", "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PlainLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
_PlainLoader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)

YAML_FAULTS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)
"""What PyYAML raises for text that is no YAML; all but the first for values that their tag does not fit."""


def parse_value(text: str, origin: str) -> Any:
    """Load a YAML value safely."""
    try:
        return yaml.load(text, _PlainLoader)
    except YAML_FAULTS as error:
        raise FistaPrunerError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from None


def parse_yaml(text: str, origin: str) -> dict[str, Any]:
    """Load a YAML mapping safely."""
    settings = parse_value(text, origin)
    if settings is None:
        return {}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise FistaPrunerError(f"{origin} is not a mapping of settings to values")
    return settings


def read_assignments(texts: Iterable[str], origin: str) -> dict[str, Any]:
    """Read ``["dense_target=0.5", "calibration.samples=64"]`` as nested settings, the values as YAML."""
    settings: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip() or not value:
            raise FistaPrunerError(f"{origin}: {text!r} is not a setting such as dense_target=0.5")
        *sections, name = key.strip().split(".")
        inner = settings
        for section in sections:
            if not isinstance(inner.get(section), dict):
                inner[section] = {}
            inner = inner[section]
        inner[name] = parse_value(value, f"{origin}: the value of {text!r}")
    return settings


def shipped_recipes(verb: str = "prune") -> dict[str, str]:
    """Return the package's recipes for a verb: name to YAML text."""
    folder = resources.files(__package__) / "shipped" / ("" if verb == "prune" else verb)
    if not folder.is_dir():
        return {}
    files = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".yaml")), key=lambda entry: entry.name)
    return {file.name.removesuffix(".yaml"): file.read_text("utf-8") for file in files}


def load_recipe_settings(name_or_file: str, verb: str = "prune") -> dict[str, Any]:
    """Read the settings of a shipped recipe of a verb (``best``) or of a YAML file."""
    shipped = shipped_recipes(verb)
    if name_or_file in shipped:
        return parse_yaml(shipped[name_or_file], f"recipe {name_or_file}")
    path = Path(at_home(name_or_file))
    try:
        with disk_errors(path, "read"):
            if path.is_file():
                return parse_yaml(path.read_text("utf-8"), str(path))
    except UnicodeError as error:
        raise FistaPrunerError(f"cannot read {path}: {error}") from None
    known = f"neither a file nor a shipped recipe ({', '.join(shipped)})" if shipped else "not a file"
    raise FistaPrunerError(f"recipe {name_or_file!r} is {known}")


SECTIONS = ("calibration", "data", "execution", "structure")
"""Settings that are sections with settings of their own."""


def merge_settings(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` updated by ``changes``, section by section; None replaces what is there.

    A section ``structure`` may be an amount alone.
    """
    merged, changes = _structure_whole(base), _structure_whole(changes)
    for key, value in changes.items():
        before = merged.get(key)
        if isinstance(value, dict) and key in SECTIONS and before is not None:
            # A section that is not a mapping stays, so that validation names it.
            merged[key] = {**before, **value} if isinstance(before, dict) else before
        else:
            merged[key] = value
    return merged


def _structure_whole(settings: dict[str, Any]) -> dict[str, Any]:
    """Copy settings, with an amount alone as the section ``structure`` of this amount."""
    value = settings.get("structure")
    return {**settings, "structure": {"remove": value}} if isinstance(value, (str, int, float)) else dict(settings)


def parse_count(text: str) -> int:
    """Parse a count with a decimal suffix: ``"500k"``, ``"1.5M"`` or ``"4096"``."""
    match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*)\s*([kmg]?)\s*", text.lower())
    count = Decimal(match[1]) * 1000 ** " kmg".index(match[2] or " ") if match else None
    if count is None or count != count.to_integral_value():
        raise ValueError(f"{text!r} is not a whole number: write 4096, 500k or 1.5M")
    return int(count)


def parse_bytes(text: str) -> int:
    """Parse a number of bytes: ``"8GiB"``, ``"500MB"`` or ``"1e9"``."""
    match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*(?:e[0-9]{1,2})?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    base = 1024 if match and (match[3] or not match[2]) else 1000
    size = float(match[1]) * base ** " kmgt".index(match[2] or " ") if match else 0.0
    if not 1 <= size < math.inf:
        raise ValueError(f"{text!r} is not a size: write 8GiB, 500MB or a number of bytes")
    return int(size)


Size = Annotated[int | None, BeforeValidator(lambda size: None if size is None else parse_bytes(str(size)))]


def read_share(value: Any) -> float | None:
    """Read a share between 0 and 1, exclusive, written as ``25%`` or ``0.25``; None where it is none."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%?)\s*", str(value))
    share = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    return share if 0 < share < 1 else None


def check_patterns(patterns: P) -> P:
    """Refuse a ``re:`` pattern that does not compile."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    return patterns


def _names(value: Any) -> Any:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise ValueError("a list of names is expected, such as [down_proj]")
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else value  # the same in every process


Patterns = Annotated[tuple[str, ...], BeforeValidator(_names), AfterValidator(check_patterns)]
"""Names of operators, as ``targets`` and ``ignore`` take them."""


def matches(name: str, pattern: str) -> bool:
    """Return whether a pattern matches an operator: ``re:`` searches, a plain name equals its last parts."""
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    return name == pattern or name.endswith("." + pattern)

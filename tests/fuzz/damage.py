"""Damage to bytes and to JSON values, as hypothesis strategies that shrink to the smallest damage."""

import json
import os
import struct
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("FISTAPRUNER_FUZZ", "300"))
"""Mutated inputs for each test, the same in every run; ``FISTAPRUNER_FUZZ=100000 pytest tests/fuzz`` draws new ones."""

SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
SLOW += [HealthCheck.filter_too_much]
fuzz = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=SLOW)

NUMBERS = [0, 1, 2, 3, 4, 7, 8, 31, 32, 127, 128, 255, 256, *(2**power for power in (15, 16, 31, 32, 53, 62, 63))]
NUMBERS += [2**power - 1 for power in (31, 32, 64)]

Edit = Callable[[bytes], bytes]


def _edit(place: float, kind: str, value: int, size: int) -> Edit:
    """One damage at a relative place, so that it means something for every file."""

    def apply(data: bytes) -> bytes:
        at = int(place * len(data))
        if kind == "flip":
            return data[:at] + bytes([data[at] ^ (1 << value % 8)]) + data[at + 1 :] if at < len(data) else data
        if kind == "byte":
            return data[:at] + bytes([value % 256]) + data[at + 1 :]
        if kind == "int32":
            return data[:at] + struct.pack("<I", value % 2**32) + data[at + 4 :]
        if kind == "int64":
            return data[:at] + struct.pack("<Q", value) + data[at + 8 :]
        if kind == "delete":
            return data[:at] + data[at + size :]
        if kind == "insert":
            return data[:at] + bytes([value % 256]) * size + data[at:]
        if kind == "repeat":
            return data[:at] + data[at : at + size] + data[at:]
        return data[:at]

    return apply


def _apply(edits: list[Edit], data: bytes) -> bytes:
    for edit in edits:
        data = edit(data)
    return data


def damaged(data: bytes, upto: int | None = None) -> st.SearchStrategy[bytes]:
    """``data`` with one to four damages, all of them in its first ``upto`` bytes where that is given."""
    kinds = st.sampled_from(["flip", "byte", "int32", "int64", "delete", "insert", "repeat", "cut"])
    share = 1.0 if upto is None else upto / len(data)
    place = st.floats(0, share, allow_nan=False, exclude_max=True)
    edit = st.builds(
        _edit, place, kinds, st.one_of(st.sampled_from(NUMBERS), st.integers(0, 2**64 - 1)), st.integers(1, 64)
    )
    return st.lists(edit, min_size=1, max_size=4).map(lambda edits: _apply(edits, data))


WORDS = [
    "../x",
    "/etc/passwd",
    "model.safetensors",
    "F32",
    "BF16",
    "F64",
    "I64",
    "BOOL",
    "50%",
    "2:4",
    "re:(",
    "nan",
    "",
]
SIMPLE = [st.none(), st.booleans(), st.sampled_from(NUMBERS), st.integers(-(2**70), 2**70), st.floats()]
json_values = st.recursive(
    st.one_of(*SIMPLE, st.text(max_size=6), st.sampled_from(WORDS)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in _places(part, (*path, key)))]


def _replaced(value: Any, path: tuple[Any, ...], what: str, new: Any, name: str) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    key = path[0]
    if len(path) > 1:
        copy[key] = _replaced(copy[key], path[1:], what, new, name)
    elif what == "delete":
        del copy[key]
    elif what == "rename" and isinstance(copy, dict):
        copy[name] = copy.pop(key)
    else:
        copy[key] = new
    return copy


@st.composite
def damaged_json(draw: st.DrawFn, value: Any) -> Any:
    """``value`` with one to three of its parts replaced, renamed or deleted."""
    for _ in range(draw(st.integers(1, 3))):
        places = _places(value)
        path = draw(st.sampled_from(places[1:] or places))
        what = draw(st.sampled_from(["replace", "replace", "delete", "rename"]))
        value = _replaced(value, path, what, draw(json_values), draw(st.text(max_size=5)))
    return value


def damaged_json_text(value: Any) -> st.SearchStrategy[bytes]:
    """JSON text of a damaged value, or the damaged text of the value."""
    return damaged_json(value).map(lambda damage: json.dumps(damage).encode()) | damaged(json.dumps(value).encode())

"""Encode a packed operator as tensors of a safetensors file, and decode it; see docs/format.md.

An operator ``NAME`` is stored as ``NAME.values`` with ``NAME.mask`` and ``NAME.offsets`` (bit mask) or ``NAME.index``
(n:m), and ``NAME.scales`` where values are int8. What the tensors mean is an :class:`OperatorSpec` in the file's
metadata. Everything read from a file is checked before it is used: a reader returns exactly what was packed, or raises.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core import NM
from ..errors import FistaPrunerError
from ..models.files.safetensors import DTYPES, NAMES, TensorEntry
from .packed import FLOATS, PackedOperator, group_sums, mask_bytes, padded_values, row_starts

VERSION = 1
METADATA = "fistapruner"
"""Key of a file's metadata that holds the JSON of its operators."""

BLOCK = 64
"""Rows between two stored offsets."""

MAX_M = 16
"""Longest group that is stored as an index of combinations; longer ones are stored as a bit mask."""


@dataclass(frozen=True)
class OperatorSpec:
    """Description of one packed operator in a file.

    Args:
        shape: rows and columns of the dense weight.
        dtype: dtype of the dense weight.
        layout: None for bit mask, or the n:m pattern.
        int8: whether values are int8 with scales, else they have the dense dtype.
        group: columns that share an int8 scale, 0 for whole rows.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    layout: NM | None = None
    int8: bool = False
    group: int = 0

    @classmethod
    def of(cls, operator: PackedOperator) -> OperatorSpec:
        """Describe an operator in memory."""
        return cls(operator.shape, operator.dtype, operator.pattern, operator.scales is not None, operator.group)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that the file's metadata holds."""
        return {
            "shape": list(self.shape),
            "dtype": NAMES[self.dtype],
            "layout": str(self.layout) if self.layout else "mask",
            "values": "I8" if self.int8 else NAMES[self.dtype],
            "group": self.group,
        }

    @classmethod
    def from_json(cls, claim: Any, fault: Callable[[str], FistaPrunerError]) -> OperatorSpec:
        """Read and check what :meth:`to_json` wrote.

        Raises:
            FistaPrunerError: anything is missing, unknown or out of range.
        """
        if not isinstance(claim, dict) or set(claim) != {"shape", "dtype", "layout", "values", "group"}:
            raise fault("must have shape, dtype, layout, values and group")
        shape, group, layout = claim["shape"], claim["group"], claim["layout"]
        if not (
            isinstance(shape, list)
            and len(shape) == 2
            and all(type(size) is int and 0 < size < 2**31 for size in shape)
        ):
            raise fault(f"has shape {str(shape)[:60]}, expected two sizes")
        dtype = DTYPES.get(claim["dtype"]) if isinstance(claim["dtype"], str) else None
        if dtype not in FLOATS:
            raise fault(f"has dtype {str(claim['dtype'])[:20]!r}, expected BF16, F16 or F32")
        if claim["values"] not in ("I8", claim["dtype"]):
            raise fault(f"has values {str(claim['values'])[:20]!r}, expected I8 or {claim['dtype']}")
        int8 = claim["values"] == "I8"
        if type(group) is not int or not 0 <= group < 2**31 or group % 64 or (group and not int8):
            raise fault(f"has group {str(group)[:20]}, expected 0 or, with I8 values, a multiple of 64")
        return cls((shape[0], shape[1]), dtype, _layout(layout, shape[1], fault), int8, group)

    def entries(self, name: str, stored: int) -> list[TensorEntry]:
        """List the tensors of operator ``name`` with ``stored`` values, in stored order."""
        rows, columns = self.shape
        dtype = torch.int8 if self.int8 else self.dtype
        entries = [TensorEntry.of(f"{name}.values", dtype, (stored,))]
        if self.layout is None:
            entries.append(TensorEntry.of(f"{name}.mask", torch.uint8, (rows, -(-columns // 8))))
            entries.append(TensorEntry.of(f"{name}.offsets", torch.int64, (-(-rows // BLOCK) + 1,)))
        else:
            groups = columns // self.layout.m
            entries.append(
                TensorEntry.of(f"{name}.index", torch.uint8, (rows, -(-groups * index_bits(self.layout) // 8)))
            )
        if self.int8:
            entries.append(
                TensorEntry.of(f"{name}.scales", torch.float32, (rows, -(-columns // self.group) if self.group else 1))
            )
        return entries


def _layout(layout: Any, columns: int, fault: Callable[[str], FistaPrunerError]) -> NM | None:
    if layout == "mask":
        return None
    n, _, m = layout.partition(":") if isinstance(layout, str) else ("", "", "")
    if not (n.isascii() and n.isdigit() and m.isascii() and m.isdigit() and len(layout) <= 5):
        raise fault(f"has layout {str(layout)[:20]!r}, expected 'mask' or n:m")
    if not 1 <= int(n) < int(m) <= MAX_M or columns % int(m):
        raise fault(f"has layout {layout}, expected 1 <= n < m <= {MAX_M} with m a divisor of its {columns} columns")
    return NM(int(n), int(m))


def index_bits(pattern: NM) -> int:
    """Count the bits of an index of the C(m, n) ways to keep n of m: 3 for 2:4, 7 for 4:8."""
    return (math.comb(pattern.m, pattern.n) - 1).bit_length()


@cache
def _ways(pattern: NM) -> np.ndarray:
    """Tabulate (C(m, n), m): row i is the i-th way to keep n of m positions, in lexicographic order."""
    table = np.zeros((math.comb(pattern.m, pattern.n), pattern.m), dtype=np.uint8)
    for row, positions in enumerate(combinations(range(pattern.m), pattern.n)):
        table[row, list(positions)] = 1
    return table


def encode(name: str, operator: PackedOperator) -> dict[str, Tensor]:
    """Return the tensors of an operator by their names in the file."""
    spec = OperatorSpec.of(operator)
    columns = operator.shape[1]
    tensors = {f"{name}.values": operator.values[: operator.stored]}
    if spec.layout is None:
        tensors[f"{name}.mask"] = operator.mask[:, : -(-columns // 8)].contiguous()
        tensors[f"{name}.offsets"] = _block_offsets(operator.start)
    else:
        tensors[f"{name}.index"] = _encode_index(operator.kept(), spec.layout)
    if operator.scales is not None:
        tensors[f"{name}.scales"] = operator.scales
    return tensors


def decode(
    name: str, spec: OperatorSpec, read: Callable[[str], Tensor], fault: Callable[[str], FistaPrunerError]
) -> PackedOperator:
    """Rebuild an operator from its tensors, checking every invariant of the format.

    Args:
        name: the operator.
        spec: its description.
        read: returns a tensor by name; dtype and shape are those of :meth:`OperatorSpec.entries`, checked before.
        fault: makes the error of what is wrong.

    Raises:
        FistaPrunerError: mask, offsets, index, values and scales do not fit each other.
    """
    rows, columns = spec.shape
    values = read(f"{name}.values")
    if spec.layout is None:
        packed = read(f"{name}.mask")
        if columns % 8 and bool((packed[:, -1] >> columns % 8).any()):
            raise fault("has mask bits beyond its last column")
        mask = torch.zeros(rows, -(-columns // 64) * 8, dtype=torch.uint8)
        mask[:, : packed.shape[1]] = packed
        start = row_starts(mask)
        if not torch.equal(read(f"{name}.offsets"), _block_offsets(start)):
            raise fault("has offsets that do not fit its mask")
    else:
        mask = _decode_index(read(f"{name}.index"), spec, fault)
        start = row_starts(mask)
    if int(start[-1]) != values.numel():
        raise fault(f"has {values.numel()} values where its mask asks for {int(start[-1])}")
    scales = sums = None
    if spec.int8:
        scales = read(f"{name}.scales")
        if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
            raise fault("has scales that are negative or not finite")
    operator = PackedOperator(
        spec.shape, spec.dtype, mask, start, padded_values(values), scales, None, spec.group, spec.layout
    )
    if not spec.int8:
        return operator
    levels = torch.zeros(spec.shape, dtype=torch.int8)
    levels[operator.kept()] = values
    sums = group_sums(levels, spec.group)
    return PackedOperator(spec.shape, spec.dtype, mask, start, operator.values, scales, sums, spec.group, spec.layout)


def read_specs(metadata: Mapping[str, str], entries: Mapping[str, TensorEntry], origin: str) -> dict[str, OperatorSpec]:
    """Read the descriptions of a file's packed operators and check them against its tensors.

    Args:
        metadata: the file's ``__metadata__``.
        entries: the file's tensors.
        origin: names the file in errors.

    Raises:
        FistaPrunerError: not a packed file, an unknown version, or tensors that are missing, superfluous or of another
            shape.
    """
    if METADATA not in metadata:
        raise FistaPrunerError(f"{origin} is not a packed file: its metadata has no {METADATA!r}")
    try:
        claim = json.loads(metadata[METADATA])
    except (ValueError, RecursionError):
        claim = None
    if (
        not isinstance(claim, dict)
        or not isinstance(claim.get("operators"), dict)
        or set(claim) != {"version", "operators"}
    ):
        raise FistaPrunerError(f"{origin} is damaged: its metadata {METADATA!r} must hold a version and operators")
    if type(claim["version"]) is not int or claim["version"] != VERSION:
        raise FistaPrunerError(
            f"{origin} has format version {str(claim['version'])[:20]}; this program reads version {VERSION}"
        )
    specs: dict[str, OperatorSpec] = {}
    owned: set[str] = set()
    for name, description in claim["operators"].items():
        fault = operator_fault(origin, name)
        spec = OperatorSpec.from_json(description, fault)
        values = entries.get(f"{name}.values")
        if values is None or len(values.shape) != 1:
            raise fault("has no list of values")
        if (
            spec.layout is not None
            and values.shape[0] != spec.shape[0] * spec.shape[1] // spec.layout.m * spec.layout.n
        ):
            raise fault(
                f"has {values.shape[0]} values, which is not {spec.layout} of {spec.shape[0]} x {spec.shape[1]}"
            )
        for expected in spec.entries(name, values.shape[0]):
            if entries.get(expected.name) != expected:
                raise fault(f"needs a tensor {expected.name!r} of {expected.dtype} {list(expected.shape)}")
            if expected.name in owned:
                raise fault(f"shares its tensor {expected.name!r} with another operator")
            owned.add(expected.name)
        if name in entries:
            raise fault("is there both packed and dense")
        specs[name] = spec
    return specs


def operator_fault(origin: str, name: str) -> Callable[[str], FistaPrunerError]:
    """Return a function that makes the errors of one operator of one file."""
    return lambda what: FistaPrunerError(f"{origin} is damaged: operator {name[:200]!r} {what}")


def _block_offsets(start: Tensor) -> Tensor:
    rows = start.numel() - 1
    return start[torch.arange(0, rows + BLOCK, BLOCK).clamp(max=rows)].contiguous()


def _encode_index(kept: Tensor, pattern: NM) -> Tensor:
    rows = kept.shape[0]
    weights = 1 << np.arange(pattern.m)
    lookup = np.zeros(1 << pattern.m, dtype=np.uint16)
    lookup[_ways(pattern) @ weights] = np.arange(len(_ways(pattern)))
    codes = lookup[kept.numpy().reshape(rows, -1, pattern.m) @ weights]
    bits = (codes[..., None] >> np.arange(index_bits(pattern))) & 1
    return torch.from_numpy(np.packbits(bits.reshape(rows, -1).astype(np.uint8), axis=1, bitorder="little"))


def _decode_index(index: Tensor, spec: OperatorSpec, fault: Callable[[str], FistaPrunerError]) -> Tensor:
    assert spec.layout is not None
    rows, columns = spec.shape
    width = index_bits(spec.layout)
    count = columns // spec.layout.m * width
    bits = np.unpackbits(index.numpy(), axis=1, bitorder="little")
    if bits[:, count:].any():
        raise fault("has index bits beyond its last group")
    codes = bits[:, :count].reshape(rows, -1, width) @ (1 << np.arange(width))
    ways = _ways(spec.layout)
    if codes.size and codes.max() >= len(ways):
        raise fault(f"has an index beyond the {len(ways)} ways to keep {spec.layout.n} of {spec.layout.m}")
    return mask_bytes(torch.from_numpy(ways[codes].reshape(rows, columns)))

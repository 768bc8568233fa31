"""Encode a packed operator as tensors of a safetensors file, and decode it; see docs/format.md.

An operator ``NAME`` is stored as ``NAME.values`` with ``NAME.mask`` and ``NAME.offsets``, and ``NAME.scales`` where
values are int8. What the tensors mean is an :class:`OperatorSpec` in the file's
metadata. Everything read from a file is checked before it is used: a reader returns exactly what was packed, or raises.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..models.files.safetensors import DTYPES, NAMES, TensorEntry
from .packed import FLOATS, PackedOperator, padded_values, row_starts

VERSION = 2
METADATA = "fistapruner"
"""Key of a file's metadata that holds the JSON of its operators."""

BLOCK = 64
"""Rows between two stored offsets."""


@dataclass(frozen=True)
class OperatorSpec:
    """Description of one packed operator in a file.

    Args:
        shape: rows and columns of the dense weight.
        dtype: dtype of the dense weight.
        int8: whether values are int8 with scales, else they are bf16 as the dense weight is.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    int8: bool = False

    @classmethod
    def of(cls, operator: PackedOperator) -> OperatorSpec:
        """Describe an operator in memory."""
        return cls(operator.shape, operator.dtype, operator.scales is not None)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that the file's metadata holds."""
        return {"shape": list(self.shape), "dtype": NAMES[self.dtype], "values": "I8" if self.int8 else "BF16"}

    @classmethod
    def from_json(cls, claim: Any, fault: Callable[[str], FistaPrunerError]) -> OperatorSpec:
        """Read and check what :meth:`to_json` wrote.

        Raises:
            FistaPrunerError: anything is missing, unknown or out of range.
        """
        if not isinstance(claim, dict) or set(claim) != {"shape", "dtype", "values"}:
            raise fault("must have shape, dtype and values")
        shape = claim["shape"]
        if not (
            isinstance(shape, list)
            and len(shape) == 2
            and all(type(size) is int and 0 < size < 2**31 for size in shape)
        ):
            raise fault(f"has shape {str(shape)[:60]}, expected two sizes")
        dtype = DTYPES.get(claim["dtype"]) if isinstance(claim["dtype"], str) else None
        if dtype not in FLOATS:
            raise fault(f"has dtype {str(claim['dtype'])[:20]!r}, expected BF16, F16 or F32")
        if claim["values"] != "I8" and not claim["values"] == claim["dtype"] == "BF16":
            raise fault(f"has values {str(claim['values'])[:20]!r}, expected I8, or BF16 of a BF16 weight")
        return cls((shape[0], shape[1]), dtype, claim["values"] == "I8")

    def entries(self, name: str, stored: int) -> list[TensorEntry]:
        """List the tensors of operator ``name`` with ``stored`` values, in stored order."""
        rows, columns = self.shape
        entries = [
            TensorEntry.of(f"{name}.values", torch.int8 if self.int8 else torch.bfloat16, (stored,)),
            TensorEntry.of(f"{name}.mask", torch.uint8, (rows, -(-columns // 8))),
            TensorEntry.of(f"{name}.offsets", torch.int64, (-(-rows // BLOCK) + 1,)),
        ]
        if self.int8:
            entries.append(TensorEntry.of(f"{name}.scales", torch.float32, (rows,)))
        return entries


def encode(name: str, operator: PackedOperator) -> dict[str, Tensor]:
    """Return the tensors of an operator by their names in the file."""
    tensors = {
        f"{name}.values": operator.values[: operator.stored],
        f"{name}.mask": operator.mask[:, : -(-operator.shape[1] // 8)].contiguous(),
        f"{name}.offsets": _block_offsets(operator.start),
    }
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
        FistaPrunerError: mask, offsets, values and scales do not fit each other.
    """
    rows, columns = spec.shape
    values = read(f"{name}.values")
    packed = read(f"{name}.mask")
    if columns % 8 and bool((packed[:, -1] >> columns % 8).any()):
        raise fault("has mask bits beyond its last column")
    mask = torch.zeros(rows, -(-columns // 64) * 8, dtype=torch.uint8)
    mask[:, : packed.shape[1]] = packed
    start = row_starts(mask)
    if not torch.equal(read(f"{name}.offsets"), _block_offsets(start)):
        raise fault("has offsets that do not fit its mask")
    if int(start[-1]) != values.numel():
        raise fault(f"has {values.numel()} values where its mask asks for {int(start[-1])}")
    scales = sums = None
    if spec.int8:
        scales = read(f"{name}.scales")
        if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
            raise fault("has scales that are negative or not finite")
        running = torch.nn.functional.pad(values.cumsum(0, dtype=torch.int64), (1, 0))
        sums = (running[start[1:]] - running[start[:-1]]).int()
    return PackedOperator(spec.shape, spec.dtype, mask, start, padded_values(values), scales, sums)


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

"""Hold an operator without its zeros in memory and in a safetensors file; see docs/files.md.

An operator ``NAME`` is stored as ``NAME.values`` and ``NAME.mask``, and ``NAME.scales`` where values are int8; a dense
one as ``NAME.values`` and ``NAME.scales``. What the tensors mean is an :class:`OperatorSpec` in the file's metadata.
All that is read from a file is checked first: a reader returns exactly what was packed, or raises.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..models.safetensors import NAMES, TensorEntry
from ..runtime.numerics import dtype_name

VERSION = 3
METADATA = "fistapruner"
"""Key of a file's metadata that holds the JSON of its operators."""

PADDING = 64
"""Bytes after the values that vector loads may read."""

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class PackedOperator:
    """A (rows x columns) operator without its zeros, or a dense one with int8 values.

    Args:
        shape: rows (outputs) and columns (inputs) of the dense weight.
        dtype: dtype of the dense weight.
        mask: (rows, 8 * words) uint8; bit ``c % 8`` of byte ``c // 8`` is set if column ``c`` is stored. Rows are
            padded with zero bits to whole 64-bit words. None: every weight is stored.
        start: (rows + 1) int64, where each row's values begin; None without a mask.
        values: the stored values in row order, followed by :data:`PADDING` bytes; bf16, or int8.
        scales: for int8, (rows,) fp32: value times scale is the weight.
        sums: for int8, (rows,) int32: sum of each row's values.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    mask: Tensor | None
    start: Tensor | None
    values: Tensor
    scales: Tensor | None = None
    sums: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out memory addresses; a copy makes its own."""
        return {key: value for key, value in self.__dict__.items() if key != "_struct"}

    @property
    def stored(self) -> int:
        """Number of stored values."""
        return self.shape[0] * self.shape[1] if self.start is None else int(self.start[-1])

    def kept(self) -> Tensor:
        """Return the (rows, columns) boolean mask of the stored weights."""
        if self.mask is None:
            return torch.ones(self.shape, dtype=torch.bool)
        return torch.from_numpy(np.unpackbits(self.mask.numpy(), axis=1, bitorder="little", count=self.shape[1])).bool()

    def rows(self, index: Tensor | slice) -> Tensor:
        """Return some rows of a dense operator in fp32, (…, columns)."""
        assert self.scales is not None
        return self.values[: self.stored].view(self.shape)[index].float() * self.scales[index][..., None]

    def to_dense(self) -> Tensor:
        """Unpack the dense weight; bf16 values are bit-equal to what was packed, except that -0.0 is 0."""
        if self.mask is None:
            return self.rows(slice(None)).to(self.dtype)
        values = self.values[: self.stored]
        if self.scales is not None:
            assert self.start is not None
            values = (values.float() * self.scales.repeat_interleave(self.start.diff())).to(self.dtype)
        # Assigning a single value would convert it through float and change a NaN's bits.
        return values.new_zeros(self.shape).masked_scatter_(self.kept(), values)


def pack_operator(weight: Tensor, *, int8: bool = False, dense: bool = False) -> PackedOperator:
    """Pack a dense weight without its zeros.

    Args:
        weight: (rows, columns) bf16; fp16 or fp32 only where its values become int8.
        int8: round to symmetric int8: the largest magnitude of each row becomes 127.
        dense: store every weight; needs ``int8``.

    Raises:
        FistaPrunerError: not a matrix of such a dtype, or a value that is to become int8 is not finite.
    """
    if weight.ndim != 2 or weight.dtype not in (FLOATS if int8 else (torch.bfloat16,)):
        found = f"a {dtype_name(weight.dtype)} tensor of shape {list(weight.shape)}"
        raise FistaPrunerError(f"{found} is not packed: expected is a bf16 matrix, or fp16 or fp32 for int8 values")
    weight = weight.detach().cpu()
    shape, mask, start, scales, sums = (weight.shape[0], weight.shape[1]), None, None, None, None
    kept, values = weight != 0, weight
    if not dense:
        mask = _mask_bytes(kept)
        start = _row_starts(mask)
    if int8:
        wide = weight.float()
        if not bool(torch.isfinite(wide).all()):
            raise FistaPrunerError("values that are not finite cannot become int8")
        scales = wide.abs().amax(-1) / 127.0 if shape[1] else wide.new_zeros(shape[0])
        # A scale that underflows would divide by zero; such a row is zero in fp32 anyway.
        values = (wide / torch.where(scales > 0, scales, 1.0)[:, None]).round().clamp(-127, 127).to(torch.int8)
        sums = values.sum(-1, dtype=torch.int32)
    return PackedOperator(shape, weight.dtype, mask, start, _padded(values if dense else values[kept]), scales, sums)


@dataclass(frozen=True)
class OperatorSpec:
    """Description of one packed operator in a file.

    ``shape`` and ``dtype`` are those of the dense weight. Values are int8 with scales, or bf16 as the dense weight is.
    Dense ones are int8 without a mask.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    int8: bool = False
    dense: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that the file's metadata holds."""
        values, layout = "I8" if self.int8 else "BF16", "dense" if self.dense else "mask"
        return {"shape": list(self.shape), "dtype": NAMES[self.dtype], "values": values, "layout": layout}

    @classmethod
    def from_json(cls, claim: Any, fault: Callable[[str], FistaPrunerError]) -> OperatorSpec:
        """Read and check what :meth:`to_json` wrote."""
        shape = claim.get("shape") if isinstance(claim, dict) else None
        if isinstance(shape, list) and len(shape) == 2 and all(type(x) is int and 0 < x < 2**31 for x in shape):
            size = shape[0], shape[1]
            known = [cls(size, dtype, True, dense) for dtype in FLOATS for dense in (False, True)]
            for spec in (cls(size, torch.bfloat16), *known):
                if claim == spec.to_json():
                    return spec
        raise fault(
            f"is described as {str(claim)[:200]}: expected are shape, dtype, values (I8, or BF16 of a BF16 weight) and "
            "layout (mask, or dense with I8 values)"
        )

    def entries(self, name: str, stored: int) -> list[TensorEntry]:
        """List the tensors of operator ``name`` with ``stored`` values, in stored order."""
        rows, columns = self.shape
        kind = torch.int8 if self.int8 else torch.bfloat16
        entries = [TensorEntry.of(f"{name}.values", kind, self.shape if self.dense else (stored,))]
        if not self.dense:
            entries.append(TensorEntry.of(f"{name}.mask", torch.uint8, (rows, -(-columns // 8))))
        if self.int8:
            entries.append(TensorEntry.of(f"{name}.scales", torch.float32, (rows,)))
        return entries


def encode(name: str, operator: PackedOperator) -> dict[str, Tensor]:
    """Return the tensors of an operator by their names in the file."""
    values = operator.values[: operator.stored]
    tensors = {f"{name}.values": values.view(operator.shape) if operator.mask is None else values}
    if operator.mask is not None:
        tensors[f"{name}.mask"] = operator.mask[:, : -(-operator.shape[1] // 8)].contiguous()
    if operator.scales is not None:
        tensors[f"{name}.scales"] = operator.scales
    return tensors


def decode(
    name: str, spec: OperatorSpec, read: Callable[[str], Tensor], fault: Callable[[str], FistaPrunerError]
) -> PackedOperator:
    """Rebuild an operator from its tensors, checking every invariant of the format.

    ``read`` returns a tensor by name; dtype and shape are those of :meth:`OperatorSpec.entries`, checked before.
    ``fault`` makes the error of what is wrong.
    """
    rows, columns = spec.shape
    values = read(f"{name}.values")
    mask = start = scales = sums = None
    if not spec.dense:
        packed = read(f"{name}.mask")
        if columns % 8 and bool((packed[:, -1] >> columns % 8).any()):
            raise fault("has mask bits beyond its last column")
        mask = torch.zeros(rows, -(-columns // 64) * 8, dtype=torch.uint8)
        mask[:, : packed.shape[1]] = packed
        start = _row_starts(mask)
        if int(start[-1]) != values.numel():
            raise fault(f"has {values.numel()} values where its mask asks for {int(start[-1])}")
    if spec.int8:
        scales = read(f"{name}.scales")
        if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
            raise fault("has scales that are negative or not finite")
        if start is None:
            sums = values.sum(-1, dtype=torch.int32)
        else:
            running = torch.nn.functional.pad(values.cumsum(0, dtype=torch.int64), (1, 0))
            sums = running[start].diff().int()
    return PackedOperator(spec.shape, spec.dtype, mask, start, _padded(values), scales, sums)


def read_specs(metadata: Mapping[str, str], entries: Mapping[str, TensorEntry], origin: str) -> dict[str, OperatorSpec]:
    """Read the descriptions of a file's packed operators and check them against its tensors."""
    try:
        claim = json.loads(metadata.get(METADATA, ""))
    except (ValueError, RecursionError):
        claim = None
    if (
        not isinstance(claim, dict)
        or not isinstance(claim.get("operators"), dict)
        or set(claim) != {"version", "operators"}
    ):
        raise damaged(origin, f"its metadata {METADATA!r} must hold a version and operators")
    require_version(claim["version"], origin)
    specs: dict[str, OperatorSpec] = {}
    for name, description in claim["operators"].items():
        fault = operator_fault(origin, name)
        spec = OperatorSpec.from_json(description, fault)
        values = entries.get(f"{name}.values")
        if values is None or not values.shape:
            raise fault("has no list of values")
        for expected in spec.entries(name, values.shape[0]):
            if entries.get(expected.name) != expected:
                raise fault(f"needs a tensor {expected.name!r} of {expected.dtype} {list(expected.shape)}")
        specs[name] = spec
    return specs


def require_version(version: object, origin: str) -> None:
    """Refuse what another version of the format is."""
    if type(version) is not int or version != VERSION:
        raise FistaPrunerError(
            f"{origin} has format version {str(version)[:20]}, and this program reads version {VERSION}: pack the "
            "checkpoint again with 'fistapruner pack'"
        )


def damaged(origin: object, what: str) -> FistaPrunerError:
    """Make the error of a file that is not as it was written."""
    return FistaPrunerError(f"{origin} is damaged: {what}")


def operator_fault(origin: str, name: str) -> Callable[[str], FistaPrunerError]:
    """Return a function that makes the errors of one operator of one file."""
    return lambda what: damaged(origin, f"operator {name[:200]!r} {what}")


def _mask_bytes(kept: Tensor) -> Tensor:
    """Pack (rows, columns) booleans into bits, rows padded to whole 64-bit words."""
    bits = np.packbits(kept.numpy(), axis=1, bitorder="little")
    padded = np.zeros((kept.shape[0], -(-kept.shape[1] // 64) * 8), dtype=np.uint8)
    padded[:, : bits.shape[1]] = bits
    return torch.from_numpy(padded)


def _row_starts(mask: Tensor) -> Tensor:
    """Compute the (rows + 1) offsets of the rows' values from the mask."""
    start = mask.new_zeros(mask.shape[0] + 1, dtype=torch.int64)
    if mask.numel():
        counts = np.bitwise_count(mask.numpy().view(np.uint64)).sum(axis=1, dtype=np.int64)
        torch.cumsum(torch.from_numpy(counts), 0, out=start[1:])
    return start


def _padded(values: Tensor) -> Tensor:
    """Copy values into contiguous memory, followed by :data:`PADDING` zero bytes."""
    out = values.new_zeros(values.numel() + PADDING // values.element_size())
    out[: values.numel()] = values.flatten()
    return out

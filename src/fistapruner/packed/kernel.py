"""Find, check and call the optional compiled kernel (``csrc/``), through ctypes.

It is built when the package is installed and a C compiler is found (``setup.py``). Without it torch does the same,
more slowly. Threads are those of the OpenMP runtime that torch has loaded.
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from contextlib import suppress
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from .format import PackedOperator

ARM = platform.machine() in ("aarch64", "arm64")
LEVELS = ("portable", "neon") if ARM else ("portable", "avx2", "avx512", "avx512_bf16", "amx")
"""Instruction-set levels, slowest first; a processor that runs one runs those before it."""

ENVIRONMENT = "FISTAPRUNER_KERNEL"
"""Environment variable that forces a level, or ``torch`` for no kernel at all."""

ABI = 6
VALUES = {torch.bfloat16: 0, torch.int8: 1}
TYPES = {torch.float32: 0, torch.bfloat16: 1}
SLOW = (
    f"no kernel that is faster than torch runs here: {ENVIRONMENT} forbids it, or none was compiled (by gcc or clang "
    ">= 10, for x86-64 with AVX2 or 64-bit ARM), so packed operators run slower than dense ones: load with packed=False"
)
"""Warning where :func:`best_level` finds no fast kernel."""

DENSE_LEVEL = LEVELS.index("avx512_bf16") if "avx512_bf16" in LEVELS else len(LEVELS)
"""From this level on the kernel has a product for dense bf16 operators too."""

TILE = 4
"""Vectors that the kernel multiplies in one pass over the weights (MAX_TILE of packed.h)."""

MAX_MANY = 256
"""Most vectors for the matrix units; with more, unpacking costs little and torch's product is faster."""

MAX_BATCH = 16
"""Most vectors for the kernel without matrix units; with more, a dense product is faster everywhere."""


class _Operator(ctypes.Structure):
    """``packed_operator`` of packed.h."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("words", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
        ("start", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("kind", ctypes.c_int32),
    )


@cache
def library() -> ctypes.CDLL | None:
    """Load the compiled kernel; None if it was not built, or for another version."""
    paths = (Path(__file__).parent / f"_kernel{suffix}" for suffix in EXTENSION_SUFFIXES)
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return None
    try:
        loaded = ctypes.CDLL(str(path))
        loaded.fistapruner_abi.restype = ctypes.c_int
        if loaded.fistapruner_abi() != ABI:
            return None
    except (OSError, AttributeError):
        return None
    pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    loaded.fistapruner_level.restype = integer
    loaded.fistapruner_threads.argtypes = (pointer,)
    vectors = (pointer, pointer, integer, pointer, pointer)  # operator, bias and its type, from, to
    loaded.fistapruner_multiply.argtypes = (*vectors, integer, integer, integer, integer)
    loaded.fistapruner_multiply.restype = integer
    loaded.fistapruner_unpack.argtypes = (pointer, long, long, pointer, integer, integer, integer)
    loaded.fistapruner_unpack.restype = None
    loaded.fistapruner_many_bytes.argtypes = (pointer, integer, integer, integer)
    loaded.fistapruner_many_bytes.restype = long
    loaded.fistapruner_multiply_many.argtypes = (*vectors, integer, integer, pointer)
    loaded.fistapruner_multiply_many.restype = None
    # Of the OpenMP runtime that torch has loaded, on macOS from its own folder; without it, one thread does the work.
    for place in (None, Path(torch.__file__).parent / "lib" / "libomp.dylib"):
        with suppress(OSError, AttributeError):
            runtime = ctypes.CDLL(None if place is None else str(place)).GOMP_parallel
            loaded.fistapruner_threads(ctypes.cast(runtime, pointer).value)
            break
    return loaded


@cache
def best_level() -> int:
    """Return the index into :data:`LEVELS` of this processor's fastest level; -1 without a kernel."""
    wanted = os.environ.get(ENVIRONMENT)
    return level_index(wanted) if wanted else len(available_levels()) - 1


def level_index(name: str) -> int:
    """Return the index of a level that was built and that this processor has; -1 is torch."""
    if name not in (known := ("torch", *available_levels())):
        raise FistaPrunerError(f"kernel level {name!r} does not run here; what does: {', '.join(known)}")
    return known.index(name) - 1


def available_levels() -> tuple[str, ...]:
    """List the levels that were built and run on this processor, slowest first."""
    found = library()
    return () if found is None else LEVELS[: int(found.fistapruner_level()) + 1]


_scratch = threading.local()


def scratch(nbytes: int) -> Tensor:
    """Return memory that this thread reuses: fresh pages would cost more than the work on them."""
    held: Tensor | None = getattr(_scratch, "bytes", None)
    if held is None or held.numel() < nbytes:
        held = _scratch.bytes = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    return held[:nbytes]


def takes_many(operator: PackedOperator, level: int) -> bool:
    """Check whether matrix units multiply this operator with any number of bf16 vectors."""
    return LEVELS[level] == "amx" and (operator.mask is not None or operator.scales is not None)


def unpack(operator: PackedOperator, first: int, last: int, out: Tensor, level: int) -> None:
    """Unpack rows ``first`` to ``last`` into contiguous fp32 or bf16 ``out`` (last - first, columns)."""
    loaded, threads = library(), torch.get_num_threads()
    assert loaded is not None
    loaded.fistapruner_unpack(_address(operator), first, last, out.data_ptr(), TYPES[out.dtype], threads, level)


def multiply(operator: PackedOperator, x: Tensor, bias: Tensor | None, level: int, *, many: bool = False) -> Tensor:
    """Compute ``x @ weight.T + bias``.

    Args:
        operator: the operator, on the CPU; without mask and scales its values are a dense contiguous bf16 weight, for
            bf16 vectors from :data:`DENSE_LEVEL` on.
        x: (…, columns), contiguous and not empty, fp32 or bf16 on the CPU; the result has its dtype.
        bias: (rows,), or None; read where it is if it is fp32 or bf16 on the CPU.
        level: index into :data:`LEVELS`.
        many: use the matrix units; needs bf16 and :func:`takes_many`.

    Returns:
        (…, rows).
    """
    loaded, rows, batch = library(), operator.shape[0], x.numel() // operator.shape[1]
    assert loaded is not None
    if bias is not None:
        bias = bias.to("cpu", bias.dtype if bias.dtype in TYPES else torch.float32).contiguous()
    added = (None, 0) if bias is None else (bias.data_ptr(), TYPES[bias.dtype])
    out = x.new_empty((*x.shape[:-1], rows))
    threads, address = min(torch.get_num_threads(), -(-rows // 64)), _address(operator)
    if many:
        memory = scratch(loaded.fistapruner_many_bytes(address, batch, threads, level))
        loaded.fistapruner_multiply_many(
            address, *added, x.data_ptr(), out.data_ptr(), batch, threads, memory.data_ptr()
        )
    elif loaded.fistapruner_multiply(
        address, *added, x.data_ptr(), out.data_ptr(), TYPES[x.dtype], batch, threads, level
    ):
        raise MemoryError("no memory for the kernel's vectors")
    return out


def _address(operator: PackedOperator) -> int:
    """Describe an operator as the kernel's C structure, made once, and return its address."""
    struct: _Operator | None = operator.__dict__.get("_struct")
    if struct is None:
        parts = (operator.mask, operator.start, operator.values, operator.scales, operator.sums)
        rows, columns = operator.shape
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in parts)
        struct = _Operator(rows, columns, -(-columns // 64), *pointers, VALUES[operator.values.dtype])
        operator.__dict__["_struct"] = struct
    return ctypes.addressof(struct)

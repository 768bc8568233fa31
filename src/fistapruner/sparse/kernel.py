"""Find, check and call the optional compiled kernel, through ctypes.

It is built when the package is installed and a C compiler is found (``setup.py``). Without it torch does the same,
more slowly. Threads are those of the OpenMP runtime that torch has loaded.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from .packed import PackedOperator

LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
"""Instruction-set levels, slowest first; a processor that runs one runs those before it."""

ENVIRONMENT = "FISTAPRUNER_KERNEL"
"""Environment variable that forces a level, or ``torch`` for no kernel at all."""

ABI = 5
VALUES = {torch.bfloat16: 0, torch.int8: 1}
TYPES = {torch.float32: 0, torch.bfloat16: 1}
DENSE_LEVEL = LEVELS.index("avx512_bf16")
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
        ("bias", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("kind", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


@cache
def library() -> ctypes.CDLL | None:
    """Load the compiled kernel; None if it was not built, or for another version."""
    path = _built()
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
    loaded.fistapruner_multiply.argtypes = (pointer, pointer, pointer, integer, integer, integer, integer)
    loaded.fistapruner_multiply.restype = integer
    loaded.fistapruner_unpack.argtypes = (pointer, long, long, pointer, integer, integer, integer)
    loaded.fistapruner_unpack.restype = None
    loaded.fistapruner_many_bytes.argtypes = (pointer, integer, integer, integer)
    loaded.fistapruner_many_bytes.restype = long
    loaded.fistapruner_multiply_many.argtypes = (pointer, pointer, pointer, integer, integer, pointer)
    loaded.fistapruner_multiply_many.restype = None
    loaded.fistapruner_threads(_parallel_runtime())
    return loaded


def _built() -> Path | None:
    """Find the file of the compiled kernel."""
    paths = (Path(__file__).parent / f"_kernel{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in paths if path.exists()), None)


def absence() -> str:
    """Say why :func:`best_level` found no kernel, or none that is faster than torch."""
    path = _built()
    if path is None:
        return "no kernel was compiled here (install a C compiler such as gcc, then fistapruner again)"
    if library() is None:
        return f"the kernel {path} cannot be loaded or is of another version of fistapruner (install it again)"
    if wanted := os.environ.get(ENVIRONMENT):
        return f"{ENVIRONMENT}={wanted} turns the fast kernel off"
    return "the kernel is fast on x86-64 with AVX2 only, compiled by gcc or clang >= 10"


def _parallel_runtime() -> int | None:
    """Find the address of ``GOMP_parallel`` in the OpenMP runtime that this process has loaded."""
    try:
        lines = os.fsdecode(Path("/proc/self/maps").read_bytes()).split("\n")
    except OSError:
        return None
    for path in _openmp_libraries(lines):
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def _openmp_libraries(lines: Sequence[str]) -> list[str]:
    """List the OpenMP runtimes in lines of ``/proc/self/maps``, that of torch first."""
    paths = {line.split(maxsplit=5)[5] for line in lines if "omp" in line and ".so" in line}
    own = str(Path(torch.__file__).parent)  # torch/lib, or torch.libs beside it
    found = [path for path in paths if any(name in Path(path).name for name in ("libgomp", "libiomp", "libomp"))]
    return sorted(found, key=lambda path: (not path.startswith(own), path))


@cache
def best_level() -> int:
    """Return the index into :data:`LEVELS` of this processor's fastest level; -1 without a kernel.

    Raises:
        FistaPrunerError: the environment variable names no level, or one that cannot run here.
    """
    found = library()
    best = -1 if found is None else int(found.fistapruner_level())
    wanted = os.environ.get(ENVIRONMENT, "")
    if not wanted:
        return best
    if wanted == "torch":
        return -1
    return level_index(wanted)


def level_index(name: str) -> int:
    """Return the index of a level, which must be one that runs here.

    Raises:
        FistaPrunerError: no such level, no kernel, or a processor that does not have it.
    """
    if name not in LEVELS:
        raise FistaPrunerError(f"kernel level {name!r} is not known: torch, {', '.join(LEVELS)}")
    available = available_levels()
    if name not in available:
        raise FistaPrunerError(
            f"kernel level {name!r} cannot run here; what can: torch{''.join(', ' + level for level in available)}"
        )
    return LEVELS.index(name)


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


class Handle:
    """An operator as the kernel's C structure; keeps the tensors it points into alive.

    Args:
        operator: the operator, on the CPU: packed, or a dense contiguous bf16 weight.
        bias: (rows,) added to every product, or None.
    """

    def __init__(self, operator: PackedOperator | Tensor, bias: Tensor | None = None) -> None:
        found = library()
        if found is None:
            raise FistaPrunerError("the compiled kernel is not installed")
        self._library = found
        self._kept: tuple[Tensor | None, ...]
        if isinstance(operator, Tensor):
            self._kept, values = (None, None, operator, None, None), operator.dtype
        else:
            self._kept = (operator.mask, operator.start, operator.values, operator.scales, operator.sums)
            values = operator.values.dtype
        mask, start, stored, scales, sums = (None if tensor is None else tensor.data_ptr() for tensor in self._kept)
        self.rows, self.columns = operator.shape
        words = -(-self.columns // 64)
        self._struct = _Operator(
            self.rows, self.columns, words, mask, start, stored, None, scales, sums, VALUES[values], 0
        )
        self._bias: Tensor | None = None
        self.take_bias(bias)
        self.address = ctypes.addressof(self._struct)

    def take_bias(self, bias: Tensor | None) -> None:
        """Copy the bias as it is now.

        Before every product: torch counts no changes through ``.data`` or of inference tensors.

        Raises:
            FistaPrunerError: it is not on the CPU.
        """
        if bias is None:
            self._struct.bias = None
            return
        if bias.device.type != "cpu":
            raise FistaPrunerError(f"the bias is on {bias.device}, the kernel and its input on the CPU: move it there")
        if self._bias is None:
            with torch.inference_mode(False):  # what is made in that mode cannot be overwritten outside of it
                self._bias = torch.empty(self.rows, dtype=torch.float32, device="cpu")
        self._bias.copy_(bias.detach())
        self._struct.bias = self._bias.data_ptr()

    def takes_many(self, level: int) -> bool:
        """Check whether matrix units multiply this operator with any number of bf16 vectors."""
        return bool(self._library.fistapruner_many_bytes(self.address, 1, 1, level))

    def unpack(self, first: int, last: int, out: Tensor, level: int) -> None:
        """Unpack rows ``first`` to ``last`` into contiguous fp32 or bf16 ``out`` (last - first, columns)."""
        self._library.fistapruner_unpack(
            self.address, first, last, out.data_ptr(), TYPES[out.dtype], torch.get_num_threads(), level
        )

    def multiply(self, x: Tensor, level: int, *, many: bool = False) -> Tensor:
        """Compute ``x @ weight.T + bias``.

        Args:
            x: (…, columns), contiguous and not empty, fp32 or bf16 on the CPU; the result has its dtype.
            level: index into :data:`LEVELS`.
            many: use the matrix units; needs bf16 and :meth:`takes_many`.

        Returns:
            (…, rows).
        """
        batch = x.numel() // self.columns
        out = x.new_empty((*x.shape[:-1], self.rows))
        threads = min(torch.get_num_threads(), -(-self.rows // 64))
        given, to, found = x.data_ptr(), out.data_ptr(), self._library
        if many:
            memory = scratch(found.fistapruner_many_bytes(self.address, batch, threads, level))
            found.fistapruner_multiply_many(self.address, given, to, batch, threads, memory.data_ptr())
        elif found.fistapruner_multiply(self.address, given, to, TYPES[x.dtype], batch, threads, level):
            raise MemoryError("no memory for the kernel's vectors")
        return out

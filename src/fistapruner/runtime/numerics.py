"""How large products are carried out: their precision, one switch for CPU and CUDA, and in which blocks of rows."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Precisions that a forward pass can have, by name."""


def windows_at_once(seqlen: int, device: torch.device) -> int:
    """Windows in one forward pass, where nothing else is asked for: on a CPU so few that what is made of them stays in its caches
    (with twice as many tokens SmolLM2's layers take a tenth longer, sums over their inputs two fifths), on a GPU enough to keep it busy.
    """
    return max(1, (2048 if device.type == "cpu" else 16384) // seqlen)


@contextmanager
def fast_products(enabled: bool = True) -> Iterator[None]:
    """Let fp32 products run on the device's low-precision matrix units, accumulating in fp32.

    On CPUs with AMX or AVX512-BF16, inputs of a product are rounded to bf16 (8 significant bits); on CUDA, to TF32 (11
    bits). Where the inputs *are* bf16 values, as activations of a bf16 model, every product is exact, so Grams lose
    nothing. Elsewhere use it for iterations only and judge the result outside of it.

    The precision is a setting of the process: it holds for the products of all threads until the last thread has left.

    Args:
        enabled: False makes this a no-op, so that a setting can be passed straight through.
    """
    if not enabled:
        yield
        return
    _precision.lower()
    try:
        yield
    finally:
        _precision.restore()


class _Precision:
    """The process's precision of fp32 products, and how many blocks of :func:`fast_products` have lowered it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._before: tuple[str, str] = ("none", "none")

    def lower(self) -> None:
        cpu, cuda = self._backends()
        with self._lock:
            if self._blocks == 0:
                self._before = cpu.fp32_precision, cuda.fp32_precision
                cpu.fp32_precision, cuda.fp32_precision = "bf16", "tf32"
            self._blocks += 1

    def restore(self) -> None:
        cpu, cuda = self._backends()
        with self._lock:
            self._blocks -= 1
            if self._blocks == 0:
                cpu.fp32_precision, cuda.fp32_precision = self._before

    @staticmethod
    def _backends() -> tuple[Any, Any]:
        return torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]


_precision = _Precision()


def add_gram(sums: Tensor, rows: Tensor) -> None:
    """``sums += rows^T rows`` on and above the diagonal blocks only, which saves 20 to 40 % of the product.

    What lies below is left as it was: :func:`mirror` fills it when all rows are in.

    Args:
        sums: (n, n).
        rows: (p, n).
    """
    n = len(sums)
    size = -(-n // min(8, max(1, n // 256)))  # smaller blocks save no more, and cost their products' efficiency
    for start in range(0, n, size):
        block = slice(start, start + size)
        sums[block, start:].addmm_(rows[:, block].T, rows[:, start:])


def mirror(sums: Tensor) -> Tensor:
    """Make ``sums`` (n, n) symmetric in place, from what is on and above its diagonal; returns it."""
    for start in range(0, len(sums), 1024):
        block, after = slice(start, start + 1024), slice(start + 1024, None)
        sums[block, block] = sums[block, block].triu() + sums[block, block].triu(1).T
        sums[after, block] = sums[block, after].T
    return sums


def row_blocks(rows: int) -> list[slice]:
    """Sixteenths of ``rows``: what is computed row by row goes block by block, so that its temporaries stay small.

    A share rather than a number of rows, so that the memory of a small problem predicts that of a large one
    (:func:`~fistapruner.planning.footprint.solve_bytes`).
    """
    size = max(1, -(-rows // 16))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def pass_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Precision of forward passes where none is asked for: the checkpoint's own, ``stored``, or fp32 on a CPU that has no matrix
    units for it, where passes in it are many times slower."""
    return torch.float32 if device.type == "cpu" and not (stored == torch.bfloat16 and has_bf16_units(device)) else stored


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` of ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def has_bf16_units(device: torch.device) -> bool:
    """Whether products of bf16 tensors run on matrix units there; elsewhere they are slower than fp32 ones."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device.type == "cpu" and any(bool(getattr(torch.cpu, name, bool)()) for name in names)

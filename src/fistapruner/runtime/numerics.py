"""Set the precision of large products, one switch for CPU and CUDA, and cut them into blocks of rows."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Precisions of forward passes, by name."""


def windows_at_once(seqlen: int, device: torch.device) -> int:
    """Return the default batch size in windows: about 2,048 tokens on a CPU, 16,384 on a GPU.

    On a CPU activations of 2,048 tokens fit the caches: measured with twice as many, SmolLM2's layers take 10 %
    longer, sums over their inputs 40 %. A GPU needs the larger batch to be busy.
    """
    return max(1, (2048 if device.type == "cpu" else 16384) // seqlen)


@contextmanager
def fast_products(enabled: bool = True) -> Iterator[None]:
    """Let fp32 products run on the device's low-precision matrix units, accumulating in fp32.

    On CPUs with AMX, inputs of a product are rounded to bf16 (8 significant bits); on CUDA, to TF32 (11 bits). On other
    CPUs nothing changes (torch 2.13): those with AVX512-BF16 alone multiply only bf16 tensors faster. Where the inputs
    *are* bf16 values, as activations of a bf16 model, every product is exact, so Grams lose nothing. Elsewhere use it
    for iterations only, and compute errors of the result outside of it.

    The precision is a setting of the process: it holds for the products of all threads until the last block has ended.

    Args:
        enabled: False changes nothing.
    """
    if not enabled:
        yield
        return
    _precision.lower()
    try:
        yield
    finally:
        _precision.restore()


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute fp32 products and convolutions in fp32, even inside a block of :func:`fast_products`.

    The precision is a setting of the process: use it inside :func:`undisturbed`, or where no other thread computes.
    """
    backends = (*_precision.backends(), torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@contextmanager
def undisturbed() -> Iterator[None]:
    """Compute the same whatever the calling program has set, in one thread at a time.

    What a program may have set is torch's default dtype and device, the precision of fp32 products, autocast, inference
    mode, and that no gradients are recorded. All of it comes back at the end, and so does the state of the CPU's random
    generator, from which transformers draws where it makes a model. Some of it, like the number of CPU threads and a
    run's log, belongs to the process: a second thread waits until the block of the first has ended.
    """
    with _one_at_a_time:
        dtype, device = torch.get_default_dtype(), torch.get_default_device()
        torch.set_default_dtype(torch.float32)
        try:
            with (
                torch.device("cpu") if device.type != "cpu" else nullcontext(),  # it slows every call of torch
                torch.random.fork_rng(devices=()),
                torch.inference_mode(False),  # records gradients, also inside torch.no_grad()
                torch.autocast("cpu", enabled=False),
                torch.autocast("cuda", enabled=False),
                exact_products(),
            ):
                yield
        finally:
            torch.set_default_dtype(dtype)


_one_at_a_time = threading.RLock()


def exact_in_fast_products(dtype: torch.dtype, device: torch.device) -> bool:
    """Check whether :func:`fast_products` computes products of two such tensors exactly.

    The matrix units keep as many significant bits as the values have: 8 of bf16 everywhere, 11 of fp16 on CUDA.
    """
    return dtype == torch.bfloat16 or (dtype == torch.float16 and device.type == "cuda")


class _Precision:
    """The process's precision of fp32 products, and the number of open blocks of :func:`fast_products`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._before: tuple[str, str] = ("none", "none")

    def lower(self) -> None:
        """Begin a block with lower precision."""
        cpu, cuda = self.backends()
        with self._lock:
            if self._blocks == 0:
                self._before = cpu.fp32_precision, cuda.fp32_precision
                cpu.fp32_precision, cuda.fp32_precision = "bf16", "tf32"
            self._blocks += 1

    def restore(self) -> None:
        """End a block; the last one restores the precision from before the first."""
        cpu, cuda = self.backends()
        with self._lock:
            self._blocks -= 1
            if self._blocks == 0:
                cpu.fp32_precision, cuda.fp32_precision = self._before

    @staticmethod
    def backends() -> tuple[Any, Any]:
        return torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]


_precision = _Precision()


def ordered_attention(device: torch.device) -> AbstractContextManager[None]:
    """Let the backward pass of attention add in a fixed order inside the block.

    On CUDA, the backward passes of the fused attention kernels add with atomics, so that two runs differ in their last
    bits. Inside the block attention is two plain products and a softmax, which needs memory for (heads, seqlen, seqlen)
    values of each window. Nothing changes on a CPU.

    Args:
        device: of the passes.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()


def add_gram(sums: Tensor, rows: Tensor) -> None:
    """Add ``rows^T rows`` to ``sums``, on and above the diagonal blocks only.

    This saves 20 to 40 % of the product.
    Entries below are not changed: call :func:`mirror` after the last rows.

    Args:
        sums: (n, n) fp32.
        rows: (p, n) fp32, or as :func:`summed_in_fp32` says.
    """
    n = len(sums)
    size = -(-n // min(8, max(1, n // 256)))  # smaller blocks save no more, and their products are less efficient
    for start in range(0, n, size):
        block = slice(start, start + size)
        add_product(sums[block, start:], rows[:, block].T, rows[:, start:])


def summed_in_fp32(values: Tensor) -> bool:
    """Check whether :func:`add_product` takes such values as they are: bf16 and fp16 on a GPU."""
    return values.is_cuda and values.dtype in (torch.bfloat16, torch.float16)


def add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to ``sums``.

    Where both factors are as :func:`summed_in_fp32` says, the product is exact and summed in fp32, and no fp32 copy of
    them is made.

    Args:
        sums: (m, n) fp32.
        left: (m, p).
        right: (p, n).
    """
    if left.dtype == right.dtype and summed_in_fp32(left):
        sums.add_(torch.mm(left, right, out_dtype=torch.float32))
    else:
        sums.addmm_(left.float(), right.float())


def mirror(sums: Tensor) -> Tensor:
    """Make ``sums`` (n, n) symmetric in place, from its entries on and above the diagonal; return it."""
    for start in range(0, len(sums), 1024):
        block, after = slice(start, start + 1024), slice(start + 1024, None)
        sums[block, block] = sums[block, block].triu() + sums[block, block].triu(1).T
        sums[after, block] = sums[block, after].T
    return sums


BLOCKS = 16
"""Blocks of rows. Their number is fixed, and not their size, so that the memory of a small problem predicts that of a
large one (:func:`~fistapruner.planning.footprint.solve_bytes`)."""


def row_blocks(rows: int) -> list[slice]:
    """Cut ``rows`` into :data:`BLOCKS` blocks, so that temporaries of row-wise computations stay small."""
    size = max(1, -(-rows // BLOCKS))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def seeded(seed: int, *purpose: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Make a random generator from a seed and what it is for.

    Generators for different purposes are independent of each other, of torch's global generator, and of the order in
    which they are used.

    Args:
        seed: of the run.
        purpose: names and numbers, such as ``"order", 3``.
        device: where it draws. Other kinds of devices draw other numbers.
    """
    digest = hashlib.sha256(json.dumps([seed, *purpose]).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8]) % 2**63)


def slices(count: int, row_bytes: int, budget: int) -> list[tuple[int, int]]:
    """Cut ``count`` rows into the fewest nearly equal slices of at most ``budget`` bytes, or one row."""
    parts = max(1, -(-count // max(1, budget // row_bytes)))
    bounds = [count * part // parts for part in range(parts + 1)]
    return [(start, stop) for start, stop in itertools.pairwise(bounds) if stop > start]


@dataclass(frozen=True)
class Budgets:
    """Bytes of fp32 logits at once.

    Args:
        head: logits computed at once: few enough to bound memory, enough tokens to pay for reading the head's weights.
        rows: logits reduced at once on a CPU: they stay in a core's cache (measured: half the time of large slices).
    """

    head: int = 128 * 2**20
    rows: int = 2 * 2**20

    def cache(self, logits: Tensor) -> list[tuple[int, int]]:
        """Cut (tokens, vocabulary) rows for reduction.

        Slices of a core's cache on a CPU, all at once on a GPU.
        """
        tokens, vocabulary = logits.shape
        return slices(tokens, 4 * vocabulary, self.rows) if logits.device.type == "cpu" else [(0, tokens)]


BUDGETS = Budgets()


def pass_dtype(stored: torch.dtype, device: torch.device, bf16_units: bool | None = None) -> torch.dtype:
    """Choose the default precision of passes: the stored one, or fp32 on a device without units for it.

    On a CPU these are units for bf16. A GPU has some for fp16; those before Ampere have none for bf16, and would
    emulate it. (In fp16 hidden states of bf16 models may overflow.)

    Args:
        stored: dtype of the checkpoint's weights.
        device: device of the passes.
        bf16_units: whether the device has matrix units for bf16; None is :func:`has_bf16_units`.
    """
    if stored != torch.bfloat16:
        return stored if device.type != "cpu" else torch.float32
    units = has_bf16_units(device) if bf16_units is None else bf16_units
    return stored if units else torch.float32


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean of (n,) independent values and its standard error, which is NaN for fewer than two."""
    if values.numel() < 2:
        return float(values.mean()), math.nan
    return float(values.mean()), float(values.std() / math.sqrt(values.numel()))


def changes_in_place(tensor: Tensor) -> int:
    """Count the changes in place of a tensor; for an inference tensor torch does not count them."""
    return 0 if tensor.is_inference() else tensor._version


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without ``torch.``: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def has_bf16_units(device: torch.device) -> bool:
    """Check whether a device multiplies bf16 tensors on matrix units; without, they are slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device.type == "cpu" and any(bool(getattr(torch.cpu, name, bool)()) for name in names)

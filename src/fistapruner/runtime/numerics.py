"""Choose the precision of passes and products, and shield a run from what the calling program has set."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.linalg import has_bf16_units

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Precisions of forward passes, by name."""


def windows_at_once(seqlen: int, device: torch.device) -> int:
    """Return the default batch size in windows: about 2,048 tokens on a CPU, 16,384 on a GPU."""
    return max(1, (2048 if device.type == "cpu" else 16384) // seqlen)


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute fp32 products and convolutions in fp32, even inside a block of :func:`fast_products`.

    The precision is a setting of the process: use it inside :func:`undisturbed`, or where no other thread computes.
    """
    backends = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
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
    generator. A second thread waits until the block of the first has ended.
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


def ordered_attention(device: torch.device) -> AbstractContextManager[None]:
    """Let the backward pass of attention add in a fixed order inside the block.

    On CUDA, fused attention kernels add with atomics there. Inside the block attention is two plain products and a
    softmax, which needs memory for (heads, seqlen, seqlen) values of each window. Nothing changes on a CPU.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()


def seeded(seed: int, *purpose: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Make a random generator from a seed and what it is for.

    Generators for different purposes, such as ``"order", 3``, are independent of each other, of torch's global
    generator, and of the order in which they are used. Other kinds of devices draw other numbers.
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
        """Cut (tokens, vocabulary) rows into slices of a core's cache on a CPU; none on a GPU."""
        tokens, vocabulary = logits.shape
        return slices(tokens, 4 * vocabulary, self.rows) if logits.device.type == "cpu" else [(0, tokens)]


BUDGETS = Budgets()


def pass_dtype(stored: torch.dtype, device: torch.device, bf16_units: bool | None = None) -> torch.dtype:
    """Choose the default precision of passes: the stored one, or fp32 on a device without units for it.

    CPUs have none for fp16; ``bf16_units`` None asks the device for those of bf16.
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


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without ``torch.``: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")

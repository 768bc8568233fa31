"""Factor Grams safely, multiply on matrix units, and cut large products into blocks of rows."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import FistaPrunerError

BLOCKS = 16
"""Blocks of rows. Their number is fixed, and not their size, so that the memory of a small problem predicts that of a
large one."""

MOST_DAMPING = 10.0
"""Largest damping that is tried, as a share of a Gram's mean diagonal; a larger first one is tried, too."""

EIGENVECTORS, POWER_STEPS = 8, 40
"""Vectors and steps of the block power iteration for the largest eigenvalue of a Gram."""


def row_blocks(rows: int) -> list[slice]:
    """Cut ``rows`` into :data:`BLOCKS` blocks, so that temporaries of row-wise computations stay small."""
    size = max(1, -(-rows // BLOCKS))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def has_bf16_units(device: torch.device) -> bool:
    """Check whether a device multiplies bf16 tensors on matrix units; without, they are slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device.type == "cpu" and any(bool(getattr(torch.cpu, name, bool)()) for name in names)


class Product:
    """Multiply by a matrix from the right, in bf16 where asked and the device has units for that.

    Args:
        matrix: (n, k) fp32; another one may be set later by ``use``.
        fast: multiply in bf16 (8 significant bits); else, and on other devices, in fp32.
    """

    def __init__(self, matrix: Tensor, *, fast: bool) -> None:
        self.lowered = fast and has_bf16_units(matrix.device)
        self._buffers: tuple[Tensor, Tensor] | None = None
        self.use(matrix)

    def use(self, matrix: Tensor) -> None:
        """Multiply by another matrix of the same shape from now on."""
        self.matrix = matrix.bfloat16() if self.lowered else matrix

    def add(self, sums: Tensor, left: Tensor) -> Tensor:
        """Add ``left @ matrix`` to ``sums`` (m, k) in place; ``left`` (m, n) may be overwritten."""
        if not self.lowered:
            return sums.addmm_(left, self.matrix)
        product = self._multiply(left)
        # Through a free buffer: adding bf16 to fp32 would allocate memory for the conversion.
        return sums.add_(left.copy_(product) if left.shape == product.shape else product)

    def __call__(self, left: Tensor, out: Tensor) -> Tensor:
        """Write ``left @ matrix`` to ``out`` (m, k)."""
        return out.copy_(self._multiply(left)) if self.lowered else torch.mm(left, self.matrix, out=out)

    def _multiply(self, left: Tensor) -> Tensor:
        if self._buffers is None or self._buffers[0].shape != left.shape:
            shapes = left.shape, (len(left), self.matrix.shape[1])
            factor, product = (torch.empty(shape, dtype=torch.bfloat16, device=left.device) for shape in shapes)
            self._buffers = factor, product
        factor, product = self._buffers
        return torch.mm(factor.copy_(left), self.matrix, out=product)


@contextmanager
def fast_products(enabled: bool = True) -> Iterator[None]:
    """Let fp32 products run on the device's low-precision matrix units, accumulating in fp32.

    On CPUs with AMX, inputs of a product are rounded to bf16 (8 significant bits); on CUDA, to TF32 (11 bits). Where
    the inputs *are* bf16 values, as activations of a bf16 model, every product is exact: sums over tokens use it then.

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


def dead_inputs(gram: Tensor) -> Tensor:
    """Find inputs that are zero on every calibration token: (n,) bool. Their weights change no output."""
    return gram.diagonal() <= 0


def alive_gram(gram: Tensor) -> Tensor:
    """Replace the zero diagonal of dead inputs by the diagonal's mean, or 1 if all are dead.

    Returns:
        (n, n), a copy.
    """
    dead = dead_inputs(gram)
    diagonal = gram.diagonal()
    level = diagonal.clamp_min(0).mean()
    level = torch.where(level > 0, level, torch.ones_like(level))
    return gram + torch.diag(torch.where(dead, level - diagonal, torch.zeros_like(diagonal)))


def damped_cholesky(gram: Tensor, share: float = 0.0, label: str = "operator") -> tuple[Tensor, float, list[str]]:
    """Factor ``gram + d I`` by Cholesky, raising the damping d tenfold until the factorisation succeeds.

    Args:
        gram: (n, n) symmetric positive semi-definite, or a batch of such (b, n, n), which share d.
        share: first damping, as a share of the diagonal's mean.
        label: name of the operator, for the warning.

    Returns:
        The lower factor, the share that was used, and a warning that names the operator if it was raised.
    """
    mean = gram.diagonal(dim1=-2, dim2=-1).mean()
    # A pivot as small as the rounding error of the diagonal carries no information, even if the factorisation succeeds.
    floor = gram.shape[-1] * torch.finfo(gram.dtype).eps
    used, most = share, max(MOST_DAMPING, share)
    while used <= most:
        damped = gram.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(used * mean)
        factor, info = torch.linalg.cholesky_ex(damped)
        pivots = factor.diagonal(dim1=-2, dim2=-1).square() / damped.diagonal(dim1=-2, dim2=-1)
        if bool((info == 0).all()) and bool((pivots > floor).all()):
            raised = f"damping raised from {share:g} to {used:g} of its mean diagonal"
            warnings = [f"{label}: the Gram is close to singular; {raised}"] if used != share else []
            return factor, used, warnings
        used = max(used * 10.0, 1e-6)
    raise FistaPrunerError(
        f"{label}: the Gram has no Cholesky factor even with {most:g} of its mean diagonal added: check its activations"
    )


def shrunk_root(metric: Tensor, share: float) -> Tensor | None:
    """Return ``R`` with ``R R^T`` a metric of which its mean eigenvalue replaces a share.

    Takes an (n, n) positive semi-definite matrix, or its (n,) diagonal, whose root is a diagonal, too. A metric of
    zeros, as of a model whose outputs never change, tells errors apart no more than the identity: it has none.
    """
    if bool((metric if metric.ndim == 1 else metric.diagonal()).mean() == 0):
        return None
    if metric.ndim == 1:
        return ((1 - share) * metric + share * metric.mean()).sqrt()
    return damped_cholesky((1 - share) * metric, share / (1 - share), "the metric of output errors")[0]


def largest_eigenvalue(gram: Tensor) -> Tensor:
    """Bound the largest eigenvalue of a Gram by block power iteration (0-dim tensor).

    The Rayleigh-Ritz value approaches it from below; 0.1 % is added so that 1/L is a safe step. Grams of real models
    have a few massive-activation directions far above the rest, so that a few iterations agree to many digits.
    """
    n = gram.shape[0]
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(n, min(EIGENVECTORS, n), generator=generator, dtype=gram.dtype, device="cpu").to(gram.device)
    for _ in range(POWER_STEPS):
        vectors = torch.linalg.qr(gram @ vectors).Q
    small = vectors.T @ (gram @ vectors)
    top: Tensor = torch.linalg.eigvalsh((small + small.T) / 2)[-1]
    return top.clamp_min(torch.finfo(gram.dtype).tiny) * 1.001

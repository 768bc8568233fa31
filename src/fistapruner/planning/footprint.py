"""Measure the peak bytes of tensors of a computation, by running it once, small."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..core import Constraint, LayerProblem
from ..settings.structure_settings import Structure
from ..solvers.base import Method
from ..solvers.low_rank import solve_low_rank
from ..structure.refit import ChannelStatistics, remove_channels

PROBE_INPUTS = 256
"""Inputs of the small problem: enough that terms linear in the size are small against n^2."""

WORKSPACES = {"_linalg_eigh": 2}
"""Workspace of LAPACK's divide-and-conquer, in matrices of the operand's size: not visible to PyTorch."""

CUDA_WORKSPACES = {**WORKSPACES, "cholesky_inverse": 1}
"""On CUDA the factor is copied, too, beside the inverse (PyTorch's ``cholesky_inverse_kernel_impl_cusolver``)."""

_SOLVED: dict[tuple[Any, ...], int] = {}
"""What :func:`solve_bytes` has measured in this process, by its arguments."""


class _LiveBytes(TorchDispatchMode):
    """Count the bytes of live storages that operations inside the block allocate.

    Tensors on the meta device have none: those that a freed decoder layer leaves behind are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        first = args[0] if args else None
        cuda = isinstance(first, torch.Tensor) and first.device.type == "cuda"
        workspaces = CUDA_WORKSPACES if cuda else WORKSPACES
        extra = sum(size * args[0].nbytes for key, size in workspaces.items() if key in name)
        known = {id(tensor.untyped_storage()) for tensor in _tensors((*args, *(kwargs or {}).values()))}
        for tensor in _tensors((out,)):
            if not tensor.is_meta:
                storage = tensor.untyped_storage()
                if id(storage) not in self._known and id(storage) not in known:
                    self._known[id(storage)] = weakref.ref(storage, self._gone(id(storage), storage.nbytes()))
                    self.live += storage.nbytes()
        self.peak = max(self.peak, self.live + extra)
        return out

    def _gone(self, key: int, size: int) -> Callable[[Any], None]:
        """Make the callback that subtracts a freed storage."""

        def forget(_: Any) -> None:
            self._known.pop(key, None)
            self.live -= size

        return forget


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among arguments or results of an operation, also those in lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def peak_bytes(work: Callable[[], object]) -> int:
    """Measure the peak bytes of the tensors that ``work`` allocates."""
    with _LiveBytes() as counter:
        work()
    return int(counter.peak)


@lru_cache(maxsize=1024)
def removal_bytes(
    rows: int,
    inputs: int,
    kept: int,
    settings: Structure,
    device: torch.device | str = "cpu",
    *,
    biased: bool = False,
) -> int:
    """Estimate the peak bytes of removing channels of an operator, by removing some of a small one.

    Args:
        rows: outputs of the operator.
        inputs: its channels; ``kept``: those that stay.
        settings: how channels are chosen; what goa and bypass need is that of energy with a refit.
        device: device of the work.
        biased: the operator has a bias.
    """
    small = min(inputs, PROBE_INPUTS)
    scale = inputs / small
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(2 * small, small, generator=generator)
    gram = (activations.T @ activations / len(activations)).to(device)
    weight = torch.randn(max(1, round(rows / scale)), small, generator=generator).to(device)
    if settings.method in ("goa", "bypass"):
        settings = settings.model_copy(update={"method": "energy", "compensate": "refit"})
    problem = LayerProblem(weight, gram, torch.zeros_like(weight), torch.zeros(len(weight), device=device))
    mean, drift_mean = (torch.zeros(count, dtype=torch.float64, device=device) for count in (small, len(weight)))
    known = ChannelStatistics(problem, mean, (gram.clone(), gram.clone()), drift_mean, (mean, mean))
    held = 4 * (3 * gram.numel() + 2 * weight.numel())
    few = min(max(1, round(kept / scale)), small - 1)
    peak = peak_bytes(partial(remove_channels, known, few, settings, biased=biased))
    return int((held + peak) * scale**2)


def kept_bytes(work: Callable[[], object]) -> int:
    """Measure the bytes of tensors that live while the result of ``work`` is held, with its graph."""
    with _LiveBytes() as counter:
        result = work()
        kept = counter.live
        del result
    return int(kept)


def solve_bytes(
    rows: int,
    inputs: int,
    sparsity: Constraint,
    steps: Sequence[Method],
    device: torch.device | str = "cpu",
    *,
    drift: bool = False,
    rank: int = 0,
) -> int:
    """Estimate the peak bytes of solving an operator: weight, Gram and all of the method chain.

    All large tensors of a solver are (m, n) or (n, n), so the peak is quadratic in the size: a small problem of the
    same proportions is solved and its peak scaled; once in a process, since operators of layers and runs are alike.

    Args:
        rows: outputs of the operator.
        inputs: n.
        sparsity: its pattern.
        steps: the method chain.
        device: device of the solve; on a GPU some steps are computed differently.
        drift: the problem has drift, which is counted with the weight.
        rank: of the low-rank part beside the zeros; 0 is none.
    """
    key = rows, inputs, sparsity, tuple(steps), str(device), drift, rank
    if key not in _SOLVED:
        _SOLVED[key] = _measure_solve(rows, inputs, sparsity, steps, device, drift=drift, rank=rank)
    return _SOLVED[key]


def _measure_solve(
    rows: int,
    inputs: int,
    sparsity: Constraint,
    steps: Sequence[Method],
    device: torch.device | str,
    *,
    drift: bool,
    rank: int,
) -> int:
    """Measure the peak of a small solve, and scale it."""
    small = min(inputs, PROBE_INPUTS)
    scale = inputs / small
    few = max(1, round(rows / scale))
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(2 * small, small, generator=generator)
    gram = activations.T @ activations / len(activations)
    weight = torch.randn(few, small, generator=generator)
    problem = LayerProblem(
        weight,
        gram,
        drift=torch.randn(weight.shape, generator=generator) if drift else None,
        drift_energy=torch.ones(len(weight)) if drift else None,
    ).to(device)
    held = 4 * (gram.numel() + problem.weight.numel() * (1 + drift))
    few_ranks = min(max(1, round(rank / scale)), small, few) if rank else 0

    def work() -> object:
        return solve_low_rank(problem, sparsity, steps, few_ranks)

    return int((held + peak_bytes(work)) * scale**2)

"""Measure the free and the used memory of this process, on the host and on a GPU."""

from __future__ import annotations

import ctypes
import gc
import re
import resource
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CONTROL_GROUPS = (
    ("memory.max", "memory.current", "(?:in)?active_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_(?:in)?active_file"),
)
"""Files of a control group's limit and use, and the pattern of its ``memory.stat`` entries of cache (versions 2, 1)."""
OWN_GROUPS = Path("/proc/self/cgroup")
"""Control groups of this process, on Linux."""

MOUNTED_GROUPS = Path("/sys/fs/cgroup")
"""Where Linux mounts control groups."""

WORKSPACES = {"_linalg_eigh": 2, "cholesky_inverse": 1}
"""Workspace of operations, in matrices of the operand's size, that PyTorch does not see."""


def free_memory(own: Path = OWN_GROUPS, mounted: Path = MOUNTED_GROUPS) -> int:
    """Measure the bytes that this process can still allocate: on the machine and within its limits.

    These are those of its control groups, and of ``ulimit``.

    Args:
        own: file with the control groups of this process (a container's, Slurm's).
        mounted: folder where control groups are mounted.
    """
    return max(0, min([psutil.virtual_memory().available, *left_in_groups(own, mounted), *left_by_limits()]))


def free_device_memory(device: torch.device) -> int:
    """Measure the bytes that this process can still allocate on a GPU, with unused reserved ones."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def resident_memory() -> int:
    """Measure the bytes of main memory that this process uses now (resident set)."""
    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """Measure the peak bytes of main memory of this process since :func:`reset_peak_memory`."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_memory(device: torch.device) -> int | None:
    """Measure the peak bytes that PyTorch has allocated on a GPU since the last reset; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak of used memory where the system can, else it counts from the process's start.

    Args:
        device: a GPU's peak is reset too.
    """
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.init()  # before it, PyTorch does not know the device
        torch.cuda.reset_peak_memory_stats(device)


def release_memory() -> None:
    """Return freed memory to the system; glibc itself keeps blocks below 32 MiB."""
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def release_device_memory() -> None:
    """Return memory that this process has freed to its GPUs, for other processes and for larger blocks."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def release_failed_memory() -> None:
    """Return what work has held that ran out of a GPU's memory.

    Call it when the error is gone, behind its ``except`` block: only then are the tensors free that its frames held.
    """
    gc.collect()
    release_device_memory()


def left_in_groups(own: Path, mounted: Path) -> Iterator[int]:
    """Yield the bytes that each control group of this process, and each above it, still allows.

    File cache counts as free, whether it was read once or more often: the kernel reclaims both. Arguments as for
    :func:`free_memory`.
    """
    for folder, version in control_groups("memory", own, mounted):
        limit, used, cache = CONTROL_GROUPS[version == 1]
        with suppress(OSError, ValueError):  # not visible inside a container, or "max": no limit
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            held = re.findall(rf"^{cache} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
            yield left + sum(map(int, held))


def left_by_limits() -> Iterator[int]:
    """Yield the bytes that the limits of this process (``ulimit``) still allow: address space, data."""
    if sys.platform == "linux":  # macOS ignores them
        held = psutil.Process().memory_info()
        for limit, used in ((resource.RLIMIT_AS, held.vms), (resource.RLIMIT_DATA, held.data)):
            if (most := resource.getrlimit(limit)[0]) != resource.RLIM_INFINITY:
                yield most - used


def control_groups(controller: str, own: Path, mounted: Path) -> Iterator[tuple[Path, int]]:
    """Yield folder and version of each control group of this process, and of each above it.

    Args:
        controller: what the groups of version 1 control: ``memory`` or ``cpu``.
        own: file with the control groups of this process.
        mounted: folder where control groups are mounted.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = mounted / controller if controllers else mounted
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            yield folder, 1 if controllers else 2
            if folder == top:
                break


def peak_bytes(work: Callable[[], object]) -> int:
    """Measure the peak bytes of the tensors that ``work`` allocates."""
    with _LiveBytes() as counter:
        work()
    return int(counter.peak)


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
        extra = sum(size * args[0].nbytes for key, size in WORKSPACES.items() if key in name)
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

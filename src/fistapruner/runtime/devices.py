"""Choose the device to compute on and the number of CPU threads, and measure their memory."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import re
import resource
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import FistaPrunerError

OWN_GROUPS, MOUNTED_GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
"""Control groups (version 2) of this process, a container's or Slurm's, and where Linux mounts them."""

WORKSPACES = {"_linalg_eigh": 2, "cholesky_inverse": 1}
"""Workspace of operations, in matrices of the operand's size, that PyTorch does not see."""


def choose_device(name: str) -> torch.device:
    """Return the device that a recipe names: ``cuda`` is the first GPU, ``auto`` that or the CPU."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    found = re.fullmatch(r"auto|cuda(?::(0|[1-9][0-9]*))?", name) if isinstance(name, str) else None
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found is None or int(found[1] or 0) >= there:  # torch takes numbers from 256 on for smaller ones
        raise FistaPrunerError(
            f"device {name!r}: auto, cpu, cuda or cuda:N is expected, and PyTorch sees {there} CUDA GPUs"
        )
    return torch.device("cuda", int(found[1] or 0))


def device_title(device: torch.device) -> str:
    """Name a device by what decides last bits: ``cpu``, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def worker_devices(name: str, workers: int | None, threads: int | None) -> list[torch.device]:
    """Choose the device of every worker.

    Args:
        name: as in the recipe: ``auto`` and ``cuda`` are all GPUs of the first one's model; ``cuda:1`` is one.
        workers: number of workers; None is one for each GPU, or one for every ``threads`` cores of the CPU.
        threads: CPU threads of each worker; None is eight, or fewer for at least two workers.
    """
    first = choose_device(name)
    if first.type == "cuda":
        gpus = [first] if ":" in name else [torch.device("cuda", place) for place in range(torch.cuda.device_count())]
        devices = [gpu for gpu in gpus if device_title(gpu) == device_title(first)]  # the last bits of others differ
        return [devices[number % len(devices)] for number in range(workers or len(devices))]
    cores = available_cores()
    groups = workers or (max(1, cores // threads) if threads else min(cores, max(2, cores // 8)))
    return [first] * groups


@contextmanager
def cpu_threads(count: int | None = None) -> Iterator[None]:
    """Compute on so many CPU threads, by default all usable ones; last bits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or usable_threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def usable_threads() -> int:
    """Count torch's default CPU threads, at most the cores that this process may use."""
    return min(torch.get_num_threads(), available_cores())


def available_cores() -> int:
    """Count the CPU cores that this process may use, within the quota of its control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *quotas()]))


def quotas(own: Path = OWN_GROUPS, mounted: Path = MOUNTED_GROUPS) -> Iterator[int]:
    """Yield the cores, rounded up, of each control group of this process and each above it."""
    for folder in control_groups(own, mounted):
        with suppress(OSError, ValueError):  # not visible inside a container, or "max": no quota
            quota, period = map(int, (folder / "cpu.max").read_text().split())
            yield math.ceil(quota / period)


def control_groups(own: Path, mounted: Path) -> Iterator[Path]:
    """Yield the folder of this process's control group, and of each above it."""
    for line in own.read_text().splitlines() if own.is_file() else ():  # only Linux has it
        if line.startswith("0::"):
            group = mounted / line.removeprefix("0::").lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mounted))


def free_memory(own: Path = OWN_GROUPS, mounted: Path = MOUNTED_GROUPS) -> int:
    """Measure the bytes that this process can still allocate, within its control groups."""
    return max(0, min([psutil.virtual_memory().available, *left_in_groups(own, mounted)]))


def left_in_groups(own: Path, mounted: Path) -> Iterator[int]:
    """Yield the bytes that each control group of this process, and each above it, still allows.

    File cache counts as free, whether it was read once or more often: the kernel reclaims both.
    """
    for folder in control_groups(own, mounted):
        with suppress(OSError, ValueError):  # not visible inside a container, or "max": no limit
            left = int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text())
            cache = re.findall(r"^(?:in)?active_file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
            yield left + sum(map(int, cache))


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
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+)", status.read_text())):
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_memory(device: torch.device) -> int | None:
    """Measure the peak bytes that PyTorch has allocated on a GPU since the last reset; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peaks of main memory, where the system can, and of a GPU."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.init()  # before it, PyTorch does not know the device
        torch.cuda.reset_peak_memory_stats(device)


def release_memory() -> None:
    """Return freed memory to the system; glibc itself keeps blocks below 32 MiB."""
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def release_failed_memory() -> None:
    """Return what work has held that ran out of a GPU's memory.

    Call it behind the ``except`` block of the error: only then are the tensors free that its frames held.
    """
    gc.collect()
    torch.cuda.empty_cache()


def peak_bytes(work: Callable[[], object]) -> int:
    """Measure the peak bytes of the tensors that ``work`` allocates."""
    with _LiveBytes() as counter:
        work()
    return int(counter.peak)


class _LiveBytes(TorchDispatchMode):
    """Count the bytes of live storages that operations allocate, but for those on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        extra = sum(size * args[0].nbytes for key, size in WORKSPACES.items() if key in name)
        known = {id(each.untyped_storage()) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for tensor in (each for each in tree_leaves(out) if isinstance(each, Tensor)):
            storage = tensor.untyped_storage()
            if not tensor.is_meta and id(storage) not in self._known and id(storage) not in known:
                self._known.add(id(storage))
                self.live += storage.nbytes()
                weakref.finalize(storage, self._forget, id(storage), storage.nbytes()).atexit = False
        self.peak = max(self.peak, self.live + extra)
        return out

    def _forget(self, key: int, size: int) -> None:
        """Subtract a freed storage."""
        self._known.discard(key)
        self.live -= size

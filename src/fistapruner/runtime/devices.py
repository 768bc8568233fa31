"""Choose the device to compute on, and the number of CPU threads."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import torch

from ..errors import FistaPrunerError
from .memory import MOUNTED_GROUPS, OWN_GROUPS, control_groups


def choose_device(name: str) -> torch.device:
    """Return the device that a recipe names; ``auto`` is the GPU with most free memory, or the CPU.

    ``cuda`` is that GPU too. It is chosen once in a process.

    Raises:
        FistaPrunerError: this machine has no such device.
    """
    if name == "auto":
        return _by_free_memory()[0] if torch.cuda.is_available() else torch.device("cpu")
    found = re.fullmatch(r"cpu|cuda(?::(0|[1-9][0-9]*))?", name) if isinstance(name, str) else None
    if found is None:
        raise FistaPrunerError(f"device {name!r} is not supported: auto, cpu, cuda or cuda:N")
    if name != "cpu" and not torch.cuda.is_available():
        raise FistaPrunerError(f"device {name!r}: PyTorch sees no CUDA GPU on this machine")
    if found[1] and int(found[1]) >= torch.cuda.device_count():  # torch takes numbers from 256 on for smaller ones
        raise FistaPrunerError(f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA GPUs")
    return _by_free_memory()[0] if name == "cuda" else torch.device(name)


def device_title(device: torch.device) -> str:
    """Name a device by what decides last bits: ``cpu``, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def gpus_of_other_models(gpu: torch.device) -> dict[torch.device, str]:
    """Find the GPUs of other models than ``gpu``, whose last bits differ, and their titles."""
    titles = {other: device_title(other) for other in _gpus()}
    return {other: title for other, title in titles.items() if title != device_title(gpu)}


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Compute on ``count`` CPU threads inside the block; the last bits of products depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def usable_threads() -> int:
    """Count torch's default CPU threads, at most the cores that this process may use."""
    return min(torch.get_num_threads(), available_cores())


@contextmanager
def threads_within_quota() -> Iterator[None]:
    """Compute on :func:`usable_threads` inside the block."""
    with cpu_threads(usable_threads()):
        yield


def worker_devices(name: str, workers: int | None, threads: int | None) -> list[torch.device]:
    """Choose the device of every worker.

    Args:
        name: as in the recipe: ``auto`` and ``cuda`` are the GPU of :func:`choose_device` and all others of its model,
            those with most free memory first; ``cuda:1`` is one.
        workers: number of workers; None is one for each GPU, or one for every ``threads`` cores of the CPU.
        threads: CPU threads of each worker; None is eight, or fewer for at least two workers.
    """
    if name != "cpu" and torch.cuda.is_available():
        devices = [torch.device(name)] if ":" in name else _by_free_memory()
        apart = gpus_of_other_models(choose_device(name))
        devices = [device for device in devices if device not in apart]
        return [devices[number % len(devices)] for number in range(workers or len(devices))]
    cores = available_cores()
    groups = workers or (max(1, cores // threads) if threads else min(cores, max(2, cores // 8)))
    return [torch.device("cpu")] * groups


def available_cores() -> int:
    """Count the CPU cores that this process may use, within the quota of its control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *quotas()]))


def quotas(own: Path = OWN_GROUPS, mounted: Path = MOUNTED_GROUPS) -> Iterator[int]:
    """Yield the cores, rounded up, of each control group of this process and each above it.

    Arguments as for :func:`~.memory.control_groups`.
    """
    for folder, version in control_groups("cpu", own, mounted):
        names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        with suppress(OSError, ValueError, ZeroDivisionError):  # not visible inside a container, or "max": no quota
            quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
            if quota > 0:  # -1 in version 1: no quota
                yield math.ceil(quota / period)


def _by_free_memory() -> list[torch.device]:
    """Return all GPUs, those with most free memory first."""
    gpus = _gpus()
    free = free_memory_of_gpus(len(gpus))
    return sorted(gpus, key=lambda gpu: (-free[gpu.index], gpu.index))


def _gpus() -> list[torch.device]:
    """Return all GPUs that this process sees."""
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


@lru_cache
def free_memory_of_gpus(count: int) -> tuple[int, ...]:
    """Measure the free bytes of all GPUs, once in a process.

    A process that asks CUDA for a GPU's free memory makes a context there, which takes hundreds of megabytes until it
    ends. So where there are several GPUs a short-lived process asks. A GPU that cannot be asked, such as one that
    another process has for itself, has none.

    Args:
        count: number of GPUs.

    Raises:
        FistaPrunerError: no GPU can be asked.
    """
    if count == 1:
        try:
            return (torch.cuda.mem_get_info(0)[0],)
        except RuntimeError as error:
            raise FistaPrunerError(f"device cuda:0 cannot be used: {first_line(error)}") from None
    # -P: nothing is imported from the current folder, which may be one that was downloaded
    done = subprocess.run([sys.executable, "-P", "-c", _ASK], capture_output=True, text=True, check=False)
    free = tuple(map(int, done.stdout.split())) if done.returncode == 0 else ()
    if len(free) != count:
        fault = done.stderr.strip().rpartition("\n")[2][:200] or f"exit status {done.returncode}"
        raise FistaPrunerError(f"the free memory of {count} GPUs cannot be measured ({fault}): name one as cuda:N")
    return free


def first_line(error: BaseException) -> str:
    """Return the first line of an error; advice on debugging follows it in those of CUDA."""
    return str(error).partition("\n")[0][:200]


_ASK = """
import torch
for gpu in range(torch.cuda.device_count()):
    try:
        print(torch.cuda.mem_get_info(gpu)[0])
    except RuntimeError:
        print(0)
"""
"""Program that prints the free bytes of each GPU."""

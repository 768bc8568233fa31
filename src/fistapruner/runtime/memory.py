"""Memory of this process: what it can still get and what it has used, of the machine and of a GPU."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch

CONTROL_GROUPS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Files of a control group's limit and use, and the entry of its ``memory.stat`` that the kernel gives back first: version 2 and 1."""


def free_memory() -> int:
    """Bytes this process can still get: of the machine, or of the control groups it is in (a container's, Slurm's) where that is less."""
    return max(0, min([psutil.virtual_memory().available, *_left_in_groups()]))


def free_device_memory(device: torch.device) -> int:
    """Bytes this process can still get of a GPU: what is free there, and what PyTorch holds unused."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def resident_memory() -> int:
    """Bytes of main memory that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """Most bytes of main memory that this process has held since :func:`reset_peak_memory`."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of peak memory, where the system can: elsewhere the peak counts from the start of the process.

    Args:
        device: where it is a GPU, its peak starts anew, too.
    """
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.init()  # else PyTorch knows no such device yet
        torch.cuda.reset_peak_memory_stats(device)


def release_memory() -> None:
    """Let the C library give freed memory back to the system; of itself it keeps blocks below 32 MiB and what lies under others."""
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _left_in_groups(own: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Bytes that each control group above this process still allows; file cache that would be given back counts as free."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = mounted / "memory" if controllers else mounted
        limit, used, cache = CONTROL_GROUPS[bool(controllers)]
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # not seen from inside a container, or "max": no limit
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                held = re.search(rf"^{cache} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
                yield left + (int(held[1]) if held else 0)
            if folder == top:
                break

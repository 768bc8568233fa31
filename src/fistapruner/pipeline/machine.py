"""What this machine is and how much memory the process has used."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import psutil
import torch

from ..reporting.schema import Machine

INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_vbmi2", "amx_bf16", "amx_int8")


def release_memory() -> None:
    """Let the C library give freed memory back to the system; of itself it keeps blocks below 32 MiB and what lies under others."""
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def describe_machine(device: torch.device) -> Machine:
    """Processor, memory and device, for the report."""
    name, flags = platform.processor(), set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text("utf-8", "replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
                break
    cuda = device.type == "cuda"
    return Machine(
        cpu=name,
        instructions=[flag for flag in INSTRUCTIONS if flag in flags],
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        memory=psutil.virtual_memory().total,
        device=device.type,
        device_name=torch.cuda.get_device_name(device) if cuda else None,
        device_memory=torch.cuda.get_device_properties(device).total_memory if cuda else None,
        system=f"{platform.system()} {platform.release()}",
        host=platform.node(),
    )


def versions() -> dict[str, str]:
    """Versions of everything that decides the numbers."""
    found = {"python": platform.python_version()}
    for package in ("fistapruner", "torch", "transformers", "safetensors", "tokenizers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def reset_peak_memory() -> None:
    """Start a new measurement of peak memory, where the system can."""
    with suppress(OSError):  # elsewhere the peak counts from the start of the process
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    """Largest resident set of this process, in bytes, since :func:`reset_peak_memory`."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def now() -> str:
    """The time, in UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")

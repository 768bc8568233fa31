"""Describe this machine."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch

INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_vbmi2", "amx_bf16", "amx_int8")
"""Vector instruction sets that are recorded."""


class Machine(BaseModel):
    """The machine of a run.

    Args:
        cpu: its name; ``instructions``: those of :data:`INSTRUCTIONS` that it has.
        cores: logical cores; ``threads``: threads used.
        memory: bytes of main memory.
        device: ``cpu`` or ``cuda``; ``device_name``: the GPU's name; ``device_memory``: its bytes.
    """

    model_config = ConfigDict(extra="allow")

    cpu: str = ""
    instructions: list[str] = []
    cores: int | None = None
    threads: int | None = None
    memory: int | None = None
    device: str = "cpu"
    device_name: str | None = None
    device_memory: int | None = None
    system: str = ""
    host: str | None = None


def describe_machine(device: torch.device, threads: int | None = None) -> Machine:
    """Describe processor, memory and device, for the report.

    Args:
        device: where is computed.
        threads: of the CPU that are used; None is those of this process.
    """
    import torch  # imported here, so that reading a report does not import torch

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
        threads=threads or torch.get_num_threads(),
        memory=psutil.virtual_memory().total,
        device=device.type,
        device_name=torch.cuda.get_device_name(device) if cuda else None,
        device_memory=torch.cuda.get_device_properties(device).total_memory if cuda else None,
        system=f"{platform.system()} {platform.release()}",
        host=platform.node(),
    )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in ("fistapruner", "torch", "transformers", "safetensors", "tokenizers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    """Return the time, in UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")

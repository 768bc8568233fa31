"""Describe this machine and the processes of a run; imports no torch by itself."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
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
    """The machine of a run; memory is in bytes, cores are logical ones, threads are those that were used."""

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
    """Describe processor, memory and device, for the report; ``threads`` None are those of this process."""
    import torch

    about = Path("/proc/cpuinfo").read_text("utf-8", "replace") if Path("/proc/cpuinfo").exists() else ""
    name, flags = (re.search(rf"^{key}\s*: (.*)", about, re.MULTILINE) for key in ("model name", "flags"))
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return Machine(
        cpu=name[1].strip() if name else platform.processor(),
        instructions=[each for each in INSTRUCTIONS if flags and each in flags[1].split()],
        cores=os.cpu_count(),
        threads=threads or torch.get_num_threads(),
        memory=psutil.virtual_memory().total,
        device=device.type,
        device_name=torch.cuda.get_device_name(device) if gpu else None,
        device_memory=gpu.total_memory if gpu else None,
        system=f"{platform.system()} {platform.release()}",
        host=platform.node(),
    )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in ("fistapruner", "torch", "transformers", "safetensors", "tokenizers"):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def now() -> str:
    """Return the time, in UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def launched() -> int:
    """Count the processes that ``torchrun`` or another launcher has started for this run; 1 without one."""
    return int(os.environ.get("WORLD_SIZE") or 1) if os.environ.get("RANK") else 1


def leads() -> bool:
    """Check that this is the first of the processes that a launcher has started, or the only one."""
    return launched() == 1 or os.environ["RANK"] == "0"

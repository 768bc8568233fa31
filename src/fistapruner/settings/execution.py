"""Define the settings that say how the work of a run is carried out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from .base import Settings
from .parse import parse_bytes

MAX_WORKERS = 4096
"""Most workers, and most threads of each: more than any machine has cores."""


def _bytes(value: Any) -> Any:
    return None if value is None else parse_bytes(str(value))


class Execution(Settings):
    """Set how the work is carried out. Never part of a run's identity."""

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N; auto takes a CUDA GPU if there is one.")
    batch_size: int | None = Field(
        None,
        ge=1,
        lt=2**31,
        description="Windows of text in one pass, two of them for a pair of an alignment; without it chosen by device "
        "and memory.",
    )
    memory_limit: Annotated[int | None, BeforeValidator(_bytes)] = Field(
        None,
        description="Main memory that the run may use, in bytes or as 8GiB; without it 90 % of what the machine has "
        "free. A GPU's memory is limited by what it has free.",
    )
    executor: Literal["serial", "process", "ray"] = Field(
        "serial",
        description="Who prunes the decoder layers: this process (serial), processes of this machine (process), "
        "or a Ray cluster (ray).",
    )
    workers: int | None = Field(
        None,
        ge=1,
        le=MAX_WORKERS,
        description="Worker processes of process and ray; without it one for each GPU or group of cores. They prune "
        "different layers, which needs propagate dense.",
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=MAX_WORKERS,
        description="CPU threads of each worker; without it the machine's cores are shared out. The last bits of "
        "the weights depend on it.",
    )
    address: str | None = Field(
        None,
        description="HOST:PORT of the head of a Ray cluster, or auto for the one in RAY_ADDRESS or on this machine; "
        "without it one is started here.",
    )


class TrainExecution(Execution):
    """Set how a run that trains is carried out: in this process, or in those of torchrun."""

    executor: Literal["serial"] = Field("serial", exclude=True)
    workers: None = Field(None, exclude=True)
    address: None = Field(None, exclude=True)
    offload: bool = Field(
        False,
        description="With torchrun: keep weights and optimizer state in main memory while a GPU does not need them.",
    )

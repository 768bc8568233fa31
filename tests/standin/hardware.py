"""GPUs that the tests of this folder run on: stand-ins, or those of the machine if ``REAL_GPU=1`` is set."""

import os
from collections import Counter
from typing import Any

import torch

REAL = os.environ.get("REAL_GPU") == "1"
GPUS = torch.cuda.device_count() if REAL else 2
LAST = f"cuda:{max(GPUS - 1, 0)}"
"""The GPU of tests that need one: not the default one, where there are several."""


class RealGPUs:
    """The GPUs of this machine in place of stand-ins: peak memory is measured, nothing else is counted."""

    def __init__(self) -> None:
        self.unordered, self.live, self.moved = Counter[Any](), Counter[Any](), Counter[Any]()

    @property
    def peak(self) -> dict[torch.device, int]:
        return {torch.device("cuda", index): torch.cuda.max_memory_allocated(index) for index in range(GPUS)}

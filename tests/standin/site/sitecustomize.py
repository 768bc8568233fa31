"""Give a process that a test starts the stand-in GPUs of the test (conftest.py); Python runs this when it starts."""

import os
import sys
from pathlib import Path

if taken := os.environ.get("STAND_IN_GPUS"):  # bytes of each GPU that other programs hold
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from standin.gpu import StandIn

    StandIn(taken.count(",") + 1, taken=list(map(int, taken.split(",")))).__enter__()

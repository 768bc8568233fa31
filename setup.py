"""The optional compiled kernel; everything else about the package is in pyproject.toml.

The kernel is plain C without Python's headers: it is loaded with ctypes. Where no compiler is found the build goes on
without it, and the package computes in torch alone.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup

if sys.platform == "win32":
    sys.exit("fistapruner runs on Linux and macOS; on Windows use WSL")

FOLDER = Path("src/fistapruner/packed/csrc")

setup(
    ext_modules=[
        Extension(
            "fistapruner.packed._kernel",
            sources=sorted(str(path) for path in FOLDER.glob("*.c")),
            depends=[str(FOLDER / "packed.h")],
            include_dirs=[str(FOLDER)],
            extra_compile_args=["-O3", "-std=gnu11", "-fvisibility=hidden"],
            extra_link_args=["-s"] if sys.platform == "linux" else [],  # without symbols, which Python's flags ask for
            optional=True,
        )
    ]
)

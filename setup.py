"""The optional compiled kernel; everything else about the package is in pyproject.toml.

The kernel is plain C without Python's headers and is loaded with ctypes: a wheel is for a platform, not for a Python.
Where no compiler is found the build goes on without it, and the package computes in torch alone.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

if sys.platform == "win32":
    sys.exit("fistapruner runs on Linux and macOS; on Windows use WSL")

FOLDER = Path("src/fistapruner/packed/csrc")


class BuildKernel(build_ext):
    """Name the kernel without a version of Python."""

    def get_ext_filename(self, fullname):
        return f"{fullname.replace('.', '/')}.so"


class Wheel(bdist_wheel):
    """Name the wheel py3-none-PLATFORM."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    cmdclass={"build_ext": BuildKernel, "bdist_wheel": Wheel},
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
    ],
)

"""Solvers and refinements by name, and the function that runs a chain of them.

Names are imported on first use (PEP 562), so that the catalogue of methods can be read without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Method, Solution, setting
    from .chain import METHODS, Steps, parse_method, solve

__all__ = ["METHODS", "Method", "Solution", "Steps", "parse_method", "setting", "solve"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = ".base" if name in ("Method", "Solution", "setting") else ".chain"
    return getattr(import_module(module, __name__), name)

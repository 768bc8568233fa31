"""Store a pruned model without its zeros, and compute with it as it is stored.

A packed operator is one bit for every weight and the kept values, row by row; 2:4 operators too, whose positions take
no more bits that way. Values are bf16, bit for bit, or int8 with a scale for each row. With int8 values the embedding
and the output head are int8 rows as well, without a mask, because they are not pruned.

    format      the operator in memory, and as tensors of a safetensors file (docs/files.md)
    kernel      the compiled kernel (csrc/), through ctypes
    linear      modules that hold a packed weight; the kernel as an operator of torch, for torch.compile
    pack        a checkpoint to a packed folder, and back
    checkpoint  a packed folder, opened and checked
    load        a packed folder as a model whose operators stay packed
    plugin      a packed folder as a dense model, by transformers' ``from_pretrained``
    semi_structured   2:4 on a GPU, with torch's own tensors
    export      a GGUF file
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"


class _AfterImport(MetaPathFinder):
    """Import hook that registers the format when transformers imports its registry.

    Importing the registry at once would take seconds, which most commands do not need.
    """

    def find_spec(self, fullname: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register_on_import() -> None:
    """Register the format now if transformers has loaded its registry, else when it does."""
    if REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    from .plugin import register

    register()

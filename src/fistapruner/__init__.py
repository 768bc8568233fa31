"""Make trained language models sparse after training, and measure what that costs and gains.

Public names are imported on first use (PEP 562), so that ``import fistapruner`` and the quick verbs need no torch.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if sys.platform == "win32":
    raise ImportError("fistapruner runs on Linux and macOS; on Windows use the Windows Subsystem for Linux (WSL)")

from .errors import FistaPrunerError
from .packed import register_on_import

if TYPE_CHECKING:
    from .comparison import compare
    from .core import NM, LayerProblem, Stacked, Unstructured, parse_sparsity
    from .measure.evaluate import evaluate
    from .measure.run import bench_run, evaluate_run
    from .packed.export import export
    from .packed.linear import SparseLinear
    from .packed.load import load
    from .packed.pack import pack, unpack
    from .packed.semi_structured import to_semi_structured
    from .pruning.run import prune
    from .resuming import resume
    from .runs.listener import Listener
    from .runs.records import Report
    from .runs.results import Evaluation
    from .settings.align_settings import AlignRecipe
    from .settings.recover_settings import RecoverRecipe
    from .settings.settings import Recipe
    from .solvers import solve
    from .solvers.base import Solution
    from .training.adapters import MergeReport, merge_adapter
    from .training.hold_mask import hold_mask
    from .training.run import align, recover

__version__ = "0.1.0"
__all__ = [
    "NM",
    "AlignRecipe",
    "Evaluation",
    "FistaPrunerError",
    "LayerProblem",
    "Listener",
    "MergeReport",
    "Recipe",
    "RecoverRecipe",
    "Report",
    "Solution",
    "SparseLinear",
    "Stacked",
    "Unstructured",
    "align",
    "bench_run",
    "compare",
    "evaluate",
    "evaluate_run",
    "export",
    "hold_mask",
    "load",
    "merge_adapter",
    "pack",
    "parse_sparsity",
    "prune",
    "recover",
    "resume",
    "solve",
    "to_semi_structured",
    "unpack",
]

_MODULES = {
    "comparison": ("compare",),
    "core": ("NM", "LayerProblem", "Stacked", "Unstructured", "parse_sparsity"),
    "measure.evaluate": ("evaluate",),
    "packed.export": ("export",),
    "measure.run": ("bench_run", "evaluate_run"),
    "pruning.run": ("prune",),
    "resuming": ("resume",),
    "settings.align_settings": ("AlignRecipe",),
    "settings.recover_settings": ("RecoverRecipe",),
    "settings.settings": ("Recipe",),
    "runs.listener": ("Listener",),
    "runs.records": ("Report",),
    "runs.results": ("Evaluation",),
    "solvers": ("solve",),
    "solvers.base": ("Solution",),
    "packed.linear": ("SparseLinear",),
    "packed.load": ("load",),
    "packed.pack": ("pack", "unpack"),
    "packed.semi_structured": ("to_semi_structured",),
    "training.adapters": ("MergeReport", "merge_adapter"),
    "training.hold_mask": ("hold_mask",),
    "training.run": ("align", "recover"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f".{module}", __name__), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# AutoModelForCausalLM.from_pretrained finds packed folders once this package is imported.
register_on_import()

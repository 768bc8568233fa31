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
    from .measure.run import bench, evaluate
    from .packed.export import export
    from .packed.linear import SparseLinear
    from .packed.load import load
    from .packed.pack import pack, unpack
    from .packed.semi_structured import to_semi_structured
    from .pruning.run import prune, resume
    from .reporting import Report
    from .reporting.inspection import inspect
    from .reporting.page import report
    from .reporting.terminal import status
    from .runs.log import Listener
    from .runs.records import Evaluation
    from .settings.align import AlignRecipe
    from .settings.prune import Recipe
    from .settings.train import RecoverRecipe
    from .solvers import methods, solve
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
    "bench",
    "compare",
    "evaluate",
    "export",
    "hold_mask",
    "inspect",
    "load",
    "merge_adapter",
    "methods",
    "pack",
    "parse_sparsity",
    "prune",
    "recover",
    "report",
    "resume",
    "solve",
    "status",
    "to_semi_structured",
    "unpack",
]

_MODULES = {
    "comparison": ("compare",),
    "core": ("NM", "LayerProblem", "Stacked", "Unstructured", "parse_sparsity"),
    "measure.run": ("bench", "evaluate"),
    "packed.export": ("export",),
    "packed.linear": ("SparseLinear",),
    "packed.load": ("load",),
    "packed.pack": ("pack", "unpack"),
    "packed.semi_structured": ("to_semi_structured",),
    "pruning.run": ("prune", "resume"),
    "reporting": ("Report",),
    "reporting.inspection": ("inspect",),
    "reporting.terminal": ("status",),
    "reporting.page": ("report",),
    "runs.log": ("Listener",),
    "runs.records": ("Evaluation",),
    "settings.align": ("AlignRecipe",),
    "settings.prune": ("Recipe",),
    "settings.train": ("RecoverRecipe",),
    "solvers": ("methods", "solve"),
    "solvers.base": ("Solution",),
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

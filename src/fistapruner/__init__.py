"""FISTAPruner: make a trained language model sparse, and know what that did to it."""

import sys

from .constraints import NM, Unstructured, parse_sparsity

if sys.platform == "win32":
    raise ImportError("fistapruner runs on Linux and macOS; on Windows use the Windows Subsystem for Linux (WSL)")

from .errors import FistaPrunerError
from .evaluation.evaluate import evaluate
from .pipeline.measure import bench_run, evaluate_run
from .pipeline.prune import finish_run, prune, resume
from .problem import LayerProblem
from .recipes.renamed import RENAMED_FUNCTIONS
from .recipes.settings import Recipe
from .runs.records import Report
from .runs.results import Evaluation
from .solvers import solve
from .solvers.base import Solution
from .sparse.linear import SparseLinear
from .sparse.load import load
from .sparse.pack import pack, unpack
from .sparse.semi_structured import to_semi_structured
from .sparse.transformers_plugin import register_on_import

__all__ = [
    "NM",
    "Evaluation",
    "FistaPrunerError",
    "LayerProblem",
    "Recipe",
    "Report",
    "Solution",
    "SparseLinear",
    "Unstructured",
    "bench_run",
    "evaluate",
    "evaluate_run",
    "finish_run",
    "load",
    "pack",
    "parse_sparsity",
    "prune",
    "resume",
    "solve",
    "to_semi_structured",
    "unpack",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name in RENAMED_FUNCTIONS:
        raise FistaPrunerError(f"fistapruner.{name} is called fistapruner.{RENAMED_FUNCTIONS[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# AutoModelForCausalLM.from_pretrained finds packed folders once this package is imported.
register_on_import()

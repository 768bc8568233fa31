"""FISTAPruner: make a trained language model sparse, and know what that did to it."""

from .errors import FistaPrunerError
from .evaluation.evaluate import evaluate
from .evaluation.results import Evaluation
from .pipeline.run import prune
from .problem import LayerProblem
from .recipe import Recipe
from .reporting.schema import Report
from .solvers import solve
from .solvers.base import Solution
from .sparsity import NM, Unstructured, parse_sparsity

__all__ = [
    "NM",
    "Evaluation",
    "FistaPrunerError",
    "LayerProblem",
    "Recipe",
    "Report",
    "Solution",
    "Unstructured",
    "evaluate",
    "parse_sparsity",
    "prune",
    "solve",
]
__version__ = "0.1.0"

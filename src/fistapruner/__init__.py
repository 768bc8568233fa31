"""FISTAPruner: make a trained language model sparse, and know what that did to it."""

from .errors import FistaPrunerError
from .problem import LayerProblem
from .recipe import Recipe
from .solvers import solve
from .solvers.base import Solution
from .sparsity import NM, Unstructured, parse_sparsity

__all__ = ["NM", "FistaPrunerError", "LayerProblem", "Recipe", "Solution", "Unstructured", "parse_sparsity", "solve"]
__version__ = "0.1.0"

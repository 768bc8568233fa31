"""The mathematics of pruning: the layer problem, its sums, and constraints. Needs torch only.

from fistapruner.core import LayerProblem
from fistapruner.solvers import solve

problem = LayerProblem.from_activations(weight, inputs)
solution = solve(problem, "2:4", method="proximal")
"""

from .constraints import NM, Constraint, Stacked, Unstructured, parse_sparsity
from .problem import LayerProblem, Ridge
from .sums import ProblemSums

__all__ = ["NM", "Constraint", "LayerProblem", "ProblemSums", "Ridge", "Stacked", "Unstructured", "parse_sparsity"]

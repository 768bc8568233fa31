"""Measure on the dense model what a recipe asks for, and decide from it before anything is pruned.

Decided are the sparsity of every operator, the weights of its rows, the metric of block reconstruction, and the order
or rotation of channels in n:m patterns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core import Constraint, ProblemSums
from ..errors import FistaPrunerError
from ..models.layers import LayerwiseModel
from ..models.operators import Layout, Operator
from ..papers.owl import Outliers
from ..papers.so_ebm import Workload
from ..runs.records import WorkloadFacts
from ..settings.prune import OWN, Recipe
from ..text.windows import window_tasks
from .allocate import choose_patterns, split_budget
from .channels import Permutations, reordered_rows
from .curves import patterns_measured, predicted_cost, row_error_curves, sampled_rows
from .fisher import DensePasses, Sensitivity, measure_sensitivity, row_importance

WINDOWS = 8
"""Calibration windows that are measured, at most: a few thousand tokens are enough to rank operators."""

SHARE = 4
"""One calibration window in 4 is measured, so that the cost is a fixed share of a run's passes."""


def check_allocation(recipe: Recipe) -> None:
    """Refuse a measured allocation that the sparsity or the structure does not allow, and a bad workload."""
    kind, pattern = measured_by(recipe), recipe.sparsity
    what, fault = f"allocation {recipe.allocation!r}" if kind else "weighting 'fisher'", None
    if recipe.structure.experts is not None and (kind or recipe.weighting == "fisher"):
        fault = f"where experts are removed ({recipe.structure.remove}): take allocation uniform and weighting none"
    elif kind and not (pattern.fraction > 0 and (pattern.supports_allocation or kind == "error")):
        fault = (
            f"with {pattern}: it distributes zeros, so give an unstructured --sparsity such as 50% (error also takes "
            "n:m), or allocation uniform"
        )
    if fault is not None:
        raise FistaPrunerError(f"{what} cannot be used {fault}")
    _workload(recipe)


def _workload(recipe: Recipe) -> Workload | None:
    """Read the workload file of a recipe, for the tasks of its calibration text; None without one."""
    if recipe.workload is None:
        return None
    found, tasks = Workload.of(recipe.workload), recipe.calibration.tasks
    if found.mix.keys() != tasks.keys():
        raise FistaPrunerError(
            f"{recipe.workload}: mix has the tasks {', '.join(found.mix)}, and the calibration has "
            f"{', '.join(tasks) or 'one text'}: give --calibration NAME=SOURCE for each task"
        )
    return found


def measured_by(recipe: Recipe) -> str | None:
    """Return ``owl``, ``error`` or ``workload`` where the allocation is measured on the model, else None."""
    if recipe.workload is not None:
        return "workload"
    if recipe.allocation == "auto":
        free = recipe.sparsity.supports_allocation and recipe.sparsity.fraction > 0
        return "error" if free and _own(recipe) and recipe.structure.experts is None else None
    return recipe.allocation if recipe.allocation in ("owl", "error") else None


def weighs_rows(recipe: Recipe) -> bool:
    """Check whether weights of output rows are asked for and can change the result."""
    named = recipe.weighting == "fisher"
    auto = recipe.weighting == "auto" and _own(recipe) and recipe.structure.experts is None
    by_row = all(step.name in ("wanda", "refit") for step in recipe.method)
    compete = [each for each in recipe.patterns if each.fraction or (named and each is recipe.sparsity)]
    return (named or auto) and not by_row and any(each.supports_allocation for each in compete)


def permutes(recipe: Recipe) -> bool:
    """Check whether channels are permuted: asked for, and some operator has an n:m pattern."""
    asked = _own(recipe) if recipe.permutation == "auto" else recipe.permutation == "channels"
    return asked and any(pattern.nm is not None for pattern in recipe.patterns)


def differentiates(recipe: Recipe) -> bool:
    """Check whether :func:`decide` runs a backward pass of the model, too."""
    return measured_by(recipe) in ("error", "workload") or recipe.reconstruct > 0 or weighs_rows(recipe)


def needs_measuring(recipe: Recipe) -> bool:
    """Check whether :func:`decide` runs passes of the model."""
    return measured_by(recipe) == "owl" or permutes(recipe) or differentiates(recipe)


def windows_measured(samples: int) -> int:
    """Return the number of calibration windows that are measured: at least two where there are two."""
    return min(WINDOWS, samples, max(2, samples // SHARE))


def _own(recipe: Recipe) -> bool:
    """Check whether ``auto`` settings leave the papers': no, where every step keeps its paper's settings."""
    return any(step.name == OWN for step in recipe.method)


@dataclass(frozen=True)
class Decision:
    """Results of the measurements on the dense model.

    Args:
        sparsity: of every operator; None where the recipe gives it without measuring.
        metrics: metric of the output errors of each decoder layer in block reconstruction: (width, width) second
            moments of the gradient, or their (width,) diagonals for a wide model. None without block reconstruction.
        importance: (m,) weights of the output rows of each operator, in the new order; None where rows count alike.
        orders: the tensors whose channels are permuted or rotated (:mod:`.channels`).
        permuted: by full name, for each operator with such input channels, the share of its scores that its pattern
            keeps before and after.
        workload: how sparsities were allocated for a workload.
    """

    sparsity: dict[str, Constraint] | None = None
    metrics: list[Tensor] | None = None
    importance: dict[str, Tensor] | None = None
    orders: dict[str, tuple[int, Tensor]] = field(default_factory=dict)
    permuted: dict[str, tuple[float, float]] = field(default_factory=dict)
    workload: WorkloadFacts | None = None


def decide(
    recipe: Recipe,
    layout: Layout,
    model: LayerwiseModel,
    tokens: Tensor,
    sparsity: Mapping[str, Constraint],
    passes: DensePasses,
    smaller: Layout | None = None,
) -> Decision:
    """Measure the dense model for allocation, row weights, block reconstruction and channel permutation.

    Args:
        recipe: all settings, checked by :func:`check_allocation`.
        layout: the operators to prune.
        tokens: (samples, seqlen) calibration tokens; the first few windows are used, of each task for a workload.
        sparsity: pattern of every operator, by full name, that the recipe gives without measuring.
        smaller: the operators in the shapes that they are to have, where channels are removed. Zeros are distributed
            over these shapes; the order of channels that are removed is chosen with them.
    """
    kind, patterns = measured_by(recipe), patterns_measured(recipe.sparsity)
    curved = kind in ("error", "workload")
    workload = _workload(recipe)
    mix = {"": 1.0} if workload is None else workload.mix
    after = dict((smaller or layout).operators())
    sizes = {name: operator.rows * operator.columns for name, operator in after.items()}
    permutations = None
    if permutes(recipe):
        kept = _staying_patterns(recipe, layout, after, sparsity)
        permutations = Permutations(model, layout, kept, patterns if kind == "error" else ())
    seen = _Seen(layout, patterns if curved else (), permutations)
    outliers = Outliers(layout) if kind == "owl" else None
    gather = outliers.add if outliers is not None else seen.add if curved or permutations is not None else None
    sensitivity, costs = Sensitivity({}, []), {}
    for task, weight in mix.items():
        windows = tokens
        if workload is not None:
            windows = tokens[window_tasks(recipe.calibration) == list(recipe.calibration.tasks).index(task)]
        windows = windows[: windows_measured(len(windows))]
        gradients, outputs = differentiates(recipe), recipe.reconstruct > 0
        own = measure_sensitivity(
            model, layout, windows, passes, seed=recipe.seed, gather=gather, gradients=gradients, outputs=outputs
        )
        if gradients:
            costs[task] = {name: predicted_cost(errors, own.rows[name]) for name, errors in seen.errors.items()}
            sensitivity.add(own, weight)
    found: dict[str, Constraint] | None = None
    facts: WorkloadFacts | None = None
    if outliers is not None:
        found = dict(outliers.allocation(sizes, recipe.sparsity.fraction))
    elif curved:
        # Of experts without tokens nothing is known, not that they make no error: they get what is asked for.
        found = {name: recipe.sparsity for name in sizes}
        known = {name: size for name, size in sizes.items() if name in seen.reached}
        curves = {task: {name: cost[name] for name in known} for task, cost in costs.items()}
        if known and workload is not None:
            split, facts = workload.allocate(curves, known, recipe.sparsity.fraction, recipe.seed)
            found |= split
        elif known and recipe.sparsity.supports_allocation:
            found |= split_budget(curves[""], known, recipe.sparsity.fraction)
        elif known:
            found |= choose_patterns(curves[""], known, patterns, recipe.sparsity.fraction)
    importance = {name: row_importance(rows) for name, rows in sensitivity.rows.items()} if weighs_rows(recipe) else {}
    metrics = sensitivity.outputs if recipe.reconstruct else None
    if permutations is None:
        return Decision(found, metrics, importance or None, workload=facts)
    permutations.take(found or {})
    for name in permutations.rows.keys() & importance.keys():
        importance[name] = reordered_rows(importance[name], permutations.rows[name])
    return Decision(found, metrics, importance or None, permutations.orders, permutations.permuted, facts)


def _staying_patterns(
    recipe: Recipe, layout: Layout, after: Mapping[str, Operator], sparsity: Mapping[str, Constraint]
) -> dict[str, Constraint]:
    """Return the patterns of the operators whose input channels all stay, of experts that may stay, too."""
    operators = dict(layout.operators())
    cut = {name for name, operator in operators.items() if name in after and after[name].columns != operator.columns}
    narrower = {name.partition(f".{after[name].experts}.")[0] for name in cut if after[name].experts}  # decoder layers
    return {name: pattern for name, pattern in sparsity.items() if name not in cut} | {
        name: recipe.sparsity
        for name, operator in operators.items()
        if name not in after and name.partition(f".{operator.experts}.")[0] not in narrower
    }


class _Seen:
    """Gather what the layer problems of the dense model show.

    Args:
        layout: the operators to prune.
        patterns: of the error curves; empty where none are measured.
        permutations: to find; None where channels stay.

    Attributes:
        errors: by full name, the error curves of an operator's sampled rows.
        reached: operators that measured tokens reach.
    """

    def __init__(self, layout: Layout, patterns: Sequence[Constraint], permutations: Permutations | None) -> None:
        self._layout, self._patterns, self._permutations = layout, patterns, permutations
        self.errors: dict[str, Tensor] = {}
        self.reached: set[str] = set()

    def add(self, index: int, number: int, sums: ProblemSums) -> None:
        """Add the layer problem of group ``number`` of decoder layer ``index``."""
        group = self._layout.layers[index][number]
        names, rows = [self._layout.full_name(index, operator) for operator in group], [each.rows for each in group]
        if group[0].experts and not sums.tokens:  # no measured token reaches this expert
            for name, count in zip(names, rows, strict=True):
                self.errors[name] = torch.zeros(len(self._patterns), count)[:, sampled_rows(count)]
            return
        self.reached.update(names)
        problem = sums.problem("+".join(names), 0.0)
        if self._patterns:
            self.errors.update(zip(names, row_error_curves(problem, rows, self._patterns), strict=True))
        if self._permutations is not None:
            self._permutations.add(index, number, sums.weight, problem.gram)

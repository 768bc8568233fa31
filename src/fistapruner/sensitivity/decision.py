"""Measure the dense model and decide from it, before anything is pruned.

Decided are the sparsity of every operator, the weights of its rows, the metric of block reconstruction, and the order
or rotation of channels in n:m patterns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..activations.store import Store, scratch_factory
from ..calibration.windows import window_tasks
from ..core import Constraint, ProblemSums
from ..errors import FistaPrunerError
from ..models.layerwise import LayerwiseModel
from ..models.layout import Layout
from ..recipes.settings import OWN, Recipe
from ..runs.workload_records import WorkloadFacts
from ..runtime.progress import Tick, silent
from .error_curves import (
    REACH,
    choose_patterns,
    patterns_measured,
    predicted_cost,
    row_error_curves,
    sampled_rows,
    split_budget,
)
from .fisher import DensePasses, InputEnergy, InputSums, Sensitivity, gather_inputs, measure_sensitivity, row_importance
from .owl import Outliers
from .permutation import Permutations, reordered_rows
from .workload import Workload, read_workload
from .workload_rules import allocate_workload

WINDOWS = 8
"""Calibration windows that are measured, at most: a few thousand tokens are enough to rank operators."""

SHARE = 4
"""One calibration window in 4 is measured, so that the cost is a fixed share of a run's passes."""


def check_allocation(recipe: Recipe) -> Workload | None:
    """Refuse a measured allocation that a pattern does not have, and a bad workload.

    And one that has no zeros to distribute, and measures of the operators of experts that are removed: which ones stay
    is known when their layer is pruned.

    Returns:
        The workload; None where the recipe names none.

    Raises:
        FistaPrunerError: names the allocation and the pattern, or the workload file and what is wrong in it, or the
            setting.
    """
    if recipe.structure.experts is not None:
        by_name = recipe.workload is None and recipe.total is None
        measured = repr(recipe.allocation) if by_name else "by measured error"
        for setting, value, other in (
            ("allocation", measured, "uniform"),
            ("weighting", repr(recipe.weighting), "none"),
        ):
            if value in ("by measured error", "'owl'", "'error'", "'fisher'"):
                raise FistaPrunerError(
                    f"{setting} {value} cannot be used where experts are removed ({recipe.structure.remove}): which "
                    f"ones stay is not known when it is measured; take --{setting} {other}"
                )
    free, pattern = recipe.allocation == "owl" or recipe.workload is not None, recipe.pattern
    if (free or recipe.allocation == "error") and pattern.fraction == 0 and recipe.structure.remove is not None:
        raise FistaPrunerError(
            f"allocation {recipe.allocation!r} distributes zeros, and with structure {recipe.structure.remove} and "
            f"sparsity {pattern} there are none: give a --sparsity too, or leave the allocation out"
        )
    others = pattern.neighbours(REACH)  # patterns that operators may have instead, so allocation by error can choose
    milder, by_error = bool(others), recipe.allocation == "error" or recipe.total is not None
    if recipe.total is not None and pattern.supports_allocation:
        raise FistaPrunerError(
            f"allocation {recipe.allocation!r} is for n:m patterns: with an unstructured sparsity the total is the "
            f"sparsity itself, so take --sparsity {100 * recipe.total:g}% --allocation error"
        )
    if recipe.total is not None and others and recipe.total > (most := max(other.fraction for other in others)):
        raise FistaPrunerError(
            f"allocation {recipe.allocation!r} has more zeros than the patterns beside {pattern} can give: at most "
            f"{100 * most:g}% is possible"
        )
    if not pattern.supports_allocation and (free or (by_error and not milder)):
        raise FistaPrunerError(
            f"allocation {recipe.allocation!r} cannot be used with {pattern}, whose share of zeros is not free: "
            f"take --allocation {'error or uniform' if milder else 'uniform'}, or an unstructured sparsity such as "
            f"{100 * pattern.fraction:g}%"
        )
    return read_workload(recipe)


@dataclass(frozen=True)
class Decision:
    """Results of the measurements on the dense model.

    Args:
        sparsity: of every operator; None where the recipe gives it without measuring.
        metrics: metric of the output errors of each decoder layer in block reconstruction: (width, width) second
            moments of the gradient, or their (width,) diagonals for a wide model. None without block reconstruction.
        importance: (m,) weights of the output rows of each operator, in the new order; None where rows count alike.
        orders: the tensors whose channels are permuted (:mod:`.channel_order`) or rotated (:mod:`.head_rotation`).
        permuted: by full name, for each operator with such input channels, the share of its scores that its pattern
            keeps before and after.
        workload: how sparsities were allocated for a workload.
    """

    sparsity: dict[str, Constraint] | None
    metrics: list[Tensor] | None
    importance: dict[str, Tensor] | None = None
    orders: dict[str, tuple[int, Tensor]] = field(default_factory=dict)
    permuted: dict[str, tuple[float, float]] = field(default_factory=dict)
    workload: WorkloadFacts | None = None


def measured_by(recipe: Recipe) -> str | None:
    """Return ``owl``, ``error`` or ``workload`` where the allocation is measured on the model, else None."""
    if recipe.pattern.fraction == 0 and recipe.structure.remove is not None:
        return None  # no zeros to distribute
    if recipe.allocation == "auto" and recipe.structure.experts is not None:
        return None  # which experts stay is known only when their layer is pruned
    if recipe.allocation == "auto":
        return "error" if _own(recipe) and recipe.pattern.supports_allocation else None
    if recipe.workload is not None:
        return "workload"
    if recipe.total is not None:
        return "error"
    return recipe.allocation if recipe.allocation in ("owl", "error") else None


def weighs_rows(recipe: Recipe) -> bool:
    """Check whether weights of output rows are asked for and can change the result."""
    asked = _own(recipe) if recipe.weighting == "auto" else recipe.weighting == "fisher"
    if not asked:
        return False
    zeros = any(pattern.fraction for pattern in recipe.patterns)
    if recipe.weighting == "auto" and not zeros and recipe.structure.remove is not None:
        return False  # no zeros to compete for
    if recipe.weighting == "auto" and recipe.structure.experts is not None:
        return False  # which experts stay is known only when their layer is pruned
    compete = [recipe.pattern, *(pattern for pattern in recipe.patterns[1:] if pattern.fraction)]
    by_row = all(step.name in ("wanda", "refit") for step in recipe.steps)
    return not by_row and any(pattern.supports_allocation for pattern in compete)


def permutes(recipe: Recipe) -> bool:
    """Check whether channels are permuted: asked for, and some operator has an n:m pattern."""
    asked = _own(recipe) if recipe.permutation == "auto" else recipe.permutation == "channels"
    return asked and any(pattern.nm is not None for pattern in recipe.patterns)


def windows_measured(samples: int) -> int:
    """Return the number of calibration windows that are measured: at least two where there are two."""
    return min(WINDOWS, samples, max(2, samples // SHARE))


def _own(recipe: Recipe) -> bool:
    """Check whether ``auto`` settings leave the papers': no, where every step keeps its paper's settings."""
    return any(step.name == OWN for step in recipe.steps)


def needs_measuring(recipe: Recipe) -> bool:
    """Check whether :func:`decide` runs passes of the model."""
    return measured_by(recipe) == "owl" or permutes(recipe) or differentiates(recipe)


def differentiates(recipe: Recipe) -> bool:
    """Check whether :func:`decide` also runs a backward pass of the model."""
    return measured_by(recipe) in ("error", "workload") or recipe.reconstruct > 0 or weighs_rows(recipe)


def flags_without_measuring(recipe: Recipe) -> str:
    """Name the flags with which the same run measures nothing on the dense model; empty where none can."""
    if recipe.workload is not None or recipe.total is not None:
        return ""
    flags = {
        "--allocation uniform": measured_by(recipe) is not None,
        "--weighting none": weighs_rows(recipe),
        "--permutation none": permutes(recipe),
        "--reconstruct 0": recipe.reconstruct > 0,
    }
    return " ".join(flag for flag, asked in flags.items() if asked)


def decide(
    recipe: Recipe,
    layout: Layout,
    model: LayerwiseModel,
    tokens: Tensor,
    sparsity: Mapping[str, Constraint],
    *,
    batch_size: int = 4,
    store: Store | None = None,
    tick: Tick = silent,
    smaller: Layout | None = None,
) -> Decision:
    """Measure the dense model for allocation, row weights, block reconstruction and channel permutation.

    Args:
        recipe: its ``allocation``, ``sparsity``, ``weighting``, ``reconstruct``, ``permutation`` and ``seed``.
        layout: the operators to prune.
        model: the dense model.
        tokens: (samples, seqlen) calibration tokens; the first few windows are used, of each task for a workload.
        sparsity: pattern of every operator, by full name, that the recipe gives without measuring.
        batch_size: windows in one pass.
        store: makes the stores of hidden states between decoder layers; None keeps them in memory.
        tick: receives progress: (what, steps done, steps in all).
        smaller: the operators in the shapes that they are to have, where channels are removed. Zeros are distributed
            over these shapes; the order of channels that are removed is chosen with them.

    Raises:
        FistaPrunerError: a measured allocation that the pattern does not have, or a bad workload.
    """
    workload = check_allocation(recipe)
    if not needs_measuring(recipe):
        return Decision(None, None)
    texts = _windows_by_task(recipe, tokens, workload)
    passes = DensePasses(store or scratch_factory(None, model.dtype), batch_size, tick)
    after = dict((smaller or layout).operators())
    sizes = {name: operator.rows * operator.columns for name, operator in after.items()}
    cut = {name for name, operator in layout.operators() if name in after and after[name].columns != operator.columns}
    fraction, patterns = recipe.pattern.fraction, patterns_measured(recipe.pattern)
    kept = {name: pattern for name, pattern in sparsity.items() if name not in cut}
    narrower = {name.partition(f".{after[name].experts}.")[0] for name in cut if after[name].experts}  # decoder layers
    kept |= {  # experts that may stay
        name: recipe.pattern
        for name, operator in layout.operators()
        if name not in after and name.partition(f".{operator.experts}.")[0] not in narrower
    }
    allocation = measured_by(recipe)
    curved = allocation in ("error", "workload")
    others = patterns if allocation == "error" else ()
    permutations = Permutations(model, layout, kept, others) if permutes(recipe) else None
    problems, outliers = _Problems(layout, patterns if curved else (), permutations), Outliers(layout)
    gather: InputSums[Any] | None = None
    if curved or permutations is not None:
        gather = InputSums(ProblemSums, problems.add)
    elif allocation == "owl":  # no n:m pattern has it
        gather = InputSums(InputEnergy, outliers.add)
    found: dict[str, Constraint] | None = None
    metrics: list[Tensor] | None = None
    importance: dict[str, Tensor] | None = None
    facts: WorkloadFacts | None = None
    if differentiates(recipe):
        sensitivity = Sensitivity({}, [])
        costs: dict[str, dict[str, Tensor]] = {}
        for task, windows in texts.items():
            own = measure_sensitivity(
                model, layout, windows, passes, seed=recipe.seed, gather=gather, outputs=recipe.reconstruct > 0
            )
            if curved:
                costs[task] = {name: predicted_cost(problems.errors[name], own.rows[name]) for name in sizes}
            sensitivity.add(own, 1.0 if workload is None else workload.settings.mix[task])
        if curved:
            known = {name: size for name, size in sizes.items() if name in problems.reached}
            curves = {task: {name: cost[name] for name in known} for task, cost in costs.items()}
            found, facts = _allocate(recipe, workload, curves, known, sizes, patterns)
        if weighs_rows(recipe):
            importance = {name: row_importance(rows) for name, rows in sensitivity.rows.items()}
        if recipe.reconstruct:
            metrics = sensitivity.outputs
    elif gather is not None:
        gather_inputs(model, layout, texts[""], passes, gather)
    if allocation == "owl":
        found = dict(outliers.allocation(sizes, fraction))
    if permutations is None:
        return Decision(found, metrics, importance, workload=facts)
    permutations.take(found or {})
    for name in permutations.rows.keys() & (importance or {}).keys():
        importance[name] = reordered_rows(importance[name], permutations.rows[name])  # type: ignore[index]
    return Decision(found, metrics, importance, permutations.orders, permutations.permuted, facts)


class _Problems:
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
        self._layout = layout
        self._patterns = patterns
        self._permutations = permutations
        self.errors: dict[str, Tensor] = {}
        self.reached: set[str] = set()

    def add(self, index: int, number: int, sums: ProblemSums) -> None:
        """Add group ``number`` of decoder layer ``index``."""
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


def _allocate(
    recipe: Recipe,
    workload: Workload | None,
    curves: Mapping[str, Mapping[str, Tensor]],
    known: Mapping[str, int],
    sizes: Mapping[str, int],
    patterns: Sequence[Constraint],
) -> tuple[dict[str, Constraint], WorkloadFacts | None]:
    """Choose the pattern of every operator from predicted costs.

    Args:
        recipe: its pattern, total and seed.
        workload: how tasks count; None for one text, which has the name "".
        curves: by task and operator, the predicted cost of each pattern.
        known: weights of the operators that measured tokens reach.
        sizes: weights of all operators. Of experts without tokens nothing is known, not that they make no error: they
            get what is asked for.
        patterns: that were measured.

    Returns:
        Patterns by full name, and what the workload decided.
    """
    fraction, usual = recipe.pattern.fraction, recipe.pattern
    facts: WorkloadFacts | None = None
    total = fraction if recipe.total is None else recipe.total
    if not usual.supports_allocation:
        usual = min(patterns, key=lambda pattern: abs(pattern.fraction - total))
    found = dict.fromkeys(sizes, usual)
    if known and workload is not None:
        split, facts = allocate_workload(workload, curves, known, fraction, seed=recipe.seed)
        found |= split
    elif known and recipe.pattern.supports_allocation:
        found |= split_budget(curves[""], known, fraction)
    elif known:
        total += (total - usual.fraction) * (sum(sizes.values()) / sum(known.values()) - 1)
        found |= choose_patterns(curves[""], known, patterns, min(max(total, 0.0), patterns[-1].fraction))
    return found, facts


def _windows_by_task(recipe: Recipe, tokens: Tensor, workload: Workload | None) -> dict[str, Tensor]:
    """Select the windows that are measured: the first few, of each task for a workload.

    Args:
        recipe: its calibration tells which task a window is of.
        tokens: (samples, seqlen) calibration tokens.
        workload: None takes all windows as one text.
    """
    if workload is None:
        return {"": tokens[: windows_measured(len(tokens))]}
    numbers, names = window_tasks(recipe.calibration), list(recipe.calibration.tasks)
    by_task = {task: tokens[numbers == names.index(task)] for task in workload.tasks}
    return {task: windows[: windows_measured(len(windows))] for task, windows in by_task.items()}

"""Prune one decoder layer: the unit that is journaled, resumed, scheduled, timed and reported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from ..core import Constraint, LayerProblem, ProblemSums
from ..core.problem import unweighted
from ..errors import FistaPrunerError
from ..models.low_rank import A, B, sum_of_parts
from ..models.operators import Group, Operator
from ..runs.log import Listener
from ..runs.records import LayerEntry, OperatorEntry
from ..runtime.devices import release_memory
from ..runtime.numerics import dtype_name
from ..runtime.show import Clock
from ..solvers import parse_method
from ..solvers.base import Method, Solution
from ..solvers.low_rank import LowRank, solve_low_rank
from ..structure.refit import problem_without_tokens, share_of_few, shrunk
from ..training.reconstruct import reconstruct_layer
from .context import LayerContext, LayerMeasures, LayerResult, LayerStreams
from .passes import LayerPasses
from .removal import remove_channels_of, remove_experts

Inspect = Callable[[int, int, LayerProblem], None]
"""Receives (layer, group, problem) before each solve; it must not change the problem's tensors."""

FEW = "fewer tokens than inputs"
SHRUNK = ", so their Grams are shrunk towards the diagonal"
NONE = "no token was routed to them, so they are pruned by magnitude"


def prune_layer(
    context: LayerContext,
    index: int,
    streams: LayerStreams,
    measures: LayerMeasures | None = None,
    listener: Listener | None = None,
    inspect: Inspect | None = None,
) -> LayerResult:
    """Prune decoder layer ``index``, group after group.

    One dense pass serves all groups: it fills the first group's Gram (nothing is pruned before it), keeps the dense
    inputs or outputs of the other groups for the cross terms, and gives the next layer its dense hidden states. Then
    each group gets one pass with the operators before it pruned, stopped where the group begins.

    ``measures`` is None where the recipe needs nothing that is measured on the dense model.
    """
    model, clock = context.model, Clock(context.model.device)
    with ExitStack() as loaded:
        with clock.phase("io"):
            loaded.enter_context(model.layer(index))
        pruning = _Pruning(context, index, streams, measures or LayerMeasures(), clock)
        pruning.listener, pruning.inspect = listener or Listener(), inspect
        pruning.begin()
        for number in range(len(pruning.groups)):
            pruning.remove_before(number, loaded)
            if number in pruning.solved:
                pruning.prune_group(number)
            if pruning.cached is not None:
                pruning.cached.pruned(number)
        pruning.reconstruct()
        error = pruning.output_pass()
    entry, mixtures = pruning.result.entry, (operator.experts for operator in context.layout.in_layer(index))
    entry.warnings += _routing_warnings(entry, filter(None, dict.fromkeys(mixtures)))
    entry.seconds, entry.device = clock.seconds, str(model.device)
    if error is not None:
        entry.relative_error = error
        entry.relative_error_of = "what the dense layer adds to its input, first batch of calibration windows"
    return pruning.result


class _Pruning(LayerPasses):
    """Pruning of a loaded decoder layer, with its passes."""

    listener: Listener
    inspect: Inspect | None

    def remove_before(self, number: int, loaded: ExitStack) -> None:
        """Remove the experts and channels that go before group ``number`` is pruned."""
        for mixture in self.mixtures_before(number):
            remove_experts(self, mixture, loaded)
            release_memory()
        for consumer in sorted(group for group, due in self.cut.items() if due == number):
            (operator,) = self.groups[consumer]
            name = _short_names([operator])
            self.listener.operators(self.index, name, None)
            error = remove_channels_of(self, consumer)
            self.listener.operators(self.index, name, error)
            release_memory()

    def prune_group(self, number: int) -> None:
        """Solve group ``number`` operator by operator, and write the solutions into the layer and the result."""
        group = self.groups[number]
        names = _short_names(group)
        self.listener.operators(self.index, names, None)
        worst = self._solve_group(number, group, self.sums_of(number))
        release_memory()
        for operator, name in zip(group, self.context.names(self.index, group), strict=True):
            # Of operators without zeros the checkpoint may have more bits than the layer.
            if self.context.sparsity[name].zeros(operator.rows, operator.columns):
                stored = self.model.source(f"{name}.weight")
                self.result.weights[stored] = self._stored(stored, operator)
        self.result.weights |= self.result.parts
        self.listener.operators(self.index, names, worst)

    def _solve_group(self, number: int, group: Group, sums: ProblemSums) -> float:
        """Solve a group, write the solutions, return the worst error.

        What depends on the Gram of the group is computed once; the problem is freed on return.
        """
        recipe, names = self.recipe, self.context.names(self.index, group)
        tokens = sums.tokens if group[0].experts else None
        with self.clock.phase("problem"):
            whole = _problem(sums, "+".join(names), recipe.dense_share, routed=tokens is not None)
        start, worst = 0, 0.0
        for operator, name in zip(group, names, strict=True):
            problem = whole.slice(slice(start, start + operator.rows), name)
            start += operator.rows
            if self.inspect is not None:
                self.inspect(self.index, number, problem)
            pattern, importance = self.context.sparsity[name], self._importance(operator, name)
            with self.clock.phase("solve"):
                steps = parse_method("magnitude") if tokens == 0 else recipe.method
                solution, low_rank = _solve(problem, pattern, steps, recipe.low_rank, importance)
                total, unrounded = self._write(operator, name, solution.weight, low_rank)
            with self.clock.phase("report"):
                # Where nothing was rounded the error is known, and would cost as much as a pass.
                known = unrounded and importance is None
                error = solution.stats[0]["relative_error"] if known else problem.relative_error(total)
                weight = solution.weight
                entry = OperatorEntry(
                    name=operator.name,
                    shape=(operator.rows, operator.columns),
                    sparsity=str(pattern),
                    # Summing booleans would convert them to int64.
                    zeros=weight.numel() - int(torch.count_nonzero(weight)),
                    relative_error=error,
                    dense_error=problem.dense_error(),
                    steps=solution.stats[0]["steps"],
                    tokens=tokens,
                    low_rank=None if low_rank is None else len(low_rank.a),
                )
            self.result.entry.operators.append(entry)
            self.result.entry.warnings += solution.warnings
            worst = max(worst, error)
        return worst

    def _importance(self, operator: Operator, name: str) -> Tensor | None:
        """Return the weights of an operator's rows, (m,); None where they count alike."""
        if self.measures.importance is None:
            return None
        rows = self.measures.importance[name]
        rows = rows[self.result.rows[operator.name]] if operator.name in self.result.rows else rows
        return rows.to(self.model.device)

    def _stored(self, source: str, operator: Operator) -> Tensor:
        """Copy an operator's weight out of the layer, as the checkpoint stores it under the name ``source``."""
        return self.model.result(source, self.layer.get_parameter(f"{operator.name}.weight").detach())

    def _write(self, operator: Operator, name: str, weight: Tensor, low_rank: LowRank | None) -> tuple[Tensor, bool]:
        """Write a solution into the layer and back into itself, rounded as the checkpoint will hold it.

        Where there is a low-rank part, the result receives both parts as they are stored.

        Returns:
            The operator's weight in the layer (m, n), fp32, and whether nothing was rounded or added.
        """
        target, source = operator.weight(self.layer), self.model.source(f"{name}.weight")
        rounded = self.model.rounded(source, weight)
        target.copy_(rounded)
        if not bool(target.isfinite().all()):
            dtype = min((rounded.dtype, target.dtype), key=lambda dtype: torch.finfo(dtype).max)
            better = "convert the checkpoint" if dtype == rounded.dtype else "set dtype"
            raise FistaPrunerError(
                f"{name}: a pruned weight of {float(weight.abs().max()):g} is beyond {torch.finfo(dtype).max:g}, the "
                f"largest of {dtype_name(dtype)}: {better} to bfloat16 or float32"
            )
        unrounded = torch.equal(weight, target.to(weight.dtype))
        weight.copy_(target)
        if low_rank is None:
            return weight, unrounded
        balanced = low_rank.balanced()
        factors = {name + A: self.model.result(source, balanced.a), name + B: self.model.result(source, balanced.b)}
        self.result.parts |= {source: self._stored(source, operator), **factors}
        total = sum_of_parts(target, factors, name, transposed=False)
        target.copy_(total)
        return total.to(target.device), False

    def reconstruct(self) -> None:
        """Reconstruct the pruned layer as a block, if the recipe asks for it."""
        if self.wanted is None:
            return
        seen, calls, steps, seed = self.streams.seen, self.context.calls, self.recipe.reconstruct, self.recipe.seed
        parts, metric = self.result.parts, self.measures.metric
        with self.clock.phase("reconstruct"):
            weights, record = reconstruct_layer(
                self.model, self.index, self.groups, seen, self.wanted, calls, parts, metric, steps, seed
            )
        self.result.weights |= weights
        self.result.entry.reconstruct = record  # type: ignore[attr-defined]


def _short_names(group: Sequence[Operator]) -> str:
    """Return the names of a group's operators, as progress shows them."""
    names = "+".join(operator.name.rpartition(".")[2] for operator in group)
    return f"expert {group[0].expert} {names}" if group[0].experts else names


def _problem(sums: ProblemSums, name: str, target: float, *, routed: bool) -> LayerProblem:
    """Make the layer problem of a group; the sums are used up.

    An expert may have fewer tokens, p, than the n inputs: its Gram is singular, and least squares would fit noise. It
    is shrunk towards its diagonal by the share n / (n + p) (:mod:`fistapruner.structure.refit`). Errors are then those
    under the shrunk Gram. Without tokens the Gram is the identity: all inputs count alike. ``target`` is the share of
    the dense model's output in the target.
    """
    if routed and not sums.tokens:
        return replace(problem_without_tokens(sums.weight, name), cache={})
    problem = sums.problem(name, target, release=True)
    share = share_of_few(problem.shape[1], sums.tokens) if routed else None
    return replace(problem if share is None else replace(shrunk(problem, share), energy=None), cache={})


def _solve(
    problem: LayerProblem, pattern: Constraint, steps: Sequence[Method], rank: int, importance: Tensor | None
) -> tuple[Solution, LowRank | None]:
    """Solve an operator's problem, its rows weighted by their importance.

    Weights that stay have the same bits.
    """
    weighted = problem if importance is None else problem.weighted(importance)
    solution, low_rank = solve_low_rank(weighted, pattern, steps, rank)
    if importance is None:
        return solution, low_rank
    stay = solution.mask & (solution.weight == weighted.weight)
    torch.where(stay, problem.weight, unweighted(solution.weight, importance), out=solution.weight)
    if low_rank is not None:
        unweighted(low_rank.b, importance)
    return solution, low_rank


def _routing_warnings(entry: LayerEntry, mixtures: Iterable[str]) -> list[str]:
    """Name the experts of a layer that few calibration tokens, or none, were routed to."""
    warnings = []
    solved = any(each.tokens and each.sparsity != "0%" for each in entry.operators)
    fits = solved or any(each.tokens and each.shrink for each in entry.removals)  # flap alone, for one, does not
    read = [(each.name, each.tokens, each.shape[1]) for each in entry.operators]
    read += [(each.consumer, each.tokens, each.before) for each in entry.removals]
    for mixture in mixtures:
        tokens: dict[str, int] = {}
        inputs: dict[str, int] = {}
        for name, count, columns in read:
            if count is not None and name.startswith(mixture + "."):
                expert = name.removeprefix(mixture + ".").partition(".")[0]
                tokens[expert], inputs[expert] = count, max(inputs.get(expert, 0), columns)
        none = [expert for expert, count in tokens.items() if not count]
        few = [f"{expert} ({count} tokens)" for expert, count in tokens.items() if 0 < count < inputs[expert]]
        warnings += [
            f"{entry.name}.{mixture}: experts {', '.join(found)}: {said}"
            for found, said in ((none, NONE), (few, FEW + SHRUNK if fits else FEW))
            if found
        ]
    return warnings

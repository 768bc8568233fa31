"""Prune one decoder layer: the unit that is journaled, resumed, scheduled, timed and reported."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.hidden import HiddenStates
from ..models.layout import Group, Layout, Operator
from ..models.skeleton import Skeleton
from ..problem import DriftFrom, LayerProblem, ProblemSums, cheapest_drift, unweighted
from ..recipe import Recipe
from ..reporting.schema import LayerEntry, OperatorEntry
from ..solvers import solve
from ..solvers.base import Method, Solution
from ..sparsity import Sparsity
from .capture import Calls, Clock, run_layer
from .machine import release_memory
from .match import match_layer
from .replay import Replay, endings_kept
from .residual import ResidualDrift

SPECTRUM_LIMIT = 2048
"""Largest number of inputs for which the Gram's eigenvalues are recorded; they cost O(n^3) and only feed the report."""


DRIFT_NOISE = 1 / 128
"""Noise that measuring drift on a part of the calibration windows may add to it, in inputs / tokens (docs/quality.md)."""


@dataclass(frozen=True)
class Streams:
    """The hidden states around one decoder layer.

    Args:
        dense: what the dense model feeds it; None where neither target nor propagation needs the dense model. Beside ``pruned`` it
            may hold the first windows only (:func:`dense_windows`).
        pruned: what the pruned prefix feeds it; None with ``propagate=dense``, where that is the same as ``dense``.
        dense_out: receives the dense layer's output; None if nobody needs it.
        pruned_out: receives the pruned layer's output; None if nobody needs it.
    """

    dense: HiddenStates | None
    pruned: HiddenStates | None
    dense_out: HiddenStates | None
    pruned_out: HiddenStates | None

    @property
    def seen(self) -> HiddenStates:
        """What the pruned operators will really see."""
        stream = self.pruned or self.dense
        assert stream is not None
        return stream


@dataclass(frozen=True)
class LayerResult:
    """A pruned decoder layer.

    Args:
        weights: pruned tensors by checkpoint name, in the checkpoint's orientation, rounded as it will hold them.
        entry: what the report says of it.
    """

    weights: dict[str, Tensor]
    entry: LayerEntry


Progress = Callable[[str, float | None], None]
"""Told (operator names, relative error or None when their work begins)."""

Solver = Callable[[LayerProblem, Sequence[Sparsity], Sequence[Method]], Solution]
"""Solves a group of operators by a chain of methods."""


def prune_layer(
    skeleton: Skeleton,
    layout: Layout,
    index: int,
    recipe: Recipe,
    sparsity: Mapping[str, Sparsity],
    streams: Streams,
    calls: Calls,
    scratch: Callable[[str, tuple[int, int, int]], HiddenStates],
    progress: Progress = lambda names, error: None,
    inspect: Callable[[int, LayerProblem], None] | None = None,
    metric: Tensor | None = None,
    importance: Mapping[str, Tensor] | None = None,
    passed: Callable[[], None] = lambda: None,
    solver: Solver = solve,
) -> LayerResult:
    """Prune decoder layer ``index``, group after group.

    One dense pass serves all groups: it fills the first group's Gram (nothing is pruned before it), keeps the dense
    inputs or outputs of the other groups for the cross terms, and gives the next layer its dense hidden states. Then each group
    gets one pass with the operators before it pruned, stopped where the group begins.

    Args:
        skeleton: the model.
        layout: the operators to prune.
        index: which decoder layer.
        recipe: settings.
        sparsity: pattern of every operator, by full name.
        streams: hidden states in and out.
        calls: how decoder layers are called.
        scratch: makes a temporary store of a given name and shape, in memory or in a file.
        progress: told of every group.
        inspect: receives every group's problem before it is solved (benchmarks dump them).
        metric: how block matching weighs errors of the layer's output (see :func:`~.match.match_layer`).
        importance: weights of the rows of every operator, by full name; None counts all rows alike.
        passed: told when ``streams.dense_out`` is complete, long before the layer is.
        solver: solves a group of operators: all of it at once, or in parts (:mod:`~fistapruner.pipeline.parts`).

    Raises:
        FistaPrunerError: NaN or infinity in weights or activations; names the operator.
    """
    clock = Clock(skeleton.device)
    groups = layout.layers[index]
    numbered = list(enumerate(groups))
    with clock.phase("io"):
        loaded = skeleton.layer(index)
        module = loaded.__enter__()
    try:
        kept: dict[int, HiddenStates] = {}
        probe: list[Tensor] = []
        residual = None
        if recipe.corrects_drift and streams.dense is not None:
            residual = ResidualDrift(index, module, layout.adding[index], groups, streams.dense, streams.seen, scratch)

        told = {number: drift_from(recipe, layout, index, number) for number, _ in numbered if _drifts(recipe, streams, number)}

        def new_sums(number: int) -> ProblemSums:
            with clock.phase("gram"):
                return ProblemSums(_stack(module, groups[number]), drift_from=told.get(number))

        def add(number: int, start: int, inputs: Tensor) -> None:
            stop = start + inputs.shape[0]
            with clock.phase("gram"):
                flat = inputs.reshape(-1, inputs.shape[-1])
                dense = drift = None
                if number in kept and start < kept[number].samples:
                    dense = kept[number].read(start, stop).to(flat.device).flatten(0, 1)
                    if told[number] == "outputs":
                        dense = _unbiased(module, groups[number][0], dense)
                    if residual is not None and number in residual:
                        drift = residual.drift(number, start, stop, flat.device)
                sums[number].add(flat, dense, drift)

        sums = {number: new_sums(number) for number, _ in numbered[:1]}

        # What block matching aims at: the dense model's output, or with target=pruned the dense layer's on drifted inputs, or a
        # mixture, as for single operators.
        wanted: HiddenStates | None = None
        if recipe.match and groups:
            wanted = streams.dense_out or scratch(f"wanted-{index}", (streams.seen.samples, streams.seen.seqlen, skeleton.width))
            if streams.dense is None:
                run_layer(skeleton, index, streams.seen, calls, clock, output=wanted)

        # The dense pass.
        same = streams.pruned is None
        in_dense_pass = set(range(len(groups))) if same and not recipe.error_correction else ({0} if same else set())
        if streams.dense is not None and (groups or streams.dense_out is not None):
            for number in in_dense_pass - {0}:
                sums[number] = new_sums(number)
            for number, source in told.items():
                width = groups[number][0].columns if source == "inputs" else groups[number][0].rows
                kept[number] = scratch(f"dense-{index}-{number}", (streams.dense.samples, streams.dense.seqlen, width))

            def keep(number: int, start: int, values: Tensor) -> None:
                with clock.phase("io"):
                    kept[number].write(start, values)

            def watch_dense(number: int, start: int, inputs: Tensor) -> None:
                if number in in_dense_pass:
                    add(number, start, inputs)
                else:
                    keep(number, start, inputs)

            def dense_output(_: int, start: int, out: Tensor) -> None:
                if not probe:
                    probe.append(out)
                store = streams.dense_out or wanted
                if store is not None:
                    with clock.phase("io"):
                        store.write(start, out)

            watched = [(number, group) for number, group in numbered if number in in_dense_pass or told.get(number) == "inputs"]
            answering = [(number, groups[number][0]) for number, source in told.items() if source == "outputs"]
            needed = dense_output if streams.dense_out is not None or groups else None
            around = [] if residual is None else [residual.around_dense_pass]
            run_layer(
                skeleton,
                index,
                streams.dense,
                calls,
                clock,
                groups=watched,
                watch=watch_dense,
                answering=answering,
                answer=keep,
                output=needed,
                around=around,
            )
            passed()
        passed_after = sum(clock.seconds.values())
        if wanted is not None and streams.dense is not None and streams.pruned is not None and recipe.dense_share < 1.0:
            aim = scratch(f"aim-{index}", (wanted.samples, wanted.seqlen, skeleton.width))
            run_layer(skeleton, index, streams.pruned, calls, clock, output=aim)
            for start, stop in calls.batches(wanted.samples):
                aim.write(start, torch.lerp(aim.read(start, stop).float(), wanted.read(start, stop).float(), recipe.dense_share))
            if wanted is not streams.dense_out:
                wanted.close()
            wanted = aim

        # Group after group, each on what the pruned operators before it leave.
        last_passes = int(streams.pruned_out is not None and not recipe.match)
        endings = endings_kept(layout, index, skeleton.device)
        replay = Replay(index, module, groups, endings, last_passes, streams.seen, scratch) if recipe.error_correction else None
        around = [part.around_pass for part in (replay, residual) if part is not None]
        weights: dict[str, Tensor] = {}
        operators: list[OperatorEntry] = []
        warnings: list[str] = []
        for number, group in numbered:
            progress(_names(group), None)
            if number not in sums or (number == 0 and 0 not in in_dense_pass):
                # Without error correction all operators see the layer's own, unpruned inputs: one pass serves them all.
                todo = [(number, group)] if recipe.error_correction else numbered[number:]
                for other, _ in todo:
                    if other not in sums:
                        sums[other] = new_sums(other)
                run_layer(skeleton, index, streams.seen, calls, clock, groups=todo, watch=add, around=around)
            if number in kept:
                kept.pop(number).close()
            entries, said = _prune_group(
                skeleton, layout, index, number, recipe, sparsity, sums.pop(number), clock, inspect, importance, solver
            )
            release_memory()
            for operator in group:
                stored = skeleton.source(f"{layout.full_name(index, operator)}.weight")
                weights[stored] = skeleton.result(stored, module.get_submodule(operator.name).weight.detach())  # type: ignore[operator]
            operators += entries
            warnings += said
            if replay is not None:
                replay.pruned(number)
            worst = max((entry.relative_error or 0.0) for entry in entries)
            progress(_names(group), worst)

        matched: dict[str, Any] | None = None
        if wanted is not None:
            result = match_layer(
                skeleton,
                index,
                groups,
                streams.seen,
                wanted,
                calls,
                clock,
                steps=recipe.match,
                seed=recipe.seed,
                metric=metric,
            )
            weights |= result.weights
            matched = result.record
            if wanted is not streams.dense_out:
                wanted.close()

        if residual is not None:
            residual.close()

        # What the pruned layer gives to the next one, and how far that is from what the dense layer gave.
        error = None
        if streams.pruned_out is not None:
            last = [] if recipe.match or replay is None else [replay.around_pass]
            run_layer(skeleton, index, streams.seen, calls, clock, output=streams.pruned_out, around=last)
        if replay is not None:
            replay.close()
        if groups and probe and streams.dense is not None:
            error = _output_error(skeleton, index, streams, calls, clock, probe[0])
        entry = LayerEntry(
            index=index,
            name=f"{layout.prefix}.{index}",
            seconds=clock.seconds,
            relative_error=error,
            relative_error_of=None if error is None else "what the dense layer adds to its input, first batch of calibration windows",
            operators=operators,
            device=str(skeleton.device),
            warnings=warnings,
            passed_after=passed_after,
            **({} if matched is None else {"match": matched}),
        )
        return LayerResult(weights, entry)
    finally:
        loaded.__exit__(None, None, None)


def _drifts(recipe: Recipe, streams: Streams, number: int) -> bool:
    """Whether group ``number`` sees other inputs than in the dense model, and the target cares."""
    if recipe.dense_share == 0.0 or streams.dense is None:
        return False
    return streams.pruned is not None or (number > 0 and recipe.error_correction)


def dense_windows(recipe: Recipe, layout: Layout, samples: int, seqlen: int, batch_size: int) -> int:
    """How many of the calibration windows the dense model runs on beside the pruned one: whole batches.

    With ``propagate=pruned`` it serves to measure drift only. Fewer tokens add to the noise of that ``n (1 / tokens - 1 / all tokens)``
    for an operator of n inputs: they are so many that the widest one's stays below :data:`DRIFT_NOISE`. Block matching aims at the
    dense model's outputs, window by window, and takes all.
    """
    if recipe.propagate == "dense" or recipe.match or not recipe.dense_share:
        return samples
    inputs = max((operator.columns for _, operator in layout.operators()), default=0)
    windows = samples * inputs / (inputs + samples * seqlen * DRIFT_NOISE)
    return min(samples, math.ceil(windows / batch_size) * batch_size)


def drift_from(recipe: Recipe, layout: Layout, index: int, number: int) -> DriftFrom:
    """What the dense pass keeps of group ``number`` of layer ``index`` where its inputs drift: inputs, where operators share them."""
    operator, *others = layout.layers[index][number]
    corrected = recipe.corrects_drift and operator.name in layout.adding[index]
    return "inputs" if others else cheapest_drift(operator.rows, operator.columns, corrected=corrected)


def _unbiased(module: nn.Module, operator: Operator, outputs: Tensor) -> Tensor:
    """(tokens, m) outputs of an operator less its bias."""
    bias = module.get_submodule(operator.name).bias
    return outputs if bias is None else outputs.float() - bias.float()  # type: ignore[operator]


def _names(group: Group) -> str:
    return "+".join(operator.name.rpartition(".")[2] for operator in group)


def _prune_group(
    skeleton: Skeleton,
    layout: Layout,
    index: int,
    number: int,
    recipe: Recipe,
    sparsity: Mapping[str, Sparsity],
    sums: ProblemSums,
    clock: Clock,
    inspect: Callable[[int, LayerProblem], None] | None,
    importance: Mapping[str, Tensor] | None,
    solver: Solver,
) -> tuple[list[OperatorEntry], tuple[str, ...]]:
    """Solve group ``number`` of the loaded layer and write the solution into it; the problem is freed on return.

    Returns:
        What the report says of its operators, and warnings.
    """
    group = layout.layers[index][number]
    module = skeleton.layers[index]
    names = [layout.full_name(index, operator) for operator in group]
    patterns = [sparsity[name] for name in names]
    with clock.phase("gram"):
        problem = sums.problem(names, [operator.rows for operator in group], recipe.dense_share, release=True)
    if inspect is not None:
        inspect(number, problem)
    with clock.phase("solve"):
        if importance is None:
            solution = solver(problem, patterns, recipe.steps)
        else:
            rows = torch.cat([importance[name] for name in names]).to(problem.weight.device)
            solution = solver(problem.weighted(rows), patterns, recipe.steps)
            unweighted(solution.weight, rows)
        unrounded = _store(skeleton, module, group, names, solution)
    with clock.phase("report"):
        # Solvers that keep dense weights leave nothing to round: their error is known, and costs as much as a pass.
        known = unrounded and importance is None
        errors = [stats["relative_error"] for stats in solution.stats] if known else problem.relative_errors(solution.weight)
        entries = _operator_entries(problem, solution, errors, group, number, [str(pattern) for pattern in patterns])
    return entries, solution.warnings


def _stack(module: nn.Module, group: Group) -> Tensor:
    """Weights of the group's operators, stacked by rows, in fp32."""
    weights = [operator.weight(module) for operator in group]
    stacked = torch.empty(sum(len(weight) for weight in weights), weights[0].shape[1], device=weights[0].device)
    for part, weight in zip(stacked.split([len(weight) for weight in weights]), weights, strict=True):
        part.copy_(weight)
    return stacked


def _store(skeleton: Skeleton, module: nn.Module, group: Group, names: Sequence[str], solution: Solution) -> bool:
    """Write the solution into the loaded layer, rounded as the checkpoint will hold it; the solution's weight becomes that too.

    Returns:
        Whether it was so before.
    """
    unrounded = True
    parts = solution.weight.split([operator.rows for operator in group])
    for operator, name, part in zip(group, names, parts, strict=True):
        target = operator.weight(module)
        target.copy_(skeleton.rounded(skeleton.source(f"{name}.weight"), part))
        unrounded = unrounded and torch.equal(part, target.to(part.dtype))
        part.copy_(target)
    return unrounded


def _operator_entries(
    problem: LayerProblem, solution: Solution, errors: Sequence[float], group: Group, number: int, patterns: list[str]
) -> list[OperatorEntry]:
    spectrum, ranks, condition = _spectrum(problem)
    entries = []
    parts = solution.weight.split([operator.rows for operator in group])
    dense_errors: Sequence[float | None] = problem.dense_errors() or [None] * len(group)
    for operator, pattern, part, error, dense_error, stats in zip(
        group, patterns, parts, errors, dense_errors, solution.stats, strict=True
    ):
        zeros = part.numel() - int(torch.count_nonzero(part))  # a sum of booleans would be one of int64
        entries.append(
            OperatorEntry(
                name=operator.name,
                shape=(operator.rows, operator.columns),
                sparsity=pattern,
                zeros=zeros,
                density=1.0 - zeros / part.numel(),
                relative_error=error,
                dense_error=dense_error,
                group=number,
                steps=stats["steps"],
                spectrum=spectrum,
                spectrum_ranks=ranks,
                condition=condition,
            )
        )
    return entries


def _spectrum(problem: LayerProblem) -> tuple[list[float] | None, list[int] | None, float | None]:
    n = problem.shape[1]
    if n > SPECTRUM_LIMIT:
        return None, None, None
    values = torch.linalg.eigvalsh(problem.gram).flip(0).clamp_min(0)
    top = float(values[0])
    if top <= 0:
        return None, None, None
    ranks = sorted({round(n ** (step / 31)) for step in range(32)})
    shares = [float(values[rank - 1]) / top for rank in ranks]
    return shares, ranks, top / max(float(problem.gram.diagonal().mean()), 1e-300)


def _output_error(skeleton: Skeleton, index: int, streams: Streams, calls: Calls, clock: Clock, dense_out: Tensor) -> float:
    """Squared difference of the pruned and the dense layer's output, as a share of what the dense layer adds.

    The pass it needs is one of a batch with nothing watched; its time is kept apart (``plain``), so that the report can
    say what capture costs beside it.
    """
    assert streams.dense is not None
    count = dense_out.shape[0]
    seen = streams.seen.read(0, count).to(skeleton.device)
    with clock.phase("plain"), torch.no_grad():
        pruned_out = skeleton.run(index, seen, calls.by_size[count][index])
    dense_in = streams.dense.read(0, count).to(skeleton.device)
    added = (dense_out.float() - dense_in.float()).square().sum(dtype=torch.float64)
    wrong = (pruned_out.float() - dense_out.float()).square().sum(dtype=torch.float64)
    return float(wrong) / max(float(added), 1e-300)

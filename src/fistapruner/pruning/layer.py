"""Prune one decoder layer: the unit that is journaled, resumed, scheduled, timed and reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..activations.replay import Replay, kept_projections
from ..activations.store import HiddenStates, Store
from ..activations.stream import Calls, Watched, run_layer
from ..constraints import Constraint
from ..models.discovery import Group, Layout
from ..models.layerwise import LayerwiseModel
from ..problem import LayerProblem, ProblemSums, unweighted
from ..recipes.settings import Recipe
from ..runs.records import LayerEntry, OperatorEntry
from ..runtime.clock import Clock
from ..runtime.memory import release_memory
from ..solvers import solve
from ..solvers.base import Method, Solution
from ..tuning.block_matching import MatchSettings, match_layer
from .drift import DenseActivations, ResidualDrift, drift_sources
from .entries import operator_entries


@dataclass(frozen=True)
class LayerStreams:
    """The hidden states around one decoder layer.

    Args:
        dense: what the dense model feeds it; None where neither target nor propagation needs the dense model. Beside ``pruned`` it
            may hold the first windows only (:func:`~.drift.dense_windows`).
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

Solver = Callable[[LayerProblem, Sequence[Constraint], Sequence[Method]], Solution]
"""Solves a group of operators by a chain of methods."""


def prune_layer(
    model: LayerwiseModel,
    layout: Layout,
    index: int,
    recipe: Recipe,
    sparsity: Mapping[str, Constraint],
    streams: LayerStreams,
    calls: Calls,
    scratch: Store,
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
        model: the model.
        layout: the operators to prune.
        index: which decoder layer.
        recipe: settings.
        sparsity: pattern of every operator, by full name.
        streams: hidden states in and out.
        calls: how decoder layers are called.
        scratch: makes a temporary store of a given name and shape, in memory or in a file.
        progress: told of every group.
        inspect: receives every group's problem before it is solved (benchmarks dump them).
        metric: how block matching weighs errors of the layer's output (see :func:`~.tuning.block_matching.match_layer`).
        importance: weights of the rows of every operator, by full name; None counts all rows alike.
        passed: told when ``streams.dense_out`` is complete, long before the layer is.
        solver: solves a group of operators: all of it at once, or in parts (:mod:`~fistapruner.pruning.partition`).

    Raises:
        FistaPrunerError: NaN or infinity in weights or activations; names the operator.
    """
    clock = Clock(model.device)
    with ExitStack() as loaded:
        with clock.phase("io"):
            module = loaded.enter_context(model.layer(index))
        walk = _LayerPasses(model, layout, index, recipe, streams, calls, scratch, clock)
        if walk.dense_pass():
            passed()
        passed_after = sum(clock.seconds.values())
        walk.set_aim()

        # Group after group, each on what the pruned operators before it leave.
        weights: dict[str, Tensor] = {}
        operators: list[OperatorEntry] = []
        warnings: list[str] = []
        for number, group in walk.groups:
            progress(_names(group), None)
            entries, said = _prune_group(
                model, layout, index, number, recipe, sparsity, walk.sums_of(number), clock, inspect, importance, solver
            )
            release_memory()
            for operator in group:
                stored = model.source(f"{layout.full_name(index, operator)}.weight")
                weights[stored] = model.result(stored, module.get_submodule(operator.name).weight.detach())  # type: ignore[operator]
            operators += entries
            warnings += said
            walk.pruned(number)
            progress(_names(group), max((entry.relative_error or 0.0) for entry in entries))

        matched: dict[str, Any] = {}
        if walk.aim is not None:
            settings = MatchSettings(recipe.reconstruct, recipe.seed, metric)
            with clock.phase("reconstruct"):
                result = match_layer(model, index, layout.layers[index], streams.seen, walk.aim, calls, settings)
            weights |= result.weights
            matched = {"reconstruct": result.record}
        error = walk.pass_on()
        entry = LayerEntry(
            index=index,
            name=f"{layout.prefix}.{index}",
            seconds=clock.seconds,
            relative_error=error,
            relative_error_of=None if error is None else "what the dense layer adds to its input, first batch of calibration windows",
            operators=operators,
            device=str(model.device),
            warnings=warnings,
            passed_after=passed_after,
            **matched,
        )
        return LayerResult(weights, entry)


class _LayerPasses:
    """The passes through one loaded decoder layer while it is pruned, and what is kept from one of them to the next.

    Args: as of :func:`prune_layer`.
    """

    def __init__(
        self,
        model: LayerwiseModel,
        layout: Layout,
        index: int,
        recipe: Recipe,
        streams: LayerStreams,
        calls: Calls,
        scratch: Store,
        clock: Clock,
    ) -> None:
        self._model, self._index, self._recipe, self._streams = model, index, recipe, streams
        self._calls, self._scratch, self._clock = calls, scratch, clock
        self._layer = model.layers[index]
        groups = layout.layers[index]
        self.groups: list[tuple[int, Group]] = list(enumerate(groups))
        same = streams.pruned is None
        self._sources = {} if streams.dense is None else drift_sources(recipe, layout, index, same=same)
        self._record: DenseActivations | None = None
        self._residual: ResidualDrift | None = None
        if streams.dense is not None:
            self._record = DenseActivations(index, self._layer, groups, self._sources, streams.dense, scratch)
            if recipe.corrects_drift:
                self._residual = ResidualDrift(
                    index, self._layer, layout.residual_writers[index], groups, streams.dense, streams.seen, scratch
                )
        self._replay: Replay | None = None
        if recipe.error_correction:
            last_passes = int(streams.pruned_out is not None and not recipe.reconstruct)
            endings = kept_projections(layout, index, model.device)
            self._replay = Replay(index, self._layer, groups, endings, last_passes, streams.seen, scratch)
        self._sums: dict[int, ProblemSums] = {}
        self._first_out: Tensor | None = None  # of the dense layer: what the report's error is measured on
        self.aim: HiddenStates | None = None
        """Output hidden states that block matching aims at; None without it."""
        if recipe.reconstruct and groups:
            self.aim = streams.dense_out or self._store("wanted")

    def dense_pass(self) -> bool:
        """Run the dense layer, if the dense model is needed: once, for everything that is wanted of it; whether it was.

        It gathers the sums of the groups whose inputs the pruned layer shares, records what tells the drift of the others, and
        writes the dense hidden states for the next layer.
        """
        streams = self._streams
        if streams.dense is None or not (self.groups or streams.dense_out is not None):
            return False
        record = self._record
        assert record is not None
        shared = [] if streams.pruned is not None else self.groups[:1] if self._recipe.error_correction else self.groups
        for number, group in shared:
            self._sums[number] = self._new_sums(number, group)

        def keep(number: int, start: int, values: Tensor) -> None:
            with self._clock.phase("io"):
                record.keep(number, start, values)

        def watch(number: int, start: int, inputs: Tensor) -> None:
            (self._add if number in self._sums else keep)(number, start, inputs)

        def output(_: int, start: int, out: Tensor) -> None:
            if self._first_out is None:
                self._first_out = out
            store = streams.dense_out or self.aim
            if store is not None:
                with self._clock.phase("io"):
                    store.write(start, out)

        groups = [(number, group) for number, group in self.groups if number in self._sums or record.wants(number)]
        self._run(
            streams.dense,
            watched=Watched(groups, watch, record.answering, keep),
            output=output,
            around=[] if self._residual is None else [self._residual.around_dense_pass],
        )
        return True

    def set_aim(self) -> None:
        """Make what block matching aims at of what the dense pass left there, nothing being pruned yet.

        That is the dense model's output; with ``dense_target=pruned`` the dense layer's on drifted inputs, or a mixture of both, as for
        single operators.
        """
        if self.aim is None:
            return
        streams, share = self._streams, self._recipe.dense_share
        if streams.dense is None:
            self._run(streams.seen, output=self.aim)
        elif streams.pruned is not None and share < 1.0:
            mixed = self._store("aim")
            self._run(streams.pruned, output=mixed)
            for start, stop in self._calls.batches(mixed.samples):
                mixed.write(
                    start, torch.lerp(mixed.read(start, stop, dtype=torch.float32), self.aim.read(start, stop, dtype=torch.float32), share)
                )
            self._close_aim()
            self.aim = mixed

    def sums_of(self, number: int) -> ProblemSums:
        """The sums of group ``number``, from a pass with the groups before it pruned; they are the caller's from now on.

        Without error correction all operators see the layer's own, unpruned inputs: one pass serves them all.
        """
        if number not in self._sums:
            todo = self.groups[number : number + 1] if self._recipe.error_correction else self.groups[number:]
            for other, group in todo:
                self._sums[other] = self._new_sums(other, group)
            around = [part.around_pass for part in (self._replay, self._residual) if part is not None]
            self._run(self._streams.seen, watched=Watched(todo, self._add), around=around)
        if self._record is not None:
            self._record.close(number)
        return self._sums.pop(number)

    def pruned(self, number: int) -> None:
        """The operators of group ``number`` have their final weights in the layer."""
        if self._replay is not None:
            self._replay.pruned(number)

    def pass_on(self) -> float | None:
        """Write what the pruned layer gives to the next one, and release what was kept.

        Returns:
            Squared difference of the pruned and the dense layer's output, as a share of what the dense layer adds; None where that was
            not computed.
        """
        self._close_aim()
        if self._residual is not None:
            self._residual.close()
        if self._streams.pruned_out is not None:
            last = [] if self._recipe.reconstruct or self._replay is None else [self._replay.around_pass]
            self._run(self._streams.seen, output=self._streams.pruned_out, around=last)
        if self._replay is not None:
            self._replay.close()
        if not self.groups or self._first_out is None or self._streams.dense is None:
            return None
        return self._output_error(self._streams.dense, self._first_out)

    def _run(self, inputs: HiddenStates, **what: Any) -> None:
        run_layer(self._model, self._index, inputs, self._calls, clock=self._clock, **what)

    def _store(self, name: str) -> HiddenStates:
        """For output hidden states of all windows."""
        seen = self._streams.seen
        return self._scratch(f"{name}-{self._index}", (seen.samples, seen.seqlen, self._model.width))

    def _new_sums(self, number: int, group: Group) -> ProblemSums:
        with self._clock.phase("gram"):
            return ProblemSums(_stack(self._layer, group), drift_from=self._sources.get(number))

    def _add(self, number: int, start: int, inputs: Tensor) -> None:
        """Add the inputs of a batch of windows, (windows, seqlen, n), to the sums of group ``number``."""
        stop = start + inputs.shape[0]
        with self._clock.phase("gram"):
            dense = drift = None
            if self._record is not None:
                dense = self._record.read(number, start, stop, inputs.device)
            if dense is not None and self._residual is not None and number in self._residual:
                drift = self._residual.drift(number, start, stop, inputs.device)
            self._sums[number].add(inputs.reshape(-1, inputs.shape[-1]), dense, drift)

    def _close_aim(self) -> None:
        if self.aim is not None and self.aim is not self._streams.dense_out:
            self.aim.close()

    def _output_error(self, dense: HiddenStates, dense_out: Tensor) -> float:
        """What :meth:`pass_on` returns, on the first batch, ``dense_out`` being the dense layer's output there.

        The pass it needs is one of a batch with nothing watched; its time is kept apart (``plain``), so that the report can
        say what capture costs beside it.
        """
        count = dense_out.shape[0]
        seen = self._streams.seen.read(0, count, self._model.device)
        with self._clock.phase("plain"), torch.no_grad():
            pruned_out = self._model.run(self._index, seen, self._calls.by_size[count][self._index])
        dense_in = dense.read(0, count, self._model.device)
        added = (dense_out.float() - dense_in.float()).square().sum(dtype=torch.float64)
        wrong = (pruned_out.float() - dense_out.float()).square().sum(dtype=torch.float64)
        return float(wrong) / max(float(added), 1e-300)


def _names(group: Group) -> str:
    return "+".join(operator.name.rpartition(".")[2] for operator in group)


def _prune_group(
    model: LayerwiseModel,
    layout: Layout,
    index: int,
    number: int,
    recipe: Recipe,
    sparsity: Mapping[str, Constraint],
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
    module = model.layers[index]
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
        unrounded = _store(model, module, group, names, solution)
    with clock.phase("report"):
        # Solvers that keep dense weights leave nothing to round: their error is known, and costs as much as a pass.
        known = unrounded and importance is None
        errors = [stats["relative_error"] for stats in solution.stats] if known else problem.relative_errors(solution.weight)
        entries = operator_entries(problem, solution, errors, group, number, [str(pattern) for pattern in patterns])
    return entries, solution.warnings


def _stack(module: nn.Module, group: Group) -> Tensor:
    """Weights of the group's operators, stacked by rows, in fp32."""
    weights = [operator.weight(module) for operator in group]
    stacked = torch.empty(sum(len(weight) for weight in weights), weights[0].shape[1], device=weights[0].device)
    for part, weight in zip(stacked.split([len(weight) for weight in weights]), weights, strict=True):
        part.copy_(weight)
    return stacked


def _store(model: LayerwiseModel, module: nn.Module, group: Group, names: Sequence[str], solution: Solution) -> bool:
    """Write the solution into the loaded layer, rounded as the checkpoint will hold it; the solution's weight becomes that too.

    Returns:
        Whether it was so before.
    """
    unrounded = True
    parts = solution.weight.split([operator.rows for operator in group])
    for operator, name, part in zip(group, names, parts, strict=True):
        target = operator.weight(module)
        target.copy_(model.rounded(model.source(f"{name}.weight"), part))
        unrounded = unrounded and torch.equal(part, target.to(part.dtype))
        part.copy_(target)
    return unrounded

"""The passes through one decoder layer that pruning needs, and what is kept from one pass to the next.

Where ``propagate`` and ``target`` are ``pruned``, each group has a pass of its own, and a last one makes the output.
With the dense model beside it there is one dense pass before them, which serves all groups
(:meth:`LayerPasses.begin`).

The experts of a mixture need one pass in all: it keeps what enters the experts and where each token is routed. Then
each expert's own tokens run through that expert alone, so the sums of one expert are in memory at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core import LayerProblem, ProblemSums
from ..models.operators import Group
from ..passes.store import CachedOutputs, HiddenStates, RoutedTokens, kept_projections
from ..passes.stream import Around, Watched, run_layer
from ..runs.records import LayerEntry
from ..runtime.show import Clock
from ..structure.refit import ChannelStatistics, ChannelSums
from ..structure.units import Unit
from .context import LayerContext, LayerMeasures, LayerResult, LayerStreams
from .drift import Drift


class LayerPasses:
    """The passes of the calibration windows through one loaded decoder layer while it is pruned.

    ``result`` gathers what is done to the layer.
    """

    def __init__(
        self, context: LayerContext, index: int, streams: LayerStreams, measures: LayerMeasures, clock: Clock
    ) -> None:
        self.context, self.index, self.streams, self.measures, self.clock = context, index, streams, measures, clock
        self.model, self.recipe = context.model, context.recipe
        self.result = LayerResult(LayerEntry(index=index, name=f"{context.layout.layers_name}.{index}"))
        self.layer, self.groups = self.model.layers[index], context.layout.layers[index]
        self.solved = context.solved(index)
        """Numbers of the groups that are solved."""
        recipe, units = self.recipe, context.widths.channels(index)
        numbers = {operator.name: number for number, group in enumerate(self.groups) for operator in group}
        touched = {unit.name: {numbers[name] for name in unit.names if name in numbers} for unit in units}
        self._touched = set[int]().union(*touched.values())
        self._corrects = recipe.error_correction
        self.cut = {numbers[name]: min(found) if self._corrects else 0 for name, found in touched.items()}
        """By number of the group that loses inputs, the number of the group before which its channels are removed."""
        self._fits_left = context.fitted(index)
        self._drift = Drift(context, index, streams)
        self.cached: CachedOutputs | None = None
        if self._corrects:
            later_passes = int(streams.pruned_out is not None and not recipe.reconstruct)
            projections = kept_projections(context.layout, index, self.model.device)
            self.cached = CachedOutputs(
                index, self.layer, self.groups, projections, later_passes, streams.seen, context.scratch
            )
        self._sums: dict[int, ProblemSums | ChannelSums] = {}  # of a group's operators, or of the inputs it loses
        self._routed: dict[str, RoutedTokens] = {}
        cut_experts = [number for number in self.cut if self.groups[number][0].experts]
        self._routed_left = Counter(self.groups[number][0].experts for number in (*self.solved, *cut_experts))
        """By mixture, how often its tokens are still read."""
        self._first_out: Tensor | None = None  # of the dense layer, first batch: the report's error is measured on it
        self.wanted: HiddenStates | None = None
        """Output hidden states that block reconstruction trains towards; None without block reconstruction."""
        if recipe.reconstruct and self.groups:
            self.wanted = streams.dense_out or self._store("wanted")

    def begin(self) -> None:
        """Run the dense layer once, if it is needed; complete the outputs of block reconstruction.

        The pass gathers the sums of the groups whose inputs are the same in the pruned layer, keeps the dense inputs or
        outputs of the others, and writes the dense hidden states for the next layer.
        """
        streams, drift = self.streams, self._drift
        if streams.dense is not None and (self.groups or streams.dense_out is not None):
            for number in self._same_in_dense() if streams.pruned is None else ():
                self._sums[number] = self._new_sums(number, channels=number in self.cut, drifted=False)

            def keep(number: int, start: int, values: Tensor) -> None:
                with self.clock.phase("io"):
                    drift.keep(number, start, values)

            def watch(number: int, start: int, inputs: Tensor) -> None:
                if number in self._sums:
                    self._add(number, start, inputs, drifted=False)
                else:
                    keep(number, start, inputs)

            def output(_: int, start: int, out: Tensor) -> None:
                if self._first_out is None:
                    self._first_out = out
                store = streams.dense_out or self.wanted
                if store is not None:
                    with self.clock.phase("io"):
                        store.write(start, out)

            groups = [
                (number, group)
                for number, group in enumerate(self.groups)
                if number in self._sums or drift.sources.get(number) == "inputs"
            ]
            watched = Watched(groups, watch, drift.outputs, keep)
            self._run(streams.dense, watched=watched, output=output, around=[partial(drift.around_pass, pruned=False)])
        if self.wanted is not None:
            self._complete_wanted(self.wanted)

    def _same_in_dense(self) -> list[int]:
        """Return the groups whose sums are gathered in the dense pass: nothing is pruned before them."""
        last = 0 if self._corrects else -1 if self.cut else len(self.groups)
        found = [number for number in self.solved if number <= last and number not in self._touched]
        if not self._fits_left:
            found += [
                number
                for number, due in self.cut.items()
                if not any(other < due for other in self.solved) and (number == min(self.cut) or not self._corrects)
            ]
        return [number for number in found if not self.groups[number][0].experts]

    def _complete_wanted(self, wanted: HiddenStates) -> None:
        """Complete the outputs that block reconstruction trains towards, while nothing is pruned yet.

        They are the dense model's outputs, which the dense pass wrote; with ``target=pruned`` the dense layer's on
        drifted inputs, or a mixture of both, as for single operators.
        """
        streams, share, device = self.streams, self.recipe.dense_share, self.model.device
        if streams.dense is None:
            self._run(streams.seen, output=wanted)
        elif streams.pruned is not None and share < 1.0:
            mixed = self._store("mixed")
            self._run(streams.pruned, output=mixed)
            for start, stop in self.context.calls.batches(mixed.samples):
                own, dense = (each.read(start, stop, device, torch.float32) for each in (mixed, wanted))
                mixed.write(start, torch.lerp(own, dense, share))
            self._close_wanted()
            self.wanted = mixed

    def mixtures_before(self, number: int) -> list[Unit]:
        """Return the mixtures that lose experts before group ``number`` is pruned."""
        first: dict[str, int] = {}
        for place, group in enumerate(self.groups):
            first.setdefault(group[0].experts, place if self._corrects else 0)
        return [mixture for mixture in self.context.widths.mixtures(self.index) if first[mixture.name] == number]

    def sums_of(self, number: int) -> ProblemSums:
        """Hand over the sums of group ``number``, from a pass with the groups before it pruned.

        Without error correction all groups are solved on the inputs of the unpruned layer: one pass gathers them all.
        """
        if not self._corrects:
            self._route(self.solved)
        if number not in self._sums:
            first, todo = self.groups[number][0], [number]
            if not self._corrects:
                todo = [other for other in self.solved if other >= number and other not in self._sums]
            mixture = [other for other in todo if self.groups[other][0].experts == first.experts]
            if first.experts:
                same = [other for other in mixture if self.groups[other][0].expert == first.expert]
                self._gather_expert(same, channels=False)
            else:
                self._gather(mixture, self._around())
        self._drift.close(number)
        self._read_routed(number)
        sums = self._sums.pop(number)
        assert isinstance(sums, ProblemSums)
        return sums

    def channels_of(self, number: int) -> ChannelStatistics:
        """Hand over what is known of the inputs of group ``number``, one operator that loses some of them.

        They come from a pass with the groups before it pruned, while all of its channels are still there. Without error
        correction, one pass of the layer as it was serves all units, unless they are fitted (goa).
        """
        (operator,) = self.groups[number]
        experts = [other for other in sorted(self.cut) if self.groups[other][0].experts]
        if not self._corrects:
            self._route(experts)
        if operator.experts:
            self._gather_expert([number], channels=True)
            self._read_routed(number)
        elif number not in self._sums:
            alone = self._corrects or self._fits_left
            together = [number] if alone else sorted(self.cut.keys() - self._sums.keys() - set(experts))
            # Cached outputs would keep inputs of the operator that is next, with the channels that go.
            around = self._around(cached=self.cut[number] != number, residual=self._first_writer_is_final(number))
            self._gather(together, around, channels=True)
        if number not in self.solved:
            self._drift.close(number)
        sums = self._sums.pop(number)
        assert isinstance(sums, ChannelSums)
        with self.clock.phase("problem"):
            name = self.context.layout.full_name(self.index, operator)
            return sums.statistics(name, self.recipe.dense_share)

    def fitting_problem(self, number: int) -> LayerProblem:
        """Gather the problem of group ``number`` before it loses outputs, on the layer as it is."""
        self._gather([number], self._around())
        self._fits_left[number] -= 1
        if not self._fits_left[number]:
            self._drift.close(number)
        sums = self._sums.pop(number)
        assert isinstance(sums, ProblemSums)
        with self.clock.phase("problem"):
            name = "+".join(self.context.names(self.index, self.groups[number]))
            return sums.problem(name, self.recipe.dense_share, release=True)

    def routed_to(self, mixture: str) -> RoutedTokens:
        """Return what enters a module of experts, from a pass with the groups before it pruned.

        It is kept until :meth:`rerouted`.
        """
        self._keep_routed([mixture])
        return self._routed[mixture]

    def rerouted(self, mixture: str) -> None:
        """Note that a mixture has lost experts, so that its tokens go elsewhere."""
        self._routed.pop(mixture).close()

    def output_pass(self) -> float | None:
        """Write the pruned layer's output for the next layer, and release what was kept.

        Returns:
            Squared difference of the pruned and the dense layer's output, as a share of what the dense layer adds to
            its input; None where the dense output was not computed.
        """
        streams = self.streams
        self._close_wanted()
        self._drift.close_residual()
        if streams.pruned_out is not None:
            last = [] if self.recipe.reconstruct or self.cached is None else [self.cached.around_pass]
            self._run(streams.seen, output=streams.pruned_out, around=last)
        if self.cached is not None:
            self.cached.close()
        if not self.groups or self._first_out is None or streams.dense is None:
            return None
        # A pass of that batch with nothing watched, timed as ``plain``: the report compares it with ``capture``.
        model, dense_out = self.model, self._first_out
        count = dense_out.shape[0]
        seen = streams.seen.read(0, count, model.device)
        with self.clock.phase("plain"), torch.no_grad():
            pruned_out = model.run(self.index, seen, self.context.calls.by_size[count][self.index])
        dense_in = streams.dense.read(0, count, model.device)
        added = (dense_out.float() - dense_in.float()).square().sum(dtype=torch.float64)
        wrong = (pruned_out.float() - dense_out.float()).square().sum(dtype=torch.float64)
        return float(wrong) / max(float(added), 1e-300)

    def _run(self, inputs: HiddenStates, **what: Any) -> None:
        run_layer(self.model, self.index, inputs, self.context.calls, clock=self.clock, **what)

    def _around(self, *, cached: bool = True, residual: bool = True) -> list[Around]:
        """Return what goes around a pass of the layer with some groups pruned."""
        parts = (self.cached if cached else None, self._drift if residual else None)
        return [part.around_pass for part in parts if part is not None]

    def _store(self, name: str) -> HiddenStates:
        """Make a store for output hidden states of all windows."""
        seen = self.streams.seen
        return self.context.scratch(f"{name}-{self.index}", (seen.samples, seen.seqlen, self.model.width))

    def _close_wanted(self) -> None:
        if self.wanted is not None and self.wanted is not self.streams.dense_out:
            self.wanted.close()

    def _new_sums(self, number: int, *, channels: bool = False, drifted: bool = True) -> ProblemSums | ChannelSums:
        """Make empty sums of group ``number``, or of the ``channels`` that it reads."""
        with self.clock.phase("gram"):
            weight = _stacked(self.layer, self.groups[number])
            source = self._drift.sources.get(number) if drifted else None
            if not channels:
                return ProblemSums(weight, drift_from=source)
            routed = bool(self.groups[number][0].experts)
            return ChannelSums(weight, self.streams.seen.samples, drift_from=source, routed=routed)

    def _gather(self, numbers: list[int], around: list[Around], *, channels: bool = False) -> None:
        """Gather the sums of some groups in one pass."""
        for number in numbers:
            self._sums[number] = self._new_sums(number, channels=channels)
        watched = Watched([(number, self.groups[number]) for number in numbers], self._add)
        self._run(self.streams.seen, watched=watched, around=around)

    def _add(self, number: int, start: int, inputs: Tensor, *, drifted: bool = True) -> None:
        """Add the inputs of a batch of windows, (windows, seqlen, n), to the sums of group ``number``."""
        sums = self._sums[number]
        with self.clock.phase("gram"):
            dense, drift = self._drift.of(number, start, inputs) if drifted else (None, None)
            if isinstance(sums, ProblemSums):
                sums.add(inputs.reshape(-1, inputs.shape[-1]), dense, drift)
            else:
                sums.add(start, inputs, dense, drift if self._first_writer_is_final(number) else None)

    def _first_writer_is_final(self, number: int) -> bool:
        """Return whether the first writer to the residual stream is final when group ``number`` loses inputs."""
        first = self.context.layout.residual_writers[self.index][:1]
        return not any(self.groups[other][0].name in first for other in self.solved if other >= self.cut[number])

    def _gather_expert(self, numbers: list[int], *, channels: bool) -> None:
        """Gather the sums of groups of one expert, or of the ``channels`` that they read, from its own tokens."""
        first, device = self.groups[numbers[0]][0], self.model.device
        self._keep_routed([first.experts])
        routed, expert = self._routed[first.experts], self.layer.get_submodule(f"{first.experts}.{first.expert}")
        start = 0  # first window of the batch at work

        def add_to(sums: ProblemSums | ChannelSums) -> Callable[..., None]:
            def pre_forward(_: object, args: tuple[Tensor, ...]) -> None:
                with self.clock.phase("gram"):
                    if isinstance(sums, ProblemSums):
                        sums.add(args[0])
                    else:
                        sums.add_tokens(start, args[0])

            return pre_forward

        with ExitStack() as hooks:
            for number in numbers:
                self._sums[number] = sums = self._new_sums(number, channels=channels)
                operator = self.layer.get_submodule(self.groups[number][0].name)
                hooks.enter_context(operator.register_forward_pre_hook(add_to(sums)))
            whole = ((0, tokens) for tokens, _ in routed.weighted(first.expert, device))
            for window, tokens in routed.by_half(first.expert, device) if channels else whole:
                start = window
                with self.clock.phase("capture"), torch.no_grad():
                    expert(tokens)

    def _route(self, numbers: Iterable[int]) -> None:
        """Keep what enters the mixtures of some groups, where it is still read."""
        mixtures = dict.fromkeys(self.groups[number][0].experts for number in numbers)
        self._keep_routed([name for name in mixtures if name and self._routed_left[name]])

    def _keep_routed(self, mixtures: list[str]) -> None:
        """Keep what enters some modules of experts, in one pass; nothing for those that are kept already."""
        seen = self.streams.seen
        new = [name for name in mixtures if name not in self._routed]
        if not new:
            return

        def keep(name: str, start: int, inputs: Tensor, chosen: Tensor, weights: Tensor) -> None:
            with self.clock.phase("io"):
                if name not in self._routed:
                    shape = (seen.samples, seen.seqlen, inputs.shape[-1])
                    self._routed[name] = RoutedTokens(self.context.scratch(f"routed-{self.index}-{name}", shape))
                self._routed[name].keep(start, inputs, chosen, weights)

        self._run(seen, watched=Watched(mixtures=new, routed=keep), around=self._around())

    def _read_routed(self, number: int) -> None:
        """Note that group ``number`` has read its tokens; release those that nothing reads again."""
        mixture = self.groups[number][0].experts
        self._routed_left[mixture] -= 1
        if mixture in self._routed and not self._routed_left[mixture]:
            self._routed.pop(mixture).close()


def _stacked(layer: nn.Module, group: Group) -> Tensor:
    """Stack the weights of a group's operators by rows, in fp32."""
    weights = [operator.weight(layer) for operator in group]
    stacked = torch.empty(sum(len(weight) for weight in weights), weights[0].shape[1], device=weights[0].device)
    for part, weight in zip(stacked.split([len(weight) for weight in weights]), weights, strict=True):
        part.copy_(weight)
    return stacked

"""The passes through one decoder layer that pruning needs, and what is kept from one pass to the next.

Where ``propagate`` and ``target`` are ``pruned``, each group has a pass of its own, and a last one makes the output.
With the dense model beside it there is one dense pass before them, which serves all groups
(:meth:`LayerPasses.dense_pass`).

The experts of a mixture need one pass in all: it keeps what enters the experts and where each token is routed. Then
each expert's own tokens run through that expert alone, so the sums of one expert are in memory at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..core import LayerProblem, ProblemSums
from ..models.operators import Group
from ..passes.cached_outputs import CachedOutputs, kept_projections
from ..passes.store import HiddenStates, RoutedTokens
from ..passes.stream import Around, Watched, run_layer
from ..runtime.show import Clock
from ..structure.refit import ChannelStatistics, ChannelSums
from ..structure.units import Unit
from .context import LayerContext, LayerStreams, fitted_groups
from .drift import DenseActivations, ResidualDrift, drift_sources


class LayerPasses:
    """The passes of the calibration windows through one loaded decoder layer while it is pruned.

    Args:
        context: model, layout, settings.
        index: number of the layer.
        streams: hidden states in and out.
        clock: counts the time of every phase.
    """

    def __init__(self, context: LayerContext, index: int, streams: LayerStreams, clock: Clock) -> None:
        model, layout, recipe = context.model, context.layout, context.recipe
        self._context, self._index, self._streams, self._clock = context, index, streams, clock
        self._model, self._recipe = model, recipe
        self._layer = model.layers[index]
        groups = layout.layers[index]
        self.groups: list[tuple[int, Group]] = list(enumerate(groups))
        self.solved = context.solved(index)
        """Numbers of the groups that are solved."""
        numbers = {operator.name: number for number, group in self.groups for operator in group}
        self._cut: dict[int, int] = {}
        """By number of the group that loses inputs, the number of the group before which its channels are removed."""
        self._touched: set[int] = set()
        for unit in context.units(index):
            touched = {numbers[name] for name in unit.names if name in numbers}
            self._touched |= touched
            self._cut[numbers[unit.name]] = min(touched) if recipe.error_correction else 0
        self._cut_experts = {number for number in self._cut if groups[number][0].experts}
        self._channels: dict[int, ChannelSums] = {}
        self._fits_left = fitted_groups(layout, index, context.units(index), recipe)
        same = streams.pruned is None
        self._sources = (
            {}
            if streams.dense is None
            else drift_sources(recipe, layout, index, context.units(index), same=same, solved=self.solved)
        )
        self._activations: DenseActivations | None = None
        self._residual: ResidualDrift | None = None
        if streams.dense is not None:
            self._activations = DenseActivations(
                index, self._layer, groups, self._sources, streams.dense, context.scratch
            )
            if recipe.corrects_drift:
                writers = layout.residual_writers[index]
                self._residual = ResidualDrift(
                    index, self._layer, writers, groups, streams.dense, streams.seen, context.scratch
                )
        self._cached: CachedOutputs | None = None
        if recipe.error_correction:
            later_passes = int(streams.pruned_out is not None and not recipe.reconstruct)
            projections = kept_projections(layout, index, model.device)
            self._cached = CachedOutputs(
                index, self._layer, groups, projections, later_passes, streams.seen, context.scratch
            )
        self._sums: dict[int, ProblemSums] = {}
        self._mixtures: dict[int, list[Unit]] = {}
        """By number of the group before which its experts are removed."""
        for mixture in context.mixtures(index):
            first = next(number for number, group in self.groups if group[0].experts == mixture.name)
            self._mixtures.setdefault(first if recipe.error_correction else 0, []).append(mixture)
        self._routed: dict[str, RoutedTokens] = {}
        self._seen_mixtures: set[str] = set()
        self._routed_left = Counter(groups[number][0].experts for number in (*self.solved, *self._cut_experts))
        """By mixture, how often its tokens are still read."""
        self._first_out: Tensor | None = None  # of the dense layer, first batch: the report's error is measured on it
        self.wanted: HiddenStates | None = None
        """Output hidden states that block reconstruction trains towards; None without block reconstruction."""
        if recipe.reconstruct and groups:
            self.wanted = streams.dense_out or self._store("wanted")

    def dense_pass(self) -> None:
        """Run the dense layer once, if the dense model is needed.

        The pass gathers the sums of the groups whose inputs are the same in the pruned layer, keeps the dense inputs or
        outputs of the others, and writes the dense hidden states for the next layer.
        """
        streams = self._streams
        if streams.dense is None or not (self.groups or streams.dense_out is not None):
            return
        activations = self._activations
        assert activations is not None
        if streams.pruned is None:
            shared = self.groups[:1] if self._recipe.error_correction else [] if self._cut else self.groups
            for number, group in shared:
                if number in self.solved and number not in self._touched and not group[0].experts:
                    self._sums[number] = self._new_sums(number, group)
            for number, due in self._cut.items():
                if number in self._cut_experts:
                    continue
                earlier = any(other < number for other in self._cut) and self._recipe.error_correction
                if not self._fits_left and not earlier and not any(other < due for other in self.solved):
                    self._channels[number] = self._new_channel_sums(number, drifted=False)

        def keep(number: int, start: int, values: Tensor) -> None:
            with self._clock.phase("io"):
                activations.keep(number, start, values)

        def watch(number: int, start: int, inputs: Tensor) -> None:
            if number in self._channels:
                self._add_channels(number, start, inputs, drifted=False)
            else:
                (self._add if number in self._sums else keep)(number, start, inputs)

        def output(_: int, start: int, out: Tensor) -> None:
            if self._first_out is None:
                self._first_out = out
            store = streams.dense_out or self.wanted
            if store is not None:
                with self._clock.phase("io"):
                    store.write(start, out)

        groups = [
            (number, group)
            for number, group in self.groups
            if number in self._sums or number in self._channels or activations.wants(number)
        ]
        self._run(
            streams.dense,
            watched=Watched(groups, watch, activations.output_operators, keep),
            output=output,
            around=[] if self._residual is None else [self._residual.around_dense_pass],
        )

    def make_wanted(self) -> None:
        """Complete the outputs that block reconstruction trains towards, while nothing is pruned yet.

        They are the dense model's outputs, which the dense pass wrote; with ``target=pruned`` the dense layer's on
        drifted inputs, or a mixture of both, as for single operators.
        """
        if self.wanted is None:
            return
        streams, share = self._streams, self._recipe.dense_share
        if streams.dense is None:
            self._run(streams.seen, output=self.wanted)
        elif streams.pruned is not None and share < 1.0:
            mixed = self._store("mixed")
            self._run(streams.pruned, output=mixed)
            for start, stop in self._context.calls.batches(mixed.samples):
                mixed.write(
                    start,
                    torch.lerp(
                        mixed.read(start, stop, self._model.device, torch.float32),
                        self.wanted.read(start, stop, self._model.device, torch.float32),
                        share,
                    ),
                )
            self._close_wanted()
            self.wanted = mixed

    def sums_of(self, number: int) -> ProblemSums:
        """Hand over the sums of group ``number``, from a pass with the groups before it pruned.

        Without error correction all groups are solved on the inputs of the unpruned layer: one pass gathers them all.
        """
        if not self._recipe.error_correction:
            self._route({group[0].experts: None for other, group in self.groups if other in self.solved})
        if number not in self._sums:
            todo = self.groups[number : number + 1] if self._recipe.error_correction else self.groups[number:]
            todo = [(other, group) for other, group in todo if other in self.solved and other not in self._sums]
            if mixture := self.groups[number][1][0].experts:
                self._route([mixture])
                self._gather_expert(todo)
            else:
                self._gather([(other, group) for other, group in todo if not group[0].experts])
        if self._activations is not None:
            self._activations.close(number)
        self._read_routed(number)
        return self._sums.pop(number)

    def _gather(self, todo: list[tuple[int, Group]]) -> None:
        """Gather the sums of some groups in one pass."""
        for other, group in todo:
            self._sums[other] = self._new_sums(other, group)
        self._run(self._streams.seen, watched=Watched(todo, self._add), around=self._around())

    def _route(self, mixtures: Iterable[str]) -> None:
        """Keep what enters some modules of experts, in one pass; nothing for those that are kept already."""
        new = [name for name in mixtures if name and name not in self._seen_mixtures]
        if not new:
            return
        self._seen_mixtures.update(new)

        def keep(name: str, start: int, inputs: Tensor, chosen: Tensor, weights: Tensor) -> None:
            with self._clock.phase("io"):
                if name not in self._routed:
                    seen = self._streams.seen
                    shape = (seen.samples, seen.seqlen, inputs.shape[-1])
                    self._routed[name] = RoutedTokens(self._context.scratch(f"routed-{self._index}-{name}", shape))
                self._routed[name].keep(start, inputs, chosen, weights)

        self._run(self._streams.seen, watched=Watched(mixtures=new, routed=keep), around=self._around())

    def _gather_expert(self, todo: list[tuple[int, Group]]) -> None:
        """Gather sums of the first group in ``todo``, and of others of its expert, from the expert's tokens."""
        first = todo[0][1][0]
        same = [
            (number, group)
            for number, group in todo
            if group[0].experts == first.experts and group[0].expert == first.expert
        ]
        expert = self._layer.get_submodule(f"{first.experts}.{first.expert}")

        def add_to(number: int) -> Callable[..., None]:
            def pre_forward(_: object, args: tuple[Tensor, ...]) -> None:
                with self._clock.phase("gram"):
                    self._sums[number].add(args[0])

            return pre_forward

        with ExitStack() as hooks:
            for number, group in same:
                self._sums[number] = self._new_sums(number, group)
                operator = self._layer.get_submodule(group[0].name)
                hooks.enter_context(operator.register_forward_pre_hook(add_to(number)))
            for tokens, _ in self._routed[first.experts].weighted(first.expert, self._model.device):
                with self._clock.phase("capture"), torch.no_grad():
                    expert(tokens)

    def _read_routed(self, number: int) -> None:
        """Note that group ``number`` has read its tokens; release those that nothing reads again."""
        mixture = self.groups[number][1][0].experts
        self._routed_left[mixture] -= 1
        if mixture in self._routed and not self._routed_left[mixture]:
            self._routed.pop(mixture).close()

    def _around(self) -> list[Around]:
        return [part.around_pass for part in (self._cached, self._residual) if part is not None]

    def cut_before(self, number: int) -> list[int]:
        """Return the groups whose inputs are removed before group ``number`` is pruned."""
        return [consumer for consumer, due in sorted(self._cut.items()) if due == number]

    def mixtures_before(self, number: int) -> list[Unit]:
        """Return the mixtures that lose experts before group ``number`` is pruned."""
        return self._mixtures.get(number, [])

    def routed_to(self, mixture: str) -> RoutedTokens:
        """Return what enters a module of experts, from a pass with the groups before it pruned.

        It is kept until :meth:`rerouted`.
        """
        self._route([mixture])
        return self._routed[mixture]

    def rerouted(self, mixture: str) -> None:
        """Note that a mixture has lost experts, so that its tokens go elsewhere."""
        self._routed.pop(mixture).close()
        self._seen_mixtures.discard(mixture)

    def channels_of(self, number: int) -> ChannelStatistics:
        """Hand over what is known of the inputs of group ``number``, one operator that loses some of them.

        They come from a pass with the groups before it pruned, while all of its channels are still there.
        """
        (operator,) = self._context.layout.layers[self._index][number]
        groups = self._context.layout.layers[self._index]
        if not self._recipe.error_correction:
            self._route({groups[other][0].experts: None for other in sorted(self._cut_experts)})
        if number in self._cut_experts:
            self._gather_expert_channels(number)
        elif number not in self._channels:
            # Without error correction, one pass of the layer as it was serves all units, unless they are fitted (goa).
            alone = self._recipe.error_correction or self._fits_left
            together = [number] if alone else sorted(self._cut.keys() - self._channels - self._cut_experts)
            for each in together:
                self._channels[each] = self._new_channel_sums(each, drifted=each in self._sources)

            def add(number: int, start: int, inputs: Tensor) -> None:
                self._add_channels(number, start, inputs, drifted=number in self._sources)

            # Cached outputs would keep inputs of the operator that is next, with the channels that go.
            cached = None if self._cut[number] == number else self._cached
            parts = (cached, self._residual if self._first_writer_is_final(number) else None)
            around = [part.around_pass for part in parts if part is not None]
            watched = Watched([(each, groups[each]) for each in together], add)
            self._run(self._streams.seen, watched=watched, around=around)
        if self._activations is not None and number not in self.solved:
            self._activations.close(number)
        with self._clock.phase("problem"):
            name = self._context.layout.full_name(self._index, operator)
            return self._channels.pop(number).statistics(name, self._recipe.dense_share)

    def _gather_expert_channels(self, number: int) -> None:
        """Gather what is known of the channels of one expert, from the tokens that are routed to it."""
        (operator,) = self._context.layout.layers[self._index][number]
        self._route([operator.experts])
        self._channels[number] = sums = self._new_channel_sums(number, drifted=False)
        expert = self._layer.get_submodule(f"{operator.experts}.{operator.expert}")
        seen: list[Tensor] = []

        def pre_forward(_: object, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])

        with self._layer.get_submodule(operator.name).register_forward_pre_hook(pre_forward):
            for first, tokens in self._routed[operator.experts].by_half(operator.expert, self._model.device):
                with self._clock.phase("capture"), torch.no_grad():
                    expert(tokens)
                with self._clock.phase("gram"):
                    sums.add_tokens(first, seen.pop())
        self._read_routed(number)

    def fitting_problem(self, number: int) -> LayerProblem:
        """Gather the problem of group ``number`` before it loses outputs, on the layer as it is."""
        group = self._context.layout.layers[self._index][number]
        self._gather([(number, group)])
        self._fits_left[number] -= 1
        if self._activations is not None and not self._fits_left[number]:
            self._activations.close(number)
        with self._clock.phase("problem"):
            name = "+".join(self._context.names(self._index, group))
            return self._sums.pop(number).problem(name, self._recipe.dense_share, release=True)

    @property
    def seen(self) -> HiddenStates:
        """Return the hidden states that enter the layer."""
        return self._streams.seen

    def pruned(self, number: int) -> None:
        """Note that the operators of group ``number`` have their final weights in the layer."""
        if self._cached is not None:
            self._cached.pruned(number)

    def output_pass(self) -> float | None:
        """Write the pruned layer's output for the next layer, and release what was kept.

        Returns:
            Squared difference of the pruned and the dense layer's output, as a share of what the dense layer adds to
            its input; None where the dense output was not computed.
        """
        self._close_wanted()
        if self._residual is not None:
            self._residual.close()
        if self._streams.pruned_out is not None:
            last = [] if self._recipe.reconstruct or self._cached is None else [self._cached.around_pass]
            self._run(self._streams.seen, output=self._streams.pruned_out, around=last)
        if self._cached is not None:
            self._cached.close()
        if not self.groups or self._first_out is None or self._streams.dense is None:
            return None
        return self._output_error(self._streams.dense, self._first_out)

    def _run(self, inputs: HiddenStates, **what: Any) -> None:
        run_layer(self._model, self._index, inputs, self._context.calls, clock=self._clock, **what)

    def _store(self, name: str) -> HiddenStates:
        """Make a store for output hidden states of all windows."""
        seen = self._streams.seen
        return self._context.scratch(f"{name}-{self._index}", (seen.samples, seen.seqlen, self._model.width))

    def _new_sums(self, number: int, group: Group) -> ProblemSums:
        with self._clock.phase("gram"):
            return ProblemSums(_stacked(self._layer, group), drift_from=self._sources.get(number))

    def _new_channel_sums(self, number: int, *, drifted: bool) -> ChannelSums:
        with self._clock.phase("gram"):
            weight = _stacked(self._layer, self._context.layout.layers[self._index][number])
            source = self._sources.get(number) if drifted else None
            routed = number in self._cut_experts
            return ChannelSums(weight, self._streams.seen.samples, drift_from=source, routed=routed)

    def _add(self, number: int, start: int, inputs: Tensor) -> None:
        """Add the inputs of a batch of windows, (windows, seqlen, n), to the sums of group ``number``."""
        with self._clock.phase("gram"):
            dense, drift = self._drift(number, start, inputs)
            self._sums[number].add(inputs.reshape(-1, inputs.shape[-1]), dense, drift)

    def _add_channels(self, number: int, start: int, inputs: Tensor, *, drifted: bool) -> None:
        """Add the inputs of a batch of windows to what is known of the channels of group ``number``."""
        with self._clock.phase("gram"):
            dense, drift = self._drift(number, start, inputs) if drifted else (None, None)
            self._channels[number].add(start, inputs, dense, drift if self._first_writer_is_final(number) else None)

    def _first_writer_is_final(self, number: int) -> bool:
        """Return whether the first writer to the residual stream is final when group ``number`` loses inputs."""
        first = self._context.layout.residual_writers[self._index][:1]
        return not any(
            other in self.solved and other >= self._cut[number]
            for other, group in self.groups
            if group[0].name in first
        )

    def _drift(self, number: int, start: int, inputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Read the dense model's inputs or outputs, and the drift of residual stream and bias."""
        stop = start + inputs.shape[0]
        dense = drift = None
        if self._activations is not None:
            dense = self._activations.read(number, start, stop, inputs.device)
        if dense is not None and self._residual is not None and number in self._residual:
            drift = self._residual.drift(number, start, stop, inputs.device)
        if dense is not None and self._activations is not None and number in self._cut:  # no other bias changes
            bias = self._activations.bias_drift(number)
            if bias is not None:
                drift = bias.expand(len(dense), -1) if drift is None else drift.add_(bias)
        return dense, drift

    def _close_wanted(self) -> None:
        if self.wanted is not None and self.wanted is not self._streams.dense_out:
            self.wanted.close()

    def _output_error(self, dense: HiddenStates, dense_out: Tensor) -> float:
        """Compute what :meth:`output_pass` returns, on the first batch.

        It takes a pass of that batch with nothing watched, timed as ``plain``: the report compares it with ``capture``.

        Args:
            dense: hidden states that enter the dense layer.
            dense_out: the dense layer's output of the first batch.
        """
        count = dense_out.shape[0]
        seen = self._streams.seen.read(0, count, self._model.device)
        with self._clock.phase("plain"), torch.no_grad():
            pruned_out = self._model.run(self._index, seen, self._context.calls.by_size[count][self._index])
        dense_in = dense.read(0, count, self._model.device)
        added = (dense_out.float() - dense_in.float()).square().sum(dtype=torch.float64)
        wrong = (pruned_out.float() - dense_out.float()).square().sum(dtype=torch.float64)
        return float(wrong) / max(float(added), 1e-300)


def _stacked(module: nn.Module, group: Group) -> Tensor:
    """Stack the weights of a group's operators by rows, in fp32."""
    weights = [operator.weight(module) for operator in group]
    stacked = torch.empty(sum(len(weight) for weight in weights), weights[0].shape[1], device=weights[0].device)
    for part, weight in zip(stacked.split([len(weight) for weight in weights]), weights, strict=True):
        part.copy_(weight)
    return stacked

"""Record dense activations, so that targets can correct drift of the pruned hidden states.

*Inputs.* A target that is, in part, the dense model's output (docs/methods.md) needs what every group of operators
reads in the dense model, or its output there. The layer's dense pass stores it until the group's own pass.

*Residuals* (``residual: correct``). The outputs of ``o_proj`` and ``down_proj`` are added to the residual stream.
Drift of that stream from earlier pruning reaches every later layer, and these operators can correct it: their target
becomes what the dense model has after the addition. A few tokens with massive activations would dominate that target,
so the drift of a token is cut to a length that is typical of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..core.sums import DriftFrom, cheapest_drift
from ..models.operators import Group, Layout, Operator
from ..passes.store import HiddenStates
from ..settings.prune import Recipe
from .context import LayerContext, LayerStreams

DRIFT_NOISE = 1 / 128
"""Largest noise of drift from measuring it on fewer windows, in inputs / tokens (docs/results.md)."""

LONGEST = 1.5
"""Longest corrected drift of a token, in medians over the tokens of a batch with drift (docs/results.md)."""


def dense_windows(
    recipe: Recipe, layout: Layout, samples: int, seqlen: int, batch_size: int, *, noise: float = DRIFT_NOISE
) -> int:
    """Return the number of windows that the dense model runs on beside the pruned one: whole batches.

    With ``propagate=pruned`` the dense model serves to measure drift only. Fewer tokens add to the noise of that
    ``n (1 / tokens - 1 / all tokens)`` for an operator of n inputs: there are as many as keep the widest operator's
    below ``noise``. Block reconstruction trains towards the dense model's outputs and takes all windows.
    """
    if recipe.propagate == "dense" or recipe.reconstruct or not recipe.dense_share:
        return samples
    inputs = max((operator.columns for _, operator in layout.operators()), default=0)
    windows = samples * inputs / (inputs + samples * seqlen * noise)
    return min(samples, math.ceil(windows / batch_size) * batch_size)


def drift_sources(context: LayerContext, index: int, *, same: bool) -> dict[int, DriftFrom]:
    """Choose what to record of each group: inputs where shared or where outputs go, else the cheaper.

    ``same``: the input of decoder layer ``index`` is the dense model's. Returns what is recorded, by number of the
    groups whose inputs drift; nothing where the target does not depend on it. Operators of experts are not among them:
    the dense model routes other tokens to an expert. Of a group that loses input channels the outputs are recorded,
    since its inputs are others afterwards.
    """
    recipe, layout, groups = context.recipe, context.layout, context.layout.layers[index]
    if not recipe.dense_share:
        return {}
    consumers, solved = {unit.name for unit in context.widths.channels(index)}, context.solved(index)
    cut = [number for number, (first, *_) in enumerate(groups) if first.name in consumers and not first.experts]
    narrowed, fitted = context.narrowed(index), context.fitted(index)

    def source(number: int) -> DriftFrom:
        operator, *others = groups[number]
        corrected = recipe.corrects_drift and operator.name in layout.residual_writers[index]
        if others or number in narrowed:
            return "inputs"
        return cheapest_drift(operator.rows, operator.columns, corrected=corrected)

    drifting: Collection[int] = () if same and not recipe.error_correction else range(int(same), len(groups))
    found: dict[int, DriftFrom] = {
        number: source(number) for number in drifting if number in solved and not groups[number][0].experts
    }
    found |= {number: "inputs" for number in drifting if number in fitted}
    for number in cut:
        earlier = recipe.error_correction and any(other < number for other in (*solved, *cut, *fitted))
        if not same or number in solved or earlier:
            found[number] = "outputs"
    return dict(sorted(found.items()))


def kept_width(group: Group, source: DriftFrom) -> int:
    """Return the number of values stored for each token of ``group``."""
    return group[0].columns if source == "inputs" else group[0].rows


class Drift:
    """What one decoder layer has in the dense model, stored until the passes of the groups that need it.

    Nothing is stored, and nothing drifts, where no dense model runs beside the pruned one. The dense hidden states of
    ``streams`` are perhaps of the first windows only.
    """

    def __init__(self, context: LayerContext, index: int, streams: LayerStreams) -> None:
        recipe, layout, groups = context.recipe, context.layout, context.layout.layers[index]
        self._layer, self._dense, self._seen = context.model.layers[index], streams.dense, streams.seen
        self.sources: dict[int, DriftFrom] = {}
        """By number, what is recorded of a group."""
        self.outputs: list[tuple[int, Operator]] = []
        """(group, operator) of the operators whose outputs are recorded."""
        self._kept: dict[int, HiddenStates] = {}
        self._biases: dict[int, Tensor] = {}
        self._writers: list[int | None] = [None, None]  # groups that add to a residual stream that has drifted
        self._residual: HiddenStates | None = None  # the dense stream before the second; then its difference
        self._subtracted = 0  # windows of which it is the difference
        if (dense := streams.dense) is None:
            return
        same = streams.pruned is None
        self.sources = drift_sources(context, index, same=same)
        self.outputs = [(number, groups[number][0]) for number, source in self.sources.items() if source == "outputs"]
        for number, operator in self.outputs:
            if (bias := self._layer.get_submodule(operator.name).bias) is not None:
                self._biases[number] = bias.detach().to(torch.float32, copy=True)  # type: ignore[operator]
        for number, source in self.sources.items():
            shape = dense.samples, dense.seqlen, kept_width(groups[number], source)
            self._kept[number] = context.scratch(f"dense-{index}-{number}", shape)
        if recipe.corrects_drift:
            alone = {group[0].name: number for number, group in enumerate(groups) if len(group) == 1}
            writers = layout.residual_writers[index]  # known architectures have no third
            first, second = (alone.get(name) for name in (*writers, "", "")[:2])
            self._writers = [None if same else first, second]
            if second is not None:
                self._first = self._layer.get_submodule(writers[0])
                self._residual = context.scratch(f"residual-{index}", (dense.samples, dense.seqlen, dense.width))

    def keep(self, number: int, start: int, values: Tensor) -> None:
        """Store activations of group ``number`` from window ``start`` on: (windows, seqlen, n or m)."""
        self._kept[number].write(start, values)

    def of(self, number: int, start: int, inputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Read what group ``number`` has in the dense model, in the windows of ``inputs`` from ``start`` on.

        Returns:
            (tokens, n) inputs or (tokens, m) outputs without bias, None where the inputs do not drift or the dense
            model did not run on these windows; and the (tokens, m) drift of residual stream and bias, None without.
        """
        kept, stop, drift = self._kept.get(number), start + len(inputs), None
        if kept is None or start >= kept.samples:
            return None, None
        dense = kept.read(start, stop, inputs.device).flatten(0, 1)
        if number in self._writers:
            drift = self._residual_drift(number, start, stop, inputs.device)
        if number in self._biases:
            before = self._biases[number]
            dense = dense.float() - before
            moved = before - self._layer.get_submodule(dict(self.outputs)[number].name).bias  # type: ignore[operator]
            if bool(moved.any()):
                drift = moved.expand(len(dense), -1) if drift is None else drift.add_(moved)
        return dense, drift

    def close(self, number: int) -> None:
        """Release the stored activations of group ``number``."""
        if number in self._kept:
            self._kept.pop(number).close()

    def close_residual(self) -> None:
        """Release the stored residual stream."""
        if self._residual is not None:
            self._residual.close()
            self._residual = None

    def _residual_drift(self, number: int, start: int, stop: int, device: torch.device) -> Tensor:
        """Compute the drift, (tokens, width), of the residual stream that group ``number`` adds to; cut."""
        if number == self._writers[0]:
            assert self._dense is not None
            drift = self._dense.read(start, stop, device, torch.float32).sub_(self._seen.read(start, stop, device))
        else:
            assert self._residual is not None
            drift = self._residual.read(start, stop, device, torch.float32)
        drift = drift.reshape(-1, drift.shape[-1])
        length = drift.norm(dim=1, keepdim=True)
        # Of the tokens with drift: where most of a batch have none, the median of all would be zero.
        typical = torch.where(length > 0, length, torch.nan).nanmedian().nan_to_num()
        short = (LONGEST * typical / length.clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(1.0)
        return drift.mul_(short)

    @contextmanager
    def around_pass(self, windows: Callable[[], tuple[int, int]], *, pruned: bool = True) -> Iterator[None]:
        """Store the dense stream behind the first writer; subtract the pruned one where its output is final.

        ``windows`` returns (start, stop) of the batch at work; ``pruned``: it is the first pass with the final output.
        """
        kept, inputs = self._residual, self._seen if pruned else self._dense
        if kept is None or inputs is None or self._subtracted == kept.samples:
            yield
            return

        def after_forward(_: object, __: object, output: Tensor) -> None:
            start, stop = windows()
            if start >= kept.samples:
                return
            stream = inputs.read(start, stop, output.device, torch.float32)
            stream.add_(output.reshape(stream.shape))
            if pruned:
                stream.neg_().add_(kept.read(start, stop, stream.device))
                self._subtracted += stop - start
            kept.write(start, stream)

        with self._first.register_forward_hook(after_forward):
            yield

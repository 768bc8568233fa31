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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ..core.sums import DriftFrom, cheapest_drift
from ..models.layout import Group, Layout, Operator
from ..passes.store import HiddenStates, Store
from ..settings.prune import Recipe
from ..structure.units import Unit
from .context import fitted_groups, narrowed_groups

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
    below ``noise``. Block reconstruction trains towards the dense model's outputs, window by window, and takes all
    windows.
    """
    if recipe.propagate == "dense" or recipe.reconstruct or not recipe.dense_share:
        return samples
    inputs = max((operator.columns for _, operator in layout.operators()), default=0)
    windows = samples * inputs / (inputs + samples * seqlen * noise)
    return min(samples, math.ceil(windows / batch_size) * batch_size)


def drift_sources(
    recipe: Recipe,
    layout: Layout,
    index: int,
    units: Sequence[Unit],
    *,
    same: bool,
    solved: Collection[int],
) -> dict[int, DriftFrom]:
    """Choose what to record of each group: inputs where shared or where outputs go, else the cheaper.

    Of a group that loses input channels it is the outputs: its inputs are others afterwards, and the outputs drift
    wherever channels are missing. Of one that loses outputs it is the inputs: the dense outputs are more than those
    that stay.

    Args:
        recipe: settings.
        layout: the operators to prune.
        index: number of the decoder layer.
        units: whose channels are removed from it.
        same: the layer's input is the dense model's.
        solved: numbers of the groups that are solved.

    Returns:
        By number, the groups whose inputs drift; empty where the target does not depend on it. Operators of experts
        are not among them: the dense model routes other tokens to an expert.
    """
    groups = layout.layers[index]
    if not recipe.dense_share:
        return {}
    consumers = {unit.name for unit in units}
    cut = [number for number, (first, *_) in enumerate(groups) if first.name in consumers and not first.experts]
    narrowed, fitted = narrowed_groups(layout, index, units), fitted_groups(layout, index, units, recipe)

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


class DenseActivations:
    """Activations of one dense decoder layer, stored until the passes of the groups that need them.

    Args:
        index: number of the decoder layer; it is part of the stores' names.
        layer: the loaded decoder layer.
        groups: its pruned operators.
        sources: :func:`drift_sources`.
        dense: hidden states that enter the dense layer; perhaps of the first windows only.
        store: makes the stores.
    """

    def __init__(
        self,
        index: int,
        layer: nn.Module,
        groups: Sequence[Group],
        sources: Mapping[int, DriftFrom],
        dense: HiddenStates,
        store: Store,
    ) -> None:
        self._layer = layer
        self._operators = {number: groups[number][0] for number in sources}
        self._sources = sources
        self._biases = {
            number: bias.detach().to(torch.float32, copy=True)  # type: ignore[operator]
            for number, operator in self.output_operators
            if (bias := layer.get_submodule(operator.name).bias) is not None
        }
        self._kept = {
            number: store(f"dense-{index}-{number}", (dense.samples, dense.seqlen, kept_width(groups[number], source)))
            for number, source in sources.items()
        }

    def wants(self, number: int) -> bool:
        """Return whether the inputs of group ``number`` are recorded."""
        return self._sources.get(number) == "inputs"

    @property
    def output_operators(self) -> list[tuple[int, Operator]]:
        """Return (group, operator) of the operators whose outputs are recorded."""
        return [
            (number, operator) for number, operator in self._operators.items() if self._sources[number] == "outputs"
        ]

    def keep(self, number: int, start: int, values: Tensor) -> None:
        """Store activations of group ``number`` from window ``start`` on: (windows, seqlen, n or m)."""
        self._kept[number].write(start, values)

    def read(self, number: int, start: int, stop: int, device: torch.device) -> Tensor | None:
        """Read the activations of group ``number`` in windows ``start`` to ``stop``.

        Returns:
            (tokens, n) inputs or (tokens, m) outputs without bias; None where the inputs do not drift, or the dense
            model did not run on these windows.
        """
        kept = self._kept.get(number)
        if kept is None or start >= kept.samples:
            return None
        values = kept.read(start, stop, device).flatten(0, 1)
        return values.float() - self._biases[number] if number in self._biases else values

    def bias_drift(self, number: int) -> Tensor | None:
        """Return the dense bias of group ``number`` less the present one, (m,); None where they are the same."""
        if number not in self._biases:
            return None
        bias = self._layer.get_submodule(self._operators[number].name).bias
        drift = self._biases[number] - bias  # type: ignore[operator]
        return drift if bool(drift.any()) else None

    def close(self, number: int) -> None:
        """Release the stored activations of group ``number``."""
        if number in self._kept:
            self._kept.pop(number).close()


class ResidualDrift:
    """Drift ``S - S*`` of the residual stream where operators of one decoder layer add to it.

    The first writer adds to the layer's input, the second to the sum. Known architectures have no third.

    Args:
        index: number of the decoder layer; it is part of the store's name.
        layer: the loaded decoder layer.
        writers: names of the operators that write to the residual stream, in execution order.
        groups: the pruned operators.
        dense: hidden states that enter the dense layer; perhaps of the first windows only.
        seen: hidden states that enter the pruned layer; the same object where nothing was pruned before.
        store: makes the store.
    """

    def __init__(
        self,
        index: int,
        layer: nn.Module,
        writers: Sequence[str],
        groups: Sequence[Group],
        dense: HiddenStates,
        seen: HiddenStates,
        store: Store,
    ) -> None:
        self._dense = dense
        self._seen = seen
        alone = {group[0].name: number for number, group in enumerate(groups) if len(group) == 1}
        first, second = (alone.get(name) for name in (*writers, "", "")[:2])
        self._first = first if seen is not dense else None
        self._second = second
        self._kept: HiddenStates | None = None
        if second is not None:
            self._before = layer.get_submodule(writers[0])
            # The dense model's hidden states, then their difference from the pruned model's.
            self._kept = store(f"residual-{index}", (dense.samples, dense.seqlen, dense.width))
        self._windows = 0

    def __contains__(self, number: object) -> bool:
        """Return whether group ``number`` adds to a residual stream that has drifted."""
        return number is not None and number in (self._first, self._second)

    def drift(self, number: int, start: int, stop: int, device: torch.device) -> Tensor:
        """Compute ``S - S*`` of group ``number`` in windows ``start`` to ``stop``.

        Returns:
            (tokens, width); drift longer than :data:`LONGEST` is cut.
        """
        if number == self._first:
            drift = self._dense.read(start, stop, device, torch.float32).sub_(self._seen.read(start, stop, device))
        else:
            assert self._kept is not None
            drift = self._kept.read(start, stop, device, torch.float32)
        drift = drift.reshape(-1, drift.shape[-1])
        length = drift.norm(dim=1, keepdim=True)
        # Of the tokens with drift: where most of a batch have none, the median of all would be zero.
        typical = torch.where(length > 0, length, torch.nan).nanmedian().nan_to_num()
        short = (LONGEST * typical / length.clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(1.0)
        return drift.mul_(short)

    def around_dense_pass(self, batch: Callable[[], tuple[int, int]]) -> AbstractContextManager[None]:
        """Store the dense stream before the second writer; ``batch`` returns the windows (start, stop)."""
        return self._after_first(self._dense, batch, HiddenStates.write)

    def around_pass(self, batch: Callable[[], tuple[int, int]]) -> AbstractContextManager[None]:
        """Subtract the pruned stream in the first pass that runs the first writer, whose output is final then."""
        if self._kept is None or self._windows == self._kept.samples:
            return nullcontext()
        return self._after_first(self._seen, batch, self._subtract)

    def close(self) -> None:
        """Release the store."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def _subtract(self, kept: HiddenStates, start: int, sums: Tensor) -> None:
        """Replace the stored dense stream by its difference from the pruned one, ``sums``."""
        stop = start + sums.shape[0]
        kept.write(start, sums.neg_().add_(kept.read(start, stop, sums.device)))
        self._windows += stop - start

    @contextmanager
    def _after_first(
        self,
        inputs: HiddenStates,
        batch: Callable[[], tuple[int, int]],
        receive: Callable[[HiddenStates, int, Tensor], None],
    ) -> Iterator[None]:
        """Pass the stream before the second writer to ``receive``: (store, first window, hidden states)."""
        if self._kept is None:
            yield
            return
        kept = self._kept

        def after_forward(_: object, __: object, output: Tensor) -> None:
            start, stop = batch()
            if start >= kept.samples:
                return
            before = inputs.read(start, stop, output.device, torch.float32)
            receive(kept, start, before.add_(output.reshape(before.shape)))

        with self._before.register_forward_hook(after_forward):
            yield

"""Block reconstruction: train a pruned decoder layer to give the dense layer's output, masks frozen.

Solvers see one operator at a time; how their errors combine shows only in the output of the whole layer. So after a
layer is pruned, its surviving weights, norms and biases take some AdamW steps on

    mean over tokens of  w_t (y_t - y*_t)^T M (y_t - y*_t),

with ``y`` the pruned layer's output, ``y*`` the dense layer's, ``M`` the Fisher second moment of the model's loss at
that output (:mod:`fistapruner.allocate.fisher`; the identity where it was not measured or is zero), and ``w_t`` 1
up to the median energy of what the layer adds to a token (of the first window), and falling as its inverse above: the
squares of tokens with massive activations would dominate the mean.

Of an operator with a low-rank part, the sum of both parts in the passes, both factors take the steps, too. Some
calibration windows are for validation only (:mod:`.loop`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.linalg import exact_in_fast_products, fast_products, shrunk_root
from ..models.layers import LayerwiseModel
from ..models.low_rank import A, B, sum_of_parts
from ..models.operators import Group
from ..passes.store import HiddenStates
from ..passes.stream import Calls
from ..runtime.numerics import ordered_attention
from .loop import CHECKS, Loop
from .masked import ITSELF, Form, Masters, TrainedLayer, root_mean_square

RATE = 0.01  # first step size of AdamW, as a share of a tensor's root mean square over surviving weights

VALIDATE_EVERY = MAX_VALIDATION_WINDOWS = 8  # every 8th window, at most 8: more would not change the choice

SHRINKAGE = 0.1  # share of the metric that its mean eigenvalue replaces, since it was measured on few tokens


@dataclass(frozen=True)
class _SumOfParts(Form):
    """A sparse and a low-rank part of one operator, both trained: (m, n), A and B, by short name."""

    operator: str
    parts: Mapping[str, Tensor]

    def start(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {short: part.float().clone() for short, part in self.parts.items()}

    def weight(self, weight: Tensor, masters: Mapping[str, Tensor]) -> Tensor:
        return masters[ITSELF] + masters[B] @ masters[A]


def reconstruct_layer(
    model: LayerwiseModel,
    index: int,
    groups: Sequence[Group],
    inputs: HiddenStates,
    wanted: HiddenStates,
    calls: Calls,
    parts: Mapping[str, Tensor],
    metric: Tensor | None,
    steps: int,
    seed: int = 0,
    rate: float = RATE,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train the loaded, pruned decoder layer ``index`` in place; only ``groups`` and vectors change.

    Args:
        inputs: hidden states that enter the layer; ``wanted``: output hidden states to match.
        parts: sparse and low-rank parts of operators whose sum the layer holds: by checkpoint name, and by operator
            name with :data:`~fistapruner.models.low_rank.A` or ``B``.
        metric: of output errors, (width, width), positive semi-definite, or its (width,) diagonal; None: identity.
        seed: draws the windows of the AdamW ``steps``; ``rate``: first step size.

    Returns:
        Changed tensors by checkpoint name, rounded as stored, on the CPU; and what the report says of the steps.
    """
    # Activations of a bf16 model have no more digits than its matrix units take.
    with fast_products(exact_in_fast_products(model.dtype, model.device)), ordered_attention(model.device):
        layer = TrainedLayer(model, index, _forms(model, index, groups, parts))
        rates = {key: rate * root_mean_square(each.detach()) for key, each in layer.masters.items()}
        masters = Masters(dict(layer.masters), rates, layer.masked)
        loss = BlockLoss(inputs, wanted, metric, model.device)
        held, train = _split(inputs.samples)
        generator = torch.Generator().manual_seed((seed * 100_003 + index) % 2**63)
        turns = (torch.randperm(len(train), generator=generator).tolist() for _ in range(0, steps, len(train)))
        order = [train[at] for turn in turns for at in turn]
        # A power of two, exact: gradients of a mean over a window's values are too small for fp16.
        up = 2.0 ** math.ceil(math.log2(inputs.seqlen * inputs.width)) if model.dtype == torch.float16 else 1.0

        def value(window: int) -> Tensor:
            return loss(layer(loss.inputs(window), *calls.by_size[1][index]), window)

        def step(number: int, factor: float) -> tuple[float, float]:
            with torch.enable_grad():
                found = value(order[number - 1])
                (found * up).backward()
            for each in (each for each in layer.masters.values() if each.grad is not None):
                each.grad.div_(up)
            return float(found.detach()), masters.step(factor)

        def held_out() -> tuple[float, dict[str, float]]:
            with torch.no_grad():
                return sum(float(value(window)) for window in held) / len(held), {}

        state = Loop(masters, steps, step, held_out).run()
    # With exact products: the sum of both parts has the bits that a resumed run and an evaluation compute.
    weights = _write(model, index, layer) if state.best_step else {}
    steps_taken = {"steps": state.step, "kept_step": state.best_step, "held_out_windows": len(held)}
    return weights, {**steps_taken, "held_out_before": state.before, "held_out_after": state.best}


def _forms(
    model: LayerwiseModel, index: int, groups: Sequence[Group], parts: Mapping[str, Tensor]
) -> dict[str, tuple[Form, bool]]:
    """Return the form of each pruned weight by its name inside the layer, and whether it is transposed."""
    forms: dict[str, tuple[Form, bool]] = {}
    for operator in (operator for group in groups for operator in group):
        name, form = model.full_name(index, operator.name), Form()
        if name + A in parts:
            sparse = parts[model.source(f"{name}.weight")]
            found = {ITSELF: sparse.T if operator.transposed else sparse, A: parts[name + A], B: parts[name + B]}
            form = _SumOfParts(name, {short: part.to(model.device, model.dtype) for short, part in found.items()})
        forms[f"{operator.name}.weight"] = (form, operator.transposed)
    return forms


@torch.no_grad()
def _write(model: LayerwiseModel, index: int, trained: TrainedLayer) -> dict[str, Tensor]:
    """Write trained values into the layer, rounded as stored; return them by their names in the journal."""
    stored = {}
    for name, shorts in trained.keys.items():
        parameter, source = trained.layer.get_parameter(name), model.source_of(index, name)
        masters = {short: trained.masters[key].to(parameter.dtype) for short, key in shorts.items()}
        form, transposed = trained.forms[name]
        start = trained.matrix(name, form.parts[ITSELF]) if isinstance(form, _SumOfParts) else parameter
        value = model.rounded(source, trained.matrix(name, masters.pop(ITSELF))).to(parameter.dtype)
        if name in trained.pruned:  # a survivor that rounds to zero stays as it was
            value = torch.where((value == 0) | (start == 0), start, value)
        stored[source] = model.result(source, value.contiguous())
        if isinstance(form, _SumOfParts):
            for suffix, factor in masters.items():
                stored[form.operator + suffix] = model.result(source, model.rounded(source, factor).contiguous())
            parts = stored[source], stored[form.operator + A], stored[form.operator + B]
            value = sum_of_parts(*parts, transposed=transposed).to(parameter.dtype)
        parameter.copy_(value)
    return stored


class BlockLoss:
    """The loss of one window: a weighted mean over tokens, in units of what is added to a typical token."""

    def __init__(self, source: HiddenStates, wanted: HiddenStates, metric: Tensor | None, device: torch.device) -> None:
        self.source, self.wanted, self.device = source, wanted, device
        self.root = None if metric is None else shrunk_root(metric.to(device), SHRINKAGE)
        self._weights: dict[int, Tensor] = {}
        self.limit = self._added(0).median().clamp_min(1e-30)

    def inputs(self, window: int) -> Tensor:
        """Return the (1, seqlen, width) hidden states of a window that enter the layer."""
        return self.source.read(window, window + 1, self.device)

    def _target(self, window: int) -> Tensor:
        return self.wanted.read(window, window + 1, self.device, torch.float32)

    def _energy(self, difference: Tensor) -> Tensor:
        """Return the (1, seqlen) squared lengths in the metric."""
        if self.root is not None:
            difference = difference * self.root if self.root.ndim == 1 else difference @ self.root
        return difference.square().sum(-1)

    @torch.no_grad()
    def _added(self, window: int) -> Tensor:
        """Return the (1, seqlen) energies of what the layer adds to each token."""
        return self._energy(self._target(window) - self.inputs(window).float())

    def __call__(self, output: Tensor, window: int) -> Tensor:
        """Compute the loss of a window's (1, seqlen, width) output."""
        if window not in self._weights:
            self._weights[window] = (self.limit / self._added(window)).clamp_max(1.0)
        errors = self._energy(output.float() - self._target(window))
        return (self._weights[window] * errors).mean() / self.limit


def _split(samples: int) -> tuple[list[int], list[int]]:
    """Split windows into validation (1 to :data:`MAX_VALIDATION_WINDOWS`) and training; one is both."""
    apart = max(VALIDATE_EVERY, -(-samples // MAX_VALIDATION_WINDOWS))
    held = list(range(apart - 1, samples, apart)) or [samples - 1]
    return held, [window for window in range(samples) if window not in held] or held


def passes(steps: int, samples: int) -> int:
    """Count the forward passes of one window that so many steps take; a backward pass counts two."""
    return 3 * steps + (1 + min(steps, CHECKS)) * len(_split(samples)[0])

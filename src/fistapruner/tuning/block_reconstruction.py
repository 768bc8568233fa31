"""Block reconstruction: train a pruned decoder layer to give the dense layer's output, masks frozen.

Solvers see one operator at a time. How their errors combine, behind the non-linearities and in the residual stream,
shows only in the output of the whole layer. So after a layer is pruned, its surviving weights, norms and biases take
some Adam steps (Kingma & Ba 2015) on

    mean over tokens of  w_t (y_t - y*_t)^T M (y_t - y*_t),

with ``y`` the pruned layer's output, ``y*`` the dense layer's, ``M`` the Fisher second moment of the model's loss at
that output (:mod:`fistapruner.allocate.fisher`; the identity where it was not measured or is zero), and ``w_t`` 1
up to the median energy of what the layer adds to a token (of the first window), and falling as its inverse above: the
squares of tokens with massive activations would dominate the mean.

An operator with a low-rank part is the sum of both parts in the passes; its surviving weights and both factors take the
steps.

Some calibration windows are for validation only. They decide which step's weights are kept (the pruned layer's own are
the first candidate), when the step size falls, and when training stops.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..activations.store import HiddenStates
from ..activations.stream import Calls
from ..core.linalg import damped_cholesky, exact_in_fast_products, fast_products
from ..models.files.low_rank import A, B, sum_of_parts
from ..models.layerwise import LayerwiseModel, hidden_of
from ..models.layout import Group
from ..runtime.numerics import ordered_attention
from .adamw import CHECKS, Patience, Verdict, check_due, schedule
from .masked import MaskedParameters
from .trained import vectors

RATE = 0.01
"""First step size of Adam, as a share of a tensor's root mean square over surviving weights; a cosine takes it to 0."""

VALIDATE_EVERY = 8
"""Every 8th calibration window is a validation window,"""

MAX_VALIDATION_WINDOWS = 8
"""but at most 8 of them: more would not change the choice, and take time."""

SHRINKAGE = 0.1
"""Share of the metric that is replaced by its mean eigenvalue, since it was measured on few tokens."""


@dataclass(frozen=True)
class ReconstructionSettings:
    """Settings of block reconstruction.

    Args:
        steps: Adam steps of one window each. In the same time, many small steps lower the loss further than few large
            ones.
        seed: draws the windows.
        metric: (width, width) positive semi-definite weight of output errors, or (width,) its diagonal; None is the
            identity.
        rate: first step size, see :data:`RATE`.
    """

    steps: int
    seed: int = 0
    metric: Tensor | None = None
    rate: float = RATE


@dataclass(frozen=True)
class Reconstructed:
    """Result of block reconstruction.

    Args:
        weights: changed tensors by checkpoint name, rounded as the checkpoint will hold them, on the CPU.
        record: steps taken, the step that was kept, validation loss before and after, number of validation windows.
    """

    weights: dict[str, Tensor]
    record: dict[str, Any]


def reconstruct_layer(
    model: LayerwiseModel,
    index: int,
    groups: Sequence[Group],
    inputs: HiddenStates,
    wanted: HiddenStates,
    calls: Calls,
    settings: ReconstructionSettings,
    parts: Mapping[str, Tensor] | None = None,
) -> Reconstructed:
    """Train the loaded, pruned decoder layer ``index`` in place.

    Args:
        model: the model, layer ``index`` loaded.
        index: number of the layer.
        groups: its pruned operators; weights of other operators are left alone.
        inputs: hidden states that enter the layer.
        wanted: output hidden states to match.
        calls: arguments of the decoder layers.
        settings: steps, seed, metric.
        parts: sparse and low-rank parts of operators whose sum the layer holds: by checkpoint name, and by operator
            name with :data:`~fistapruner.models.files.low_rank.A` or ``B``.
    """
    # Activations of a bf16 model have no more digits than its matrix units take.
    with fast_products(exact_in_fast_products(model.dtype, model.device)), ordered_attention(model.device):
        summed = _summed(model, index, groups, parts or {})
        parameters = _parameters(model.layers[index], groups, summed)
        scales = parameters.root_mean_squares()
        loss = _Loss.of(model, inputs, wanted, settings.metric)
        held, train = _split(inputs.samples)
        order = _order(train, settings.steps, torch.Generator().manual_seed((settings.seed * 100_003 + index) % 2**63))

        def validate() -> float:
            with torch.no_grad():
                values = _values(parameters, summed)
                losses = (loss(_run(model, index, values, loss.inputs(window), calls), window) for window in held)
                return sum(map(float, losses)) / len(held)

        # A power of two, exact: gradients of a mean over a window's values are too small for fp16.
        up = 2.0 ** math.ceil(math.log2(inputs.seqlen * inputs.width)) if model.dtype == torch.float16 else 1.0
        optimizer = _optimizer(parameters)
        before = validate()
        patience, kept = Patience.begin(before, settings.rate), parameters.copy()
        taken = 0
        for taken in range(1, settings.steps + 1):
            for group, scale in zip(optimizer.param_groups, scales, strict=True):
                group["lr"] = patience.rate * scale * schedule(taken, settings.steps)
            window = order[taken - 1]
            optimizer.zero_grad()
            with torch.enable_grad():
                value = loss(_run(model, index, _values(parameters, summed), loss.inputs(window), calls), window)
            (value if up == 1.0 else value * up).backward()
            for master in parameters.masters.values() if up > 1.0 else ():
                if master.grad is not None:
                    master.grad.div_(up)
            optimizer.step()
            if not check_due(taken, settings.steps, CHECKS):
                continue
            verdict = patience.check(taken, validate())
            if verdict is Verdict.BETTER:
                kept = parameters.copy()
                continue
            parameters.restore(kept)
            optimizer = _optimizer(parameters)
            if verdict is Verdict.STOP:
                break
    parameters.restore(kept)
    # With exact products: the sum of both parts has the bits that a resumed run and an evaluation compute.
    weights = _write(model, index, parameters, summed) if patience.best_step else {}
    record = {
        "steps": taken,
        "kept_step": patience.best_step,
        "held_out_windows": len(held),
        "held_out_before": before,
        "held_out_after": patience.best,
    }
    return Reconstructed(weights, record)


@dataclass(frozen=True)
class _Summed:
    """An operator whose weight in the layer is the sum of a sparse and a low-rank part.

    Args:
        operator: its full name; ``source``: of its weight in the checkpoint.
        transposed: the layer holds it as (inputs, outputs).
        parts: its sparse part and its factors, by their names among the parameters.
    """

    operator: str
    source: str
    transposed: bool
    parts: dict[str, Tensor]

    def weight(self, name: str, exact: Mapping[str, Tensor]) -> Tensor:
        """Add the parts of the parameter ``name``, differentiable."""
        product = exact[name + B] @ exact[name + A]
        return exact[name] + (product.T if self.transposed else product)


def _summed(
    model: LayerwiseModel, index: int, groups: Sequence[Group], parts: Mapping[str, Tensor]
) -> dict[str, _Summed]:
    """Find the operators with a low-rank part, by the name of their weight inside the layer."""
    found = {}
    for operator in (operator for group in groups for operator in group):
        name, inside = model.full_name(index, operator.name), f"{operator.name}.weight"
        if name + A in parts:
            source = model.source(f"{name}.weight")
            tensors = {inside: parts[source], inside + A: parts[name + A], inside + B: parts[name + B]}
            tensors = {key: tensor.to(model.device, model.dtype) for key, tensor in tensors.items()}
            found[inside] = _Summed(name, source, operator.transposed, tensors)
    return found


def _parameters(layer: nn.Module, groups: Sequence[Group], summed: Mapping[str, _Summed]) -> MaskedParameters:
    """Return what may change in a loaded layer: pruned weights, low-rank parts, vectors of no router."""
    pruned = {f"{operator.name}.weight" for group in groups for operator in group}
    free = pruned | vectors(layer, ("norms", "biases"))
    tensors: dict[str, Tensor] = {name: parameter for name, parameter in layer.named_parameters() if name in free}
    for one in summed.values():
        tensors |= one.parts
    return MaskedParameters(tensors, pruned)


def _values(parameters: MaskedParameters, summed: Mapping[str, _Summed]) -> dict[str, Tensor]:
    """The parameters as the layer's forward pass uses them: both parts of an operator are added."""
    if not summed:
        return parameters.values()
    exact, starts = parameters.exact(), parameters.starts()
    factors = {name + part for name in summed for part in (A, B)}
    return {
        name: (summed[name].weight(name, exact) if name in summed else value).to(starts[name].dtype)
        for name, value in exact.items()
        if name not in factors
    }


def _optimizer(parameters: MaskedParameters) -> torch.optim.Adam:
    """A new optimizer with one group a tensor, so that each has its own step size."""
    groups = [{"params": [master]} for master in parameters.masters.values()]
    return torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)


def _write(
    model: LayerwiseModel, index: int, parameters: MaskedParameters, summed: Mapping[str, _Summed]
) -> dict[str, Tensor]:
    """Write trained values into the layer, rounded as stored; return them by their names in the journal."""
    owners = {name + part: one for name, one in summed.items() for part in (A, B)}
    sources = {
        name: owners[name].source if name in owners else model.source_of(index, name) for name in parameters.masters
    }
    parameters.write(lambda name, value: model.rounded(sources[name], value))
    layer, starts = model.layers[index], parameters.starts()
    stored = {}
    for name, source in sources.items():
        key = owners[name].operator + name[-len(A) :] if name in owners else source
        stored[key] = model.result(source, starts[name].detach())
    for name, one in summed.items():
        total = sum_of_parts(stored[one.source], stored, one.operator, transposed=one.transposed)
        layer.get_parameter(name).data.copy_(total)
    return stored


@dataclass
class _Loss:
    """The loss of one window: metric, data, token weights.

    Args:
        device: of the layer.
        source: hidden states that enter the layer.
        wanted: output hidden states to match.
        root: see :func:`_root`.
        limit: energy above which a token's weight falls below 1.
        weights: token weights of the windows used so far.
    """

    device: torch.device
    source: HiddenStates
    wanted: HiddenStates
    root: Tensor | None
    limit: Tensor
    weights: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: LayerwiseModel, source: HiddenStates, wanted: HiddenStates, metric: Tensor | None) -> _Loss:
        loss = cls(model.device, source, wanted, _root(metric, model.device), torch.ones(()))
        loss.limit = loss.energy(loss.target(0) - loss.inputs(0).float()).median().clamp_min(1e-30)
        return loss

    def inputs(self, window: int) -> Tensor:
        return self.source.read(window, window + 1, self.device)

    def target(self, window: int) -> Tensor:
        return self.wanted.read(window, window + 1, self.device, torch.float32)

    def energy(self, difference: Tensor) -> Tensor:
        """(batch, seqlen) squared length in the metric."""
        if self.root is not None:
            difference = difference * self.root if self.root.ndim == 1 else difference @ self.root
        return difference.square().sum(-1)

    def weight(self, window: int, target: Tensor) -> Tensor:
        """(1, seqlen) weights of a window's tokens."""
        if window not in self.weights:
            with torch.no_grad():
                self.weights[window] = (self.limit / self.energy(target - self.inputs(window).float())).clamp_max(1.0)
        return self.weights[window]

    def __call__(self, output: Tensor, window: int) -> Tensor:
        """Weighted mean over tokens, in units of what the layer adds to a typical token."""
        target = self.target(window)
        return (self.weight(window, target) * self.energy(output.float() - target)).mean() / self.limit


def _root(metric: Tensor | None, device: torch.device) -> Tensor | None:
    """Return ``R`` with ``R R^T`` the shrunk metric; for a diagonal, its square root.

    None is the identity. A metric of zeros, as of a model whose outputs never change, tells errors apart no more than
    the identity.
    """
    if metric is None or bool((metric if metric.ndim == 1 else metric.diagonal()).mean() == 0):
        return None
    metric = metric.to(device)
    if metric.ndim == 1:
        return ((1 - SHRINKAGE) * metric + SHRINKAGE * metric.mean()).sqrt()
    metric = (1 - SHRINKAGE) * metric
    metric.diagonal().add_(SHRINKAGE / (1 - SHRINKAGE) * metric.diagonal().mean())
    root, info = torch.linalg.cholesky_ex(metric)
    return root if int(info) == 0 else damped_cholesky(metric, 0.0, "the metric of output errors")[0]


def _run(model: LayerwiseModel, index: int, values: dict[str, Tensor], hidden: Tensor, calls: Calls) -> Tensor:
    """Output of the layer for one window with ``values`` for parameters."""
    args, kwargs = calls.by_size[1][index]
    out = torch.func.functional_call(model.layers[index], values, (hidden, *args), kwargs)
    return hidden_of(out)


def _split(samples: int) -> tuple[list[int], list[int]]:
    """Split windows into validation (1 to :data:`MAX_VALIDATION_WINDOWS`) and training; one is both."""
    apart = max(VALIDATE_EVERY, -(-samples // MAX_VALIDATION_WINDOWS))
    held = list(range(apart - 1, samples, apart)) or [samples - 1]
    train = [window for window in range(samples) if window not in held] or held
    return held, train


def _order(windows: list[int], count: int, generator: torch.Generator) -> list[int]:
    """Draw ``count`` windows: all of them once in random order, again in another, and so on."""
    order: list[int] = []
    while len(order) < count:
        order += [windows[place] for place in torch.randperm(len(windows), generator=generator).tolist()]
    return order[:count]


def passes(steps: int, samples: int) -> int:
    """Cost of block reconstruction, in forward passes of one window (a backward pass counts two).

    Args:
        steps: Adam steps.
        samples: calibration windows.
    """
    checks = 1 + min(steps, CHECKS)
    return 3 * steps + checks * len(_split(samples)[0])

"""Block matching: adjust a pruned decoder layer as a whole, masks frozen, until it answers as the dense layer did.

Solvers see one operator at a time. What their errors do together, behind the non-linearities and in the sum of the
residual stream, only the whole layer shows. So after a layer is pruned, its surviving weights, norms and biases take some
Adam steps (Kingma & Ba 2015) on

    mean over tokens of  w_t (y_t - y*_t)^T M (y_t - y*_t),

with ``y`` the pruned layer's output, ``y*`` the dense layer's, ``M`` the Fisher second moment of the model's loss at that
output (:mod:`fistapruner.sensitivity.fisher`; the identity where it was not measured), and ``w_t`` at most 1, smaller for
the few tokens with massive activations, whose squares would drown all others.

Some calibration windows are held out of the steps. They decide which step's weights are kept, the pruned layer's own
being the first candidate, when steps are too large, and when to stop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..activations.passes import Calls, Clock
from ..activations.store import HiddenStates
from ..models.discovery import Group
from ..models.layerwise import LayerwiseModel, hidden_of
from ..runtime.numerics import fast_products

RATE = 0.01
"""Adam's first step size, as a share of a tensor's root mean square over surviving weights; it falls to 0 by a cosine."""

WARM_UP = 0.1
"""Share of the steps over which the step size rises from 0."""

VALIDATE_EVERY = 8
"""One calibration window of so many is held out,"""

MAX_VALIDATION_WINDOWS = 8
"""but no more than these: more would not change the choice, and the looks at them take time."""

CHECKS = 8
"""How often the held-out windows are looked at."""

BACK_OFF = 0.3
"""Where a look shows no progress, matching goes back to the best weights and goes on with so much smaller steps."""

SMALLEST = 0.02
"""Share of the first step size below which it stops."""

SHRINKAGE = 0.1
"""Share of the metric that is replaced by its mean eigenvalue: it was measured on few tokens."""


@dataclass(frozen=True)
class Matched:
    """What matching did.

    Args:
        weights: changed tensors by checkpoint name, rounded as the checkpoint will hold them, on the CPU.
        record: steps taken, the step that was kept, held-out loss before and after, windows held out.
    """

    weights: dict[str, Tensor]
    record: dict[str, Any]


def match_layer(
    model: LayerwiseModel,
    index: int,
    groups: tuple[Group, ...],
    inputs: HiddenStates,
    wanted: HiddenStates,
    calls: Calls,
    clock: Clock,
    *,
    steps: int,
    seed: int,
    metric: Tensor | None = None,
) -> Matched:
    """Adjust the loaded, pruned decoder layer ``index`` in place.

    Args:
        model: the model, layer ``index`` loaded.
        index: which layer.
        groups: its pruned operators; weights of other operators are left alone.
        inputs: hidden states that enter the layer.
        wanted: output hidden states to match.
        calls: how the layer is called.
        clock: counts the time as ``match``.
        steps: Adam steps of one window each: for the same time they lower the loss further than fewer steps of several.
        seed: draws the windows.
        metric: (width, width) positive semi-definite weight of output errors, or (width,) its diagonal; None is the identity.
    """
    # Activations of a bf16 model have no more digits than its matrix units take.
    with clock.phase("match"), fast_products(model.dtype == torch.bfloat16):
        tuned = _Tuned.of(model, index, groups)
        loss = _Loss.of(model, inputs, wanted, metric)
        held, train = _split(inputs.samples)
        order = _order(train, steps, torch.Generator().manual_seed(seed * 100_003 + index))
        optimizer = tuned.optimizer()
        before = _held_out(model, index, tuned, loss, held, calls)
        best, best_step, kept, rate = before, 0, tuned.copy(), RATE
        every = max(1, steps // CHECKS)
        taken = 0
        for taken in range(1, steps + 1):
            for group, rms in zip(optimizer.param_groups, tuned.scales, strict=True):
                group["lr"] = rate * rms * _schedule(taken, steps)
            window = order[taken - 1]
            optimizer.zero_grad()
            with torch.enable_grad():
                value = loss(_run(model, index, tuned.values(), loss.inputs(window), calls), window)
            value.backward()
            optimizer.step()
            if taken % every == 0 or taken == steps:
                now = _held_out(model, index, tuned, loss, held, calls)
                if now < best:
                    best, best_step, kept = now, taken, tuned.copy()
                    continue
                tuned.restore(kept)
                optimizer = tuned.optimizer()
                rate *= BACK_OFF
                if rate < SMALLEST * RATE:
                    break
        tuned.restore(kept)
        weights = tuned.store(model, index) if best_step else {}
        record = {
            "steps": taken,
            "kept_step": best_step,
            "held_out_windows": len(held),
            "held_out_before": before,
            "held_out_after": best,
        }
        return Matched(weights, record)


@dataclass
class _Tuned:
    """The layer's parameters that may change: fp32 copies, masks of pruned ones, root mean squares of what is not zero."""

    layer: nn.Module
    masters: dict[str, Tensor]
    masks: dict[str, Tensor]
    scales: list[float]
    dtype: torch.dtype

    @classmethod
    def of(cls, model: LayerwiseModel, index: int, groups: tuple[Group, ...]) -> _Tuned:
        layer = model.layers[index]
        pruned = {f"{operator.name}.weight" for group in groups for operator in group}
        masters, masks = {}, {}
        for name, parameter in layer.named_parameters():
            if not parameter.is_floating_point() or (parameter.ndim > 1 and name not in pruned):
                continue
            masters[name] = parameter.detach().float().clone().requires_grad_()
            if name in pruned:
                masks[name] = parameter.detach() != 0
        scales = [float((master.detach().square().sum() / (master != 0).sum().clamp_min(1)).sqrt()) for master in masters.values()]
        return cls(layer, masters, masks, scales, model.dtype)

    def optimizer(self) -> torch.optim.Adam:
        """A new one, with one group a tensor, so that each has its own step size."""
        return torch.optim.Adam([{"params": [master]} for master in self.masters.values()], betas=(0.9, 0.95), fused=True)

    def values(self) -> dict[str, Tensor]:
        """The tensors as the forward pass uses them."""
        return {name: (master * self.masks[name] if name in self.masks else master).to(self.dtype) for name, master in self.masters.items()}

    def copy(self) -> list[Tensor]:
        return [master.detach().clone() for master in self.masters.values()]

    def restore(self, copied: list[Tensor]) -> None:
        with torch.no_grad():
            for master, value in zip(self.masters.values(), copied, strict=True):
                master.copy_(value)

    @torch.no_grad()
    def store(self, model: LayerwiseModel, index: int) -> dict[str, Tensor]:
        """Put the tensors into the layer; returns it by checkpoint name. A surviving weight never becomes zero."""
        stored = {}
        parameters = dict(self.layer.named_parameters())
        for name, exact in self.values().items():
            parameter = parameters[name]
            source = model.source(f"{model.layers_name}.{index}.{name}")
            value = model.rounded(source, exact).to(self.dtype)
            vanished = self.masks[name] & (value == 0) if name in self.masks else torch.zeros_like(value, dtype=torch.bool)
            parameter.copy_(torch.where(vanished, parameter, value))
            stored[source] = model.result(source, parameter.detach())
        return stored


@dataclass
class _Loss:
    """The metric, the data, the energy beyond which a token's weight falls, and the weights of the windows seen so far."""

    device: torch.device
    source: HiddenStates
    wanted: HiddenStates
    root: Tensor | None
    limit: Tensor
    weights: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: LayerwiseModel, source: HiddenStates, wanted: HiddenStates, metric: Tensor | None) -> _Loss:
        loss = cls(model.device, source, wanted, _root(metric, model.device), torch.ones((), device=model.device))
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
    """``R`` with ``R R^T`` the shrunk metric."""
    if metric is None:
        return None
    metric = metric.to(device)
    if metric.ndim == 1:
        return ((1 - SHRINKAGE) * metric + SHRINKAGE * metric.mean()).sqrt()
    metric = (1 - SHRINKAGE) * metric
    metric.diagonal().add_(SHRINKAGE / (1 - SHRINKAGE) * metric.diagonal().mean())
    root: Tensor = torch.linalg.cholesky(metric)
    return root


def _run(model: LayerwiseModel, index: int, values: dict[str, Tensor], hidden: Tensor, calls: Calls) -> Tensor:
    """Output of the layer for one window with ``values`` for parameters."""
    args, kwargs = calls.by_size[1][index]
    out = torch.func.functional_call(model.layers[index], values, (hidden, *args), kwargs)
    return hidden_of(out)


def _held_out(model: LayerwiseModel, index: int, tuned: _Tuned, loss: _Loss, held: list[int], calls: Calls) -> float:
    with torch.no_grad():
        values = tuned.values()
        return sum(float(loss(_run(model, index, values, loss.inputs(window), calls), window)) for window in held) / len(held)


def _split(samples: int) -> tuple[list[int], list[int]]:
    """Validation windows (every eighth, 1 to :data:`MAX_VALIDATION_WINDOWS`) and training windows; a single one is both."""
    apart = max(VALIDATE_EVERY, -(-samples // MAX_VALIDATION_WINDOWS))
    held = list(range(apart - 1, samples, apart)) or [samples - 1]
    train = [window for window in range(samples) if window not in held] or held
    return held, train


def _order(windows: list[int], count: int, generator: torch.Generator) -> list[int]:
    """``count`` windows: all of them once in random order, again in another, and so on."""
    order: list[int] = []
    while len(order) < count:
        order += [windows[place] for place in torch.randperm(len(windows), generator=generator).tolist()]
    return order[:count]


def passes(steps: int, samples: int) -> int:
    """What matching with so many steps and calibration windows costs, in forward passes of one window; backward passes cost two."""
    looks = 1 + min(steps, CHECKS)
    return 3 * steps + looks * len(_split(samples)[0])


def _schedule(step: int, steps: int) -> float:
    """Factor of the step size at ``step`` of ``steps``, from 1."""
    warm = max(1, round(WARM_UP * steps))
    if step <= warm:
        return step / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm + 1)))

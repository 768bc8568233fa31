"""Fisher sensitivity of the predictions to output errors of operators and layers.

An error ``e_t`` in some output of the dense model at token ``t`` changes the predicted distributions by

    KL(dense || perturbed) = 1/2 sum_t E[(g_t . e_t)^2] + higher orders,

where ``g_t`` is the gradient of the log-likelihood of labels *drawn from the model itself* with respect to that output: its
second moment is the Fisher information. One forward and one backward pass over some calibration windows measure it, one
decoder layer in memory at a time (:mod:`fistapruner.activations.stream`). The second moment is stored as

* ``E[g_i^2]`` of every output row ``i`` of each operator: with it, a layer problem's row errors become a prediction in
  nats (:mod:`.error_curves`);
* the matrix ``E[g g^T]`` of each decoder layer's output hidden states (if asked for): the metric of block matching
  (:mod:`fistapruner.tuning.block_matching`).

Gradient second moments as a metric for layer-wise errors go back to K-FAC (Martens & Grosse 2015, arXiv 1503.05671).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..activations.store import HiddenStates, Store
from ..activations.stream import Visit, Watched, backward, forward
from ..errors import FistaPrunerError
from ..models.discovery import Layout
from ..models.layerwise import LayerwiseModel, Tick
from ..runtime.numerics import add_gram, dtype_name, fast_products, mirror

HEAD_TOKENS = 512
"""Tokens whose logits are made at once."""

WIDE = 4096
"""Hidden size above which only the diagonal of a decoder layer's matrix is kept: the whole ones would fill memory and disk."""


class InputEnergy:
    """Mean squared input of operators that read the same tensor, gathered batch by batch: the diagonal of their Gram.

    Args:
        weight: (m, n) dense weights, stacked by rows.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.tokens = 0
        self._squares = torch.zeros(weight.shape[1], device=weight.device)

    def add(self, inputs: Tensor) -> None:
        """Add a batch of (tokens, n) inputs."""
        self._squares += inputs.float().square().sum(0)
        self.tokens += len(inputs)

    def mean(self) -> Tensor:
        """(n,) mean over tokens."""
        return self._squares / self.tokens


class Sums(Protocol):
    """What is gathered of an operator group's inputs."""

    def add(self, inputs: Tensor, /) -> None: ...


S = TypeVar("S", bound=Sums)


@dataclass(frozen=True)
class Look(Generic[S]):
    """What to gather on a forward pass of the dense model.

    Args:
        sums: makes an operator group's sums from its (m, n) fp32 weights, stacked by rows.
        done: receives (layer, group, sums) when all windows have passed.
    """

    sums: Callable[[Tensor], S]
    done: Callable[[int, int, S], None]


@dataclass(frozen=True)
class Sensitivity:
    """What one forward and one backward pass of the dense model measured.

    Args:
        rows: (m,) mean squared gradient of every output row of each operator, by full name.
        outputs: (width, width) second moment of the gradient at each decoder layer's output, in order, or their (width,)
            diagonals where the model is wider than :data:`WIDE`. Empty if it was not asked for.
        tokens: tokens behind the means.
    """

    rows: dict[str, Tensor]
    outputs: list[Tensor]
    tokens: int


def measure_sensitivity(
    model: LayerwiseModel,
    layout: Layout,
    tokens: Tensor,
    *,
    seed: int = 0,
    batch_size: int = 4,
    look: Look[Any] | None = None,
    outputs: bool = True,
    store: Store,
    tick: Tick = lambda what, done, total: None,
) -> Sensitivity:
    """Run the dense model forwards and backwards over some windows.

    Args:
        model: the dense model.
        layout: its operators.
        tokens: (windows, seqlen) token ids. Hidden states between all layers are stored for them, ``(layers + 1) * windows *
            seqlen * width`` values.
        seed: draws the labels.
        batch_size: windows in one pass.
        look: what else to gather on the way.
        outputs: whether to measure the decoder layers' outputs too.
        store: where hidden states are kept.
        tick: told of progress: (what, steps done, steps in all).

    Raises:
        FistaPrunerError: NaN or infinite gradients; names the operator.
    """
    states, calls = forward(
        model, tokens, batch_size, store, visit=_looking(layout, look), keep=True, progress=partial(tick, "decoder layers, forwards")
    )
    last = states.pop()
    gradient = HiddenStates((last.samples, last.seqlen, last.width), last.dtype)
    loss_gradient(model, last, gradient, seed)
    last.close()
    rows: dict[str, Tensor] = {}
    metrics: list[Tensor] = []

    @contextmanager
    def measure(index: int, layer: nn.Module) -> Iterator[Callable[[Tensor], None]]:
        operators = [operator for group in layout.layers[index] for operator in group]
        sums = {operator.name: torch.zeros(operator.rows, device=model.device) for operator in operators}
        metric = _OutputMetric(model.width, model.device) if outputs else None

        def add(name: str, grad: Tensor) -> None:
            sums[name] += grad.reshape(-1, grad.shape[-1]).float().square().sum(0)

        def hook(name: str) -> Callable[..., None]:
            def after_forward(_: object, __: object, output: Tensor) -> None:
                output.register_hook(lambda grad: add(name, grad))

            return after_forward

        handles = [layer.get_submodule(operator.name).register_forward_hook(hook(operator.name)) for operator in operators]
        try:
            yield (lambda above: None) if metric is None else metric.add
        finally:
            for handle in handles:
                handle.remove()
        if metric is not None:
            metrics.append(metric.mean(tokens.numel()))
        rows.update((layout.full_name(index, operator), sums[operator.name].cpu() / tokens.numel()) for operator in operators)

    backward(model, states, calls, gradient, measure, partial(tick, "decoder layers, backwards"))
    for name, values in rows.items():  # from the last decoder layer to the first, as gradients come
        if not bool(values.isfinite().all()):
            raise FistaPrunerError(
                f"{name}: the gradients of the predictions are NaN or infinite in {dtype_name(model.dtype)} passes: take "
                "--dtype float32, or --allocation uniform and --weighting none, which need none"
            )
    return Sensitivity(rows, metrics[::-1], tokens.numel())


def row_importance(sensitivity: Tensor) -> Tensor:
    """Weights of an operator's rows in its layer problem, from their mean squared gradients (m,); their mean is 1.

    The root of the sensitivity, not the sensitivity itself: it was measured on few tokens, and an error that is spread
    unevenly leaves the range in which the second moment describes its effect.
    """
    largest = float(sensitivity.max())
    if largest == 0.0:  # no row reaches a prediction: none counts more than another
        return torch.ones_like(sensitivity)
    # Times a power of four, whose root is exact: no bit of the result depends on it, and nothing underflows.
    sensitivity = (sensitivity.double() * 4.0 ** (-math.frexp(largest)[1] // 2)).float()
    floor = 1e-8 * sensitivity.mean()  # rows that reach no prediction keep a weight
    root = sensitivity.clamp_min(floor).sqrt()
    return root / root.mean()


def look_at_inputs(
    model: LayerwiseModel,
    layout: Layout,
    tokens: Tensor,
    look: Look[Any],
    *,
    batch_size: int = 4,
    store: Store,
    tick: Tick = lambda what, done, total: None,
) -> None:
    """Run the dense model forwards over some windows; arguments as for :func:`measure_sensitivity`."""
    progress = partial(tick, "decoder layers, forwards")
    states, _ = forward(model, tokens, batch_size, store, visit=_looking(layout, look), progress=progress)
    states[-1].close()


def _looking(layout: Layout, look: Look[Any] | None) -> Visit | None:
    """Gather what ``look`` asks for of the operators' inputs, on a forward pass."""
    if look is None:
        return None

    @contextmanager
    def gather(index: int, layer: nn.Module) -> Iterator[Watched]:
        groups = list(enumerate(layout.layers[index]))
        stacks = (torch.cat([operator.weight(layer).float() for operator in group]) for _, group in groups)
        sums = [look.sums(stacked) for stacked in stacks]
        yield Watched(groups, lambda number, _, inputs: sums[number].add(inputs.reshape(-1, inputs.shape[-1])))
        for number, own in enumerate(sums):
            look.done(index, number, own)

    return gather


class _OutputMetric:
    """Second moment of the gradient at a decoder layer's output: (width, width), or its diagonal above :data:`WIDE`."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._sum = torch.zeros((width, width) if width <= WIDE else (width,), device=device)

    def add(self, above: Tensor) -> None:
        """Add the gradients of a batch, (batch, seqlen, width)."""
        flat = above.reshape(-1, above.shape[-1]).float()
        if self._sum.ndim == 1:
            self._sum += flat.square().sum(0)
        else:
            with fast_products(above.dtype == torch.bfloat16):
                add_gram(self._sum, flat)

    def mean(self, tokens: int) -> Tensor:
        """Return the mean over tokens, on the CPU."""
        return (self._sum if self._sum.ndim == 1 else mirror(self._sum)).cpu() / tokens


def loss_gradient(
    model: LayerwiseModel, hidden: HiddenStates, gradient: HiddenStates, seed: int, *, head_tokens: int = HEAD_TOKENS
) -> None:
    """Write the gradient, at the last layer's output, of the summed log-likelihood of labels drawn from the model.

    Args:
        model: the model; its final norm and head are loaded and freed here.
        hidden: output of the last decoder layer.
        gradient: receives the gradient, of the same shape.
        seed: draws the labels.
        head_tokens: tokens whose logits are made at once.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    with model.embeddings_and_head():
        for window in range(hidden.samples):
            states = hidden.read(window, window + 1, model.device)
            below = torch.empty_like(states)
            for start in range(0, hidden.seqlen, head_tokens):
                tokens = slice(start, start + head_tokens)
                part = states[:, tokens].requires_grad_()
                ids = torch.zeros(part.shape[:2], dtype=torch.int64)
                with torch.enable_grad():
                    logits = model.logits(part, ids, gradients=True)
                # The log-likelihood's gradient: 1 at the drawn label, less every label's probability.
                above = torch.softmax(logits.detach()[0].float(), -1)
                drawn = draw_labels(above, generator)
                above.neg_().scatter_add_(1, drawn, torch.ones_like(above[:, :1]))
                (below[:, tokens],) = torch.autograd.grad(logits, part, above[None].to(logits.dtype))
            gradient.write(window, below)


def draw_labels(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """(tokens, 1) a label for each token: where the running sum of its (tokens, vocabulary) probabilities passes a uniform number.

    ``torch.multinomial`` draws a number for every word instead, which takes as long as the head.
    """
    sums = probabilities.cumsum(-1)
    uniform = torch.rand(len(sums), 1, device=sums.device, generator=generator)
    return torch.searchsorted(sums, uniform * sums[:, -1:])
